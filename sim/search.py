"""Search: the plan with the shortest generation among very many, without simulating all of them.

1.  Every candidate's time without contention is computed exactly, thousands at once (sim.steptime): steps of
    decode and of the prompt share the placement only, so their times are added, not searched together.
2.  Contention only stretches tasks, and every queue keeps its order, so that no end comes earlier: the time
    without contention is a lower bound of the time with it.
3.  Candidates are simulated by the reference engine, the most promising first, until `most_simulated`; those
    whose bound is not below the best simulated time are pruned. `n_left` counts the rest: at zero the plan is
    proven the best of the space.

Large spaces are searched in steps first and finely around the best afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hwmodels.errors import PlanError
from sim.compile import compile_step
from sim.cost import price
from sim.engine import schedule
from sim.layercost import Prices, Seconds, Sending, Slowdown, slowdown
from sim.plan import Plan, Tier
from sim.policies.problem import Problem
from sim.simulate import representative, routing_of
from sim.space import Branch, Space, around, coarse, finer, slot_bytes
from sim.steptime import StepTimes
from sim.workload import Step, Workload

MOST_SIMULATED = 12
_KEPT_PER_BRANCH, _REFINED = 64, 3
_EQUAL = 1 - 1e-9  # times that differ by less differ by rounding


@dataclass(frozen=True)
class Found:
    """The best plan of a search, its seconds by the reference engine, and what happened to all candidates."""

    plan: Plan
    total_s: float
    n_candidates: int
    n_pruned: int
    n_simulated: int
    n_left: int


@dataclass(frozen=True)
class _Candidate:
    branch: Branch
    level: int
    decode: Sending
    prompt: Sending
    bound_s: float
    estimate_s: float


@dataclass(frozen=True)
class _Times:
    """Seconds of a whole generation, [level, decode, prompt]; infinite where memory does not suffice."""

    bound_s: Seconds
    estimate_s: Seconds


def search(
    problem: Problem, policy: str, space: Space, contention: bool = True, most_simulated: int = MOST_SIMULATED
) -> Found:
    """The best plan of a space. Raises PlanError if none fits."""
    pricer = _Pricer(problem, slowdown(problem.profile) if contention else None)
    blocks: list[Seconds] = []
    best: list[_Candidate] = []
    for part in space.branches:
        _consider(pricer, coarse(problem, space, part), space.decode, space.prompt, blocks, best)
    if not best:
        raise PlanError(f"{policy}: no placement fits into the budget beside what it needs on the device")
    if any(len(coarse(problem, space, part).levels) < len(part.levels) for part in space.branches):
        for near in _best_branches(best):
            part = next(b for b in space.branches if b.filling is near.branch.filling)
            fine = around(part, near.level)
            _consider(pricer, fine, finer(problem, near.decode), finer(problem, near.prompt), blocks, best)
    return _simulate(problem, policy, sorted(best, key=lambda c: c.estimate_s), blocks, contention, most_simulated)


def _best_branches(best: list[_Candidate]) -> list[_Candidate]:
    """The best candidate of each of the best branches."""
    found: dict[int, _Candidate] = {}
    for candidate in sorted(best, key=lambda c: c.estimate_s):
        found.setdefault(id(candidate.branch.filling), candidate)
    return list(found.values())[:_REFINED]


def _consider(
    pricer: _Pricer,
    part: Branch,
    decode: tuple[Sending, ...],
    prompt: tuple[Sending, ...],
    blocks: list[Seconds],
    best: list[_Candidate],
) -> None:
    """Time all candidates of a branch; append their bounds to `blocks` and the most promising to `best`."""
    times = pricer.times(part, decode, prompt)
    blocks.append(times.bound_s[np.isfinite(times.bound_s)])
    flat = times.estimate_s.ravel()
    chosen = np.argsort(flat, kind="stable")[:_KEPT_PER_BRANCH]
    for k in chosen[np.isfinite(flat[chosen])]:
        level, d, p = np.unravel_index(k, times.estimate_s.shape)
        bound_s = float(times.bound_s[level, d, p])
        best.append(
            _Candidate(
                part, int(part.levels[level]), decode[d], prompt[p], bound_s, float(times.estimate_s[level, d, p])
            )
        )


def _simulate(
    problem: Problem,
    policy: str,
    ranked: list[_Candidate],
    blocks: list[Seconds],
    contention: bool,
    most_simulated: int,
) -> Found:
    reference = _Reference(problem, contention)
    best: tuple[float, Plan] | None = None
    seen: set[str] = set()
    for candidate in ranked:
        if best is not None and candidate.bound_s >= best[0] * _EQUAL:
            continue
        plan = _plan(problem, policy, candidate)
        if plan.id in seen:
            continue
        if len(seen) == most_simulated:
            break
        seen.add(plan.id)
        seconds = reference.total_s(plan)
        if best is None or seconds < best[0] * _EQUAL:
            best = seconds, plan
    assert best is not None
    bounds = np.concatenate(blocks)
    n_below = int((bounds < best[0] * _EQUAL).sum())
    n_left = max(0, n_below - len(seen))
    return Found(problem.checked(best[1]), best[0], len(bounds), len(bounds) - n_left - len(seen), len(seen), n_left)


class _Reference:
    """A generation's seconds by the reference engine, over the same steps that candidates are timed by."""

    def __init__(self, problem: Problem, contention: bool) -> None:
        self.problem = problem
        self.steps = _counted_steps(problem.workload)
        self.where = routing_of(problem.spec, problem.workload)
        self.rates = problem.profile.rates if contention else None
        self.known: dict[object, float] = {}

    def total_s(self, plan: Plan) -> float:
        """Seconds of prefill and all decode steps."""
        return sum(count * self._wall_s(plan, step) for count, step in self.steps)

    def _wall_s(self, plan: Plan, step: Step) -> float:
        key = (plan.layers, plan.ends, plan.tier(step.n_tokens), step)
        if key not in self.known:
            tasks = compile_step(self.problem.spec, plan, step, self.where)
            self.known[key] = max(schedule(tasks, price(tasks, self.problem.profile), self.rates)[1])
        return self.known[key]


