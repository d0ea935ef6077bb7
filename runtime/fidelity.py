"""The validation protocol: many plans of one model run for real, so that the simulator can be judged by them.

choose    every policy's plan, the fastest by prediction and some drawn ones, for several workloads and budgets
calibrate before anything runs, to choose and predict
run       with one prompt per workload and greedy tokens; plans take turns, as many at once as host memory holds,
          and the whole round is visited several times, each time with models loaded anew
beside    a second calibration takes turns with the runs, a round or so after each: simulation is judged by it, so
          that it and the runs stand for the same minutes of the machine
keep      wall times of all steps, the median run's tasks and routing, memory (sim.evidence)

Calibration measures other cases: a prompt of a length that it measured is refused.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from hwmodels.errors import FormatError
from hwmodels.pace import SLOW
from hwmodels.profile import HardwareProfile
from runtime.alongside import Alongside
from runtime.budget import fixed_bytes
from runtime.checkpoint import read_config
from runtime.measure import Measured, measure, median_run
from runtime.memory import trim_heap
from runtime.session import PlannedModel, load_planned
from sim.candidates import Candidate, candidates, chosen
from sim.evidence import ROUTING, RUNS, SPANS, Case, Evidence
from sim.memory import memory
from sim.model import ModelSpec, load_model
from sim.plan import Plan
from sim.policies import POLICIES
from sim.policies.problem import Problem
from sim.workload import Workload

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Protocol:
    """What is run.

    cells          workloads, each with a budget: the share of all MLP weights that the device holds beside everything
                   else; every cell gets plans of its own
    n_drawn        random plans to choose from in a cell; n_spread of them are run, over the predicted range
    n_top          fastest plans by prediction that are run in a cell, whoever made them
    visits         rounds over all plans, each with models loaded anew; repetitions of a plan in each of them
    at_once_bytes  host memory for models that are loaded at the same time and take turns
    """

    cells: tuple[tuple[Workload, float], ...]
    policies: Sequence[str] = tuple(POLICIES)
    n_drawn: int = 64
    n_spread: int = 2
    n_top: int = 5
    visits: int = 6
    repetitions: int = 1
    at_once_bytes: int = 4 << 30
    seed: int = 0


def check_held_out(profile: HardwareProfile, workloads: Sequence[Workload]) -> None:
    """FormatError if calibration measured a step of as many tokens as a workload's prompt has."""
    known = sorted({s.n_tokens for curve in profile.curves if curve.op == "attn" for s in curve.samples})
    for workload in workloads:
        n_tokens = workload.n_prompt * workload.batch
        if n_tokens in known:
            raise FormatError(
                f"a prompt of {n_tokens} tokens was part of the calibration of {profile.name}, which measured "
                f"{', '.join(map(str, known))}; validate with another length"
            )


def choose(spec: ModelSpec, profile: HardwareProfile, protocol: Protocol) -> list[Candidate]:
    """The plans that the protocol runs, with their predictions; PlanError if a cell has none."""
    found: list[Candidate] = []
    ffn_bytes = sum(spec.ffn_bytes(i) for i in range(spec.n_layers))
    for workload, share in protocol.cells:
        problem = Problem(spec, profile, fixed_bytes(spec, workload) + round(share * ffn_bytes), workload)
        pool = candidates(problem, protocol.policies, protocol.n_drawn, protocol.seed)
        found += chosen(pool, protocol.n_spread, protocol.n_top)
    return found


@dataclass
class _Log:
    """What was measured of one plan so far."""

    candidate: Candidate
    runs: list[Measured] = field(default_factory=list)
    visit_of: list[int] = field(default_factory=list)
    loaded_bytes: list[int] = field(default_factory=list)
    peak_vram_bytes: int = 0


def run_protocol(
    folder: Path,
    profile: HardwareProfile,
    calibrating: Callable[[int], AbstractContextManager[Alongside]],
    protocol: Protocol,
    device: str = "auto",
    cpu_threads: int | None = None,
    progress: bool = True,
) -> Evidence:
    """Choose plans for a checkpoint, run them, and bring back what was measured.

    profile is what is known before; calibrating begins the calibration beside so many runs. Raises FormatError for a
    workload that was calibrated, PlanError if no plan fits, ExecutionError if one fails.
    """
    check_held_out(profile, [workload for workload, _ in protocol.cells])
    spec = load_model(folder)
    logs = [_Log(candidate) for candidate in choose(spec, profile, protocol)]
    load = partial(load_planned, folder, device=device, cpu_threads=cpu_threads)
    total = len(logs) * protocol.visits * protocol.repetitions
    told = tqdm(total=total, desc=f"run {spec.name}", unit="run", disable=not progress, leave=False)
    with told as bar, calibrating(total) as beside:

        def ran() -> None:
            bar.update()
            beside.turn()

        for visit in range(protocol.visits):
            for group in _groups(spec, logs, protocol.at_once_bytes):
                _visit(group, visit, protocol, load, ran)
        found = beside.profile()
    return _evidence(folder, spec, found, logs)


