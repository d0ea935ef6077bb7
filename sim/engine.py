"""The reference engine: a task graph runs on its resources in simulated time, with SimPy.

Every resource runs its tasks one at a time in graph order. The head of a queue starts as soon as its
resource is free and every dependency has ended and been handed over; tasks behind it wait.

Resources share DRAM, so tasks in flight slow each other. With a rate table each of them has work left
and progresses at the rate of the set of resources now active; when the set changes, the work left is
brought up to date and the end is set anew. Rates also depend on how far work computes rather than reads memory.
What is not an MLP takes longer on the device after its thread waited, or comes from work of the CPU: prices.cold and
prices.moved_s say how much.

SimPy is used through callbacks on Timeout, without processes: an event per task, not five.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from simpy import Environment
from simpy.events import Event

from hwmodels.errors import GraphError
from hwmodels.profile import RESOURCES
from sim.cost import Prices
from sim.graph import REST, TaskGraph
from sim.timeline import Span, Timeline

Rates = Callable[[frozenset[str], Mapping[str, float]], Mapping[str, float]]
"""Relative rate of each of the resources that are active together, given how far their work computes
(HardwareProfile.rates)."""


def execute(graph: TaskGraph, prices: Prices, profile_rates: Rates | None = None, start_s: float = 0.0) -> Timeline:
    """Simulated timeline of a graph that starts at start_s on idle resources.

    profile_rates switches contention on. Raises GraphError for times that are not finite and at least
    zero, and if a task cannot run.
    """
    starts, ends = schedule(graph, prices, profile_rates, start_s)
    return Timeline("simulated", tuple(spans(graph, starts, ends)))


def spans(graph: TaskGraph, starts: list[float], ends: list[float]) -> list[Span]:
    """One span per task from starts and ends in seconds."""
    return [
        Span(t.id, t.kind, t.resource, t.step, t.layer, start, end, t.bytes, t.flops)
        for t, start, end in zip(graph.tasks, starts, ends, strict=True)
    ]


def schedule(
    graph: TaskGraph, prices: Prices, profile_rates: Rates | None = None, start_s: float = 0.0
) -> tuple[list[float], list[float]]:
    """Start and end of every task in seconds: `execute` without the records."""
    check_prices(graph, prices)
    run = _Run(graph, prices, start_s) if profile_rates is None else _SharedRun(graph, prices, start_s, profile_rates)
    run.go()
    stuck = [task.id for task, end in zip(graph.tasks, run.ends, strict=True) if math.isnan(end)]
    if stuck:
        raise GraphError(f"{len(stuck)} tasks cannot run, the first is {stuck[0]!r}; its dependencies never end")
    return run.starts, run.ends


def check_prices(graph: TaskGraph, prices: Prices) -> None:
    """Raise GraphError unless every task has a duration and lags that are finite and at least zero."""
    if len(prices.duration_s) != len(graph) or len(prices.lag_s) != len(graph):
        raise GraphError(f"{len(prices.duration_s)} durations and {len(prices.lag_s)} lags for {len(graph)} tasks")
    if len(prices.computing) not in (0, len(graph)):
        raise GraphError(f"computing says of {len(prices.computing)} tasks how far they compute, not of {len(graph)}")
    if any(not 0.0 <= share <= 1.0 for share in prices.computing):
        raise GraphError(f"tasks compute by shares of {min(prices.computing)} to {max(prices.computing)}, not 0 to 1")
    infinite = math.inf
    for i, (duration_s, lags) in enumerate(zip(prices.duration_s, prices.lag_s, strict=True)):
        if not 0.0 <= duration_s < infinite or any(not 0.0 <= lag < infinite for lag in lags):
            found = f"takes {duration_s} s after lags of {list(lags)} s"
            raise GraphError(f"task {graph.tasks[i].id!r} {found}; expected finite times of at least zero")


_BITS = [1 << r for r in range(len(RESOURCES))]
_GPU = RESOURCES.index("GPU")
_LEVELS, _LEVEL_BITS = 8, 4
"""How far work computes is counted in eighths: rates are asked for once per set of resources and levels."""


def _names(bits: int) -> frozenset[str]:
    return frozenset(name for bit, name in zip(_BITS, RESOURCES, strict=True) if bits & bit)


def _at_level(r: int, share: float) -> int:
    """Bits that say how far the work of a resource computes."""
    return round(share * _LEVELS) << (len(RESOURCES) + r * _LEVEL_BITS)


def _computing(bits: int) -> dict[str, float]:
    levels = {name: (bits >> len(RESOURCES) + r * _LEVEL_BITS) % (1 << _LEVEL_BITS) for r, name in enumerate(RESOURCES)}
    return {name: level / _LEVELS for name, level in levels.items() if level}


class _Run:
    """One execution where no resource slows another. Lists are indexed by task, or by resource where it says so."""

    def __init__(self, graph: TaskGraph, prices: Prices, start_s: float) -> None:
        n = len(graph)
        self.env = Environment(start_s)
        self.resource, deps = graph.arrays.resource, graph.arrays.deps
        self.duration_s = prices.duration_s
        self.starts, self.ends = [math.nan] * n, [math.nan] * n
        self.waiting = [len(row) for row in deps]
        self.users: list[list[tuple[int, float]]] = [[] for _ in range(n)]
        for i, (row, lags) in enumerate(zip(deps, prices.lag_s, strict=True)):
            for j, lag_s in zip(row, lags, strict=True):
                self.users[j].append((i, lag_s))
        self.busy = [False for _ in RESOURCES]  # by resource
        self.queue: list[deque[int]] = [deque() for _ in RESOURCES]  # by resource
        for i, r in enumerate(self.resource):
            self.queue[r].append(i)

    def go(self) -> None:
        """Run every task."""
        for r in range(len(RESOURCES)):
            self._advance(r)
        self.env.run()

    def _advance(self, r: int) -> None:
        """Start the head of a resource's queue if it can run."""
        queue = self.queue[r]
        if self.busy[r] or not queue or self.waiting[queue[0]]:
            return
        i = queue.popleft()
        self.busy[r] = True
        self.starts[i] = self.env.now
        self._hold(i)

    def _hold(self, i: int) -> None:
        self._after(self.duration_s[i], i, self._ended)

    def _after(self, delay_s: float, i: int, then: Callable[[Event], None]) -> Event:
        event = self.env.timeout(delay_s, i)
        event.callbacks.append(then)
        return event

    def _ended(self, event: Event) -> None:
        i: int = event.value  # type: ignore[assignment]
        self.ends[i] = self.env.now
        self.busy[self.resource[i]] = False
        for k, lag_s in self.users[i]:
            if lag_s:
                self._after(lag_s, k, self._handed_over)
            else:
                self.waiting[k] -= 1
                self._advance(self.resource[k])
        self._advance(self.resource[i])

    def _handed_over(self, event: Event) -> None:
        k: int = event.value  # type: ignore[assignment]
        self.waiting[k] -= 1
        self._advance(self.resource[k])


