"""How far is the simulator from speeds that others have published, on machines that it only knows by their parts?

    python -m experiments.known_points            10 s; writes experiments/results/known_points/
    python -m experiments.known_points --smoke    2 s: copies and pairs; writes nowhere unless --out is given

Every published point that says enough of machine, model, bits per weight and settings is simulated on a profile
of published figures (no calibration of that machine exists) with the plan that its settings mean. Nothing is
tuned: an error is what a reader of specifications would get. A point whose value went into the profile is marked
`input`; it checks the way through the simulator alone and does not count in the summary. Points that say too
little are listed with the reason.

Models here weigh 16 bits; a machine running b-bit weights is simulated as one whose memories and links are 16/b
times as fast and as large (`at_bits`). Arithmetic stays as it is; dequantisation is free, which is optimistic.

One should see links within 2 %, the assumed contention for DRAM within -25 to +12 % of five measured pairs, eleven
decode speeds within -22 to +34 % (seven of them too fast: kernels reach less of the bandwidth than assumed and
engines pay more per layer), two prefill speeds within -24 to +36 %; more than half of all points within 14 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

from experiments.paper_speedups import layer_split
from experiments.record import RESULTS, record
from hwmodels.catalog import compose, hardware, with_overrides
from hwmodels.parts import Recipe, assemble, hosts, machines
from hwmodels.profile import HardwareProfile
from hwmodels.work import copy
from sim import planner, shapes
from sim.plan import LayerPartition, Plan, Prediction
from sim.policies.problem import Problem
from sim.simulate import forecast
from sim.workload import Workload

Row = dict[str, Any]
_BITS_Q4, _BITS_MXFP4, _BITS_INT4, _BITS_FP8 = 4.85, 4.24, 4.5, 8.0
"""Bits per weight with scales: Q4_K_M and INT4 estimated, MXFP4 from its 13.2 MB per gpt-oss expert."""
_CHAT = Workload(n_prompt=128, n_gen=64)
_DESKTOP = "rtx4090-ryzen7950x"


@dataclass(frozen=True)
class Point:
    """A published value, how it is simulated, and what of it was not published."""

    name: str
    source: str
    published: float
    unit: str
    simulate: Callable[[], float]
    assumed: str = ""
    kind: Literal["prediction", "input"] = "prediction"


def at_bits(profile: HardwareProfile, bits: float) -> HardwareProfile:
    """The machine as 16-bit weights must see it for b-bit weights to take as long and as much room."""
    factor = 16 / bits
    peaks = {name: replace(peak, bytes_per_s=peak.bytes_per_s * factor) for name, peak in profile.peaks.items()}
    curves = tuple(
        replace(c, samples=tuple(replace(s, median_s=s.median_s / factor) for s in c.samples)) for c in profile.curves
    )
    vram, host = int(profile.vram_bytes * factor), int(profile.host_bytes * factor)
    return profile.with_(peaks=peaks, curves=curves, vram_bytes=vram, host_bytes=host)


# -- plans ------------------------------------------------------------------------------------------------


def problem(model: str, profile: HardwareProfile, workload: Workload = _CHAT) -> Problem:
    """A model with all of a machine's device memory."""
    return Problem(shapes.shape(model), profile, profile.vram_bytes, workload)


def experts_on_cpu(asked: Problem, n_layers: int, overlap: bool) -> Plan:
    """Experts of the first n_layers layers in host memory, computed there; all else on the device."""
    ffns = [layer.ffn for layer in asked.spec.layers]
    layers = [LayerPartition("GPU", (0 if i < n_layers else f.columns,) * f.n_experts) for i, f in enumerate(ffns)]
    return asked.checked(asked.plan("by hand", layers, asked.both(asked.tier("", 1, overlap=overlap)), pinned=True))


def simulated(asked: Problem, plan: Plan) -> Prediction:
    """What the simulator says of a plan."""
    return forecast(asked.spec, plan, asked.profile, asked.workload)


def _decode(asked: Problem, n_layers: int | None = None, overlap: bool = False) -> float:
    layers = asked.spec.n_layers if n_layers is None else n_layers
    return simulated(asked, experts_on_cpu(asked, layers, overlap)).decode_tok_s


def _prefill(asked: Problem) -> float:
    return simulated(asked, experts_on_cpu(asked, asked.spec.n_layers, True)).prefill_tok_s


