"""A whole generation in simulated time: closed forms at the limits, the balance rule, forecasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import pytest

from hwmodels.errors import FormatError, PlanError
from hwmodels.profile import RESOURCES, Contention, HardwareProfile, Peak
from sim.model import ModelSpec, from_config
from sim.plan import LayerPartition, Plan, Tier
from sim.simulate import forecast, representative, simulate
from sim.workload import RoutingTrace, Workload
from tests.unit_machine import dense, machine, mixed, moe, on_cpu, peak, plan_of, tier, uniform

ENDLESS = 1e30


def only_bandwidth(cpu: float, link: float) -> HardwareProfile:
    """The CPU reads and the link copies so many bytes a second; nothing else takes time."""
    peaks = {r: peak(ENDLESS, {"CPU": cpu, "H2D": link}.get(r, ENDLESS)) for r in RESOURCES}
    return machine(peaks={str(r): p for r, p in peaks.items()})


# -- limits -------------------------------------------------------------------------------------------


def test_a_fully_resident_dense_model_takes_the_sum_of_its_parts_on_the_gpu() -> None:
    # One byte or FLOP takes a second, whichever are more: a GPU alone, one operation after the other.
    spec, workload = dense(n_layers=3), Workload(n_prompt=4, n_gen=2)
    timeline = simulate(spec, uniform(spec, gg=12), machine(), workload)
    for step in workload.steps():
        works = [
            spec.small_work("embed", step.n_tokens),
            spec.head_work(1, step.n_tokens),
            spec.small_work("sample", 1),
        ]
        for layer in range(3):
            works += [
                spec.attention_work(layer, step.n_tokens, step.kv_tokens),
                spec.ffn_work(layer, step.n_tokens, 12),
            ]
            works += [spec.small_work("join", step.n_tokens)]
        assert timeline.step_s[step.name] == sum(max(w.flops, w.bytes) for w in works)
    assert timeline.busy_s["GPU"] == timeline.makespan_s
    assert timeline.overlap == 1


def test_without_a_gpu_a_model_takes_the_sum_of_its_parts_on_the_cpu() -> None:
    spec, workload = moe(n_layers=2, n_experts=4, top_k=2), Workload(n_prompt=1, n_gen=2)
    alone = machine(peaks={"CPU": peak()})
    timeline = simulate(spec, on_cpu(spec), alone, workload)
    for step in workload.steps():
        works = [spec.small_work("embed", 1), spec.head_work(1), spec.small_work("sample", 1)]
        for layer in range(2):  # one token: two experts of one token each
            works += [spec.attention_work(layer, 1, step.kv_tokens), *[spec.ffn_work(layer, 1, 12)] * 2]
        assert timeline.step_s[step.name] == sum(max(w.flops, w.bytes) for w in works)
    assert timeline.busy_s == {"CPU": timeline.makespan_s, "GPU": 0, "H2D": 0, "D2H": 0}


@pytest.mark.parametrize("n_layers", [1, 4])
@pytest.mark.parametrize(("cpu", "link"), [(60.0, 25.0), (50.0, 50.0), (20.0, 80.0)])
def test_at_one_token_the_best_share_to_send_is_that_of_the_links_bandwidth(
    n_layers: int, cpu: float, link: float
) -> None:
    # Equal finishing times: c / B_cpu = p / B_pcie, so p / (c + p) = B_pcie / (B_pcie + B_cpu), to a
    # column, since the activations that the CPU reads and writes are two thirds of one.
    columns = int(cpu + link)
    spec = dense(n_layers, columns)
    best = min(
        range(columns + 1),
        key=lambda ahead: (
            simulate(
                spec, uniform(spec, ahead=ahead), only_bandwidth(cpu, link), Workload(1, 2), contention=False
            ).tpot_s
        ),
    )
    assert best / columns == pytest.approx(link / (link + cpu), abs=1.001 / columns)


def test_a_link_that_only_takes_from_the_cpu_is_best_left_alone() -> None:
    # 60 GB/s of CPU become 40 beside a copy of 20: together no more than the CPU alone, so CG = 0.
    spec, hardware = dense(2, 60), only_bandwidth(60.0, 20.0)
    shared = replace(hardware, contention=(Contention(("CPU", "H2D"), {"CPU": 2 / 3, "H2D": 1.0}, "measured"),))

    def tpot_s(ahead: int, contention: bool) -> float:
        return simulate(spec, uniform(spec, ahead=ahead), shared, Workload(1, 2), contention=contention).tpot_s

    assert tpot_s(15, contention=False) < tpot_s(0, contention=False)
    assert tpot_s(15, contention=True) >= tpot_s(0, contention=True)


def test_more_tokens_favour_the_link_since_it_sends_weights_once() -> None:
    # CPU: 2 FLOPs per weight and token at 8 FLOP/s, link: 4 bytes per weight at 8 bytes/s: equal at 2 tokens.
    spec = dense(1)
    peaks = {"CPU": peak(8.0, ENDLESS), "GPU": peak(ENDLESS, ENDLESS), "H2D": peak(ENDLESS, 8.0)}
    hardware = machine(peaks={**peaks, "D2H": peak(ENDLESS, ENDLESS)})
    sent, kept = uniform(spec, ahead=12), uniform(spec)
    for n_prompt, link_wins in ((1, False), (4, True)):
        sent_s, kept_s = (simulate(spec, p, hardware, Workload(n_prompt, 1)).ttft_s for p in (sent, kept))
        assert (sent_s < kept_s) is link_wins


@pytest.mark.parametrize("resource", RESOURCES)
def test_a_faster_part_never_hurts_and_no_run_beats_the_busiest_resource(resource: str) -> None:
    spec, plan = moe(), uniform(moe(), gg=(12, 3, 0, 0), ahead=4)
    slow = machine(handoff_s={"GPU>D2H": 1.0, "CPU>H2D": 2.0})
    fast = replace(slow, peaks={**slow.peaks, resource: peak(2.0, 2.0)})
    slower, faster = (simulate(spec, plan, m, Workload(3, 3), contention=False) for m in (slow, fast))
    assert faster.makespan_s <= slower.makespan_s
    assert slower.makespan_s >= max(slower.busy_s.values())


# -- a run --------------------------------------------------------------------------------------------


def test_each_step_starts_where_the_one_before_it_ended() -> None:
    spec = moe()
    timeline = simulate(spec, uniform(spec, gg=4, ahead=4), machine(), Workload(3, 4))
    assert timeline.steps == ("prefill", "decode1", "decode2", "decode3")
    steps = [timeline.step(name) for name in timeline.steps]
    assert all(before.end_s == after.start_s for before, after in pairwise(steps))
    assert timeline.ttft_s + 3 * timeline.tpot_s == pytest.approx(timeline.makespan_s)


def test_a_timeline_says_what_it_is_of() -> None:
    spec, hardware = dense(), machine()
    plan = uniform(spec)
    timeline = simulate(spec, plan, hardware, Workload(3, 2), contention=False)
    assert timeline.source == "simulated"
    assert {k: v for k, v in timeline.info.items() if k != "evidence"} == {
        "model": "dense",
        "policy": "by-hand",
        "plan_id": plan.id,
        "profile_id": hardware.id,
        "device": "cuda",
        "contention": False,
    }
    assert timeline.info["evidence"]["specified"] == len(timeline.spans)  # one work per task of a dense model


def test_recorded_routing_is_replayed_and_the_rest_is_sampled() -> None:
    # Expert 0 is resident and expert 1 is not: sending all tokens to either gives the resident or the host time.
    spec = moe(n_layers=1, n_experts=2, top_k=1)
    plan, workload = uniform(spec, gg=(12, 0)), Workload(4, 3)

    def kinds(counts: dict[tuple[str, int], tuple[int, ...]], step: str) -> set[str]:
        timeline = simulate(spec, plan, machine(), workload, RoutingTrace(counts)).step(step)
        return {span.kind for span in timeline.spans}

    assert "cc" not in kinds({("decode1", 0): (1, 0)}, "decode1")
    assert "gg" not in kinds({("decode1", 0): (0, 1)}, "decode1")
    assert kinds({("decode1", 0): (1, 0)}, "decode2") == kinds({}, "decode2")


@pytest.mark.parametrize("counts", [(1,), (2, 0), (2, -1), (1, 0, 0)])
def test_routing_of_another_model_or_workload_is_refused(counts: tuple[int, ...]) -> None:
    spec = moe(n_layers=1, n_experts=2, top_k=1)
    trace = RoutingTrace({("decode1", 0): counts})
    with pytest.raises(FormatError, match="routing trace, step decode1, layer 0"):
        simulate(spec, uniform(spec), machine(), Workload(4, 3), trace)


def test_a_plan_of_another_model_is_refused() -> None:
    plan = uniform(dense(n_layers=2))
    for run in (simulate, forecast):
        with pytest.raises(PlanError, match="plan again"):
            run(dense(n_layers=3), plan, machine(), Workload(3, 2))


# -- forecasts ----------------------------------------------------------------------------------------

REALISTIC = machine(
    peaks={
        "CPU": Peak({"bfloat16": 1e12}, 60e9, 0.8, 5e-6, "estimated"),
        "GPU": Peak({"bfloat16": 100e12}, 900e9, 0.8, 5e-6, "estimated"),
        "H2D": Peak({}, 25e9, 0.9, 8e-6, "estimated"),
        "D2H": Peak({}, 25e9, 0.9, 8e-6, "estimated"),
    },
    handoff_s={"D2H>CPU": 1e-5, "CPU>H2D": 1e-5},
    contention=[Contention(("CPU", "H2D"), {"CPU": 0.8, "H2D": 0.9}, "estimated")],
)


def mixtral(n_layers: int = 8) -> ModelSpec:
    config = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    sizes = {"num_hidden_layers": n_layers, "vocab_size": 32000, "max_position_embeddings": 32768}
    return from_config({"model_type": "mixtral", **config, **experts, **sizes, "dtype": "bfloat16"}, "mixtral")


def mixtral_plan(gg: Sequence[int], **decode: Any) -> Plan:
    spec = mixtral()
    prompt = tier(spec, stream_min_tokens=20)
    return plan_of(
        spec, [LayerPartition("GPU", tuple(gg))] * spec.n_layers, tier(spec, max_tokens=16, **decode), prompt
    )


PLANS = {
    "whole experts": mixtral_plan([14336] * 3 + [0] * 5),
    "column cut": mixtral_plan([4096] * 8, ahead=1024),
    "a part of each routed expert": mixtral_plan([14336] * 2 + [0] * 6, stream_min_tokens=1, stream_columns=4096),
    "serial": mixtral_plan([14336] * 3 + [0] * 5, overlap=False),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_forecast_is_within_one_percent_of_simulating_every_step(name: str) -> None:
    errors = []
    for seed, batch in ((0, 1), (1, 1), (2, 1), (0, 8)):
        workload = Workload(n_prompt=64, n_gen=65, batch=batch, seed=seed, skew=0.5)
        whole = simulate(mixtral(), PLANS[name], REALISTIC, workload)
        quick = forecast(mixtral(), PLANS[name], REALISTIC, workload)
        assert quick.ttft_s == pytest.approx(whole.ttft_s, rel=1e-9)
        assert quick.prefill_tok_s == pytest.approx(64 * batch / whole.ttft_s, rel=1e-9)
        assert quick.decode_tok_s == pytest.approx(batch / quick.tpot_s)
        errors.append(abs(quick.tpot_s / whole.tpot_s - 1))
    assert max(errors) < 0.01
    assert median(errors) < 0.002


def test_a_forecast_of_many_sequences_is_within_three_percent() -> None:
    # 16 tokens per expert on average, and experts are sent from 20 on: the hardest case known
    workload = Workload(n_prompt=4, n_gen=33, batch=64)
    whole, quick = (run(mixtral(), PLANS["whole experts"], REALISTIC, workload) for run in (simulate, forecast))
    assert quick.tpot_s == pytest.approx(whole.tpot_s, rel=0.03)


@pytest.mark.parametrize("n_gen", [1, 2, 5, 9])
def test_a_forecast_of_few_tokens_is_exact(n_gen: int) -> None:
    workload = Workload(16, n_gen)
    whole = simulate(mixtral(), PLANS["whole experts"], REALISTIC, workload)
    quick = forecast(mixtral(), PLANS["whole experts"], REALISTIC, workload)
    assert (quick.ttft_s, quick.tpot_s) == pytest.approx((whole.ttft_s, whole.tpot_s), rel=1e-9)
    assert (quick.decode_tok_s == 0) is (n_gen == 1)


@pytest.mark.parametrize("spec", [dense(4), dense(4, model_type="mistral", sliding_window=200), mixed(4)])
def test_a_forecast_follows_depth_through_windows_and_long_generations(spec: ModelSpec) -> None:
    plan = plan_of(
        spec,
        [LayerPartition("CPU" if i % 2 else "GPU", (0,) * la.ffn.n_experts) for i, la in enumerate(spec.layers)],
        tier(spec),
    )
    workload = Workload(n_prompt=8, n_gen=300)
    whole, quick = (run(spec, plan, machine(), workload) for run in (simulate, forecast))
    assert quick.tpot_s == pytest.approx(whole.tpot_s, rel=0.01)


def test_a_forecast_replays_a_trace_and_can_leave_contention_out() -> None:
    spec, plan, workload = mixtral(), PLANS["column cut"], Workload(16, 9)
    trace = RoutingTrace({("decode4", layer): (1, 1, 0, 0, 0, 0, 0, 0) for layer in range(8)})
    for contention in (True, False):
        whole = simulate(spec, plan, REALISTIC, workload, trace, contention)
        assert forecast(spec, plan, REALISTIC, workload, contention, trace).tpot_s == pytest.approx(whole.tpot_s)


def test_representative_steps_run_from_the_first_to_the_last() -> None:
    names = [step.name for step in representative(Workload(16, 128), n_decode=3)]
    assert names == ["prefill", "decode1", "decode64", "decode127"]
    assert [step.name for step in representative(Workload(16, 3))] == ["prefill", "decode1", "decode2"]
    timeline = simulate(dense(), uniform(dense()), machine(), Workload(2, 128), every_step=False)
    assert len(timeline.steps) == 9


def test_tiers_of_a_plan_price_prompt_and_decode_apart() -> None:
    spec = dense(1)
    serial = Tier("decode", 1, False, (0,), None, 0)
    plan = plan_of(spec, [LayerPartition("GPU", (0,))], serial, tier(spec, stream_min_tokens=1))
    timeline = simulate(spec, plan, machine(), Workload(2, 2))
    kinds = {name: {span.kind for span in timeline.step(name).spans} for name in timeline.steps}
    assert "send" in kinds["prefill"]
    assert "cc" in kinds["decode1"]
