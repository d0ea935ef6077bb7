"""Policies in a second process: the same plans as in one, whatever becomes of the process."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace

import pytest

from hwmodels.errors import PlanError
from sim.policies import apart, auto
from sim.policies.apart import Apart
from sim.policies.problem import Problem
from sim.workload import Workload
from tests.machines import GB, budget, dense, machine, moe

SHORT = Workload(8, 4)


@pytest.mark.parametrize("spec", [moe(2, n_experts=4, columns=32), dense(3)])
def test_auto_decides_the_same_with_a_second_process(spec, monkeypatch):
    problem = Problem(spec, machine(together=(0.7, 0.8)), budget(spec, SHORT, 0.5), SHORT)
    in_one = auto.decide(problem)
    monkeypatch.setattr(apart, "LEAST_EXPERTS", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    assert apart.worth_it(spec)
    in_two = auto.decide(problem)
    assert in_two.plan == in_one.plan
    assert in_two.certificate == in_one.certificate


def test_plans_come_from_the_process_and_so_do_refusals_and_rough_predictions(monkeypatch):
    problem = Problem(moe(), machine(), 1000, SHORT)
    names = ("gpu-only", "cpu-only")
    with Apart(problem, {name: auto.OTHERS[name] for name in names}) as other:
        with other._changed:
            assert other._changed.wait_for(lambda: set(other._known) == set(names), 60)
        monkeypatch.setattr(apart, "answered", None)  # nothing is computed here
        with pytest.raises(PlanError, match="gpu-only needs"):
            other.plan("gpu-only", problem)
        plan = other.plan("cpu-only", problem)
        assert plan == auto.followed("cpu-only", problem)
        assert other.rough[plan.decisions] == problem.rough(plan)


@pytest.mark.parametrize(
    "does", ["printf 'cnowhere\\nthing\\n.'", "printf 'K\\001.'", "printf garbage", "exec sleep 60"]
)
def test_a_process_that_talks_nonsense_or_never_listens_changes_nothing(does, monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    long = replace(machine(), notes=("more than a pipe holds",) * 10_000)
    problem, before = Problem(moe(), long, GB, SHORT), threading.active_count()
    monkeypatch.setattr(apart, "_LONGEST_S", 0.1)
    monkeypatch.setattr(sys, "executable", str(program))
    with Apart(problem, auto.OTHERS) as other:
        assert other.plan("cpu-only", problem) == auto.followed("cpu-only", problem)
    assert threading.active_count() == before


def test_a_process_that_brings_nothing_is_not_waited_for_long(monkeypatch):
    problem = Problem(moe(), machine(), GB, SHORT)
    monkeypatch.setattr(apart, "_LONGEST_S", 0.1)
    monkeypatch.setattr(sys, "executable", "/bin/cat")  # reads, but answers nothing that can be understood
    with Apart(problem, auto.OTHERS) as other:
        assert other.plan("cpu-only", problem) == auto.followed("cpu-only", problem)


@pytest.mark.parametrize("broken", ["/nowhere/python", "/bin/false"])
def test_without_the_process_plans_are_made_here(broken, monkeypatch):
    problem = Problem(moe(), machine(), GB, SHORT)
    monkeypatch.setattr(sys, "executable", broken)
    with Apart(problem, auto.OTHERS) as other:
        assert other.plan("fiddler", problem) == auto.followed("fiddler", problem)


def test_small_models_and_processes_of_a_pool_start_none(monkeypatch):
    assert not apart.worth_it(moe())
    monkeypatch.setattr(apart, "LEAST_EXPERTS", 0)
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    assert not apart.worth_it(moe())
