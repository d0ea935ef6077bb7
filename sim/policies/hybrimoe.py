"""hybrimoe: per layer, CPU and GPU take experts from two ends of a queue; a cache keeps those with high scores.

Source: HybriMoE, arXiv 2504.05897 (DAC 2025), PKU-SEC-Lab/HybriMoE at 508a85b, operators/experts.py.
Placement: all but the experts on the device; of each layer's experts as many as fit in a cache on the device.
Bytes over PCIe: in decode the missed experts that the GPU takes; in prompts every expert that is not cached.
Compute site: in decode as dispatched, in prompts the GPU (the released code never chooses its CPU branch there).
Dispatch rule: cached experts with most tokens first, then the others with most tokens first; the GPU takes from the
    front, the CPU from the back, whoever would finish the next one earlier, by simulated clocks for GPU, CPU and
    link (sim.caching.balanced).
Overlap: the CPU's experts run beside the GPU's; an expert is computed as soon as it has arrived.
Cache and prefetch: per layer, score = half the old score and half the new, the lowest leaves. In prompts the next
    layer's experts are sent while this one computes.
Derived by us: the clocks run on this machine's profile, not on the source's constants for one machine. The score
    is the share of a step's tokens, since only counts are known here, for the router's weights. Prefetching single
    experts of the next layer in decode is left out: it asks the same scores that already decided what stays.
    Where two layer buffers do not fit, prompts send expert by expert through two slots.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from hwmodels.profile import HardwareProfile
from sim.model import ModelSpec
from sim.plan import ExpertCache, Plan
from sim.policies.caches import expert_times, largest_cache, need_experts, popular, prompts
from sim.policies.problem import Problem
from sim.workload import Workload

NAME = "hybrimoe"


def propose(spec: ModelSpec, profile: HardwareProfile, vram_budget_bytes: int, workload: Workload) -> Plan:
    """The largest cache, and the better way of prompts; PlanError for dense models and where no slot fits."""
    problem = Problem(spec, profile, vram_budget_bytes, workload)
    need_experts(problem, NAME)
    nothing = problem.tier("decode", workload.batch, overlap=True)
    decode = replace(nothing, balance=expert_times(problem))
    return problem.best(
        partial(largest_cache, problem, NAME, (decode, prompt), partial(_cache, problem))
        for prompt in prompts(problem, n_slots=2)
    )


def _cache(problem: Problem, n_slots: int) -> ExpertCache:
    return ExpertCache("layer", "score", n_slots, popular(problem, "layer", n_slots))
