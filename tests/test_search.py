"""Search: exact times for whole spaces at once, and a winner that exhaustive simulation confirms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import PlanError
from hwmodels.profile import Curve, HardwareProfile, Move, Sample
from hwmodels.work import APART, Op
from sim.compile import compile_step
from sim.cost import price
from sim.heap import recur
from sim.layercost import Prices, Sending
from sim.model import ModelSpec
from sim.placement import ORDERS, Filling, granule
from sim.plan import Plan
from sim.policies.problem import Problem, total_s
from sim.search import search
from sim.simulate import forecast, routing_of
from sim.space import Branch, Space, decode_sendings, further_space, paper_space, prompt_sendings
from sim.steptime import StepTimes
from sim.workload import Workload
from tests.machines import GB, budget, dense, llama_70b, machine, mixtral_8x7b, moe, qwen3_30b
from tests.unit_machine import specs

PAIRS = [f"{a}>{b}" for a, b in itertools.product(("CPU", "GPU", "H2D", "D2H"), repeat=2)]


# -- candidates are timed exactly -------------------------------------------------------------------------------


@st.composite
def sendings(draw: st.DrawFn) -> Sending:
    if draw(st.booleans()):
        return Sending(ahead=draw(st.integers(1, 20)), n_slots=2)
    columns = draw(st.none() | st.integers(1, 12))
    return draw(st.sampled_from((Sending(), Sending(0, draw(st.integers(1, 4)), columns, draw(st.integers(1, 4))))))


def apart_curve(op: Op, dtype: str) -> Curve:
    """Work of plans that have the device's layers beside the CPU's takes longer than by the roofline."""
    return Curve("CPU", op, dtype, 4, "measured", (Sample(1, 1e3, 1e3, 1e3, 1e-5, 0.0, 1),))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_times_of_many_candidates_are_those_of_the_engine(data):
    draw = data.draw
    spec = draw(specs())
    rates = {k: draw(st.sampled_from((1.0, 3.0, 10.0))) for k in ("cpu_gb_s", "gpu_gb_s", "link_gb_s")}
    profile = machine(**rates, gpu_gflops=10, cpu_gflops=2, fixed_s=draw(st.sampled_from((0.0, 1e-7))))
    profile = profile.with_(handoff_s=draw(st.dictionaries(st.sampled_from(PAIRS), st.sampled_from((1e-8, 1e-7)))))
    places = draw(st.lists(st.sampled_from(("CPU", "GPU")), unique=True))
    profile = profile.with_(moves=tuple(Move(place, 3e-7, 2e-7, 0.0, "measured") for place in places))
    if draw(st.booleans()):
        profile = profile.with_(curves=tuple(apart_curve(op, spec.dtype) for op in (*APART.values(), "head_prompt")))
    workload = Workload(
        draw(st.integers(1, 9)), 2, batch=draw(st.integers(1, 2)), skew=draw(st.sampled_from((0.0, 1.0)))
    )
    first, ends = draw(st.integers(0, spec.n_layers - 1)), draw(st.sampled_from(("GPU", "CPU")))
    unit = draw(st.sampled_from(("columns", "experts", "layers")))
    filling = Filling(spec, workload, unit, draw(st.sampled_from(ORDERS)), first)
    levels = np.arange(len(filling.sequence) + 1)[:: draw(st.integers(1, 5))]
    ways = draw(st.lists(sendings(), min_size=1, max_size=6))
    step, where = draw(st.sampled_from(workload.steps())), routing_of(spec, workload)

    times = StepTimes(Prices(spec, profile), ((1.0, step),), (tuple(where(step, la) for la in range(spec.n_layers)),))
    fast = times.seconds(filling, ends, levels, ways)[0]

    problem = Problem(spec, profile, 10 * GB, workload)
    for (i, level), (j, way) in itertools.product(enumerate(levels.tolist()), enumerate(ways)):
        plan = problem.plan("", filling.layers(level), [way.tier(spec, "all", 10**6)], pinned=True, ends=ends)
        tasks = compile_step(spec, plan, step, where)
        prices = price(tasks, profile)
        assert fast[i, j] == pytest.approx(max(recur(tasks.arrays, prices.duration_s, prices.lag_s)[1]), rel=1e-9)


# -- the winner -------------------------------------------------------------------------------------------------


def half(spec: ModelSpec, profile: HardwareProfile, workload: Workload) -> Problem:
    """A budget for half of the MLPs."""
    return Problem(spec, profile, budget(spec, workload, 0.5), workload)


def every_plan(problem: Problem, space: Space) -> list[Plan]:
    plans = []
    for part in space.branches:
        for level, d, p in itertools.product(part.levels.tolist(), space.decode, space.prompt):
            workload, layers = problem.workload, part.filling.layers(level)
            tiers = [d.tier(problem.spec, "decode", workload.batch), p.tier(problem.spec, "prompt", 10**6)]
            plan = problem.plan("", layers, tiers, pinned=True, ends=part.ends)
            plans += [plan] if problem.fits(plan) else []
    return plans


def few(space: Space) -> Space:
    """Every third level and every third way of sending: small enough to simulate all."""
    parts = tuple(Branch(b.filling, b.ends, b.fixed_bytes, b.levels[::3]) for b in space.branches)
    return Space(parts, space.decode[::3], space.prompt[::3])


@pytest.mark.parametrize("together", [None, (0.5, 0.9), (0.9, 0.5)], ids=["alone", "cpu-suffers", "link-suffers"])
@pytest.mark.parametrize("spec", [dense(2, columns=32), moe(2, columns=16)], ids=["dense", "moe"])
def test_the_winner_is_the_one_that_exhaustive_simulation_picks(spec, together):
    profile = machine(together=together, fixed_s=1e-7, handoff_s=1e-7)
    problem = half(spec, profile, Workload(3, 3))
    space = few(paper_space(problem))
    found = search(problem, "x", [space], most_simulated=10**6)
    totals = [
        total_s(forecast(spec, p, profile, problem.workload), problem.workload) for p in every_plan(problem, space)
    ]
    assert found.total_s == pytest.approx(min(totals), rel=1e-9)
    assert found.n_candidates == len(totals)
    assert found.certificate.n_left == 0


def test_without_contention_one_simulation_proves_the_winner():
    problem = half(dense(4, columns=64), machine(), Workload(8, 8))
    found = search(problem, "x", [paper_space(problem)])
    told = found.certificate
    assert (told.n_simulated, told.n_left, told.gap) == (1, 0, 0.0)
    assert told.n_pruned == told.n_candidates - 1


def test_what_is_left_of_a_search_is_what_was_not_simulated_and_may_be_faster():
    problem = half(moe(2, columns=16), machine(together=(0.5, 0.9), fixed_s=1e-7), Workload(8, 8))
    space = few(paper_space(problem))
    found = search(problem, "x", [space], most_simulated=1)
    told, proven = found.certificate, search(problem, "x", [space], most_simulated=10**6)
    assert told.n_simulated == 1
    assert told.n_candidates == told.n_pruned + told.n_simulated + told.n_left
    assert told.n_left > 0
    assert 0 < told.gap < 1
    assert proven.total_s >= told.least_left_s  # the promise of the gap
    assert proven.certificate.n_left == 0
    assert found.against(told.least_left_s, n_others=3).n_left == 0  # another plan beats what is left
    assert found.against(told.least_left_s, n_others=3).n_simulated == 4


def test_a_search_is_repeatable():
    problem = half(moe(), machine(together=(0.8, 0.8)), Workload(8, 8))
    assert search(problem, "x", [paper_space(problem)]) == search(problem, "x", [paper_space(problem)])


def test_the_plan_that_is_found_fits_the_budget_and_says_so_if_none_does():
    spec = dense()
    problem = half(spec, machine(), Workload(8, 8))
    assert problem.fits(search(problem, "x", [paper_space(problem)]).plan)
    tight = Problem(spec, machine(), 1000, Workload(8, 8))
    with pytest.raises(PlanError, match="missing"):
        search(tight, "x", [paper_space(tight)])


@pytest.mark.slow
@pytest.mark.parametrize("spec", [mixtral_8x7b(), qwen3_30b(), llama_70b()], ids=lambda spec: spec.name)
def test_large_models_are_searched_among_a_hundred_thousand_candidates(spec):
    profile = machine(cpu_gb_s=60, gpu_gb_s=800, link_gb_s=25, cpu_gflops=1000, gpu_gflops=1e5, fixed_s=5e-6)
    problem = Problem(spec, profile.with_(host_bytes=300 * GB), 40 * GB, Workload(128, 32))
    found = search(problem, "x", [paper_space(problem), further_space(problem)])
    assert found.n_candidates >= 100_000
    assert found.certificate.n_left == 0


# -- what the space holds ----------------------------------------------------------------------------------------


def test_sending_nothing_is_a_candidate_for_decode_and_for_prompts():
    problem = Problem(moe(), machine(), GB, Workload(8, 8))
    assert Sending() in decode_sendings(problem)
    assert Sending() in prompt_sendings(problem)


def test_decode_sends_nothing_where_cpu_and_link_together_do_less_than_the_cpu_alone():
    # CPU 10 GB/s alone; together 4 and 4.5 GB/s: whatever is sent costs more than it saves
    spec = dense(4, columns=1024)
    problem = half(spec, machine(together=(0.4, 0.9)), Workload(8, 64))
    plan = search(problem, "x", [paper_space(problem)]).plan
    assert not any(plan.tiers[0].ahead)


def test_decode_balances_cpu_and_link_by_their_rates():
    # nothing else matters: 10 GB/s on the CPU, 5 GB/s on the link, no device memory for residents
    spec = dense(8, columns=6400)
    profile = machine(gpu_gb_s=10_000)
    bare = Problem(spec, profile, 10**9, Workload(1, 50))
    space = paper_space(bare)
    (part,) = space.branches
    empty = Space((Branch(part.filling, part.ends, part.fixed_bytes, part.levels[:1]),), space.decode, space.prompt)
    plan = search(bare, "x", [empty]).plan
    assert plan.tiers[0].ahead[0] == pytest.approx(6400 / 3, abs=6400 / 32)


@given(st.sampled_from(ORDERS), st.sampled_from(("columns", "experts", "layers")), st.integers(0, 2))
def test_more_units_only_add_columns(order, unit, first):
    filling = Filling(moe(), Workload(1, 1, skew=1.0), unit, order, first)
    columns = np.array([[la.gg for la in filling.layers(n)] for n in range(len(filling.sequence) + 1)])
    assert (np.diff(columns, axis=0) >= 0).all()
    assert columns[0].sum() == 0
    assert (columns[-1, first:] == 128).all()
    assert (columns.sum(axis=(1, 2)) * moe().column_bytes(0) == filling.bytes_of).all()


def test_an_expert_is_cut_in_multiples_of_sixty_four_columns():
    assert all(granule(columns) % 64 == 0 for columns in (256, 768, 1408, 11008, 14336, 28672))
    assert all(columns / granule(columns) <= 128 for columns in (256, 768, 1408, 11008, 14336, 28672))
