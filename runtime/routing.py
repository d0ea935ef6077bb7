"""A router's choice, grouped by expert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from sim.workload import Routing


@dataclass(frozen=True)
class Routed:
    """Tokens grouped by expert: rows and weights of expert e lie at [first[e], first[e + 1]).

    The same rows and weights twice, where the router left them and in host memory, since both sides
    compute. counts is what the simulator replays.
    """

    counts: Routing
    first: tuple[int, ...]
    rows: Tensor
    weights: Tensor
    host_rows: Tensor
    host_weights: Tensor

    @staticmethod
    def of(top_k_index: Tensor, top_k_weights: Tensor, n_experts: int) -> Routed:
        """Group a choice [S, k]; the index n_experts means "masked" and is left out."""
        flat = top_k_index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        rows = torch.div(order, top_k_index.shape[-1], rounding_mode="floor")
        weights = top_k_weights.reshape(-1)[order]
        counts = torch.bincount(flat, minlength=n_experts)[:n_experts].tolist()
        first = (0, *accumulate(counts))
        return Routed(tuple(counts), first, rows, weights, rows.cpu(), weights.cpu())

    def on(self, device: torch.device) -> Routed:
        """The same for a device other than the router's."""
        return replace(self, rows=self.rows.to(device), weights=self.weights.to(device))

    def of_expert(self, expert: int, on_host: bool) -> tuple[Tensor, Tensor]:
        """Rows and weights of one expert."""
        span = slice(self.first[expert], self.first[expert + 1])
        return (self.host_rows[span], self.host_weights[span]) if on_host else (self.rows[span], self.weights[span])
