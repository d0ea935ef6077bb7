"""The verdict on a simulator: all errors, orders and regrets of replayed cases, each beside its bar and the noise."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sim.anatomy import shares
from sim.fidelity import Errors, Order, errors, order, regrets
from sim.replay import TIMES, Replayed

RACE = ["model", "n_prompt", "n_gen"]
"""What plans share that can be compared: they do the same work."""
CELL = [*RACE, "vram_budget_bytes"]
"""What plans share that compete: a user has one machine, one budget and one workload."""
MEMORY_SLACK_BYTES = 100 * 2**20
"""Differences of memory below this are small whatever share of a small model they are."""


@dataclass(frozen=True)
class MemoryErrors:
    """Predicted against measured bytes: errors, the largest difference, the worst error of those beyond the slack."""

    errors: Errors
    worst_bytes: int
    beyond_slack: float


@dataclass(frozen=True)
class Check:
    """One number against its bar; floor is the same number for a plan measured twice, None where that means nothing."""

    name: str
    value: float
    bar: float
    floor: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the number is on the right side of the bar."""
        return self.value >= self.bar if self.at_least else self.value <= self.bar


@dataclass(frozen=True)
class Verdict:
    """What a set of cases says.

    n_plans        by model
    errors         of step, ttft_s, tpot_s, total_s, tok_s (generated tokens per second), by what is set against the
                   measured value: simulated, isolated (without contention), predicted (before any run) and
                   noise (the second half of the visits against the first)
    noise          the share by which total_s of one plan differs between halves of the visits, 90th percentile
    orders         of plans that do the same work, by total_s, simulated and as predicted
    regrets        by plans tried, 1 and 3: per cell, choosing by what was predicted
    kinds, resources   error of the total time by kind of task, of busy time by resource and plan
    causes         sim.anatomy's shares over all steps, and of decode and prefill alone
    memory         device memory, as the device counts it
    loaded         growth of the process when loading, against weights and slots of both sides; None where not known
    """

    n_plans: dict[str, int]
    errors: dict[str, dict[str, Errors]]
    noise: float
    orders: dict[str, Order]
    regrets: dict[int, dict[Hashable, float]]
    kinds: pd.DataFrame
    resources: dict[str, Errors]
    causes: dict[str, pd.Series[float]]
    memory: MemoryErrors
    loaded: MemoryErrors | None

    def checks(self) -> tuple[Check, ...]:
        """The numbers that decide, against their bars."""
        step, noisy_step = self.errors["step"]["simulated"], self.errors["step"]["noise"]
        speed, ttft = self.errors["tok_s"], self.errors["ttft_s"]
        worst = {n: max(found.values(), default=0.0) for n, found in self.regrets.items()}
        memory = [Check("device memory, worst error beyond 100 MiB", self.memory.beyond_slack, 0.02)]
        if self.loaded is not None:
            memory.append(Check("process memory, worst error beyond 100 MiB", self.loaded.beyond_slack, 0.02))
        noisy_tau = self.orders["noise"].tau
        return (
            Check("step error, median", step.median, 0.05, noisy_step.median),
            Check("step error, 90th percentile", step.p90, 0.10, noisy_step.p90),
            Check("throughput error, median", speed["simulated"].median, 0.05, speed["noise"].median),
            Check("throughput error, 90th percentile", speed["simulated"].p90, 0.10, speed["noise"].p90),
            Check("TTFT error, median", ttft["simulated"].median, 0.10, ttft["noise"].median),
            Check("Kendall's tau, simulated", self.orders["simulated"].tau, 0.9, noisy_tau, True),
            Check("Kendall's tau, predicted", self.orders["predicted"].tau, 0.9, noisy_tau, True),
            Check("top-1 regret, median", float(np.median(list(self.regrets[1].values()))), 0.03),
            Check("top-1 regret, worst", worst[1], 0.03),
            Check("regret of the best of three, worst", worst[3], 0.03),
            Check("plans of a model, fewest", float(min(self.n_plans.values())), 20, None, True),
            *memory,
        )


