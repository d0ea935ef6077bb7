"""From raw timings to a profile's numbers: medians with their spread, peaks, hand-offs, contention, laws.

The measuring itself happens in runtime.microbench and runtime.standin, through the same executor that runs plans.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from hwmodels.errors import FormatError
from hwmodels.interpolate import LAWS, Grid, Law, Laws
from hwmodels.load import BUSY_SHARE
from hwmodels.profile import AXES, RESOURCES, Cold, Contention, Curve, Move, Peak, Repeats, Resource, Sample
from hwmodels.work import Work

FLOOR_S = 50e-6
"""About what handing a task to another thread takes: errors below it are lost there, whatever share of a task."""
DRIFT_SHARE = 0.15
"""Difference of the yardstick before and after from which on a calibration is marked."""
GOOD_MEDIAN, GOOD_WORST = 0.05, 0.15
"""Leave-one-out errors that a curve of a quiet machine stays below."""
_LARGE_BYTES = 1 << 20  # below, caches and fixed costs decide, not the memory or the link
_KNOWN_SHARE = 0.02  # half a confidence interval, of the median
_KNOWN_S = 1e-6  # or so many seconds: the clock and the loop around it
_LEAST_REPEATS = 5
_YARDSTICKS = ("stream_read", "stream_copy")
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """What one part of a calibration measured. others_load is the share of all cores that others took meanwhile."""

    curves: tuple[Curve, ...] = ()
    handoff_s: dict[str, float] = field(default_factory=dict)
    handoff_repeats: dict[str, Repeats] = field(default_factory=dict)
    contention: tuple[Contention, ...] = ()
    cold: tuple[Cold, ...] = ()
    moves: tuple[Move, ...] = ()
    others_load: float | None = None


# -- from repeats to numbers --------------------------------------------------------------------------


def summarise(work: Work, times_s: Sequence[float]) -> Sample:
    """A curve's sample of repeated timings: median, p90 - p10 as the spread, and how many lie far off.

    Far is more than three standard deviations, estimated from the median distance to the median; they stay in.
    """
    middle_s, found = statistics.median(times_s), repeats(times_s)
    far_s = max(3 * 1.4826 * statistics.median(abs(t - middle_s) for t in times_s), _KNOWN_SHARE * middle_s)
    outliers = sum(abs(t - middle_s) > far_s for t in times_s)
    size = (work.n_tokens, work.flops, work.weight_bytes, work.io_bytes)
    return Sample(*size, middle_s, found.spread, found.count, outliers)


def samples(
    times_s: Mapping[Work, Sequence[Sequence[float]]], slowness: Sequence[float] | None = None
) -> tuple[Sample, ...]:
    """A curve's samples from repeats by round, where rounds visited many points: what one did to all of them cancels.

    A round is any stretch of time with some of the points in it, each time others. Its slowness, given where it is
    known of more than this curve, is the middle over points of its times relative to the point's own; times are divided
    by it, and the middles of what is left (as a median polish, Tukey 1977) come times the mean over rounds. So points
    of a curve stand to each other as within a round, whatever the machine's speed was meanwhile; spreads are of the
    times as measured. All rounds count: a stall is gone with a round's middle, and of a machine with two speeds the
    few rounds of a part tell the share of each; without the outermost they would tell the more frequent one.
    """
    by_round = slowness_of(times_s) if slowness is None else slowness
    # Where a stretch has none of the points, only what is known of others says how slow it was.
    seen = [any(rounds[number] for rounds in times_s.values()) for number in range(len(by_round))]
    level = statistics.fmean(s for s, some in zip(by_round, seen, strict=True) if some or slowness is not None)
    return tuple(
        replace(summarise(work, [t for own in rounds for t in own]), median_s=level * _evened(rounds, by_round))
        for work, rounds in times_s.items()
    )


_POLISHES = 3


def slowness_of(times_s: Mapping[Work, Sequence[Sequence[float]]]) -> list[float]:
    """Of every round, how slow it was, relative to the points' own times; see samples."""
    n_rounds = len(next(iter(times_s.values())))
    slowness = [1.0] * n_rounds
    for _ in range(_POLISHES):
        middle_s = {work: _evened(rounds, slowness) for work, rounds in times_s.items()}
        slowness = [
            _middle(
                [
                    statistics.median(rounds[number]) / middle_s[work]
                    for work, rounds in times_s.items()
                    if rounds[number] and middle_s[work]
                ]
                or [1.0]
            )
            or 1.0  # shorter than the clock's step
            for number in range(n_rounds)
        ]
    return slowness


def _evened(rounds: Sequence[Sequence[float]], slowness: Sequence[float]) -> float:
    """Mean of the middle half of a point's times, each by its round's slowness.

    Where a time is one of two by chance, as of a copy whose thread must wait for a core or not, the median is one of
    them and jumps from point to point; what a plan pays is between.
    """
    return _middle([t / slow for own, slow in zip(rounds, slowness, strict=True) for t in own])


