"""Several calibrations of one machine as one: what a shared machine does from minute to minute cancels.

A calibration of a minute tells that minute's speed. Where what is predicted runs for longer, or later, the machine
is calibrated again between the runs, and the mean over the calibrations stands beside the mean over the runs, both
without the fastest and the slowest (hwmodels.calibrate.trimmed_mean).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean, median, stdev
from typing import TypeVar

from hwmodels.calibrate import Part, fastest, trimmed_mean, with_best_laws
from hwmodels.errors import FormatError
from hwmodels.profile import AXES, Cold, Contention, Curve, HardwareProfile, Move, Repeats, Sample

_LOAD = "others_load"
_Mean = Callable[[Sequence[float]], float]
T = TypeVar("T")


def pooled(profiles: Sequence[HardwareProfile]) -> HardwareProfile:
    """The machine whose every number is the trimmed mean of what the profiles that know it, oldest first, say of it.

    A number's spread is the widest that any of them found, or the range of theirs if that is wider. Memory is
    the least that was to be had. FormatError if there is none, or if they are of other machines or other measurements.
    """
    if not profiles:
        raise FormatError("no profile to pool; expected at least one")
    first, *others = profiles
    if not others:
        return first
    for other in others:
        _check_alike(first, other)
    curves = tuple(_curve(same, trimmed_mean) for same in zip(*(_ordered(p.curves) for p in profiles), strict=True))
    notes = dict.fromkeys(note for p in profiles for note in p.notes)
    return replace(
        first,
        created=profiles[-1].created,
        fingerprint={**first.fingerprint, _LOAD: ", ".join(p.fingerprint.get(_LOAD, "unknown") for p in profiles)},
        vram_bytes=min(p.vram_bytes for p in profiles),
        host_bytes=min(p.host_bytes for p in profiles),
        peaks={name: fastest(curves, name) for name in first.peaks},  # type: ignore[arg-type]
        curves=curves,
        handoff_s={pair: trimmed_mean(found) for pair, found in _by_pair(p.handoff_s for p in profiles).items()},
        handoff_repeats=_handoff_repeats(profiles),
        contention=tuple(
            _contention(same, trimmed_mean) for same in zip(*(p.contention for p in profiles), strict=True)
        ),
        cold=tuple(_cold(same, trimmed_mean) for same in zip(*(p.cold for p in profiles), strict=True)),
        moves=tuple(_move(same, trimmed_mean) for same in zip(*(p.moves for p in profiles), strict=True)),
        notes=(f"The mean of {len(profiles)} calibrations, the first of {first.created}.", *notes),
    )


def pooled_part(parts: Sequence[Part]) -> Part:
    """What several passes over one part of a calibration say of it: every number the mean of theirs.

    Of all: a pass lasts long enough for no single stall to throw it, and three without two would be one.
    """
    first, *others = parts
    if not others:
        return first
    loads = [part.others_load for part in parts if part.others_load is not None]
    return Part(
        curves=tuple(_curve(same, fmean) for same in zip(*(_ordered(p.curves) for p in parts), strict=True)),
        handoff_s={pair: fmean(found) for pair, found in _by_pair(p.handoff_s for p in parts).items()},
        handoff_repeats=_handoff_repeats(parts),
        contention=tuple(_contention(same, fmean) for same in zip(*(p.contention for p in parts), strict=True)),
        cold=tuple(_cold(same, fmean) for same in zip(*(p.cold for p in parts), strict=True)),
        moves=tuple(_move(same, fmean) for same in zip(*(p.moves for p in parts), strict=True)),
        others_load=max(loads, default=None),
    )


def uncertainty(passes: Sequence[Mapping[str, Part]]) -> float:
    """Standard error of the mean over passes, as a share of it; of attention, MLPs and weights the worst curve's.

    A curve's level in a pass is the median over points of the time over the point's mean over passes. Infinite for
    less than two passes.
    """
    if len(passes) < 2:
        return math.inf
    found = [0.0]
    for name in passes[0]:
        for same in zip(*(_ordered(own[name].curves) for own in passes), strict=True):
            if same[0].op in _DECIDING:
                found.append(stdev(_levels(same)) / math.sqrt(len(passes)))
    return max(found)


_DECIDING = ("attn", "ffn", "pinned")


def _levels(same: Sequence[Curve]) -> list[float]:
    """Of each of the curves: how slow it is, relative to their mean."""
    points = list(zip(*(sorted(curve.samples, key=partial(_point, curve)) for curve in same), strict=True))
    means = [fmean(s.median_s for s in point) for point in points]
    shares = [[s.median_s / mean for s in point] for point, mean in zip(points, means, strict=True) if mean]
    return [median(own) for own in zip(*shares, strict=True)]


def _check_alike(one: HardwareProfile, other: HardwareProfile) -> None:
    """FormatError if two profiles say different things, whatever the numbers."""
    for what, of in _FACTS.items():
        if of(one) != of(other):
            raise FormatError(
                f"profiles {one.name} of {one.created} and {other.name} of {other.created} differ in {what}: pool "
                f"calibrations of one machine, one model and one extent"
            )


_FACTS: dict[str, Callable[[HardwareProfile], object]] = {
    "device": lambda p: p.device,
    "machine or software": lambda p: {name: value for name, value in p.fingerprint.items() if name != _LOAD},
    "threads": lambda p: p.cpu_threads,
    "what curves measured": lambda p: [(_name(c), [_point(c, s) for s in c.samples]) for c in _ordered(p.curves)],
    "sets of contention": lambda p: [(c.active, c.computing, bool(c.repeats)) for c in p.contention],
    "waits": lambda p: len(p.cold),
    "moves": lambda p: [move.to for move in p.moves],
}


def _name(curve: Curve) -> tuple[str, str, str, int, str]:
    return curve.resource, curve.op, curve.dtype, curve.threads, curve.source


def _ordered(curves: Iterable[Curve]) -> list[Curve]:
    return sorted(curves, key=_name)


def _point(curve: Curve, sample: Sample) -> tuple[float, float]:
    x, y = AXES[curve.op]
    return float(getattr(sample, x)), float(getattr(sample, y))


def _curve(same: Sequence[Curve], mean: _Mean) -> Curve:
    points: dict[tuple[float, float], list[Sample]] = defaultdict(list)
    for curve in same:
        for sample in curve.samples:
            points[_point(curve, sample)].append(sample)
    return with_best_laws(replace(same[0], samples=tuple(_sample(found, mean) for found in points.values())))


def _sample(found: Sequence[Sample], mean: _Mean) -> Sample:
    medians_s = [s.median_s for s in found]
    return replace(
        found[0],
        median_s=mean(medians_s),
        spread_s=_spread(medians_s, [s.spread_s for s in found]),
        count=sum(s.count for s in found),
        outliers=sum(s.outliers for s in found),
    )


def _repeats(values: Sequence[float], found: Sequence[Repeats]) -> Repeats:
    return Repeats(_spread(values, [r.spread for r in found]), sum(r.count for r in found))


def _spread(values: Sequence[float], spreads: Sequence[float]) -> float:
    return max(max(values) - min(values), *spreads)


def _by_pair(tables: Iterable[Mapping[str, T]]) -> dict[str, list[T]]:
    """What is known of every pair of resources: not every calibration meets each of them."""
    found: dict[str, list[T]] = defaultdict(list)
    for table in tables:
        for pair, value in table.items():
            found[pair].append(value)
    return found


def _handoff_repeats(profiles: Sequence[HardwareProfile] | Sequence[Part]) -> dict[str, Repeats]:
    known = _by_pair(p.handoff_repeats for p in profiles)
    values = _by_pair(p.handoff_s for p in profiles)
    return {pair: _repeats(values[pair], found) for pair, found in known.items()}


def _contention(same: Sequence[Contention], mean: _Mean) -> Contention:
    first = same[0]
    return replace(
        first,
        rate={name: mean([c.rate[name] for c in same]) for name in first.rate},
        repeats={
            name: _repeats([c.rate[name] for c in same], [c.repeats[name] for c in same]) for name in first.repeats
        },
    )


def _cold(same: Sequence[Cold], mean: _Mean) -> Cold:
    known = [c.repeats for c in same if c.repeats is not None]
    colds_s = [c.cold_s for c in same]
    repeats = _repeats(colds_s, known) if known else None
    return replace(same[0], waited_s=mean([c.waited_s for c in same]), cold_s=mean(colds_s), repeats=repeats)


def _move(same: Sequence[Move], mean: _Mean) -> Move:
    known = [m.repeats for m in same if m.repeats is not None]
    befores_s = [m.before_s for m in same]
    return replace(
        same[0],
        before_s=mean(befores_s),
        after_s=mean([m.after_s for m in same]),
        cold_s=mean([m.cold_s for m in same]),
        repeats=_repeats(befores_s, known) if known else None,
    )