def _groups(spec: ModelSpec, logs: Sequence[_Log], at_once_bytes: int) -> Iterator[list[_Log]]:
    """Plans that fit into memory together, at least one at a time."""
    group: list[_Log] = []
    held = 0
    for log in logs:
        need = memory(spec, log.candidate.plan)
        n_bytes = need.vram_bytes + need.host_bytes
        if group and held + n_bytes > at_once_bytes:
            yield group
            group, held = [], 0
        group.append(log)
        held += n_bytes
    yield group


def _visit(
    group: Sequence[_Log],
    visit: int,
    protocol: Protocol,
    load: Callable[[Plan], PlannedModel],
    tick: Callable[[], object],
) -> None:
    """Load a group of plans, let them take turns, close them."""
    with ExitStack() as stack:
        models: list[PlannedModel] = []
        for log in group:
            before = _anonymous_bytes()
            models.append(load(log.candidate.plan))
            stack.callback(models[-1].close)
            _measure(log, models[-1], protocol.seed, 2, repetitions=0)  # memory is held once it was written to
            after = _anonymous_bytes()
            if before is not None and after is not None:
                log.loaded_bytes.append(after - before)
        for _ in range(protocol.repetitions):
            for log, model in zip(group, models, strict=True):
                log.runs += _measure(log, model, protocol.seed, log.candidate.problem.workload.n_gen)
                log.visit_of.append(visit)
                log.peak_vram_bytes = max(log.peak_vram_bytes, log.runs[-1].peak_vram_bytes)
                tick()


def _measure(log: _Log, model: PlannedModel, seed: int, n_gen: int, repetitions: int = 1) -> list[Measured]:
    problem = log.candidate.problem
    return measure(model, prompt(problem.spec, problem.workload.n_prompt, seed), n_gen, repetitions)


def prompt(spec: ModelSpec, n_tokens: int, seed: int) -> list[int]:
    """Token ids that every plan gets; the first ones of a longer prompt are those of a shorter one."""
    draw = random.Random(seed)
    return [draw.randrange(min(3, spec.vocab - 1), spec.vocab) for _ in range(n_tokens)]


def _anonymous_bytes() -> int | None:
    """Memory of this process that is no file's; None where the system does not tell."""
    trim_heap()  # else what earlier models left behind is used again and nothing grows
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return int(found[0]) * 1024 if found else None


# -- what is kept -------------------------------------------------------------------------------------


def _evidence(folder: Path, spec: ModelSpec, profile: HardwareProfile, logs: Sequence[_Log]) -> Evidence:
    runs, spans, routing = [], [], []
    slow_s = SLOW * min((s for log in logs for run in log.runs for s in run.loops_s), default=0.0)
    for log in logs:
        plan_id, shown = log.candidate.plan.id, median_run(log.runs)
        n_of_visit: Counter[int] = Counter()
        for run, visit in zip(log.runs, log.visit_of, strict=True):
            walls = run.timeline.step_s.items()
            runs += [(plan_id, visit, n_of_visit[visit], step, wall_s) for step, wall_s in walls]
            n_of_visit[visit] += 1
        spans += [(plan_id, s.task, s.start_s, s.end_s) for s in shown.timeline.spans]
        routing += [(plan_id, *row) for row in shown.routing.rows()]
    return Evidence(
        config=read_config(folder),
        spec=spec,
        profile=profile,
        cases=tuple(_case(log, slow_s) for log in logs),
        runs=pd.DataFrame(runs, columns=list(RUNS)),
        spans=pd.DataFrame(spans, columns=list(SPANS)),
        routing=pd.DataFrame(routing, columns=list(ROUTING)),
    )


def _case(log: _Log, slow_s: float) -> Case:
    loads = [run.others_load for run in log.runs if run.others_load is not None]
    slowed = [s >= slow_s for run in log.runs for s in run.loops_s]
    return Case(
        plan=log.candidate.plan,
        workload=log.candidate.problem.workload,
        peak_vram_bytes=log.peak_vram_bytes,
        loaded_bytes=round(statistics.median(log.loaded_bytes)) if log.loaded_bytes else None,
        others_load=max(loads, default=None),
        tokens=median_run(log.runs).tokens,
        slowed=statistics.fmean(slowed) if slowed else None,
    )
