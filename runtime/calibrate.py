"""calibrate(): measure a hardware profile through the executor, for the shapes of one model.

A calibration is a list of parts; each measures its cases in rounds until their medians are known or its share
of the time is used up. Parts take turns of some rounds, so that all see the same minutes of the machine, whose speed
changes with what else runs on it. A finished part is kept, so that an interrupted calibration goes on from there; a
full one makes several passes over all parts.

yardstick  reading and copying large arrays, before and after all others: has the machine's speed changed?
rest       embedding, attention, head and sampling: a model of the same shapes with random weights and few
           layers, run by the executor with everything on the device, then with everything on the CPU
by turns   attention and ends on the CPU where other layers are the device's, and what changing place takes
waits      how much longer attention takes after waiting for the CPU or for the link
overlap    hand-offs between resources, copies of activations and joins, read from an overlapping run
mlp        MLP parts over width and tokens, on CPU and GPU; of experts what each takes in a call of several
copies     weights over the link: H2D and D2H over sizes, pinned and pageable
together   CPU, GPU and H2D at work at once, reading and computing: the contention table
variants   MLP parts on the CPU with other numbers of threads, and in other types of numbers
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hwmodels.calibrate import Part, fastest, merged, remarks
from hwmodels.machine import fingerprint, read_machine
from hwmodels.pool import pooled_part, uncertainty
from hwmodels.profile import RESOURCES, Curve, HardwareProfile, Resource
from runtime.adapter import Adapter, activation_of
from runtime.alongside import Alongside
from runtime.byturns import measure_by_turns
from runtime.capacity import check_free, device_bytes, host_bytes, software
from runtime.changes import beside_changes
from runtime.checkpoint import read_config
from runtime.coldstart import WAITING, measure_cold
from runtime.devices import device_name, open_device
from runtime.microbench import MicroBench, pool_bytes
from runtime.projection import FEW_ROWS
from runtime.resume import KeptParts, KeptRounds, measurement_key
from runtime.rounds import Effort, Measuring, finish
from runtime.session import PlannedModel
from runtime.standin import StandIn, built, measure_overlapped, measure_rest
from runtime.synthetic import DEFAULT_CONFIG, shrunk
from runtime.turns import Turn, glance, one_more, progress_bar, take_turns, tell
from sim.model import ModelSpec, from_config
from sim.plan import Place

# Of a model that stands for the real one. What a token reads: several times the cache that cores share (32 to 96 MB);
# with less it finds weights there that a real model's other layers drive out (a virtual machine that is told of 480 MB
# has some 100 of them: with 160 MB attention is 1 % faster than with 450). What it holds: mostly experts that a
# token does not meet. No more of either: a round over all points of attention takes as long as there are layers, and
# few rounds tell a machine's speed badly. With 6 layers two in turns, of 4 rounds, differed by 8 to 14 % in attention.
_READ_BYTES, _STAND_IN_BYTES = 160 << 20, 448 << 20
_N_STAND_INS, _N_POOLS = 8, 3  # open at once: of _PARTS all that have one, and what MicroBench holds
_PINNED_BYTES = tuple(1 << i for i in (14, 16, 18, 19, 20, 22, 24, 26))
_PAGEABLE_BYTES = tuple(1 << i for i in (14, 15, 16, 17, 18, 20, 22, 24))
SETS: tuple[tuple[Resource, ...], ...] = (("CPU", "GPU"), ("CPU", "H2D"), ("GPU", "H2D"), ("CPU", "GPU", "H2D"))
"""Resources that are measured working together."""
_VARIANT_TOKENS = (1, 2, 4, 6, 7, 8, 12, 16, 24, 32, 64, 128, 256)
_COMPUTING_TOKENS = 64  # far beyond the ridge of a CPU: some 10 tokens


@dataclass(frozen=True)
class Extent:
    """What is measured and how long: tokens of a step, tokens in the cache before it, rounds, seconds of a pass.

    slice_s is how long a set of resources works together in a round. Of several passes the mean counts; there are
    more, up to most_passes and nine minutes, while its standard error is above KNOWN_SHARE. counts_rounds: see Effort.
    """

    n_tokens: tuple[int, ...]
    past: tuple[int, ...]
    least: int
    most: int
    seconds: float
    slice_s: float
    variants: bool
    passes: int = 1
    most_passes: int = 1
    counts_rounds: bool = False

    def effort(self, share: float) -> Effort:
        """Rounds of a part that may take a share of the time."""
        return Effort(self.least, self.most, share * self.seconds, counts_rounds=self.counts_rounds)


# Kernels change from one token to the next up to 9: matrix-vector, tiles of 2, 4 and more rows, and from FEW_ROWS on
# projections, where the kernel attends no prompts, by torch's, which take 16 rows in less time than 15.
_FEW = (*range(1, FEW_ROWS + 2), 12, 15, 16, 24, 32)
_MOST_S = 560.0  # beyond its least passes a calibration begins none that would end later: ten minutes with all else
KNOWN_SHARE = 0.02
"""Standard error of a curve's mean over passes that is small enough: two such calibrations differ by some 3 %."""
QUICK = Extent((*_FEW, 64, 128, 256), (0, 256), 3, 20, 34.0, 0.08, False)
FULL = Extent((*_FEW, 48, 64, 96, 128, 192, 256, 512), (0, 128, 256, 512, 2048), 3, 60, 60.0, 0.25, True, 3, 5)
ALONGSIDE = replace(QUICK, least=12, most=1000, seconds=300.0, counts_rounds=True)
"""For a calibration beside some minutes of runs."""
SMOKE = Extent((1, 4, 16), (0,), 1, 1, 1.0, 0.01, False)
"""Enough to see that everything works, too little to plan by."""


