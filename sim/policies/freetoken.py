"""freetoken: a global cache of experts; misses are shared between link and CPU so that both end together.

Source: FreeToken, arXiv 2608.16157, FlashML-org/FreeToken at 0ab982f (code and documents).
Placement: all but the experts on the device; all experts in page-locked host memory, as many of them as fit also
    in slots on the device.
Bytes over PCIe: in decode the misses that are fetched, in prompts a layer's experts that are not in the cache.
Compute site: cached and fetched experts on the GPU; in decode the other misses on the CPU.
Dispatch rule: of m misses q = m * link / (link + CPU) are fetched, by the rates of both while they run together,
    rounded to whole experts; those used most recently first. Or all (its offload back end), or none (cpu).
Overlap: link, CPU and GPU work side by side; results are summed.
Cache and prefetch: one LRU over all layers, kept from step to step; in prompts the next layer's experts are sent
    while this one computes, through two layer buffers.
Derived by us: the back end is the best in simulation, not by its rule of thumb (hybrid if the CPU is more than
    twice as fast as the link), which is known to fail. Where two layer buffers do not fit, prompts send expert by
    expert through four slots. Experts in the cache need no copy on the device. Launch costs are the profile's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from hwmodels.profile import HardwareProfile
from sim.model import ModelSpec
from sim.plan import ExpertCache, Plan, Tier
from sim.policies.caches import fetch_share, largest_cache, need_experts, popular, prompts
from sim.policies.problem import Problem
from sim.workload import Workload

NAME = "freetoken"


def propose(spec: ModelSpec, profile: HardwareProfile, vram_budget_bytes: int, workload: Workload) -> Plan:
    """The best of its back ends; PlanError for dense models and where no slot fits."""
    problem = Problem(spec, profile, vram_budget_bytes, workload)
    need_experts(problem, NAME)
    make = partial(largest_cache, problem, NAME, cache_of=partial(_cache, problem))
    first, *others = _decodes(problem)
    plan = problem.best(partial(make, (first, prompt)) for prompt in prompts(problem, n_slots=4))
    # How prompts are sent does not depend on what decode does: the better way is kept.
    return problem.best([partial(_same, plan), *(partial(make, (decode, plan.tiers[-1])) for decode in others)])


def _decodes(problem: Problem) -> Iterator[Tier]:
    nothing = problem.tier("decode", problem.workload.batch, overlap=True)
    for share in sorted({0.0, fetch_share(problem), 1.0}):
        yield replace(nothing, fetch_share=share)


def _same(plan: Plan) -> Plan:
    return plan


def _cache(problem: Problem, n_slots: int) -> ExpertCache:
    return ExpertCache("model", "lru", n_slots, popular(problem, "model", n_slots))
