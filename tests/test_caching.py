"""The expert cache: who is found in it, who leaves it, who is sent, and what that costs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import FormatError, PlanError
from sim.caching import CacheState, CacheWalk, Use, balanced
from sim.compile import compile_step
from sim.graph import TaskGraph
from sim.memory import cache_slot_bytes, memory
from sim.model import ModelSpec
from sim.plan import Balance, ExpertCache, Plan, Tier, check_plan, load_plan
from sim.simulate import forecast, representative, routing_of, simulate
from sim.workload import Routing, RoutingTrace, Step, Workload
from tests import unit_machine
from tests.machines import machine
from tests.unit_machine import moe, plans, uniform

ONE = moe(n_layers=1, n_experts=6)


def cached_plan(
    spec: ModelSpec = ONE, n_slots: int = 2, fetch_share: float = 1.0, how: Tier | None = None, **cache: object
) -> Plan:
    """Experts on the host, a cache of n_slots per layer; misses are sent into it."""
    fields: dict[str, object] = {"scope": "layer", "rule": "lru", "first": (), **cache}
    plan = uniform(spec, n_slots=0)
    tier = how or replace(plan.tiers[0], fetch_share=fetch_share)
    return replace(plan, cache=ExpertCache(n_slots=n_slots, **fields), tiers=(tier,))  # type: ignore[arg-type]


def chosen(*experts: int, n: int = 6) -> Routing:
    return tuple(int(e in experts) for e in range(n))


def use(state: CacheState, plan: Plan, *experts: int, layer: int = 0) -> Use:
    return state.use(layer, plan.tiers[0], plan.layers[layer].gg, 12, chosen(*experts))


def names(tasks: TaskGraph) -> list[str]:
    return [f"{t.id.split('.')[-1]} {t.resource}" for t in tasks if t.layer == 0]


# -- what lies in it ----------------------------------------------------------------------------------


def test_the_expert_used_longest_ago_leaves() -> None:
    plan = cached_plan(n_slots=3, first=((0, 0), (0, 1), (0, 2)))
    state = CacheState.of(ONE, plan)
    found = use(state, plan, 0, 3)  # 0 is found; 3 takes the place of 1
    assert [p.expert for p in found.hits] == [0]
    assert [f.part.expert for f in found.fetched] == [3]
    assert state.contents == ((0, 2), (0, 0), (0, 3))
    assert state.hit_rate == 0.5


def test_the_expert_with_the_lowest_score_leaves() -> None:
    plan = cached_plan(n_slots=2, rule="score")
    state = CacheState.of(ONE, plan)
    use(state, plan, 0, 1)
    use(state, plan, 0, 2)  # scores 0: 1/4 + 1/8, 1: 1/8, 2: 1/4: the one not in use with least is 1
    assert state.contents == ((0, 0), (0, 2))
    use(state, plan, 3, 4)
    assert {e for _, e in state.contents} == {3, 4}


def test_an_expert_in_use_never_leaves() -> None:
    plan = cached_plan(n_slots=2, first=((0, 0), (0, 1)))
    state = CacheState.of(ONE, plan)
    found = use(state, plan, 0, 1, 2)
    assert [p.expert for p in found.hits] == [0, 1]
    assert not found.fetched
    assert 2 not in found.experts  # as if there were no cache


def test_layers_share_the_slots_of_a_cache_of_the_model_and_not_those_of_layers() -> None:
    spec = moe(n_layers=2, n_experts=6)
    for scope, left in (("model", ((1, 4), (1, 5))), ("layer", ((0, 0), (0, 1), (1, 4), (1, 5)))):
        plan = cached_plan(spec, n_slots=2, scope=scope)
        state = CacheState.of(spec, plan)
        use(state, plan, 0, 1)
        use(state, plan, 4, 5, layer=1)
        assert state.contents == left


def test_a_share_of_the_misses_is_sent_those_used_last_first() -> None:
    plan = cached_plan(n_slots=2, fetch_share=0.5)
    state = CacheState.of(ONE, plan)
    assert [f.part.expert for f in use(state, plan, 0, 1, 2, 3).fetched] == [0, 1]
    use(state, plan, 5)  # half of one miss: rounded up, sent
    found = use(state, plan, 2, 3, 4)  # one and a half of three misses: two; 4 was never used
    assert [f.part.expert for f in found.fetched] == [2, 3]


def test_two_clocks_split_the_experts_between_gpu_and_cpu() -> None:
    # GPU 1 s each, a send 3 s, CPU 2 s per token. Queue: cached 0 (2 tokens), misses 1 (2), 2 (1), 3 (1).
    # 0 to the GPU at 1; then 1 would end there at 4, 3 on the CPU at 2: CPU; 2 at 4 on either: GPU takes 1 ...
    taken = balanced(Balance(1.0, 3.0, 0.0, 2.0), (2, 2, 1, 1), [0], [1, 2, 3])
    assert taken == ([0], [1])  # and 2, which the GPU would end at 7, the CPU at 4


def test_a_cpu_that_is_fast_enough_takes_cached_experts_too() -> None:
    assert balanced(Balance(10.0, 1.0, 0.0, 1.0), (1, 1, 1), [0, 1, 2], []) == ([], [])


# -- tasks --------------------------------------------------------------------------------------------


def test_a_hit_is_computed_where_it_lies_and_a_miss_after_it_arrived() -> None:
    plan = cached_plan(n_slots=2, first=((0, 4), (0, 1)))
    tasks = compile_step(ONE, plan, Step("decode1", 1, 9), lambda *_: chosen(1, 2))
    assert names(tasks) == ["attn GPU", "send2 H2D", "gg GPU", "cg2 GPU", "join GPU"]
    by_name = {t.id.split(".")[-1]: t for t in tasks}
    assert [(p.expert, p.cached) for p in by_name["gg"].parts] == [(1, 1)]
    assert by_name["cg2"].deps == (by_name["send2"].id,)
    assert by_name["send2"].bytes == 12 * ONE.column_bytes(0)


def test_an_expert_that_is_written_back_leaves_while_the_next_one_arrives() -> None:
    plan = cached_plan(n_slots=1, n_spare=1, first=((0, 4),), writeback=True)
    tasks = compile_step(ONE, plan, Step("decode1", 1, 9), lambda *_: chosen(2))
    by_name = {t.id.split(".")[-1]: t for t in tasks}
    assert by_name["evict4"].resource == "D2H"
    assert by_name["evict4"].id not in by_name["send2"].deps  # a spare slot
    without = compile_step(
        ONE, cached_plan(n_slots=1, first=((0, 4),), writeback=True), Step("decode1", 1, 9), lambda *_: chosen(2)
    )
    send = next(t for t in without if t.kind == "send")
    assert any(dep.endswith("evict4") for dep in send.deps)


def test_what_is_sent_ahead_leaves_out_what_is_in_the_cache() -> None:
    how = unit_machine.tier(ONE, ahead=12)
    plan = cached_plan(n_slots=2, how=how, first=((0, 4), (0, 1)))
    tasks = compile_step(ONE, plan, Step("prefill", 6, 6), lambda *_: (2,) * 6)
    (send,) = [t for t in tasks if t.kind == "send"]
    assert [p.expert for p in send.parts] == [0, 2, 3, 5]
    (gg,) = [t for t in tasks if t.kind == "gg"]
    assert [p.expert for p in gg.parts] == [1, 4]


Generated = tuple[ModelSpec, Plan, Workload]


@st.composite
def generations(draw: st.DrawFn) -> Generated:
    spec = moe(draw(st.integers(1, 3)), 6, draw(st.integers(2, 5)), 2)
    plan, workload = draw(plans(spec)), Workload(draw(st.integers(1, 5)), 5, seed=draw(st.integers(0, 9)), skew=1.0)
    return spec, replace(plan, n_ctx=workload.n_ctx), workload


@settings(max_examples=200, deadline=None)
@given(generations())
def test_a_slot_holds_what_is_read_from_it_until_it_was_read(made: Generated) -> None:
    spec, plan, workload = made
    if plan.cache is None:
        return
    where = routing_of(spec, workload)
    walk = CacheWalk(spec, plan, workload.steps(), where)
    state = CacheState.of(spec, plan)
    holds = {state.slot(layer, e): (layer, e) for layer, e in state.contents}
    for step in workload.steps():
        tasks = compile_step(spec, plan, step, where, walk.before(step))
        before: list[set[int]] = []
        for row in tasks.arrays.deps:
            before.append(set(row).union(*(before[j] for j in row)))
        readers: dict[int, list[int]] = defaultdict(list)
        for i, task in enumerate(tasks):
            for part in (p for p in task.parts if p.cached >= 0):
                if task.kind == "send":
                    assert before[i] >= set(readers.pop(part.cached, []))
                    assert task.bytes <= cache_slot_bytes(spec, plan)
                    holds[part.cached] = (task.layer, part.expert)
                assert holds[part.cached] == (task.layer, part.expert)
                readers[part.cached].append(i)


@settings(max_examples=60, deadline=None)
@given(generations())
def test_a_cache_never_outgrows_its_memory(made: Generated) -> None:
    spec, plan, workload = made
    if plan.cache is None:
        return
    walk = CacheWalk(spec, plan, workload.steps(), routing_of(spec, workload))
    for step in workload.steps():
        state = walk.before(step)
        assert state is not None
        compile_step(spec, plan, step, routing_of(spec, workload), state)
        assert len(state.contents) * cache_slot_bytes(spec, plan) <= memory(spec, plan).cache
        assert len(set(state.contents)) == len(state.contents)
        slots = [state.slot(*key) for key in state.contents]
        assert len(set(slots)) == len(slots)


# -- generations --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(generations())
def test_a_short_generation_is_forecast_exactly(made: Generated) -> None:
    spec, plan, workload = made
    timeline = simulate(spec, plan, machine(), workload)
    said = forecast(spec, plan, machine(), workload)
    assert (said.ttft_s, said.tpot_s) == pytest.approx((timeline.ttft_s, timeline.tpot_s))


def test_a_long_generation_is_forecast_from_a_few_steps() -> None:
    spec = moe(n_layers=4, columns=64, n_experts=8)
    plan = replace(cached_plan(spec, n_slots=3), n_ctx=200)
    for skew in (0.0, 1.5):
        workload = Workload(20, 100, skew=skew)
        timeline, said = simulate(spec, plan, machine(), workload), forecast(spec, plan, machine(), workload)
        assert said.tpot_s == pytest.approx(timeline.tpot_s, rel=0.01)


def test_a_replayed_run_begins_with_what_the_cache_held() -> None:
    plan, workload = replace(cached_plan(n_slots=2), n_ctx=64), Workload(1, 2)
    routing = {("prefill", 0): chosen(0, 1), ("decode1", 0): chosen(0, 1)}
    cold = simulate(ONE, plan, machine(), workload, RoutingTrace(routing, ()))
    warm = simulate(ONE, plan, machine(), workload, RoutingTrace(routing, ((0, 1), (0, 0))))
    assert (cold.info["cache_hit_rate"], warm.info["cache_hit_rate"]) == (0.5, 1.0)
    assert not any(s.kind == "send" for s in warm.spans)


def test_a_trace_keeps_the_contents_of_the_cache_in_its_file(tmp_path) -> None:
    trace = RoutingTrace({("prefill", 0): chosen(0, 1)}, ((0, 5), (0, 2)))
    trace.save(tmp_path / "routing.parquet")
    assert RoutingTrace.load(tmp_path / "routing.parquet") == trace


def test_hits_of_uniform_routing_are_the_share_that_fits() -> None:
    # two of six experts per token at random: a cache of three is hit half of the time
    plan, workload = cached_plan(n_slots=3), Workload(1, 800)
    walk = CacheWalk(ONE, plan, workload.steps(), routing_of(ONE, workload))
    walk.before(workload.steps()[-1])
    assert walk.info()["cache_hit_rate"] == pytest.approx(0.5, abs=0.05)


def test_representative_steps_see_the_cache_as_the_skipped_steps_left_it() -> None:
    spec, workload = moe(n_layers=2, n_experts=6), Workload(4, 40, skew=1.0)
    plan = replace(cached_plan(spec, n_slots=2), n_ctx=64)
    whole = simulate(spec, plan, machine(), workload).step_s
    some = simulate(spec, plan, machine(), workload, every_step=False).step_s
    assert set(some) == {step.name for step in representative(workload)}
    assert all(some[name] == pytest.approx(whole[name]) for name in some)


# -- what is wrong with a plan -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_slots": 0}, "at least 1"),
        ({"scope": "model", "writeback": True}, "needs scope layer"),
        ({"first": ((0, 1), (0, 1))}, "different experts"),
        ({"first": ((0, 1), (0, 2), (0, 3))}, "at most 2 per pool"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(tmp_path, changes, words) -> None:
    plan = cached_plan()
    assert plan.cache is not None
    replace(plan, cache=replace(plan.cache, **changes)).save(tmp_path / "plan.json")
    with pytest.raises(FormatError, match=words):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fetch_share": 1.5}, "from 0 to 1"),
        ({"fetch_share": 1.0, "ahead": (3,), "n_slots": 2}, "does one of both"),
        ({"fetch_share": 1.0, "balance": Balance(1, 1, 1, 1)}, "not together"),
        ({"fetch_share": 0.0, "balance": Balance(1, 1, 1, -1)}, "zero or more"),
    ],
)
def test_a_tier_that_fetches_two_ways_is_refused(tmp_path, changes, words) -> None:
    plan = cached_plan()
    replace(plan, tiers=(replace(plan.tiers[0], **changes),)).save(tmp_path / "plan.json")
    with pytest.raises(FormatError, match=words):
        load_plan(tmp_path / "plan.json")
    replace(cached_plan(), cache=None).save(tmp_path / "plan.json")
    with pytest.raises(FormatError, match="the plan has none"):
        load_plan(tmp_path / "plan.json")


def test_experts_that_are_not_there_cannot_be_cached() -> None:
    with pytest.raises(PlanError, match="layer 0, expert 9"):
        check_plan(cached_plan(first=((0, 9),)), ONE)
    resident = replace(cached_plan(first=((0, 1),)), layers=uniform(ONE, gg=(0, 12, 0, 0, 0, 0)).layers)
    with pytest.raises(PlanError, match="layer 0, expert 1"):
        check_plan(resident, ONE)
