"""A CUDA driver made of clocks: runs everything at once on the CPU and reports accesses that nothing orders.

Streams and threads are actors with vector clocks. Events, synchronisation, tickets and queues carry clocks
from one actor to another; two accesses to the same bytes, one of them a write, are a race unless the later
actor's clock has passed the earlier access.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime.devices import cuda
from runtime.devices.base import Awaitable, Body, Ticket, WorkerQueue

Clock = dict[str, int]


@dataclass(frozen=True)
class Access:
    """Bytes [start, stop) of a storage, touched by an actor at a tick of its clock."""

    start: int
    stop: int
    actor: str
    tick: int
    what: str


class Races:
    """All clocks and accesses of a run; `found` names the races."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.n_accesses = 0
        self._clocks: dict[str, Clock] = defaultdict(dict)
        self._reads: dict[int, list[Access]] = defaultdict(list)
        self._writes: dict[int, list[Access]] = defaultdict(list)
        self._alive: dict[int, torch.UntypedStorage] = {}  # so that no address means two tensors
        self._lock = threading.Lock()
        self._local = threading.local()

    # -- actors

    @property
    def host(self) -> str:
        """The calling thread."""
        return f"thread {threading.get_ident()}"

    @property
    def stream(self) -> str | None:
        """The calling thread's current stream, None where it has none."""
        return getattr(self._local, "stream", None)

    @contextmanager
    def on_stream(self, stream: str) -> Iterator[None]:
        """Launch into a stream inside the block."""
        before, self._local.stream = self.stream, stream
        try:
            yield
        finally:
            self._local.stream = before

    def clock(self, actor: str) -> Clock:
        """What an actor's next operation comes after."""
        with self._lock:
            return dict(self._clocks[actor])

    def learn(self, actor: str, clock: Clock) -> None:
        """An actor's next operation comes after all of a clock."""
        with self._lock:
            own = self._clocks[actor]
            for name, tick in clock.items():
                own[name] = max(own.get(name, 0), tick)

    # -- accesses

    def touch(self, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor], what: str) -> None:
        """One operation of the calling thread, on its current stream if it has one."""
        actor = self.stream or self.host
        self.learn(actor, self.clock(self.host))
        with self._lock:
            clock = self._clocks[actor]
            clock[actor] = tick = clock.get(actor, 0) + 1
            for tensors, written in ((reads, False), (writes, True)):
                for tensor in tensors:
                    self._check(tensor, Access(*extent(tensor), actor, tick, what), written, clock)

    def _check(self, tensor: torch.Tensor, access: Access, written: bool, clock: Clock) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        self._alive[address] = storage
        self.n_accesses += 1
        for other in [*self._writes[address], *(self._reads[address] if written else ())]:
            apart = other.stop <= access.start or access.stop <= other.start
            if not apart and clock.get(other.actor, 0) < other.tick:
                self.found.append(f"{access.what} on {access.actor} does not follow {other.what} on {other.actor}")
        (self._writes if written else self._reads)[address].append(access)


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte, plus one, of a tensor in its storage."""
    size, first = tensor.element_size(), int(tensor.storage_offset())
    last = first + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first * size, (last + 1) * size if tensor.numel() else first * size


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reports what every operation of the calling thread reads and writes."""

    def __init__(self, races: Races) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._races = races

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
        written = [given[a.name] for a in func._schema.arguments if a.is_write and a.name in given]
        writes = [t for t in tree_leaves(written) if isinstance(t, torch.Tensor)]
        inputs = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
        old = {t.untyped_storage().data_ptr() for t in inputs}
        new = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        writes += [t for t in new if t.untyped_storage().data_ptr() not in old]
        self._races.touch(inputs, writes, str(func))
        return out


# -- the driver ---------------------------------------------------------------------------------------


