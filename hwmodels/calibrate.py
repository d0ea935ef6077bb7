"""From raw timings to a profile's numbers: medians with their spread, peaks, hand-offs, contention.

The measuring itself happens in runtime.microbench, through the same executor that runs plans.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from hwmodels.profile import Contention, Curve, Peak, Resource, Sample
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
    active: tuple[Resource, ...] = tuple(together_s)  # type: ignore[assignment]
    rate = {name: max(0.01, min(1.0, alone_s[name] / together_s[name])) for name in active}
    return Contention(active, rate, "measured")


def group_medians(rows: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Median of the values under each name."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in rows:
        groups[name].append(value)
    return {name: statistics.median(values) for name, values in groups.items()}
