"""CPU threads in auto: fewer than the machine was measured with, where it was measured with fewer as well.

Two hardware threads of one core share its arithmetic and its caches, so that half of them may compute faster. Tried
are numbers of threads with which the CPU's MLP parts were measured to be clearly faster at any number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from hwmodels.errors import PlanError
from hwmodels.threads import faster_counts, with_threads
from sim.plan import Plan
from sim.policies.decision import Decision, Rule
from sim.policies.problem import Problem


def fewer(problem: Problem, best: Decision) -> Decision:
    """The best plan of the rule that won with fewer CPU threads, if a generation gets faster; else as it is."""
    parts = list(_parts(problem))
    if not parts:
        return best
    best_s = problem.tried([lambda: best.plan])[0].total_s
    for n_threads in parts:
        again = partial(_with_threads, n_threads, best.again)
        try:
            tried = problem.tried([partial(again, problem)])[0]
        except PlanError:
            continue
        if tried.total_s < best_s:
            best_s = tried.total_s
            best = replace(best, plan=replace(tried.plan, policy=best.plan.policy), again=again)
    return best


def _parts(problem: Problem) -> Iterator[int]:
    # What an emulated device leaves idle it takes for itself: its own times would change with the number.
    if problem.cpu_threads is None and problem.profile.device != "emulated":
        yield from faster_counts(problem.profile, problem.spec.dtype)


def _with_threads(n_threads: int, rule: Rule, problem: Problem) -> Plan:
    part = replace(problem, profile=with_threads(problem.profile, problem.spec.dtype, n_threads), cpu_threads=n_threads)
    return replace(rule(part), cpu_threads=n_threads, profile_id=problem.profile.id, prediction=None)
