"""plan, simulate, compare: what would happen, and how it differs from what did. No torch in here."""

from __future__ import annotations

import io
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

from hwmodels.catalog import hardware
from hwmodels.errors import FormatError
from hwmodels.profile import HardwareProfile
from hwmodels.schema import write_bytes, write_json
from hwmodels.units import format_bytes
from runtime.cli.console import emit, emit_text, note, refuse_pins, say
from runtime.cli.files import check_file, check_folder
from runtime.cli.result_columns import ERROR_COLUMNS, SIMULATED_COLUMNS
from runtime.cli.table import Row, markdown
from runtime.resolve import resolve_model
from sim import planner
from sim.certify import proof_keys, proof_words
from sim.compare import Comparison
from sim.compare import compare as compare_timelines
from sim.export import EXPORTS
from sim.limit import kind_of, limit_of
from sim.model import ModelSpec
from sim.pins import pins_of
from sim.plan import Plan, Prediction, check_plan, load_plan
from sim.policies.problem import Problem
from sim.rows import Speeds, simulated_row
from sim.sensitivity import sensitivity
from sim.simulate import simulate as run_simulation
from sim.timeline import load_timeline
from sim.workload import RoutingTrace, Workload, check_context


def plan(flags: Namespace) -> None:
    """Make a plan, explain it, write it."""
    check_file(flags.out)
    spec = resolve_model(flags.model, flags.dtype)
    profile, workload = _profile(flags), _workload(flags)
    check_context(spec, workload)
    budget = flags.vram_budget or profile.vram_bytes
    problem = Problem(spec, profile, budget, _with_room(workload, flags.ctx_size), pins_of(spec, flags.pin))
    decision = planner.decide(problem, flags.policy)
    made = decision.plan
    timeline = run_simulation(spec, made, profile, workload)
    made = made.with_prediction(Prediction(**asdict(Speeds.of(timeline, workload))))
    if flags.out is not None:
        made.save(flags.out)
        note(flags, f"wrote {flags.out}")
    limit = limit_of(spec, profile, budget, workload, kind_of(made))
    row = simulated_row(spec, made, profile, workload, timeline, limit)
    if flags.explain:
        gains = sensitivity(problem, decision)
        row |= proof_keys(decision.certificate, limit, gains)
        say(flags, planner.explain(spec, profile, made, workload) + "\n" + proof_words(decision.certificate, gains))
    if flags.export is None:
        emit(flags, [row], SIMULATED_COLUMNS)
    elif flags.output == "md":
        note(flags, markdown([row], SIMULATED_COLUMNS))
        emit_text(EXPORTS[flags.export](made, spec))
    else:
        emit(flags, [{**row, "export": EXPORTS[flags.export](made, spec)}], SIMULATED_COLUMNS)


def simulate(flags: Namespace) -> None:
    """Simulate one generation by a plan file or by the plan that a policy makes."""
    check_file(flags.trace)
    spec = resolve_model(flags.model, flags.dtype)
    profile, workload = _profile(flags), _workload(flags)
    check_context(spec, workload)
    used = _given_or_made(flags, spec, profile, workload)
    routing = RoutingTrace.load(flags.routing) if flags.routing is not None else None
    timeline = run_simulation(spec, used, profile, workload, routing, contention=not flags.no_contention)
    if flags.trace is not None:
        timeline.save_chrome_trace(flags.trace)
        note(flags, f"wrote {flags.trace}; open it in ui.perfetto.dev")
    limit = limit_of(spec, profile, used.vram_budget_bytes, workload, kind_of(used))
    emit(flags, [simulated_row(spec, used, profile, workload, timeline, limit)], SIMULATED_COLUMNS)


def _profile(flags: Namespace) -> HardwareProfile:
    profile = hardware(flags.hardware)
    if flags.vram_budget is not None and profile.device == "cuda" and flags.vram_budget > profile.vram_bytes:
        raise FormatError(
            f"--vram-budget is {format_bytes(flags.vram_budget)}, {profile.name} has {format_bytes(profile.vram_bytes)}"
        )
    return profile.with_(host_bytes=flags.host_budget) if flags.host_budget is not None else profile


