"""Which measured plan is kept, and which plans beside the policies' are worth a run."""

from __future__ import annotations

import pytest

from runtime.choice import Choice, choice, predicted_s
from sim.candidates import DRAWN, candidates, runner_ups
from sim.plan import Plan
from sim.policies.problem import Problem
from sim.workload import Workload
from tests import machines

WORKLOAD = Workload(20, 6)
PROBLEM = Problem(machines.moe(), machines.machine(), machines.budget(machines.moe(), WORKLOAD, 0.5), WORKLOAD)


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return [c.plan for c in candidates(PROBLEM, ["cpu-only", "fiddler", "scheinfer"])]


def test_the_plan_measured_fastest_is_kept(plans: list[Plan]):
    made = Choice(tuple(plans), (1.0, 2.0, 3.0), (11.0, 10.0, 50.0))
    assert (made.kept, made.ranks) == (1, (1, 2, 3))
    assert made.regret(1) == pytest.approx(0.1)  # 11 s trusted where 10 s could be had
    assert made.regret(3) == 0.0
    assert "fiddler, predicted in place 2, was measured fastest" in made.sentence()
    assert "10.0% after running the one predicted best, 0.0% after three" in made.sentence()


def test_a_tie_is_won_by_what_was_predicted_faster(plans: list[Plan]):
    assert Choice(tuple(plans), (3.0, 2.0, 1.0), (5.0, 5.0, 5.0)).kept == 2


def test_a_perfect_prediction_has_no_regret(plans: list[Plan]):
    made = choice(plans, [predicted_s(plan, WORKLOAD) for plan in plans], WORKLOAD)
    assert made.ranks[made.kept] == 1
    assert made.regret(1) == 0.0


def test_the_plans_predicted_best_run_whoever_made_them(plans: list[Plan]):
    found = runner_ups(PROBLEM, plans, n_top=8)
    assert not {plan.id for plan in plans} & {plan.id for plan in found}
    assert all(PROBLEM.fits(plan) for plan in found)
    times = [predicted_s(plan, WORKLOAD) for plan in found]
    assert times == sorted(times)
    assert DRAWN in {plan.policy for plan in found}
    among = [predicted_s(plan, WORKLOAD) <= max(times) for plan in plans]
    assert len(found) + sum(among) >= 8


def test_none_asked_for_is_none_found(plans: list[Plan]):
    assert runner_ups(PROBLEM, plans, n_top=0) == []
