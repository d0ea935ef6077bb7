"""The one clock of the runtime."""

from __future__ import annotations

from time import perf_counter_ns


def now_ns() -> int:
    """Nanoseconds of the monotonic host clock."""
    return perf_counter_ns()