def _middle(values: Sequence[float]) -> float:
    """Mean of the middle half."""
    cut = len(values) // 4
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def repeats(values: Sequence[float]) -> Repeats:
    """Number and p90 - p10 of repeated measurements."""
    ordered, last = sorted(values), len(values) - 1
    return Repeats(ordered[round(0.9 * last)] - ordered[round(0.1 * last)], len(ordered))


def is_known(times_s: Sequence[float]) -> bool:
    """Whether more repeats would hardly move the median: its 95 % interval is within 2 % or a microsecond.

    The interval is 1.58 interquartile ranges over the root of the count (McGill, Tukey, Larsen 1978).
    """
    n = len(times_s)
    if n < _LEAST_REPEATS:
        return False
    low, middle, high = statistics.quantiles(times_s, n=4)
    return 1.58 * (high - low) / math.sqrt(n) <= max(_KNOWN_SHARE * middle, _KNOWN_S)


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
    tasks = [(c.dtype, s) for c in own if c.op not in _YARDSTICKS for s in c.samples]
    shares = [peak.roofline_s(dtype, s.flops, s.weight_bytes + s.io_bytes) / s.median_s for dtype, s in tasks]
    known = [share for share in shares if share > 0]
    efficiency = min(1.0, statistics.median(known)) if known else 1.0
    fixed_s = min((s.median_s for _, s in tasks), default=0.0)
    return Peak(flops_per_s, bytes_per_s, efficiency, fixed_s, "measured")


def handoffs(delays_s: Mapping[str, Sequence[float]]) -> Part:
    """Mean delay per "FROM>TO" pair of resources, never below zero, and how it was measured.

    Not the median: delays of a pair differ with what is handed over (7 and 65 µs between two tasks of the device),
    and in a step they add up. A tenth at either end does not count.
    """
    known = {pair: values for pair, values in sorted(delays_s.items()) if values}
    means = {pair: max(0.0, trimmed_mean(values)) for pair, values in known.items()}
    return Part(handoff_s=means, handoff_repeats={pair: repeats(values) for pair, values in known.items()})


