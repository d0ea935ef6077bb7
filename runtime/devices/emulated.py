"""The emulated device: a second thread pool as the accelerator, a paced link, a capped arena.

Real tensors, real copies, real asynchrony. The calling thread is the accelerator's queue (as it is the
one that issues a GPU's work); CPU, H2D and D2H are worker threads. Nothing sleeps in place of work
except the link's pacing. Its numbers are labelled `emulated` wherever they appear.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from hwmodels.errors import ExecutionError
from runtime.clock import now_ns
from runtime.devices.base import Arena, Body, CopyPair, DeviceKind, Mark, Ticket, WorkerQueue, failure
from sim.graph import Task
from sim.plan import Place

_LEAST_SLEEP_S = 5e-5  # about what a sleep overshoots by: shorter ones would only add delay


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
        self._caller_cores = os.sched_getaffinity(0)
        cores = sorted(self._caller_cores)
        self.torch_device = torch.device("cpu")
        self.arena = Arena(vram_bytes)
        self.cpu_threads = min(cpu_threads or max(1, len(cores) // 2), len(cores))
        self.gpu_threads = max(1, len(cores) - self.cpu_threads)
        self.link = link or Link()
        self._caller_threads = torch.get_num_threads()
        torch.set_num_threads(self.gpu_threads)
        os.sched_setaffinity(0, cores[: self.gpu_threads])  # of the calling thread; the links float
        self._queues = {
            "CPU": WorkerQueue("cpu", self.cpu_threads, frozenset(cores[-self.cpu_threads :])),
            "H2D": WorkerQueue("h2d", 1, frozenset(cores)),
            "D2H": WorkerQueue("d2h", 1, frozenset(cores)),
        }
        self._tickets: dict[str, Ticket] = {}
        self._staging: dict[str, torch.Tensor] = {}

    # -- memory ---------------------------------------------------------------------------------------

    def allocate(self, n_elements: int, dtype: torch.dtype, what: str) -> torch.Tensor:
        """A flat tensor, accounted for in the arena."""
        self.arena.take(n_elements * dtype.itemsize, what)
        return torch.empty(n_elements, dtype=dtype)

    def host_slab(self, n_elements: int, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
        """A flat tensor; there is no page-locking to do, the link only takes another rate."""
        del pinned
        return torch.empty(n_elements, dtype=dtype)

    def staging(self, like: torch.Tensor, name: str, on_host: bool) -> torch.Tensor:
        """A buffer for activations; host and device buffers are both memory of this process."""
        key = f"{name}/{on_host}"
        held = self._staging.get(key)
        if held is None or held.numel() < like.numel() or held.dtype != like.dtype:
            held = self._staging[key] = torch.empty(like.numel(), dtype=like.dtype)
        return held[: like.numel()].view(like.shape)

    def peak_bytes(self) -> int:
        """Most bytes taken from the arena."""
        return self.arena.peak_bytes

    def copy(self, pairs: Sequence[CopyPair], pinned: bool) -> None:
        """Copy in chunks, held back to the link's rate; the schedule runs on over all pairs of a task."""
        rate = self.link.pinned_bytes_per_s if pinned else self.link.pageable_bytes_per_s
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
                if ahead_s > _LEAST_SLEEP_S:
                    time.sleep(ahead_s)

    # -- tasks ----------------------------------------------------------------------------------------

    def issue(self, tasks: Sequence[Task], bodies: Mapping[str, Body]) -> None:
        """Hand tasks of CPU, H2D and D2H to their threads."""
        for task in tasks:
            self._submit(self._ticket(task), bodies[task.id])

    def run(self, tasks: Sequence[Task], bodies: Mapping[str, Body], inline_cpu: bool) -> None:
        """Hand CPU, H2D and D2H tasks to their threads, then work the device's tasks on this one."""
        inline: list[Ticket] = []
        for task in tasks:
            ticket = self._ticket(task)
            if task.resource == "GPU" or (inline_cpu and task.resource == "CPU"):
                inline.append(ticket)
            else:
                self._submit(ticket, bodies[task.id])
        current = self._tickets[tasks[-1].id]
        try:
            for current in inline:
                self._run_inline(current, bodies[current.task.id])
            if not inline:  # a copy that the caller needs
                self._wait(current)
        except BaseException as error:
            first = failure(current.task, error)
            self._fail_rest(first)
            raise first from first.__cause__

    def _ticket(self, task: Task) -> Ticket:
        ticket = self._tickets[task.id] = Ticket(task)
        return ticket

    def _submit(self, ticket: Ticket, body: Body) -> None:
        deps = [self._tickets[d] for d in ticket.task.deps if d in self._tickets]
        self._queues[ticket.task.resource].submit(ticket, deps, body)

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

    def _fail_rest(self, error: BaseException) -> None:
        for ticket in self._tickets.values():
            if ticket.task.resource not in self._queues and not ticket.done:
                ticket.fail(error)
        self.forget()

    def drain(self) -> list[Ticket]:
        """Wait for every issued task and forget it."""
        tickets = list(self._tickets.values())
        for ticket in tickets:
            self._wait(ticket)
        self._tickets = {}
        return tickets

    def forget(self) -> None:
        """Wait for every queue; what failed has been reported already."""
        for ticket in self._tickets.values():
            with suppress(ExecutionError, KeyboardInterrupt):
                self._wait(ticket)
        self._tickets = {}

    # -- time -----------------------------------------------------------------------------------------

    def mark(self, place: Place) -> Mark:
        """Now, on the host clock, wherever the work is."""
        del place
        return now_ns()

    def resolve(self, mark: Mark) -> int:
        """Marks are host times already."""
        assert isinstance(mark, int), "an emulated device has no events"
        return mark

    def close(self) -> None:
        """End the threads and restore the caller's thread count."""
        queues, self._queues = self._queues, {}
        for queue in queues.values():
            queue.close()
        if queues:
            torch.set_num_threads(self._caller_threads)
            os.sched_setaffinity(0, self._caller_cores)
        self._tickets.clear()
        self._staging.clear()
