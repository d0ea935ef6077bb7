"""A whole generation in simulated time: every step compiled, priced and executed, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hwmodels.errors import FormatError
from hwmodels.profile import HardwareProfile
from hwmodels.threads import with_threads
from hwmodels.work import copy
from sim.caching import NO_USE, CacheState, CacheWalk
from sim.compile import compile_step, dispatch
from sim.cost import EVIDENCE, price
from sim.engine import schedule, spans
from sim.model import ModelSpec
from sim.plan import Plan, Prediction, caches_layer, check_plan
from sim.timeline import Span, Timeline
from sim.workload import Routing, RoutingOf, RoutingTrace, Step, Workload, sample_routing

Table = npt.NDArray[np.float64]


def simulate(
    spec: ModelSpec,
    plan: Plan,
    profile: HardwareProfile,
    workload: Workload,
    routing: RoutingTrace | None = None,
    contention: bool = True,
    every_step: bool = True,
) -> Timeline:
    """Simulated timeline of a workload; each step starts where the one before it ended.

    routing is replayed where it was recorded, and sampled by the workload's seed and skew elsewhere.
    contention False leaves cold starts out, too. every_step False simulates the prompt and a few decode steps
    only (`representative`).
    Raises PlanError if the plan is for another model, FormatError if the trace is of another model.
    """
    check_plan(plan, spec)
    machine = with_threads(profile, spec.dtype, plan.cpu_threads)
    where = routing_of(spec, workload, routing)
    evidence: Counter[str] = Counter(dict.fromkeys(EVIDENCE, 0))
    all_spans: list[Span] = []
    now_s = 0.0
    steps = workload.steps(plan.chunk_tokens) if every_step else representative(workload, plan.chunk_tokens)
    walk = _walk(spec, plan, workload, where, routing)
    for step in steps:
        graph = compile_step(spec, plan, step, where, walk.before(step))
        prices = price(graph, machine)
        evidence.update(prices.evidence)
        starts, ends = schedule(graph, prices, machine.rates if contention else None, now_s)
        all_spans += spans(graph, starts, ends)
        now_s = max(ends)
    info = {
        "model": spec.name,
        "policy": plan.policy,
        "plan_id": plan.id,
        "profile_id": profile.id,
        "device": profile.device,
        "evidence": dict(evidence),
        "contention": contention,
        **walk.info(),
    }
    return Timeline("simulated", tuple(all_spans), info)


def forecast(
    spec: ModelSpec,
    plan: Plan,
    profile: HardwareProfile,
    workload: Workload,
    contention: bool = True,
    routing: RoutingTrace | None = None,
    n_decode: int = 8,
    ttft_s: float | None = None,
) -> Prediction:
    """What `simulate` would say of a workload's speed, from a few prompt chunks and n_decode decode steps.

    ttft_s is the prefill's time where it is known already.

    The time of a decode step is fitted linearly to its depth and to what its routing asks of the CPU and
    of the link, and what the fit leaves is interpolated over depth: the routing of all steps is cheap to
    know, and decode time varies with little else. Exact where all decode steps are simulated; over 120
    plans and workloads of a Mixtral the median error of tpot_s was 0.01 %, nine in ten were within
    0.4 %, the worst 2.3 % (64 sequences, where sending starts at a token count that many experts straddle).
    """
    check_plan(plan, spec)
    profile = with_threads(profile, spec.dtype, plan.cpu_threads)
    where = routing_of(spec, workload, routing)
    rates = profile.rates if contention else None
    prompt, decode = counted_chunks(workload, plan.chunk_tokens), representative(workload, None, n_decode)[1:]
    chunks, asked = [step for _, step in prompt], _spread(workload.steps()[1:], 128)
    walk = _walk(spec, plan, workload, where, routing)
    caches: dict[str, CacheState] = {}
    rows: dict[str, _Row] = {}
    known: _Known = {}
    for step in sorted({*chunks, *decode, *asked}, key=lambda s: s.kv_tokens) if plan.cache is not None else ():
        cache = walk.before(step)
        assert cache is not None, "the plan has a cache"
        if step in (*chunks, *decode):
            caches[step.name] = cache.copy()
        rows[step.name] = _cached_row(step, cache, spec, plan, profile, where, known)

    def wall_s(step: Step) -> float:
        graph = compile_step(spec, plan, step, where, caches.get(step.name))
        return max(schedule(graph, price(graph, profile), rates)[1])

    def demand(steps: Sequence[Step]) -> Table:
        if plan.cache is not None:
            return np.array([rows[step.name] for step in steps])
        return _demand(steps, spec, plan, profile, where)

    if ttft_s is None:
        ttft_s = sum(count * wall_s(step) for count, step in prompt)
    tpot_s = 0.0
    if decode:
        tpot_s = _mean_s(demand(decode), [wall_s(step) for step in decode], demand(asked))
    n_tokens = workload.n_prompt * workload.batch
    return Prediction(ttft_s, tpot_s, n_tokens / ttft_s, workload.batch / tpot_s if tpot_s else 0.0)


def _walk(spec: ModelSpec, plan: Plan, workload: Workload, where: RoutingOf, trace: RoutingTrace | None) -> CacheWalk:
    steps = workload.steps(plan.chunk_tokens)
    return CacheWalk(spec, plan, steps, where, trace.cached if trace is not None else None)


def representative(workload: Workload, chunk_tokens: int | None = None, n_decode: int = 8) -> tuple[Step, ...]:
    """The prompt's steps and at most n_decode decode steps, evenly spread from the first to the last."""
    prompt = workload.prompt_steps(chunk_tokens)
    return (*prompt, *_spread(workload.steps()[1:], n_decode))


