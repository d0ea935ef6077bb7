"""What a task graph costs on a machine: seconds per task, hand-off delays, and what these rest on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hwmodels.profile import RESOURCES, HardwareProfile, computing_share
from sim.graph import MOVES, TaskGraph

EVIDENCE = ("measured", "interpolated", "extrapolated", "specified")


@dataclass(frozen=True)
class Prices:
    """Times of a graph's tasks, in its order, every resource running alone.

    duration_s  seconds that each task holds its resource
    lag_s       per task and dependency: seconds between the dependency's end and the task's earliest start
    evidence    how many costs were measured, interpolated, extrapolated or specified
    computing   per task: how far it computes rather than reads, where contention tells these apart; empty: all read
    cold        (seconds waited, seconds that what is not an MLP takes longer then on the device), rising waits
    moved_s     how much longer the first of these on the device takes after work of the CPU
    """

    duration_s: list[float]
    lag_s: list[tuple[float, ...]]
    evidence: dict[str, int]
    computing: Sequence[float] = ()
    cold: tuple[tuple[float, float], ...] = ()
    moved_s: float = 0.0


def price(graph: TaskGraph, profile: HardwareProfile) -> Prices:
    """Prices of a graph on a machine; a task without work takes no time.

    Raises ProfileError if the graph uses a resource that the profile does not describe.
    """
    evidence = dict.fromkeys(EVIDENCE, 0)
    durations, computing, told_apart = [], [], profile.told_apart
    for task in graph.tasks:
        duration_s = flops_s = bytes_s = 0.0
        for work in task.works:
            cost = profile.time_s(task.resource, work)
            duration_s += cost.seconds
            flops_s += cost.flops_s
            bytes_s += cost.bytes_s
            evidence[cost.evidence] += 1
        durations.append(duration_s)
        computing.append(computing_share(flops_s, bytes_s) if task.resource in told_apart else 0.0)
    cold = tuple((entry.waited_s, entry.cold_s) for entry in profile.cold)
    moved_s = sum(move.cold_s for move in profile.moves if move.to == "GPU")
    return Prices(durations, _lags(graph, profile), evidence, computing, cold, moved_s)


def _lags(graph: TaskGraph, profile: HardwareProfile) -> list[tuple[float, ...]]:
    resource = graph.arrays.resource
    handoff_s = [[profile.handoff_s.get(f"{before}>{after}", 0.0) for before in RESOURCES] for after in RESOURCES]
    lags = []
    for r, deps in zip(resource, graph.arrays.deps, strict=True):
        row = handoff_s[r]
        lags.append(tuple([row[resource[j]] for j in deps]))
    return _moved(graph, profile, lags) if profile.moves else lags


def _moved(graph: TaskGraph, profile: HardwareProfile, lags: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """The same with what moving a hidden state takes before its copy, and after it."""
    moves = {MOVES[move.to]: move for move in profile.moves}
    kinds = [task.kind for task in graph]
    return [
        (moves[kind].before_s,) * len(deps)
        if kind in moves
        else tuple([moves[kinds[j]].after_s if kinds[j] in moves else lag for j, lag in zip(deps, own, strict=True)])
        for kind, deps, own in zip(kinds, graph.arrays.deps, lags, strict=True)
    ]
