"""Which of the measured plans is kept, and what trusting the prediction alone would have cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hwmodels.units import format_seconds
from sim.fidelity import regret
from sim.plan import Plan
from sim.policies.problem import total_s
from sim.workload import Workload


@dataclass(frozen=True)
class Choice:
    """Plans that were run, by seconds of a generation, as predicted before and as measured.

    predicted_s, measured_s   by plan, in the order in which the plans ran
    """

    plans: tuple[Plan, ...]
    predicted_s: tuple[float, ...]
    measured_s: tuple[float, ...]

    @property
    def kept(self) -> int:
        """Number of the plan that was measured fastest; of equals the one that was predicted faster."""
        return min(range(len(self.plans)), key=lambda i: (self.measured_s[i], self.predicted_s[i]))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Place of every plan in the predicted order, from 1."""
        order = sorted(range(len(self.plans)), key=lambda i: self.predicted_s[i])
        return tuple(order.index(i) + 1 for i in range(len(self.plans)))

    def regret(self, n_tried: int) -> float:
        """Time of the measured best of the n_tried plans predicted fastest, over the measured best of all, minus 1."""
        return regret(self.predicted_s, self.measured_s, n_tried)

    def sentence(self) -> str:
        """What was kept, and the regrets of one and of three plans tried."""
        first, kept = self.plans[self.ranks.index(1)], self.plans[self.kept]
        said = f"{first.policy} was predicted fastest of {len(self.plans)} plans"
        if kept is not first:
            said += f"; {kept.policy}, predicted in place {self.ranks[self.kept]}, was measured fastest"
        said += f" and is kept: {format_seconds(self.measured_s[self.kept])} a generation"
        regrets = f"{self.regret(1):.1%} after running the one predicted best, {self.regret(3):.1%} after three"
        return f"{said}. Regret, against the fastest of all that ran: {regrets}."


def predicted_s(plan: Plan, workload: Workload) -> float:
    """Seconds of a generation by the prediction that a plan carries."""
    assert plan.prediction is not None, "the planner predicts"
    return total_s(plan.prediction, workload)


def choice(plans: Sequence[Plan], measured_s: Sequence[float], workload: Workload) -> Choice:
    """The choice among plans that ran, each with its seconds of a generation."""
    return Choice(tuple(plans), tuple(predicted_s(plan, workload) for plan in plans), tuple(measured_s))
