"""Simulated against measured: errors by task, kind, resource and step, end to end, and the critical paths.

An error is (simulated - measured) / measured: above zero the simulator said slower than it was. Only
tasks that are in both timelines are compared, and only steps that both ran.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hwmodels.errors import FormatError, GraphError
from hwmodels.profile import RESOURCES
from hwmodels.units import format_seconds
from sim.graph import TaskGraph
from sim.timeline import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Files carry microseconds, so instants that were equal may differ by a rounding after a round trip.
_SAME_INSTANT_S = 1e-9


@dataclass(frozen=True)
class Comparison:
    """Two timelines of one task graph, side by side.

    tasks       one row per common task: task, kind, resource, step, layer and the two durations
    kinds       total duration by kind, and the spread of its tasks' absolute errors
    resources   busy time by resource
    steps       wall time by step
    end_to_end  ttft_s, tpot_s and tok_s (generated tokens per second and sequence)
    critical    share of the critical path by kind, in both
    missing     ids of tasks that are only in the other timeline, by "simulated" and "measured"

    All tables but `critical` have the columns simulated_s, measured_s and error; error is NaN where
    nothing was measured. In end_to_end the columns are simulated, measured and error.
    """

    simulated: Timeline
    measured: Timeline
    tasks: pd.DataFrame
    kinds: pd.DataFrame
    resources: pd.DataFrame
    steps: pd.DataFrame
    end_to_end: pd.DataFrame
    critical: pd.DataFrame
    missing: dict[str, tuple[str, ...]]

    def summary(self) -> dict[str, dict[str, float]]:
        """Median, 90th percentile and worst absolute error by table, with the number of rows."""
        tables = {"tasks": self.tasks, "kinds": self.kinds, "resources": self.resources, "steps": self.steps}
        return {name: _spread(table["error"]) for name, table in tables.items()} | {
            "end_to_end": {str(k): float(v) for k, v in self.end_to_end["error"].items()}
        }

    def __str__(self) -> str:
        """The summary as text."""
        lines = [f"{'absolute error':<16}{'median':>9}{'p90':>9}{'worst':>9}{'rows':>7}"]
        for name, row in self.summary().items():
            if name != "end_to_end":
                percents = "".join(f"{row[k]:>9.1%}" for k in ("median", "p90", "worst"))
                lines.append(f"{name:<16}{percents}{row['rows']:>7.0f}")
        for name, simulated, measured, error in self.end_to_end.itertuples():
            both = [f"{v:.3g}" if name == "tok_s" else format_seconds(v) for v in (simulated, measured)]
            lines.append(f"{name}: simulated {both[0]}, measured {both[1]}, error {error:+.1%}")
        for source, ids in self.missing.items():
            if ids:
                lines.append(f"{len(ids)} tasks are missing from the {source} timeline, the first is {ids[0]}")
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Both timelines over one time axis (sim.plot.gantt)."""
        from sim.plot import gantt

        return gantt([self.simulated, self.measured])


def compare(simulated: Timeline, measured: Timeline) -> Comparison:
    """Comparison of two timelines, task by task.

    Raises FormatError if one of them is empty or if they have no task in common.
    """
    for name, timeline in (("simulated", simulated), ("measured", measured)):
        if not timeline.spans:
            raise FormatError(f"the {name} timeline is empty; nothing can be compared with it")
        twice = [task for task, n in Counter(s.task for s in timeline.spans).items() if n > 1]
        if twice:
            raise FormatError(f"the {name} timeline has task {twice[0]!r} twice; compare one run with one run")
    left, right = (t.to_frame().assign(duration_s=[s.duration_s for s in t.spans]) for t in (simulated, measured))
    tasks = left[["task", "kind", "resource", "step", "layer", "duration_s"]].merge(
        right[["task", "duration_s"]], on="task", suffixes=("_simulated", "_measured")
    )
    if tasks.empty:
        raise FormatError(
            f"no task in common: the simulated timeline starts with {simulated.spans[0].task!r}, the measured one with "
            f"{measured.spans[0].task!r}; compare two runs of one plan and workload"
        )
    tasks = tasks.rename(columns={"duration_s_simulated": "simulated_s", "duration_s_measured": "measured_s"})
    tasks["error"] = _error(tasks["simulated_s"], tasks["measured_s"])
    steps = _paired(simulated.step_s, measured.step_s)
    return Comparison(
        simulated=simulated,
        measured=measured,
        tasks=tasks,
        kinds=_kinds(tasks),
        resources=_totals(tasks, "resource").reindex([r for r in RESOURCES if r in set(tasks["resource"])]),
        steps=steps,
        end_to_end=_end_to_end(steps),
        critical=_critical(simulated, measured),
        missing={
            "simulated": tuple(sorted(set(right["task"]) - set(left["task"]))),
            "measured": tuple(sorted(set(left["task"]) - set(right["task"]))),
        },
    )


def _error(simulated: pd.Series[float], measured: pd.Series[float]) -> pd.Series[float]:
    return (simulated - measured) / measured.where(measured > 0)


