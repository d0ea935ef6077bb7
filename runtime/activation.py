"""How gate and up become what down multiplies: an activation of the gate times up, or a clamped form of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClampedGlu:
    """gpt-oss's: both clamped, the gate times a steeper sigmoid of itself, one added to up."""

    alpha: float = 1.702
    limit: float = 7.0


Activation = Callable[[Tensor], Tensor] | ClampedGlu


def gated(act: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """What down multiplies, of gate's and up's shape."""
    if not isinstance(act, ClampedGlu):
        return act(gate) * up
    gate = gate.clamp(max=act.limit)
    return gate * torch.sigmoid(gate * act.alpha) * (up.clamp(min=-act.limit, max=act.limit) + 1)
