"""Today's simulator beside what was measured: every case of some evidence replayed, task by task."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from hwmodels.calibrate import trimmed_mean
from hwmodels.errors import FormatError
from sim.anatomy import anatomy
from sim.compare import compare
from sim.evidence import Case, Evidence
from sim.memory import memory
from sim.policies.problem import total_s
from sim.simulate import simulate
from sim.timeline import Timeline

TIMES = ("ttft_s", "tpot_s", "total_s")


@dataclass(frozen=True)
class Replayed:
    """Tables of measured against simulated.

    cases    a row per plan: measured ttft_s, tpot_s, total_s (trimmed means of its runs); the same simulated with
             the routing that occurred (simulated_), without contention (isolated_), as predicted before any
             run (predicted_), and of the first and the second half of the visits (first_, second_); memory
    steps    a row per plan and step: measured_s, simulated_s, isolated_s, first_s, second_s
    tasks    a row per task of every plan's median run: kind, resource, measured_s, simulated_s
    causes   a row per plan and step: sim.anatomy
    """

    cases: pd.DataFrame
    steps: pd.DataFrame
    tasks: pd.DataFrame
    causes: pd.DataFrame

    @staticmethod
    def together(parts: Sequence[Replayed]) -> Replayed:
        """The tables of several models, one below the other."""
        names = ("cases", "steps", "tasks", "causes")
        return Replayed(*(pd.concat([getattr(p, n) for p in parts], ignore_index=True) for n in names))


def replay(evidence: Evidence) -> Replayed:
    """Simulate every case again with its recorded routing; FormatError if a case was not measured whole."""
    rows, steps, tasks, causes = [], [], [], []
    by_plan = dict(list(evidence.runs.groupby("plan_id")))
    for case in evidence.cases:
        if case.plan.id not in by_plan:
            raise FormatError(f"{evidence.spec.name}: plan {case.plan.id} has no runs; measure it again")
        trace = evidence.trace(case)
        context = evidence.spec, case.plan, evidence.profile, case.workload
        shared, isolated = simulate(*context, trace), simulate(*context, trace, contention=False)
        measured = evidence.measured(case, shared)
        names = {"model": evidence.spec.name, "plan_id": case.plan.id}
        own_steps = _steps(by_plan[case.plan.id], shared, isolated)
        rows.append({**names, **_case(evidence, case, own_steps)})
        steps.append(own_steps.assign(**names))
        tasks.append(compare(shared, measured).tasks.drop(columns="error").assign(**names))
        causes.append(anatomy(*context, measured, trace).assign(**names))
    tables = (pd.concat(t, ignore_index=True) for t in (steps, tasks, causes))
    return Replayed(pd.DataFrame(rows), *tables)


def _steps(runs: pd.DataFrame, shared: Timeline, isolated: Timeline) -> pd.DataFrame:
    """Trimmed means of the measured wall times by step, of all visits and each half of them, beside the simulated."""
    late = runs["visit"] >= (runs["visit"].max() + 1) / 2
    parts = {"measured_s": runs, "first_s": runs[~late], "second_s": runs[late]}
    table = pd.DataFrame({name: part.groupby("step", sort=False)["wall_s"].agg(_mean) for name, part in parts.items()})
    table["simulated_s"], table["isolated_s"] = pd.Series(shared.step_s), pd.Series(isolated.step_s)
    if table[["measured_s", "simulated_s"]].isna().any(axis=None):
        raise FormatError(f"steps {', '.join(table.index)} were measured, {', '.join(shared.steps)} simulated")
    return table.rename_axis("step").reset_index()


def _mean(walls_s: pd.Series[float]) -> float:
    return trimmed_mean(walls_s.tolist())


def _case(evidence: Evidence, case: Case, steps: pd.DataFrame) -> dict[str, object]:
    plan, need = case.plan, memory(evidence.spec, case.plan)
    row: dict[str, object] = {
        "policy": plan.policy,
        "vram_budget_bytes": plan.vram_budget_bytes,
        "n_prompt": case.workload.n_prompt,
        "n_gen": case.workload.n_gen,
    }
    sides = {"": "measured_s", "simulated_": "simulated_s", "isolated_": "isolated_s"}
    for prefix, column in {**sides, "first_": "first_s", "second_": "second_s"}.items():
        row |= {prefix + name: value for name, value in _times(steps, column).items()}
    if plan.prediction is not None:
        said = plan.prediction
        times = (said.ttft_s, said.tpot_s, total_s(said, case.workload))
        row |= {f"predicted_{name}": value for name, value in zip(TIMES, times, strict=True)}
    return row | {
        "vram_bytes": case.peak_vram_bytes,
        "predicted_vram_bytes": need.vram_bytes,
        "loaded_bytes": case.loaded_bytes,
        "predicted_loaded_bytes": need.loaded_bytes,
        "others_load": case.others_load,
        "slowed": case.slowed,
    }


def _times(steps: pd.DataFrame, column: str) -> dict[str, float]:
    walls = dict(zip(steps["step"], steps[column], strict=True))
    decode = [wall for step, wall in walls.items() if step.startswith("decode")]
    ttft_s = sum(wall for step, wall in walls.items() if step.startswith("prefill"))
    tpot_s = statistics.fmean(decode) if decode else 0.0
    return dict(zip(TIMES, (ttft_s, tpot_s, ttft_s + sum(decode)), strict=True))
