"""What a layer issues in each mode, and that no plan computes a column twice or overwrites a slot too early."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.compile import StepCompiler, compile_step
from sim.graph import Task, TaskGraph
from sim.heap import recur
from sim.memory import slot_bytes
from sim.model import ModelSpec
from sim.plan import LayerPartition, Plan, check_plan
from sim.workload import Routing, Step, Workload, sample_routing
from tests.unit_machine import dense, moe, on_cpu, plan_of, plans, specs, steps, tier, uniform

DECODE = Step("decode1", 1, 9)
ONE = dense(n_layers=1)


def compiled(spec: ModelSpec, plan: Plan, step: Step = DECODE, routing: Routing | None = None) -> TaskGraph:
    check_plan(plan, spec)
    workload = Workload(4, 4)
    return compile_step(spec, plan, step, lambda at, la: routing or sample_routing(spec, la, at, workload))


def issued(tasks: TaskGraph, layer: int = 0) -> list[str]:
    """A layer's tasks in issue order as "name resource"."""
    return [f"{task.id.split('.')[-1]} {task.resource}" for task in tasks if task.layer == layer]


def deps(tasks: TaskGraph, name: str, layer: int = 0) -> set[str]:
    """What a task of a layer waits for, by the last part of the ids."""
    task = tasks.tasks[tasks.index[f"decode1.L{layer:02d}.{name}"]]
    return {dep.split(".")[-1] for dep in task.deps}


# -- one layer in each mode ---------------------------------------------------------------------------


def test_an_overlapping_dense_layer_cut_in_three_runs_its_parts_side_by_side() -> None:
    # attn -> act_d2h -> cc -> act_h2d -> join
    #      -> gg ------------------------^
    # send -> cg ------------------------^    sent before the layer began
    tasks = compiled(ONE, uniform(ONE, gg=3, ahead=4))
    assert issued(tasks) == [
        "send H2D",
        "attn GPU",
        "act_d2h D2H",
        "cc CPU",
        "gg GPU",
        "cg GPU",
        "act_h2d H2D",
        "join GPU",
    ]
    assert deps(tasks, "send") == set()
    assert deps(tasks, "act_d2h") == deps(tasks, "gg") == {"attn"}
    assert deps(tasks, "cc") == {"act_d2h"}
    assert deps(tasks, "cg") == {"attn", "send"}
    assert deps(tasks, "act_h2d") == {"cc"}
    assert deps(tasks, "join") == {"gg", "cg", "act_h2d"}


def test_columns_of_the_next_layer_are_sent_while_this_one_computes() -> None:
    spec = dense(n_layers=2)
    tasks = compiled(spec, uniform(spec, gg=3, ahead=4))
    order = [task.id.removeprefix("decode1.") for task in tasks if task.resource in ("H2D", "GPU")]
    assert order.index("L01.send") < order.index("L00.join") < order.index("L01.attn")
    assert deps(tasks, "send", layer=1) == set()  # the second slot is free


def test_a_serial_layer_does_one_thing_after_the_other() -> None:
    tasks = compiled(ONE, uniform(ONE, gg=3, ahead=4, overlap=False, n_slots=1))
    names = ["attn", "gg", "send", "cg", "act_d2h", "cc", "act_h2d", "join"]
    assert [name.split()[0] for name in issued(tasks)] == names
    for before, after in pairwise(names):
        assert before in deps(tasks, after)


def test_an_expert_is_sent_after_the_router_if_enough_tokens_chose_it() -> None:
    spec = moe(n_layers=1)
    tasks = compiled(spec, uniform(spec, stream_min_tokens=3), Step("decode1", 4, 8, 4), routing=(4, 3, 1, 0))
    assert issued(tasks) == [
        "attn GPU",
        "act_d2h D2H",
        "cc CPU",  # expert 2
        "send0 H2D",
        "send1 H2D",
        "cg0 GPU",
        "cg1 GPU",
        "act_h2d H2D",
        "join GPU",
    ]
    assert deps(tasks, "send0") == deps(tasks, "send1") == {"attn"}
    cc = tasks.tasks[tasks.index["decode1.L00.cc"]]
    assert [(p.expert, p.start, p.stop, p.n_tokens) for p in cc.parts] == [(2, 0, 12, 1)]


def test_a_part_of_a_sent_expert_may_stay_with_the_cpu() -> None:
    spec = moe(n_layers=1)
    plan = uniform(spec, gg=2, stream_min_tokens=1, stream_columns=4)
    parts = {task.kind: task.parts for task in compiled(spec, plan, routing=(1, 0, 0, 1)) if task.parts}
    assert [(p.expert, p.start, p.stop) for p in parts["gg"]] == [(0, 0, 2), (3, 0, 2)]
    assert [(p.expert, p.start, p.stop) for p in parts["cg"]] == [(3, 2, 6)]  # the last of the two
    assert [(p.expert, p.start, p.stop) for p in parts["cc"]] == [(0, 6, 12), (3, 6, 12)]


