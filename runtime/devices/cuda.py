"""The CUDA device: one stream each for compute, H2D and D2H, one CPU worker, a hard memory cap.

Streams are in-order queues already; dependencies between them are events, so nothing in a step
synchronises the whole device. A CPU task waits for its event in the worker thread; the calling thread
waits for a CPU task only where its result is sent back, after everything else of the layer was issued.
"""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch

from hwmodels.errors import ExecutionError, PlanError
from hwmodels.units import format_bytes
from runtime import native
from runtime.clock import now_ns
from runtime.devices.base import (
    Arena,
    Body,
    CopyPair,
    DeviceKind,
    Mark,
    Ticket,
    WorkerQueue,
    failure,
    give_up,
    take_threads,
)
from sim.graph import Task
from sim.plan import Place

_ALLOCATOR_SLACK_BYTES = 64 << 20  # blocks are rounded up to 2 MiB, small ones come in segments of 20 MiB
_budgets: dict[int, list[int]] = {}
"""Bytes that open devices may hold, by device index."""


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]


class _StreamTask:
    """A task in a stream: its ticket and the events around it."""

    __slots__ = ("end", "start", "ticket")

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.start = _event()
        self.end = _event()


class _EventWait:
    """An event as something the CPU worker waits for; blocking events sleep instead of spinning."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self, alive: Callable[[], bool]) -> None:
        """Return when the event has happened."""
        del alive  # the driver reports a broken context as an error
        self._event.synchronize()


class CudaDevice:
    """One CUDA device under a memory cap. See runtime.devices.base.Device for the interface."""

    kind: DeviceKind = "cuda"

    def __init__(self, index: int, vram_bytes: int, cpu_threads: int | None = None) -> None:
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        self._vram_bytes = vram_bytes
        self._held_before = int(torch.cuda.memory_reserved(self.torch_device))
        _budgets.setdefault(index, []).append(vram_bytes)
        self._cap()
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        self.arena = Arena(vram_bytes)
        # One core stays with the thread that drives the device.
        cores = sorted(os.sched_getaffinity(0))
        self.cpu_threads = min(cpu_threads or max(1, len(cores) - 1), len(cores))
        self._streams = {
            "GPU": torch.cuda.default_stream(self.torch_device),
            "H2D": torch.cuda.Stream(self.torch_device),  # type: ignore[no-untyped-call]
            "D2H": torch.cuda.Stream(self.torch_device),  # type: ignore[no-untyped-call]
        }
        self._cpu = WorkerQueue("cpu", self.cpu_threads, frozenset(cores[-self.cpu_threads :]))
        self._tickets: dict[str, Ticket] = {}
        self._stream_tasks: dict[str, _StreamTask] = {}
        self._staging: dict[str, torch.Tensor] = {}
        self._registered: list[tuple[int, mmap.mmap]] = []
        self._entry: torch.cuda.Event | None = None
        self._closed = False
        self._driver, self._is_driven = threading.RLock(), False
        self.set_clock()

    def _cap(self) -> None:
        # The cap is the process's: budgets of all open devices, and what was held before the first of them.
        budgets = _budgets[self.torch_device.index]
        total = torch.cuda.get_device_properties(self.torch_device).total_memory
        allowed = sum(budgets) + len(budgets) * _ALLOCATOR_SLACK_BYTES + self._held_before
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total) if budgets else 1.0, self.torch_device)

    # -- memory ---------------------------------------------------------------------------------------

    def allocate(self, n_elements: int, dtype: torch.dtype, what: str) -> torch.Tensor:
        """A flat tensor on the device, accounted for in the arena."""
        n_bytes = n_elements * dtype.itemsize
        self.arena.take(n_bytes, what)
        try:
            return torch.empty(n_elements, dtype=dtype, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            free_bytes, _ = torch.cuda.mem_get_info(self.torch_device)
            raise PlanError(
                f"device memory: {what} needs {format_bytes(n_bytes)}, the device has {format_bytes(free_bytes)} free; "
                f"lower --vram-budget or end what else uses the device"
            ) from error

    def host_slab(self, n_elements: int, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
        """Exact-size anonymous memory, registered with the driver if it is to be page-locked.

        torch's own pinned allocator rounds up to powers of two; a slab of 70 GB would take 128 GB.
        """
        n_bytes = n_elements * dtype.itemsize
        if n_bytes == 0:
            return torch.empty(0, dtype=dtype)
        memory = mmap.mmap(-1, n_bytes)
        slab = torch.frombuffer(memory, dtype=dtype)
        if pinned:
            self._register(slab, memory)
        return slab

    def _register(self, slab: torch.Tensor, memory: mmap.mmap) -> None:
        # The whole slab or nothing: no copy may span memory that is registered in part, or in two pieces.
        status = int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.nbytes, 0))  # type: ignore[no-untyped-call]
        if status == 0:
            self._registered.append((slab.data_ptr(), memory))
            return
        with suppress(RuntimeError):  # the runtime keeps the error for the next launch to report: let this one
            torch.zeros(1, device=self.torch_device)
        warnings.warn(
            f"{format_bytes(slab.nbytes)} of host weights could not be page-locked (CUDA error {status}); their copies "
            f"run at the pageable rate: raise the memlock limit, or plan again with a profile of pageable copies",
            RuntimeWarning,
            stacklevel=2,
        )

    def staging(self, like: torch.Tensor, name: str, on_host: bool) -> torch.Tensor:
        """A persistent buffer: no stream may be handed memory that another still reads."""
        key = f"{name}/{on_host}"
        held = self._staging.get(key)
        if held is None or held.numel() < like.numel() or held.dtype != like.dtype:
            where = {"pin_memory": True} if on_host else {"device": self.torch_device}
            with torch.cuda.device(self.torch_device), torch.inference_mode(False):
                torch.cuda.synchronize()  # the old buffer may be in use; happens once per size
                held = self._staging[key] = torch.empty(like.numel(), dtype=like.dtype, **where)
        return held[: like.numel()].view(like.shape)

    def copy(self, pairs: Sequence[CopyPair], pinned: bool) -> None:
        """Copy in the current stream; from or to ordinary memory the driver makes it synchronous."""
        for target, source in pairs:
            target.copy_(source, non_blocking=pinned)

    def copying(self, pairs: Sequence[CopyPair], pinned: bool) -> Body:
        """A call of copy."""
        return lambda: self.copy(pairs, pinned)

    @property
    def takes_words(self) -> bool:
        """No: its queues are streams."""
        return False

    def peak_bytes(self) -> int:
        """Most bytes that torch's allocator held."""
        return int(torch.cuda.max_memory_reserved(self.torch_device))

    # -- tasks ----------------------------------------------------------------------------------------

    @contextmanager
    def driving(self) -> Iterator[None]:
        """The calling thread launches into this device's compute stream inside the block, after its own work."""
        with self._driver:
            if self._is_driven:
                yield
                return
            own, compute = torch.cuda.current_stream(self.torch_device), self._streams["GPU"]
            n_threads = torch.get_num_threads()
            try:
                self._is_driven = True
                compute.wait_stream(own)
                with torch.cuda.stream(compute):  # a stream brings its device with it
                    yield
            finally:
                self._is_driven = False
                take_threads(n_threads, by_kernel=False)
                own.wait_stream(compute)

    def work_at(self, place: Place, by_kernel: bool) -> None:
        """The calling thread launches for the device and computes for the CPU, on the same cores."""
        if place == "CPU":
            take_threads(self.cpu_threads, by_kernel)

    def issue(self, tasks: Sequence[Task], bodies: Mapping[str, Body]) -> None:
        """Launch copies into their streams."""
        for task in tasks:
            self._launch(task, bodies[task.id])

    def run(self, tasks: Sequence[Task], bodies: Mapping[str, Body], inline_cpu: bool) -> None:
        """Launch every task in order; streams do the waiting, and the caller's stream follows the last."""
        current = tasks[0]
        try:
            with self.driving():
                self._entry = _event()
                self._entry.record(self._streams["GPU"])
                inline = [t for t in tasks if inline_cpu and t.resource == "CPU"]
                for current in tasks:
                    if current.resource != "CPU":
                        self._launch(current, bodies[current.id])
                    elif not inline_cpu:
                        self._submit(current, bodies[current.id])
                for current in inline:  # last: copies for the next layer are on their way meanwhile
                    self._run_inline(current, bodies[current.id])
                if not inline and current.resource != "GPU":  # a copy that the caller needs
                    self._stream_tasks[current.id].end.synchronize()
        except BaseException as error:
            first = failure(current, error)
            self.forget()
            raise first from first.__cause__

    def _run_inline(self, task: Task, body: Body) -> None:
        ticket = self._tickets[task.id] = Ticket(task)
        start_ns = now_ns()
        body()
        ticket.finish(start_ns, now_ns())

    def _submit(self, task: Task, body: Body) -> None:
        ticket = self._tickets[task.id] = Ticket(task)
        deps = [_EventWait(self._stream_tasks[d].end) for d in task.deps if d in self._stream_tasks]
        self._cpu.submit(ticket, deps, body)

    def _launch(self, task: Task, body: Body) -> None:
        if self._closed:
            raise ExecutionError(f"task {task.id}: the device is closed")
        stream = self._streams[task.resource]
        if task.kind == "hidden_d2h":  # its source is what the calling thread issued last
            stream.wait_stream(self._streams["GPU"])
        for name in task.deps:
            self._follow(stream, name)
        entry = _StreamTask(Ticket(task))
        with torch.cuda.stream(stream):
            entry.start.record(stream)
            body()
            entry.end.record(stream)
        self._tickets[task.id], self._stream_tasks[task.id] = entry.ticket, entry

    def _follow(self, stream: torch.cuda.Stream, name: str) -> None:
        dep = self._stream_tasks.get(name)
        if dep is not None:
            stream.wait_event(dep.end)
        elif name in self._tickets:  # a CPU task: its end is known to the host alone
            self._tickets[name].wait(lambda: self._cpu.alive)
        elif self._entry is not None:  # attention, launched by the caller before this layer's tasks
            stream.wait_event(self._entry)

    def finished(self, task: Task, start_ns: int, end_ns: int) -> None:
        """A task that the calling thread ran by itself."""
        ticket = self._tickets[task.id] = Ticket(task)
        ticket.finish(start_ns, end_ns)

    def drain(self) -> list[Ticket]:
        """Wait for every issued task; times of stream tasks are read from their events."""
        tickets = list(self._tickets.values())
        try:
            for ticket in tickets:
                entry = self._stream_tasks.get(ticket.task.id)
                if entry is None:
                    ticket.wait(lambda: self._cpu.alive)
                else:
                    ticket.finish(self.resolve(entry.start), self.resolve(entry.end))
        except BaseException:
            self.forget()
            raise
        self._tickets, self._stream_tasks = {}, {}
        return tickets

    def forget(self) -> None:
        """Wait for the CPU worker and all streams; drop what was issued."""
        give_up(self._tickets.values())
        self._cpu.rest()
        with suppress(RuntimeError):  # a broken context has been reported by whatever broke it
            torch.cuda.synchronize(self.torch_device)
        self._tickets, self._stream_tasks = {}, {}

    # -- time -----------------------------------------------------------------------------------------

    def set_clock(self) -> None:
        """A new reference: event times are relative, in single precision, and the two clocks drift apart."""
        self._reference = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._reference.record(self._streams["GPU"])
        self._reference.synchronize()
        self._reference_ns = now_ns()

    def mark(self, place: Place) -> Mark:
        """An event in the compute stream, or the host time for work of the CPU."""
        if place == "CPU":
            return now_ns()
        event = _event()
        event.record(self._streams["GPU"])
        return event

    def resolve(self, mark: Mark) -> int:
        """Host nanoseconds: the reference's host time plus the time between the two events."""
        if isinstance(mark, int):
            return mark
        mark.synchronize()
        return self._reference_ns + int(self._reference.elapsed_time(mark) * 1e6)

    def close(self) -> None:
        """End the worker, unregister and drop host memory, lift the cap."""
        if self._closed:
            return
        self._closed = True
        self.forget()
        self._cpu.close()
        native.end_workers()
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        for address, _ in self._registered:
            runtime.cudaHostUnregister(address)
        self._registered.clear()
        self._staging.clear()
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
        _budgets[self.torch_device.index].remove(self._vram_bytes)
        self._cap()
