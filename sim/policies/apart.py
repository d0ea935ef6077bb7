"""A second process for the policies that auto follows: Python code keeps one core busy.

Only models of many experts are worth it; there it saves more than it takes to start. The process begins with the first
policy while this one searches; then this one begins with the last, until they meet. What the process does not bring
back, for whatever reason, is computed here: results are the same.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Hashable, Mapping
from contextlib import suppress
from threading import Condition, Thread
from typing import IO

from hwmodels.errors import PlanError
from sim.model import ModelSpec
from sim.plan import Plan, Prediction
from sim.policies.problem import Policy, Problem

LEAST_EXPERTS = 500
"""Experts of all layers from which planning takes much longer than to start Python."""
_LONGEST_S = 20.0
"""How long to wait for the plan that the process is at, before it is computed here."""


def proposed(propose: Policy, problem: Problem) -> Plan:
    """A policy's plan for a problem."""
    return propose(problem.spec, problem.profile, problem.vram_budget_bytes, problem.workload)


def worth_it(spec: ModelSpec) -> bool:
    """Whether a second process would save time: a large model, a free core, and no pool of processes already."""
    n_experts = sum(layer.ffn.n_experts for layer in spec.layers)
    alone = multiprocessing.parent_process() is None
    return alone and n_experts >= LEAST_EXPERTS and len(os.sched_getaffinity(0)) > 1


class Apart:
    """Policies at work in a process of their own as well; use as a context, which ends it.

    rough    rough predictions of the plans that are known, by their decisions
    """

    def __init__(self, problem: Problem, policies: Mapping[str, Policy]) -> None:
        self.rough: dict[Hashable, Prediction] = {}
        self._problem, self._policies = problem, policies
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[str, Plan | PlanError] = {}
        self._changed, self._working = Condition(), False

    def __enter__(self) -> Apart:
        code = "import sys; asked = sys.stdin.buffer.read(); from sim.policies.apart import serve; serve(asked)"
        paths = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)}
        with suppress(OSError):
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=paths,
            )
            self._working = True
            self._talk = Thread(target=self._ask, args=(self._process,), daemon=True)
            self._talk.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._talk.join(_LONGEST_S)
            self._process.wait()

    def plan(self, name: str, problem: Problem) -> Plan:
        """A policy's plan, once all are there; PlanError if it has none."""
        for other in reversed(tuple(self._policies)):
            if not self._is_known(other):
                answer = answered(self._policies[other], problem)
                with self._changed:
                    self._learn(other, *answer)
        found = self._known[name]
        if isinstance(found, PlanError):
            raise found
        return found

    def _is_known(self, name: str) -> bool:
        """Whether a policy's plan is there; if the process must be at it, when it had time to bring it."""
        with self._changed:
            if len(self._known) < len(self._policies) - 1:
                return name in self._known
            self._changed.wait_for(lambda: name in self._known or not self._working, _LONGEST_S)
            return name in self._known

    def _ask(self, process: subprocess.Popen[bytes]) -> None:
        """Ask the process and learn what it brings; whatever it does wrong, or its end, ends the talk."""
        assert process.stdin is not None, "it was asked for"
        assert process.stdout is not None, "it was asked for"
        try:
            with process.stdout as stdout, suppress(Exception):
                with process.stdin as stdin:  # not where plans are waited for: it may never be read
                    stdin.write(pickle.dumps((self._problem, dict(self._policies))))
                while True:
                    self._hear(stdout)
        finally:
            with self._changed:
                self._working = False
                self._changed.notify()

    def _hear(self, stdout: IO[bytes]) -> None:
        """Learn one policy's plan."""
        name, plan, rough = pickle.load(stdout)
        if name not in self._policies or not isinstance(plan, (Plan, PlanError)):
            raise ValueError(f"{name!r} with {type(plan)} was not asked for")
        with self._changed:
            self._learn(name, plan, rough)
            self._changed.notify()

    def _learn(self, name: str, plan: Plan | PlanError, rough: Prediction | None) -> None:
        self._known.setdefault(name, plan)
        if isinstance(plan, Plan) and rough is not None:
            self.rough[plan.decisions] = rough


def answered(propose: Policy, problem: Problem) -> tuple[Plan | PlanError, Prediction | None]:
    """A policy's plan and what it is roughly predicted, or why it has none."""
    try:
        plan = proposed(propose, problem)
    except PlanError as error:
        return error, None
    return plan, plan.prediction or problem.rough(plan)


def serve(asked: bytes) -> None:
    """What the process does: answers of the policies that it is asked for, to stdout, each when it is there."""
    problem, policies = pickle.loads(asked)
    for name, propose in policies.items():
        pickle.dump((name, *answered(propose, problem)), sys.stdout.buffer)
        sys.stdout.buffer.flush()
