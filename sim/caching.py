"""What lies in the device's expert cache: one rule, advanced layer by layer by simulator and runtime alike.

A cached expert's host part lies in a slot on the device and is computed there, as if it were resident; its
copy in host memory stays. Which misses are sent into the cache is the tier's decision, which expert leaves
for one is the cache's rule. An expert that the layer at hand uses never leaves it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from sim.graph import Part
from sim.memory import cache_slots
from sim.model import ModelSpec
from sim.plan import Balance, ExpertCache, Plan, Tier, caches_layer
from sim.workload import Routing, RoutingOf, Step

Key = tuple[int, int]
"""Layer and expert."""

_SCORE_KEPT = 0.5


@dataclass(frozen=True, slots=True)
class Fetch:
    """A miss that is sent into a slot; evicted is what lay there, if it has to be copied back first."""

    part: Part
    evicted: Part | None


@dataclass(frozen=True, slots=True)
class Use:
    """What the cache takes off a layer's dispatch: parts computed where they lie, and parts sent into it.

    experts are all whose host part the device has or gets: nothing else is to be done about it.
    """

    hits: tuple[Part, ...] = ()
    fetched: tuple[Fetch, ...] = ()
    experts: frozenset[int] = frozenset()


NO_USE = Use()
NO_ROOM = Part(-1, 0, 0, 0)


@dataclass
class CacheState:
    """Contents of an expert cache. Pools map experts to slots, the first to leave first; kept has them by layer."""

    cache: ExpertCache
    free: deque[int]
    pools: dict[int, dict[Key, int]]
    kept: dict[int, set[int]] = field(default_factory=dict)
    last_use: dict[Key, int] = field(default_factory=dict)
    scores: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    now: int = 0
    n_hits: int = 0
    n_uses: int = 0

    @staticmethod
    def of(spec: ModelSpec, plan: Plan, contents: Iterable[Key] | None = None) -> CacheState:
        """The cache of a plan with these contents, the first to leave first; by default those that it begins with."""
        assert plan.cache is not None, "the plan has a cache"
        state = CacheState(plan.cache, deque(range(cache_slots(spec, plan))), {})
        for layer, expert in plan.cache.first if contents is None else contents:
            state._put(layer, expert)
        return state

    @property
    def contents(self) -> tuple[Key, ...]:
        """Experts in the cache; within a pool the first to leave first."""
        return tuple(key for pool in self.pools.values() for key in pool)

    @property
    def hit_rate(self) -> float:
        """Share of uses of experts, other than wholly resident ones, that found them in the cache; 0 without uses."""
        return self.n_hits / self.n_uses if self.n_uses else 0.0

    def copy(self) -> CacheState:
        """The same contents, to be advanced on their own."""
        return replace(
            self,
            free=deque(self.free),
            pools={name: dict(pool) for name, pool in self.pools.items()},
            kept={layer: set(experts) for layer, experts in self.kept.items()},
            last_use=dict(self.last_use),
            scores={layer: scores.copy() for layer, scores in self.scores.items()},
        )

    def clear(self) -> None:
        """Forget everything: what the slots hold is not known any more."""
        for pool in self.pools.values():
            self.free.extend(pool.values())
            pool.clear()
        self.kept.clear()

    def slot(self, layer: int, expert: int) -> int | None:
        """The slot that holds an expert, None if it is not in the cache."""
        return self._pool(layer).get((layer, expert))

    def use(self, layer: int, tier: Tier, gg: Sequence[int], columns: int, routing: Routing) -> Use:
        """Advance by one layer of one step: who is computed in the cache, and who is sent into it."""
        self.now += 1
        pool, held = self._pool(layer), self.kept.get(layer, set())
        used = [e for e, n in enumerate(routing) if n and gg[e] < columns]
        cached = [e for e in used if e in held]
        misses = [e for e in used if e not in held]
        self.n_uses, self.n_hits = self.n_uses + len(used), self.n_hits + len(cached)
        hits, wanted = self._choose(layer, tier, routing, cached, misses)
        for expert in cached:
            pool[layer, expert] = pool.pop((layer, expert))
        fetched: list[Fetch] = []
        for expert in wanted:
            evicted = self._make_room(layer, used, gg, columns)
            if evicted is NO_ROOM:
                break
            part = Part(expert, gg[expert], columns, routing[expert], self._put(layer, expert))
            fetched.append(Fetch(part, evicted))
        self._remember(layer, routing, used)
        parts = tuple(Part(e, gg[e], columns, routing[e], pool[layer, e]) for e in hits)
        on_host = set(cached).difference(hits)
        return Use(parts, tuple(fetched), frozenset(self.kept.get(layer, ())).difference(on_host))

    # -- inside ---------------------------------------------------------------------------------------

    def _pool(self, layer: int) -> dict[Key, int]:
        return self.pools.setdefault(layer if self.cache.scope == "layer" else 0, {})

    def _choose(
        self, layer: int, tier: Tier, routing: Routing, cached: list[int], misses: list[int]
    ) -> tuple[list[int], list[int]]:
        """Cached experts that the device computes, and misses to send, in order."""
        if tier.balance is not None:
            return balanced(tier.balance, routing, cached, misses)
        n_fetched = int(len(misses) * tier.fetch_share + 0.5)
        recent = sorted(misses, key=lambda e: -self.last_use.get((layer, e), 0))
        return cached, recent[:n_fetched]

    def _put(self, layer: int, expert: int) -> int:
        slot = self.free.popleft()
        self._pool(layer)[layer, expert] = slot
        self.kept.setdefault(layer, set()).add(expert)
        return slot

    def _make_room(self, layer: int, used: Sequence[int], gg: Sequence[int], columns: int) -> Part | None:
        """Let an expert leave if the pool is full: what is to be copied back, NO_ROOM if all are in use."""
        pool = self._pool(layer)
        if len(pool) < self.cache.n_slots:
            return None
        victim = self._victim(layer, pool, used)
        if victim is None:
            return NO_ROOM
        slot = pool.pop(victim)
        self.kept[victim[0]].remove(victim[1])
        self.free.append(slot)
        # only a layer's own cache copies back, so that the expert is one of this layer
        return Part(victim[1], gg[victim[1]], columns, 0, slot) if self.cache.writeback else None

    def _victim(self, layer: int, pool: dict[Key, int], used: Sequence[int]) -> Key | None:
        may_leave = (key for key in pool if key[0] != layer or key[1] not in used)
        if self.cache.rule == "lru":
            return next(may_leave, None)
        return min(may_leave, key=self._score, default=None)

    def _score(self, key: Key) -> float:
        layer, expert = key
        return float(self.scores[layer][expert]) if layer in self.scores else 0.0

    def _remember(self, layer: int, routing: Routing, used: Sequence[int]) -> None:
        if self.cache.rule == "score":
            shares = np.array(routing) / sum(routing)
            self.scores[layer] = _SCORE_KEPT * self.scores.get(layer, 0.0) + (1 - _SCORE_KEPT) * shares
            return
        for expert in used:
            self.last_use[layer, expert] = self.now


def balanced(
    times: Balance, routing: Routing, cached: Sequence[int], misses: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Split a layer's experts by two clocks: the GPU takes from the front of the queue, the CPU from its back.

    The queue holds cached experts, then misses, each with most tokens first; whoever would finish the next
    one earlier takes it. Returns what the GPU takes: cached experts, and misses to send.
    """
    by_tokens = [sorted(group, key=lambda e: -routing[e]) for group in (cached, misses)]
    queue = deque([*by_tokens[0], *by_tokens[1]])
    gpu_s = link_s = cpu_s = 0.0
    taken: list[int] = []
    here = set(cached)
    while queue:
        arrives_s = 0.0 if queue[0] in here else link_s + times.send_s
        gpu_end_s = max(gpu_s, arrives_s) + times.gpu_s
        cpu_end_s = cpu_s + (0.0 if cpu_s else times.cpu_s) + times.cpu_token_s * routing[queue[-1]]
        if gpu_end_s <= cpu_end_s:
            gpu_s, link_s = gpu_end_s, max(link_s, arrives_s)
            taken.append(queue.popleft())
        else:
            cpu_s = cpu_end_s
            queue.pop()
    return [e for e in taken if e in here], [e for e in taken if e not in here]


