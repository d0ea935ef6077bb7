"""What the executor asks of a device: in-order queues for four resources, memory under a cap, spans.

Two implementations with one interface: `emulated` (threads of this process) and `cuda`. A Ticket stands
for a task's completion; every wait on one either ends, or raises what made the task fail.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal, Protocol

import torch

from hwmodels.errors import ExecutionError, PlanError
from hwmodels.units import format_bytes
from runtime import native
from runtime.clock import now_ns
from sim.graph import Task
from sim.plan import Place

Body = Callable[[], None]
DeviceKind = Literal["cuda", "emulated"]
CopyPair = tuple[torch.Tensor, torch.Tensor]
"""Target and source of a copy: flat or of one shape."""
Mark = int | torch.cuda.Event
"""A point in time: nanoseconds on the host clock, or an event in the device's stream."""

_LIVENESS_S = 5.0


class Ticket:
    """Completion of one task: set once, with its times or its error. Waits use an OS primitive."""

    __slots__ = ("_event", "end_ns", "error", "start_ns", "task")

    def __init__(self, task: Task) -> None:
        self.task = task
        self.start_ns = 0
        self.end_ns = 0
        self.error: BaseException | None = None
        self._event = threading.Event()

    @property
    def done(self) -> bool:
        """Whether the task has ended or failed."""
        return self._event.is_set()

    def finish(self, start_ns: int, end_ns: int) -> None:
        """The task ran."""
        self.start_ns, self.end_ns = start_ns, end_ns
        self._event.set()

    def fail(self, error: BaseException) -> None:
        """The task did not run to its end."""
        self.error = error
        self._event.set()

    def wait(self, alive: Callable[[], bool]) -> None:
        """Return when the task has ended; raise its error. `alive` says whether its worker still lives."""
        while not self._event.wait(_LIVENESS_S):
            if not alive() and not self._event.is_set():
                self.fail(ExecutionError(f"task {self.task.id}: its {self.task.resource} worker has died"))
        if self.error is not None:
            raise self.error


class Ran(Protocol):
    """A task that has run: a Ticket, or what native queues tell of it; times on the host clock."""

    @property
    def task(self) -> Task:
        """What has run."""

    @property
    def start_ns(self) -> int:
        """When it began."""

    @property
    def end_ns(self) -> int:
        """When it ended."""


