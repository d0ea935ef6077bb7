"""A whole generation in simulated time: every step compiled, priced and executed, one after the other."""

from __future__ import annotations

from collections import Counter

import numpy as np

from hwmodels.errors import FormatError
from hwmodels.profile import HardwareProfile
from sim.compile import RoutingOf, compile_step
from sim.cost import EVIDENCE, price
from sim.engine import schedule, spans
from sim.model import ModelSpec
from sim.plan import Plan, Prediction, check_plan
from sim.timeline import Span, Timeline
from sim.workload import Routing, RoutingTrace, Step, Workload, sample_routing


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
    every_step False simulates the prefill and a few decode steps only (`representative`).
    Raises PlanError if the plan is for another model, FormatError if the trace is of another model.
    """
    check_plan(plan, spec)
    where = routing_of(spec, workload, routing)
    evidence: Counter[str] = Counter(dict.fromkeys(EVIDENCE, 0))
    all_spans: list[Span] = []
    now_s = 0.0
    for step in workload.steps() if every_step else representative(workload):
        graph = compile_step(spec, plan, step, where)
        prices = price(graph, profile)
        evidence.update(prices.evidence)
        starts, ends = schedule(graph, prices, profile.rates if contention else None, now_s)
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
    }
    return Timeline("simulated", tuple(all_spans), info)


def forecast(
    spec: ModelSpec, plan: Plan, profile: HardwareProfile, workload: Workload, contention: bool = True
) -> Prediction:
    """What `simulate` would say of a workload's speed, from the prefill and a few decode steps.

    The time of a decode step is interpolated linearly over the steps between those simulated.
    """
    check_plan(plan, spec)
    where = routing_of(spec, workload)
    rates = profile.rates if contention else None

    def wall_s(step: Step) -> float:
        graph = compile_step(spec, plan, step, where)
        return max(schedule(graph, price(graph, profile), rates)[1])

    prefill, *decode = representative(workload)
    ttft_s = wall_s(prefill)
    tpot_s = 0.0
    if decode:
        every_kv = np.arange(decode[0].kv_tokens, decode[-1].kv_tokens + 1)
        at_kv = [step.kv_tokens for step in decode]
        tpot_s = float(np.interp(every_kv, at_kv, [wall_s(step) for step in decode]).mean())
    return Prediction(ttft_s, tpot_s, prefill.n_tokens / ttft_s, workload.batch / tpot_s if tpot_s else 0.0)


def representative(workload: Workload, n_decode: int = 8) -> tuple[Step, ...]:
    """Prefill and at most n_decode decode steps, evenly spread from the first to the last."""
    prefill, *decode = workload.steps()
    chosen = {round(i) for i in np.linspace(0, len(decode) - 1, min(n_decode, len(decode)))}
    return (prefill, *(decode[i] for i in sorted(chosen)))


def routing_of(spec: ModelSpec, workload: Workload, trace: RoutingTrace | None = None) -> RoutingOf:
    """Where each layer's tokens go: from the trace where it has the step and layer, else sampled."""

    def routing(step: Step, layer: int) -> Routing:
        recorded = trace.at(step.name, layer) if trace is not None else None
        if recorded is None:
            return sample_routing(spec, layer, step, workload)
        ffn = spec.layers[layer].ffn
        if len(recorded) != ffn.n_experts or sum(recorded) != step.n_tokens * ffn.top_k:
            raise FormatError(
                f"routing trace, step {step.name}, layer {layer}: {sum(recorded)} tokens over {len(recorded)} experts; "
                f"{spec.name} sends {step.n_tokens * ffn.top_k} over {ffn.n_experts}. Is it of this model and workload?"
            )
        return recorded

    return routing
