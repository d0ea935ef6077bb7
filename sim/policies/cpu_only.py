"""cpu-only: everything in host memory, everything computed by the CPU.

Source: the device-less case of any engine; the reference point below which a GPU does not help.
Placement: all weights, KV cache, embedding and head in host memory.
Bytes over PCIe: none.
Compute site: CPU.
Dispatch rule: none.
Overlap: none; one resource.
Cache and prefetch: none.
Derived by us: nothing.
"""

from __future__ import annotations

from hwmodels.profile import HardwareProfile
from sim.model import ModelSpec
from sim.plan import LayerPartition, Plan
from sim.policies.problem import Problem
from sim.workload import Workload

NAME = "cpu-only"


def propose(spec: ModelSpec, profile: HardwareProfile, vram_budget_bytes: int, workload: Workload) -> Plan:
    """Everything on the CPU; PlanError if host memory is too small."""
    problem = Problem(spec, profile, vram_budget_bytes, workload)
    layers = [LayerPartition("CPU", (0,) * la.ffn.n_experts) for la in spec.layers]
    tiers = problem.both(problem.tier("", 1, overlap=False))
    return problem.checked(problem.plan(NAME, layers, tiers, pinned=False, ends="CPU"))
