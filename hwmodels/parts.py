"""Profiles composed from published figures of GPUs, hosts and links, each number with its source.

A composed profile holds peaks: every cost that it gives is labelled `specified`. Calibrating the machine
replaces it. The figures are in figures/*.json; a number there is ``[value, source]``, its unit in its key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

from hwmodels.errors import ProfileError
from hwmodels.profile import Contention, Curve, HardwareProfile, Peak, Resource, Sample, Source
from hwmodels.schema import from_json, read_json
from hwmodels.work import DTYPE_BYTES, Op

Number = tuple[float, Source]
T = TypeVar("T")
_FOLDER = Path(__file__).parent / "figures"
_GIB = 2**30
_CONTEXT_BYTES = 600 * 2**20  # what a CUDA context and its libraries take before the first tensor
_SYSTEM_BYTES = 4 * _GIB  # what the operating system and a Python process take
GEMM_SHARE = 0.6  # of cores x clock x FLOP per cycle that a tuned library reaches
GPU_EFFICIENCY = 0.8  # of nominal bandwidth; aiconfigurator uses the same
_DRAM_SHARE = 0.9  # of STREAM that CPU and link reach together where no pair was measured
_FIXED_S = {"CPU": 10e-6, "GPU": 30e-6, "H2D": 10e-6, "D2H": 10e-6}
_HANDOFF_S = {"GPU>D2H": 5e-6, "D2H>CPU": 20e-6, "CPU>H2D": 15e-6, "H2D>GPU": 5e-6, "GPU>H2D": 5e-6, "GPU>CPU": 20e-6}
_COPY_BYTES = (2**16, 2**30)


@dataclass(frozen=True)
class Gpu:
    """A GPU. FLOP rates are dense, with float32 accumulation; pcie names its own side of the link."""

    name: str
    vram_GiB: Number
    memory_GBps: Number
    float16_tflops: Number
    bfloat16_tflops: Number
    float32_tflops: Number
    pcie: str
    note: str = ""


@dataclass(frozen=True)
class Host:
    """A CPU with its memory.

    memory_GBps       what reading streams reaches, not the nominal rate
    gemv_share        of it that a single-token MLP reaches
    bfloat16_speedup  its GEMM rate over that of float32; below 1 without instructions for it
    """

    name: str
    cores: int
    clock_GHz: Number
    float32_flop_per_cycle: Number
    bfloat16_speedup: Number
    memory_GBps: Number
    gemv_share: Number
    ram_GiB: Number
    pcie: str
    note: str = ""


@dataclass(frozen=True)
class Link:
    """A link between host and device memory, one direction."""

    name: str
    nominal_GBps: float
    pinned_GBps: Number
    pageable_GBps: Number
    note: str = ""


@dataclass(frozen=True)
class Recipe:
    """A machine of known parts. cpu_h2d_rates: the share of its lone rate that each keeps beside the other."""

    gpu: str
    host: str
    link: str | None = None
    cpu_h2d_rates: tuple[float, float] | None = None
    rates_source: Source = "estimated"
    note: str = ""


@cache
def gpus() -> dict[str, Gpu]:
    """Known GPUs by name."""
    return _read("gpus", Gpu)


@cache
def hosts() -> dict[str, Host]:
    """Known CPUs with their memory, by name."""
    return _read("hosts", Host)


@cache
def links() -> dict[str, Link]:
    """Known links, by name."""
    return _read("links", Link)


@cache
def machines() -> dict[str, Recipe]:
    """Known machines, by name."""
    return _read("machines", Recipe)


def _read(table: str, kind: type[T]) -> dict[str, T]:
    path = _FOLDER / f"{table}.json"
    return {name: from_json(kind, value, f"{path.name}: {name}") for name, value in read_json(path, table).items()}


def pick(table: dict[str, T], name: str, what: str) -> T:
    """The part of that name; ProfileError lists the known ones."""
    if name not in table:
        raise ProfileError(f"no {what} {name!r}; known: {', '.join(table)}")
    return table[name]


def compose(
    gpu: str,
    cpu: str,
    pcie: str | None = None,
    dram_bytes_per_s: float | None = None,
    name: str | None = None,
) -> HardwareProfile:
    """Profile of a machine put together from known parts.

    gpu, cpu, pcie    names of gpus(), hosts() and links(); the slower side's link if pcie is None
    dram_bytes_per_s  what reading host memory reaches; the host's figure if None
    Raises ProfileError for a part that is not known.
    """
    recipe = Recipe(gpu, cpu, pcie)
    return assemble(recipe, name or "-".join(filter(None, (gpu, cpu, pcie))), dram_bytes_per_s)


def assemble(recipe: Recipe, name: str, dram_bytes_per_s: float | None = None) -> HardwareProfile:
    """Profile of a recipe; ProfileError for a part that is not known."""
    gpu, host = pick(gpus(), recipe.gpu, "GPU"), pick(hosts(), recipe.host, "host")
    sides = [pick(links(), side, "link") for side in ([recipe.link] if recipe.link else [gpu.pcie, host.pcie])]
    link = min(sides, key=lambda side: side.pinned_GBps[0])
    if dram_bytes_per_s is not None and dram_bytes_per_s <= 0:
        raise ProfileError(f"dram_bytes_per_s is {dram_bytes_per_s}, must be above zero")
    if dram_bytes_per_s:
        host = replace(host, memory_GBps=(dram_bytes_per_s / 1e9, "estimated"))
    made = put_together(gpu, host, link, name)
    if recipe.cpu_h2d_rates:
        rates = dict(zip(("CPU", "H2D"), recipe.cpu_h2d_rates, strict=True))
        made = replace(made, contention=(Contention(("CPU", "H2D"), rates, recipe.rates_source),))
    return replace(made, notes=tuple(note for note in (recipe.note, *made.notes) if note))


def put_together(gpu: Gpu, host: Host, link: Link, name: str) -> HardwareProfile:
    """Profile of parts as their figures describe them."""
    link_peak = _link_peak(link)
    rate = _shared_rate(host.memory_GBps[0], host.gemv_share[0], link.pinned_GBps[0])
    return HardwareProfile(
        name=name,
        device="cuda",
        created="published figures",
        fingerprint={"cpu": host.name, "gpu": gpu.name, "link": link.name},
        vram_bytes=int(gpu.vram_GiB[0] * _GIB) - _CONTEXT_BYTES,
        host_bytes=int(host.ram_GiB[0] * _GIB) - _SYSTEM_BYTES,
        cpu_threads=max(1, host.cores - 1),  # one core drives the device
        peaks={"CPU": _cpu_peak(host), "GPU": _gpu_peak(gpu), "H2D": link_peak, "D2H": link_peak},
        curves=_pageable_curves(link),
        handoff_s=dict(_HANDOFF_S),
        contention=(Contention(("CPU", "H2D"), {"CPU": rate, "H2D": rate}, "estimated"),),
        sources={
            "vram_bytes": gpu.vram_GiB[1],
            "host_bytes": host.ram_GiB[1],
            "cpu_threads": "estimated",
            "handoff_s": "estimated",
        },
        notes=tuple(note for note in (gpu.note, host.note, link.note) if note),
    )


def _gpu_peak(gpu: Gpu) -> Peak:
    rates = {"float16": gpu.float16_tflops, "bfloat16": gpu.bfloat16_tflops, "float32": gpu.float32_tflops}
    sources = {dtype: rate[1] for dtype, rate in rates.items()} | {"bytes_per_s": gpu.memory_GBps[1]}
    flops_per_s = {dtype: rate[0] * 1e12 for dtype, rate in rates.items()}
    return Peak(flops_per_s, gpu.memory_GBps[0] * 1e9, GPU_EFFICIENCY, _FIXED_S["GPU"], "estimated", sources)


def _cpu_peak(host: Host) -> Peak:
    """Rates that, times the one efficiency, give the GEMV bandwidth and a tuned library's GEMM."""
    dram, (share, source) = host.memory_GBps, host.gemv_share
    nominal = host.cores * host.clock_GHz[0] * 1e9 * host.float32_flop_per_cycle[0]
    float32 = nominal * GEMM_SHARE / share
    half = float32 * host.bfloat16_speedup[0]
    flops_per_s = {"float32": float32, "bfloat16": half, "float16": float32 * min(1.0, host.bfloat16_speedup[0])}
    sources: dict[str, Source] = {"bytes_per_s": dram[1], "efficiency": source, "bfloat16": host.bfloat16_speedup[1]}
    return Peak(flops_per_s, dram[0] * 1e9, share, _FIXED_S["CPU"], "estimated", sources)


def _link_peak(link: Link) -> Peak:
    rate, source = link.pinned_GBps
    return Peak({}, rate * 1e9, 1.0, _FIXED_S["H2D"], "estimated", {"bytes_per_s": source})


def _pageable_curves(link: Link) -> tuple[Curve, ...]:
    """Copies from and to memory that is not page-locked, which the link's peak does not describe."""
    rate, source = link.pageable_GBps
    op: Op = "pageable"
    directions: tuple[Resource, ...] = ("H2D", "D2H")
    samples = tuple(
        Sample(1, 0.0, 0.0, float(n_bytes), _FIXED_S["H2D"] + n_bytes / (rate * 1e9), 0.0, 1) for n_bytes in _COPY_BYTES
    )
    return tuple(Curve(side, op, dtype, 0, source, samples) for side in directions for dtype in DTYPE_BYTES)


def _shared_rate(dram_GBps: float, gemv_share: float, link_GBps: float) -> float:
    """Rate of CPU and link side by side where nobody measured it: together a share of STREAM, both losing alike."""
    return min(1.0, _DRAM_SHARE * dram_GBps / (dram_GBps * gemv_share + link_GBps))