class _SharedRun(_Run):
    """One execution where active resources slow each other: tasks in flight have work left and a rate.

    left_s is the time that the work left takes alone, counted at the instant since_s; timer is the event
    that ends the task, unless the rate changes first. Lists are indexed by resource; a rate of zero
    means that nothing is in flight, or not yet at a known rate.
    """

    def __init__(self, graph: TaskGraph, prices: Prices, start_s: float, rates_of: Rates) -> None:
        super().__init__(graph, prices, start_s)
        self.rates_of = rates_of
        self.known: dict[int, list[float]] = {}
        self.active = 0  # a bit per resource, and above these how far its task computes
        self.bits = [_BITS[r] for r in self.resource]
        for i, share in enumerate(prices.computing):
            if share:
                self.bits[i] |= _at_level(self.resource[i], share)
        self.caller = _Caller(graph, prices) if prices.cold or prices.moved_s else None
        self.task = [-1 for _ in RESOURCES]
        self.left_s, self.since_s, self.rate = ([0.0 for _ in RESOURCES] for _ in range(3))
        self.timer: list[Event | None] = [None for _ in RESOURCES]
        self.changed = False

    def go(self) -> None:
        """Run every task."""
        for r in range(len(RESOURCES)):
            self._advance(r)
        self._retime()
        self.env.run()

    def _hold(self, i: int) -> None:
        r = self.resource[i]
        if self.duration_s[i] == 0.0:  # takes nothing from the others
            self.timer[r] = self._after(0.0, i, self._ended)
            return
        self.active |= self.bits[i]
        seconds = self.duration_s[i] if self.caller is None else self.caller.begin(i, self.env.now)
        self.task[r], self.left_s[r], self.since_s[r] = i, seconds, self.env.now
        self.changed = True

    def _ended(self, event: Event) -> None:
        i: int = event.value  # type: ignore[assignment]
        r = self.resource[i]
        if self.timer[r] is not event:  # its end was set anew
            return
        if self.rate[r]:
            self.active &= ~self.bits[i]
            self.rate[r] = 0.0
            self.changed = True
        if self.caller is not None:
            self.caller.end(i, self.env.now - self.starts[i], self.env.now)
        super()._ended(event)
        self._retime()

    def _handed_over(self, event: Event) -> None:
        super()._handed_over(event)
        self._retime()

    def _retime(self) -> None:
        """Give every task in flight the rate of the resources now active, and set its end where that changed."""
        if not self.changed:
            return
        self.changed = False
        now = self.env.now
        rates = self.known.get(self.active) or self._rates()
        for r, rate in enumerate(rates):
            if rate != self.rate[r]:
                self.left_s[r] = max(0.0, self.left_s[r] - (now - self.since_s[r]) * self.rate[r])
                self.since_s[r], self.rate[r] = now, rate
                self.timer[r] = self._after(self.left_s[r] / rate, self.task[r], self._ended)

    def _rates(self) -> list[float]:
        """Rates of the active resources, zero for the others."""
        names = _names(self.active)
        given = self.rates_of(names, _computing(self.active))
        for name in names:
            if not 0.0 < given.get(name, 1.0) < math.inf:
                found = f"{name} runs at a rate of {given[name]} beside {sorted(names)}"
                raise GraphError(f"{found}; expected a finite rate above zero")
        rates = [given.get(name, 1.0) if name in names else 0.0 for name in RESOURCES]
        self.known[self.active] = rates
        return rates


