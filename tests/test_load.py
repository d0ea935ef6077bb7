"""How busy others are: what all processes used, less what this one used, over what the machine could give."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hwmodels import load
from hwmodels.load import LoadMeter

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Machine:
    """Two cores whose times are set by hand."""

    def __init__(self, stat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stat, self.wall_s, self.own_s = stat, 0.0, 0.0
        self.show()
        monkeypatch.setattr(load, "_STAT", stat)
        monkeypatch.setattr(load.os, "cpu_count", lambda: 2)
        monkeypatch.setattr(load.time, "perf_counter", lambda: self.wall_s)
        monkeypatch.setattr(load.time, "process_time", lambda: self.own_s)

    def show(self, user_s: float = 0.0, idle_s: float = 0.0, steal_s: float = 0.0) -> None:
        ticks = [round(s / TICK_S) for s in (user_s, 0, 0, idle_s, 0, 0, 0, steal_s)]
        self.stat.write_text(f"cpu  {' '.join(map(str, ticks))} 0 0\ncpu0 1 2 3\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "stat", monkeypatch)


def test_what_this_process_uses_is_not_others(machine):
    meter = LoadMeter.start()
    machine.wall_s, machine.own_s = 10.0, 10.0
    machine.show(user_s=10.0, idle_s=10.0)
    assert meter.others() == 0.0


def test_others_are_counted_as_a_share_of_all_cores(machine):
    # 10 s of two cores are 20 s; this process used 10 of them and somebody else 5
    meter = LoadMeter.start()
    machine.wall_s, machine.own_s = 10.0, 10.0
    machine.show(user_s=15.0, idle_s=5.0)
    assert meter.others() == pytest.approx(0.25)


def test_what_a_virtual_machines_host_takes_counts_as_others(machine):
    meter = LoadMeter.start()
    machine.wall_s = 10.0
    machine.show(idle_s=16.0, steal_s=4.0)
    assert meter.others() == pytest.approx(0.2)


def test_rounding_never_makes_it_negative_or_more_than_all(machine):
    meter = LoadMeter.start()
    machine.wall_s, machine.own_s = 1.0, 1.5
    machine.show(user_s=1.0)
    assert meter.others() == 0.0
    machine.show(user_s=99.0)
    assert meter.others() == 1.0


def test_a_system_that_does_not_tell_gives_none(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "_STAT", tmp_path / "missing")
    assert LoadMeter.start().others() is None


def test_a_moment_is_too_short_to_tell(machine):
    # one tick of a core in a fifth of a second of two would be 2.5 %, and what a host took may be booked at once
    meter = LoadMeter.start()
    machine.wall_s = load.LEAST_S - 0.05
    machine.show(steal_s=0.3)
    assert meter.others() is None
    machine.wall_s = load.LEAST_S
    assert meter.others() is not None