# -- points -----------------------------------------------------------------------------------------------


def _copy_ms(machine: str, n_experts: int) -> float:
    spec = shapes.shape("mixtral-8x7b")
    n_bytes = n_experts * spec.ffn_bytes(0) / 8
    return hardware(machine).time_s("H2D", copy(n_bytes, spec.dtype)).seconds * 1e3


def _mixtral_layer_ms() -> float:
    spec = shapes.shape("mixtral-8x7b")
    return 2 * hardware("rtx4090-tr7960x").time_s("CPU", spec.ffn_work(0, 1, 14336)).seconds * 1e3


def _accelerate_s() -> float:
    return _planned("mixtral-8x7b", _a5000(), "stream").tpot_s


def _a5000() -> HardwareProfile:
    return with_overrides(compose("rtx3090", "ryzen5950x"), {"gpu_memory_GBps": 768, "ram_GiB": 256})


def _moe_infinity_s() -> float:
    return _planned("mixtral-8x7b", _a5000(), "mixtral-offloading").tpot_s


def _cached(model: str) -> float:
    return _planned(model, with_overrides(hardware("rtx4090-tr7960x"), {"ram_GiB": 256}), "freetoken").decode_tok_s


def _planned(model: str, profile: HardwareProfile, policy: str) -> Prediction:
    asked = problem(model, profile)
    return simulated(asked, planner.plan(asked.spec, profile, asked.vram_budget_bytes, asked.workload, policy))


def _gpt_oss() -> float:
    return _decode(problem("gpt-oss-120b", at_bits(hardware("rtx5090-ryzen9950x"), _BITS_MXFP4)), 25)


def _qwen(split: bool) -> float:
    profile = with_overrides(hardware(_DESKTOP), {"ram_GiB": 128})
    asked = problem("qwen3.5-122b-a10b", at_bits(profile, _BITS_Q4))
    return simulated(asked, layer_split(asked)[0]).decode_tok_s if split else _decode(asked)


def _ktransformers(n_sockets: int) -> Problem:
    """DeepSeek-V3 in Q4_K_M, 500 tokens of prompt: an RTX 4090 and one or two Xeon Gold 6454S."""
    host = hosts()["xeon6454s"]
    profile = compose("rtx4090", "xeon6454s", dram_bytes_per_s=n_sockets * host.memory_GBps[0] * 1e9)
    amx_tflops = n_sockets * 21.3 / host.gemv_share[0]
    profile = with_overrides(profile, {"cpu_tflops": amx_tflops, "ram_GiB": n_sockets * host.ram_GiB[0]})
    return problem("deepseek-v3", at_bits(profile, _BITS_Q4), Workload(500, 64))


def _slo(bits: float, workload: Workload) -> Problem:
    """DeepSeek-V3 on an RTX 5090 and two EPYC 9355, of which its FP8 GEMV reads 947 GB/s by the same paper."""
    dram = 947e9 / hosts()["epyc9355"].gemv_share[0]
    profile = with_overrides(compose("rtx5090", "epyc9355", dram_bytes_per_s=dram), {"ram_GiB": 1150})
    return problem("deepseek-v3", at_bits(profile, bits), workload)


def _slo_prefill() -> float:
    asked = _slo(_BITS_FP8, Workload(32768, 1))
    plan = planner.plan(asked.spec, asked.profile, asked.vram_budget_bytes, asked.workload, "scheinfer")
    return simulated(asked, plan).prefill_tok_s


def _together(machine: str) -> float:
    """GB/s of CPU and link side by side, by the prior that holds where nobody measured the pair."""
    recipe = machines()[machine]
    profile = assemble(Recipe(recipe.gpu, recipe.host, recipe.link), machine)
    rates = profile.rates(frozenset({"CPU", "H2D"}))
    alone = {"CPU": profile.peaks["CPU"].bytes_per_s * profile.peaks["CPU"].efficiency}
    alone["H2D"] = profile.peaks["H2D"].bytes_per_s
    return sum(alone[name] * rates[name] for name in alone) / 1e9


def points() -> tuple[Point, ...]:
    """All points that are simulated."""
    return (*_copies(), *_pairs(), *_engines(), *_servers())


