"""A router's choice, grouped by expert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from sim.workload import Routing

_FEW = 64


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
        if top_k_index.device.type == "cpu" and top_k_index.numel() <= _FEW:
            return _of_few(top_k_index, top_k_weights, n_experts)
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


def _of_few(top_k_index: Tensor, top_k_weights: Tensor, n_experts: int) -> Routed:
    """Routed.of for a token or a few: sorting so little takes less time than calling torch for it."""
    flat = top_k_index.reshape(-1).tolist()
    order = sorted(range(len(flat)), key=flat.__getitem__)
    counts = [0] * (n_experts + 1)
    for expert in flat:
        counts[expert] += 1
    top_k = top_k_index.shape[-1]
    rows = torch.tensor([i // top_k for i in order])
    weights = top_k_weights.reshape(-1)[torch.tensor(order)]
    return Routed(tuple(counts[:n_experts]), (0, *accumulate(counts[:n_experts])), rows, weights, rows, weights)
