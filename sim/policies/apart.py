"""A second process for the policies that auto follows, while this one searches: Python code keeps one core busy.

Only models of many experts are worth it; there it takes a third off the time. What the process does not bring back,
for whatever reason, is computed here: results are the same.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress

from hwmodels.errors import PlanError
from sim.model import ModelSpec
from sim.plan import Plan
from sim.policies.problem import Policy, Problem

LEAST_EXPERTS = 500
"""Experts of all layers from which planning takes much longer than to start Python."""


def proposed(propose: Policy, problem: Problem) -> Plan:
    """A policy's plan for a problem."""
    return propose(problem.spec, problem.profile, problem.vram_budget_bytes, problem.workload)


def worth_it(spec: ModelSpec) -> bool:
    """Whether a second process would save time: a large model, a free core, and no pool of processes already."""
    n_experts = sum(layer.ffn.n_experts for layer in spec.layers)
    alone = multiprocessing.parent_process() is None
    return alone and n_experts >= LEAST_EXPERTS and len(os.sched_getaffinity(0)) > 1


class Apart:
    """Policies at work in a process of their own; use as a context, which ends it."""

    def __init__(self, problem: Problem, policies: Mapping[str, Policy]) -> None:
        self._policies = policies
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = pickle.dumps((problem, dict(policies)))
        self._plans: dict[str, Plan | PlanError] | None = None

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
            assert self._process.stdin is not None, "it was asked for"
            self._process.stdin.write(self._asked)
            self._process.stdin.close()
            self._process.stdin = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._ended(self._process)

    def plan(self, name: str, problem: Problem) -> Plan:
        """A policy's plan, when it is there; PlanError if it has none."""
        if self._plans is None:
            self._plans = self._received()
        found = self._plans.get(name)
        if isinstance(found, PlanError):
            raise found
        return found or proposed(self._policies[name], problem)

    def _received(self) -> dict[str, Plan | PlanError]:
        if self._process is None:
            return {}
        out = self._ended(self._process)
        found: dict[str, Plan | PlanError] = pickle.loads(out) if self._process.returncode == 0 else {}
        self._process = None
        return found

    @staticmethod
    def _ended(process: subprocess.Popen[bytes]) -> bytes:
        """What it wrote, after its end."""
        assert process.stdout is not None, "it was asked for"
        with process.stdout as stdout:
            out = stdout.read()
        process.wait()
        return out


def serve(asked: bytes) -> None:
    """What the process does: plans of the policies that it is asked for, or why there are none, to stdout."""
    problem, policies = pickle.loads(asked)
    found: dict[str, Plan | PlanError] = {}
    for name, propose in policies.items():
        try:
            found[name] = proposed(propose, problem)
        except PlanError as error:
            found[name] = error
    sys.stdout.buffer.write(pickle.dumps(found))
