"""Search: the plan with the shortest generation among very many, without simulating all of them.

1.  Every candidate's time without contention is computed exactly, thousands at once (sim.steptime): steps of
    decode and of the prompt share the placement only, so their times are added, not searched together.
2.  Contention and cold starts only stretch tasks, and every queue keeps its order, so that no end comes earlier:
    the time without them is a lower bound of the time with them.
3.  Candidates are simulated by the reference engine, the most promising first, until `most_simulated`; those
    whose bound is not below the best simulated time are pruned. The rest is left: if there is none, the plan is
    proven the best of the candidates, else the least bound of those left says how much better one could be.

Large spaces are searched in steps first and finely around the best afterwards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sim.compile import compile_step
from sim.cost import price
from sim.engine import schedule
from sim.layercost import Prices, Seconds, Sending, slowdown
from sim.plan import Plan, Tier
from sim.policies.problem import Problem
from sim.simulate import counted, counted_chunks, representative, routing_of
from sim.space import Branch, Space, around, coarse, finer, slot_bytes
from sim.steptime import StepTimes
from sim.workload import Step

MOST_SIMULATED = 3
"""The estimate ranks well: over 16 models and machines the best of the first three is within 0.1 % of that of ten."""
_KEPT_PER_BRANCH, _REFINED = 64, 3
_EQUAL = 1 - 1e-9  # times that differ by less differ by rounding


@dataclass(frozen=True)
class Certificate:
    """What became of all candidates of a search, held against a plan of total_s seconds.

    n_pruned      cannot be faster: their bounds are not below total_s, or they decide as one that was simulated
    n_left        were not simulated and have bounds below total_s; at 0 the plan is proven the best of all
    least_left_s  the least bound of those left; total_s if none is
    """

    total_s: float
    n_candidates: int
    n_pruned: int
    n_simulated: int
    n_left: int
    least_left_s: float

    @property
    def gap(self) -> float:
        """The share of its time that a candidate left could save at most; 0 if the plan is proven the best."""
        return 1 - self.least_left_s / self.total_s


@dataclass(frozen=True)
class Winner:
    """The best plan, and the branch that it is of."""

    plan: Plan
    branch: Branch = field(repr=False, compare=False)


@dataclass(frozen=True)
class Found:
    """The best plan of a search, its seconds by the reference engine, and what happened to all candidates.

    left_bounds_s  bounds below total_s of the candidates that were not simulated
    """

    winner: Winner
    total_s: float
    n_candidates: int
    n_simulated: int
    left_bounds_s: Seconds = field(repr=False, compare=False)

    @property
    def plan(self) -> Plan:
        """The best plan."""
        return self.winner.plan

    @property
    def certificate(self) -> Certificate:
        """What became of the candidates."""
        return self.against(self.total_s, 0)

    def against(self, total_s: float, n_others: int) -> Certificate:
        """The same where n_others more plans were simulated, the best of which takes total_s."""
        best_s = min(total_s, self.total_s)
        left = self.left_bounds_s[self.left_bounds_s < best_s * _EQUAL]
        n_candidates, n_simulated = self.n_candidates + n_others, self.n_simulated + n_others
        n_pruned, least_s = n_candidates - n_simulated - len(left), float(left.min(initial=best_s))
        return Certificate(best_s, n_candidates, n_pruned, n_simulated, len(left), least_s)


@dataclass(frozen=True)
class _Candidate:
    branch: Branch
    level: int
    decode: Sending
    prompt: Sending
    bound_s: float
    estimate_s: float


def search(
    problem: Problem,
    policy: str,
    spaces: Sequence[Space],
    contention: bool = True,
    most_simulated: int = MOST_SIMULATED,
) -> Found:
    """The best plan of several spaces, of each of which most_simulated plans are simulated at most.

    Raises PlanError if no candidate fits.
    """
    run = _Search(problem, policy, contention)
    for space in spaces:
        run.consider(space)
        run.simulate(most_simulated)
    return run.found()


class _Search:
    """Candidates so far and the best plan simulated so far."""

    def __init__(self, problem: Problem, policy: str, contention: bool) -> None:
        self.problem, self.policy = problem, policy
        self.pricer = _Pricer(problem, contention)
        self.reference = _Reference(problem, contention)
        self.bounds: list[Seconds] = []
        self.promising: list[_Candidate] = []
        self.simulated: dict[Hashable, float] = {}  # bounds of plans, by their decisions
        self.best_s = math.inf
        self.winner: Winner | None = None

    def consider(self, space: Space) -> None:
        """Time all candidates of a space: in steps, then finely around the best."""
        found: list[_Candidate] = []
        rough = [coarse(self.problem, space, part) for part in space.branches]
        for part in rough:
            found += self._time(part, space.decode, space.prompt)
        if any(len(few.levels) < len(part.levels) for few, part in zip(rough, space.branches, strict=True)):
            for near in _best_branches(found):
                part = next(b for b in space.branches if b.filling is near.branch.filling)
                decode, prompt = finer(self.problem, near.decode), finer(self.problem, near.prompt)
                found += self._time(around(part, near.level), decode, prompt)
        self.promising += found

    def _time(self, part: Branch, decode: tuple[Sending, ...], prompt: tuple[Sending, ...]) -> list[_Candidate]:
        """The most promising candidates of a branch; the bounds of all are kept."""
        bound_s, estimate_s = self.pricer.times(part, decode, prompt)
        self.bounds.append(bound_s[np.isfinite(bound_s)])
        flat = estimate_s.ravel()
        chosen = _smallest(flat, _KEPT_PER_BRANCH)
        found = []
        for k in chosen[np.isfinite(flat[chosen])]:
            i, d, p = np.unravel_index(k, estimate_s.shape)
            times = float(bound_s[i, d, p]), float(flat[k])
            found.append(_Candidate(part, int(part.levels[i]), decode[d], prompt[p], *times))
        return found

    def simulate(self, most: int) -> None:
        """Simulate the most promising candidates, at most so many, that may beat the best so far."""
        n_before = len(self.simulated)
        for candidate in sorted(self.promising, key=lambda c: c.estimate_s):
            if candidate.bound_s >= self.best_s * _EQUAL:
                continue
            plan = _plan(self.problem, self.policy, candidate)
            if plan.decisions in self.simulated:
                continue
            if len(self.simulated) - n_before == most:
                break
            self.simulated[plan.decisions] = candidate.bound_s
            seconds = self.reference.total_s(plan)
            if seconds < self.best_s * _EQUAL:
                self.best_s, self.winner = seconds, Winner(plan, candidate.branch)

    def found(self) -> Found:
        """The best plan, checked, and the counts."""
        if self.winner is None:
            raise self.problem.none_fits(self.policy)
        self.problem.checked(self.winner.plan)
        n_candidates = sum(len(bounds) for bounds in self.bounds)
        return Found(self.winner, self.best_s, n_candidates, len(self.simulated), self._left_bounds_s())

    def _left_bounds_s(self) -> Seconds:
        """Bounds below the best time, but for those of candidates that decide as one that was simulated."""
        bounds = np.concatenate(self.bounds)
        below = Counter(bounds[bounds < self.best_s * _EQUAL].tolist())
        # Candidates that decide alike have bounds that differ by rounding only: few plans need to be looked at.
        near = np.array(list(self.simulated.values()))
        settled = (
            c.bound_s
            for c in self.promising
            if c.bound_s in below
            and (np.abs(near - c.bound_s) <= (1 - _EQUAL) * c.bound_s).any()
            and _plan(self.problem, self.policy, c).decisions in self.simulated
        )
        return np.array(list((below - Counter(settled)).elements()))


def _smallest(values: Seconds, n: int) -> NDArray[np.int64]:
    """Positions of the n smallest values in order, the first of equals first: sorting all would take longest."""
    few = np.arange(len(values))
    if len(values) > n:
        few = np.flatnonzero(values <= np.partition(values, n - 1)[n - 1])
    return few[np.argsort(values[few], kind="stable")][:n]


def _best_branches(candidates: list[_Candidate]) -> list[_Candidate]:
    """The best candidate of each of the best branches."""
    found: dict[int, _Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: c.estimate_s):
        found.setdefault(id(candidate.branch.filling), candidate)
    return list(found.values())[:_REFINED]


class _Reference:
    """A generation's seconds by the reference engine, over the same steps that candidates are timed by."""

    def __init__(self, problem: Problem, contention: bool) -> None:
        self.problem = problem
        self.steps = _counted_steps(problem)
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

    def __init__(self, problem: Problem, contention: bool) -> None:
        self.problem = problem
        spec, where = problem.spec, routing_of(problem.spec, problem.workload)
        prices = Prices(spec, problem.profile)
        alike: dict[int, list[tuple[float, Step]]] = {}
        for count, step in _counted_steps(problem):
            alike.setdefault(step.n_tokens, []).append((count, step))
        self.steps = [
            StepTimes(
                prices,
                tuple(steps),
                tuple(tuple(where(step, la) for la in range(spec.n_layers)) for _, step in steps),
                slowdown(problem.profile, spec, n_tokens) if contention else None,
            )
            for n_tokens, steps in alike.items()
        ]

    def times(self, part: Branch, decode: tuple[Sending, ...], prompt: tuple[Sending, ...]) -> tuple[Seconds, Seconds]:
        """Bounds and estimates of a generation's seconds, [level, decode, prompt]; infinite without the memory."""
        problem = self.problem
        slots = np.maximum(
            slot_bytes(problem, part.filling, part.levels, decode)[:, :, None],
            slot_bytes(problem, part.filling, part.levels, prompt)[:, None, :],
        )
        need = (part.fixed_bytes + part.filling.bytes_of[part.levels])[:, None, None] + slots
        total = np.where(need <= problem.vram_budget_bytes, self._total(part, decode, prompt), np.inf)
        return total[0], total[-1]

    def _total(self, part: Branch, decode: tuple[Sending, ...], prompt: tuple[Sending, ...]) -> Seconds:
        """[alone or contended, level, decode, prompt]"""
        branch = part.filling, part.ends, part.levels
        total = np.zeros((1, len(part.levels), len(decode), len(prompt)))
        for times in self.steps:
            if times.n_tokens <= self.problem.workload.batch:  # a prompt's last token is a decode step, too
                total = total + times.seconds(*branch, decode)[:, :, :, None]
            else:
                total = total + times.seconds(*branch, prompt)[:, :, None, :]
        return total


def _counted_steps(problem: Problem) -> list[tuple[float, Step]]:
    """A few of the prompt's chunks and of the decode steps, each with how often it counts in a generation."""
    decode = representative(problem.workload)[1:]
    return [*counted_chunks(problem.workload, problem.chunk_tokens, 2), *counted(decode)]
