"""auto: the fastest plan in simulation, whoever's rule it follows.

Source: this project. The search space holds the paper's cut, cuts that differ from layer to layer, layers that
    live on the CPU, a cache of experts, and every other policy's own plan.
Placement: of every MLP or MoE layer any number of columns or experts, layers alike or one after the other;
    where memory is short, first layers or embedding and head on the CPU.
Bytes over PCIe: as the plan says; sending nothing is a candidate for decode and for prompts.
Compute site: as the plan says.
Dispatch rule: as scheinfer's, or the winning policy's.
Overlap: as scheinfer's, or the winning policy's.
Cache and prefetch: as scheinfer's; or a least-recently-used cache of experts, of all layers with misses sent in the
    share that lets link and CPU end together, or of each layer with misses sent as two clocks say; or the winning
    policy's.
Prompt chunks: where a prompt's activations take more than a fiftieth of the budget, the rule that won and the
    paper's cut are tried again with prompts fed in 2048, 1024, 512, 256 tokens of each sequence, as long as smaller
    chunks are faster; where nothing fits, everything is, with the largest of them with which something does.
CPU threads: those that the profile was measured with; the rule that won is tried again with fewer, where the profile
    has measured MLP parts to be faster so.
Derived by us: everything; no plan of another policy is faster in simulation, since all are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import partial

from hwmodels.errors import PlanError
from hwmodels.profile import HardwareProfile
from sim.model import ModelSpec
from sim.plan import CacheScope, ExpertCache, Plan, Prediction, Tier
from sim.policies import (
    cpu_only,
    fiddler,
    freetoken,
    gpu_only,
    hybrimoe,
    ktransformers,
    llama_cpp,
    mixtral_offloading,
    stream,
    stream_overlap,
)
from sim.policies.apart import Apart, proposed, worth_it
from sim.policies.caches import expert_times, fetch_share, largest_cache, popular
from sim.policies.chunks import cut, smaller
from sim.policies.decision import Decision, Rule
from sim.policies.problem import Policy, Problem
from sim.policies.threads import fewer
from sim.search import Found, search
from sim.space import Branch, further_space, paper_space, same_space
from sim.workload import Workload

NAME = "auto"
Follow = Callable[[str, Problem], Plan]
"""What makes the plan of a policy, by its name."""

OTHERS: dict[str, Policy] = {
    module.NAME: module.propose
    for module in (
        cpu_only,
        gpu_only,
        stream,
        stream_overlap,
        llama_cpp,
        fiddler,
        ktransformers,
        hybrimoe,
        mixtral_offloading,
        freetoken,
    )
}
"""All policies but scheinfer, whose space the search goes through first, and whose plan it so contains."""


def propose(spec: ModelSpec, profile: HardwareProfile, vram_budget_bytes: int, workload: Workload) -> Plan:
    """The fastest of the search's plans and all other policies' plans; PlanError if the model fits nowhere."""
    return decide(Problem(spec, profile, vram_budget_bytes, workload)).plan


def decide(problem: Problem) -> Decision:
    """The same, with what was searched and the rule that won."""
    try:
        whole = _decide(problem)
    except PlanError as error:
        return fewer(problem, smaller(problem, _decide, error))
    return fewer(problem, cut(problem, whole, (whole.again, _as_the_paper)))


def _decide(problem: Problem) -> Decision:
    if not worth_it(problem.spec):
        return _decided(problem, _searched(problem), followed, {})
    with Apart(problem, OTHERS) as apart:
        return _decided(problem, _searched(problem), apart.plan, apart.rough)


def _decided(problem: Problem, found: Found | None, follow: Follow, rough: Mapping[Hashable, Prediction]) -> Decision:
    winners = (found.winner,) if found is not None else ()
    rules: list[Rule] = [partial(_searched_again, winner.branch) for winner in winners]
    makes: list[Callable[[], Plan]] = [partial(_same, winner.plan) for winner in winners]
    cached = _cached(winners[-1].plan.tiers[-1]) if winners and problem.spec.is_moe else []
    others: list[Rule] = [*cached, *(partial(followed, name) for name in OTHERS)]
    makes += [partial(rule, problem) for rule in cached]
    makes += [partial(follow, name, problem) for name in OTHERS]
    try:
        tried = problem.tried(makes, rough)
    except PlanError as error:
        if not problem.profile.has_gpu:
            raise
        raise problem.none_fits(NAME) from error
    best = tried[0]
    n_others = sum(one.index >= len(winners) for one in tried)
    certificate = found.against(best.total_s, n_others) if found is not None else None
    return Decision(replace(best.plan, policy=NAME), certificate, [*rules, *others][best.index])


def _searched(problem: Problem) -> Found | None:
    if not problem.profile.has_gpu:
        return None
    try:
        return search(problem, NAME, [paper_space(problem), further_space(problem)])
    except PlanError:  # nothing fits on the device; another policy may still do without it
        return None


def _searched_again(part: Branch, problem: Problem) -> Plan:
    """The best of the one branch."""
    return search(problem, NAME, [same_space(problem, part)]).plan


def _as_the_paper(problem: Problem) -> Plan:
    return search(problem, NAME, [paper_space(problem)]).plan


def followed(name: str, problem: Problem) -> Plan:
    """The plan of a policy that auto follows."""
    return proposed(OTHERS[name], problem)


def _cached(prompt: Tier) -> list[Rule]:
    """Experts in a cache in decode, prompts sent as the search found best; a cache for all layers or for each."""
    return [partial(_lru_plan, prompt, "model", False), partial(_lru_plan, prompt, "layer", True)]


def _lru_plan(prompt: Tier, scope: CacheScope, balanced: bool, problem: Problem) -> Plan:
    if any(prompt.ahead):
        prompt = problem.tier(prompt.name, prompt.max_tokens, True, stream_min_tokens=1, n_slots=prompt.n_slots)
    decode = problem.tier("decode", problem.workload.batch, overlap=True)
    if balanced:
        decode = replace(decode, balance=expert_times(problem))
    else:
        decode = replace(decode, fetch_share=fetch_share(problem))
    return largest_cache(problem, NAME, (decode, prompt), partial(_lru, problem, scope))


def _lru(problem: Problem, scope: CacheScope, n_slots: int) -> ExpertCache:
    return ExpertCache(scope, "lru", n_slots, popular(problem, scope, n_slots))


def _same(plan: Plan) -> Plan:
    return plan
