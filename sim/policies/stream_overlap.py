"""stream-overlap: weights that do not fit pass through two device slots, one layer ahead of their use.

Source: FlexGen (arXiv 2303.06865, flex_opt.py), DeepSpeed ZeRO-Inference (partitioned_param_coordinator.py)
    and vLLM's prefetch offloader (offloader/prefetch.py), which share this scheme.
Placement: a share of every layer's MLP on the device (FlexGen's percentages), or whole layers spread over
    the model (vLLM's offload groups) or in model order, whichever is fastest in simulation.
Bytes over PCIe: every MLP column in host memory, all experts, in every step.
Compute site: GPU, always.
Dispatch rule: none.
Overlap: pinned host memory, a copy queue of its own; the next layer is copied while this one computes.
Cache and prefetch: two slots, static order.
Derived by us: FlexGen places whole tensors by percentage, we cut by column: never worse for it.
    FlexGen's batching of many prompts over one weight load is the workload's batch.
"""

from __future__ import annotations

from functools import partial

from hwmodels.profile import HardwareProfile
from sim.model import ModelSpec
from sim.placement import Filling, Order, Unit
from sim.plan import Plan
from sim.policies.problem import Problem
from sim.workload import Workload

NAME = "stream-overlap"

_SETTINGS: tuple[tuple[Unit, Order], ...] = (("columns", "even"), ("layers", "spread"), ("layers", "first"))


def propose(spec: ModelSpec, profile: HardwareProfile, vram_budget_bytes: int, workload: Workload) -> Plan:
    """The best of its placements; PlanError if the two slots do not fit."""
    problem = Problem(spec, profile, vram_budget_bytes, workload)
    problem.need_gpu(NAME)
    tiers = problem.both(problem.tier("", 1, overlap=True, ahead=True, n_slots=2))

    make = partial(problem.plan, NAME, tiers=tiers, pinned=True)
    return problem.best(
        partial(problem.fullest, Filling(spec, workload, unit, order), make) for unit, order in _SETTINGS
    )