def counted_chunks(workload: Workload, chunk_tokens: int | None, n_whole: int = 4) -> list[tuple[float, Step]]:
    """At most n_whole of a prompt's whole chunks, evenly spread, and its last one, each with how often it counts."""
    *whole, last = workload.prompt_steps(chunk_tokens)
    return [*counted(_spread(whole, n_whole)), (1.0, last)]


def counted(steps: Sequence[Step]) -> list[tuple[float, Step]]:
    """Steps of one size in rising depth, with the shares of those between them by linear interpolation."""
    if len(steps) < 2:
        return [(1.0, step) for step in steps]
    n_new = steps[0].n_tokens // steps[0].batch
    at = [step.kv_tokens for step in steps]
    every = np.arange(at[0], at[-1] + 1, n_new)
    counts = [float(np.interp(every, at, row).sum()) for row in np.eye(len(steps))]
    return list(zip(counts, steps, strict=True))


def _spread(steps: Sequence[Step], n: int) -> list[Step]:
    return [steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(n, len(steps)))]


def _mean_s(known: Table, wall_s: list[float], wanted: Table) -> float:
    """Mean wall time of steps by their demand, from the wall times of a few whose demand is known."""
    scale = np.maximum(known.max(axis=0), 1e-30)
    fit = np.linalg.lstsq(known / scale, np.array(wall_s), rcond=None)[0]
    left_s = np.array(wall_s) - known / scale @ fit
    depth = 1  # column of the demand
    return float(np.mean(wanted / scale @ fit + np.interp(wanted[:, depth], known[:, depth], left_s)))


def _demand(steps: Sequence[Step], spec: ModelSpec, plan: Plan, profile: HardwareProfile, where: RoutingOf) -> Table:
    """Per step: 1, its depth in tokens, and the seconds that its routing asks of the CPU and of the link."""
    demand = np.zeros((len(steps), 4))
    demand[:, 0], demand[:, 1] = 1.0, [step.kv_tokens for step in steps]
    for i, (layer, part) in enumerate(zip(spec.layers, plan.layers, strict=True)):
        if not layer.ffn.is_moe:
            continue
        n_tokens = np.array([where(step, i) for step in steps])
        for gg in set(part.gg):
            counts, at = np.unique(n_tokens[:, [g == gg for g in part.gg]], return_inverse=True)
            seconds = np.array([_expert_s(spec, plan, profile, steps[0], i, gg, n) for n in counts.tolist()])
            demand[:, 2:] += seconds[at.reshape(len(steps), -1)].sum(axis=1)
    return demand


