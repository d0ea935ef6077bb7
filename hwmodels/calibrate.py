"""From raw timings to a profile's numbers: medians with their spread, peaks, hand-offs, contention.

The measuring itself happens in runtime.microbench, through the same executor that runs plans.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hwmodels.interpolate import Grid
from hwmodels.profile import RESOURCES, Contention, Curve, Peak, Resource, Sample
from hwmodels.work import Work


def summarise(work: Work, times_s: Sequence[float]) -> Sample:
    """A curve's sample of repeated timings: median, and p90 - p10 as the spread."""
    ordered = sorted(times_s)
    last = len(ordered) - 1
    spread_s = ordered[round(0.9 * last)] - ordered[round(0.1 * last)]
    return Sample(
        work.n_tokens, work.flops, work.weight_bytes, work.io_bytes, statistics.median(ordered), spread_s, len(ordered)
    )


_LARGE_BYTES = 1 << 20  # below, caches and fixed costs decide, not the memory or the link


def fastest(curves: Iterable[Curve], resource: Resource) -> Peak:
    """Peak of a resource as the fastest that any of its curves' samples shows.

    efficiency is the median share of that peak's roofline over all samples with work in them: what an
    operation without a curve may expect.
    """
    own = [c for c in curves if c.resource == resource]
    flops_per_s: dict[str, float] = {}
    bytes_per_s = 1.0
    for curve in own:
        for s in curve.samples:
            if s.weight_bytes + s.io_bytes >= _LARGE_BYTES:
                bytes_per_s = max(bytes_per_s, (s.weight_bytes + s.io_bytes) / s.median_s)
            if s.flops > 0:
                flops_per_s[curve.dtype] = max(flops_per_s.get(curve.dtype, 0.0), s.flops / s.median_s)
    peak = Peak(flops_per_s, bytes_per_s, 1.0, 0.0, "measured")
    shares = [
        peak.roofline_s(c.dtype, s.flops, s.weight_bytes + s.io_bytes) / s.median_s for c in own for s in c.samples
    ]
    known = [share for share in shares if share > 0]
    efficiency = min(1.0, statistics.median(known)) if known else 1.0
    fixed_s = min((s.median_s for c in own for s in c.samples), default=0.0)
    return Peak(flops_per_s, bytes_per_s, efficiency, fixed_s, "measured")


def handoffs(delays_s: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median delay per "FROM>TO" pair of resources, never below zero."""
    return {pair: max(0.0, statistics.median(values)) for pair, values in sorted(delays_s.items()) if values}


def contention(alone_s: Mapping[str, float], together_s: Mapping[str, float]) -> Contention:
    """Rates of resources working together: time alone over time together, at most 1."""
    active = tuple(name for name in RESOURCES if name in together_s)
    rate = {str(name): max(0.01, min(1.0, alone_s[name] / together_s[name])) for name in active}
    return Contention(active, rate, "measured")


def group_medians(rows: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Median of the values under each name."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in rows:
        groups[name].append(value)
    return {name: statistics.median(values) for name, values in groups.items()}


@dataclass(frozen=True)
class Residual:
    """How well a curve predicts what it was not told: leave-one-out errors, as shares of the measured time."""

    curve: str
    n_points: int
    median: float
    worst: float


def residuals(curves: Iterable[Curve]) -> list[Residual]:
    """Leave-one-out errors of every curve that has points between others.

    Each inner node of an axis is left out with its whole line and predicted from its neighbours.
    """
    found = []
    for curve in curves:
        errors = _left_out(curve.grid)
        if errors:
            name = f"{curve.resource} {curve.op} {curve.dtype}"
            found.append(Residual(name, len(errors), statistics.median(errors), max(errors)))
    return found


def _left_out(grid: Grid) -> list[float]:
    errors = []
    for i in range(1, len(grid.xs) - 1):
        rest = Grid((*grid.xs[:i], *grid.xs[i + 1 :]), grid.ys, (*grid.values[:i], *grid.values[i + 1 :]))
        errors += [abs(rest.at(grid.xs[i], y) / value - 1) for y, value in zip(grid.ys, grid.values[i], strict=True)]
    for j in range(1, len(grid.ys) - 1):
        rows = tuple((*row[:j], *row[j + 1 :]) for row in grid.values)
        rest = Grid(grid.xs, (*grid.ys[:j], *grid.ys[j + 1 :]), rows)
        errors += [abs(rest.at(x, grid.ys[j]) / row[j] - 1) for x, row in zip(grid.xs, grid.values, strict=True)]
    return errors
