"""What does the contention table change, and what does it gain from telling work that computes from work that reads?

    python -m experiments.contention            2 minutes on 2 cores; writes experiments/results/contention/
    python -m experiments.contention --smoke    20 s on a tiny shape; writes nowhere unless --out is given

Calibration measures the rates of CPU, GPU and H2D beside each other twice: with MLP parts of one token, which read
weights, and of 64 tokens, which compute. Overlapping plans of two shapes run for real and are replayed three times:
without contention, with the rates of reading for all work (one table), and with each task's own (both tables).

One should see the errors of decode shrink with one table and stay with both, and those of prompts, which one table
makes too slow, shrink with both. On a machine without a GPU the device is emulated, and the rows say so.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.overlap import SHAPES, TINY, Config, calibrated, plans, taking_turns
from experiments.record import RESULTS, record
from hwmodels.profile import Contention, HardwareProfile
from runtime.calibrate import FULL, QUICK, SMOKE, Extent
from runtime.devices import device_name
from runtime.measure import Measured, median_run
from sim.model import ModelSpec, from_config
from sim.plan import Plan
from sim.simulate import simulate
from sim.timeline import Timeline
from sim.workload import Workload

Tables = Mapping[str, tuple[Contention, ...]]
"""Entries of a profile by how much of contention they tell."""
EXTENT = replace(QUICK, slice_s=FULL.slice_s)


def tables(profile: HardwareProfile) -> Tables:
    """What the replays know of contention, by name."""
    reading = tuple(entry for entry in profile.contention if not entry.computing)
    return {"no_table": (), "one_table": reading, "both_tables": profile.contention}


def run(
    name: str, config: Config, workload: Workload, device: str, repetitions: int, extent: Extent
) -> tuple[list[dict[str, Any]], HardwareProfile]:
    """Rows of a shape's overlapping plans, and its profile."""
    spec, profile = from_config(config, name), calibrated(name, config, device, extent)
    own = [plan for plan in plans(spec, workload) if plan.policy != "serial"]
    runs = taking_turns(config, own, workload, device, repetitions)
    rows = [row for plan, found in zip(own, runs, strict=True) for row in rows_of(spec, plan, profile, workload, found)]
    return rows, profile


def rows_of(
    spec: ModelSpec, plan: Plan, profile: HardwareProfile, workload: Workload, runs: Sequence[Measured]
) -> Iterator[dict[str, Any]]:
    """A row for the prompt and one for decode: measured, its noise, and the error with each of the tables."""
    shown = median_run(runs)
    timelines = {
        name: simulate(spec, plan, replace(profile, contention=table), workload, shown.routing)
        for name, table in tables(profile).items()
    }
    for step in ("prompt", "decode"):
        all_s = [seconds(one.timeline, step) for one in runs]
        measured_s = statistics.median(all_s)
        yield {
            "model": spec.name,
            "plan": plan.policy,
            "device": profile.device,
            "step": step,
            "measured_s": measured_s,
            "measured_spread": (max(all_s) - min(all_s)) / measured_s,
            "measured_overlap": shown.timeline.overlap,
            "others_load": shown.others_load,
            **{f"error_with_{name}": seconds(t, step) / measured_s - 1 for name, t in timelines.items()},
        }


def seconds(timeline: Timeline, step: str) -> float:
    """TTFT or TPOT."""
    return timeline.ttft_s if step == "prompt" else timeline.tpot_s


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median absolute error by step and table."""
    columns = [key for key in rows[0] if key.startswith("error_")]
    medians = {
        f"{step}: {column.replace('_', ' ')}": statistics.median(abs(r[column]) for r in rows if r["step"] == step)
        for step in ("prompt", "decode")
        for column in columns
    }
    return {"device": rows[0]["device"], **medians}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, in seconds")
    parser.add_argument("--device", default="auto", help="auto, cuda:0 or emulated (default auto)")
    parser.add_argument("--repetitions", type=int, default=5, help="rounds over all plans (default 5)")
    parser.add_argument(
        "--out", type=Path, help=f"folder to write to (default {RESULTS.name}/contention, none if --smoke)"
    )
    flags = parser.parse_args(argv)
    shapes = {"tiny": TINY} if flags.smoke else SHAPES
    workload = Workload(16, 4) if flags.smoke else Workload(100, 24)
    extent, repetitions = (SMOKE, 1) if flags.smoke else (EXTENT, flags.repetitions)
    rows: list[dict[str, Any]] = []
    rates: dict[str, Any] = {}
    for name, config in shapes.items():
        found, profile = run(name, config, workload, device_name(flags.device), repetitions, extent)
        rows += found
        rates[name] = [{"computing": entry.computing, **entry.rate} for entry in profile.contention]
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda v: f"{v:.3g}"))
    out = flags.out or (None if flags.smoke else RESULTS / "contention")
    record(out, {"workload": [workload.n_prompt, workload.n_gen], "rates": rates}, rows, summary_of(rows))


if __name__ == "__main__":
    main()
