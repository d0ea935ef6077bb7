"""Bounds: no plan in simulation is faster, and at the limits the bound is reached."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.profile import Curve, HardwareProfile, Resource, Sample
from sim.bounds import bound
from sim.memory import memory
from sim.model import ModelSpec
from sim.plan import ExpertCache
from sim.planner import decide, explain, plan, rank
from sim.policies import POLICIES
from sim.policies.problem import Problem
from sim.sensitivity import faster_memory, sensitivity
from sim.simulate import simulate
from sim.workload import Workload
from tests.machines import budget, dense, machine, moe
from tests.unit_machine import plans, specs

# -- the law -----------------------------------------------------------------------------------------------------


def ffn_curve(draw: st.DrawFn, resource: Resource, profile: HardwareProfile, spec: ModelSpec) -> Curve:
    """Times around the roofline, also below it, at a few sizes and token counts."""
    peak, sizes = profile.peak(resource), (spec.column_bytes(0), 8 * spec.column_bytes(0))
    samples = []
    for n, size in itertools.product((1, 4), sizes):
        flops, io_bytes = 2.0 * n * size / 4, 2.0 * n * spec.d_model * 4
        roof_s = peak.roofline_s("float32", flops, size + io_bytes)
        samples.append(Sample(n, flops, float(size), io_bytes, roof_s * draw(st.floats(0.5, 3.0)), 0.0, 1))
    return Curve(resource, "ffn", "float32", 1, "measured", tuple(samples))


def copy_curve(draw: st.DrawFn, profile: HardwareProfile) -> Curve:
    rate = profile.peak("H2D").bytes_per_s
    samples = [Sample(1, 0.0, 0.0, float(n), n / rate * draw(st.floats(0.8, 3.0)), 0.0, 1) for n in (100, 1000, 5000)]
    return Curve("H2D", "pinned", "float32", 1, "measured", tuple(samples))


@st.composite
def profiles(draw: st.DrawFn, spec: ModelSpec) -> HardwareProfile:
    rates = {k: draw(st.sampled_from((1.0, 5.0, 30.0))) for k in ("cpu_gb_s", "gpu_gb_s", "link_gb_s")}
    slowed = {k: draw(st.sampled_from(((0.5, 0.7), (1.0, 0.2)))) for k in ("together", "computing")}
    handoff_s = draw(st.sampled_from((0.0, 1e-7)))
    profile = machine(**rates, **slowed, gpu_gflops=20, cpu_gflops=3, handoff_s=handoff_s)
    curves = [ffn_curve(draw, name, profile, spec) for name in ("CPU", "GPU") if draw(st.booleans())]
    curves += [copy_curve(draw, profile)] if draw(st.booleans()) else []
    return profile.with_(curves=tuple(curves))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_plan_beats_the_bound(data):
    spec = data.draw(specs())
    profile = data.draw(profiles(spec))
    workload = Workload(data.draw(st.integers(1, 9)), 4, batch=data.draw(st.integers(1, 2)), skew=1.0)
    made = replace(data.draw(plans(spec)), n_ctx=workload.n_ctx, batch=workload.batch)
    limit = bound(spec, profile, memory(spec, made).vram_bytes, workload, made.cache is not None)
    for contention in (False, True):
        timeline = simulate(spec, made, profile, workload, contention=contention)
        assert limit.prefill_s <= timeline.ttft_s * (1 + 1e-9)
        assert limit.decode_s <= timeline.tpot_s * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_expert_cache_beats_the_bound_of_caches(data):
    spec, n_slots = moe(2, n_experts=6), data.draw(st.integers(1, 9))
    profile = data.draw(profiles(spec))
    workload = Workload(data.draw(st.integers(1, 9)), 12, batch=data.draw(st.integers(1, 2)), skew=2.0)
    bare = replace(data.draw(plans(spec)), n_ctx=workload.n_ctx, batch=workload.batch, cache=None)
    bare = replace(bare, tiers=(replace(bare.tiers[0], ahead=(0,) * 2, fetch_share=1.0, balance=None),))
    made = replace(bare, cache=ExpertCache("model", "lru", n_slots, ()))
    limit = bound(spec, profile, memory(spec, made).vram_bytes, workload, cached=True)
    timeline = simulate(spec, made, profile, workload, contention=False)
    assert limit.decode_s <= timeline.tpot_s * (1 + 1e-9)
    assert limit.decode_s <= bound(spec, profile, memory(spec, made).vram_bytes, workload).decode_s * (1 + 1e-3)


@settings(max_examples=6, deadline=None)
@given(st.sampled_from((dense(3), moe(2))), st.floats(0.0, 1.3), st.booleans())
def test_the_best_plan_known_does_not_beat_the_bound_either(spec, share, contended):
    workload = Workload(20, 4)
    profile = machine(together=(0.7, 0.8), computing=(0.9, 0.8)) if contended else machine()
    limit = bound(spec, profile, budget(spec, workload, share), workload)
    made = plan(spec, profile, budget(spec, workload, share), workload)
    timeline = simulate(spec, made, profile, workload)
    assert limit.prefill_s <= timeline.ttft_s * (1 + 1e-9)
    assert limit.decode_s <= timeline.tpot_s * (1 + 1e-9)


@given(st.sampled_from((dense(), moe())), st.floats(0.0, 1.5), st.floats(0.0, 1.0))
@settings(max_examples=6, deadline=None)
def test_more_device_memory_never_raises_the_bound(spec, share, more):
    workload = Workload(8, 4)
    now, then = (bound(spec, machine(), budget(spec, workload, s), workload) for s in (share, share + more))
    assert then.decode_s <= now.decode_s * (1 + 1e-3)  # multipliers are searched on a grid
    assert then.prefill_s <= now.prefill_s * (1 + 1e-3)


# -- at the limits -----------------------------------------------------------------------------------------------


def test_without_a_gpu_the_bound_is_the_cpu_alone():
    spec, profile, workload = moe(), machine(gpu=False), Workload(8, 4)
    limit = bound(spec, profile, 0, workload)
    timeline = simulate(spec, plan(spec, profile, 0, workload, "cpu-only"), profile, workload)
    assert (limit.prefill_s, limit.decode_s) == pytest.approx((timeline.ttft_s, timeline.tpot_s))
    assert limit.decode_binds == "CPU"


def test_with_everything_resident_and_a_slow_cpu_the_bound_is_the_gpu_alone():
    spec, profile, workload = dense(), machine(cpu_gb_s=0.001, link_gb_s=0.001, cpu_gflops=0.001), Workload(8, 4)
    limit = bound(spec, profile, 10**9, workload)
    timeline = simulate(spec, plan(spec, profile, 10**9, workload, "gpu-only"), profile, workload)
    assert (limit.prefill_s, limit.decode_s) == pytest.approx((timeline.ttft_s, timeline.tpot_s), rel=0.05)
    assert limit.decode_binds == "GPU"


def test_with_nothing_resident_cpu_and_link_share_the_weights():
    # 10 GB/s on the CPU and 5 GB/s on the link, an endless GPU: MLP bytes / 15 GB/s
    spec, workload = dense(8, columns=6400), Workload(1, 20)
    limit = bound(spec, machine(gpu_gb_s=10_000), budget(spec, workload, 0.0), workload)
    weights = sum(spec.ffn_bytes(i) for i in range(spec.n_layers))
    assert limit.decode_s == pytest.approx(weights / 15e9, rel=0.02)


def test_a_prompt_is_bound_by_the_link_where_the_cpu_cannot_compute_it():
    spec, workload = dense(8, columns=6400), Workload(500, 1)
    limit = bound(spec, machine(cpu_gflops=0.1), budget(spec, workload, 0.0), workload)
    weights = sum(spec.ffn_bytes(i) for i in range(spec.n_layers))
    assert limit.prefill_binds == "H2D"
    assert limit.prefill_s == pytest.approx(weights / 5e9, rel=0.05)


def test_a_generation_of_one_token_has_no_decode_bound():
    limit = bound(dense(), machine(), 10**9, Workload(8, 1))
    assert (limit.decode_s, limit.decode_tok_s) == (0.0, 0.0)
    assert limit.total_s(1) == limit.prefill_s


def test_tokens_per_second_count_all_sequences():
    limit = bound(dense(), machine(), 10**9, Workload(8, 4, batch=3))
    assert limit.prefill_tok_s == pytest.approx(24 / limit.prefill_s)
    assert limit.decode_tok_s == pytest.approx(3 / limit.decode_s)


# -- what would help ---------------------------------------------------------------------------------------------


def test_twice_the_bandwidth_halves_measured_times_but_not_below_arithmetic():
    # 2 s measured, 1.5 s of it arithmetic at peak
    sample = Sample(1, 150e9, 10.0, 0.0, 2.0, 0.0, 1)
    slow = replace(sample, flops=10e9)
    curve = Curve("CPU", "ffn", "bfloat16", 1, "measured", (sample, replace(slow, n_tokens=2)))
    faster = faster_memory(machine(cpu_gflops=100).with_(curves=(curve,)), ("CPU",), 2.0)
    assert [s.median_s for s in faster.curves[0].samples] == [1.5, 1.0]
    assert faster.peak("CPU").bytes_per_s == 20e9


def test_sensitivity_ranks_what_would_help_most():
    # a link far behind the CPU: only the CPU's memory matters, or holding all
    spec, workload = dense(4, columns=25600), Workload(2, 8)
    problem = Problem(spec, machine(link_gb_s=0.2), budget(spec, workload, 0.3), workload)
    gains = sensitivity(problem, decide(problem, "scheinfer"))
    by_change = {gain.change: gain.speedup for gain in gains}
    assert gains[0].change == "one more GiB of device memory"  # the whole model
    assert by_change["CPU memory twice as fast"] > 1.3
    assert by_change["a link twice as fast"] == pytest.approx(1.0, abs=0.1)
    assert [g.speedup for g in gains] == sorted(by_change.values(), reverse=True)


# -- the planner's words -----------------------------------------------------------------------------------------


def test_rank_sorts_by_time_and_gives_a_reason_for_what_does_not_fit():
    spec, workload = moe(), Workload(20, 4)
    ranked = rank(spec, machine(), budget(spec, workload, 0.9), workload)
    seconds = [r.total_s for r in ranked if r.total_s is not None]
    assert seconds == sorted(seconds)
    assert {r.policy for r in ranked} == set(POLICIES)
    assert "auto" in {r.policy for r in ranked if r.total_s == seconds[0]}
    unfit = {r.policy: r.reason for r in ranked if r.plan is None}
    assert "are missing" in unfit.pop("gpu-only")
    assert all("are missing" in reason for reason in unfit.values())


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"gpu-only"}))
def test_an_explanation_names_memory_shares_speed_bound_and_reason(name):
    spec, workload = moe(), Workload(20, 4)
    made = plan(spec, machine(), budget(spec, workload, 0.9), workload, name)
    told = explain(spec, machine(), made, workload)
    for words in ("device", "host", "decode", "prefill", "TTFT", "TPOT", "of the hardware's bound", "busiest", "Why"):
        assert words in told
    shares = [line for line in told.splitlines() if "CC" in line and "GG" in line]
    assert len(shares) == 2


def test_a_plan_of_the_planner_is_predicted():
    made = plan(dense(), machine(), 10**9, Workload(8, 4), "stream")
    assert made.prediction is not None
    assert made.prediction.ttft_s > 0
    assert np.isfinite(made.prediction.tpot_s)