_Row = tuple[float, float, float, float]
_Known = dict[tuple[int, int, int, int], tuple[float, float]]


def _cached_row(
    step: Step,
    cache: CacheState,
    spec: ModelSpec,
    plan: Plan,
    profile: HardwareProfile,
    where: RoutingOf,
    known: _Known,
) -> _Row:
    """A row of `_demand` for a plan with an expert cache, which advances by the step; known keeps experts' times."""
    tier = plan.tier(step.n_tokens)
    seconds = dict.fromkeys(("CPU", "H2D"), 0.0)
    for i, (layer, part) in enumerate(zip(spec.layers, plan.layers, strict=True)):
        if not layer.ffn.is_moe:
            continue
        routing, columns, use = where(step, i), layer.ffn.columns, NO_USE
        if caches_layer(plan, spec, i):
            use = cache.use(i, tier, part.gg, columns, routing)
            for fetch in use.fetched:
                seconds["H2D"] += _send_s(spec, plan, profile, i, columns - fetch.part.start)
        for expert in np.flatnonzero(routing).tolist():
            if expert not in use.experts:
                n_tokens = routing[expert]
                key = (i, part.gg[expert], n_tokens, tier.max_tokens)
                if key not in known:
                    known[key] = _expert_s(spec, plan, profile, step, i, part.gg[expert], n_tokens)
                cpu_s, link_s = known[key]
                seconds["CPU"] += cpu_s
                seconds["H2D"] += link_s
    return 1.0, float(step.kv_tokens), seconds["CPU"], seconds["H2D"]


def _send_s(spec: ModelSpec, plan: Plan, profile: HardwareProfile, layer: int, columns: int) -> float:
    return profile.time_s("H2D", copy(columns * spec.column_bytes(layer), spec.dtype, plan.pinned)).seconds


def _expert_s(
    spec: ModelSpec, plan: Plan, profile: HardwareProfile, step: Step, layer: int, gg: int, n_tokens: int
) -> tuple[float, float]:
    """Seconds that n_tokens ask of the CPU and of the link, for an expert with gg resident columns."""
    columns, tier = spec.layers[layer].ffn.columns, plan.tier(step.n_tokens)
    cpu = sent = 0
    if plan.layers[layer].rest == "CPU" and not tier.offload:
        cpu = columns
    elif n_tokens:
        split = dispatch(columns, (gg,), tier, layer, (n_tokens,))
        cpu, sent = (sum(part.stop - part.start for part in parts) for parts in (split.cc, split.routed))
    return (
        profile.time_s("CPU", spec.ffn_work(layer, n_tokens, cpu)).seconds if n_tokens and cpu else 0.0,
        _send_s(spec, plan, profile, layer, sent) if sent else 0.0,
    )


def routing_of(spec: ModelSpec, workload: Workload, trace: RoutingTrace | None = None) -> RoutingOf:
    """Where each layer's tokens go: from the trace where it has the step and layer, else sampled."""

    def routing(step: Step, layer: int) -> Routing:
        recorded = trace.at(step.name, layer) if trace is not None else None
        if recorded is None:
            return sample_routing(spec, layer, step, workload)
        ffn = spec.layers[layer].ffn
        in_range = all(0 <= n <= step.n_tokens for n in recorded)
        if len(recorded) != ffn.n_experts or sum(recorded) != step.n_tokens * ffn.top_k or not in_range:
            raise FormatError(
                f"routing trace, step {step.name}, layer {layer}: found {recorded}, expected {ffn.n_experts} numbers "
                f"of at most {step.n_tokens}, together {step.n_tokens * ffn.top_k}; is it of this model and workload?"
            )
        return recorded

    return routing
