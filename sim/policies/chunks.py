"""Prompt chunks in auto: smaller steps need fewer activations, weights take their place, prompts last longer.

Tried only where a whole prompt's activations take a good part of the budget, and searched only where every byte
freed would have to save no more than twice its share to pay for the longer prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from hwmodels.errors import PlanError
from sim.memory import activation_bytes, memory
from sim.plan import Plan
from sim.policies.decision import Decision, Rule
from sim.policies.problem import Problem, Tried
from sim.simulate import forecast

SIZES = (2048, 1024, 512, 256)
"""Tokens of each sequence that a step of the prompt may be cut to."""
_WORTH_CUTTING = 1 / 50


def chunked(problem: Problem) -> Iterator[Problem]:
    """The problem with smaller and smaller chunks, where a whole prompt takes a good part of the device memory."""
    spec, batch = problem.spec, problem.workload.batch
    least = problem.vram_budget_bytes * _WORTH_CUTTING
    if problem.profile.has_gpu and activation_bytes(spec, problem.prompt_tokens, batch) >= least:
        yield from (replace(problem, chunk_tokens=size) for size in SIZES if size < problem.workload.n_prompt)


def smaller(problem: Problem, decide: Callable[[Problem], Decision], why: PlanError) -> Decision:
    """What is decided with the largest chunks with which anything fits; raises `why` if nothing does."""
    for part in chunked(problem):
        try:
            found = decide(part)
        except PlanError:
            continue
        return replace(found, again=partial(_with_chunks, part.chunk_tokens, found.again))
    raise why


def cut(problem: Problem, whole: Decision, rules: Sequence[Rule]) -> Decision:
    """The best plan of some rules with smaller chunks, as long as a generation gets faster; else as it is."""
    one = problem.tried([lambda: whole.plan])[0]
    best, best_s = whole, one.total_s
    for part in chunked(problem):
        if not _may_pay(part, one):
            break
        again = [partial(_with_chunks, part.chunk_tokens, rule) for rule in rules]
        try:
            tried = part.tried([partial(rule, problem) for rule in again])[0]
        except PlanError:
            continue
        if tried.total_s >= best_s:
            break
        best_s = tried.total_s
        best = replace(whole, plan=replace(tried.plan, policy=whole.plan.policy), again=again[tried.index])
    return best


def _with_chunks(chunk_tokens: int | None, rule: Rule, problem: Problem) -> Plan:
    return rule(replace(problem, chunk_tokens=chunk_tokens))


def _may_pay(part: Problem, whole: Tried) -> bool:
    """Whether a search may find a faster plan; of a plan that leaves the device alone, for lack of room, who knows."""
    spec, plan = part.spec, whole.plan
    if not plan.uses_gpu:
        return True
    same = replace(plan, chunk_tokens=part.chunk_tokens, prediction=None)
    before, after = memory(spec, plan), memory(spec, same)
    saved = 2 * (before.activations - after.activations) / max(before.host_bytes, 1)
    ttft_s = forecast(spec, same, part.profile, replace(part.workload, n_gen=1)).ttft_s
    return (whole.total_s + ttft_s - whole.prediction.ttft_s) * (1 - saved) < whole.total_s
