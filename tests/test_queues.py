"""Native queues: tasks in order, after what they depend on, failures named once, nothing left behind."""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from hwmodels.errors import ExecutionError
from hwmodels.profile import Resource
from runtime import native
from runtime.devices.emulated import EmulatedDevice
from runtime.microbench import MicroBench
from runtime.native.queues import NativeBody, NativeQueues, adding, copying
from sim.graph import Kind, Task
from tests.conftest import TinyCheckpoint
from tests.planned import greedy, loaded, spec_of, three_ways
from tests.test_executor import recording
from tests.tiny import tokens

KIND: dict[Resource, Kind] = {"GPU": "gg", "CPU": "cc", "H2D": "send", "D2H": "act_d2h"}
RESOURCES: tuple[Resource, ...] = ("GPU", "CPU", "H2D", "D2H")
FAST = 1e12
kernel = native.installed()
pytestmark = pytest.mark.skipif(isinstance(kernel, Exception), reason="needs the native kernel")


@pytest.fixture
def queues() -> Iterator[NativeQueues]:
    assert isinstance(kernel, native.Kernel)
    cores = sorted(os.sched_getaffinity(0))
    made = NativeQueues.open(kernel, cores[-1:], cores[:-1])
    assert made is not None
    yield made
    made.close()


def copies(to: Tensor, of: Tensor, rate: float = FAST) -> NativeBody:
    return copying([(to, of)], rate, 1 << 20)


def no_such_instructions() -> NativeBody:
    return NativeBody(array("q", (2, 0, 99, 0, 0, 0)), None)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), n_tasks=st.integers(1, 30), n_calls=st.integers(1, 3))
