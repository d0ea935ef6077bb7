"""Hardware profiles: measured curves, capacities, contention and hand-off costs, each with its source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from hwmodels.errors import FormatError, ProfileError
from hwmodels.interpolate import LINEAR, Grid, Laws
from hwmodels.schema import check_header, digest, from_json, read_json, to_json, write_json
from hwmodels.slowing import COMPUTERS as COMPUTERS
from hwmodels.slowing import RESOURCES as RESOURCES
from hwmodels.slowing import Cold as Cold
from hwmodels.slowing import Contention as Contention
from hwmodels.slowing import Move as Move
from hwmodels.slowing import Repeats as Repeats
from hwmodels.slowing import Resource as Resource
from hwmodels.slowing import Source as Source
from hwmodels.slowing import check_age, check_slowing
from hwmodels.work import APART, DTYPE_BYTES, Op, Work
from hwmodels.work import AXES as AXES

SCHEMA = "scheinfer.hardware"
VERSION = 1

Evidence = Literal["measured", "interpolated", "extrapolated", "specified"]


def _check_dtype(field_name: str, dtype: str) -> None:
    if dtype not in DTYPE_BYTES:  # nothing would ever ask for it, so it would be ignored in silence
        raise FormatError(f"{field_name} names {dtype!r}; expected {', '.join(DTYPE_BYTES)}")


_USUAL: dict[Op, Op] = {"activations": "pinned", "head_prompt": "head", **{apart: op for op, apart in APART.items()}}
"""Whose curve answers where an operation's own was not measured."""


@dataclass(frozen=True, slots=True)
class Cost:
    """A time and what it rests on; flops_s and bytes_s are what FLOPs and bytes would take alone, at peak."""

    seconds: float
    evidence: Evidence
    flops_s: float
    bytes_s: float


@dataclass(frozen=True)
class Sample:
    """One measured point: the work asked, the middle of `count` repeats and their spread (p90 - p10).

    median_s is their median, or of a calibrated curve the middle that hwmodels.calibrate.samples takes. outliers of the
    repeats lie far from the others; they are kept in all of this.
    """

    n_tokens: int
    flops: float
    weight_bytes: float
    io_bytes: float
    median_s: float
    spread_s: float
    count: int
    outliers: int = 0

    def __post_init__(self) -> None:
        for name in ("n_tokens", "flops", "weight_bytes", "io_bytes", "spread_s"):
            if getattr(self, name) < 0:
                raise FormatError(f"{name} is {getattr(self, name)}, must not be negative")
        if self.median_s <= 0:
            raise FormatError(f"median_s is {self.median_s}, must be above zero")
        if self.count < 1:
            raise FormatError(f"count is {self.count}, must be at least 1")
        if not 0 <= self.outliers <= self.count:
            raise FormatError(f"outliers is {self.outliers}, must be between 0 and count, {self.count}")


@dataclass(frozen=True)
class Curve:
    """Time of one operation on one resource over its two axes (see AXES).

    threads is the number of cores the measurement used; 0 where it means nothing. laws say how time runs
    between neighbours on each axis (hwmodels.interpolate).
    """

    resource: Resource
    op: Op
    dtype: str
    threads: int
    source: Source
    samples: tuple[Sample, ...]
    laws: Laws = LINEAR

    def __post_init__(self) -> None:
        _check_dtype("dtype", self.dtype)
        if not self.samples:
            raise FormatError(f"curve {self.resource}/{self.op}/{self.dtype} has no samples")
        if self.threads < 0:
            raise FormatError(f"threads is {self.threads}, must not be negative")
        try:
            _ = self.grid
        except FormatError as error:
            raise FormatError(f"curve {self.resource}/{self.op}/{self.dtype}: {error}") from error

    @cached_property
    def grid(self) -> Grid:
        """The samples as an interpolation grid over the curve's axes."""
        x, y = AXES[self.op]
        return Grid.of([(float(getattr(s, x)), float(getattr(s, y)), s.median_s) for s in self.samples], self.laws)

    @cached_property
    def _shape(self) -> tuple[Grid, Grid, Grid]:
        x, y = AXES[self.op]
        return tuple(  # type: ignore[return-value]
            Grid.of([(float(getattr(s, x)), float(getattr(s, y)), float(getattr(s, q))) for s in self.samples])
            for q in ("flops", "weight_bytes", "io_bytes")
        )

    def shape_at(self, x: float, y: float) -> tuple[float, float, float]:
        """FLOPs, weight bytes and other bytes of the measured operation at a point of the grid."""
        flops, weights, io = self._shape
        return flops.at(x, y), weights.at(x, y), io.at(x, y)


