"""validate(): predict, run, compare, report. The main job.

For every model: calibrate (cached), rank the policies in simulation, run each and the plans predicted best
for real on the same prompt, replay what ran (its plan and its routing) in the simulator, and write both down
side by side. The plan that was measured fastest is kept. Where the yardstick says that the machine changed its speed
since it was calibrated, it is calibrated again after the runs, and replays rest on the mean of both.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer

from hwmodels.calibrate import moved
from hwmodels.errors import FormatError, PlanError
from hwmodels.load import BUSY_SHARE
from hwmodels.machine import fingerprint
from hwmodels.pace import MARKED_SHARE, SLOW, Pace
from hwmodels.pool import pooled
from hwmodels.profile import Curve, HardwareProfile
from hwmodels.provenance import versions
from hwmodels.units import format_bytes
from runtime.budget import fixed_bytes, half_budget
from runtime.cache import cached_profile
from runtime.calibrate import calibrate, yardstick
from runtime.choice import Choice, choice, predicted_s
from runtime.measure import Measured, measure, median_run
from runtime.session import load_planned
from sim.bounds import Bound
from sim.candidates import runner_ups
from sim.compare import compare
from sim.limit import kind_of, limit_of
from sim.memory import memory
from sim.model import ModelSpec, load_model
from sim.plan import Plan
from sim.planner import plan as make_plan
from sim.policies.problem import Problem
from sim.report import ModelResult, Report, write_report
from sim.rows import Row, measured_row, prediction_keys
from sim.simulate import simulate
from sim.timeline import Timeline
from sim.workload import Workload

DEFAULT_POLICIES = ("cpu-only", "stream", "llama-cpp", "fiddler", "scheinfer", "auto")
CPU_LAYERS = ("cpu-only", "llama-cpp", "auto")
"""Policies that can leave whole layers to the CPU, and so fit into any device memory."""

_HOW = "Plans ran with fixed prompts and greedy decoding; the routing that occurred was replayed in simulation."
PROMPT = "The weights of a layer are read once for every token, so memory decides how fast a token comes. "


@dataclass(frozen=True)
class Job:
    """What is validated: one workload on one device; the budget is None for a default per model.

    n_top   how many of the plans predicted fastest are run, beside those of the policies, and whoever made them
    """

    device: str = "auto"
    vram_budget_bytes: int | None = None
    n_prompt: int = 128
    n_gen: int = 32
    policies: Sequence[str] = DEFAULT_POLICIES
    repetitions: int = 3
    n_top: int = 3
    quick: bool = False
    fresh: bool = False
    cpu_threads: int | None = None
    progress: bool = True


@dataclass(frozen=True)
class Run:
    """A plan that was run: its repetitions and the median one."""

    plan: Plan
    runs: tuple[Measured, ...]
    median: Measured

    def replay(
        self, spec: ModelSpec, profile: HardwareProfile, workload: Workload, contention: bool = True
    ) -> Timeline:
        """What the simulator says of the plan and the routing that occurred."""
        return simulate(spec, self.plan, profile, workload, self.median.routing, contention=contention)

    @property
    def total_s(self) -> float:
        """Seconds of a generation: the median of the repetitions."""
        return statistics.median(sum(run.timeline.step_s.values()) for run in self.runs)


def validate(folders: Sequence[Path], out: Path, job: Job, command: str, text: IO[str] = sys.stderr) -> list[Row]:
    """Validate every model and write the report folder; the result rows, best measured decode first.

    Streams the generated text of each model's best plan to `text`. Raises ScheInferError for unusable
    input before anything is written.
    """
    specs = [load_model(folder) for folder in folders]
    for spec in specs:
        _check_budget(spec, job)
    results, rows, files, notes = [], [], [], [_HOW]
    profile: HardwareProfile | None = None
    for folder, spec in zip(folders, specs, strict=True):
        profile = cached_profile(folder, job.device, job.quick, job.cpu_threads, job.progress, job.fresh)
        before = yardstick(folder, job.device, job.cpu_threads)
        ran = _run_model(folder, spec, profile, job, text)
        after = yardstick(folder, job.device, job.cpu_threads)
        profile, told = _judging(folder, profile, (*before, *after), job)
        notes += [f"{spec.name}: {note}" for note in told]
        result, own_files = _judge(spec, profile, ran, out)
        results.append(result)
        rows += [dict(row) for row in result.rows]
        files += own_files
    assert profile is not None, "at least one model"
    report = Report(
        results=results,
        profile=profile,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        fingerprint=fingerprint(),
        versions=versions(),
        notes=[*notes, *_load_notes(rows)],
        files=files,
        title="ScheInfer: simulated and measured",
    )
    write_report(out, report)
    return rows


@dataclass(frozen=True)
class _Ran:
    """What was planned with a profile and run for a model; rows of the policies that have no plan."""

    profile: HardwareProfile
    budget: int
    workload: Workload
    runs: Sequence[Run]
    refused: list[Row]

    @property
    def choice(self) -> Choice:
        """What prediction and measurement chose."""
        return choice([run.plan for run in self.runs], [run.total_s for run in self.runs], self.workload)


def _run_model(folder: Path, spec: ModelSpec, profile: HardwareProfile, job: Job, text: IO[str]) -> _Ran:
    workload = Workload(job.n_prompt, job.n_gen)
    budget = job.vram_budget_bytes or half_budget(spec, workload)
    plans, refused = _plans(spec, profile, budget, workload, job)
    plans += runner_ups(Problem(spec, profile, budget, workload), plans, job.n_top)
    tokenizer = _tokenizer(folder)
    prompt = prompt_ids(spec, tokenizer, job.n_prompt)
    best = min(plans, key=lambda p: predicted_s(p, workload))
    runs: list[Run] = []
    with tqdm(total=len(plans), desc=f"run {spec.name}", unit="plan", disable=not job.progress, leave=False) as bar:
        for plan in plans:
            bar.set_postfix_str(plan.policy)
            streamer = None
            if tokenizer is not None and plan is best:
                bar.clear()  # the text takes the bar's place for as long as it streams
                streamer = _announced(tokenizer, f"{spec.name}, {plan.policy}: ", text)
            runs.append(_run(folder, plan, workload, prompt, job, streamer))
            bar.update()
    return _Ran(profile, budget, workload, runs, refused)


def _judging(
    folder: Path, profile: HardwareProfile, yardsticks: Sequence[Curve], job: Job
) -> tuple[HardwareProfile, list[str]]:
    """The profile that replays rest on, and what is to be known of it."""
    told = moved(profile.curves, yardsticks)
    if not told:
        return profile, []
    again = calibrate(folder, job.device, job.quick, job.cpu_threads, job.progress)  # the cached one may be a mean
    both = (
        "It was calibrated again after the runs; what is simulated here rests on the mean of both calibrations. "
        "Plans are still made with the first: calibrate anew (--fresh) if the speed stays."
    )
    try:
        return pooled([profile, again]), [*told, both]
    except FormatError as error:  # a cached profile of an older version measured other points
        return again, [*told, f"It was calibrated again after the runs, and only that counts: {error}."]


def _judge(
    spec: ModelSpec, profile: HardwareProfile, ran: _Ran, out: Path
) -> tuple[ModelResult, list[tuple[str, str]]]:
    """Rows and files of a model's runs, each replayed with the profile."""
    made, workload, runs = ran.choice, ran.workload, ran.runs
    limits = {kind: limit_of(spec, profile, ran.budget, workload, kind) for kind in {kind_of(run.plan) for run in runs}}
    rows = [
        _row(spec, run, profile, workload, limits[kind_of(run.plan)]) | {"predicted_rank": rank, "kept": i == made.kept}
        for i, (run, rank) in enumerate(zip(runs, made.ranks, strict=True))
    ]
    shown = runs[made.kept]
    replay = shown.replay(spec, profile, workload)
    isolated = shown.replay(spec, profile, workload, contention=False)
    files = _save(out, spec, ran.profile, profile, shown, replay)
    result = ModelResult(
        model=spec.name,
        rows=sorted(rows, key=_by_speed) + ran.refused,
        shape=_shape(spec, ran.budget),
        comparison=compare(replay, shown.median.timeline),
        isolated=compare(isolated, shown.median.timeline),
        choice=made.sentence(),
    )
    return result, files


