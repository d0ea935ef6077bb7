"""Policies: named rules that turn a model, a machine, a budget and a workload into a plan.

One file per policy; its docstring says where the rule comes from and how it is modelled.
"""

from __future__ import annotations

from collections.abc import Iterable

from hwmodels.errors import PlanError
from sim.policies import auto, scheinfer
from sim.policies.problem import Policy

POLICIES: dict[str, Policy] = {**auto.OTHERS, scheinfer.NAME: scheinfer.propose, auto.NAME: auto.propose}


def policy(name: str) -> Policy:
    """A policy by name; PlanError lists the known names."""
    try:
        return POLICIES[name]
    except KeyError:
        raise PlanError(f"no policy {name!r}; known: {', '.join(sorted(POLICIES))}") from None


def known_policies(names: Iterable[str]) -> tuple[str, ...]:
    """Names of policies, `all` for every one; PlanError for an unknown one."""
    listed = tuple(names)
    if "all" in listed:
        return tuple(POLICIES)
    for name in listed:
        policy(name)
    return listed