def test_any_graph_runs_in_order_and_after_what_it_depends_on(seed: int, n_tasks: int, n_calls: int) -> None:
    assert isinstance(kernel, native.Kernel)
    draw, cores = random.Random(seed), sorted(os.sched_getaffinity(0))
    queues = NativeQueues.open(kernel, cores[-1:], cores)
    assert queues is not None
    # each task copies what the tasks it depends on have made, into a cell of its own, and adds one
    cells, tasks, one = torch.zeros(n_tasks, 3), list[Task](), torch.ones(3)
    for i in range(n_tasks):
        deps = tuple(t.id for t in draw.sample(tasks, min(len(tasks), draw.randrange(3))))
        resource = draw.choice(RESOURCES)
        tasks.append(Task(f"t{i}", KIND[resource], resource, deps=deps))
    bodies = {}
    for i, task in enumerate(tasks):
        bodies[task.id] = adding(kernel, cells[i], [one, *(cells[int(d[1:])] for d in task.deps)])
    for call in range(n_calls):
        some = tasks[call * n_tasks // n_calls : (call + 1) * n_tasks // n_calls]
        if some:
            queues.run(some, bodies, inline_cpu=False, wait=draw.random() < 0.5)
    ended = {e.task.id: e for e in queues.drain()}
    queues.close()
    expected: list[float] = []
    for task in tasks:
        expected.append(1.0 + sum(expected[int(d[1:])] for d in task.deps))
        assert all(ended[d].end_ns <= ended[task.id].start_ns for d in task.deps)
    assert cells[:, 0].tolist() == expected
    for resource in RESOURCES:
        spans = [ended[t.id] for t in tasks if t.resource == resource]
        assert all(a.end_ns <= b.start_ns for a, b in pairwise(spans))


def test_what_is_not_waited_for_goes_on_while_the_caller_does(queues: NativeQueues) -> None:
    source, target = torch.ones(1 << 20), torch.zeros(1 << 20)
    send = Task("send", "send", "H2D")
    queues.run([send], {"send": copies(target, source, rate=1e8)}, inline_cpu=False, wait=False)  # 40 ms
    assert not bool(target[-1])
    (ended,) = queues.drain()
    assert bool(target.all())
    assert ended.end_ns - ended.start_ns >= 40_000_000
    assert queues.drain() == []


def test_a_task_that_fails_is_named_and_those_after_it_do_not_run(queues: NativeQueues) -> None:
    cell = torch.zeros(4)
    tasks = [Task("bad", "cc", "CPU"), Task("after", "act_h2d", "H2D", deps=("bad",)), Task("join", "join", "GPU")]
    last = replace(tasks[2], deps=("after",))
    bodies = {"bad": no_such_instructions(), "after": copies(cell, torch.ones(4)), "join": copies(cell[:1], cell[1:2])}
    with pytest.raises(ExecutionError, match=r"^task bad failed on CPU: native kernel: no such instruction set$"):
        queues.run([*tasks[:2], last], bodies, inline_cpu=False, wait=True)
    queues.forget()
    assert cell.tolist() == [0, 0, 0, 0]
    queues.run([tasks[2]], {"join": copies(cell, torch.ones(4))}, inline_cpu=False, wait=True)
    assert cell.tolist() == [1, 1, 1, 1]


def test_what_is_given_up_does_not_begin(queues: NativeQueues) -> None:
    first, second = torch.zeros(1 << 20), torch.zeros(1 << 20)
    tasks = [Task("a", "send", "H2D"), Task("b", "send", "H2D")]
    slow = {t.id: copies(to, torch.ones(1 << 20), rate=1e8) for t, to in zip(tasks, (first, second), strict=True)}
    queues.run(tasks, slow, inline_cpu=False, wait=False)
    queues.forget()
    assert not bool(second.any())
    assert queues.drain() == []


def test_a_body_of_words_can_be_called() -> None:
    cell = torch.zeros(4)
    copies(cell, torch.arange(4.0))()
    assert cell.tolist() == [0, 1, 2, 3]
    with pytest.raises(ExecutionError, match="no such instruction set"):
        no_such_instructions()()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_rounded_as_torch_rounds_them(dtype: torch.dtype) -> None:
    assert isinstance(kernel, native.Kernel)
    first, *others = (torch.randn(20_001).to(dtype) for _ in range(3))  # longer than what is added at once
    expected = first.clone().add_(others[0]).add_(others[1])
    adding(kernel, first, others)()
    assert torch.equal(first, expected)


def test_links_keep_the_policy_of_who_opened_them() -> None:
    assert isinstance(kernel, native.Kernel)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        queues = NativeQueues.open(kernel, sorted(os.sched_getaffinity(0)), ())
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    assert queues is not None
    cell = torch.zeros(1 << 14)
    queues.run([Task("t", "send", "H2D")], {"t": copies(cell, cell + 1)}, inline_cpu=False, wait=False)
    queues.drain()
    names = {t: Path(f"/proc/self/task/{t}/comm").read_text().strip() for t in os.listdir("/proc/self/task")}
    (h2d,) = (int(t) for t, name in names.items() if name == "scheinfer-h2d")
    assert os.sched_getscheduler(h2d) == os.SCHED_BATCH
    queues.close()


def test_threads_end_with_the_device(tiny_checkpoint: TinyCheckpoint) -> None:
    def ours() -> set[str]:
        comms = ((t, Path(f"/proc/self/task/{t}/comm")) for t in os.listdir("/proc/self/task"))
        return {t for t, comm in comms if comm.read_text().strip().startswith("scheinfer-")}

    before = ours()
    folder = tiny_checkpoint("mixtral")
    with loaded(folder, three_ways(spec_of(folder))) as model:
        expected = greedy(model, tokens(5), 3)
        own = ours() - before
        assert len(own) >= 3
        timeline, _ = recording(model)
        assert {s.resource for s in timeline.spans} == set(RESOURCES)
        assert greedy(model, tokens(5), 3) == expected
    assert not ours() & own


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_is_calibrated_computes_on_the_threads_that_runs_have(
    family: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    device, n_threads = EmulatedDevice(1 << 30), torch.get_num_threads()
    bench = MicroBench(spec_of(tiny_checkpoint(family)), device, silu)
    torch.set_num_threads(n_threads + 5)
    try:
        threads: dict[Resource, int] = {"GPU": device.gpu_threads, "CPU": device.cpu_threads}
        for resource, expected in threads.items():
            body = bench._ffn_bodies(resource, 2, 8)()
            assert isinstance(body, NativeBody)
            assert body.words[8] == expected
        assert torch.get_num_threads() == n_threads + 5
    finally:
        torch.set_num_threads(n_threads)
        device.close()


def test_tasks_of_half_a_pool_take_one_half_and_then_the_other(tiny_checkpoint: TinyCheckpoint) -> None:
    device = EmulatedDevice(1 << 30)
    bench = MicroBench(spec_of(tiny_checkpoint("llama")), device, silu)
    half = bench.host.numel() // 2
    taken = [bench._unread(bench.host, half).storage_offset() for _ in range(4)]
    device.close()
    assert taken == [0, half, 0, half]
