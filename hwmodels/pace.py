"""Whether the cores keep their pace: a fixed loop, timed again and again.

What takes half of a core's speed is not always seen in the system's tables: on a virtual machine another tenant may run
on the other hardware thread of the same physical core, by turns of seconds. Work that keeps the core's front end busy,
as an interpreter does, then takes nearly twice as long; chains of dependent arithmetic, which leave room beside them,
do not slow at all. So the loop is the interpreter's own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hwmodels.machine import Finding

SLOW = 1.4
"""A loop that takes so many times as long as the fastest was slowed: two tenants of one core take 1.7 to 2."""
MARKED_SHARE = 0.1
"""Share of slow loops from which on measurements are marked."""
_TURNS, _ITERATIONS = 3, 4000
_WARM_UP_S = 0.05


@dataclass(frozen=True)
class Pace:
    """Loops of some stretch of time: seconds of the fastest, and the share that took SLOW times as long or longer."""

    fastest_s: float
    slow_share: float

    @staticmethod
    def of(loops_s: Sequence[float]) -> Pace:
        """What timed loops, at least one, say."""
        fastest_s = min(loops_s)
        return Pace(fastest_s, sum(s >= SLOW * fastest_s for s in loops_s) / len(loops_s))


def loop_s() -> float:
    """Seconds of the fixed loop now, on the core that this thread is on: 0.2 ms; the best of three."""
    return min(_once_s() for _ in range(_TURNS))


def _once_s() -> float:
    table: dict[int, int] = {}
    value = 0
    began_s = time.perf_counter()
    for i in range(_ITERATIONS):
        table[i % 97] = value
        value += i ^ 3
    return time.perf_counter() - began_s


def probe_s() -> tuple[float, ...]:
    """Seconds of the loop on every core that this process may use, one after the other: half a millisecond each."""
    return tuple(loops_s[0] for loops_s in _on_every_core(lambda: [loop_s()]))


def watch(seconds: float) -> Pace:
    """Time loops for so long on every core that this process may use, one core after the other.

    Where threads cannot be moved between cores, the core is the one that the system chooses.
    """
    n_cores = len(os.sched_getaffinity(0)) if _MOVES else 1
    return Pace.of([s for loops_s in _on_every_core(lambda: _loops_s(seconds / n_cores)) for s in loops_s])


_MOVES = hasattr(os, "sched_setaffinity")


def _on_every_core(measure: Callable[[], list[float]]) -> list[list[float]]:
    if not _MOVES:
        return [measure()]
    cores, found = sorted(os.sched_getaffinity(0)), []
    try:
        for core in cores:
            os.sched_setaffinity(0, {core})
            found.append(measure())
    finally:
        os.sched_setaffinity(0, cores)
    return found


def _loops_s(seconds: float) -> list[float]:
    ready_s = time.perf_counter() + min(_WARM_UP_S, seconds)  # a core that rested takes its time to clock up
    while time.perf_counter() < ready_s:
        loop_s()
    until_s, found = time.perf_counter() + seconds, [loop_s()]
    while time.perf_counter() < until_s:
        found.append(loop_s())
    return found


def pace_findings(pace: Pace) -> list[Finding]:
    """What keeps the cores from their pace, if anything does."""
    if pace.slow_share < MARKED_SHARE:
        return []
    limit = (
        f"A fixed loop took {1e3 * pace.fastest_s:.2f} ms at best, and {SLOW:g} times as long or longer "
        f"{pace.slow_share:.0%} of the time: beside programs that run here, something that this system does not see "
        "can share the physical cores, as another tenant of the host does, or limit their power"
    )
    fix = "Measure when it is quiet or on cores of your own; else calibrate several times (`calibrate --repeats 5`)"
    return [Finding("pace", limit, fix)]
