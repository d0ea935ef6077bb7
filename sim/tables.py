"""Tables of one layer's MLP seconds over its placements, shared by all steps and layers that are alike in them.

What a step uses of a layer are the experts that have tokens. Placements that agree in those take the same time, so
they are one row of a table; decode steps of a sequence use as many experts with one token each, whose order does not
matter, so that all layers and steps together need a handful of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sim.layercost import Count, Prices, Seconds, Sending, Slowdown, routed_mlp_s
from sim.workload import Routing


@dataclass(frozen=True)
class Used:
    """What a step uses of a layer.

    tokens   of every expert that has any
    gg       resident columns of these experts, [row, expert], rows distinct
    row      which row each number of units is
    """

    tokens: Routing
    gg: Count
    row: Count

    @cached_property
    def key(self) -> object:
        """Equal keys have equal rows."""
        return self.tokens, self.gg.tobytes()


def used(gg: Count, routing: Routing, columns: int) -> Used:
    """What a step uses of a layer whose experts have so many columns, for placements gg [u, expert]."""
    experts = np.flatnonzero(routing)
    tokens = tuple(routing[e] for e in experts.tolist())
    of_used = gg[:, experts]
    if len(set(tokens)) == 1 and np.isin(of_used, (0, columns)).all():
        of_used = -np.sort(-of_used, axis=1)  # alike in tokens and wholly here or there: only their number counts
    rows, row = np.unique(of_used, axis=0, return_inverse=True)
    return Used(tokens, rows, row.reshape(-1))


class RoutedTable:
    """Seconds of a layer that sends nothing ahead, [alone or contended, row, sending]; priced when asked for."""

    def __init__(
        self, prices: Prices, layer: int, of: Used, sendings: Sequence[Sending], slowed: Slowdown | None
    ) -> None:
        self._asked = prices, layer, of, sendings, slowed
        self._seconds = np.full((1 if slowed is None else 2, len(of.gg), len(sendings)), np.nan)
        self._known = np.zeros(len(of.gg), dtype=bool)

    def whole(self) -> Seconds:
        """All rows."""
        return self.rows(np.arange(len(self._known)))

    def rows(self, row: Count) -> Seconds:
        """The rows asked for, in that order."""
        if not self._known[row].all():
            # Those between are soon asked for, too, and numpy's calls cost more than their arithmetic.
            few = slice(row.min(), row.max() + 1)
            new = few.start + np.flatnonzero(~self._known[few])
            prices, layer, of, sendings, slowed = self._asked
            self._seconds[:, new] = routed_mlp_s(prices, layer, of.gg[new], of.tokens, sendings, slowed)
            self._known[new] = True
        return self._seconds[:, row]


@dataclass(frozen=True)
class Shares:
    """How often each row of a table counts, [u, row], summed over the steps that share the table."""

    of: Used
    count: Seconds


@dataclass(frozen=True)
class Single:
    """A table that one step alone has, and how often that step counts."""

    of: Used
    count: float


def by_table(steps: Sequence[tuple[float, Used]]) -> list[Shares | Single]:
    """What steps, each counted so often, use of a layer: together where their tables are equal."""
    groups: dict[object, list[tuple[float, Used]]] = {}
    for count, of in steps:
        groups.setdefault(of.key, []).append((count, of))
    return [_together(group) for group in groups.values()]


def _together(group: list[tuple[float, Used]]) -> Shares | Single:
    count, of = group[0]
    if len(group) == 1:
        return Single(of, count)
    total = np.zeros((len(of.row), len(of.gg)))
    for count, other in group:
        total[np.arange(len(other.row)), other.row] += count
    return Shares(of, total)
