"""bench and validate: measure plans, and put the simulator's word beside."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from hwmodels.catalog import cache_folder
from hwmodels.errors import FormatError, PlanError
from hwmodels.profile import HardwareProfile
from runtime.autoplan import Request, choose_budget, choose_profile
from runtime.bench import Bench, Target
from runtime.bench import bench as run_bench
from runtime.cli.console import emit, note
from runtime.cli.files import check_folder
from runtime.cli.result_columns import MEASURED_COLUMNS
from runtime.cli.running import Source, open_source
from runtime.demo_models import write_demo_models
from runtime.resolve import check_checkpoint, resolve_folder, resolve_model
from runtime.validate import DEFAULT_POLICIES, Job
from runtime.validate import validate as run_validation
from sim import planner
from sim.plan import Plan, check_plan, load_plan
from sim.policies import known_policies
from sim.rows import Row
from sim.workload import Workload, check_context

# -- bench --------------------------------------------------------------------------------------------


def bench(flags: Namespace) -> None:
    """Measure plan files, or the plans of policies; a policy that does not fit is a row that says so."""
    if flags.plan is not None and flags.policy is not None:
        raise FormatError(
            "--plan and --policy are both given; expected one of them (SCHEINFER_PLAN and SCHEINFER_POLICY count, too)"
        )
    source = open_source(flags)
    job = Bench(flags.n_prompt, flags.n_gen, flags.n_depth, flags.repetitions, flags.seed)
    check_context(source.spec, job.deepest)
    names = known_policies(flags.policy or ("auto",))
    given = [_given(path, source, job.deepest) for path in flags.plan or ()]
    request = _request(flags, source, job.deepest)
    profile = choose_profile(request, progress=not flags.quiet, tell=lambda text: note(flags, text))
    plans, refused = (given, []) if given else _made(flags, request, profile, names)
    target = Target(
        source.folder, source.spec, source.tokenizer, profile, flags.device, flags.threads, flags.host_budget
    )
    emit(flags, [*run_bench(target, plans, job, progress=not flags.quiet), *refused], MEASURED_COLUMNS)


def _given(path: Path, source: Source, workload: Workload) -> Plan:
    plan = load_plan(path)
    check_plan(plan, source.spec)
    if plan.n_ctx < workload.n_ctx:
        raise PlanError(
            f"{path}: depth, prompt and generated tokens need a context of {workload.n_ctx}, the plan has "
            f"{plan.n_ctx}; plan again with --ctx-size {workload.n_ctx}"
        )
    return plan


def _request(flags: Namespace, source: Source, workload: Workload) -> Request:
    return Request(
        source.folder,
        source.spec,
        workload,
        device=flags.device,
        vram_budget_bytes=flags.vram_budget,
        host_budget_bytes=flags.host_budget,
        hardware=flags.hardware,
        cpu_threads=flags.threads,
    )


def _made(
    flags: Namespace, request: Request, profile: HardwareProfile, names: Sequence[str]
) -> tuple[list[Plan], list[Row]]:
    """A plan per policy, and a row per policy that does not fit; PlanError if none does."""
    budget = choose_budget(request, tell=lambda text: note(flags, text))
    plans: list[Plan] = []
    refused: list[Row] = []
    for name in names:
        try:
            plans.append(planner.plan(request.spec, profile, budget, request.workload, name))
        except PlanError as error:
            row = {"model": request.spec.name, "policy": name, "vram_budget_bytes": budget, "refused": str(error)}
            refused.append(row)
    if not plans:
        raise PlanError(str(refused[0]["refused"]))
    return plans, refused


# -- validate -----------------------------------------------------------------------------------------


def validate(flags: Namespace) -> None:
    """Validate models, or the two demonstration models, and write the report."""
    check_folder(flags.out)
    if flags.demo == (flags.model is not None):
        raise FormatError("give either --model or --demo: validate needs to know what to run")
    policies = known_policies(flags.policy) if flags.policy is not None else DEFAULT_POLICIES
    job = Job(
        device=flags.device,
        vram_budget_bytes=flags.vram_budget,
        n_prompt=flags.n_prompt,
        n_gen=flags.n_gen,
        policies=policies,
        repetitions=flags.repetitions,
        n_top=flags.top,
        quick=flags.quick,
        fresh=flags.fresh,
        cpu_threads=flags.threads,
        progress=not flags.quiet,
    )
    folders = _demo_folders(flags) if flags.demo else [resolve_folder(name) for name in flags.model]
    for folder in folders:
        check_checkpoint(folder)
        check_context(resolve_model(folder), Workload(flags.n_prompt, flags.n_gen))
    command = shlex.join(["scheinfer", *sys.argv[1:]])
    rows = run_validation(folders, flags.out, job, command, sys.stderr)
    note(flags, f"wrote {flags.out}; open {flags.out / 'index.html'}")
    emit(flags, rows, MEASURED_COLUMNS)


def _demo_folders(flags: Namespace) -> list[Path]:
    written = write_demo_models(cache_folder() / "demo", progress=lambda text: note(flags, text))
    return list(written.values())