def _plan(problem: Problem, policy: str, candidate: _Candidate) -> Plan:
    workload, spec = problem.workload, problem.spec
    tiers: tuple[Tier, ...] = (candidate.decode.tier(spec, "decode", workload.batch),)
    if problem.prompt_tokens > workload.batch:
        tiers = (*tiers, candidate.prompt.tier(spec, "prompt", problem.prompt_tokens))
    layers = candidate.branch.filling.layers(candidate.level)
    return problem.plan(policy, layers, tiers, pinned=True, ends=candidate.branch.ends)


class _Pricer:
    """Times of candidates of one problem; steps and tables are made once."""

    def __init__(self, problem: Problem, slowed: Slowdown | None) -> None:
        self.problem = problem
        self.bound = self._steps(None)
        self.estimate = self._steps(slowed) if slowed is not None else self.bound

    def _steps(self, slowed: Slowdown | None) -> list[tuple[float, StepTimes]]:
        spec, where = self.problem.spec, routing_of(self.problem.spec, self.problem.workload)
        prices = Prices(spec, self.problem.profile)
        return [
            (count, StepTimes(prices, step, tuple(where(step, la) for la in range(spec.n_layers)), slowed))
            for count, step in _counted_steps(self.problem.workload)
        ]

    def times(self, part: Branch, decode: tuple[Sending, ...], prompt: tuple[Sending, ...]) -> _Times:
        """Bounds and estimates of all candidates of a branch."""
        problem = self.problem
        slots = np.maximum(
            slot_bytes(problem, part.filling, part.levels, decode)[:, :, None],
            slot_bytes(problem, part.filling, part.levels, prompt)[:, None, :],
        )
        need = (part.fixed_bytes + part.filling.bytes_of[part.levels])[:, None, None] + slots
        bound_s = np.where(need <= problem.vram_budget_bytes, self._total(self.bound, part, decode, prompt), np.inf)
        if self.estimate is self.bound:
            return _Times(bound_s, bound_s)
        return _Times(bound_s, np.where(np.isfinite(bound_s), self._total(self.estimate, part, decode, prompt), np.inf))

    def _total(
        self,
        steps: list[tuple[float, StepTimes]],
        part: Branch,
        decode: tuple[Sending, ...],
        prompt: tuple[Sending, ...],
    ) -> Seconds:
        (_, prefill), *others = steps
        if self.problem.workload.n_prompt == 1:  # a prompt of one token per sequence is a decode step
            total = prefill.seconds(part.filling, part.ends, part.levels, decode)[:, :, None]
        else:
            total = prefill.seconds(part.filling, part.ends, part.levels, prompt)[:, None, :]
        for count, step in others:
            total = total + count * step.seconds(part.filling, part.ends, part.levels, decode)[:, :, None]
        return total


def _counted_steps(workload: Workload) -> list[tuple[float, Step]]:
    """Prefill and a few decode steps, each with how often it counts in a generation.

    A decode step that is not simulated counts for its neighbours, in the shares of linear interpolation.
    """
    prefill, *decode = representative(workload)
    if not decode:
        return [(1.0, prefill)]
    every = np.arange(decode[0].kv_tokens, decode[-1].kv_tokens + 1)
    at = [step.kv_tokens for step in decode]
    counts = [float(np.interp(every, at, row).sum()) for row in np.eye(len(decode))]
    return list(zip([1.0, *counts], [prefill, *decode], strict=True))