class CacheWalk:
    """An expert cache through the steps of a workload, in order; nothing for plans without one."""

    def __init__(
        self,
        spec: ModelSpec,
        plan: Plan,
        steps: Sequence[Step],
        routing: RoutingOf,
        contents: Iterable[Key] | None = None,
    ) -> None:
        self._spec, self._plan, self._steps, self._routing = spec, plan, steps, routing
        self._state = CacheState.of(spec, plan, contents) if plan.cache is not None else None
        self._at = {step.name: i for i, step in enumerate(steps)}
        self._next = 0

    def before(self, step: Step) -> CacheState | None:
        """The cache as a step finds it; whoever asks advances it by that step. Steps are asked for in order."""
        if self._state is None:
            return None
        at = self._at[step.name]
        assert at >= self._next, "a cache does not run backwards"
        for skipped in self._steps[self._next : at]:
            self._advance(self._state, skipped)
        self._next = at + 1
        return self._state

    def info(self) -> dict[str, object]:
        """Share of uses of experts that found them in the cache, of the steps so far."""
        return {} if self._state is None else {"cache_hit_rate": self._state.hit_rate}

    def _advance(self, state: CacheState, step: Step) -> None:
        tier = self._plan.tier(step.n_tokens)
        for layer, part in enumerate(self._plan.layers):
            if caches_layer(self._plan, self._spec, layer):
                columns = self._spec.layers[layer].ffn.columns
                state.use(layer, tier, part.gg, columns, self._routing(step, layer))