class _Caller:
    """The thread that runs what is not an MLP: how long it waited since it last did, working on no MLP part either.

    Between two such tasks it works where the first one of them ran.
    """

    def __init__(self, graph: TaskGraph, prices: Prices) -> None:
        self.resource, self.duration_s, self.prices = graph.arrays.resource, prices.duration_s, prices
        self.is_rest = [task.kind in REST for task in graph]
        self.at = -1  # resource of the last such task; none ran yet
        self.since_s = 0.0  # its end, and what its resource worked afterwards

    def begin(self, i: int, now_s: float) -> float:
        """Seconds of a task that begins now, alone."""
        alone_s = self.duration_s[i]
        if self.at < 0 or not self.is_rest[i] or self.resource[i] != _GPU:
            return alone_s
        cold_s = cold_after(self.prices.cold, now_s - self.since_s)
        return alone_s + (cold_s if self.at == _GPU else max(cold_s, self.prices.moved_s))

    def end(self, i: int, took_s: float, now_s: float) -> None:
        """A task has ended."""
        if self.is_rest[i]:
            self.at, self.since_s = self.resource[i], now_s
        elif self.resource[i] == self.at:
            self.since_s += took_s


def cold_after(cold: Sequence[tuple[float, float]], waited_s: float) -> float:
    """Seconds that a task takes longer after a wait: 0 after none, linear between known waits, held beyond the last."""
    before_s, before = 0.0, 0.0
    for known_s, known in cold:
        if waited_s < known_s:
            return before + (known - before) * (waited_s - before_s) / (known_s - before_s)
        before_s, before = known_s, known
    return before
