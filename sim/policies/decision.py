"""What a policy decides: a plan, what was searched for it, and the rule that made it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sim.plan import Plan
from sim.policies.problem import Problem
from sim.search import Certificate

Rule = Callable[[Problem], Plan]


@dataclass(frozen=True)
class Decision:
    """A plan for a problem.

    certificate   what became of the candidates; None where the policy did not search
    again         the rule that made the plan, for another machine or budget: of auto, the one that won
    """

    plan: Plan
    certificate: Certificate | None
    again: Rule
