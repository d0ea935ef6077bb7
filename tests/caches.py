"""Expert caches for tests: any cache on top of any plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import strategies as st

from sim.model import ModelSpec
from sim.plan import Balance, CacheScope, ExpertCache, Plan, Tier


def with_cache(plan: Plan, scope: CacheScope, n_slots: int = 2) -> Plan:
    """The plan with a cache that takes every miss; of layers' own ones, a copy of what leaves goes back."""
    own = scope == "layer"
    cache = ExpertCache(scope, "lru", n_slots, (), n_spare=int(own), writeback=own)
    return replace(plan, cache=cache, tiers=tuple(replace(tier, fetch_share=1.0) for tier in plan.tiers))


@st.composite
def cached(draw: st.DrawFn, spec: ModelSpec, plan: Plan) -> Plan:
    """The plan with an expert cache of any size, rule and contents."""
    may = [
        (i, e)
        for i, (part, la) in enumerate(zip(plan.layers, spec.layers, strict=True))
        for e, g in enumerate(part.gg)
        if part.rest == "GPU" and la.ffn.is_moe and g < la.ffn.columns
    ]
    scope, n_slots = draw(st.sampled_from(("layer", "model"))), draw(st.integers(1, 5))
    first, held = [], Counter[int]()
    for layer, expert in draw(st.permutations(may)):
        pool = layer if scope == "layer" else 0
        if held[pool] < n_slots and draw(st.booleans()):
            held[pool] += 1
            first.append((layer, expert))
    writeback, spare = scope == "layer" and draw(st.booleans()), draw(st.integers(0, 2))
    cache = ExpertCache(scope, draw(st.sampled_from(("lru", "score"))), n_slots, tuple(first), spare, writeback)
    return replace(plan, cache=cache, tiers=tuple(draw(fetching(tier)) for tier in plan.tiers))


@st.composite
def fetching(draw: st.DrawFn, tier: Tier) -> Tier:
    """The tier, sending none, some or all misses into the cache where it sends nothing ahead."""
    if any(tier.ahead):
        return tier
    if tier.stream_min_tokens is None and draw(st.booleans()):
        return replace(tier, balance=Balance(*(draw(st.floats(0, 1)) for _ in range(4))))
    return replace(tier, fetch_share=draw(st.sampled_from((0.0, 0.5, 1.0))))
