"""ktransformers: experts on the CPU in decode, beside some on the GPU; long prompts go through the GPU.

Source: KTransformers (SOSP 2025), kvcache-ai/ktransformers at 95009ea: doc/en/kt-kernel/experts-sched-Tutorial.md,
    Native-Precision-Tutorial.md.
Placement: attention, shared experts, router and KV cache on the device; in every layer the most popular
    experts that fit (--kt-num-gpu-experts, by frequency), the others in host memory.
Bytes over PCIe: in decode activations; in a long prompt a layer's host experts (layerwise prefill).
Compute site: host experts on the CPU in decode, on the GPU in a long prompt.
Dispatch rule: --kt-gpu-prefill-token-threshold: a step with at least so many tokens is layerwise.
Overlap: the CPU's experts run while the GPU computes its own.
Cache and prefetch: no expert cache; layerwise prefill with two layer buffers, or one after the other with one
    or without, whichever is fastest in simulation.
Derived by us: the threshold falls between decode and prompt steps or is never reached. Expert deferral is
    left out, since it changes the model's function; NUMA placement and kernels belong to the profile.
    A dense MLP counts as one expert.
"""

from __future__ import annotations

from functools import partial

from hwmodels.profile import HardwareProfile
from sim.model import ModelSpec
from sim.placement import Filling
from sim.plan import Plan
from sim.policies.problem import Problem
from sim.workload import Workload

NAME = "ktransformers"


def propose(spec: ModelSpec, profile: HardwareProfile, vram_budget_bytes: int, workload: Workload) -> Plan:
    """The best of hybrid and layerwise prefill; PlanError if attention does not fit on the device."""
    problem = Problem(spec, profile, vram_budget_bytes, workload)
    problem.need_gpu(NAME)
    filling = Filling(spec, workload, "experts", "even")
    most = problem.prompt_tokens
    decode = problem.tier("decode", workload.batch, overlap=True)
    prompts = (
        problem.tier("prompt", most, overlap=True),
        problem.tier("prompt", most, overlap=True, ahead=True, n_slots=2),
        problem.tier("prompt", most, overlap=False, ahead=True, n_slots=1),
    )

    return problem.best(
        partial(problem.fullest, filling, partial(problem.plan, NAME, tiers=(decode, prompt), pinned=True))
        for prompt in prompts
    )
