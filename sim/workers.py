"""Many independent calls on an executor: few in flight, results as they come, no call lost to a dead worker."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

from hwmodels.errors import ExecutionError

Item = TypeVar("Item")
Result = TypeVar("Result")

_IN_FLIGHT = 512
"""Calls handed to an executor of unknown size at once: they keep a large cluster busy and take little memory."""


@dataclass(frozen=True)
class Done(Generic[Item, Result]):
    """A call that ended: its result, or the error that it raised."""

    item: Item
    result: Result | None
    error: BaseException | None = None


Batch = list[Done[Item, Result]]
Batches = Generator[Batch[Item, Result], None, None]


def run_here(call: Callable[[Item], Result], items: Sequence[Item]) -> Batches[Item, Result]:
    """Call after call in this process."""
    for item in items:
        try:
            yield [Done(item, call(item))]
        except Exception as error:
            yield [Done(item, None, error)]


def run_on(executor: Executor, call: Callable[[Item], Result], items: Sequence[Item]) -> Batches[Item, Result]:
    """Calls on an executor that belongs to somebody else and is left open.

    Raises ExecutionError if the executor breaks: what ended before has been handed out.
    """
    lost = yield from _drain(executor, call, deque(items), _IN_FLIGHT)
    if lost:
        raise ExecutionError(f"the executor broke; calls lost with it: {len(lost)}, the first of {lost[0]}; run again")


def run_in_processes(call: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Batches[Item, Result]:
    """Calls in processes of our own, which end with this one however it ends.

    A worker that dies takes the calls in flight with it: these are repeated one by one, so that the call
    that kills is found out and reported alone. Raises ExecutionError if workers cannot start.
    """
    waiting: deque[Item] = deque(items)
    suspects: deque[Item] = deque()
    while waiting:
        with _pool(workers) as pool:
            suspects += yield from _drain(pool, call, waiting, 2 * workers)
        while suspects:
            with _pool(1) as pool:
                killers = yield from _drain(pool, call, suspects, 1)
            for item in killers:
                yield [Done(item, None, ExecutionError("its worker process died; is there enough memory for it?"))]


def _drain(
    executor: Executor, call: Callable[[Item], Result], waiting: deque[Item], most: int
) -> Generator[Batch[Item, Result], None, list[Item]]:
    """Move calls from `waiting` through the executor; returns those that it lost when it broke."""
    flying: dict[Future[Result], Item] = {}
    lost: list[Item] = []
    try:
        while flying or (waiting and not lost):
            _launch(executor, call, waiting, flying, 0 if lost else most)
            ended, _ = wait(flying, return_when=FIRST_COMPLETED)
            done = [_done(flying.pop(future), future) for future in ended]
            lost += [d.item for d in done if isinstance(d.error, BrokenExecutor)]
            if len(whole := [d for d in done if not isinstance(d.error, BrokenExecutor)]):
                yield whole
    finally:
        for future in flying:
            future.cancel()
    return lost


def _launch(
    executor: Executor,
    call: Callable[[Item], Result],
    waiting: deque[Item],
    flying: dict[Future[Result], Item],
    most: int,
) -> None:
    while waiting and len(flying) < most:
        item = waiting.popleft()
        try:
            flying[executor.submit(call, item)] = item
        except BrokenExecutor as error:  # as a future, so that it is met where the others are
            broken: Future[Result] = Future()
            broken.set_exception(error)
            flying[broken] = item
            return


def _done(item: Item, future: Future[Result]) -> Done[Item, Result]:
    if future.cancelled():
        return Done(item, None, BrokenExecutor("the executor cancelled the call"))
    error = future.exception()
    return Done(item, future.result() if error is None else None, error)


# -- processes of our own -----------------------------------------------------------------------------


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that end when this block or this process does, in the midst of a call if need be."""
    context = get_context("spawn")  # a forked child would inherit locks that threads of this process hold
    lifeline, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _begin, (lifeline,))
    try:
        _start(pool)
        yield pool
        pool.shutdown()
    finally:
        ours.close()
        pool.shutdown(cancel_futures=True)
        lifeline.close()


def _start(pool: ProcessPoolExecutor) -> None:
    try:
        pool.submit(os.getpid).result()
    except BrokenExecutor as error:
        raise ExecutionError(
            "worker processes cannot start. A script that asks for workers must do so under "
            "`if __name__ == '__main__':`, since every worker imports it; or use one worker"
        ) from error


def _begin(lifeline: Connection) -> None:
    """In a worker: leave Ctrl-C to the process that commands, and end when that process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    lifeline.poll(None)  # nothing is ever sent: this returns when the other end is closed
    os._exit(1)