def test_a_send_waits_for_the_reader_of_the_slot_it_overwrites() -> None:
    spec = moe(n_layers=1)
    tasks = compiled(spec, uniform(spec, stream_min_tokens=1, n_slots=2), Step("decode1", 2, 8, 2), routing=(1,) * 4)
    slots = {task.id.split(".")[-1]: task.slot for task in tasks if task.slot >= 0}
    assert slots == {"send0": 0, "cg0": 0, "send1": 1, "cg1": 1, "send2": 0, "cg2": 0, "send3": 1, "cg3": 1}
    assert deps(tasks, "send2") == {"attn", "cg0"}
    assert deps(tasks, "send3") == {"attn", "cg1"}


def test_columns_sent_ahead_are_sent_for_every_expert_and_computed_for_those_chosen() -> None:
    spec = moe(n_layers=1)
    tasks = compiled(spec, uniform(spec, gg=8, ahead=4), routing=(1, 0, 1, 0))
    parts = {task.kind: [p.expert for p in task.parts] for task in tasks}
    assert parts["send"] == [0, 1, 2, 3]
    assert parts["cg"] == [0, 2]
    assert "cc" not in parts


@pytest.mark.parametrize("overlap", [True, False])
def test_what_nobody_chose_is_sent_and_not_computed(overlap: bool) -> None:
    spec = moe(n_layers=1)
    plan = uniform(spec, gg=(12, 12, 0, 0), ahead=4, overlap=overlap)
    kinds = [task.kind for task in compiled(spec, plan, routing=(1, 1, 0, 0))]
    assert kinds.count("send") == 1
    assert "cg" not in kinds


def test_a_fully_resident_layer_moves_nothing() -> None:
    assert issued(compiled(ONE, uniform(ONE, gg=12))) == ["attn GPU", "gg GPU", "join GPU"]


def test_a_machine_without_device_uses_the_cpu_alone() -> None:
    spec = moe()
    tasks = compiled(spec, on_cpu(spec))
    assert {task.resource for task in tasks} == {"CPU"}
    assert issued(tasks) == ["attn CPU", "cc CPU"]


def test_the_hidden_state_moves_where_the_place_changes() -> None:
    # embed CPU | layer 0 GPU | layer 1 CPU | head GPU
    spec = dense(n_layers=2)
    plan = plan_of(spec, [LayerPartition("GPU", (12,)), LayerPartition("CPU", (0,))], tier(spec), ends="GPU")
    names = [task.id.removeprefix("decode1.") for task in compiled(spec, plan)]
    assert names == [
        "embed",
        "L00.attn",
        "L00.gg",
        "L00.join",
        "L01.hidden_d2h",
        "L01.attn",
        "L01.cc",
        "L02.hidden_h2d",
        "head",
        "sample",
    ]


def test_the_number_of_tokens_chooses_the_tier() -> None:
    spec = dense(n_layers=1)
    plan = plan_of(
        spec,
        [LayerPartition("GPU", (0,))],
        tier(spec, max_tokens=1),
        tier(spec, max_tokens=16, stream_min_tokens=1),
    )
    kinds = {n: {task.kind for task in compiled(spec, plan, Step("decode1", n, n, n))} for n in (1, 2, 16, 17)}
    assert "send" not in kinds[1]
    assert all("send" in kinds[n] and "cc" not in kinds[n] for n in (2, 16, 17))


def test_bytes_and_flops_of_a_cut_are_those_of_the_whole() -> None:
    whole, cut = (compiled(ONE, uniform(ONE, gg=gg, ahead=ahead)) for gg, ahead in ((12, 0), (3, 4)))
    computed = ("gg", "cg", "cc")
    assert sum(t.flops for t in cut if t.kind in computed) == sum(t.flops for t in whole if t.kind in computed)
    weights = [sum(w.weight_bytes for t in g if t.kind in computed for w in t.works) for g in (whole, cut)]
    assert weights == [ONE.ffn_bytes(0)] * 2
    assert [t.bytes for t in cut if t.kind == "send"] == [4 * ONE.column_bytes(0)]


# -- laws, for any plan -------------------------------------------------------------------------------


@st.composite
def compilations(draw: st.DrawFn) -> tuple[ModelSpec, Plan, Step, dict[int, Routing], TaskGraph]:
    spec = draw(specs())
    plan, step, workload = draw(plans(spec)), draw(steps()), Workload(4, 4, seed=draw(st.integers(0, 99)), skew=1.0)
    check_plan(plan, spec)
    routing = {layer: sample_routing(spec, layer, step, workload) for layer in range(spec.n_layers)}
    return spec, plan, step, routing, compile_step(spec, plan, step, lambda _, layer: routing[layer])


Compiled = tuple[ModelSpec, Plan, Step, dict[int, Routing], TaskGraph]


def ancestors(tasks: TaskGraph) -> list[set[int]]:
    """Positions of everything that must have ended before each task starts, by dependencies alone."""
    before: list[set[int]] = []
    for row in tasks.arrays.deps:
        before.append(set(row).union(*(before[j] for j in row)))
    return before


