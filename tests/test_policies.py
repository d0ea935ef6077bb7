"""Policies: each decides as its authors' program does, and auto is never behind any of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import PlanError
from hwmodels.profile import HardwareProfile
from sim.memory import activation_bytes, cache_slot_bytes, check_memory, memory
from sim.model import ModelSpec
from sim.plan import Plan, check_plan, load_plan
from sim.policies import POLICIES, policy
from sim.policies.caches import fetch_share
from sim.policies.fiddler import crossover_tokens
from sim.policies.problem import Problem, total_s
from sim.simulate import forecast, simulate
from sim.space import fixed_bytes
from sim.timeline import Timeline
from sim.workload import Workload, popularity
from tests.machines import budget, dense, machine, moe

GENERATION = Workload(n_prompt=40, n_gen=4)
NEEDS_GPU = sorted(set(POLICIES) - {"cpu-only", "auto"})
CACHED = {"hybrimoe", "mixtral-offloading", "freetoken"}
ON_DENSE = [(name, dense()) for name in sorted(set(POLICIES) - CACHED)]
ON_BOTH = [*ON_DENSE, *((name, moe()) for name in sorted(POLICIES))]


def propose(name: str, spec: ModelSpec, share: float, profile: HardwareProfile | None = None) -> Plan:
    """A policy's plan where memory suffices for a share of the MLPs."""
    return policy(name)(spec, profile or machine(), budget(spec, GENERATION, share), GENERATION)


def run(spec: ModelSpec, plan: Plan, profile: HardwareProfile | None = None) -> Timeline:
    return simulate(spec, plan, profile or machine(), GENERATION)


def sent_bytes(timeline: Timeline, step: str) -> float:
    return sum(s.bytes for s in timeline.spans if s.kind == "send" and s.step == step)


def computed_by(timeline: Timeline, kind: str, step: str) -> float:
    return sum(s.flops for s in timeline.spans if s.kind == kind and s.step == step)


def full_layers(spec: ModelSpec, plan: Plan) -> list[int]:
    return [i for i, part in enumerate(plan.layers) if min(part.gg) == spec.layers[i].ffn.columns]


# -- all policies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "spec"), ON_BOTH)
def test_a_plan_is_valid_fits_and_survives_a_file(name, spec, tmp_path):
    plan = propose(name, spec, 3.0)
    check_plan(plan, spec)
    check_memory(spec, plan, machine().host_bytes)
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    assert plan.policy == name


@pytest.mark.parametrize(("name", "spec"), [pair for pair in ON_BOTH if pair[0] not in ("cpu-only", "gpu-only")])
def test_half_of_the_mlps_uses_most_of_the_budget(name, spec):
    # slots of up to two layers' MLPs are needed beside the residents
    plan = propose(name, spec, 1.2)
    unused = plan.vram_budget_bytes - memory(spec, plan).vram_bytes
    assert (
        0 <= unused < max(spec.ffn_bytes(0), cache_layer_bytes(spec, plan))
        or min(min(part.gg) for part in plan.layers) == spec.layers[0].ffn.columns
    )


def test_an_unknown_policy_is_answered_with_the_known_ones():
    with pytest.raises(PlanError, match=r"no policy 'fidler'; known: .*fiddler"):
        policy("fidler")


@pytest.mark.parametrize("name", NEEDS_GPU)
def test_without_a_gpu_a_policy_that_needs_one_says_so(name):
    with pytest.raises(PlanError, match="needs a GPU"):
        propose(name, dense(), 1.0, machine(gpu=False))


@pytest.mark.parametrize("name", NEEDS_GPU)
def test_a_budget_too_small_for_anything_is_told_in_bytes(name):
    if name == "llama-cpp":  # it can leave all layers to the CPU
        return
    with pytest.raises(PlanError, match="are missing"):
        policy(name)(moe() if name in CACHED else dense(), machine(), 1000, GENERATION)


@pytest.mark.parametrize("name", sorted(CACHED))
def test_a_policy_that_caches_experts_says_that_a_dense_model_has_none(name):
    with pytest.raises(PlanError, match="caches experts"):
        propose(name, dense(), 1.0)


def cache_layer_bytes(spec: ModelSpec, plan: Plan) -> int:
    """One more slot for every layer."""
    return spec.n_layers * cache_slot_bytes(spec, plan)


# -- one by one --------------------------------------------------------------------------------------------------