@dataclass(frozen=True)
class _Job:
    """One calibration: shapes, machine, extent."""

    spec: ModelSpec
    config: Mapping[str, Any]
    device: str
    device_bytes: int
    cpu_threads: int | None
    extent: Extent

    @contextmanager
    def bench(self, cpu_threads: int | None = None, dtype: str = "") -> Iterator[MicroBench]:
        """Micro-benchmarks on a device of their own."""
        device = open_device(self.device, self.device_bytes, cpu_threads or self.cpu_threads)
        try:
            spec = replace(self.spec, dtype=dtype or self.spec.dtype)
            yield MicroBench(spec, device, activation_of(self.config))
        finally:
            device.close()

    def stand_in(
        self, place: Place, gg_share: float, ahead_share: float, overlap: bool = True, by_turns: bool = False
    ) -> StandIn:
        """A stand-in model of these shapes."""
        n_ctx = max(self.extent.n_tokens) + max(self.extent.past) + 16
        config = shrunk(self.config, _READ_BYTES, _STAND_IN_BYTES)
        own = self.device, self.device_bytes, self.cpu_threads, overlap, by_turns
        return StandIn(config, place, gg_share, ahead_share, n_ctx, *own)


@dataclass
class _Rig:
    """What the parts of a calibration measure on, open until its end: parts take turns, and some share."""

    job: _Job
    stack: ExitStack
    _bench: MicroBench | None = None
    _models: dict[tuple[Place, float, float, bool, bool], PlannedModel] = field(default_factory=dict)

    def bench(self) -> MicroBench:
        """Micro-benchmarks with the calibration's own threads and type of numbers."""
        if self._bench is None:
            self._bench = self.stack.enter_context(self.job.bench())
        return self._bench

    def model(
        self, place: Place, gg_share: float, ahead_share: float, overlap: bool = True, by_turns: bool = False
    ) -> PlannedModel:
        """A stand-in; see StandIn."""
        key = (place, gg_share, ahead_share, overlap, by_turns)
        if key not in self._models:
            self._models[key] = self.stack.enter_context(built(self.job.stand_in(*key)))
        return self._models[key]


def calibrate(
    folder: Path | None = None,
    device: str = "auto",
    quick: bool = False,
    cpu_threads: int | None = None,
    progress: bool = True,
    dtype: str = "auto",
    extent: Extent | None = None,
) -> HardwareProfile:
    """Measure this machine for the shapes of a checkpoint's config (None: a small Llama's).

    Takes under a minute with quick and some five without, of three passes; up to ten, of five, while they differ, and
    longer for layers that take the machine seconds. extent overrules quick. dtype is the config's unless given. What
    makes the numbers doubtful, above all a busy machine, stands in the profile's notes. Interrupted, it goes on where
    it was if called again within an hour. Raises ModelError for a config that is not supported, PlanError for a
    device that is not here.
    """
    job = _job(folder, device, cpu_threads, dtype, extent or (QUICK if quick else FULL))
    kept = KeptParts.of(measurement_key(job.spec, job.device, cpu_threads, job.extent))
    passes = _measure(job, kept, f"calibrate for {job.spec.name}", progress)
    kept.clear()
    profile = _profile(job, {name: pooled_part([own[name] for own in passes]) for name in passes[0]})
    unsure = uncertainty(passes)
    if KNOWN_SHARE < unsure < math.inf:
        note = f"The mean of {len(passes)} passes has a standard error of {unsure:.0%}: the machine's speed changes."
        profile = replace(profile, notes=(*profile.notes, note))
    return profile


@contextmanager
def calibrating(
    folder: Path, n_turns: int, device: str = "auto", cpu_threads: int | None = None, extent: Extent | None = None
) -> Iterator[Alongside]:
    """A calibration that measures a little at each of n_turns turns, and so the same minutes as what runs in between.

    Raises what calibrate does.
    """
    job = _job(folder, device, cpu_threads, "auto", extent or ALONGSIDE)
    with ExitStack() as stack:
        rig = _Rig(job, stack)
        yield Alongside(_turns(rig), n_turns, partial(_profile, job))