def trimmed_mean(values: Sequence[float]) -> float:
    """Mean without a tenth at either end, at least one of more than two.

    A machine that others use too has two speeds or more, by turns: the median of few times is one of them, the mean of
    all is thrown by a single stall.
    """
    cut = max(1, len(values) // 10) if len(values) > 2 else 0
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def contention(
    alone_s: Mapping[Resource, Sequence[float]],
    together_s: Mapping[Resource, Sequence[float]],
    computing: tuple[Resource, ...] = (),
) -> Contention:
    """Rates of resources working together: time alone over time together, at most 1; work of `computing` computes.

    Mean times by resource, one per round, set against each other within a round, so that what drifts between rounds
    cancels. The rate is the mean over rounds, a tenth at either end left out: threads that share a core take turns,
    and a median tells of one that had it.
    """
    active = tuple(name for name in RESOURCES if name in together_s)
    shares = {
        str(name): [alone / together for alone, together in zip(alone_s[name], together_s[name], strict=True)]
        for name in active
    }
    rate = {name: max(0.01, min(1.0, trimmed_mean(found))) for name, found in shares.items()}
    return Contention(active, rate, "measured", {name: repeats(found) for name, found in shares.items()}, computing)


def merged(curves: Iterable[Curve]) -> list[Curve]:
    """Curves with the samples of all that describe the same thing, each with the laws that fit it best.

    A point that was measured twice counts with the faster measurement, the less disturbed one.
    """
    groups: dict[tuple[str, str, str, int], list[Curve]] = defaultdict(list)
    for curve in curves:
        groups[curve.resource, curve.op, curve.dtype, curve.threads].append(curve)
    return [
        with_best_laws(
            replace(same[0], samples=_fastest_points(AXES[same[0].op], (s for c in same for s in c.samples)))
        )
        for same in groups.values()
    ]


def _fastest_points(axes: tuple[str, str], samples: Iterable[Sample]) -> tuple[Sample, ...]:
    points: dict[tuple[float, float], Sample] = {}
    for sample in sorted(samples, key=lambda s: -s.median_s):
        points[getattr(sample, axes[0]), getattr(sample, axes[1])] = sample
    return tuple(points[point] for point in sorted(points))


# -- how good a curve is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Residual:
    """How well a curve predicts what it was not told: leave-one-out errors.

    median and worst are shares of the measured time, or of FLOOR_S where that is longer.
    """

    curve: str
    n_points: int
    median: float
    worst: float


def residuals(curves: Iterable[Curve]) -> list[Residual]:
    """Leave-one-out errors of every curve that has points between others.

    Each inner node of an axis is left out with its whole line and predicted from its neighbours. A token count
    that stands right beside another is not: kernels change there from one to the next, nothing is ever interpolated
    between the two, and a line across them says nothing of the gaps where something is.
    """
    found = []
    for curve in curves:
        errors = [*_left_out(curve.grid, 0), *_left_out(curve.grid, 1)]
        if errors:
            name = f"{curve.resource} {curve.op} {curve.dtype}"
            found.append(Residual(name, len(errors), statistics.median(errors), max(errors)))
    return found


def with_best_laws(curve: Curve) -> Curve:
    """The curve with the law that predicts left-out points best on each axis; linear if no other is clearly better."""
    laws: Laws = (_best_law(curve.grid, 0), _best_law(curve.grid, 1))
    return replace(curve, laws=laws)


def _best_law(grid: Grid, axis: int) -> Law:
    errors: dict[Law, float] = {}
    for law in LAWS:
        laws: Laws = (law, "linear") if axis == 0 else ("linear", law)
        try:
            found = list(_left_out(replace(grid, laws=laws), axis))
        except FormatError:  # an axis that begins at zero has no logarithm
            continue
        if not found:
            return "linear"
        errors[law] = statistics.mean(found)
    best = min(errors, key=lambda law: errors[law])
    return best if errors[best] < 0.8 * errors["linear"] else "linear"


def _left_out(grid: Grid, axis: int) -> Iterator[float]:
    """Errors of an axis's inner nodes, predicted without them."""
    nodes = grid.xs if axis == 0 else grid.ys
    for i in range(1, len(nodes) - 1):
        if axis == 0 and min(nodes[i] - nodes[i - 1], nodes[i + 1] - nodes[i]) <= 1:
            continue
        rest = _without(grid, axis, i)
        for k, other in enumerate(grid.ys if axis == 0 else grid.xs):
            found_s = rest.at(nodes[i], other) if axis == 0 else rest.at(other, nodes[i])
            measured_s = grid.values[i][k] if axis == 0 else grid.values[k][i]
            yield abs(found_s - measured_s) / max(measured_s, FLOOR_S)


def _without(grid: Grid, axis: int, i: int) -> Grid:
    if axis == 0:
        return replace(grid, xs=_drop(grid.xs, i), values=_drop(grid.values, i))
    return replace(grid, ys=_drop(grid.ys, i), values=tuple(_drop(row, i) for row in grid.values))


def _drop(items: tuple[T, ...], i: int) -> tuple[T, ...]:
    return (*items[:i], *items[i + 1 :])


# -- what to know of a calibration --------------------------------------------------------------------


def remarks(parts: Mapping[str, Part]) -> tuple[str, ...]:
    """What makes a calibration doubtful, a sentence each: others at work meanwhile, a yardstick that moved."""
    busy = {name: part.others_load for name, part in parts.items() if (part.others_load or 0.0) >= BUSY_SHARE}
    found = []
    if busy:
        worst = max(load or 0.0 for load in busy.values())
        found.append(
            f"Other programs kept up to {worst:.0%} of all cores busy while {', '.join(busy)} "
            f"{'was' if len(busy) == 1 else 'were'} measured: times may be too long. Calibrate again without them."
        )
    return (*found, *_drifts(c for part in parts.values() for c in part.curves))


def _drifts(curves: Iterable[Curve]) -> Iterator[str]:
    """A sentence for every yardstick whose measurements, before and after all others, differ."""
    for name, found in _yardsticks(curves).items():
        if max(found) > (1 + DRIFT_SHARE) * min(found):
            speeds = _gigabytes(found)
            yield f"The yardstick {name} ran at {speeds} GB/s, before and after: the machine's speed changed."


def moved(calibrated: Iterable[Curve], now: Iterable[Curve]) -> list[str]:
    """A sentence for every yardstick that ran at another speed when a profile was measured than it does now."""
    then, found = _yardsticks(calibrated), []
    for name, speeds in _yardsticks(now).items():
        known = then.get(name, [])
        if known and max(max(speeds) / max(known), max(known) / min(speeds)) > 1 + DRIFT_SHARE:
            found.append(
                f"The yardstick {name} ran at {max(known) / 1e9:.1f} GB/s when the machine was calibrated and at "
                f"{_gigabytes(speeds)} GB/s beside these runs: what was predicted is another speed of the machine."
            )
    return found


def _yardsticks(curves: Iterable[Curve]) -> dict[str, list[float]]:
    """Bytes/s of every yardstick, in the order measured."""
    speeds: dict[str, list[float]] = defaultdict(list)
    for curve in curves:
        if curve.op in _YARDSTICKS:
            speeds[f"{curve.op} on the {curve.resource}"] += [s.io_bytes / s.median_s for s in curve.samples]
    return speeds


def _gigabytes(speeds: Iterable[float]) -> str:
    return " and ".join(f"{speed / 1e9:.1f}" for speed in speeds)
