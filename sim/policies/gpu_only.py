"""gpu-only: everything in device memory, everything computed by the GPU.

Source: the plain case of any engine; the reference point that offloading tries to come near.
Placement: all weights, KV cache, embedding and head on the device.
Bytes over PCIe: none but tokens.
Compute site: GPU.
Dispatch rule: none.
Overlap: none needed; one resource.
Cache and prefetch: none.
Derived by us: nothing.
"""

from __future__ import annotations

from hwmodels.errors import PlanError
from hwmodels.profile import HardwareProfile
from hwmodels.units import format_bytes
from sim.memory import memory
from sim.model import ModelSpec
from sim.plan import LayerPartition, Plan
from sim.policies.problem import Problem
from sim.workload import Workload

NAME = "gpu-only"


def propose(spec: ModelSpec, profile: HardwareProfile, vram_budget_bytes: int, workload: Workload) -> Plan:
    """Everything on the device; PlanError says how many bytes are missing."""
    problem = Problem(spec, profile, vram_budget_bytes, workload)
    problem.need_gpu(NAME)
    layers = [LayerPartition("GPU", (la.ffn.columns,) * la.ffn.n_experts) for la in spec.layers]
    plan = problem.plan(NAME, layers, problem.both(problem.tier("", 1, overlap=True)), pinned=False)
    need = memory(spec, plan).vram_bytes
    if need > vram_budget_bytes:
        raise PlanError(
            f"gpu-only needs {format_bytes(need)} of device memory, the budget is {format_bytes(vram_budget_bytes)}: "
            f"{format_bytes(need - vram_budget_bytes)} are missing; raise --vram-budget or choose another policy"
        )
    return problem.checked(plan)
