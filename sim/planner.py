"""Planner: a plan by a policy's name with its prediction, all policies ranked, and a plan explained in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hwmodels.errors import PlanError
from hwmodels.profile import HardwareProfile
from hwmodels.threads import with_threads
from hwmodels.units import format_bytes, format_seconds
from hwmodels.work import copy
from sim.bounds import Bound
from sim.compile import compile_step
from sim.limit import kind_of, limit_of
from sim.memory import memory
from sim.model import ModelSpec
from sim.pins import Pin, pins_of
from sim.plan import Plan, Prediction, Tier
from sim.policies import DECIDERS, POLICIES
from sim.policies import decide as decision_of
from sim.policies.decision import Decision
from sim.policies.problem import Problem, total_s
from sim.simulate import forecast, routing_of, simulate
from sim.timeline import Timeline
from sim.workload import Step, Workload


def plan(
    spec: ModelSpec,
    profile: HardwareProfile,
    vram_budget_bytes: int,
    workload: Workload,
    policy: str = "auto",
    pins: Sequence[Pin] = (),
) -> Plan:
    """The plan of a policy, checked, with its prediction by the reference engine.

    Raises PlanError for a policy that is not known, and if no plan of it fits the budget, the host or the pins.
    """
    return decide(Problem(spec, profile, vram_budget_bytes, workload, pins_of(spec, pins)), policy).plan


def decide(problem: Problem, policy: str = "auto") -> Decision:
    """The same, with what became of the candidates where the policy searched."""
    if problem.pins and policy not in DECIDERS:
        raise PlanError(
            f"policy {policy!r} takes no pins; use --policy {' or '.join(sorted(DECIDERS))}, or leave --pin out"
        )
    decision = decision_of(policy, problem)
    made = problem.checked(decision.plan)
    predicted = _prediction(problem.spec, made, problem.profile, problem.workload)
    return replace(decision, plan=made.with_prediction(predicted))


def _prediction(spec: ModelSpec, made: Plan, profile: HardwareProfile, workload: Workload) -> Prediction:
    return made.prediction or forecast(spec, made, profile, workload)


@dataclass(frozen=True)
class Ranked:
    """A policy's plan and seconds of the whole generation; without a plan, why there is none."""

    policy: str
    plan: Plan | None
    total_s: float | None
    reason: str


def rank(
    spec: ModelSpec,
    profile: HardwareProfile,
    vram_budget_bytes: int,
    workload: Workload,
    policies: Iterable[str] = tuple(POLICIES),
) -> tuple[Ranked, ...]:
    """Policies by simulated seconds of a whole generation; those without a plan come last, with the reason."""
    ranked, unfit = [], []
    for name in policies:
        try:
            made = plan(spec, profile, vram_budget_bytes, workload, name)
        except PlanError as error:
            unfit.append(Ranked(name, None, None, str(error)))
        else:
            ranked.append((total_s(_prediction(spec, made, profile, workload), workload), made))
    ranked.sort(key=lambda pair: pair[0])
    return (*(Ranked(made.policy, made, seconds, "") for seconds, made in ranked), *unfit)


# -- in words -------------------------------------------------------------------------------------------------


def explain(spec: ModelSpec, profile: HardwareProfile, plan: Plan, workload: Workload) -> str:
    """What a plan keeps where, who computes what, how fast that is, what limits it and why; plain text."""
    limit = limit_of(spec, profile, plan.vram_budget_bytes, workload, kind_of(plan))
    timeline = simulate(spec, plan, profile, workload, every_step=False)
    parts = (
        _memory_words(spec, plan),
        _share_words(spec, plan, workload),
        _speed_words(spec, profile, plan, workload, limit),
        _limit_words(timeline),
        _reason_words(spec, with_threads(profile, spec.dtype, plan.cpu_threads), plan),
    )
    return "\n".join(line for part in parts for line in part)


def _memory_words(spec: ModelSpec, plan: Plan) -> list[str]:
    need = memory(spec, plan)
    device = {
        "attention, norms, shared experts": need.rest,
        "embedding and head": need.ends,
        "GG columns": need.gg,
        "slots for CG columns": need.slots,
        "expert cache": need.cache,
        "KV cache": need.kv,
        "activations": need.activations,
    }
    host = {"weights": need.host_weights, "KV cache": need.host_kv}
    pinned = ", page-locked" if plan.pinned and plan.sends_weights else ""
    return [
        f"Memory of {spec.name} ({format_bytes(spec.weight_bytes)} of weights, {plan.dtype}), context {plan.n_ctx}",
        f"  device  {format_bytes(need.vram_bytes)} of {format_bytes(plan.vram_budget_bytes)}: {_list(device)}",
        f"  host    {format_bytes(need.host_bytes)}{pinned}: {_list(host)}",
    ]


def _list(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items() if size) or "nothing"


