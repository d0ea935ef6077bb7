"""What the executor records is the plan's own graph, run in order and side by side; what fails, fails once."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from pathlib import Path
from types import FrameType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import StoppingCriteria, StoppingCriteriaList

from hwmodels.errors import ExecutionError, PlanError
from runtime.binding import LayerBinding
from runtime.devices.base import Body
from runtime.memory import LayerStore
from runtime.session import PlannedModel
from sim.caching import CacheWalk
from sim.compile import compile_step
from sim.graph import Task, TaskGraph
from sim.model import ModelSpec
from sim.plan import Plan
from sim.timeline import Span, Timeline
from sim.workload import RoutingTrace, Step, Workload
from tests.conftest import TinyCheckpoint
from tests.planned import greedy, loaded, logits, on_cpu, plans, shares, spec_of, three_ways
from tests.tiny import tokens

CLOCK_S = 1e-9
HANG_S = 180
PROMPT, N_GEN = 6, 5


@pytest.fixture(autouse=True)
def watchdog() -> Iterator[None]:
    """A test that hangs fails."""

    def give_up(signum: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still at work after {HANG_S} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(HANG_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def recording(model: PlannedModel) -> tuple[Timeline, RoutingTrace]:
    assert model.last_timeline is not None
    assert model.last_routing is not None
    return model.last_timeline, model.last_routing


def graphs(spec: ModelSpec, plan: Plan, routing: RoutingTrace, workload: Workload) -> dict[str, TaskGraph]:
    """What the simulator compiles for every step of a run, from the plan and the routing that occurred."""

    def recorded(step: Step, layer: int) -> tuple[int, ...]:
        return routing.counts[step.name, layer]

    walk = CacheWalk(spec, plan, workload.steps(), recorded, routing.cached)
    return {step.name: compile_step(spec, plan, step, recorded, walk.before(step)) for step in workload.steps()}


# -- the timeline is the graph's ----------------------------------------------------------------------


def check_timeline(
    spec: ModelSpec,
    plan: Plan,
    timeline: Timeline,
    routing: RoutingTrace,
    workload: Workload,
    clock_s: float = CLOCK_S,
) -> None:
    """Every task of every step's graph ran once, with its work, in its resource's order, after what it needs."""
    expected = graphs(spec, plan, routing, workload)
    assert timeline.steps == tuple(expected)
    assert len({s.task for s in timeline.spans}) == len(timeline.spans)
    for name, graph in expected.items():
        spans = {s.task: s for s in timeline.spans if s.step == name}
        assert set(spans) == {task.id for task in graph}
        order: dict[str, list[Span]] = defaultdict(list)
        for task in graph:
            span = spans[task.id]
            assert (span.kind, span.resource, span.layer) == (task.kind, task.resource, task.layer)
            assert (span.bytes, span.flops) == (task.bytes, task.flops)
            assert span.end_s >= span.start_s
            assert all(spans[dep].end_s <= span.start_s + clock_s for dep in task.deps), task.id
            order[task.resource].append(span)
        for queue in order.values():
            assert all(a.end_s <= b.start_s + clock_s for a, b in pairwise(queue))


def check_routing(spec: ModelSpec, routing: RoutingTrace, workload: Workload) -> None:
    """Every row of every step went to top_k experts of every layer."""
    for step in workload.steps():
        for i, layer in enumerate(spec.layers):
            counts = routing.counts[step.name, i]
            assert len(counts) == layer.ffn.n_experts
            assert sum(counts) == step.n_tokens * layer.ffn.top_k


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe"])
def test_a_measured_run_is_the_graph_that_the_simulator_compiles(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(family)
    spec = spec_of(folder)

    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(plans(spec), st.sampled_from(((1, 1), (PROMPT, 1), (3, 3))))
    def check(plan: Plan, prompt: tuple[int, int]) -> None:
        workload = Workload(prompt[0], N_GEN, batch=prompt[1])
        with loaded(folder, plan) as model:
            greedy(model, tokens(*prompt), N_GEN)
            timeline, routing = recording(model)
        check_timeline(spec, plan, timeline, routing, workload)
        check_routing(spec, routing, workload)

    check()


def test_a_run_says_what_it_was(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    plan = three_ways(spec_of(folder))
    with loaded(folder, plan) as model:
        assert model.last_timeline is None
        greedy(model, tokens(PROMPT), 2)
        timeline, _ = recording(model)
    assert timeline.source == "measured"
    assert timeline.spans[0].start_s == 0
    assert timeline.info == {
        "model": folder.name,
        "policy": "by-hand",
        "plan_id": plan.id,
        "profile_id": "",
        "device": "emulated",
        "dtype": "float32",
    }


def test_every_run_is_recorded_anew_and_single_passes_do_not_pile_up(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    with loaded(folder, three_ways(spec_of(folder))) as model:
        for n_gen in (4, 2):
            greedy(model, tokens(PROMPT), n_gen)
            assert recording(model)[0].steps == tuple(step.name for step in Workload(PROMPT, n_gen).steps())
        n_spans = []
        for _ in range(3):
            logits(model, tokens(PROMPT))
            n_spans.append(len(model.executor.end_run({})[0].spans))
        assert n_spans[0] == n_spans[1] == n_spans[2]


def test_a_prompt_after_a_cache_is_a_prefill_of_its_own_tokens(tiny_checkpoint: TinyCheckpoint) -> None:
    folder, ids = tiny_checkpoint("mixtral"), tokens(9)
    with loaded(folder, three_ways(spec_of(folder))) as model:
        cache = model(ids[:, :4]).past_key_values
        model.generate(ids, past_key_values=cache, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        timeline, routing = recording(model)
    assert timeline.steps == ("prefill", "decode1")
    assert sum(routing.counts["prefill", 0]) == 5 * 2  # five new tokens, two experts each


# -- overlap ------------------------------------------------------------------------------------------


def rendezvous(monkeypatch: pytest.MonkeyPatch, *kinds: str, timeout_s: float) -> None:
    """Let the tasks of some kinds of layer 1 of the first decode step end only when all of them have begun."""
    bind, all_here = LayerBinding.bind, threading.Barrier(len(kinds), timeout=timeout_s)
    names = {f"decode1.L01.{kind}" for kind in kinds}

    def bind_meeting(self: LayerBinding, task: Task, ahead: LayerStore | None) -> Body:
        body = bind(self, task, ahead)

        def meet() -> None:
            all_here.wait()
            body()

        return meet if task.id in names else body

    monkeypatch.setattr(LayerBinding, "bind", bind_meeting)


@pytest.mark.parametrize("kinds", [("cc", "gg"), ("cc", "gg", "send")], ids=" and ".join)
def test_the_cpu_the_device_and_the_link_work_on_one_layer_at_the_same_time(
    kinds: tuple[str, ...], tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    # H2D  |---send---|
    # CPU     |---cc---|            none can end before the others have begun
    # GPU     |--gg---||-cg-||join|
    folder = tiny_checkpoint("llama")
    with loaded(folder, three_ways(spec_of(folder))) as model:
        rendezvous(monkeypatch, *kinds, timeout_s=HANG_S)
        greedy(model, tokens(PROMPT), 3)
        timeline, _ = recording(model)
    spans = [s for s in timeline.step("decode1").spans if s.layer == 1 and s.kind in kinds]
    assert len(spans) == len(kinds)
    assert all(intersect(a, b) for a, b in combinations(spans, 2))


def test_a_serial_tier_does_one_thing_after_the_other(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("llama")
    with loaded(folder, three_ways(spec_of(folder), overlap=False)) as model:
        rendezvous(monkeypatch, "cc", "gg", timeout_s=0.2)
        with pytest.raises(ExecutionError, match="BrokenBarrierError"):
            greedy(model, tokens(PROMPT), 3)


@pytest.mark.slow
def test_parts_of_a_layer_overlap_in_time_on_the_demonstration_model(demo_models: dict[str, Path]) -> None:
    spec = spec_of(demo_models["tiny-llama"])
    with loaded(demo_models["tiny-llama"], shares(spec, gg=0.5)) as model:
        greedy(model, tokens(8), 12)
        timeline, _ = recording(model)
    of = {(s.step, s.layer, s.kind): s for s in timeline.spans}
    layers = [(step, layer) for step, layer, kind in of if kind == "cc"]
    assert len(layers) == 12 * spec.n_layers
    assert any(intersect(of[(*at, "cc")], of[(*at, "gg")]) for at in layers)  # most, where nothing else runs


def intersect(a: Span, b: Span) -> bool:
    return max(a.start_s, b.start_s) < min(a.end_s, b.end_s)


# -- failures -----------------------------------------------------------------------------------------


def break_task(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Let the body of one task raise, once."""
    bind, broken = LayerBinding.bind, [name]

    def bind_one(self: LayerBinding, task: Task, ahead: LayerStore | None) -> Body:
        body = bind(self, task, ahead)
        return fail if task.id in broken else body

    def fail() -> None:
        broken.clear()
        raise error

    monkeypatch.setattr(LayerBinding, "bind", bind_one)


