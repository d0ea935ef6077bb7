"""Pins: what a user decides of a plan is in the plan, the rest is searched as without."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scheinfer
from hwmodels.errors import FormatError, PlanError
from runtime.cli import main
from sim.compile import compile_step
from sim.cost import price
from sim.heap import recur
from sim.layercost import Prices, Sending
from sim.memory import memory
from sim.model import ModelSpec
from sim.pins import Pin, check_pins, parse_pins, pins_of, unit_names
from sim.placement import ORDERS, Filling
from sim.plan import Plan, load_plan
from sim.planner import plan
from sim.policies.problem import Problem, total_s
from sim.search import search
from sim.simulate import forecast, routing_of
from sim.space import Branch, Space, further_space, paper_space, slot_bytes
from sim.steptime import StepTimes
from sim.workload import Workload
from tests.machines import GB, budget, dense, machine, moe
from tests.tiny import write_tiny
from tests.unit_machine import mixed, specs

SHORT = Workload(8, 4)


@st.composite
def pin_lists(draw: st.DrawFn, spec: ModelSpec) -> list[Pin]:
    """Pins of single units that do not contradict each other."""
    pins = []
    for layer in range(spec.n_layers):
        attention, *mlps = unit_names(spec, layer)
        rest = draw(st.sampled_from((None, None, "gpu", "cpu")))
        host = "cpu" if rest == "cpu" else draw(st.sampled_from(("cpu", "stream")))
        pins += [Pin(attention, rest)] if rest else []
        for name in mlps:
            to = draw(st.sampled_from((None, None, host, host if rest == "cpu" else "gpu")))
            pins += [Pin(name, to)] if to else []
    return pins


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_plan_honours_every_pin(data):
    spec = data.draw(st.sampled_from((dense(3, columns=64), moe(2, n_experts=4, columns=32))))
    pins = data.draw(pin_lists(spec))
    policy = data.draw(st.sampled_from(("auto", "scheinfer")))
    made = plan(spec, machine(together=(0.7, 0.8)), GB, SHORT, policy, pins)
    for pin in pins:
        _, layer, *unit = pin.pattern.split(".")
        part, columns = made.layers[int(layer)], spec.layers[int(layer)].ffn.columns
        if unit == ["attention"]:
            assert part.rest == pin.to.upper()
            continue
        gg = part.gg[int(unit[-1]) if len(unit) == 2 else 0]
        assert gg == (columns if pin.to == "gpu" else 0)
        for tier in made.tiers:
            sends_all = tier.ahead[int(layer)] == columns or tier.stream_min_tokens == 1
            sends_none = not tier.ahead[int(layer)] and tier.stream_min_tokens is None
            assert pin.to == "gpu" or (sends_all if pin.to == "stream" else sends_none or part.rest == "CPU")
        assert made.cache is None or pin.to == "gpu"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_times_and_slots_of_pinned_candidates_are_those_of_the_engine(data):
    draw = data.draw
    spec = draw(specs())
    pins = pins_of(spec, draw(pin_lists(spec)))
    profile = machine(gpu_gflops=10, cpu_gflops=2, fixed_s=1e-7, handoff_s=1e-8)
    workload = Workload(draw(st.integers(1, 9)), 2, skew=draw(st.sampled_from((0.0, 1.0))))
    unit = draw(st.sampled_from(("columns", "experts", "layers")))
    filling = Filling(spec, workload, unit, draw(st.sampled_from(ORDERS)), 0, pins)
    levels = np.arange(len(filling.sequence) + 1)
    fixed = pins.sent_ahead(spec)
    ways = [Sending(a, n_slots=2, fixed=fixed) for a in (0, 1, 5) if a or fixed] + [Sending()]
    step, where = draw(st.sampled_from(workload.steps())), routing_of(spec, workload)

    times = StepTimes(Prices(spec, profile), ((1.0, step),), (tuple(where(step, la) for la in range(spec.n_layers)),))
    fast, problem = times.seconds(filling, "GPU", levels, ways)[0], Problem(spec, profile, 10 * GB, workload, pins)
    slots = slot_bytes(problem, filling, levels, tuple(ways))
    for (i, level), (j, way) in itertools.product(enumerate(levels.tolist()), enumerate(ways)):
        made = problem.plan("", filling.layers(level), [way.tier(spec, "all", 10**6)], pinned=True)
        tasks = compile_step(spec, made, step, where)
        prices = price(tasks, profile)
        assert fast[i, j] == pytest.approx(max(recur(tasks.arrays, prices.duration_s, prices.lag_s)[1]), rel=1e-9)
        assert slots[i, j] == memory(spec, made).slots


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (dense(3, columns=32), r"layers\.0\.mlp=stream,layers\.1\.mlp=cpu"),
        (dense(3, columns=32), r"layers.[02].mlp=gpu,layers.1.attention=cpu"),
        (moe(2, columns=16), r"layers.0.experts.[01]=gpu,layers.1.experts.0=cpu"),
        (moe(2, columns=16), r"layers.*.experts.1=stream"),
    ],
)
def test_with_pins_the_winner_is_the_one_that_exhaustive_simulation_picks(spec, text):
    profile = machine(together=(0.6, 0.8), fixed_s=1e-7, handoff_s=1e-7)
    problem = Problem(spec, profile, budget(spec, SHORT, 0.9), SHORT, pins_of(spec, parse_pins(text)))
    space = few(paper_space(problem))
    found = search(problem, "x", [space], most_simulated=10**6)
    plans = every_plan(problem, space)
    for made in plans:
        check_pins(problem.pins, made, spec)
    totals = [total_s(forecast(spec, made, profile, SHORT), SHORT) for made in plans]
    assert found.total_s == pytest.approx(min(totals), rel=1e-9)
    assert found.n_candidates == len(totals)


def few(space: Space) -> Space:
    parts = tuple(Branch(b.filling, b.ends, b.fixed_bytes, b.levels[::3]) for b in space.branches)
    return Space(parts, space.decode[::3], space.prompt[::3])


def every_plan(problem: Problem, space: Space) -> list[Plan]:
    plans = []
    for part in space.branches:
        for level, d, p in itertools.product(part.levels.tolist(), space.decode, space.prompt):
            tiers = [d.tier(problem.spec, "decode", 1), p.tier(problem.spec, "prompt", 10**6)]
            made = problem.plan("", part.filling.layers(level), tiers, pinned=True, ends=part.ends)
            plans += [made] if problem.fits(made) else []
    return plans


def test_pins_of_what_would_be_chosen_anyway_change_nothing_but_the_search():
    spec, room = dense(2, columns=64), 10 * GB  # everything fits the device,
    profile = machine(handoff_s=1.0)  # and to ask the CPU for anything costs a second
    free = plan(spec, profile, room, SHORT)
    assert plan(spec, profile, room, SHORT, "auto", parse_pins(r"layers\.\d+\.mlp=gpu")).id == free.id


def test_a_pin_costs_time_and_never_saves_any():
    spec, room = dense(4, columns=1024), 10 * GB
    free, pinned = (plan(spec, machine(), room, SHORT, "auto", pins) for pins in ((), [Pin("layers.0.mlp", "cpu")]))
    assert free.prediction is not None
    assert pinned.prediction is not None
    assert total_s(pinned.prediction, SHORT) > total_s(free.prediction, SHORT)


# -- refused, with what to do --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("layers.0=gpu", r"matches no unit of .*; there are such as layers.0.attention, layers.0.experts.0"),
        ("layers.0.experts.1=gpu,.*experts.1=cpu", r"pinned to gpu by 'layers.0.experts.1' and to cpu by .*leave one"),
        (".*attention=stream", "attention cannot be sent in every step; pin it to gpu or cpu"),
        (".*attention=cpu,.*experts.0=gpu", "the whole layer is computed there"),
        (".*experts.0=cpu,.*experts.1=stream", "all alike"),
    ],
)
def test_pins_that_no_plan_can_hold_are_refused(text, told):
    with pytest.raises(PlanError, match=told):
        plan(moe(2), machine(), GB, SHORT, "auto", parse_pins(text))


@pytest.mark.parametrize("policy", ["auto", "scheinfer"])
@pytest.mark.parametrize("to", ["gpu", "stream"])
def test_pins_beyond_the_budget_say_how_many_bytes_are_missing(policy, to):
    spec = dense(4, columns=4096)
    with pytest.raises(PlanError, match=r"with these pins.* are missing\. Raise --vram-budget, or pin less"):
        plan(spec, machine(), budget(spec, SHORT, 0.1), SHORT, policy, [Pin(".*mlp", to)])


@pytest.mark.parametrize("policy", ["fiddler", "llama-cpp", "cpu-only"])
def test_policies_whose_rule_leaves_no_choice_take_no_pins(policy):
    with pytest.raises(PlanError, match="takes no pins; use --policy auto or scheinfer"):
        plan(moe(), machine(), GB, SHORT, policy, [Pin(".*experts.0", "gpu")])


def test_a_machine_without_gpu_refuses_what_needs_one():
    with pytest.raises(PlanError, match="layers.0.mlp is pinned to gpu"):
        plan(dense(), machine(gpu=False), 0, SHORT, "auto", [Pin("layers.0.mlp", "gpu")])
    assert not plan(dense(), machine(gpu=False), 0, SHORT, "auto", [Pin("layers.0.mlp", "cpu")]).uses_gpu


@pytest.mark.parametrize("text", ["", "layers.0.mlp", "layers.0.mlp=disk", "=gpu", "layers.(0=gpu"])
def test_a_pin_that_is_not_understood_says_how_to_write_it(text):
    with pytest.raises(FormatError, match=r"write it as regex=gpu|regular expression is wrong"):
        parse_pins(text)


def test_python_takes_pins_as_texts():
    made = scheinfer.plan(dense(3), machine(), "1GB", 8, 4, pin=["layers.0.mlp=cpu", "layers.1.mlp=gpu"])
    assert made.layers[0].gg == (0,)
    assert made.layers[1].gg == (256,)


def test_frames_that_contradict_pins_are_not_in_the_space():
    problem = Problem(dense(8), machine(), GB, SHORT, pins_of(dense(8), parse_pins("layers.3.mlp=gpu")))
    assert {b.filling.first_layer for b in further_space(problem).branches} <= {0, 1, 2, 3}


@pytest.mark.parametrize("command", ["simulate", "generate"])
def test_a_plan_file_and_pins_together_are_refused(command, tmp_path, capsys):
    folder, file = write_tiny(tmp_path / "m", "llama"), tmp_path / "p.json"
    scheinfer.plan(scheinfer.model(folder), machine(), "1GB", 8, 4).save(file)
    lengths = ["-p", "8", "-n", "4"] if command == "simulate" else ["-n", "4", "--prompt", "1 2 3"]
    pins = ["--pin", "layers.0.mlp=gpu", "--hardware", "rtx4090-ryzen7950x"]
    assert main([command, "-m", str(folder), "--plan", str(file), *lengths, *pins]) == 2
    assert "leave --pin out, or plan anew" in capsys.readouterr().err


def test_a_pin_on_the_command_line_is_in_the_plan(tmp_path):
    folder, file = write_tiny(tmp_path / "m", "llama"), tmp_path / "p.json"
    argv = ["plan", "-m", str(folder), "--hardware", "rtx4090-ryzen7950x", "-p", "8", "-n", "4", "--out", str(file)]
    assert main([*argv, "--pin", r"layers\.0\.mlp=cpu"]) == 0
    assert load_plan(file).layers[0].gg == (0,)


@pytest.mark.parametrize("to", ["stream", "cpu"])
@pytest.mark.parametrize("way", [Sending(), Sending(min_tokens=1, n_slots=2)], ids=["nothing", "routed"])
def test_layers_that_differ_share_no_times_where_pins_leave_each_one_placement(to, way):
    spec = mixed(4, 24, 4, 1)  # dense layers of 48 columns between layers of experts of 24
    names = [name for i in range(spec.n_layers) for name in unit_names(spec, i) if "mlp" in name or "expert" in name]
    pins = pins_of(spec, parse_pins(",".join(f"{name}={to}" for name in names)))
    profile, workload = machine(gpu_gflops=10, cpu_gflops=2), Workload(5, 5)
    where, steps = routing_of(spec, workload), workload.steps()[1:]
    routing = tuple(tuple(where(step, i) for i in range(spec.n_layers)) for step in steps)
    filling = Filling(spec, workload, "columns", "even", 0, pins)
    times = StepTimes(Prices(spec, profile), tuple((1.0, step) for step in steps), routing)

    made = Problem(spec, profile, 10 * GB, workload, pins).plan(
        "", filling.layers(0), [way.tier(spec, "all", 10**6)], pinned=True
    )
    graphs = [compile_step(spec, made, step, where) for step in steps]
    each_s = [max(recur(g.arrays, p.duration_s, p.lag_s)[1]) for g in graphs for p in [price(g, profile)]]
    assert times.seconds(filling, "GPU", np.array([0]), [way])[0, 0, 0] == pytest.approx(sum(each_s), rel=1e-9)
