"""auto: the fastest plan in simulation, whoever's rule it follows.

Source: this project. The search space holds the paper's cut, cuts that differ from layer to layer, layers that
    live on the CPU, and every other policy's own plan.
Placement: of every MLP or MoE layer any number of columns or experts, layers alike or one after the other;
    where memory is short, first layers or embedding and head on the CPU.
Bytes over PCIe: as the plan says; sending nothing is a candidate for decode and for prompts.
Compute site: as the plan says.
Dispatch rule: as scheinfer's, or the winning policy's.
Overlap: as scheinfer's, or the winning policy's.
Cache and prefetch: as scheinfer's, or the winning policy's.
Derived by us: everything; no plan of another policy is faster in simulation, since all are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from hwmodels.errors import PlanError
from hwmodels.profile import HardwareProfile
from sim.model import ModelSpec
from sim.plan import Plan
from sim.policies import (
    cpu_only,
    fiddler,
    freetoken,
    gpu_only,
    hybrimoe,
    ktransformers,
    llama_cpp,
    mixtral_offloading,
    stream,
    stream_overlap,
)
from sim.policies.problem import Policy, Problem
from sim.search import search
from sim.space import further_space, paper_space
from sim.workload import Workload

NAME = "auto"

OTHERS: dict[str, Policy] = {
    module.NAME: module.propose
    for module in (
        cpu_only,
        gpu_only,
        stream,
        stream_overlap,
        llama_cpp,
        fiddler,
        ktransformers,
        hybrimoe,
        mixtral_offloading,
        freetoken,
    )
}
"""All policies but scheinfer, whose space the search goes through first, and whose plan it so contains."""


def propose(spec: ModelSpec, profile: HardwareProfile, vram_budget_bytes: int, workload: Workload) -> Plan:
    """The fastest of the search's plans and all other policies' plans; PlanError if the model fits nowhere."""
    problem = Problem(spec, profile, vram_budget_bytes, workload)
    others = [partial(propose, spec, profile, vram_budget_bytes, workload) for propose in OTHERS.values()]
    try:
        best = problem.best([*_searched(problem), *others])
    except PlanError as error:
        if not profile.has_gpu:
            raise
        raise problem.none_fits(NAME) from error
    return replace(best, policy=NAME)


def _searched(problem: Problem) -> list[Callable[[], Plan]]:
    if not problem.profile.has_gpu:
        return []
    try:
        found = search(problem, NAME, [paper_space(problem), further_space(problem)])
    except PlanError:  # nothing fits on the device; another policy may still do without it
        return []
    return [partial(_same, plan) for plan in found.winners]


def _same(plan: Plan) -> Plan:
    return plan
