"""mixtral-offloading: the GPU computes all experts; each layer keeps those used last, misses are swapped in.

Source: arXiv 2312.17238, dvmazur/mixtral-offloading at ce54518, expert_cache.py. The paper's speculative
    loading of the next layer's experts is not in that code.
Placement: all but the experts on the device; of each layer's experts k on the device, the others in page-locked
    host memory.
Bytes over PCIe: a missed expert to the device and the one that it replaces back, at once on both directions.
Compute site: GPU, always.
Dispatch rule: experts in the cache first, then the missed ones as they arrive.
Overlap: with b spare buffers the next misses are sent while an expert computes.
Cache and prefetch: least recently used, per layer, the same k for each.
Derived by us: k is what fits, b the better of 1 and 4 in simulation. Misses of a step that find all k slots in
    use pass through as many buffers without being kept, and host memory holds all experts: both spare it copies
    back that the source makes. Its 2 to 4 bit weights change the model's function; here they keep the model's dtype.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from hwmodels.profile import HardwareProfile
from sim.model import ModelSpec
from sim.plan import ExpertCache, Plan, Tier
from sim.policies.caches import largest_cache, need_experts, popular
from sim.policies.problem import Problem
from sim.workload import Workload

NAME = "mixtral-offloading"


def propose(spec: ModelSpec, profile: HardwareProfile, vram_budget_bytes: int, workload: Workload) -> Plan:
    """The best number of spare buffers; PlanError for dense models and where no slot fits."""
    problem = Problem(spec, profile, vram_budget_bytes, workload)
    need_experts(problem, NAME)
    return problem.best(
        partial(largest_cache, problem, NAME, _tiers(problem, n_spare), partial(_cache, problem, n_spare))
        for n_spare in (1, 4)
    )


def _tiers(problem: Problem, n_spare: int) -> tuple[Tier, ...]:
    passing = problem.tier("", 1, overlap=True, stream_min_tokens=1, n_slots=n_spare)
    return problem.both(replace(passing, fetch_share=1.0))


def _cache(problem: Problem, n_spare: int, n_slots: int) -> ExpertCache:
    return ExpertCache("layer", "lru", n_slots, popular(problem, "layer", n_slots), n_spare, writeback=True)