@settings(max_examples=400, deadline=None)
@given(compilations())
def test_every_column_of_every_chosen_expert_is_computed_exactly_once_for_all_its_tokens(made: Compiled) -> None:
    spec, _, _, routing, tasks = made
    computed: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
    for task in tasks:
        if task.kind in ("cc", "cg", "gg"):
            for part in task.parts:
                computed[task.layer, part.expert].append((part.start, part.stop, part.n_tokens))
    for layer, row in routing.items():
        for expert, n_tokens in enumerate(row):
            at = 0
            for start, stop, n in sorted(computed.pop((layer, expert), [])):
                assert (start, n) == (at, n_tokens)
                at = stop
            assert at == (spec.layers[layer].ffn.columns if n_tokens else 0)
    assert not computed


@settings(max_examples=400, deadline=None)
@given(compilations())
def test_each_class_is_computed_where_it_belongs_from_columns_that_are_there(made: Compiled) -> None:
    _, plan, _, _, tasks = made
    for task in tasks:
        resident = plan.layers[task.layer].gg if task.layer in range(len(plan.layers)) else ()
        if task.kind == "gg":
            assert task.resource == "GPU"
            assert all(part.cached >= 0 or part.stop <= resident[part.expert] for part in task.parts)
        elif task.kind in ("cc", "send"):
            assert task.resource == ("CPU" if task.kind == "cc" else "H2D")
            assert all(part.start >= resident[part.expert] for part in task.parts)
        elif task.kind == "cg":
            sends = [tasks.tasks[tasks.index[dep]] for dep in task.deps]
            (send,) = [s for s in sends if s.kind == "send" and s.slot == task.slot and s.layer == task.layer]
            assert [p.cached for p in task.parts] == [p.cached for p in send.parts] or task.slot >= 0
            sent = {part.expert: (part.start, part.stop) for part in send.parts}
            assert all(sent[part.expert] == (part.start, part.stop) for part in task.parts)


@settings(max_examples=400, deadline=None)
@given(compilations())
def test_no_slot_is_overwritten_before_its_reader_ran_and_every_send_fits_one(made: Compiled) -> None:
    spec, plan, step, _, tasks = made
    how, before = plan.tier(step.n_tokens), ancestors(tasks)
    users: dict[int, list[int]] = defaultdict(list)
    for i, task in enumerate(tasks):
        if task.kind == "send" and task.slot >= 0:
            assert task.slot < how.n_slots
            assert task.bytes <= slot_bytes(spec, plan, how)
            assert before[i] >= set(users[task.slot])
        if task.slot >= 0:
            users[task.slot].append(i)


@settings(max_examples=400, deadline=None)
@given(compilations())
def test_every_result_reaches_the_sampled_token_and_everything_can_run(made: Compiled) -> None:
    _, _, _, _, tasks = made
    last = ancestors(tasks)[-1]
    assert tasks.tasks[-1].kind == "sample"
    unread = {task.id for i, task in enumerate(tasks) if i not in last} - {tasks.tasks[-1].id}
    assert all(tasks.tasks[tasks.index[name]].kind in ("send", "evict") for name in unread)
    zeros = [0.0] * len(tasks)
    assert recur(tasks.arrays, zeros, [(0.0,) * len(d) for d in tasks.arrays.deps])[1] == zeros


@settings(max_examples=200, deadline=None)
@given(compilations())
def test_a_serial_step_never_does_two_things_at_once(made: Compiled) -> None:
    _, plan, step, _, tasks = made
    if plan.tier(step.n_tokens).overlap:
        return
    before = ancestors(tasks)
    assert all(before[i] == set(range(i)) for i in range(len(tasks)))


@settings(max_examples=200, deadline=None)
@given(compilations())
def test_compiling_layer_by_layer_gives_the_tasks_of_the_whole_step(made: Compiled) -> None:
    spec, plan, step, routing, whole = made
    compiler = StepCompiler(spec, plan, step)
    tasks: list[Task] = compiler.begin()
    for layer in range(spec.n_layers):
        tasks += compiler.attention(layer)  # the router runs here
        tasks += compiler.mlp(layer, routing[layer])
    assert (*tasks, *compiler.end()) == whole.tasks


def test_one_token_on_the_cpu_is_a_layer_apart_where_other_layers_are_the_devices() -> None:
    def ops(plan: Plan, n_tokens: int) -> set[str]:
        tasks = compiled(spec, plan, Step("prefill", n_tokens, n_tokens))
        return {work.op for task in tasks if task.kind == "attn" and task.resource == "CPU" for work in task.works}

    spec = dense(n_layers=2)
    alone = on_cpu(spec)
    beside = replace(uniform(spec, gg=2), layers=(LayerPartition("GPU", (2,)), LayerPartition("CPU", (0,))))
    assert ops(alone, 1) == {"attn"}
    assert ops(beside, 1) == {"attn_apart"}
    assert ops(beside, 5) == {"attn"}

    def ends(plan: Plan) -> list[str]:
        tasks = compiled(spec, plan, Step("decode1", 1, 9))
        return [work.op for task in tasks if task.kind in ("embed", "head", "sample") for work in task.works]

    assert ends(alone) == ["embed", "head", "sample"]
    assert ends(replace(beside, ends="CPU")) == ["embed_apart", "head_apart", "sample"]
    assert ends(beside) == ["embed", "head", "sample"]