def failure(task: Task, error: BaseException) -> BaseException:
    """The error as it reaches the user: named after the first task that failed."""
    if isinstance(error, (ExecutionError, KeyboardInterrupt)):
        return error
    wrapped = ExecutionError(f"task {task.id} failed on {task.resource}: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


class Awaitable(Protocol):
    """Something a worker waits for before it runs a task: a Ticket, or a device's event."""

    def wait(self, alive: Callable[[], bool]) -> None:
        """Return when it has happened; raise if it never will."""


@dataclass(frozen=True, slots=True)
class _Item:
    ticket: Ticket
    deps: tuple[Awaitable, ...]
    body: Body


class WorkerQueue:
    """One resource as a thread that runs its tasks in order, waiting for each one's dependencies."""

    def __init__(self, name: str, n_threads: int, cores: frozenset[int] = frozenset()) -> None:
        self._items: SimpleQueue[_Item | threading.Event | None] = SimpleQueue()
        self._closed = False
        started, own_threads = threading.Event(), torch.get_num_threads()
        args = (n_threads, cores, started)
        self._thread = threading.Thread(target=self._serve, args=args, name=f"scheinfer-{name}", daemon=True)
        self._thread.start()
        started.wait()
        # torch gives threads that begin later the number that was set last, by whichever thread
        torch.set_num_threads(own_threads)

    @property
    def alive(self) -> bool:
        """Whether the thread lives."""
        return self._thread.is_alive()

    def submit(self, ticket: Ticket, deps: Sequence[Awaitable], body: Body) -> None:
        """Append a task; ExecutionError if the queue is closed."""
        if self._closed:
            raise ExecutionError(f"task {ticket.task.id}: the {ticket.task.resource} queue is closed")
        self._items.put(_Item(ticket, tuple(deps), body))

    def rest(self) -> None:
        """Return when every task submitted so far has ended or failed."""
        reached = threading.Event()
        self._items.put(reached)
        while self.alive and not reached.wait(_LIVENESS_S):
            pass

    def close(self) -> None:
        """Let the thread end after the tasks that are queued; safe to call twice."""
        self._closed = True
        self._items.put(None)
        if threading.current_thread() is not self._thread:  # a garbage collector may run anywhere
            self._thread.join(timeout=30)

    def _serve(self, n_threads: int, cores: frozenset[int], started: threading.Event) -> None:
        if cores:  # a scheduler that wakes this thread on its waker's core makes the two take turns
            os.sched_setaffinity(0, cores)
        torch.get_num_threads()  # takes the process's number now; asked first later, it would take it then, over ours
        torch.set_num_threads(n_threads)
        torch.set_grad_enabled(False)
        started.set()
        while (item := self._items.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            elif not item.ticket.done:  # else its step was given up
                _run(item)
            del item


def _run(item: _Item) -> None:
    try:
        for dep in item.deps:
            dep.wait(lambda: True)  # its own queue fails it; this thread only follows
        start_ns = now_ns()
        item.body()
        item.ticket.finish(start_ns, now_ns())
    except BaseException as error:  # a worker must outlive any task and report everything
        item.ticket.fail(failure(item.ticket.task, error))


def give_up(tickets: Iterable[Ticket]) -> None:
    """Fail what has not ended, so that nothing waits for it or begins it any more."""
    for ticket in tickets:
        if not ticket.done:
            ticket.fail(ExecutionError(f"task {ticket.task.id}: its step was given up"))


def take_threads(n_threads: int, by_kernel: bool) -> None:
    """Let the calling thread compute on n_threads; where the native kernel does most, it alone takes them.

    Threads of torch spin for a while after each call, on cores that the kernel's threads are pinned to: small
    steps of both in turn took three times as long.
    """
    torch.set_num_threads(1 if by_kernel else n_threads)
    native.set_threads(n_threads if by_kernel else 0)


class Arena:
    """Device memory under a hard cap: every planned byte is taken here before it is allocated."""

    def __init__(self, cap_bytes: int) -> None:
        self.cap_bytes = cap_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self.parts: dict[str, int] = {}

    def take(self, n_bytes: int, what: str) -> None:
        """Account for `n_bytes`; PlanError with numbers if the cap would be passed."""
        if self.used_bytes + n_bytes > self.cap_bytes:
            left = format_bytes(self.cap_bytes - self.used_bytes)
            raise PlanError(
                f"device memory: {what} needs {format_bytes(n_bytes)}, {left} of {format_bytes(self.cap_bytes)} "
                f"are left; raise --vram-budget or plan for a smaller one"
            )
        self.used_bytes += n_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        self.parts[what] = self.parts.get(what, 0) + n_bytes


class Device(Protocol):
    """The accelerator beside the CPU, the links to it, and the CPU's own queue."""

    kind: DeviceKind
    torch_device: torch.device
    arena: Arena
    cpu_threads: int

    # -- memory

    def allocate(self, n_elements: int, dtype: torch.dtype, what: str) -> torch.Tensor:
        """A flat tensor in device memory, accounted for in the arena."""

    def host_slab(self, n_elements: int, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
        """A flat tensor in host memory, page-locked if asked and possible."""

    def staging(self, like: torch.Tensor, name: str, on_host: bool) -> torch.Tensor:
        """A buffer of `like`'s shape for activations on their way; the same memory for the same name."""

    def copy(self, pairs: Sequence[CopyPair], pinned: bool) -> None:
        """Copy (target, source) pairs between host and device; called by the body of a task on H2D or D2H."""

    def copying(self, pairs: Sequence[CopyPair], pinned: bool) -> Body:
        """The body of such a task, for tensors that are known beforehand."""

    @property
    def takes_words(self) -> bool:
        """Whether its queues run bodies of the native kernel (NativeBody) by themselves."""

    def peak_bytes(self) -> int:
        """Most device memory held at once so far."""

    # -- tasks

    def driving(self) -> AbstractContextManager[None]:
        """The calling thread issues the device's work inside the block; nests. Another thread waits its turn."""

    def work_at(self, place: Place, by_kernel: bool) -> None:
        """The calling thread's next work is the place's, on the CPU mostly the native kernel's; inside driving()."""

    def issue(self, tasks: Sequence[Task], bodies: Mapping[str, Body]) -> None:
        """Hand copies to their queues and return at once."""

    def run(self, tasks: Sequence[Task], bodies: Mapping[str, Body], inline_cpu: bool) -> None:
        """Issue tasks in order; return when the caller may use the last task's result.

        inline_cpu: CPU tasks belong to a layer that lives on the CPU and run on the calling thread.
        Raises ExecutionError naming the first task that failed, after every queue has come to rest.
        """

    def finished(self, task: Task, start_ns: int, end_ns: int) -> None:
        """A task of the CPU that the calling thread ran within a call of its own; drain tells of it."""

    def drain(self) -> Sequence[Ran]:
        """Wait for all tasks issued since the last drain; what they were, with times on the host clock."""

    def forget(self) -> None:
        """Give up what was issued and has not begun, wait for all queues, drop failures."""

    # -- time

    def set_clock(self) -> None:
        """Compare the device's clock with the host's; between steps, with no mark unresolved."""

    def mark(self, place: Place) -> Mark:
        """This point in the calling thread's work at `place`."""

    def resolve(self, mark: Mark) -> int:
        """Nanoseconds on the host clock of a mark; after a drain."""

    def close(self) -> None:
        """End threads and give memory back; safe to call twice."""
