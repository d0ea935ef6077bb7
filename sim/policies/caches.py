"""What policies with a GPU expert cache share: how large it can be, with whom it begins, who takes a miss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from hwmodels.errors import PlanError
from hwmodels.work import Work, copy
from sim.memory import memory
from sim.model import ModelSpec
from sim.placement import popularity_ranks
from sim.plan import Balance, CacheScope, ExpertCache, LayerPartition, Plan, Tier
from sim.policies.problem import Problem

CacheOf = Callable[[int], ExpertCache]
"""The cache with so many slots per pool."""


def need_experts(problem: Problem, policy: str) -> None:
    """Raise PlanError for a machine without a device and for a dense model: there is nothing to cache."""
    problem.need_gpu(policy)
    if not problem.spec.is_moe:
        raise PlanError(f"{policy} caches experts, {problem.spec.name} has none; use --policy scheinfer or auto")


def on_host(spec: ModelSpec) -> list[LayerPartition]:
    """All experts in host memory, all else on the device."""
    return [
        LayerPartition("GPU", (0,) * la.ffn.n_experts if la.ffn.is_moe else (la.ffn.columns,)) for la in spec.layers
    ]


def largest_cache(problem: Problem, policy: str, tiers: Sequence[Tier], cache_of: CacheOf) -> Plan:
    """Experts in host memory, all else on the device, and the largest cache that fits; PlanError if no slot does."""
    bare = problem.plan(policy, on_host(problem.spec), tiers, pinned=True)
    one, two = (replace(bare, cache=cache_of(n)) for n in (1, 2))
    need, more = memory(problem.spec, one).vram_bytes, memory(problem.spec, two).vram_bytes
    n_slots = 1 + max(0, problem.vram_budget_bytes - need) // (more - need)
    return problem.checked(replace(bare, cache=cache_of(min(n_slots, most_slots(problem, cache_of(1).scope)))))


def most_slots(problem: Problem, scope: CacheScope) -> int:
    """Slots per pool that hold every expert."""
    counts = [la.ffn.n_experts for la in problem.spec.layers if la.ffn.is_moe]
    return max(counts) if scope == "layer" else sum(counts)


def popular(problem: Problem, scope: CacheScope, n_slots: int) -> tuple[tuple[int, int], ...]:
    """(layer, expert) of those that attract most tokens, as many as fit, the least popular first."""
    ranked = sorted(
        (-int(rank), layer, expert)
        for layer, la in enumerate(problem.spec.layers)
        if la.ffn.is_moe
        for expert, rank in enumerate(popularity_ranks(problem.spec, problem.workload, layer))
    )
    if scope == "layer":
        return tuple((layer, expert) for rank, layer, expert in ranked if -rank < n_slots)
    return tuple((layer, expert) for _, layer, expert in ranked[max(0, len(ranked) - n_slots) :])


def prompts(problem: Problem, n_slots: int, fetch_share: float = 0.0) -> Iterator[Tier]:
    """Prompt tiers in which the GPU computes everything: a layer's experts ahead through two slots, or one by one."""
    most = problem.prompt_tokens
    yield problem.tier("prompt", most, overlap=True, ahead=True, n_slots=2)
    routed = problem.tier("prompt", most, overlap=True, stream_min_tokens=1, n_slots=n_slots)
    yield replace(routed, fetch_share=fetch_share)


def expert_times(problem: Problem) -> Balance:
    """Seconds of one expert by this machine's profile, for as many tokens as a decode step sends to one."""
    spec, profile, demand = problem.spec, problem.profile, _expert_work(problem)
    layer = _busiest(spec)
    send = copy(spec.layers[layer].ffn.columns * spec.column_bytes(layer), spec.dtype, pinned=True)
    return Balance(
        gpu_s=profile.time_s("GPU", demand).seconds,
        send_s=profile.time_s("H2D", send).seconds,
        cpu_s=0.0,
        cpu_token_s=profile.time_s("CPU", demand).seconds / demand.n_tokens,
    )


def _busiest(spec: ModelSpec) -> int:
    return max(range(spec.n_layers), key=lambda i: spec.layers[i].ffn.n_experts)


def _expert_work(problem: Problem) -> Work:
    layer = _busiest(problem.spec)
    ffn = problem.spec.layers[layer].ffn
    n_tokens = max(1, round(problem.workload.batch * ffn.top_k / ffn.n_experts))
    return problem.spec.ffn_work(layer, n_tokens, ffn.columns)


def fetch_share(problem: Problem) -> float:
    """Share of misses to send so that CPU and link end together, each as fast as beside the other."""
    times, profile = expert_times(problem), problem.profile
    rates = profile.rates(frozenset({"CPU", "H2D"}), profile.computing({"CPU": _expert_work(problem)}))
    link, cpu = rates["H2D"] / times.send_s, rates["CPU"] / times.cpu_token_s
    return link / (link + cpu)
