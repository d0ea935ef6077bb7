"""The emulated device: a second thread pool as the accelerator, a paced link, a capped arena.

Real tensors, real copies, real asynchrony. The calling thread is the accelerator's queue (as it is the
one that issues a GPU's work), and the CPU in layers that a plan leaves there; CPU, H2D and D2H are
worker threads: native ones where the kernel does all of a layer's tasks, else Python's. Nothing sleeps
in place of work except the link's pacing. Its numbers are labelled `emulated` wherever they appear.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from hwmodels.errors import ExecutionError
from runtime import native
from runtime.clock import now_ns
from runtime.devices.base import (
    Arena,
    Body,
    CopyPair,
    DeviceKind,
    Mark,
    Ran,
    Ticket,
    WorkerQueue,
    failure,
    give_up,
    take_threads,
)
from runtime.native.queues import NativeBody, NativeQueues, copying
from runtime.pages import large_pages
from sim.graph import Task
from sim.plan import Place

_COARSE_S, _FINE_S = 6e-5, 2e-5  # about what a sleep overshoots by: shorter ones would only add delay
_timer = threading.local()


def _sleep(seconds: float) -> None:
    """Sleep, by a timer so exact that it adds no step of its own to the time of short copies."""
    if not hasattr(_timer, "overshoot_s"):
        try:
            Path(f"/proc/{threading.get_native_id()}/timerslack_ns").write_text("1", encoding="ascii")
            _timer.overshoot_s = _FINE_S
        except OSError:
            _timer.overshoot_s = _COARSE_S
    if seconds > _timer.overshoot_s:
        time.sleep(seconds)


@dataclass(frozen=True)
class Link:
    """The emulated link: rates in bytes/s for page-locked and ordinary host memory."""

    pinned_bytes_per_s: float = 2.0e9
    pageable_bytes_per_s: float = 1.0e9
    chunk_bytes: int = 1 << 20


class EmulatedDevice:
    """An accelerator made of CPU threads. See runtime.devices.base.Device for the interface."""

    kind: DeviceKind = "emulated"

    def __init__(self, vram_bytes: int, cpu_threads: int | None = None, link: Link | None = None) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self.torch_device = torch.device("cpu")
        self.arena = Arena(vram_bytes)
        self.cpu_threads = min(cpu_threads or max(1, len(cores) // 2), len(cores))
        self.gpu_threads = max(1, len(cores) - self.cpu_threads)
        self.link = link or Link()
        cpu_cores = frozenset(cores[-self.cpu_threads :])
        self._shares = {
            "GPU": (frozenset(cores[: self.gpu_threads]), self.gpu_threads),
            "CPU": (cpu_cores, self.cpu_threads),
        }
        self._driver, self._is_driven = threading.RLock(), False
        self._work: tuple[Place, bool] = ("GPU", False)
        self._queues = {
            "CPU": WorkerQueue("cpu", self.cpu_threads, cpu_cores),
            "H2D": WorkerQueue("h2d", 1, frozenset(cores)),  # the links float
            "D2H": WorkerQueue("d2h", 1, frozenset(cores)),
        }
        self._native = _native_queues(cores, self.cpu_threads)
        self._tickets: dict[str, Ticket] = {}
        self._awaits = False  # whether any of these was handed to a Python thread since all had ended
        self._staging: dict[tuple[str, bool], tuple[torch.Tensor, torch.Tensor]] = {}

    # -- memory ---------------------------------------------------------------------------------------

    def allocate(self, n_elements: int, dtype: torch.dtype, what: str) -> torch.Tensor:
        """A flat tensor, accounted for in the arena."""
        self.arena.take(n_elements * dtype.itemsize, what)
        return large_pages(torch.empty(n_elements, dtype=dtype))

    def host_slab(self, n_elements: int, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
        """A flat tensor; there is no page-locking to do, the link only takes another rate."""
        del pinned
        return large_pages(torch.empty(n_elements, dtype=dtype))

    def staging(self, like: torch.Tensor, name: str, on_host: bool) -> torch.Tensor:
        """A buffer for activations; host and device buffers are both memory of this process."""
        held, shaped = self._staging.get((name, on_host), (None, None))
        if shaped is not None and shaped.shape == like.shape and shaped.dtype == like.dtype:
            return shaped
        with torch.inference_mode(False):  # workers write to it, whatever mode the caller is in
            if held is None or held.numel() < like.numel() or held.dtype != like.dtype:
                held = torch.empty(like.numel(), dtype=like.dtype)
            shaped = held[: like.numel()].view(like.shape)
        self._staging[name, on_host] = held, shaped
        return shaped

    def peak_bytes(self) -> int:
        """Most bytes taken from the arena."""
        return self.arena.peak_bytes

    def copy(self, pairs: Sequence[CopyPair], pinned: bool) -> None:
        """Copy in chunks, held back to the link's rate; the schedule runs on over all pairs of a task.

        The native kernel copies without the interpreter's lock and past the caches, as a copy engine does.
        """
        rate = self.link.pinned_bytes_per_s if pinned else self.link.pageable_bytes_per_s
        kernel = native.kernel()
        if kernel is not None and all(native.copies(to, of) for to, of in pairs):
            kernel.copy(pairs, rate, self.link.chunk_bytes)
            return
        start_s, n_bytes = time.perf_counter(), 0
        for target, source in pairs:
            size = target.element_size()
            to, of = target.reshape(-1), source.reshape(-1)
            chunk = max(1, self.link.chunk_bytes // size)
            for first in range(0, of.numel(), chunk):
                last = min(first + chunk, of.numel())
                to[first:last].copy_(of[first:last])
                n_bytes += (last - first) * size
                ahead_s = start_s + n_bytes / rate - time.perf_counter()
                _sleep(ahead_s)

    def copying(self, pairs: Sequence[CopyPair], pinned: bool) -> Body:
        """Words for the native queues where they can, else a call of copy."""
        if self.takes_words and all(native.copies(to, of) for to, of in pairs):
            rate = self.link.pinned_bytes_per_s if pinned else self.link.pageable_bytes_per_s
            return copying(pairs, rate, self.link.chunk_bytes)
        return lambda: self.copy(pairs, pinned)

    @property
    def takes_words(self) -> bool:
        """Whether there are native queues, and the kernel is allowed now."""
        return self._native is not None and native.kernel() is not None

    # -- tasks ----------------------------------------------------------------------------------------

    @contextmanager
    def driving(self) -> Iterator[None]:
        """The calling thread works in the block with the cores and the number of threads of where it works."""
        with self._driver:
            if self._is_driven:
                yield
                return
            own = os.sched_getaffinity(0), torch.get_num_threads()
            try:
                self._is_driven = True
                self._take_share()
                yield
            finally:
                try:
                    self._give_share_back(*own)
                finally:  # an interrupt may come within, and the thread would stay on its share of the cores
                    if self._is_driven:
                        self._give_share_back(*own)

    def _give_share_back(self, cores: set[int], n_threads: int) -> None:
        os.sched_setaffinity(0, cores)
        take_threads(n_threads, by_kernel=False)
        self._is_driven = False

    def work_at(self, place: Place, by_kernel: bool) -> None:
        """What the calling thread does from now on is the accelerator's, or the CPU's in a plan's CPU layers."""
        if (place, by_kernel) != self._work:
            self._work = place, by_kernel
            if self._is_driven:
                self._take_share()

    def _take_share(self) -> None:
        place, by_kernel = self._work
        cores, n_threads = self._shares[place]
        os.sched_setaffinity(0, cores)
        take_threads(n_threads, by_kernel)

    def issue(self, tasks: Sequence[Task], bodies: Mapping[str, Body]) -> None:
        """Hand tasks of CPU, H2D and D2H to their threads."""
        words = _words(bodies)
        if self._native is not None and words is not None:
            self._rest_python()
            self._native.run(tasks, words, inline_cpu=False, wait=False)
            return
        self._rest_native()
        for task in tasks:
            self._submit(task, bodies[task.id])

    def run(self, tasks: Sequence[Task], bodies: Mapping[str, Body], inline_cpu: bool) -> None:
        """Hand CPU, H2D and D2H tasks to their threads, then work the device's tasks on this one."""
        current, words = tasks[0], _words(bodies)
        try:
            with self.driving():
                if self._native is not None and words is not None:
                    self._rest_python()
                    self._native.run(tasks, words, inline_cpu, wait=True)
                    return
                self._rest_native()
                inline = [t for t in tasks if t.resource == "GPU" or (inline_cpu and t.resource == "CPU")]
                self._tickets.update((t.id, Ticket(t)) for t in inline)
                for current in tasks:
                    if current.id not in self._tickets:
                        self._submit(current, bodies[current.id])
                for current in inline:
                    self._run_inline(self._tickets[current.id], bodies[current.id])
                current = tasks[-1]
                if current not in inline:  # a copy that the caller needs
                    self._wait(self._tickets[current.id])
        except BaseException as error:
            first = failure(current, error)
            self.forget()
            raise first from first.__cause__

    # A step's tasks are all words or none, but for what a test puts in: whoever changes over waits for the others.
    def _rest_native(self) -> None:
        if self._native is not None and not self._native.idle:
            self._native.rest()

    def _rest_python(self) -> None:
        if self._awaits:
            for ticket in self._tickets.values():
                self._wait(ticket)
            self._awaits = False

    def _submit(self, task: Task, body: Body) -> None:
        if task.resource not in self._queues:
            raise ExecutionError(f"task {task.id}: the device is closed")
        ticket = self._tickets[task.id] = Ticket(task)
        deps = [self._tickets[d] for d in task.deps if d in self._tickets]
        self._awaits = True
        self._queues[task.resource].submit(ticket, deps, body)

    def _run_inline(self, ticket: Ticket, body: Body) -> None:
        for name in ticket.task.deps:
            dep = self._tickets.get(name)
            if dep is not None:
                self._wait(dep)
        start_ns = now_ns()
        body()
        ticket.finish(start_ns, now_ns())

    def _wait(self, ticket: Ticket) -> None:
        queue = self._queues.get(ticket.task.resource)
        ticket.wait(lambda: queue is None or queue.alive)

    def finished(self, task: Task, start_ns: int, end_ns: int) -> None:
        """A task that the calling thread ran by itself."""
        ticket = self._tickets[task.id] = Ticket(task)
        ticket.finish(start_ns, end_ns)

    def drain(self) -> Sequence[Ran]:
        """Wait for every issued task and forget it; raise what made one fail, after all have come to rest."""
        tickets, found = list(self._tickets.values()), list[Ran]()
        try:
            if self._native is not None:
                found += self._native.drain()
            for ticket in tickets:
                self._wait(ticket)
        except BaseException:
            self.forget()
            raise
        self._tickets, self._awaits = {}, False
        return found + tickets

    def forget(self) -> None:
        """Wait for every queue; what failed has been reported already."""
        if self._native is not None:
            self._native.forget()
        give_up(self._tickets.values())
        for queue in self._queues.values():
            queue.rest()
        self._tickets, self._awaits = {}, False

    # -- time -----------------------------------------------------------------------------------------

    def set_clock(self) -> None:
        """There is one clock."""

    def mark(self, place: Place) -> Mark:
        """Now, on the host clock, wherever the work is."""
        del place
        return now_ns()

    def resolve(self, mark: Mark) -> int:
        """Marks are host times already."""
        assert isinstance(mark, int), "an emulated device has no events"
        return mark

    def close(self) -> None:
        """End the threads, drop buffers."""
        queues, self._queues = self._queues, {}
        for queue in queues.values():
            queue.close()
        threads, self._native = self._native, None
        if threads is not None:
            threads.close()
        native.end_workers()
        self._tickets.clear()
        self._staging.clear()


def _native_queues(cores: Sequence[int], cpu_threads: int) -> NativeQueues | None:
    """Native threads for the last cores, where the kernel is there."""
    kernel = native.kernel()
    return NativeQueues.open(kernel, cores[-cpu_threads:], cores[:-cpu_threads]) if kernel is not None else None


def _words(bodies: Mapping[str, Body]) -> dict[str, NativeBody] | None:
    """The bodies if all are words."""
    words = {name: body for name, body in bodies.items() if isinstance(body, NativeBody)}
    return words if len(words) == len(bodies) else None
