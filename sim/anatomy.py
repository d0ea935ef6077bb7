"""Where a simulator's error comes from: one cause at a time is put right, and what that changes is its share.

Kinds of tasks  the step is simulated again with the measured times of one kind of task in place of the
                simulated ones; by how much its wall time moves is that kind's part of the error
Waiting         with the measured times of all tasks; what error is left lies in between tasks: hand-offs, order
Contention      with every resource running as if alone; the difference to the simulation is what the model of
                contention does, right or wrong

Parts of an error do not add up to it where tasks overlap: what hides behind a longer task costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from hwmodels.errors import FormatError
from hwmodels.profile import HardwareProfile
from hwmodels.threads import with_threads
from sim.caching import CacheWalk
from sim.compile import compile_step
from sim.cost import price
from sim.engine import schedule
from sim.graph import TaskGraph
from sim.heap import recur
from sim.model import ModelSpec
from sim.plan import Plan, check_plan
from sim.simulate import routing_of
from sim.timeline import Timeline
from sim.workload import RoutingTrace, Workload

WAITING, CONTENTION = "waiting", "contention"
_TOTALS = ("measured_s", "simulated_s")


def anatomy(
    spec: ModelSpec,
    plan: Plan,
    profile: HardwareProfile,
    workload: Workload,
    measured: Timeline,
    routing: RoutingTrace | None = None,
) -> pd.DataFrame:
    """Per step that was measured: its two wall times, and seconds of error by kind of task, waiting and contention.

    Above zero the simulation is too slow for that cause; kinds that a step does not have count 0. Raises
    FormatError if no step of the workload was measured or tasks differ, PlanError for another model's plan.
    """
    check_plan(plan, spec)
    where = routing_of(spec, workload, routing)
    steps, machine = workload.steps(plan.chunk_tokens), with_threads(profile, spec.dtype, plan.cpu_threads)
    walk = CacheWalk(spec, plan, steps, where, routing.cached if routing is not None else None)
    wall_s = measured.step_s
    rows = []
    for step in steps:
        if step.name in wall_s:
            graph = compile_step(spec, plan, step, where, walk.before(step))
            found = _causes(graph, machine, _durations(graph, measured.step(step.name)), wall_s[step.name])
            rows.append({"step": step.name, **found})
    if not rows:
        raise FormatError(f"the measured timeline has none of the {len(steps)} steps of the workload")
    return pd.DataFrame(rows).fillna(0.0)


def shares(table: pd.DataFrame) -> pd.Series[float]:
    """Each cause's part of the measured time over all steps of a table of `anatomy`, largest first.

    The first entry, total, is the error of the simulated time.
    """
    measured_s = float(table["measured_s"].sum())
    causes = [name for name in table.select_dtypes("number").columns if name not in _TOTALS]
    found = {name: float(table[name].sum()) / measured_s for name in causes}
    total = {"total": float(table["simulated_s"].sum()) / measured_s - 1.0}
    return pd.Series(total | dict(sorted(found.items(), key=lambda item: -abs(item[1]))))


def _durations(graph: TaskGraph, measured: Timeline) -> list[float]:
    spans = {span.task: span.duration_s for span in measured.spans}
    lacking = [task.id for task in graph if task.id not in spans]
    if lacking:
        raise FormatError(
            f"the measured timeline lacks {len(lacking)} tasks of the plan, the first is {lacking[0]!r}; "
            f"is it of this plan, workload and routing?"
        )
    return [spans[task.id] for task in graph]


def _causes(graph: TaskGraph, machine: HardwareProfile, measured_s: Sequence[float], wall_s: float) -> dict[str, float]:
    prices = price(graph, machine)
    starts, ends = schedule(graph, prices, machine.rates)
    shared_s = [end - start for start, end in zip(starts, ends, strict=True)]

    def wall(duration_s: Sequence[float]) -> float:
        return max(recur(graph.arrays, duration_s, prices.lag_s)[1])

    simulated_s = max(ends)
    causes = {"measured_s": wall_s, "simulated_s": simulated_s}
    for kind in dict.fromkeys(task.kind for task in graph):
        put_right = [m if task.kind == kind else s for task, s, m in zip(graph, shared_s, measured_s, strict=True)]
        causes[kind] = simulated_s - wall(put_right)
    causes[WAITING] = wall(measured_s) - wall_s
    causes[CONTENTION] = simulated_s - wall(prices.duration_s)
    return causes
