"""What does the contention table change, and what does it gain from telling work that computes from work that reads?

    python -m experiments.contention            3 minutes on 2 cores; writes experiments/results/contention/
    python -m experiments.contention --smoke    20 s on a tiny shape; writes nowhere unless --out is given

Calibration measures the rates of CPU, GPU and H2D beside each other twice: with MLP parts of one token, which read
weights, and of 64 tokens, which compute. Overlapping plans of two shapes run for real and are replayed three times:
without contention, with the rates of reading for all work (one table), and with each task's own (both tables).
In the same rounds runs a plan of the same placement where nothing overlaps: the stretch is how much longer MLP parts
took than in that plan, measured and in the replays. That is contention itself, whatever else is wrong or drifts.

One should see the errors of decode shrink with one table and stay with both, and those of prompts, which one table
makes too slow, shrink with both. On a machine without a GPU the device is emulated, and the rows say so.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Played:
    """A plan's runs, in the order of rounds, and its replays by table."""

    plan: Plan
    runs: Sequence[Measured]
    replays: Mapping[str, Timeline]

    def measured_s(self, step: str) -> float:
        """Median TTFT or TPOT."""
        return statistics.median(seconds(one.timeline, step) for one in self.runs)

    def errors(self, step: str) -> dict[str, float]:
        """Error of TTFT or TPOT by table."""
        return {name: seconds(replay, step) / self.measured_s(step) - 1 for name, replay in self.replays.items()}


def run(
    name: str, config: Config, workload: Workload, device: str, repetitions: int, extent: Extent
) -> tuple[list[dict[str, Any]], HardwareProfile]:
    """Rows of a shape's overlapping plans, and its profile."""
    spec, profile = from_config(config, name), calibrated(name, config, device, extent)
    own = plans(spec, workload)
    serial, *overlapping = (
        Played(plan, runs, replays(spec, plan, profile, workload, median_run(runs)))
        for plan, runs in zip(own, taking_turns(config, own, workload, device, repetitions), strict=True)
    )
    names = {"model": name, "device": profile.device}
    return [names | row_of(one, serial, step) for one in overlapping for step in ("prompt", "decode")], profile


def replays(
    spec: ModelSpec, plan: Plan, profile: HardwareProfile, workload: Workload, shown: Measured
) -> dict[str, Timeline]:
    """The plan in simulated time, by what is known of contention."""
    return {
        name: simulate(spec, plan, replace(profile, contention=table), workload, shown.routing)
        for name, table in tables(profile).items()
    }


def row_of(one: Played, serial: Played, step: str) -> dict[str, Any]:
    """What one plan took in a step, the errors of its replays, and how much longer its MLP parts took than serial's."""
    all_s = [seconds(run.timeline, step) for run in one.runs]
    stretched = [mlp_s(a.timeline, step) / mlp_s(b.timeline, step) for a, b in zip(one.runs, serial.runs, strict=True)]
    return {
        "plan": one.plan.policy,
        "step": step,
        "measured_s": one.measured_s(step),
        "measured_spread": (max(all_s) - min(all_s)) / one.measured_s(step),
        "others_load": max((run.others_load or 0.0 for run in one.runs), default=0.0),
        **{f"error_with_{name}": error for name, error in one.errors(step).items()},
        "stretch_measured": statistics.median(stretched),
        **{
            f"stretch_with_{name}": mlp_s(replay, step) / mlp_s(serial.replays[name], step)
            for name, replay in one.replays.items()
        },
    }


def seconds(timeline: Timeline, step: str) -> float:
    """TTFT or TPOT."""
    return timeline.ttft_s if step == "prompt" else timeline.tpot_s


def mlp_s(timeline: Timeline, step: str) -> float:
    """Seconds of all MLP parts of the prompt or of decode, on CPU and GPU."""
    parts = (s for s in timeline.spans if s.kind in ("cc", "gg", "cg"))
    return sum(s.duration_s for s in parts if s.step.startswith("prefill") == (step == "prompt"))


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median absolute error, and that of the stretch, by step and table."""
    summary: dict[str, Any] = {"device": rows[0]["device"]}
    for step in ("prompt", "decode"):
        own = [row for row in rows if row["step"] == step]
        for column in (key for key in rows[0] if key.startswith("error_")):
            summary[f"{step}: {column.replace('_', ' ')}"] = statistics.median(abs(row[column]) for row in own)
        for column in (key for key in rows[0] if key.startswith("stretch_with")):
            missed = statistics.median(abs(row[column] / row["stretch_measured"] - 1) for row in own)
            summary[f"{step}: {column.replace('_', ' ')}, error"] = missed
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, in seconds")
    parser.add_argument("--device", default="auto", help="auto, cuda:0 or emulated (default auto)")
    parser.add_argument("--repetitions", type=int, default=9, help="rounds over all plans (default 9)")
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