def test_cpu_only_reads_every_weight_from_host_memory_once_per_step():
    spec = dense()
    plan = propose("cpu-only", spec, 0.0, machine(gpu=False, cpu_gb_s=1, cpu_gflops=10**6))
    timeline = run(spec, plan, machine(gpu=False, cpu_gb_s=1, cpu_gflops=10**6))
    weights = spec.weight_bytes - spec.embed_bytes  # of the embedding one row is read
    assert timeline.step_s["decode1"] == pytest.approx(weights / 1e9, rel=0.1)
    assert {s.resource for s in timeline.spans} == {"CPU"}


def test_gpu_only_wants_all_bytes_and_not_one_less():
    spec = dense()
    need = memory(spec, propose("gpu-only", spec, 3.0)).vram_bytes
    policy("gpu-only")(spec, machine(), need, GENERATION)
    with pytest.raises(PlanError, match="1 B are missing"):
        policy("gpu-only")(spec, machine(), need - 1, GENERATION)


def test_stream_copies_the_layers_that_do_not_fit_in_every_step_one_task_after_the_other():
    # memory for three MLPs: two residents and a slot, so that two of four layers are copied
    spec = dense(4)
    plan = propose("stream", spec, 0.75)
    timeline = run(spec, plan)
    assert full_layers(spec, plan) == [0, 1]
    assert not plan.pinned
    for step in timeline.steps:
        assert sent_bytes(timeline, step) == 2 * spec.ffn_bytes(0)
    assert timeline.overlap == pytest.approx(1.0)


def test_stream_copies_all_experts_whatever_the_router_says():
    spec = moe(3)
    timeline = run(spec, propose("stream", spec, 1 / 3))
    assert sent_bytes(timeline, "decode1") == 3 * spec.ffn_bytes(0)


def test_stream_overlap_is_as_fast_as_the_link_where_the_link_is_slow():
    spec = dense(8, columns=2560)
    slow = machine(link_gb_s=1)
    plan = propose("stream-overlap", spec, 0.5, slow)
    timeline = run(spec, plan, slow)
    sent = sent_bytes(timeline, "decode1")
    assert plan.pinned
    assert timeline.step_s["decode1"] == pytest.approx(sent / 1e9, rel=0.02)
    assert timeline.step_s["decode1"] >= sent / 1e9


def test_streams_never_compute_mlps_on_the_cpu():
    for name in ("stream", "stream-overlap"):
        timeline = run(moe(), propose(name, moe(), 0.7))
        assert not any(s.kind == "cc" for s in timeline.spans)


def test_llama_cpp_uploads_from_thirty_two_tokens_on():
    # the link is fast enough for uploads to pay; decode and a prompt of 31 tokens stay on the CPU
    spec, fast = dense(4), machine(link_gb_s=50, cpu_gflops=1)
    plan = propose("llama-cpp", spec, 0.5, fast)
    for n_prompt, kind in ((31, "cc"), (32, "send")):
        timeline = simulate(spec, plan, fast, Workload(n_prompt, 2))
        kinds = {s.kind for s in timeline.spans if s.step == "prefill"}
        assert kind in kinds
        assert {"cc", "send"} - {kind} not in kinds
    assert {s.kind for s in timeline.spans if s.step == "decode1"} >= {"cc", "gg"}


def test_llama_cpp_does_not_upload_where_the_cpu_is_faster():
    timeline = run(dense(4), propose("llama-cpp", dense(4), 0.5, machine(link_gb_s=0.1)), machine(link_gb_s=0.1))
    assert not any(s.kind == "send" for s in timeline.spans)


def test_llama_cpp_is_a_serial_chain_of_whole_layers():
    spec = moe(4)
    plan = propose("llama-cpp", spec, 0.6)
    assert {min(part.gg) for part in plan.layers} == {0, 128}
    assert all(len(set(part.gg)) == 1 for part in plan.layers)
    assert run(spec, plan).overlap == pytest.approx(1.0)


def test_llama_cpp_leaves_first_layers_to_the_cpu_where_not_even_attention_fits():
    spec = dense(4)
    plan = policy("llama-cpp")(spec, machine(), budget(spec, GENERATION, 0.0) - spec.rest_bytes(0), GENERATION)
    places = [part.rest for part in plan.layers]
    assert places == sorted(places)
    assert places[0] == "CPU"