def _job(folder: Path | None, device: str, cpu_threads: int | None, dtype: str, extent: Extent) -> _Job:
    config = dict(read_config(folder)) if folder is not None else dict(DEFAULT_CONFIG)
    config |= {"dtype": dtype} if dtype != "auto" else {}
    name = folder.name if folder is not None else "default-shape"
    spec, device = Adapter.of(config, name).spec, device_name(device)
    stand_in = from_config(shrunk(config, _READ_BYTES, _STAND_IN_BYTES), name)
    check_free(_N_STAND_INS * stand_in.weight_bytes + _N_POOLS * pool_bytes(spec), f"calibrating for {name}")
    heads = spec.layers[0].attention
    own = replace(
        extent, n_tokens=beside_changes(extent.n_tokens, spec.dtype, heads.n_heads // max(1, heads.n_kv_heads))
    )
    return _Job(spec, config, device, device_bytes(device), cpu_threads, _within(own, spec))


def _profile(job: _Job, parts: Mapping[str, Part]) -> HardwareProfile:
    curves = merged(c for part in parts.values() for c in part.curves)
    return HardwareProfile(
        name=f"{job.device.partition(':')[0]}-{job.spec.name}",
        device="emulated" if job.device == "emulated" else "cuda",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint={**fingerprint(), **software(job.device), "others_load": _percent(parts)},
        vram_bytes=job.device_bytes,
        host_bytes=host_bytes(),
        cpu_threads=_threads(parts["rest on the CPU"].curves),
        peaks={r: fastest(curves, r) for r in RESOURCES},
        curves=tuple(curves),
        handoff_s={pair: s for part in parts.values() for pair, s in part.handoff_s.items()},
        contention=parts["together"].contention,
        notes=remarks(parts),
        handoff_repeats={pair: r for part in parts.values() for pair, r in part.handoff_repeats.items()},
        cold=parts["waits"].cold,
        moves=parts["layers by turns"].moves,
    )


def _within(extent: Extent, spec: ModelSpec) -> Extent:
    most = spec.max_positions
    n_tokens = tuple(n for n in extent.n_tokens if n <= most // 2)
    past = tuple(p for p in extent.past if p + max(n_tokens) <= most)
    return replace(extent, n_tokens=n_tokens, past=past)


# -- parts --------------------------------------------------------------------------------------------

_Measure = Callable[[_Rig, Effort], Measuring]


def _measure(job: _Job, kept: KeptParts, title: str, progress: bool) -> list[dict[str, Part]]:
    """All parts by name, of every pass; those that are kept already are not measured again."""
    names, extent = list(_plan(job)), job.extent
    keys = [{name: f"{name} {number}" for name in names} for number in range(1, extent.most_passes + 1)]
    found = {key: part for own in keys for key in own.values() if (part := kept.load(key)) is not None}
    n_rounds = sum(kept.n_rounds(key) for own in keys for key in own.values() if key not in found)
    passes: list[dict[str, Part]] = []
    with progress_bar(title, progress) as bar:
        if found or n_rounds:
            done = f"{len(found)} of {extent.passes * len(names)} parts and {n_rounds} rounds of others"
            tell(bar, f"going on: {done} were measured within the last hour")
        glance(bar)
        began_s = time.monotonic()
        for own in keys:
            if len(passes) >= extent.passes:
                with_another_s = (time.monotonic() - began_s) * (1 + 1 / len(passes))
                if uncertainty(passes) <= KNOWN_SHARE or with_another_s > _MOST_S:
                    break
                one_more(bar, extent.passes)
            with ExitStack() as stack:
                turns = _turns(_Rig(job, stack), {name: kept.rounds(key) for name, key in own.items()})
                runs = {own[name]: turn for name, turn in turns.items()}
                take_turns(runs, found, kept, bar, 100 / extent.passes)
            passes.append({name: found[own[name]] for name in names})
    return passes


def _plan(job: _Job) -> dict[str, tuple[float, _Measure]]:
    return {name: how for name, how in _PARTS.items() if job.extent.variants or name != "variants"}


def _turns(rig: _Rig, kept: Mapping[str, KeptRounds] = MappingProxyType({})) -> dict[str, Turn]:
    """A turn for every part, with its share of the time, and where its rounds are kept."""
    plan = _plan(rig.job)
    whole = sum(share for share, _ in plan.values())

    def turn(name: str, share: float, measure: _Measure) -> Turn:
        effort = replace(rig.job.extent.effort(share), kept=kept.get(name))
        return Turn(share, partial(measure, rig, effort))

    return {name: turn(name, share / whole, measure) for name, (share, measure) in plan.items()}


def _yardstick(rig: _Rig, effort: Effort) -> Measuring:
    return Part(tuple((yield from rig.bench().stream_curves(effort))))


def _rest(place: Place) -> _Measure:
    def measure(rig: _Rig, effort: Effort) -> Measuring:
        extent = rig.job.extent
        return (yield from measure_rest(rig.model(place, 1.0, 0.0), place, extent.n_tokens, extent.past, effort))

    return measure


def _by_turns(rig: _Rig, effort: Effort) -> Measuring:
    models = rig.model("GPU", 1.0, 0.0, by_turns=True), rig.model("GPU", 1.0, 0.0)
    return (yield from measure_by_turns(*models, rig.job.extent.past, effort))


def _waits(rig: _Rig, effort: Effort) -> Measuring:
    waiting = [rig.model("GPU", *how) for how in WAITING]
    return (yield from measure_cold(rig.model("GPU", 1.0, 0.0), waiting, effort))


def _overlap(rig: _Rig, effort: Effort) -> Measuring:
    models = rig.model("GPU", 0.25, 0.125), rig.model("GPU", *WAITING[0])
    return (yield from measure_overlapped(*models, rig.job.extent.n_tokens, effort))


def _mlp(rig: _Rig, effort: Effort) -> Measuring:
    bench = rig.bench()
    columns = sorted({max(1, bench.columns // 8), max(1, bench.columns // 2), bench.columns})
    return Part(tuple((yield from bench.ffn_curves(("CPU", "GPU"), rig.job.extent.n_tokens, columns, effort))))


def _copies(rig: _Rig, effort: Effort) -> Measuring:
    return Part(tuple((yield from rig.bench().copy_curves(_PINNED_BYTES, _PAGEABLE_BYTES, effort))))


def _together(rig: _Rig, effort: Effort) -> Measuring:
    extent = rig.job.extent
    n_tokens = max(n for n in extent.n_tokens if n <= _COMPUTING_TOKENS)
    found = yield from rig.bench().contention(SETS, n_tokens, extent.slice_s, 2 * effort.least)
    return Part(contention=tuple(found))


def _variants(rig: _Rig, effort: Effort) -> Measuring:
    """The CPU with one thread, half of all and all; both places in the other common types of numbers."""
    n_cores, job, own = read_machine().n_threads, rig.job, rig.bench().device.cpu_threads
    threads = sorted({1, max(1, n_cores // 2), n_cores} - {own})
    dtypes = sorted({"float32", "bfloat16"} - {job.spec.dtype})
    share = replace(effort, seconds=effort.seconds / (len(threads) + len(dtypes)))
    curves: list[Curve] = []
    for n in threads:
        with job.bench(cpu_threads=n) as bench:
            n_tokens = beside_changes(_VARIANT_TOKENS, job.spec.dtype)
            curves += yield from bench.ffn_curves(("CPU",), n_tokens, (bench.columns,), share)
    for dtype in dtypes:
        with job.bench(dtype=dtype) as bench:
            columns = bench.columns // 2, bench.columns
            n_tokens = beside_changes(_VARIANT_TOKENS, dtype)
            curves += yield from bench.ffn_curves(("CPU", "GPU"), n_tokens, columns, share)
    return Part(tuple(curves))


# Of hand-offs that several parts measure those of the last one count: of plans that overlap.
_PARTS: dict[str, tuple[float, _Measure]] = {
    "yardstick": (0.5, _yardstick),
    "rest on the GPU": (12, _rest("GPU")),
    "rest on the CPU": (9, _rest("CPU")),
    "layers by turns": (3, _by_turns),
    "waits": (3, _waits),
    "overlap": (6, _overlap),
    "mlp": (9, _mlp),
    "copies": (2, _copies),
    "together": (6, _together),
    "variants": (4, _variants),
    "yardstick again": (0.5, _yardstick),
}
"""Name, weight in time, and how to measure it, in this order."""


def yardstick(folder: Path, device: str = "auto", cpu_threads: int | None = None) -> tuple[Curve, ...]:
    """The yardstick alone, in about two seconds: has the machine still the speed of its profile?"""
    spec, device = Adapter.of(config := dict(read_config(folder)), folder.name).spec, device_name(device)
    job = _Job(spec, config, device, device_bytes(device), cpu_threads, _within(QUICK, spec))
    with job.bench() as bench:
        return tuple(finish(bench.stream_curves(Effort(3, 20, 1.0))))


def _threads(curves: tuple[Curve, ...]) -> int:
    return max(curve.threads for curve in curves)


def _percent(parts: Mapping[str, Part]) -> str:
    loads = [part.others_load for part in parts.values() if part.others_load is not None]
    return f"up to {max(loads):.0%}" if loads else "unknown"