def _check_budget(spec: ModelSpec, job: Job) -> None:
    """PlanError before the long work of calibrating, where no policy asked for can fit into the budget."""
    budget, fixed = job.vram_budget_bytes, fixed_bytes(spec, Workload(job.n_prompt, job.n_gen))
    if budget is not None and budget < fixed and not set(job.policies) & set(CPU_LAYERS):
        raise PlanError(
            f"{spec.name}: attention, embedding, head, KV cache and activations need {format_bytes(fixed)} of device "
            f"memory, the budget is {format_bytes(budget)}; raise --vram-budget to at least that, or add a policy that "
            f"keeps layers on the CPU ({', '.join(CPU_LAYERS)})"
        )


def _load_notes(rows: Sequence[Row]) -> list[str]:
    """Sentences where others kept the machine busy, seen or not, since the numbers are noisy then."""
    loads = [load for row in rows if isinstance(load := row.get("others_load"), float)]
    loops_s = [s for row in rows if isinstance(found := row.get("loops_s"), list) for s in found]
    notes = []
    if loads and max(loads) > BUSY_SHARE:
        notes.append(f"Other processes took up to {max(loads):.0%} of the machine during the runs: noisy numbers.")
    if loops_s and (pace := Pace.of(loops_s)).slow_share >= MARKED_SHARE:
        notes.append(
            f"Before and after the runs a fixed loop took {SLOW:g} times its best or longer {pace.slow_share:.0%} of "
            "the time: something shares the cores, and the numbers are noisy."
        )
    return notes


