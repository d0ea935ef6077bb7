"""stream: what does not fit is copied to the GPU whenever it is needed, and nothing overlaps.

Source: accelerate 1.15 with a Hugging Face device_map (hooks.py, big_modeling.py).
Placement: whole modules, greedily in model order until the budget is full; the rest in host memory.
Bytes over PCIe: every layer's MLP in host memory, all experts of it, in every step.
Compute site: GPU, always.
Dispatch rule: none; "cpu" in a device_map means storage.
Overlap: none: no stream, no pinned memory, synchronous copies before each module's forward.
Cache and prefetch: none; a module's copy is dropped after its forward.
Derived by us: attention, norms, embedding and head stay on the device, where accelerate would stream them
    too once the budget is used up: this model errs in its favour. It gets the whole budget, not 90 % of it.
"""

from __future__ import annotations

from functools import partial

from hwmodels.profile import HardwareProfile
from sim.model import ModelSpec
from sim.placement import Filling
from sim.plan import Plan
from sim.policies.problem import Problem
from sim.workload import Workload

NAME = "stream"


def propose(spec: ModelSpec, profile: HardwareProfile, vram_budget_bytes: int, workload: Workload) -> Plan:
    """The first layers resident, the others' MLPs copied in every step; PlanError if one slot does not fit."""
    problem = Problem(spec, profile, vram_budget_bytes, workload)
    problem.need_gpu(NAME)
    tiers = problem.both(problem.tier("", 1, overlap=False, ahead=True, n_slots=1))
    filling = Filling(spec, workload, "layers", "first")
    return problem.fullest(filling, partial(problem.plan, NAME, tiers=tiers, pinned=False))