def test_llama_cpp_uploads_the_mlps_of_layers_that_ngl_leaves_to_the_cpu():
    # memory for activations and one MLP of 3 * 64 * 256 weights, 98304 bytes: all layers stay on the CPU, in a
    # prompt of 32 tokens each MLP is
    #   up 4096 B, 1 s | send 98304 B, 24 s | compute 3145728 FLOPs, 1 s | join | down 4096 B, 1 s
    spec, workload = dense(4), Workload(n_prompt=32, n_gen=1)
    slow_cpu = machine(link_gb_s=4096e-9, gpu_gflops=3145728e-9, gpu_gb_s=1e12, cpu_gflops=3145728e-12)
    room = activation_bytes(spec, 33, 1) + 98304
    plan = policy("llama-cpp")(spec, slow_cpu, room, workload)
    assert [part.rest for part in plan.layers] == ["CPU"] * 4
    spans = {span.task: span for span in simulate(spec, plan, slow_cpu, workload).spans}
    names = ("act_h2d", "send0", "cg0", "join", "act_d2h")
    chain = [spans[f"prefill.L02.{name}"] for name in names]
    assert [round(span.duration_s, 6) for span in chain] == [1, 24, 1, 0, 1]
    assert all(a.end_s == b.start_s for a, b in pairwise(chain))
    assert spans["prefill.L03.attn"].start_s == chain[-1].end_s
    assert spans["prefill.L03.attn"].resource == "CPU"


def test_llama_cpp_computes_31_tokens_on_the_cpu_where_ngl_left_them():
    spec, workload = dense(4), Workload(n_prompt=31, n_gen=2)
    slow_cpu = machine(link_gb_s=50, cpu_gflops=0.1)
    plan = policy("llama-cpp")(spec, slow_cpu, activation_bytes(spec, 33, 1) + 98304, workload)
    kinds = {span.kind for span in simulate(spec, plan, slow_cpu, workload).spans}
    assert "cc" in kinds
    assert not kinds & {"send", "cg"}


def test_llama_cpp_feeds_a_long_prompt_in_micro_batches_where_that_is_faster():
    # a micro-batch's activations leave room for MLPs, which the slow link would else send in every decode step
    spec, workload = dense(4, columns=1024, max_position_embeddings=8192), Workload(n_prompt=4096, n_gen=64)
    cut = activation_bytes(spec, 512, 1) + fixed_bytes(Problem(spec, machine(), 0, Workload(1, 1)), 0, "GPU")
    room = cut + sum(spec.kv_bytes(i, 4160) + spec.ffn_bytes(i) for i in range(4))
    slow = machine(cpu_gb_s=0.1, link_gb_s=0.1, cpu_gflops=10)
    assert policy("llama-cpp")(spec, slow, room, workload).chunk_tokens == 512
    assert policy("llama-cpp")(spec, slow, 10**9, workload).chunk_tokens is None


@pytest.mark.parametrize(("cpu_ms_per_token", "copy_ms"), [(7, 70), (1, 70), (70, 7)])
def test_fiddler_copies_an_expert_from_as_many_tokens_on_as_a_copy_is_worth(cpu_ms_per_token, copy_ms):
    # rates scaled to an expert of 3 * 64 * 128 weights; the device itself takes no time
    spec = moe()
    flops, n_bytes = 2 * 3 * 64 * 128, 2 * 3 * 64 * 128
    profile = machine(
        cpu_gb_s=10**6,
        cpu_gflops=flops / cpu_ms_per_token / 1e6,
        link_gb_s=n_bytes / copy_ms / 1e6,
        gpu_gb_s=10**9,
        gpu_gflops=10**12,
    )
    assert crossover_tokens(spec, profile, 1000) == copy_ms // cpu_ms_per_token + 1


def test_fiddler_never_copies_where_no_prompt_is_long_enough():
    assert crossover_tokens(moe(), machine(link_gb_s=1e-6), 100) is None
    assert propose("fiddler", moe(), 0.5, machine(link_gb_s=1e-6)).tiers[0].n_slots == 0