def _spread(error: pd.Series[float]) -> dict[str, float]:
    found = error.abs().dropna()
    if found.empty:
        return {"median": 0.0, "p90": 0.0, "worst": 0.0, "rows": 0.0}
    return {
        "median": float(found.median()),
        "p90": float(found.quantile(0.9)),
        "worst": float(found.max()),
        "rows": float(len(found)),
    }


def _totals(tasks: pd.DataFrame, by: str) -> pd.DataFrame:
    totals = tasks.groupby(by, sort=False)[["simulated_s", "measured_s"]].sum()
    return totals.assign(error=_error(totals["simulated_s"], totals["measured_s"]))


def _kinds(tasks: pd.DataFrame) -> pd.DataFrame:
    spread = pd.DataFrame({str(kind): _spread(rows["error"]) for kind, rows in tasks.groupby("kind", sort=False)}).T
    return _totals(tasks, "kind").join(spread)


def _paired(simulated: dict[str, float], measured: dict[str, float]) -> pd.DataFrame:
    names = [name for name in simulated if name in measured]
    table = pd.DataFrame(
        {"simulated_s": [simulated[n] for n in names], "measured_s": [measured[n] for n in names]},
        index=pd.Index(names, name="step"),
    )
    return table.assign(error=_error(table["simulated_s"], table["measured_s"]))


def _end_to_end(steps: pd.DataFrame) -> pd.DataFrame:
    """Every step, prefill or decode, gives each sequence one token."""
    walls = steps[["simulated_s", "measured_s"]].rename(columns=lambda name: name.removesuffix("_s"))
    prefill, decode = (walls[walls.index.str.startswith(name)] for name in ("prefill", "decode"))
    rows = pd.DataFrame({"ttft_s": prefill.sum(), "tpot_s": decode.mean(), "tok_s": len(walls) / walls.sum()}).T
    rows = rows.dropna()  # without decode steps there is no time per output token
    return rows.assign(error=_error(rows["simulated"], rows["measured"]))


def _critical(simulated: Timeline, measured: Timeline) -> pd.DataFrame:
    shares = {t.source: path_shares(t, critical_path(None, t)) for t in (simulated, measured)}
    return pd.DataFrame(shares).fillna(0.0).rename_axis("kind")


# -- critical path ------------------------------------------------------------------------------------


def critical_path(graph: TaskGraph | None, timeline: Timeline) -> tuple[str, ...]:
    """Ids of the tasks that decided when the timeline ended, from first to last.

    From the last task backwards, each time to the one it waited for: of its dependencies and the task
    before it on its resource, the one that ended last. Without a graph, of all tasks, the one that
    ended last before it started. Raises GraphError if the timeline lacks a task of the graph.
    """
    if not timeline.spans:
        return ()
    return _path_of_spans(timeline.spans) if graph is None else _path_of_graph(graph, timeline)


def path_shares(timeline: Timeline, path: Sequence[str]) -> dict[str, float]:
    """Share of the makespan by kind of the tasks on a path; the rest, under "wait", is hand-off and idling."""
    if timeline.makespan_s <= 0:
        return {}
    on_path, shares = set(path), {"wait": 1.0}
    for span in timeline.spans:
        if span.task in on_path:
            share = span.duration_s / timeline.makespan_s
            shares[span.kind] = shares.get(span.kind, 0.0) + share
            shares["wait"] -= share
    shares["wait"] = max(0.0, shares["wait"])
    return shares


def _walk(last: int, before: Callable[[int], int], names: Sequence[str]) -> tuple[str, ...]:
    path = []
    while last >= 0:
        path.append(names[last])
        last = before(last)
    return tuple(reversed(path))


def _path_of_spans(spans: Sequence[Span]) -> tuple[str, ...]:
    ordered = sorted(spans, key=lambda s: (s.end_s, s.start_s))
    ends = [s.end_s for s in ordered]

    def before(i: int) -> int:
        return min(bisect_right(ends, ordered[i].start_s + _SAME_INSTANT_S), i) - 1

    return _walk(len(ordered) - 1, before, [s.task for s in ordered])


def _path_of_graph(graph: TaskGraph, timeline: Timeline) -> tuple[str, ...]:
    end_s = {span.task: span.end_s for span in timeline.spans}
    lacking = [task.id for task in graph if task.id not in end_s]
    if lacking:
        raise GraphError(f"the timeline lacks task {lacking[0]!r} of the graph; take a timeline of the same step")
    arrays = graph.arrays
    ends = [end_s[task.id] for task in graph]
    queued_before: list[int] = []
    latest = dict.fromkeys(range(len(RESOURCES)), -1)
    for i, r in enumerate(arrays.resource):
        queued_before.append(latest[r])
        latest[r] = i

    def before(i: int) -> int:
        waited_for = [j for j in (*arrays.deps[i], queued_before[i]) if j >= 0]
        return max(waited_for, key=lambda j: ends[j], default=-1)

    return _walk(int(np.argmax(ends)), before, [task.id for task in graph])
