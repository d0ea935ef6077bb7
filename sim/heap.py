"""The engine's semantics without SimPy and without contention: a recurrence, and a list scheduler on a heap.

Search evaluates candidates with these; a property test holds both equal to sim.engine to the last bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush

from hwmodels.profile import RESOURCES
from sim.graph import GraphArrays

Times = tuple[list[float], list[float]]
"""Start and end of every task in seconds."""


def recur(
    arrays: GraphArrays, duration_s: Sequence[float], lag_s: Sequence[Sequence[float]], start_s: float = 0.0
) -> Times:
    """Starts and ends by one pass over the tasks in issue order.

    start = max(resource free, end of each dependency + its lag), end = start + duration: since queues
    are in order and dependencies precede their users, all three are known when a task is reached.
    """
    free = [start_s] * len(RESOURCES)
    starts: list[float] = []
    ends: list[float] = []
    for r, deps, lags, duration in zip(arrays.resource, arrays.deps, lag_s, duration_s, strict=True):
        start = free[r]
        for j, lag in zip(deps, lags, strict=True):
            ready = ends[j] + lag
            if ready > start:
                start = ready
        starts.append(start)
        free[r] = start + duration
        ends.append(free[r])
    return starts, ends


def list_schedule(
    arrays: GraphArrays, duration_s: Sequence[float], lag_s: Sequence[Sequence[float]], start_s: float = 0.0
) -> Times:
    """Starts and ends by moving from one task's end to the next, as an event-driven engine does."""
    n = len(arrays.resource)
    resource = arrays.resource
    starts, ends, ready = [start_s] * n, [start_s] * n, [start_s] * n
    waiting = [len(deps) for deps in arrays.deps]
    users: list[list[tuple[int, float]]] = [[] for _ in range(n)]
    for i, (deps, lags) in enumerate(zip(arrays.deps, lag_s, strict=True)):
        for j, lag in zip(deps, lags, strict=True):
            users[j].append((i, lag))
    queues: list[deque[int]] = [deque() for _ in RESOURCES]
    for i, r in enumerate(resource):
        queues[r].append(i)
    busy = [False] * len(RESOURCES)
    running: list[tuple[float, int]] = []

    def advance(r: int, now: float) -> None:
        queue = queues[r]
        if busy[r] or not queue or waiting[queue[0]]:
            return
        i = queue.popleft()
        busy[r] = True
        starts[i] = ready[i] if ready[i] > now else now
        ends[i] = starts[i] + duration_s[i]
        heappush(running, (ends[i], i))

    for r in range(len(RESOURCES)):
        advance(r, start_s)
    while running:
        now, i = heappop(running)
        busy[resource[i]] = False
        for k, lag in users[i]:
            ready[k] = max(ready[k], now + lag)
            waiting[k] -= 1
            advance(resource[k], now)
        advance(resource[i], now)
    return starts, ends