@dataclass(frozen=True)
class Peak:
    """The most a resource does: FLOP/s by dtype, bytes/s of the memory or link it reads.

    `efficiency` is the share of these that an operation without a curve is assumed to reach.
    `fixed_s` is the time of starting such an operation.
    `source` holds for every number that `sources` does not name: ``bytes_per_s``, ``efficiency``,
    ``fixed_s``, or a dtype of flops_per_s.
    """

    flops_per_s: dict[str, float]
    bytes_per_s: float
    efficiency: float
    fixed_s: float
    source: Source
    sources: dict[str, Source] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.flops_per_s:
            _check_dtype("flops_per_s", name)
        numbers = ("bytes_per_s", "efficiency", "fixed_s", *self.flops_per_s)
        for name in self.sources:
            if name not in numbers:
                raise FormatError(f"sources names {name!r}; numbers here are {', '.join(numbers)}")
        if self.bytes_per_s <= 0 or any(v <= 0 for v in self.flops_per_s.values()):
            raise FormatError("flops_per_s and bytes_per_s must be above zero")
        if not 0 < self.efficiency <= 1:
            raise FormatError(f"efficiency is {self.efficiency}, must be above 0 and at most 1")
        if self.fixed_s < 0:
            raise FormatError(f"fixed_s is {self.fixed_s}, must not be negative")

    def source_of(self, number: str) -> Source:
        """Where one of the numbers comes from."""
        return self.sources.get(number, self.source)

    def roofline_s(self, dtype: str, flops: float, n_bytes: float) -> float:
        """max(FLOPs / peak, bytes / peak): no operation is faster. ProfileError for FLOPs of an unknown dtype."""
        memory_s = n_bytes / self.bytes_per_s
        if flops <= 0:
            return memory_s
        if dtype not in self.flops_per_s:
            known = ", ".join(self.flops_per_s) or "none"
            raise ProfileError(f"the profile has no FLOP/s of {dtype}, it has {known}; calibrate with --dtype {dtype}")
        return max(flops / self.flops_per_s[dtype], memory_s)


_FAR_BEYOND = 4
"""How many times as long as bytes FLOPs take where work does nothing but compute."""


def computing_share(flops_s: float, bytes_s: float) -> float:
    """How far work computes rather than reads: 0 where FLOPs take no longer than bytes, 1 from four times as long.

    Between the two lies a slope: experts of 25 tokens, 2.5 times, were slowed 1.12 and 1.35 times, by rates of reading
    it would have been 1.28 and 1.32, by those of computing 1.01 and 1.06 (experiments.contention).
    """
    if flops_s <= bytes_s:
        return 0.0
    return min(1.0, (flops_s / bytes_s - 1.0) / (_FAR_BEYOND - 1.0)) if bytes_s > 0 else 1.0


_READING: Mapping[str, float] = MappingProxyType({})
_SOURCED = ("vram_bytes", "host_bytes", "cpu_threads", "handoff_s")


