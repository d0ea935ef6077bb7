"""Do two calibrations of one machine lead to plans of the same speed?

    python -m experiments.calibration_repeats            4 minutes on 2 cores; writes results/calibration_repeats/
    python -m experiments.calibration_repeats --smoke    10 s on a tiny shape; writes nowhere unless --out is given

Each of two shapes is calibrated several times with --quick, taking turns; every calibration searches a plan for
half of the MLP weights on the device and predicts its speed. The others then predict that same plan.

One should see predicted speeds that differ by less than 5 % and, on a quiet machine, points left out of a curve
predicted within 5 % in the median and 15 % at worst. others_load says how quiet it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.overlap import SHAPES, TINY, calibrated
from experiments.record import RESULTS, record
from hwmodels.calibrate import residuals
from hwmodels.profile import HardwareProfile
from runtime.budget import half_budget
from runtime.calibrate import QUICK, SMOKE
from sim.model import ModelSpec, from_config
from sim.plan import Plan
from sim.planner import plan as make_plan
from sim.simulate import forecast
from sim.workload import Workload


def rows_of(spec: ModelSpec, profiles: Sequence[HardwareProfile], workload: Workload) -> list[dict[str, Any]]:
    """A row per calibration: its plan's predicted speed, how others predict that plan, how good its curves are."""
    budget = half_budget(spec, workload)
    plans: list[Plan] = [make_plan(spec, profile, budget, workload) for profile in profiles]
    rows = []
    for number, (profile, plan) in enumerate(zip(profiles, plans, strict=True)):
        assert plan.prediction is not None, "the planner predicts"
        by_others = [forecast(spec, plan, other, workload) for other in profiles if other is not profile]
        found = residuals(c for c in profile.curves if c.source == "measured")
        worst = max(found, key=lambda r: r.worst)
        rows.append(
            {
                "model": spec.name,
                "calibration": number,
                "device": profile.device,
                "others_load": profile.fingerprint["others_load"],
                "plan_id": plan.id,
                "prefill_tok_s": plan.prediction.prefill_tok_s,
                "decode_tok_s": plan.prediction.decode_tok_s,
                "decode_by_others_min": min(p.decode_tok_s for p in by_others),
                "decode_by_others_max": max(p.decode_tok_s for p in by_others),
                "left_out_median": max(r.median for r in found),
                "left_out_worst": worst.worst,
                "worst_curve": worst.curve,
            }
        )
    return rows


def difference(rows: Sequence[Mapping[str, Any]], column: str) -> float:
    """Largest over smallest value of a column within a shape, less one: the worst shape's."""
    shapes = {row["model"] for row in rows}
    values = [[float(row[column]) for row in rows if row["model"] == shape] for shape in shapes]
    return max(max(own) / min(own) - 1 for own in values)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, in seconds")
    parser.add_argument("--device", default="auto", help="auto, cuda:0 or emulated (default auto)")
    parser.add_argument("--repeats", type=int, default=3, help="calibrations of each shape (default 3)")
    parser.add_argument(
        "--out", type=Path, help=f"folder to write to (default {RESULTS.name}/calibration_repeats, none if --smoke)"
    )
    flags = parser.parse_args(argv)
    shapes = {"tiny": TINY} if flags.smoke else SHAPES
    workload = Workload(16, 4) if flags.smoke else Workload(100, 24)
    repeats, extent = (2, SMOKE) if flags.smoke else (flags.repeats, QUICK)
    profiles: dict[str, list[HardwareProfile]] = {name: [] for name in shapes}
    for _ in range(repeats):
        for name, config in shapes.items():
            profiles[name].append(calibrated(name, config, flags.device, extent))
    rows = [
        row for name, config in shapes.items() for row in rows_of(from_config(config, name), profiles[name], workload)
    ]
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    summary = {
        "device": rows[0]["device"],
        "prefill_difference": difference(rows, "prefill_tok_s"),
        "decode_difference": difference(rows, "decode_tok_s"),
        "left_out_median": max(row["left_out_median"] for row in rows),
        "left_out_worst": max(row["left_out_worst"] for row in rows),
    }
    out = flags.out or (None if flags.smoke else RESULTS / "calibration_repeats")
    record(out, {"workload": [workload.n_prompt, workload.n_gen], "repeats": repeats}, rows, summary)


if __name__ == "__main__":
    main()
