"""Queues of tasks that native threads work off without the interpreter's lock. See queues.cpp.

A NativeBody is what a task does, in words that the library reads: it can be called as any body, and handed to the
queues where all bodies of a call are native.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hwmodels.errors import ExecutionError
from runtime import native
from runtime.native import Kernel
from sim.graph import Task

_COPY, _MLP, _ADD = range(3)
_QUEUES = {"GPU": 0, "CPU": 1, "H2D": 2, "D2H": 3}
_WAITING, _DONE, _NO_MEMORY, _NO_ISA, _FOLLOWED, _GIVEN_UP = range(6)
_WHY = {_NO_MEMORY: "no memory", _NO_ISA: "no such instruction set", _WAITING: "its queues have ended"}


class NativeBody:
    """What a task does, as words; holds the tensors whose addresses are among them."""

    __slots__ = ("held", "words")

    def __init__(self, words: array[int], held: object) -> None:
        self.words, self.held = words, held

    def __call__(self) -> None:
        """Do it on the calling thread."""
        kernel = native.kernel()
        assert kernel is not None, "words are made for a kernel"
        native.check(kernel.library.scheinfer_perform(self.words.buffer_info()[0]))


@dataclass(frozen=True, slots=True)
class Ended:
    """A task that has run, and when, on the host clock."""

    task: Task
    start_ns: int
    end_ns: int


def copying(pairs: Sequence[tuple[Tensor, Tensor]], bytes_per_s: float, chunk_bytes: int) -> NativeBody:
    """Copies (to, from) as Kernel.copy makes them."""
    words = array("q", (_COPY, int(bytes_per_s), chunk_bytes, len(pairs)))
    for to, of in pairs:
        words.extend((to.data_ptr(), of.data_ptr(), of.nbytes))
    return NativeBody(words, pairs)


def computing(
    kernel: Kernel, x_SD: Tensor, y_SD: Tensor, experts: Sequence[native.Expert], act: int, n_threads: int
) -> NativeBody:
    """Kernel.mlp into y, on so many threads; x and y contiguous."""
    words = array("q", (_MLP, x_SD.data_ptr(), y_SD.data_ptr(), *x_SD.shape))
    n_experts, table = native.expert_words(x_SD.shape[0], experts)
    words.extend((*native.codes(kernel, x_SD.dtype, act), n_threads, n_experts))
    words.extend(table)
    return NativeBody(words, (x_SD, y_SD, experts))


def adding(kernel: Kernel, to: Tensor, others: Sequence[Tensor]) -> NativeBody:
    """to += each of the others, rounded after each; contiguous."""
    dtype, _, isa = native.codes(kernel, to.dtype, 0)
    words = array("q", (_ADD, dtype, isa, to.numel(), to.data_ptr(), len(others), *(t.data_ptr() for t in others)))
    return NativeBody(words, (to, others))


class NativeQueues:
    """CPU, H2D and D2H as native threads; the calling thread is the fourth queue. Driven by one thread at a time."""

    def __init__(self, kernel: Kernel, handle: int) -> None:
        self._library, self._handle = kernel.library, handle
        self._issued: list[tuple[Task, array[int], int]] = []
        self._address: dict[str, int] = {}
        self._held: list[object] = []

    @staticmethod
    def open(kernel: Kernel, cpu_cores: Sequence[int], other_cores: Sequence[int]) -> NativeQueues | None:
        """Start the threads; copies use all cores. None if the system has no more threads."""
        cores = array("q", (*cpu_cores, *other_cores))
        handle = kernel.library.scheinfer_queues_open(cores.buffer_info()[0], len(cpu_cores), len(cores))
        return NativeQueues(kernel, handle) if handle else None

    @property
    def idle(self) -> bool:
        """Whether nothing was issued since the last drain."""
        return not self._issued

    def run(self, tasks: Sequence[Task], bodies: Mapping[str, NativeBody], inline_cpu: bool, wait: bool) -> None:
        """Issue tasks; run those of the GPU (and of the CPU, if inline) here. wait: until the last of all has ended.

        ExecutionError, naming the task, if one of these has failed.
        """
        n_before = len(self._issued)
        words, tickets = array("q"), array("q", bytes(24 * len(tasks)))
        first = tickets.buffer_info()[0]
        for i, task in enumerate(tasks):
            queue = 0 if inline_cpu and task.resource == "CPU" else _QUEUES[task.resource]
            deps = [self._address[d] for d in task.deps if d in self._address]
            words.extend((queue, first + 24 * i, bodies[task.id].words.buffer_info()[0], len(deps), *deps))
            self._address[task.id] = first + 24 * i
            self._issued.append((task, tickets, 3 * i))
        self._held.append((words, bodies))
        failed = self._library.scheinfer_queues_run(self._handle, words.buffer_info()[0], len(tasks), wait)
        if failed:
            why = ("no memory", "the threads of its device stayed in the process that was forked")[failed - 1]
            raise ExecutionError(f"task {tasks[0].id}: {why}")
        if wait:
            self._check(n_before)
            # Weights' words are needed until a send ahead has ended, activations must not pile up over layers.
            going_on = [bodies[task.id] for task, state, at in self._issued[n_before:] if state[at] == _WAITING]
            self._held[-1] = (words, going_on)

    def rest(self) -> None:
        """Wait for all that was issued; ExecutionError, naming the first that failed."""
        self._library.scheinfer_queues_rest(self._handle, 0)
        self._check(0)

    def drain(self) -> list[Ended]:
        """Wait for all that was issued since the last drain, and forget it; ExecutionError as rest."""
        if not self._issued:
            return []
        self.rest()
        found = [Ended(task, words[at + 1], words[at + 2]) for task, words, at in self._issued]
        self._clear()
        return found

    def forget(self) -> None:
        """Give up what has not begun, wait for the rest, forget all."""
        self._library.scheinfer_queues_rest(self._handle, 1)
        self._clear()

    def close(self) -> None:
        """End the threads."""
        self.forget()
        self._library.scheinfer_queues_close(self._handle)

    def _check(self, since: int) -> None:
        for task, words, at in self._issued[since:]:
            if (state := words[at]) in (_NO_MEMORY, _NO_ISA):
                raise ExecutionError(f"task {task.id} failed on {task.resource}: native kernel: {_WHY[state]}")

    def _clear(self) -> None:
        self._issued, self._address, self._held = [], {}, []
