"""The arithmetic of MLP parts, on whatever device the tensors are: the native kernel where it can, torch elsewhere.

Letters: S rows (tokens), D model width, C columns of the part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from runtime import native
from runtime.activation import Activation, gated
from runtime.native import Piece as Piece


def piece_views(flat: Tensor, d_model: int, columns: int) -> Piece:
    """The matrices of a piece stored as gate | up | down in 3 * D * C consecutive elements; behind them 2 * C biases.

    gate_up [2C, D] (gate rows, then up rows) and down [D, C], both contiguous; bias [2C], or None where flat ends.
    """
    split, end = 2 * columns * d_model, 3 * columns * d_model
    bias = flat[end : end + 2 * columns] if flat.numel() > end else None
    return Piece(flat[:split].view(2 * columns, d_model), flat[split:end].view(d_model, columns), bias)


def gated_mlp(x_SD: Tensor, pieces: Sequence[Piece], act: Activation) -> Tensor:
    """Sum over pieces of gated(act, x @ gate.T, x @ up.T) @ down.T: partial output [S, D]; biases added."""
    kernel, code = native.kernel(), native.activation_code(act)
    if kernel is None or code is None or native.leaves_to_torch(x_SD.dtype, x_SD.shape[0]):
        return torch_gated_mlp(x_SD, pieces, act)
    if native.takes(x_SD, pieces):
        return kernel.mlp(x_SD, [(None, None, pieces)], code)
    return torch_gated_mlp(x_SD, pieces, act)


def routed_mlp(
    x_SD: Tensor,
    experts: Sequence[tuple[Tensor, Tensor, Sequence[Piece]]],
    act: Activation,
) -> Tensor:
    """Weighted sum over experts, each (rows, weights, pieces): rows index x_SD, one weight each."""
    kernel, code = native.kernel(), native.activation_code(act)
    mean_rows = sum(rows.shape[0] for rows, _, _ in experts) / max(1, len(experts))
    if kernel is None or code is None or native.leaves_to_torch(x_SD.dtype, mean_rows):
        return torch_routed_mlp(x_SD, experts, act)
    if all(native.takes(x_SD, pieces) for _, _, pieces in experts):
        # Held in a list: the kernel is given addresses.
        own = [(rows.contiguous(), weights.to(torch.float32).contiguous(), pieces) for rows, weights, pieces in experts]
        return kernel.mlp(x_SD, own, code)
    return torch_routed_mlp(x_SD, experts, act)


def torch_gated_mlp(x_SD: Tensor, pieces: Sequence[Piece], act: Activation) -> Tensor:
    """gated_mlp by torch: values rounded to x's dtype after every step."""
    out: Tensor | None = None
    for gate_up, down, bias in pieces:
        gate, up = linear(x_SD, gate_up, bias).chunk(2, dim=-1)
        part = linear(gated(act, gate, up), down)
        out = part if out is None else out.add_(part)
    assert out is not None, "a part has at least one piece"
    return out


def torch_routed_mlp(
    x_SD: Tensor,
    experts: Sequence[tuple[Tensor, Tensor, Sequence[Piece]]],
    act: Activation,
) -> Tensor:
    """routed_mlp by torch."""
    out = torch.zeros_like(x_SD)
    for rows, weights, pieces in experts:
        y = torch_gated_mlp(x_SD[rows], pieces, act).mul_(weights[:, None].to(x_SD.dtype))
        out.index_add_(0, rows, y)
    return out