def at_rest(model: PlannedModel, threads: set[str]) -> None:
    """All queues live, empty, and nothing is remembered of what was given up."""
    assert our_threads() == threads
    model.executor.begin_run()
    assert model.executor.device.drain() == []


def our_threads() -> set[str]:
    return {f"{t.name}/{t.ident}" for t in threading.enumerate() if t.name.startswith("scheinfer")}


FAILING = {
    "cc": "CPU",
    "act_d2h": "D2H",
    "act_h2d": "H2D",
    "send": "H2D",
    "gg": "GPU",
    "cg": "GPU",
    "join": "GPU",
}


@pytest.mark.parametrize("step", ["prefill", "decode2"])
@pytest.mark.parametrize("kind", FAILING)
def test_a_task_that_fails_is_named_once_and_the_model_works_on(
    kind: str, step: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, name = tiny_checkpoint("mixtral"), f"{step}.L02.{kind}"
    with loaded(folder, three_ways(spec_of(folder))) as model:
        expected, threads = greedy(model, tokens(PROMPT), N_GEN), our_threads()
        break_task(monkeypatch, name, RuntimeError("the wire is cut"))
        with pytest.raises(ExecutionError) as caught:
            greedy(model, tokens(PROMPT), N_GEN)
        assert str(caught.value) == f"task {name} failed on {FAILING[kind]}: RuntimeError: the wire is cut"
        assert isinstance(caught.value.__cause__, RuntimeError)
        at_rest(model, threads)
        assert greedy(model, tokens(PROMPT), N_GEN) == expected


def test_an_unused_copy_that_fails_is_reported_too(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one token uses two of five experts: nothing waits for the send if none of its columns is asked for
    folder = tiny_checkpoint("mixtral")
    with loaded(folder, shares(spec_of(folder), gg=0.5, ahead=0.5)) as model:
        break_task(monkeypatch, "decode1.L01.send", RuntimeError("the wire is cut"))
        with pytest.raises(ExecutionError, match=r"decode1\.L01\.send failed on H2D"):
            greedy(model, tokens(PROMPT), 3)
        greedy(model, tokens(PROMPT), 3)


def test_a_failure_on_a_layer_that_lives_on_the_cpu_is_named(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("llama")
    with loaded(folder, on_cpu(spec_of(folder), n_ctx=300)) as model:
        ids = tokens(257)  # in float32 more rows than one call takes: the cc is a task of its own
        break_task(monkeypatch, "prefill.L01.cc", MemoryError())
        with pytest.raises(ExecutionError, match=r"task prefill\.L01\.cc failed on CPU: MemoryError"):
            greedy(model, ids, 3)
        greedy(model, ids, 3)


@pytest.mark.parametrize("kind", ["cc", "gg", "send"])
def test_an_interrupt_in_a_task_stays_an_interrupt(
    kind: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint("llama")
    with loaded(folder, three_ways(spec_of(folder))) as model:
        expected, threads = greedy(model, tokens(PROMPT), N_GEN), our_threads()
        break_task(monkeypatch, f"decode1.L01.{kind}", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            greedy(model, tokens(PROMPT), N_GEN)
        at_rest(model, threads)
        assert greedy(model, tokens(PROMPT), N_GEN) == expected


class Interrupt(StoppingCriteria):
    """Ctrl-C between two tokens."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **how: object) -> torch.BoolTensor:
        raise KeyboardInterrupt


def test_an_interrupt_between_steps_keeps_what_was_recorded(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    with loaded(folder, three_ways(spec_of(folder))) as model:
        with pytest.raises(KeyboardInterrupt):
            model.generate(tokens(PROMPT), max_new_tokens=4, stopping_criteria=StoppingCriteriaList([Interrupt()]))
        assert recording(model)[0].steps == ("prefill",)
        greedy(model, tokens(PROMPT), N_GEN)


# An interrupt that meets a weak reference's callback is Python's to lose: it says so, and the run goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_moment_leaves_a_working_model(tiny_checkpoint: TinyCheckpoint) -> None:
    folder, ids, draw = tiny_checkpoint("mixtral"), tokens(PROMPT), random.Random(0)
    with loaded(folder, three_ways(spec_of(folder), n_ctx=64)) as model:
        expected, threads = greedy(model, ids, 30), our_threads()
        begun = time.perf_counter()
        greedy(model, ids, 30)
        usual_s, n_interrupted = time.perf_counter() - begun, 0
        for attempt in range(60):  # on a busy machine a run may end before its interrupt
            came = interrupted_after(usual_s * draw.random() / 2, lambda: greedy(model, ids, 30))
            n_interrupted, usual_s = n_interrupted + came, usual_s * (1.0 if came else 0.8)
            at_rest(model, threads)
            if attempt >= 5 and n_interrupted > 0:
                break
        assert n_interrupted > 0
        assert greedy(model, ids, 30) == expected


def interrupted_after(delay_s: float, work: Callable[[], object]) -> bool:
    """Send this process what Ctrl-C sends; whether the work ended by it."""
    timer = threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        work()
        timer.join()
        time.sleep(0.05)  # a signal that comes too late must not leave this block
    except KeyboardInterrupt:
        timer.join()
        return True
    return False


# -- refusals -----------------------------------------------------------------------------------------


def test_a_cache_larger_than_planned_is_refused_before_the_step(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    with loaded(folder, three_ways(spec_of(folder), n_ctx=8, batch=2)) as model:
        greedy(model, tokens(6), 3)  # the last token is chosen and not computed
        greedy(model, tokens(14), 3)  # as many bytes as two sequences of 8
        with pytest.raises(PlanError, match=r"17 tokens for each of 1 sequences .* room for 8 for each of 2"):
            greedy(model, tokens(14), 4)
        with pytest.raises(PlanError, match="--ctx-size or --batch"):
            logits(model, tokens(6, batch=3))
        greedy(model, tokens(6), 3)


def test_a_part_called_by_itself_says_so(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    with loaded(folder, three_ways(spec_of(folder))) as model:
        with pytest.raises(ExecutionError, match="a part of .* was called by itself; call the model"):
            model.get_submodule("model")(tokens(3))
        with pytest.raises(ExecutionError, match="neither input_ids nor inputs_embeds"):
            model()