class FakeStream:
    """torch.cuda.Stream."""

    def __init__(self, races: Races, name: str) -> None:
        self.races, self.name = races, name

    def wait_event(self, event: FakeEvent) -> None:
        self.races.learn(self.name, event.clock)

    def wait_stream(self, other: FakeStream) -> None:
        self.races.learn(self.name, self.races.clock(other.name))


class FakeEvent:
    """torch.cuda.Event."""

    def __init__(self, races: Races) -> None:
        self.races, self.clock, self.at_s = races, Clock(), 0.0

    def record(self, stream: FakeStream) -> None:
        self.races.learn(stream.name, self.races.clock(self.races.host))
        self.clock, self.at_s = self.races.clock(stream.name), time.perf_counter()

    def synchronize(self) -> None:
        self.races.learn(self.races.host, self.clock)

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at_s - self.at_s)


class FakeTorch:
    """torch as runtime.devices.cuda uses it, with a driver made of clocks."""

    def __init__(self, races: Races) -> None:
        streams = {name: FakeStream(races, name) for name in ("compute", "copy 1", "copy 2")}
        copies = iter(("copy 1", "copy 2"))

        def synchronize(device: object = None) -> None:
            for name in streams:
                races.learn(races.host, races.clock(name))

        @contextmanager
        def nothing(*args: object) -> Iterator[None]:
            yield

        def ignore(*args: object) -> int:
            return 0

        self.cuda = SimpleNamespace(
            Stream=lambda device: streams[next(copies)],
            Event=lambda **how: FakeEvent(races),
            default_stream=lambda device: streams["compute"],
            current_stream=lambda device: streams["compute"],
            stream=lambda stream: races.on_stream(stream.name),
            synchronize=synchronize,
            device=nothing,
            cudart=lambda: SimpleNamespace(cudaHostRegister=ignore, cudaHostUnregister=ignore),
            get_device_properties=lambda device: SimpleNamespace(total_memory=1 << 40),
            **dict.fromkeys(
                (
                    "set_device",
                    "memory_reserved",
                    "max_memory_reserved",
                    "reset_peak_memory_stats",
                    "set_per_process_memory_fraction",
                    "empty_cache",
                ),
                ignore,
            ),
        )

    def device(self, kind: str, index: int) -> torch.device:
        del kind
        return torch.device("cpu", index)

    def empty(self, *size: int, pin_memory: bool = False, **how: Any) -> torch.Tensor:
        return torch.empty(*size, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def install(monkeypatch: pytest.MonkeyPatch) -> Races:
    """Put the driver in CUDA's place, and let tickets and queues carry clocks."""
    races, ends = Races(), dict[Ticket, Clock]()
    submit, finish, wait, tolist = WorkerQueue.submit, Ticket.finish, Ticket.wait, torch.Tensor.tolist

    def submit_clocked(self: WorkerQueue, ticket: Ticket, deps: Sequence[Awaitable], body: Body) -> None:
        clock = races.clock(races.host)

        def watched() -> None:
            races.learn(races.host, clock)
            with Watch(races):
                body()

        submit(self, ticket, deps, watched)

    def finish_clocked(self: Ticket, start_ns: int, end_ns: int) -> None:
        ends[self] = races.clock(races.host)
        finish(self, start_ns, end_ns)

    def wait_clocked(self: Ticket, alive: Callable[[], bool]) -> None:
        wait(self, alive)
        races.learn(races.host, ends[self])

    def tolist_synchronised(self: torch.Tensor) -> Any:
        if races.stream is not None:  # what the host reads of the device it has waited for
            races.learn(races.host, races.clock(races.stream))
        return tolist(self)

    monkeypatch.setattr(cuda, "torch", FakeTorch(races))
    monkeypatch.setattr(WorkerQueue, "submit", submit_clocked)
    monkeypatch.setattr(Ticket, "finish", finish_clocked)
    monkeypatch.setattr(Ticket, "wait", wait_clocked)
    monkeypatch.setattr(torch.Tensor, "tolist", tolist_synchronised)
    return races