@dataclass(frozen=True)
class HardwareProfile:
    """A machine as the planner sees it.

    device       "cuda", "emulated" (a CPU standing in for the GPU) or "none"
    vram_bytes   device memory that can be had
    host_bytes   host memory that can be had
    handoff_s    delay between a task's last dependency and its start, by "FROM>TO" resource
    sources      of vram_bytes, host_bytes, cpu_threads and handoff_s, by name; measured where not named
    notes        whose numbers these are and what to know of them, a sentence each
    handoff_repeats  of the numbers in handoff_s, by the same names, where they were measured
    cold         how much longer what is not an MLP takes on the device after a wait, longer and longer waits
    moves        what it takes to go on in another place; where absent, hand-offs as between any two tasks
    """

    name: str
    device: Literal["cuda", "emulated", "none"]
    created: str
    fingerprint: dict[str, str]
    vram_bytes: int
    host_bytes: int
    cpu_threads: int
    peaks: dict[str, Peak]
    curves: tuple[Curve, ...] = ()
    handoff_s: dict[str, float] = field(default_factory=dict)
    contention: tuple[Contention, ...] = ()
    sources: dict[str, Source] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    handoff_repeats: dict[str, Repeats] = field(default_factory=dict)
    cold: tuple[Cold, ...] = ()
    moves: tuple[Move, ...] = ()

    def __post_init__(self) -> None:
        for name in self.peaks:
            if name not in RESOURCES:
                raise FormatError(f"peaks names {name!r}; resources are {', '.join(RESOURCES)}")
        if "CPU" not in self.peaks:
            raise FormatError("peaks lacks 'CPU'; every machine has one")
        for pair, seconds in self.handoff_s.items():
            ends = pair.split(">")
            if len(ends) != 2 or any(end not in RESOURCES for end in ends):
                raise FormatError(f"handoff_s names {pair!r}; write it as FROM>TO with {', '.join(RESOURCES)}")
            if seconds < 0:
                raise FormatError(f"handoff_s.{pair} is {seconds}, must not be negative")
        for name in self.sources:
            if name not in _SOURCED:
                raise FormatError(f"sources names {name!r}; numbers here are {', '.join(_SOURCED)}")
        for active, entries in self._contention.items():
            if frozenset() not in entries:
                found = f"contention of {'+'.join(sorted(active))} has rates of work that computes only"
                raise FormatError(f"{found}; give an entry without computing, too: rates of work that reads")
        for pair in self.handoff_repeats:
            if pair not in self.handoff_s:
                raise FormatError(f"handoff_repeats names {pair!r}, which handoff_s lacks")
        check_slowing(self.cold, self.moves)
        if self.vram_bytes < 0 or self.host_bytes <= 0 or self.cpu_threads < 1:
            raise FormatError("vram_bytes must not be negative, host_bytes and cpu_threads must be above zero")

    @cached_property
    def id(self) -> str:
        """Twelve hex digits of the whole profile."""
        return digest(self)

    @cached_property
    def _index(self) -> dict[tuple[str, str, str], Curve]:
        # Curves of other thread counts are there to be compared, the profile's own count is what plans get.
        own_last = sorted(self.curves, key=lambda c: c.threads in (0, self.cpu_threads))
        return {(c.resource, c.op, c.dtype): c for c in own_last}

    def curve(self, resource: Resource, op: Op, dtype: str) -> Curve | None:
        """The curve that answers for an operation, None if there is none; a copy's bytes have no dtype.

        Where copies of activations were not measured for themselves, those of page-locked memory answer, decode's head
        for a prompt's, and what plans of the CPU alone do for the same in other plans.
        """
        curve = self._index.get((resource, op, dtype))
        if curve is None and op in _USUAL:
            return self.curve(resource, _USUAL[op], dtype)
        if curve is None and op in ("pinned", "pageable"):
            return next((c for key, c in self._index.items() if key[:2] == (resource, op)), None)
        return curve

    @cached_property
    def _memo(self) -> dict[tuple[str, Work], Cost]:
        return {}

    def time_s(self, resource: Resource, work: Work) -> Cost:
        """Seconds of `work` alone on `resource`, with its evidence.

        Inside a measured curve: between neighbours, by the curve's laws. Beyond it: the boundary's efficiency
        is held and the roofline carries the growth. Without a curve: the roofline times the peak's stated
        efficiency, labelled `specified`. Raises ProfileError if the profile has no such resource.
        """
        key = (resource, work)
        cost = self._memo.get(key)
        if cost is None:
            if len(self._memo) > 200_000:
                self._memo.clear()
            cost = self._memo[key] = self._time_s(resource, work)
        return cost

    def _time_s(self, resource: Resource, work: Work) -> Cost:
        peak = self.peak(resource)
        roof_s = peak.roofline_s(work.dtype, work.flops, work.bytes)
        alone_s = peak.roofline_s(work.dtype, work.flops, 0.0), work.bytes / peak.bytes_per_s
        curve = self.curve(resource, work.op, work.dtype)
        if curve is None:
            return Cost(peak.fixed_s + roof_s / peak.efficiency, "specified", *alone_s)
        x_name, y_name = AXES[work.op]
        x, y = float(getattr(work, x_name)), float(getattr(work, y_name))
        point = curve.grid.locate(x, y)
        flops, weight_bytes, io_bytes = curve.shape_at(point.x, point.y)
        measured_roof_s = peak.roofline_s(work.dtype, flops, weight_bytes + io_bytes)
        same_shape = math.isclose(weight_bytes, work.weight_bytes, rel_tol=0.02, abs_tol=1)
        inside = point.inside and same_shape
        seconds = point.value if inside or measured_roof_s <= 0 else point.value * roof_s / measured_roof_s
        if curve.source != "measured":
            return Cost(seconds, "specified", *alone_s)
        evidence: Evidence = "extrapolated" if not inside else "measured" if point.exact else "interpolated"
        return Cost(seconds, evidence, *alone_s)

    def peak(self, resource: Resource) -> Peak:
        """The peak rates of a resource; ProfileError if the machine has none."""
        try:
            return self.peaks[resource]
        except KeyError:
            known = ", ".join(self.peaks)
            raise ProfileError(
                f"profile {self.name!r} describes {known}, not {resource}; calibrate with a device"
            ) from None

    @property
    def has_gpu(self) -> bool:
        """Whether there is a device to plan for."""
        return "GPU" in self.peaks and "H2D" in self.peaks and "D2H" in self.peaks

    @cached_property
    def _contention(self) -> dict[frozenset[str], dict[frozenset[str], Contention]]:
        """Entries by what is active, then by what of it computes."""
        table: dict[frozenset[str], dict[frozenset[str], Contention]] = {}
        for entry in self.contention:
            entries = table.setdefault(frozenset(entry.active), {})
            if frozenset(entry.computing) in entries:
                names = f"{'+'.join(entry.active)}, computing {list(entry.computing)}"
                raise FormatError(f"contention has two entries of {names}; expected one")
            entries[frozenset(entry.computing)] = entry
        return table

    @cached_property
    def told_apart(self) -> frozenset[str]:
        """Resources of which contention knows other rates for work that computes than for work that reads."""
        return frozenset(name for entry in self.contention for name in entry.computing)

    def computing(self, works: Mapping[Resource, Work]) -> dict[str, float]:
        """How far each resource's work computes, where contention tells that from work that reads."""
        costs = {r: self.time_s(r, work) for r, work in works.items() if r in self.told_apart}
        return {r: computing_share(cost.flops_s, cost.bytes_s) for r, cost in costs.items()}

    def rates(self, active: frozenset[str], computing: Mapping[str, float] = _READING) -> dict[str, float]:
        """Rate of each active resource beside the others, 1.0 alone; computing says how far the work of each computes.

        Between reading and computing time is linear: work is taken to compute for its share of a time, all that do so
        at the same time.
        """
        levels = sorted({0.0, 1.0, *computing.values()})
        if len(levels) == 2:
            return self._rates(active, frozenset(name for name, share in computing.items() if share))
        slowed = dict.fromkeys(active, 0.0)
        for low, high in pairwise(levels):
            found = self._rates(active, frozenset(name for name, share in computing.items() if share >= high))
            for name, rate in found.items():
                slowed[name] += (high - low) / rate
        return {name: min(1.0, 1.0 / times) for name, times in slowed.items()}

    def _rates(self, active: frozenset[str], computing: frozenset[str]) -> dict[str, float]:
        """Rates where some work computes and all other reads.

        The largest known subset's factors apply; resources outside it take their worst known pair. Where a set
        was not measured with such work, or work is not told apart at all, its rates of work that reads apply.
        """
        rates = dict.fromkeys(active, 1.0)
        for names, entries in self._contention.items():
            if names <= active:
                for name, rate in entries.get(computing & names, entries[frozenset()]).rate.items():
                    rates[name] = min(rates[name], rate)
        return rates

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, {"schema": SCHEMA, "version": VERSION, **to_json(self)})

    def with_(self, **changes: Any) -> HardwareProfile:
        """A copy with fields replaced."""
        return replace(self, **changes)


def load_profile(path: str | Path) -> HardwareProfile:
    """Read a profile; FormatError names the field that is wrong and what is allowed."""
    fields = check_header(read_json(path, "hardware profile"), SCHEMA, VERSION, str(path))
    for name in ("curves", "handoff_s", "contention"):  # without them every cost they hold would be free, in silence
        if name not in fields:
            raise FormatError(
                f"{path}: field {name!r} is missing; write it, empty if nothing is known, or calibrate anew"
            )
    check_age(fields.get("cold"), str(path))
    return from_json(HardwareProfile, fields, str(path))
