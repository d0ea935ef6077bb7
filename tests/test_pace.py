"""Cores that something outside this system slows: a fixed loop tells."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import pace
from hwmodels.pace import SLOW, Pace, loop_s, pace_findings, watch


def test_a_loop_that_takes_nearly_twice_as_long_by_turns_is_slow_half_of_the_time():
    assert Pace.of([1.0, 1.9, 1.02, 1.85]) == Pace(1.0, 0.5)


def test_jitter_of_a_fifth_is_not_slow():
    assert Pace.of([1.0, 1.2, 1.1, 1.05]).slow_share == 0.0


@given(st.lists(st.floats(1e-6, 1.0), min_size=1))
def test_the_share_is_one_of_loops_and_the_fastest_is_never_slow(loops_s):
    found = Pace.of(loops_s)
    assert found.fastest_s == min(loops_s)
    assert 0.0 <= found.slow_share <= (len(loops_s) - 1) / len(loops_s)


def test_the_loop_takes_time():
    assert 1e-5 < loop_s() < 0.1


def test_every_core_is_watched_and_the_process_may_use_them_all_again(monkeypatch):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("threads cannot be moved between cores here")
    before, seen = os.sched_getaffinity(0), set()

    def timed() -> float:
        seen.add(frozenset(os.sched_getaffinity(0)))
        return 1.0

    monkeypatch.setattr(pace, "loop_s", timed)
    assert watch(0.02) == Pace(1.0, 0.0)
    assert seen == {frozenset({core}) for core in before}
    assert os.sched_getaffinity(0) == before


def test_cores_are_given_back_when_a_watch_is_interrupted(monkeypatch):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("threads cannot be moved between cores here")
    before = os.sched_getaffinity(0)

    def interrupted() -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(pace, "loop_s", interrupted)
    with pytest.raises(KeyboardInterrupt):
        watch(0.02)
    assert os.sched_getaffinity(0) == before


def test_a_finding_says_how_much_and_how_often():
    (found,) = pace_findings(Pace(0.00017, 0.7))
    assert "0.17 ms" in found.limit
    assert f"{SLOW:g} times" in found.limit
    assert "70%" in found.limit
    assert "--repeats" in found.fix


def test_cores_that_keep_their_pace_are_no_finding():
    assert pace_findings(Pace(0.00017, 0.05)) == []