def _plans(
    spec: ModelSpec, profile: HardwareProfile, budget: int, workload: Workload, job: Job
) -> tuple[list[Plan], list[Row]]:
    """A plan per policy, and rows of the policies that do not fit; PlanError if none does."""
    plans: list[Plan] = []
    refused: list[Row] = []
    bar = tqdm(job.policies, desc=f"plan {spec.name}", unit="policy", disable=not job.progress, leave=False)
    for policy in bar:
        bar.set_postfix_str(policy)
        try:
            plans.append(make_plan(spec, profile, budget, workload, policy))
        except PlanError as error:
            refused.append({"model": spec.name, "policy": policy, "vram_budget_bytes": budget, "refused": str(error)})
    if not plans:
        raise PlanError(str(refused[0]["refused"]))
    return plans, refused


def _run(
    folder: Path,
    plan: Plan,
    workload: Workload,
    prompt: Sequence[int],
    job: Job,
    streamer: TextStreamer | None,
) -> Run:
    model = load_planned(folder, plan, device=job.device, cpu_threads=job.cpu_threads, progress=job.progress)
    try:
        runs = measure(model, prompt, workload.n_gen, job.repetitions, streamer)
    finally:
        model.close()
    return Run(plan, tuple(runs), median_run(runs))


# -- prompts ------------------------------------------------------------------------------------------


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer


def prompt_ids(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase | None, n_prompt: int) -> list[int]:
    """Exactly n_prompt token ids: a fixed text, repeated; seeded random ids where there is no tokenizer."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        low = min(3, spec.vocab - 1)
        return [int(t) for t in torch.randint(low, spec.vocab, (n_prompt,), generator=generator)]
    once = [int(t) for t in tokenizer.encode(PROMPT)]
    return (once * (n_prompt // len(once) + 1))[:n_prompt]


def _announced(tokenizer: PreTrainedTokenizerBase, title: str, text: IO[str]) -> TextStreamer:
    """A streamer that writes the title, then the new tokens as they come, to `text`."""
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    begin = [title]

    def write(piece: str, stream_end: bool = False) -> None:
        head = begin.pop() if begin else ""
        print(head + piece, end="\n" if stream_end else "", file=text, flush=True)

    streamer.on_finalized_text = write  # type: ignore[method-assign, assignment]
    return streamer


# -- what comes back ----------------------------------------------------------------------------------


def _row(spec: ModelSpec, run: Run, profile: HardwareProfile, workload: Workload, limit: Bound) -> Row:
    timelines = [r.timeline for r in run.runs]
    shown = run.median.timeline
    device = str(shown.info["device"])
    return {
        **measured_row(spec, run.plan, workload, timelines, shown, device),
        **prediction_keys(shown, run.replay(spec, profile, workload), workload, limit),
        "vram_bytes": run.median.peak_vram_bytes,
        "predicted_vram_bytes": memory(spec, run.plan).vram_bytes,
        "overlap": shown.overlap,
        "others_load": run.median.others_load,
        "loops_s": [s for r in run.runs for s in r.loops_s],
        "tokens": list(run.median.tokens),
    }


def _by_speed(row: Row) -> float:
    speed = row["decode_tok_s"]
    assert isinstance(speed, float), "a measured row has its speed"
    return -speed


def _shape(spec: ModelSpec, budget: int) -> str:
    experts = max(layer.ffn.n_experts for layer in spec.layers)
    kind = f"{experts} experts a layer" if experts > 1 else "dense"
    return (
        f"{spec.n_layers} layers, {kind}, {format_bytes(spec.weight_bytes)} of {spec.dtype} weights, "
        f"{format_bytes(budget)} of device memory"
    )


def _save(
    out: Path, spec: ModelSpec, planned_with: HardwareProfile, profile: HardwareProfile, run: Run, replay: Timeline
) -> list[tuple[str, str]]:
    out.mkdir(parents=True, exist_ok=True)
    name = spec.name
    run.plan.save(out / f"{name}.plan.json")
    planned_with.save(out / f"{name}.hardware.json")
    replay.save_chrome_trace(out / f"{name}.simulated.trace.json")
    run.median.timeline.save_chrome_trace(out / f"{name}.measured.trace.json")
    run.median.routing.save(out / f"{name}.routing.parquet")
    files = [
        (f"{name}.plan.json", f"the plan of {run.plan.policy} for {name}"),
        (f"{name}.hardware.json", "the calibrated profile it was planned with"),
        (f"{name}.simulated.trace.json", "simulated timeline, opens in Perfetto"),
        (f"{name}.measured.trace.json", "measured timeline, opens in Perfetto"),
        (f"{name}.routing.parquet", "tokens per expert of the measured run"),
    ]
    if profile is not planned_with:
        profile.save(out / f"{name}.hardware.both.json")
        files.append((f"{name}.hardware.both.json", "the profile that it was simulated with after the runs"))
    return files
