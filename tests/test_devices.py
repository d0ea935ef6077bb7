"""Queues keep order and outlive failures, the arena holds its cap, the emulated link its rate; CUDA does the same."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import ExecutionError, PlanError
from hwmodels.profile import Resource
from runtime.devices import Device, device_name, emulated, open_device
from runtime.devices.base import Arena, Body, Ticket, WorkerQueue, failure, give_up
from runtime.devices.emulated import EmulatedDevice, Link
from sim.graph import Kind, Task
from sim.workload import Workload
from tests.conftest import TinyCheckpoint
from tests.planned import greedy, loaded, logits, on_cpu, shares, spec_of, three_ways, whole_experts
from tests.test_executor import check_routing, check_timeline, recording
from tests.tiny import FAMILIES, eager, tokens

KINDS: dict[str, Kind] = {"CPU": "cc", "GPU": "gg", "H2D": "send", "D2H": "act_d2h"}


def task(name: str, resource: Resource = "CPU", *deps: str) -> Task:
    return Task(name, KINDS[resource], resource, deps=deps)


def fail(error: BaseException) -> Body:
    """A body that raises."""

    def body() -> None:
        raise error

    return body


def held_by(event: threading.Event) -> Body:
    """A body that ends when the event is set."""

    def body() -> None:
        event.wait(60)

    return body


def living() -> bool:
    return True


@pytest.fixture
def queue() -> Iterator[WorkerQueue]:
    made = WorkerQueue("test", 1)
    yield made
    made.close()


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    made = EmulatedDevice(1 << 20)
    yield made
    made.close()


# -- tickets ------------------------------------------------------------------------------------------


def test_a_ticket_is_done_once_its_task_has_run_or_failed() -> None:
    ran, failed = Ticket(task("a")), Ticket(task("b"))
    assert [t.done for t in (ran, failed)] == [False, False]
    ran.finish(3, 5)
    failed.fail(ValueError("no"))
    assert [t.done for t in (ran, failed)] == [True, True]
    ran.wait(living)
    assert (ran.start_ns, ran.end_ns) == (3, 5)
    with pytest.raises(ValueError, match="no"):
        failed.wait(living)


def test_waiting_for_a_task_of_a_dead_worker_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.devices.base._LIVENESS_S", 0.01)
    with pytest.raises(ExecutionError, match="task a: its CPU worker has died"):
        Ticket(task("a")).wait(lambda: False)


def test_a_failure_is_named_after_the_task_that_caused_it() -> None:
    cause = RuntimeError("wet")
    error = failure(task("decode1.L00.cc"), cause)
    assert str(error) == "task decode1.L00.cc failed on CPU: RuntimeError: wet"
    assert error.__cause__ is cause
    assert failure(task("another"), error) is error
    interrupt = KeyboardInterrupt()
    assert failure(task("another"), interrupt) is interrupt


def test_giving_up_fails_what_has_not_ended() -> None:
    ended, waiting = Ticket(task("a")), Ticket(task("b"))
    ended.finish(0, 1)
    give_up([ended, waiting])
    ended.wait(living)
    with pytest.raises(ExecutionError, match="task b: its step was given up"):
        waiting.wait(living)


# -- queues -------------------------------------------------------------------------------------------


def test_a_queue_runs_its_tasks_in_order(queue: WorkerQueue) -> None:
    seen: list[int] = []
    for i in range(50):
        queue.submit(Ticket(task(str(i))), [], lambda i=i: seen.append(i))  # type: ignore[misc]
    queue.rest()
    assert seen == list(range(50))


def test_a_task_starts_after_what_it_depends_on_has_ended(queue: WorkerQueue) -> None:
    other = WorkerQueue("other", 1)
    release, first, second = threading.Event(), Ticket(task("a")), Ticket(task("b"))
    other.submit(second, [first], lambda: None)
    queue.submit(first, [], held_by(release))
    assert not second.done
    release.set()
    second.wait(living)
    other.close()
    assert first.end_ns <= second.start_ns <= second.end_ns


def test_a_queue_outlives_failures_and_passes_them_to_those_who_wait(queue: WorkerQueue) -> None:
    bad, after, fine = Ticket(task("bad")), Ticket(task("after")), Ticket(task("fine"))
    queue.submit(bad, [], fail(RuntimeError("wet")))
    queue.submit(after, [bad], lambda: None)
    queue.submit(fine, [], lambda: None)
    for ticket in (bad, after):
        with pytest.raises(ExecutionError, match="task bad failed on CPU"):
            ticket.wait(living)
    fine.wait(living)
    assert queue.alive


@pytest.mark.parametrize("error", [SystemExit(), KeyboardInterrupt(), GeneratorExit(), MemoryError()])
def test_nothing_that_a_body_raises_ends_a_worker(queue: WorkerQueue, error: BaseException) -> None:
    ticket = Ticket(task("bad"))
    queue.submit(ticket, [], fail(error))
    with pytest.raises((ExecutionError, KeyboardInterrupt)):
        ticket.wait(living)
    queue.rest()
    assert queue.alive


def test_a_task_that_was_given_up_is_not_begun(queue: WorkerQueue) -> None:
    hold, ran = threading.Event(), []
    queue.submit(Ticket(task("first")), [], held_by(hold))
    waiting = Ticket(task("second"))
    queue.submit(waiting, [], lambda: ran.append(1))
    give_up([waiting])
    hold.set()
    queue.rest()
    assert ran == []


def test_a_closed_queue_runs_what_it_has_and_takes_no_more() -> None:
    queue, seen = WorkerQueue("test", 1), []
    for i in range(5):
        queue.submit(Ticket(task(str(i))), [], lambda i=i: seen.append(i))  # type: ignore[misc]
    queue.close()
    queue.close()
    assert seen == list(range(5))
    assert not queue.alive
    queue.rest()
    with pytest.raises(ExecutionError, match="task late: the CPU queue is closed"):
        queue.submit(Ticket(task("late")), [], lambda: None)


def test_a_worker_has_its_own_threads_and_cores_and_leaves_the_callers_alone() -> None:
    cores, n_threads = os.sched_getaffinity(0), torch.get_num_threads()
    found: list[object] = []
    queue = WorkerQueue("test", 1, frozenset({min(cores)}))
    queue.submit(Ticket(task("a")), [], lambda: found.extend((torch.get_num_threads(), os.sched_getaffinity(0))))
    queue.submit(Ticket(task("b")), [], lambda: found.append(torch.is_grad_enabled()))
    queue.close()
    assert found == [1, {min(cores)}, False]
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (cores, n_threads)


# -- memory -------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40)))
def test_the_arena_never_passes_its_cap(sizes: list[int]) -> None:
    arena, taken = Arena(100), 0
    for size in sizes:
        if taken + size <= 100:
            arena.take(size, "weights")
            taken += size
        else:
            with pytest.raises(PlanError, match=f"weights needs {size} B, {100 - taken} B of 100 B are left"):
                arena.take(size, "weights")
        assert arena.used_bytes == arena.peak_bytes == taken
    assert sum(arena.parts.values()) == taken


def test_device_memory_is_taken_before_it_is_allocated(device: EmulatedDevice) -> None:
    assert device.allocate(1 << 18, torch.float32, "weights").shape == (1 << 18,)
    with pytest.raises(PlanError, match=r"slots needs 4 B, 0 B of 1.00 MiB are left; raise --vram-budget"):
        device.allocate(1, torch.float32, "slots")
    assert device.peak_bytes() == 1 << 20
    assert device.host_slab(1 << 18, torch.float32, pinned=True).nbytes == 1 << 20  # host memory is not the arena's


def test_staging_is_the_same_memory_for_the_same_name(device: EmulatedDevice) -> None:
    large, small = torch.ones(4, 8), torch.ones(2, 8)
    first = device.staging(large, "x", on_host=True)
    assert first.shape == (4, 8)
    assert device.staging(small, "x", on_host=True).data_ptr() == first.data_ptr()
    assert device.staging(small, "x", on_host=False).data_ptr() != first.data_ptr()
    assert device.staging(small, "y", on_host=True).data_ptr() != first.data_ptr()
    assert device.staging(small.bfloat16(), "x", on_host=True).dtype == torch.bfloat16


# -- the emulated device ------------------------------------------------------------------------------


def run(device: Device, tasks: Sequence[Task], body_of: Callable[[str], Body]) -> dict[str, tuple[int, int]]:
    """Run tasks to their end; start and end of each."""
    device.run(tasks, {t.id: body_of(t.id) for t in tasks}, inline_cpu=False)
    return {t.task.id: (t.start_ns, t.end_ns) for t in device.drain()}


DIAMOND = (
    task("down", "D2H"),
    task("cc", "CPU", "down"),
    task("gg", "GPU"),
    task("up", "H2D", "cc"),
    task("join", "GPU", "gg", "up"),
)


def test_tasks_run_after_their_dependencies_and_times_are_kept(device: EmulatedDevice) -> None:
    seen: list[str] = []
    spans = run(device, DIAMOND, lambda name: lambda: seen.append(name))
    assert set(seen) == set(spans) == {t.id for t in DIAMOND}
    for one in DIAMOND:
        assert all(spans[dep][1] <= spans[one.id][0] for dep in one.deps)
    assert device.drain() == []


@pytest.mark.parametrize("broken", DIAMOND, ids=lambda t: t.id)
def test_one_failure_is_raised_and_nothing_that_needs_it_runs(broken: Task, device: EmulatedDevice) -> None:
    seen: list[str] = []

    def body_of(name: str) -> Body:
        return fail(OSError("torn")) if name == broken.id else lambda: seen.append(name)

    with pytest.raises(ExecutionError, match=f"task {broken.id} failed on {broken.resource}: OSError: torn"):
        run(device, DIAMOND, body_of)
    assert not {t.id for t in DIAMOND if broken.id in t.deps} & set(seen)
    assert device.drain() == []
    assert len(run(device, DIAMOND, lambda name: lambda: None)) == len(DIAMOND)


def test_a_failure_that_nobody_waited_for_is_raised_at_the_drain(device: EmulatedDevice) -> None:
    lone = task("send", "H2D")
    device.issue([lone], {"send": fail(OSError("torn"))})
    with pytest.raises(ExecutionError, match="task send failed on H2D"):
        device.drain()
    assert device.drain() == []


def test_forgetting_waits_for_what_runs_and_drops_the_rest(device: EmulatedDevice) -> None:
    begun, hold, seen = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        hold.wait(60)
        seen.append("first")

    sends = [task("first", "H2D"), task("second", "H2D")]
    device.issue(sends, {"first": first, "second": lambda: seen.append("second")})
    begun.wait(60)
    threading.Timer(0.05, hold.set).start()
    device.forget()
    assert seen == ["first"]
    assert device.drain() == []


def test_cpu_tasks_of_a_layer_on_the_cpu_run_on_the_calling_thread(device: EmulatedDevice) -> None:
    found: list[int] = []
    for inline_cpu in (True, False):
        device.run([task("cc")], {"cc": lambda: found.append(threading.get_ident())}, inline_cpu)
        device.drain()
    assert found[0] == threading.get_ident() != found[1]


def test_a_closed_device_says_so() -> None:
    device = EmulatedDevice(0)
    device.close()
    device.close()
    with pytest.raises(ExecutionError, match="task send: the device is closed"):
        device.issue([task("send", "H2D")], {"send": lambda: None})


def test_an_interrupt_at_any_moment_leaves_a_thread_its_cores_and_its_number_of_threads(device: EmulatedDevice) -> None:
    cores, n_threads, draw, came = os.sched_getaffinity(0), torch.get_num_threads(), random.Random(0), 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(2000):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + 1e-4 * draw.random())
                for _ in range(20):
                    with device.driving():
                        pass
                signal.setitimer(signal.ITIMER_REAL, 0.0)
            except KeyboardInterrupt:
                came += 1
            assert (os.sched_getaffinity(0), torch.get_num_threads()) == (cores, n_threads)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert came > 0


def test_driving_nests_and_another_thread_waits_its_turn(device: EmulatedDevice) -> None:
    order: list[str] = []
    begun = threading.Event()

    def other() -> None:
        begun.set()
        with device.driving():
            order.append("other")

    with device.driving():
        with device.driving():
            assert torch.get_num_threads() == device.gpu_threads
        assert torch.get_num_threads() == device.gpu_threads
        thread = threading.Thread(target=other)
        thread.start()
        begun.wait(60)
        order.append("first")
    thread.join(60)
    assert order == ["first", "other"]


def test_cores_are_shared_out_between_cpu_and_accelerator() -> None:
    n_cores = len(os.sched_getaffinity(0))
    for asked in (None, 1, n_cores, 1000):
        device = EmulatedDevice(0, asked)
        device.close()
        assert device.cpu_threads == (max(1, n_cores // 2) if asked is None else min(asked, n_cores))
        assert device.gpu_threads == max(1, n_cores - device.cpu_threads)


class Sleeper:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_a_copy_takes_as_long_as_the_link_says(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    # 4 MB at 2 MB/s are 2 s page-locked, 4 s at 1 MB/s from ordinary memory; one task's copies share a schedule
    clock, link = Sleeper(), Link(pinned_bytes_per_s=2e6, pageable_bytes_per_s=1e6, chunk_bytes=1 << 18)
    monkeypatch.setattr(emulated, "time", clock)
    monkeypatch.setenv("SCHEINFER_KERNEL", "torch")  # the native link has its own clock: tests.test_native
    request.addfinalizer((device := EmulatedDevice(0, link=link)).close)
    source = torch.arange(1_000_000, dtype=torch.float32)
    for n_copies in (1, 4):
        for pinned, expected_s in ((True, 2.0), (False, 4.0)):
            target, before_s = torch.zeros_like(source), clock.now_s
            device.copy(list(zip(target.chunk(n_copies), source.chunk(n_copies), strict=True)), pinned)
            assert torch.equal(target, source)
            assert clock.now_s - before_s == pytest.approx(expected_s)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("tpu", "choose auto, cuda:0 or emulated"),
        ("cuda:x", "no device 'cuda:x'"),
        ("cuda:99", "use --device emulated"),
    ],
)
def test_a_device_that_is_not_here_is_refused_with_what_is(asked: str, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        open_device(asked, 0)


def test_auto_takes_cuda_where_there_is_one() -> None:
    assert device_name("auto") == ("cuda:0" if torch.cuda.is_available() else "emulated")
    assert device_name("emulated") == "emulated"


# -- CUDA ---------------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> Iterator[Device]:
    made = open_device("cuda:0", 1 << 30)
    yield made
    made.close()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_plans_on_a_cuda_device_agree_with_hugging_face(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    folder, ids = tiny_checkpoint(family), tokens(37)
    spec, model = spec_of(folder), eager(folder)
    expected, continued = logits(model, ids), greedy(model, ids, 8)
    for plan in (
        on_cpu(spec),
        whole_experts(spec),
        three_ways(spec),
        three_ways(spec, overlap=False),
        shares(spec, 1.0),
        shares(spec, 0.3, stream_min_tokens=1, stream_columns=5),
        shares(spec, 0.3, stream_min_tokens=2, n_slots=1, ends="CPU"),
    ):
        with loaded(folder, plan, device="cuda:0") as planned:
            ours = logits(planned, ids.to(planned.device)).cpu()
            torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
            assert greedy(planned, ids.to(planned.device), 8) == continued


@pytest.mark.gpu
def test_a_cuda_run_is_the_graph_that_the_simulator_compiles(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("mixtral")
    spec = spec_of(folder)
    for plan in (three_ways(spec), three_ways(spec, overlap=False), on_cpu(spec)):
        with loaded(folder, plan, device="cuda:0") as model:
            greedy(model, tokens(6).to(model.device), 5)
            timeline, routing = recording(model)
        check_timeline(spec, plan, timeline, routing, Workload(6, 5), clock_s=5e-5)  # two clocks are compared
        check_routing(spec, routing, Workload(6, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("broken", DIAMOND, ids=lambda t: t.id)
def test_a_failure_on_a_cuda_device_is_raised_once_and_the_device_works_on(broken: Task, cuda: Device) -> None:
    def body_of(name: str) -> Body:
        return fail(OSError("torn")) if name == broken.id else lambda: None

    with pytest.raises(ExecutionError, match=f"task {broken.id} failed on {broken.resource}: OSError: torn"):
        run(cuda, DIAMOND, body_of)
    spans = run(cuda, DIAMOND, lambda name: lambda: None)
    assert set(spans) == {t.id for t in DIAMOND}


@pytest.mark.gpu
def test_host_slabs_are_page_locked_in_their_exact_size(cuda: Device) -> None:
    slab = cuda.host_slab(1_000_003, torch.float32, pinned=True)
    assert slab.is_pinned()
    slab.copy_(torch.arange(1_000_003))
    far = cuda.allocate(1_000_003, torch.float32, "weights")
    cuda.copy([(far, slab)], pinned=True)
    torch.cuda.synchronize()
    assert torch.equal(far.cpu(), slab)
    assert not cuda.host_slab(16, torch.float32, pinned=False).is_pinned()


@pytest.mark.gpu
def test_cuda_memory_is_capped_and_given_back(tiny_checkpoint: TinyCheckpoint, demo_models: dict[str, Path]) -> None:
    before = torch.cuda.memory_allocated()
    folder = demo_models["tiny-llama"]
    with loaded(folder, shares(spec_of(folder), 0.5, n_ctx=256), device="cuda:0") as model:
        greedy(model, tokens(200).to(model.device), 4)
        report = model.memory_report()
        assert torch.cuda.max_memory_reserved() - before <= model.plan.vram_budget_bytes
        assert int(str(report["gg"])) > 0
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2 << 30, dtype=torch.uint8, device="cuda:0")
    assert torch.cuda.memory_allocated() <= before