def verdict(replayed: Replayed) -> Verdict:
    """The verdict on some replayed cases; they need predictions, and two visits at least."""
    cases, steps = replayed.cases, replayed.steps
    sides = ("simulated", "isolated", "predicted")
    found = {name: {side: _errors(cases, f"{side}_{name}", name) for side in sides} for name in TIMES}
    for name in TIMES:
        found[name]["noise"] = _errors(cases, f"second_{name}", f"first_{name}")
    found["step"] = {side: _errors(steps, f"{side}_s", "measured_s") for side in sides[:2]}
    found["step"]["noise"] = _errors(steps, "second_s", "first_s")
    found["tok_s"] = {side: _rate_errors(cases, f"{side}_total_s", "total_s") for side in sides}
    found["tok_s"]["noise"] = _rate_errors(cases, "second_total_s", "first_total_s")
    noise = found["total_s"]["noise"].p90
    races, cells = _groups(cases, RACE), _groups(cases, CELL)
    pairs = {side: (f"{side}_total_s", "total_s") for side in sides} | {"noise": ("second_total_s", "first_total_s")}
    return Verdict(
        n_plans={str(model): int(n) for model, n in cases.groupby("model", sort=False).size().items()},
        errors=found,
        noise=noise,
        orders={side: order(cases[a].tolist(), cases[b].tolist(), noise, races) for side, (a, b) in pairs.items()},
        regrets={n: regrets(cases["predicted_total_s"].tolist(), cases["total_s"].tolist(), cells, n) for n in (1, 3)},
        kinds=_kinds(replayed.tasks),
        resources=_resources(replayed.tasks),
        causes=_causes(replayed.causes),
        memory=_memory(cases, "vram_bytes"),
        loaded=_memory(cases.dropna(subset="loaded_bytes"), "loaded_bytes")
        if cases["loaded_bytes"].notna().any()
        else None,
    )


def _errors(table: pd.DataFrame, simulated: str, measured: str) -> Errors:
    return errors(table[simulated].tolist(), table[measured].tolist())


def _rate_errors(table: pd.DataFrame, simulated: str, measured: str) -> Errors:
    return errors((1.0 / table[simulated]).tolist(), (1.0 / table[measured]).tolist())


def _groups(cases: pd.DataFrame, by: list[str]) -> list[Hashable]:
    return list(cases[by].itertuples(index=False, name=None))


def _kinds(tasks: pd.DataFrame) -> pd.DataFrame:
    """By kind: its share of all measured task time, the error of its total, and the spread over single tasks."""
    rows = []
    for kind, own in tasks.groupby("kind", sort=False):
        one = errors(own["simulated_s"].tolist(), own["measured_s"].tolist())
        total_s = float(own["measured_s"].sum())
        share = total_s / float(tasks["measured_s"].sum())
        error = float(own["simulated_s"].sum()) / total_s - 1.0
        rows.append(
            {"kind": kind, "share": share, "error": error, "median": one.median, "p90": one.p90, "tasks": one.n}
        )
    return pd.DataFrame(rows).sort_values("share", ascending=False, ignore_index=True)


def _resources(tasks: pd.DataFrame) -> dict[str, Errors]:
    busy = tasks.groupby(["resource", "model", "plan_id"], sort=False)[["simulated_s", "measured_s"]].sum()
    return {
        str(name): errors(own["simulated_s"].tolist(), own["measured_s"].tolist())
        for name, own in busy.groupby(level="resource", sort=False)
    }


def _causes(causes: pd.DataFrame) -> dict[str, pd.Series[float]]:
    is_prefill = causes["step"].str.startswith("prefill")
    parts = {"all": causes, "prefill": causes[is_prefill], "decode": causes[~is_prefill]}
    return {name: shares(part) for name, part in parts.items() if len(part)}


def _memory(cases: pd.DataFrame, name: str) -> MemoryErrors:
    used = cases[cases[name] > 0]
    predicted, measured = used[f"predicted_{name}"], used[name]
    gap = (predicted - measured).abs()
    beyond = (gap / measured)[gap > MEMORY_SLACK_BYTES]
    return MemoryErrors(
        errors(predicted.tolist(), measured.tolist()), int(gap.max()), float(beyond.max()) if len(beyond) else 0.0
    )
