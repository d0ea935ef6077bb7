"""calibrate(): measure a hardware profile through the executor, for the shapes of one model.

A calibration is a list of parts; each measures its cases in rounds until their medians are known or its share
of the time is used up, and is kept when it is finished, so that an interrupted calibration goes on from there.

yardstick  reading and copying large arrays, before and after all others: has the machine's speed changed?
rest       embedding, attention, head and sampling: a model of the same shapes with random weights and few
           layers, run by the executor with everything on the device, then with everything on the CPU
waits      how much longer attention takes after waiting for the CPU or for the link
overlap    hand-offs between resources, small copies and joins, read from an overlapping run
mlp        MLP parts over width and tokens, on CPU and GPU
copies     H2D and D2H over sizes, pinned and pageable
together   CPU, GPU and H2D at work at once, reading and computing: the contention table
variants   MLP parts on the CPU with other numbers of threads, and in other types of numbers
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers.activations import ACT2FN

from hwmodels.calibrate import Part, fastest, merged, remarks
from hwmodels.load import BUSY_SHARE, LoadMeter
from hwmodels.machine import fingerprint, read_machine
from hwmodels.profile import RESOURCES, Curve, HardwareProfile, Resource
from runtime import native
from runtime.adapter import Adapter
from runtime.checkpoint import read_config
from runtime.coldstart import WAITING, measure_cold
from runtime.devices import device_name, open_device
from runtime.gpu import gpus
from runtime.microbench import MicroBench
from runtime.resume import KeptParts, measurement_key
from runtime.rounds import Effort, Tick
from runtime.standin import SMALL_COPY_BYTES, StandIn, built, measure_overlapped, measure_rest
from runtime.synthetic import DEFAULT_CONFIG, shrunk
from sim.model import ModelSpec
from sim.plan import Place

_STAND_IN_BYTES = 256 << 20  # weights of the model that stands for the real one: several times any cache
_SLACK_BYTES = 64 << 20  # blocks of the device's allocator are rounded up
_PINNED_BYTES = tuple(SMALL_COPY_BYTES << i for i in (0, 1, 2, 4, 6, 8))
_PAGEABLE_BYTES = tuple(1 << i for i in (14, 16, 18, 20, 22, 24))
SETS: tuple[tuple[Resource, ...], ...] = (("CPU", "GPU"), ("CPU", "H2D"), ("GPU", "H2D"), ("CPU", "GPU", "H2D"))
"""Resources that are measured working together."""
_GLANCE_S = 0.3
_VARIANT_TOKENS = (1, 4, 16, 64, 256)
_COMPUTING_TOKENS = 64  # far beyond the ridge of a CPU: some 10 tokens


@dataclass(frozen=True)
class Extent:
    """What is measured and how long: tokens of a step, tokens in the cache before it, rounds, seconds in all.

    slice_s is how long a set of resources works together in a round.
    """

    n_tokens: tuple[int, ...]
    past: tuple[int, ...]
    least: int
    most: int
    seconds: float
    slice_s: float
    variants: bool

    def effort(self, share: float) -> Effort:
        """Rounds of a part that may take a share of the time."""
        return Effort(self.least, self.most, share * self.seconds)


# Kernels change from one token to the next below 8: matrix-vector, then tiles of 2, 4 and more rows.
_FEW = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32)
QUICK = Extent((*_FEW, 64, 128, 256), (0, 256), 3, 20, 36.0, 0.08, False)
FULL = Extent((*_FEW, 48, 64, 96, 128, 192, 256, 512), (0, 128, 512, 2048), 3, 60, 150.0, 0.25, True)
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
    def bench(
        self, effort: Effort, tick: Tick, cpu_threads: int | None = None, dtype: str = ""
    ) -> Iterator[MicroBench]:
        """Micro-benchmarks on a device of their own."""
        device = open_device(self.device, self.device_bytes, cpu_threads or self.cpu_threads)
        try:
            spec = replace(self.spec, dtype=dtype or self.spec.dtype)
            yield MicroBench(spec, device, ACT2FN[str(self.config.get("hidden_act", "silu"))], effort, tick)
        finally:
            device.close()

    def stand_in(self, place: Place, gg_share: float, ahead_share: float, overlap: bool = True) -> StandIn:
        """A stand-in model of these shapes."""
        n_ctx = max(self.extent.n_tokens) + max(self.extent.past) + 16
        config = shrunk(self.config, _STAND_IN_BYTES)
        own = self.device, self.device_bytes, self.cpu_threads, overlap
        return StandIn(config, place, gg_share, ahead_share, n_ctx, *own)


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

    Takes under a minute with quick and some three without, longer for layers that take the machine seconds; extent
    overrules quick. dtype is the config's unless given. What makes the numbers doubtful, above all a busy machine,
    stands in the profile's notes. Interrupted, it goes on where it was if called again within an hour. Raises
    ModelError for a config that is not supported, PlanError for a device that is not here.
    """
    config = dict(read_config(folder)) if folder is not None else dict(DEFAULT_CONFIG)
    config |= {"dtype": dtype} if dtype != "auto" else {}
    name = folder.name if folder is not None else "default-shape"
    spec, device = Adapter.of(config, name).spec, device_name(device)
    extent = _within(extent or (QUICK if quick else FULL), spec)
    job = _Job(spec, config, device, device_bytes(device), cpu_threads, extent)
    kept = KeptParts.of(measurement_key(spec, device, cpu_threads, extent))
    parts = _measure(job, kept, f"calibrate for {name}", progress)
    kept.clear()
    curves = merged(c for part in parts.values() for c in part.curves)
    return HardwareProfile(
        name=f"{device.partition(':')[0]}-{name}",
        device="emulated" if device == "emulated" else "cuda",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint={**fingerprint(), **_software(device), "others_load": _percent(parts)},
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
    )


