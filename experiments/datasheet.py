"""How far off is a profile that is put together from data sheets alone?

    python -m experiments.datasheet            2 minutes on 2 cores; writes experiments/results/datasheet/
    python -m experiments.datasheet --smoke    20 s on a tiny shape; writes nowhere unless --out is given

The machine is a slice of a Zen 5 server: two cores, one of them the emulated device, and a link of a set rate. Its
profile here knows what AMD and the link's setting say and no measurement. Three plans of one placement run for real,
and each is predicted from the data sheets and, for comparison, from a calibration.

One should see the data sheets within a quarter of the measurement, the calibration within some per cent. On another
machine the figures below are wrong, and so is the answer.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.overlap import TINY, Config, calibrated, plans, taking_turns
from experiments.record import RESULTS, record
from hwmodels.parts import GEMM_SHARE, GPU_EFFICIENCY, Gpu, Host, Link, put_together
from hwmodels.profile import HardwareProfile
from hwmodels.schema import to_json
from runtime.calibrate import QUICK, SMOKE, Extent
from runtime.devices.emulated import Link as EmulatedLink
from runtime.measure import median_run
from sim.model import from_config
from sim.simulate import simulate
from sim.workload import Workload

BAR = 0.25
"""Error of a data sheet's prediction that is still called right."""
_CLOCK_GHZ = 4.1  # all-core boost of the 96- and 128-core parts
# Zen 5 has two FMAs of 16 numbers in servers, which the kernel uses for MLPs; MKL, which torch calls for all else,
# takes its 256-bit path on AMD. Of a layer's FLOPs, with as many heads for keys as for queries, 3 x 5632 of
# 3 x 5632 + 4 x 2048 are the MLP's.
_MLP_SHARE = 3 * 5632 / (3 * 5632 + 4 * 2048)
_FLOP_PER_CYCLE = 1 / (_MLP_SHARE / 64 + (1 - _MLP_SHARE) / 32)
# A die's fabric link reads 32 bytes per cycle at 2 GHz; two cores of one die share it. Streams reach 360 of 461 GB/s
# nominal on an EPYC of the generation before (likwid, published).
_CORE_GBPS = 32.0 * 360 / 461
# A core reaches a core's share of its peak, not a GPU's, which composing a profile takes for granted.
_DEVICE_TFLOPS = _CLOCK_GHZ * _FLOP_PER_CYCLE / 1e3 * GEMM_SHARE / GPU_EFFICIENCY
HOST = Host(
    name="one core of an AMD EPYC 9005 (Zen 5)",
    cores=1,
    clock_GHz=(_CLOCK_GHZ, "datasheet"),
    float32_flop_per_cycle=(_FLOP_PER_CYCLE, "estimated"),
    bfloat16_speedup=(2.0, "estimated"),
    memory_GBps=(_CORE_GBPS, "estimated"),
    gemv_share=(0.8, "estimated"),
    ram_GiB=(24.0, "datasheet"),
    pcie="emulated",
)
CORE_AS_GPU = Gpu(
    name="another core as the emulated device",
    vram_GiB=(12.0, "datasheet"),
    memory_GBps=(_CORE_GBPS, "estimated"),
    float16_tflops=(_DEVICE_TFLOPS, "estimated"),
    bfloat16_tflops=(_DEVICE_TFLOPS, "estimated"),
    float32_tflops=(_DEVICE_TFLOPS, "estimated"),
    pcie="emulated",
)
SHAPE: Config = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "dtype": "float32",
}


def datasheet_profile() -> HardwareProfile:
    """The machine as its data sheets have it."""
    link = EmulatedLink()
    pinned, pageable = link.pinned_bytes_per_s / 1e9, link.pageable_bytes_per_s / 1e9
    paced = Link("emulated link", pinned, (pinned, "datasheet"), (pageable, "datasheet"))
    return replace(put_together(CORE_AS_GPU, HOST, paced, "datasheet"), device="emulated")


def run(config: Config, workload: Workload, repetitions: int, extent: Extent) -> list[dict[str, Any]]:
    """A row per plan and step: measured, predicted from data sheets, predicted from a calibration."""
    spec, device = from_config(config, "llama-like"), "emulated"
    profiles = {"datasheet": datasheet_profile(), "calibrated": calibrated(spec.name, config, device, extent)}
    own = plans(spec, workload)
    rows = []
    for plan, found in zip(own, taking_turns(config, own, workload, device, repetitions), strict=True):
        shown = median_run(found)
        predicted = {n: simulate(spec, plan, profile, workload, shown.routing) for n, profile in profiles.items()}
        for step in ("prompt", "decode"):
            measured_s = shown.ttft_s if step == "prompt" else shown.tpot_s
            seconds = {n: t.ttft_s if step == "prompt" else t.tpot_s for n, t in predicted.items()}
            rows.append(
                {
                    "model": spec.name,
                    "plan": plan.policy,
                    "device": device,
                    "step": step,
                    "others_load": shown.others_load,
                    "measured_s": measured_s,
                    **{f"{n}_s": s for n, s in seconds.items()},
                    **{f"{n}_error": s / measured_s - 1 for n, s in seconds.items()},
                }
            )
    return rows


def verdict(summary: Mapping[str, float]) -> str:
    """By how much the data sheets missed, beside the bar and a calibration, in a sentence."""
    missed = {step: summary[f"worst_datasheet_{step}_error"] for step in ("prompt", "decode")}
    known = {step: summary[f"worst_calibrated_{step}_error"] for step in missed}
    found = ", ".join(f"{step} by {error:+.0%} ({known[step]:+.0%} by a calibration)" for step, error in missed.items())
    held = "within" if all(abs(error) <= BAR for error in missed.values()) else "outside"
    return f"Data sheets alone miss, at worst, {found}: {held} the bar of {BAR:.0%}."


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, in seconds")
    parser.add_argument("--repetitions", type=int, default=3, help="rounds over all plans (default 3)")
    parser.add_argument(
        "--out", type=Path, help=f"folder to write to (default {RESULTS.name}/datasheet, none if --smoke)"
    )
    flags = parser.parse_args(argv)
    workload = Workload(16, 4) if flags.smoke else Workload(100, 16)
    extent, repetitions = (SMOKE, 1) if flags.smoke else (QUICK, flags.repetitions)
    rows = run(TINY if flags.smoke else SHAPE, workload, repetitions, extent)
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda v: f"{v:.3g}"))
    summary = {
        f"worst_{name}_{step}_error": max((r[f"{name}_error"] for r in rows if r["step"] == step), key=abs)
        for name in ("datasheet", "calibrated")
        for step in ("prompt", "decode")
    }
    print(verdict(summary))
    settings = {"workload": [workload.n_prompt, workload.n_gen], "host": to_json(HOST), "device": to_json(CORE_AS_GPU)}
    out = flags.out or (None if flags.smoke else RESULTS / "datasheet")
    record(out, settings, rows, {"device": "emulated", **summary})


if __name__ == "__main__":
    main()