def test_fiddler_keeps_the_most_popular_experts_of_every_layer():
    spec, skewed = moe(3), Workload(40, 4, skew=1.0)
    plan = policy("fiddler")(spec, machine(), budget(spec, skewed, 0.5) + spec.ffn_bytes(0) // 4, skewed)
    for layer, part in enumerate(plan.layers):
        shares = popularity(4, 1.0, 0, layer)
        resident = {e for e in range(4) if part.gg[e]}
        assert resident == set(sorted(range(4), key=lambda e: -shares[e])[:2])


def test_fiddler_is_serial_with_pageable_copies():
    spec = moe()
    plan = propose("fiddler", spec, 0.5)
    assert not plan.pinned
    assert run(spec, plan).overlap == pytest.approx(1.0)


def test_ktransformers_sends_no_weights_in_decode_and_computes_on_both_sides_at_once():
    spec = moe(3, columns=1024)
    plan = propose("ktransformers", spec, 0.5)
    timeline = run(spec, plan)
    assert sent_bytes(timeline, "decode1") == 0
    assert timeline.overlap > 1.0


def test_ktransformers_sends_a_prompt_through_the_gpu_only_where_that_is_faster():
    spec = moe(3, columns=1024)
    fast, slow = machine(link_gb_s=50, cpu_gflops=10), machine(link_gb_s=0.1)
    assert propose("ktransformers", spec, 3.0, fast).tiers[0].n_slots == 0
    for profile, sends in ((fast, True), (slow, False)):
        timeline = run(spec, propose("ktransformers", spec, 0.8, profile), profile)
        assert (sent_bytes(timeline, "prefill") > 0) == sends


def test_mixtral_offloading_swaps_experts_in_both_directions_and_never_asks_the_cpu():
    spec = moe(3, columns=1024, n_experts=8, top_k=2)
    timeline = run(spec, propose("mixtral-offloading", spec, 0.6))
    decode = [s for s in timeline.spans if s.step == "decode2"]
    assert not any(s.kind == "cc" for s in timeline.spans)
    sent, back = (sum(s.bytes for s in decode if s.kind == kind) for kind in ("send", "evict"))
    assert sent == back > 0  # the cache is full
    assert sent % (spec.ffn_bytes(0) / 8) == 0


def test_freetoken_shares_misses_so_that_link_and_cpu_end_together():
    # experts of 3 * 64 * 1024 weights: 5 GB/s on the link, 10 on the CPU: a third of the misses is sent
    spec = moe(2, columns=1024, n_experts=12, top_k=6)
    problem = Problem(spec, machine(), budget(spec, GENERATION, 0.3), GENERATION)
    assert fetch_share(problem) == pytest.approx(1 / 3, abs=0.01)
    both = machine(together=(0.5, 1.0))  # beside the link the CPU is half as fast: then a half
    assert fetch_share(replace(problem, profile=both)) == pytest.approx(1 / 2, abs=0.01)


def test_freetoken_keeps_one_cache_for_all_layers_and_sends_prompts_around_it():
    spec = moe(3, columns=1024, n_experts=8)
    plan = propose("freetoken", spec, 0.9)
    assert plan.cache is not None
    assert (plan.cache.scope, plan.cache.rule) == ("model", "lru")
    timeline = run(spec, plan)
    in_cache = len(plan.cache.first) * spec.ffn_bytes(0) / 8
    assert in_cache > 0
    assert sent_bytes(timeline, "prefill") == 3 * spec.ffn_bytes(0) - in_cache


def test_hybrimoe_lets_the_cpu_take_misses_that_are_not_worth_sending():
    spec = moe(3, columns=1024, n_experts=8)
    slow, fast = machine(link_gb_s=0.01), machine(cpu_gb_s=0.1, link_gb_s=50)
    for profile, kind in ((slow, "cc"), (fast, "send")):
        timeline = run(spec, propose("hybrimoe", spec, 0.5, profile), profile)
        assert {s.kind for s in timeline.spans if s.step == "decode1"} & {"cc", "send"} == {kind}


def test_a_popular_expert_is_more_often_found_in_a_cache():
    spec, rates = moe(2, columns=1024, n_experts=8), []
    for skew in (0.0, 1.0, 2.0):
        skewed = Workload(4, 60, skew=skew)
        plan = policy("freetoken")(spec, machine(), budget(spec, skewed, 0.6), skewed)
        rates.append(simulate(spec, plan, machine(), skewed).info["cache_hit_rate"])
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


def test_scheinfer_cuts_every_layer_alike():
    for spec in (dense(4), moe(3)):
        shares = [sum(part.gg) for part in propose("scheinfer", spec, 0.5).layers]
        unit = max(spec.layers[0].ffn.columns // 16 * spec.layers[0].ffn.n_experts, spec.layers[0].ffn.columns)
        assert max(shares) - min(shares) <= unit


def test_scheinfer_sends_more_in_a_prompt_than_in_decode():
    # the CPU's time grows with tokens, the link's does not
    spec, profile = dense(4, columns=1024), machine(cpu_gflops=20)
    plan = propose("scheinfer", spec, 0.3, profile)
    timeline = run(spec, plan, profile)
    decode, prompt = (
        computed_by(timeline, "cg", step) / computed_by(timeline, "gg", step) for step in ("decode1", "prefill")
    )
    assert prompt > decode


def test_scheinfer_beats_every_serial_policy_by_running_cpu_link_and_gpu_at_once():
    spec = moe(3, columns=1024)
    totals = {
        name: total_s(forecast(spec, propose(name, spec, 0.5), machine(), GENERATION), GENERATION)
        for name in ("scheinfer", "llama-cpp", "fiddler", "stream")
    }
    assert min(totals, key=lambda name: totals[name]) == "scheinfer"


# -- auto --------------------------------------------------------------------------------------------------------


@st.composite
def machines(draw: st.DrawFn) -> HardwareProfile:
    return machine(
        cpu_gb_s=draw(st.sampled_from((2, 10, 50))),
        gpu_gb_s=draw(st.sampled_from((20, 100))),
        link_gb_s=draw(st.sampled_from((1, 5, 40))),
        cpu_gflops=draw(st.sampled_from((5, 100))),
        fixed_s=draw(st.sampled_from((0.0, 1e-6))),
        handoff_s=draw(st.sampled_from((0.0, 1e-6))),
        together=draw(st.sampled_from((None, (0.6, 0.9)))),
    )


@settings(max_examples=12, deadline=None)
@given(machines(), st.sampled_from((dense(3), moe(3))), st.floats(0.0, 1.3), st.sampled_from((2, 40)))
def test_auto_is_at_least_as_fast_as_every_other_policy(profile, spec, share, n_prompt):
    workload = Workload(n_prompt, 4)
    memory_bytes = budget(spec, workload, share)

    def seconds(name: str) -> float:
        try:
            plan = policy(name)(spec, profile, memory_bytes, workload)
        except PlanError:
            return float("inf")
        return total_s(forecast(spec, plan, profile, workload), workload)

    others = {name: seconds(name) for name in POLICIES if name != "auto"}
    assert seconds("auto") <= min(others.values()) * (1 + 1e-9), others


FASTER = {"cpu": {"cpu_gb_s": 20, "cpu_gflops": 200}, "link": {"link_gb_s": 10}, "gpu": {"gpu_gb_s": 200}}


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from((dense(3), moe(2))), st.floats(0.0, 1.3), st.sampled_from((2, 40)), st.sampled_from(list(FASTER))
)
def test_a_faster_machine_is_never_slower_under_auto(spec, share, n_prompt, part):
    workload = Workload(n_prompt, 4)
    now, then = (auto_s(spec, profile, share, workload) for profile in (machine(), machine(**FASTER[part])))
    assert then <= now * (1 + 1e-9)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from((dense(3), moe(2))), st.floats(0.0, 1.3), st.floats(0.0, 0.5), st.sampled_from((2, 40)))