def _share_words(spec: ModelSpec, plan: Plan, workload: Workload) -> list[str]:
    lines = ["Who computes the MLPs (share of their arithmetic)"]
    if plan.cpu_threads is not None:
        lines.append(f"  the CPU computes with {plan.cpu_threads} threads, fewer than the machine was measured with")
    prompt = workload.prompt_steps(plan.chunk_tokens)
    if len(prompt) > 1:
        lines.append(f"  the prompt is fed in {len(prompt)} chunks of at most {plan.chunk_tokens} tokens per sequence")
    for step in (*workload.steps()[1:2], prompt[0]):
        tier = plan.tier(step.n_tokens)
        shares = mlp_shares(spec, plan, workload, step)
        told = ", ".join(f"{kind.upper()} {share:.0%}" for kind, share in shares.items())
        lines.append(f"  {step.name.rstrip('0123456789')}, tier {tier.name}: {told}; {_sending_words(tier)}")
    return lines


def mlp_shares(spec: ModelSpec, plan: Plan, workload: Workload, step: Step) -> dict[str, float]:
    """Share of a step's MLP FLOPs by class: gg, cg, cc."""
    graph = compile_step(spec, plan, step, routing_of(spec, workload))
    flops = {kind: sum(t.flops for t in graph if t.kind == kind) for kind in ("gg", "cg", "cc")}
    total = sum(flops.values())
    return {kind: value / total for kind, value in flops.items()}


def _sending_words(tier: Tier) -> str:
    order = "at the same time" if tier.overlap else "one after the other"
    if any(tier.ahead):
        return f"{order}, up to {max(tier.ahead)} columns of each expert sent ahead through {tier.n_slots} slots"
    if tier.stream_min_tokens is not None:
        what = "all host columns" if tier.stream_columns is None else f"{tier.stream_columns} columns"
        return f"{order}, {what} of each expert with at least {_tokens(tier.stream_min_tokens)} sent after the router"
    if tier.balance is not None:
        return f"{order}, CPU and GPU take experts by who would finish the next one earlier"
    if tier.fetch_share > 0:
        return f"{order}, {tier.fetch_share:.0%} of the expert cache's misses sent into it"
    return f"{order}, no weights sent"


def _tokens(n: int) -> str:
    return f"{n} token" if n == 1 else f"{n} tokens"


def _speed_words(spec: ModelSpec, profile: HardwareProfile, plan: Plan, workload: Workload, limit: Bound) -> list[str]:
    said = _prediction(spec, plan, profile, workload)
    lines = [
        f"Predicted on {profile.name}, {workload.n_prompt} prompt and {workload.n_gen} generated tokens, "
        f"batch {workload.batch}",
        f"  prefill {said.prefill_tok_s:.4g} tokens/s (TTFT {format_seconds(said.ttft_s)}), "
        f"{limit.prefill_s / said.ttft_s:.0%} of the hardware's bound; the bound rests on {limit.prefill_binds}",
    ]
    if said.tpot_s > 0:
        lines.append(
            f"  decode {said.decode_tok_s:.4g} tokens/s (TPOT {format_seconds(said.tpot_s)}), "
            f"{limit.decode_s / said.tpot_s:.0%} of the hardware's bound; the bound rests on {limit.decode_binds}"
        )
    return lines


def _limit_words(timeline: Timeline) -> list[str]:
    lines = ["What limits it (share of the time that each resource is busy)"]
    if "cache_hit_rate" in timeline.info:
        lines.append(f"  expert cache: {timeline.info['cache_hit_rate']:.0%} of uses found the expert in it")
    for phase in ("prefill", "decode"):
        names = [name for name in timeline.steps if name.startswith(phase)]
        wall_s = sum(timeline.step_s[name] for name in names)
        if names:
            spans = [s for s in timeline.spans if s.step in names]
            busy = {r: sum(s.duration_s for s in spans if s.resource == r) / wall_s for r in timeline.busy_s}
            most = max(busy, key=lambda r: busy[r])
            told = ", ".join(f"{r} {share:.0%}" for r, share in busy.items() if share >= 0.005)
            lines.append(f"  {phase}: {told}; {most} is the busiest")
    return lines


def _reason_words(spec: ModelSpec, profile: HardwareProfile, plan: Plan) -> list[str]:
    """Times of one expert or MLP on each resource: what every decision weighs."""
    if not profile.has_gpu:
        return []
    layer = max(range(spec.n_layers), key=lambda i: spec.layers[i].ffn.n_experts)
    ffn = spec.layers[layer].ffn
    n_bytes = ffn.columns * spec.column_bytes(layer)
    one = spec.ffn_work(layer, 1, ffn.columns)
    cpu_s, gpu_s = profile.time_s("CPU", one).seconds, profile.time_s("GPU", one).seconds
    copy_s = profile.time_s("H2D", copy(n_bytes, spec.dtype, plan.pinned)).seconds
    rates = profile.rates(frozenset({"CPU", "H2D"}))
    together = rates["CPU"] / cpu_s + rates["H2D"] / copy_s
    gain = together * cpu_s
    verdict = "sending some columns in decode can pay" if gain > 1 else "sending columns in decode cannot pay"
    return [
        f"Why: one {'expert' if ffn.is_moe else 'MLP'} of {format_bytes(n_bytes)}, one token",
        f"  CPU {format_seconds(cpu_s)}, copy to the device {format_seconds(copy_s)}, GPU {format_seconds(gpu_s)}",
        f"  CPU and link together do {gain:.2f} times the CPU's work alone: {verdict}",
    ]
