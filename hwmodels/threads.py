"""A measured machine with fewer CPU threads than it was measured with.

Calibration times the CPU's MLP parts with other numbers of threads at a few token counts and one width. How much
faster or slower they are there is taken to hold at every width, and between those token counts in proportion. All
else, contention too, stays as measured with the profile's own number: fewer threads disturb the link no more.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hwmodels.errors import ProfileError
from hwmodels.profile import Curve, HardwareProfile, Sample

_CLEARLY = 0.97
"""Repeats of one measurement differ by a few per cent."""


def thread_counts(profile: HardwareProfile, dtype: str) -> tuple[int, ...]:
    """Numbers of threads below the profile's own with which the CPU's MLPs were measured, most first."""
    own = profile.cpu_threads
    return tuple(sorted((c.threads for c in profile.curves if _is_mlp(c, dtype) and 0 < c.threads < own), reverse=True))


def faster_counts(profile: HardwareProfile, dtype: str) -> tuple[int, ...]:
    """Those of them that are clearly faster than the profile's own number at any number of tokens."""
    ratios = {n: _ratios(profile, n, dtype) for n in thread_counts(profile, dtype)}
    return tuple(n for n, ratio in ratios.items() if min(ratio.values()) < _CLEARLY)


def with_threads(profile: HardwareProfile, dtype: str, n_threads: int | None) -> HardwareProfile:
    """The machine computing a model of a dtype with so many CPU threads; itself for None and for its own number.

    Times that follow from it are marked `estimated`. Raises ProfileError for a number that was not measured.
    """
    if n_threads is None or n_threads == profile.cpu_threads:
        return profile
    known = thread_counts(profile, dtype)
    own = profile.curve("CPU", "ffn", dtype)
    if own is None or n_threads not in known:
        counts = ", ".join(map(str, sorted({*known, profile.cpu_threads})))
        raise ProfileError(
            f"profile {profile.name!r} was not measured with {n_threads} CPU threads in {dtype} but with {counts}; "
            f"calibrate with --threads {n_threads}, or plan again"
        )
    kept = [c for c in profile.curves if not _is_mlp(c, dtype)]
    return replace(profile, cpu_threads=n_threads, curves=(*kept, _scaled(profile, own, n_threads)))


def _is_mlp(curve: Curve, dtype: str) -> bool:
    return (curve.resource, curve.op, curve.dtype) == ("CPU", "ffn", dtype)


def _ratios(profile: HardwareProfile, n_threads: int, dtype: str) -> dict[int, float]:
    """Time with so many threads over time with the profile's own, by tokens; the median over widths."""
    own = profile.curve("CPU", "ffn", dtype)
    other = next((c for c in profile.curves if _is_mlp(c, dtype) and c.threads == n_threads), None)
    if own is None or other is None or own.threads != profile.cpu_threads:
        return {1: 1.0}
    found: dict[int, list[float]] = {}
    for s in other.samples:
        found.setdefault(s.n_tokens, []).append(s.median_s / own.grid.at(float(s.n_tokens), s.weight_bytes))
    return {n: float(np.median(ratios)) for n, ratios in sorted(found.items())}


def _scaled(profile: HardwareProfile, own: Curve, n_threads: int) -> Curve:
    ratios = _ratios(profile, n_threads, own.dtype)
    tokens, factors = np.log(list(ratios)), np.log(list(ratios.values()))

    def scaled(sample: Sample) -> Sample:
        factor = float(np.exp(np.interp(np.log(max(sample.n_tokens, 1)), tokens, factors)))
        return replace(sample, median_s=sample.median_s * factor)

    return replace(own, threads=n_threads, source="estimated", samples=tuple(map(scaled, own.samples)))
