"""Plans to measure: every policy's, and some drawn from the search's space, over the range of predicted times."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hwmodels.errors import PlanError
from sim.layercost import Sending
from sim.plan import Plan, Tier
from sim.planner import plan as make_plan
from sim.policies import POLICIES
from sim.policies.problem import Problem, total_s
from sim.simulate import forecast
from sim.space import Branch, further_space, paper_space

DRAWN = "drawn"
"""Policy name of plans that no rule made."""
_TRIES = 20


@dataclass(frozen=True)
class Candidate:
    """A plan for a problem, and the seconds of a whole generation that are predicted of it."""

    problem: Problem
    plan: Plan
    predicted_s: float


def candidates(
    problem: Problem, policies: Iterable[str] = tuple(POLICIES), n_drawn: int = 0, seed: int = 0
) -> list[Candidate]:
    """Different plans for one problem with their predictions: first the policies', then n_drawn random ones.

    A policy that does not fit is left out, and so is one whose plan another made before. Raises PlanError if
    nothing fits.
    """
    found: dict[str, Plan] = {}
    reasons = []
    for name in policies:
        try:
            made = make_plan(problem.spec, problem.profile, problem.vram_budget_bytes, problem.workload, name)
        except PlanError as error:
            reasons.append(error)
        else:
            found.setdefault(_decisions(made), made)
    if n_drawn and problem.profile.has_gpu:
        draw = random.Random(f"{seed}/{problem.spec.id}/{problem.vram_budget_bytes}/{problem.workload}")
        for made in _drawn(problem, n_drawn, draw):
            found.setdefault(_decisions(made), made)
    if not found:
        raise reasons[0] if reasons else problem.none_fits(DRAWN)
    return [_candidate(problem, made) for made in found.values()]


def chosen(pool: Sequence[Candidate], n_spread: int, n_top: int) -> list[Candidate]:
    """Every policy's plan, the n_top fastest by prediction, and n_spread drawn ones over the range, in pool order.

    The range is cut into n_spread parts of equal ratio; of each the drawn plan nearest to its middle is taken.
    """
    fastest = {id(c) for c in sorted(pool, key=lambda c: c.predicted_s)[:n_top]}
    kept = {id(c) for c in pool if c.plan.policy != DRAWN} | fastest
    low, high = (math.log(f(c.predicted_s for c in pool)) for f in (min, max))
    for i in range(n_spread):
        middle = low + (high - low) * (i + 0.5) / n_spread
        left = [c for c in pool if id(c) not in kept]
        if left:
            kept.add(id(min(left, key=lambda c: abs(math.log(c.predicted_s) - middle))))
    return [c for c in pool if id(c) in kept]


def runner_ups(problem: Problem, plans: Sequence[Plan], n_top: int, n_drawn: int = 64) -> list[Plan]:
    """Those of the n_top plans predicted fastest that are not among `plans`, fastest first.

    Beside `plans`, which carry predictions, every other policy's plan and n_drawn random ones are predicted.
    """
    if n_top < 1:
        return []
    made = {plan.policy for plan in plans}
    others = candidates(problem, [name for name in POLICIES if name not in made], n_drawn)
    pool = {_decisions(c.plan): c for c in others} | {_decisions(plan): _candidate(problem, plan) for plan in plans}
    known = {_decisions(plan) for plan in plans}
    ranked = sorted(pool, key=lambda key: pool[key].predicted_s)[:n_top]
    return [pool[key].plan for key in ranked if key not in known]


def _decisions(plan: Plan) -> str:
    # The names of the rule and its tiers are part of a plan's id; two rules may decide alike.
    tiers = tuple(replace(tier, name="") for tier in plan.tiers)
    return replace(plan, policy="", tiers=tiers, prediction=None).id


def _candidate(problem: Problem, plan: Plan) -> Candidate:
    prediction = plan.prediction or forecast(problem.spec, plan, problem.profile, problem.workload)
    return Candidate(problem, plan.with_prediction(prediction), total_s(prediction, problem.workload))


def _drawn(problem: Problem, n: int, draw: random.Random) -> list[Plan]:
    """Plans of random level and sending that fit; fewer than n where most draws do not."""
    spaces = [paper_space(problem), further_space(problem)]
    parts = [(space, branch) for space in spaces for branch in space.branches]
    found: list[Plan] = []
    for _ in range(_TRIES * n if parts else 0):
        space, branch = draw.choice(parts)
        plan = _plan(
            problem, branch, draw.choice(branch.levels.tolist()), draw.choice(space.decode), draw.choice(space.prompt)
        )
        if problem.fits(plan):
            found.append(plan)
        if len(found) == n:
            break
    return found


def _plan(problem: Problem, branch: Branch, level: int, decode: Sending, prompt: Sending) -> Plan:
    spec, batch = problem.spec, problem.workload.batch
    tiers: tuple[Tier, ...] = (decode.tier(spec, "decode", batch),)
    if problem.prompt_tokens > batch:
        tiers = (*tiers, prompt.tier(spec, "prompt", problem.prompt_tokens))
    return problem.plan(DRAWN, branch.filling.layers(level), tiers, pinned=True, ends=branch.ends)
