"""scheinfer: every MLP cut into CC, CG and GG, computed at once by the CPU, the link and the GPU.

Source: ScheInfer, arXiv 2411.15715 (Euro-Par 2025), of which abstract and contributions are public. This is
    our reconstruction of the CC/CG/GG scheme: the paper's partition algorithm was not available to us.
Placement: attention, KV cache, embedding and head on the device; of every MLP the same share of columns, or of
    every MoE layer the same number of experts (GG), chosen with the slots that CG needs.
Bytes over PCIe: CG columns in every step, activations of the CC part.
Compute site: CC on the CPU, CG and GG on the GPU.
Dispatch rule: token assignment by tier. Decode: a number of CG columns, which may be zero. Prompt: another
    number, or, for experts, the CPU takes those with few tokens and the link those with many.
Overlap: CC, CG and GG of one layer run at the same time; columns that no router decides are sent one layer ahead.
Cache and prefetch: slots on the device, nothing kept.
Derived by us: all of the above sizes, by simulation (sim.search) with the machine's own profile.
"""

from __future__ import annotations

from hwmodels.profile import HardwareProfile
from sim.model import ModelSpec
from sim.plan import Plan
from sim.policies.decision import Decision
from sim.policies.problem import Problem
from sim.search import search
from sim.space import paper_space
from sim.workload import Workload

NAME = "scheinfer"


def propose(spec: ModelSpec, profile: HardwareProfile, vram_budget_bytes: int, workload: Workload) -> Plan:
    """The best sizes of CC, CG and GG in simulation; PlanError if attention and KV cache do not fit."""
    return decide(Problem(spec, profile, vram_budget_bytes, workload)).plan


def decide(problem: Problem) -> Decision:
    """The same, with what was searched."""
    problem.need_gpu(NAME)
    found = search(problem, NAME, [paper_space(problem)])
    return Decision(found.plan, found.certificate, lambda other: decide(other).plan)