def _copies() -> tuple[Point, ...]:
    layerscope, misses = "LayerScope, quoted in a survey", "arXiv 2512.16473, quoted in a survey"
    pcie4, two, pcie3 = (partial(_copy_ms, *a) for a in ((_DESKTOP, 1), (_DESKTOP, 2), ("rtx2080ti-ryzen5950x", 1)))
    return (
        Point("Mixtral expert over PCIe 4 x16", layerscope, 13.98, "ms", pcie4),
        Point("2 Mixtral experts over PCIe 4 x16", misses, 28.02, "ms", two),
        Point("Mixtral expert over PCIe 3 x16", layerscope, 26.7, "ms", pcie3, kind="input"),
        Point("2 Mixtral experts on 24 cores, 1 token", misses, 7.34, "ms", _mixtral_layer_ms, kind="input"),
    )


def _pairs() -> tuple[Point, ...]:
    freetoken = "FlashML-org/FreeToken"
    measured = (
        ("rtx4090-tr5955wx", 77.9, f"{freetoken} pull request 232"),
        ("rtx3090-server32", 65.0, f"{freetoken} issue 281"),
        ("rtxpro4000-epyc7302", 30.3, f"{freetoken} issue 436"),
        ("rtx5090-epyc-rome", 119.5, f"{freetoken} issue 444"),
        ("rtxpro6000-epyc9355", 186.6, "a public deployment report of FreeToken"),
    )
    return tuple(
        Point(f"CPU experts and H2D together, {name}", source, value, "GB/s", partial(_together, name))
        for name, value, source in measured
    )


def _engines() -> tuple[Point, ...]:
    qwen, source = "Qwen3.5-122B-A10B Q4, RTX 4090 + 7950X", "a llama.cpp fork that moves hot experts, its page"
    oss, readme = "gpt-oss-120b, RTX 5090 + 9950X3D", "MoE-Infinity, README"
    guess, accelerate = "speed of memory, depth, 4.85 bits", "accelerate, Mixtral-8x7B, RTX A5000"
    cache, lru = "{}, expert cache, RTX 4090 + Threadripper 7960X", "arXiv 2512.16473, its README"
    uniform = "uniform routing; its cache, which fetches behind the CPU's back, is taken as freetoken's"
    return (
        Point(accelerate, readme, 6.633, "s/token", _accelerate_s, "pageable rate of PCIe 4"),
        Point(
            "MoE-Infinity, Mixtral-8x7B, RTX A5000",
            readme,
            0.735,
            "s/token",
            _moe_infinity_s,
            "uniform routing; no prefetch, LRU: mixtral-offloading",
        ),
        Point(cache.format("Mixtral-8x7B"), lru, 4.8, "tok/s", partial(_cached, "mixtral-8x7b"), uniform),
        Point(cache.format("Phi-3.5-MoE"), lru, 10.4, "tok/s", partial(_cached, "phi-3.5-moe"), uniform),
        Point(f"--n-cpu-moe 25, {oss}", "quoted in a survey", 36.2, "tok/s", _gpt_oss, "depth; 4.24 bits throughout"),
        Point(f"--cpu-moe, {qwen}", source, 15.65, "tok/s", partial(_qwen, False), guess),
        Point(f"-ngl, {qwen}", source, 17.87, "tok/s", partial(_qwen, True), f"{guess}; 'layer split' is read as -ngl"),
    )


def _servers() -> tuple[Point, ...]:
    kt = "KTransformers, DeepSeek-V3 Q4, RTX 4090 + {} Xeon 6454S, {}"
    source = "KTransformers, doc/en/DeepseekR1_V3_tutorial.md"
    slo, paper = "stream loading, DeepSeek-V3 {}, RTX 5090 + 2 EPYC 9355, {}", "arXiv 2606.10493"
    two = "4.85 bits; two sockets read and compute twice as fast as one"

    def kt_decode(n_sockets: int) -> float:
        return _decode(_ktransformers(n_sockets), overlap=True)

    def slo_decode(bits: float) -> float:
        return _decode(_slo(bits, Workload(1024, 64)), overlap=True)

    return (
        Point(kt.format(1, "decode"), source, 8.73, "tok/s", partial(kt_decode, 1), "4.85 bits"),
        Point(kt.format(2, "decode"), source, 12.21, "tok/s", partial(kt_decode, 2), two),
        Point(kt.format(2, "prefill, AMX"), source, 255.3, "tok/s", lambda: _prefill(_ktransformers(2)), two),
        Point(slo.format("FP8", "decode"), paper, 21.5, "tok/s", partial(slo_decode, _BITS_FP8), "depth"),
        Point(slo.format("INT4", "decode"), paper, 28.0, "tok/s", partial(slo_decode, _BITS_INT4), "INT4 reads as FP8"),
        Point(slo.format("FP8", "prefill"), paper, 1200.0, "tok/s", _slo_prefill, "our plan, one step of 32768 tokens"),
    )


