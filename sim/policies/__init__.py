"""Policies: named rules that turn a model, a machine, a budget and a workload into a plan.

One file per policy; its docstring says where the rule comes from and how it is modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hwmodels.errors import PlanError
from sim.plan import Plan
from sim.policies import auto, scheinfer
from sim.policies.decision import Decision
from sim.policies.problem import Policy, Problem

Decider = Callable[[Problem], Decision]

DECIDERS: dict[str, Decider] = {scheinfer.NAME: scheinfer.decide, auto.NAME: auto.decide}
"""The policies that search, and so can say what they searched."""

POLICIES: dict[str, Policy] = {**auto.OTHERS, scheinfer.NAME: scheinfer.propose, auto.NAME: auto.propose}


def policy(name: str) -> Policy:
    """A policy by name; PlanError lists the known names."""
    try:
        return POLICIES[name]
    except KeyError:
        raise PlanError(f"no policy {name!r}; known: {', '.join(sorted(POLICIES))}") from None


def decide(name: str, problem: Problem) -> Decision:
    """What a policy decides; PlanError for an unknown one, and if nothing fits."""
    if name in DECIDERS:
        return DECIDERS[name](problem)

    def again(other: Problem) -> Plan:
        return policy(name)(other.spec, other.profile, other.vram_budget_bytes, other.workload)

    return Decision(again(problem), None, again)


def known_policies(names: Iterable[str]) -> tuple[str, ...]:
    """Names of policies, `all` for every one; PlanError for an unknown one."""
    listed = tuple(names)
    if "all" in listed:
        return tuple(POLICIES)
    for name in listed:
        policy(name)
    return listed