def test_more_device_memory_is_never_slower_under_auto(spec, share, more, n_prompt):
    workload = Workload(n_prompt, 4)
    now, then = (auto_s(spec, machine(), s, workload) for s in (share, share + more))
    assert then <= now * (1 + 1e-9)


def auto_s(spec: ModelSpec, profile: HardwareProfile, share: float, workload: Workload) -> float:
    plan = policy("auto")(spec, profile, budget(spec, workload, share), workload)
    return total_s(forecast(spec, plan, profile, workload), workload)


@pytest.mark.parametrize("spec", [dense(), moe()], ids=["dense", "moe"])
def test_with_memory_for_the_whole_model_auto_is_gpu_only(spec):
    auto, whole = propose("auto", spec, 3.0), propose("gpu-only", spec, 3.0)
    assert auto.layers == whole.layers
    assert run(spec, auto).makespan_s == pytest.approx(run(spec, whole).makespan_s)


def test_without_a_gpu_auto_is_cpu_only():
    auto, cpu = (propose(name, dense(), 0.0, machine(gpu=False)) for name in ("auto", "cpu-only"))
    assert (auto.layers, auto.tiers, auto.ends) == (cpu.layers, cpu.tiers, cpu.ends)


def test_auto_carries_the_prediction_that_it_was_chosen_by():
    plan = propose("auto", dense(), 0.5)
    assert plan.prediction == forecast(dense(), plan, machine(), GENERATION)