LEFT_OUT = {
    "gpt-oss-120b on RTX 4090 + i5-13400F, three settings": "DDR4 or DDR5 is not said: a factor of 1.5 in decode",
    "gpt-oss-120b with and without CUDA graphs": "the machine is not named",
    "KTransformers' table by share of experts on the GPU": "four GPUs",
    "DeepSeek-V4-Flash by hit rate": "two GPUs, an expert cache",
    "KTransformers, 54.21 and 82.94 tok/s of prefill": "rates of its kernels without AMX are not published",
    "KTransformers and ik_llama.cpp on 2 EPYC 9355, 22 and 14 tok/s": "what sets them apart is kernels",
    "KTransformers, GLM-4.5-Air bf16, about 11 tok/s": "neither CPU nor GPU is named",
    "Fiddler-style run of DeepSeek-V3, 4.68 and 70.02 tok/s": "bits per weight, and what a program that knows no "
    "sockets reads of two, are not published",
    "llama.cpp's step of 14.7 ms CPU, 11.4 ms GPU, 2 ms copy": "neither model nor machine; its lesson, a plain sum, is "
    "how serial tiers are simulated",
    "2 Mixtral experts on an RTX 4090, 0.25 ms": "704 MB in 0.25 ms is 2.8 times the memory's bandwidth",
    "Fiddler, more than 3 tok/s on 24 GB": "a bound, not a value; the host's memory is not described",
    "1,341 launches, 24 % of a step": "neither model nor machine",
    "48 copies of 6 MiB, serial or a layer ahead": "the link is not named",
    "8 against 4 channels of DDR4, +6 %": "an expert cache; the machine is not named",
    "page-locking, +21 % of prefill on an RTX 3060": "the model is not named",
    "FreeToken, 77 to 83 tok/s on an RTX 5090 server": "the host is not named",
    "SeqMoE's table on an RTX 4090": "30.5 GB of FP8 weights cannot be resident on 24 GB; the host is not named",
    "Pipelined Sharding, two dense models at 16K": "the machine is not named",
}
"""Published values that say too little to be simulated, and why."""


# -- output -----------------------------------------------------------------------------------------------


def row_of(point: Point) -> Row:
    """A point with its simulated value and relative error; of a time, above zero is too slow."""
    value = point.simulate()
    return {
        "point": point.name,
        "kind": point.kind,
        "unit": point.unit,
        "published": point.published,
        "simulated": float(f"{value:.4g}"),
        "error": round(value / point.published - 1, 4),
        "assumed": point.assumed,
        "source": point.source,
    }


def print_table(rows: Sequence[Row]) -> None:
    """Published beside simulated, inputs last, then what was left out."""
    print(f"{'':<76}{'published':>10}{'simulated':>10}{'':<9}{'error':>7}")
    for row in sorted(rows, key=lambda r: str(r["kind"]), reverse=True):
        mark = " (input)" if row["kind"] == "input" else ""
        numbers = f"{row['published']:>10.4g}{row['simulated']:>10.4g} {row['unit']:<8}{row['error']:>+7.0%}"
        print(f"{row['point'] + mark:<76}{numbers}")
    print("\nleft out:")
    for name, reason in LEFT_OUT.items():
        print(f"  {name}: {reason}")
    print()


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate all points, print them beside the published values, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="copies and pairs only")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args(argv)
    rows = [row_of(point) for point in ((*_copies(), *_pairs()) if args.smoke else points())]
    print_table(rows)
    errors = [abs(row["error"]) for row in rows if row["kind"] == "prediction"]
    summary = {
        "predictions": len(errors),
        "median_absolute_error": round(median(errors), 4),
        "worst_absolute_error": max(errors),
        "inputs": len(rows) - len(errors),
        "left_out": len(LEFT_OUT),
    }
    settings = {"question": "how far is the simulator from speeds that others have published?", "left_out": LEFT_OUT}
    record(args.out or (None if args.smoke else RESULTS / "known_points"), settings, rows, summary)


if __name__ == "__main__":
    main()