def _workload(flags: Namespace) -> Workload:
    return Workload(flags.n_prompt, flags.n_gen, flags.batch, flags.n_depth, flags.seed, flags.skew)


def _with_room(workload: Workload, n_ctx: int | None) -> Workload:
    """The workload at the depth that fills a context of n_ctx tokens: the KV cache then has room for them."""
    if n_ctx is None or n_ctx == workload.n_ctx:
        return workload
    if n_ctx < workload.n_ctx:
        raise FormatError(f"--ctx-size is {n_ctx}; depth, prompt and generated tokens need {workload.n_ctx}")
    return replace(workload, n_depth=workload.n_depth + n_ctx - workload.n_ctx)


def _given_or_made(flags: Namespace, spec: ModelSpec, profile: HardwareProfile, workload: Workload) -> Plan:
    if flags.plan is not None and flags.policy is not None:
        raise FormatError(
            "--plan and --policy are both given; expected one of them (SCHEINFER_PLAN and SCHEINFER_POLICY count, too)"
        )
    if flags.plan is None:
        budget = flags.vram_budget or profile.vram_bytes
        return planner.plan(spec, profile, budget, workload, flags.policy or "auto", flags.pin)
    refuse_pins(flags)
    given = load_plan(flags.plan)
    check_plan(given, spec)
    return given


# -- compare ------------------------------------------------------------------------------------------


def compare(flags: Namespace) -> None:
    """Compare a simulated with a measured timeline, and write tables and chart if a folder is given."""
    check_folder(flags.out)
    simulated, measured = load_timeline(flags.simulated), load_timeline(flags.measured)
    for timeline, wanted in ((simulated, "simulated"), (measured, "measured")):
        if timeline.source != wanted:
            name = flags.simulated if wanted == "simulated" else flags.measured
            raise FormatError(
                f"{name} is a {timeline.source} timeline; give the simulated one first, then the measured"
            )
    comparison = compare_timelines(simulated, measured)
    if flags.out is not None:
        write_comparison(comparison, flags.out)
        note(flags, f"wrote {flags.out}")
    rows = _error_rows(comparison)
    if flags.output == "md":  # the text says it end to end, and steps are many
        say(flags, str(comparison))
        rows = [row for row in rows if row["scope"] not in ("end to end", "step")]
    emit(flags, rows, ERROR_COLUMNS)


def _error_rows(comparison: Comparison) -> list[Row]:
    """End to end, by resource, by kind and by step: simulated, measured, relative error; then critical paths."""
    rows: list[Row] = []
    tables = {
        "end to end": comparison.end_to_end,
        "resource": comparison.resources,
        "kind": comparison.kinds,
        "step": comparison.steps,
    }
    for scope, table in tables.items():
        plain = table.rename(columns=lambda name: str(name).removesuffix("_s"))
        for name, simulated, measured, error in plain[["simulated", "measured", "error"]].itertuples():
            rows.append(_error_row(scope, name, simulated, measured, error))
    for name, simulated, measured in comparison.critical[["simulated", "measured"]].itertuples():
        rows.append(_error_row("share of critical path", name, simulated, measured, simulated - measured))
    return rows


def _error_row(scope: str, name: str, simulated: float, measured: float, error: float) -> Row:
    numbers = {"simulated": simulated, "measured": measured, "error": error}
    return {"scope": scope, "name": name, **{key: float(value) for key, value in numbers.items()}}


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Tables as Parquet, the summary as JSON, the chart as PNG; each file whole or not at all."""
    for name in ("tasks", "kinds", "resources", "steps", "end_to_end", "critical"):
        parquet = io.BytesIO()
        getattr(comparison, name).to_parquet(parquet)
        write_bytes(folder / f"{name}.parquet", parquet.getvalue())
    missing = {source: list(ids) for source, ids in comparison.missing.items()}
    header = {"schema": "scheinfer.comparison", "version": 1}
    write_json(folder / "summary.json", {**header, "error": comparison.summary(), "missing": missing})
    picture = io.BytesIO()
    comparison.plot().savefig(picture, format="png", dpi=150, bbox_inches="tight")
    write_bytes(folder / "gantt.png", picture.getvalue())