def _within(extent: Extent, spec: ModelSpec) -> Extent:
    most = spec.max_positions
    n_tokens = tuple(n for n in extent.n_tokens if n <= most // 2)
    past = tuple(p for p in extent.past if p + max(n_tokens) <= most)
    return replace(extent, n_tokens=n_tokens, past=past)


# -- parts --------------------------------------------------------------------------------------------

_Measure = Callable[[_Job, Effort, Tick], Part]


def _measure(job: _Job, kept: KeptParts, title: str, progress: bool) -> dict[str, Part]:
    """All parts by name, those that are kept already not measured again."""
    plan = {name: how for name, how in _PARTS.items() if job.extent.variants or name != "variants"}
    whole = sum(share for share, _ in plan.values())
    found = {name: part for name in plan if (part := kept.load(name)) is not None}
    with tqdm(total=100, desc=title, bar_format=_BAR, disable=not progress, leave=False) as bar:
        if found:
            _tell(bar, f"going on: {len(found)} of {len(plan)} parts were measured within the last hour")
        _glance(bar)
        for name, (share, measure) in plan.items():
            bar.set_postfix_str(name)
            before, percent = bar.n, 100 * share / whole
            if name not in found:
                meter = LoadMeter.start()
                part = measure(job, job.extent.effort(share / whole), _ticker(bar, percent))
                found[name] = replace(part, others_load=meter.others())
                kept.save(name, found[name])
            bar.update(before + percent - bar.n)
    return {name: found[name] for name in plan}


def _tell(bar: tqdm[Any], text: str) -> None:
    if not bar.disable:
        bar.write(text, file=sys.stderr)


_BAR = "{l_bar}{bar}| {elapsed}{postfix}"


def _glance(bar: tqdm[Any]) -> None:
    """Tell whether others are busy on this machine now."""
    meter = LoadMeter.start()
    time.sleep(_GLANCE_S)
    load = meter.others()
    if load is not None and load >= BUSY_SHARE:
        _tell(bar, f"other programs keep {load:.0%} of all cores busy: times may come out too long, and will be marked")


def _ticker(bar: tqdm[Any], percent: float) -> Tick:
    """Moves the bar through a part that is so many per cent of it."""
    before = bar.n
    return lambda share: bar.update(max(0.0, before + percent * share - bar.n))


def _yardstick(job: _Job, effort: Effort, tick: Tick) -> Part:
    with job.bench(effort, tick) as bench:
        return Part(tuple(bench.stream_curves()))


def _rest(place: Place) -> _Measure:
    def measure(job: _Job, effort: Effort, tick: Tick) -> Part:
        with built(job.stand_in(place, 1.0, 0.0)) as model:
            return measure_rest(model, place, job.extent.n_tokens, job.extent.past, effort, tick)

    return measure


def _waits(job: _Job, effort: Effort, tick: Tick) -> Part:
    with ExitStack() as stack:
        waiting = [stack.enter_context(built(job.stand_in("GPU", *shares, overlap=False))) for shares in WAITING]
        return measure_cold(stack.enter_context(built(job.stand_in("GPU", 1.0, 0.0))), waiting, effort, tick)


def _overlap(job: _Job, effort: Effort, tick: Tick) -> Part:
    with built(job.stand_in("GPU", 0.25, 0.125)) as model:
        return measure_overlapped(model, job.extent.n_tokens, effort, tick)


def _mlp(job: _Job, effort: Effort, tick: Tick) -> Part:
    with job.bench(effort, tick) as bench:
        columns = sorted({max(1, bench.columns // 8), max(1, bench.columns // 2), bench.columns})
        return Part(tuple(bench.ffn_curves(("CPU", "GPU"), job.extent.n_tokens, columns)))


def _copies(job: _Job, effort: Effort, tick: Tick) -> Part:
    with job.bench(effort, tick) as bench:
        return Part(tuple(bench.copy_curves(_PINNED_BYTES, _PAGEABLE_BYTES)))


def _together(job: _Job, effort: Effort, tick: Tick) -> Part:
    with job.bench(effort, tick) as bench:
        n_tokens = max(n for n in job.extent.n_tokens if n <= _COMPUTING_TOKENS)
        return Part(contention=tuple(bench.contention(SETS, n_tokens, job.extent.slice_s)))


def _variants(job: _Job, effort: Effort, tick: Tick) -> Part:
    """The CPU with one thread, half of all and all; both places in the other common types of numbers."""
    n_cores = read_machine().n_threads
    with job.bench(effort, tick) as bench:
        own = bench.device.cpu_threads
    threads = sorted({1, max(1, n_cores // 2), n_cores} - {own})
    dtypes = sorted({"float32", "bfloat16"} - {job.spec.dtype})
    share = replace(effort, seconds=effort.seconds / (len(threads) + len(dtypes)))
    curves: list[Curve] = []
    for n in threads:
        with job.bench(share, tick, cpu_threads=n) as bench:
            curves += bench.ffn_curves(("CPU",), _VARIANT_TOKENS, (bench.columns,))
    for dtype in dtypes:
        with job.bench(share, tick, dtype=dtype) as bench:
            curves += bench.ffn_curves(("CPU", "GPU"), _VARIANT_TOKENS, (bench.columns // 2, bench.columns))
    return Part(tuple(curves))


# Of hand-offs that several parts measure those of the last one count: of plans that overlap.
_PARTS: dict[str, tuple[float, _Measure]] = {
    "yardstick": (0.5, _yardstick),
    "rest on the GPU": (8, _rest("GPU")),
    "rest on the CPU": (8, _rest("CPU")),
    "waits": (3, _waits),
    "overlap": (6, _overlap),
    "mlp": (10, _mlp),
    "copies": (3, _copies),
    "together": (6, _together),
    "variants": (4, _variants),
    "yardstick again": (0.5, _yardstick),
}
"""Name, weight in time, and how to measure it, in this order."""


def yardstick(folder: Path, device: str = "auto", cpu_threads: int | None = None) -> tuple[Curve, ...]:
    """The yardstick alone, in about two seconds: has the machine still the speed of its profile?"""
    spec, device = Adapter.of(config := dict(read_config(folder)), folder.name).spec, device_name(device)
    job = _Job(spec, config, device, device_bytes(device), cpu_threads, _within(QUICK, spec))
    return _yardstick(job, Effort(3, 20, 1.0), lambda share: None).curves


# -- what the machine is ------------------------------------------------------------------------------


def host_bytes() -> int:
    """Bytes of host memory that can be had now: container limits and what other programs hold are respected."""
    return read_machine().free_bytes


def device_bytes(device: str) -> int:
    """Bytes of device memory that can be had now: of an emulated device half of the host's, of a GPU by trying."""
    if device == "emulated":
        return host_bytes() // 2
    free_bytes, _ = torch.cuda.mem_get_info(torch.device(device))
    n_bytes = free_bytes + int(torch.cuda.memory_reserved(torch.device(device))) - _SLACK_BYTES
    while n_bytes > 0:
        try:
            torch.empty(n_bytes, dtype=torch.uint8, device=device)
            break
        except torch.OutOfMemoryError:
            n_bytes = int(0.95 * n_bytes)
    torch.cuda.empty_cache()
    return n_bytes


def _threads(curves: tuple[Curve, ...]) -> int:
    return max(curve.threads for curve in curves)


def _percent(parts: Mapping[str, Part]) -> str:
    loads = [part.others_load for part in parts.values() if part.others_load is not None]
    return f"up to {max(loads):.0%}" if loads else "unknown"


def _software(device: str) -> dict[str, str]:
    found: dict[str, str] = {"torch": str(torch.__version__), "kernels": native.describe()}
    if device != "emulated":
        index = torch.device(device).index or 0
        gpu = gpus()[index]
        found |= {"gpu": gpu.name, "cuda": str(torch.version.cuda), "driver": gpu.driver or "unknown"}
        found["gpu_memory_bytes"] = str(gpu.vram_bytes)
        found["link"] = f"PCIe {gpu.link_gen_max} x{gpu.link_width}" if gpu.link_width else "unknown"
    return found
