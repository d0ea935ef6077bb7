"""How busy others keep this machine while something is measured."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

BUSY_SHARE = 0.1
"""Share of all cores taken by others from which on a measurement is marked."""

LEAST_S = 0.25
"""Shorter, the system's clock ticks (10 ms each on every core) and what it books late decide what others took."""

_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class LoadMeter:
    """A point in time to measure others' load from: what all processes, and this one, had used by then."""

    busy_s: float | None
    own_s: float
    wall_s: float

    @staticmethod
    def start() -> LoadMeter:
        """Begin a measurement."""
        return LoadMeter(_busy_s(), time.process_time(), time.perf_counter())

    def others(self) -> float | None:
        """Share of all cores that other processes (and the host of a virtual machine) took since the start.

        None where the system does not tell, and within LEAST_S of the start.
        """
        now_s, wall_s = _busy_s(), time.perf_counter() - self.wall_s
        if now_s is None or self.busy_s is None or wall_s < LEAST_S:
            return None
        own_s = time.process_time() - self.own_s
        return min(1.0, max(0.0, (now_s - self.busy_s - own_s) / (wall_s * (os.cpu_count() or 1))))


def _busy_s() -> float | None:
    """Seconds that all cores together were busy since boot: all states but idle and waiting for disks."""
    try:
        fields = _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        user, nice, system, _idle, _wait, irq, softirq, steal = (int(f) for f in fields[:8])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
