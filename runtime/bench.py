"""bench(): run plans for real at several depths, and replay each run in the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hwmodels.profile import HardwareProfile
from runtime.measure import measure, median_run
from runtime.session import PlannedModel, load_planned
from runtime.validate import prompt_ids
from sim.limit import kind_of, limit_of
from sim.model import ModelSpec
from sim.plan import Plan
from sim.rows import Row, measured_row, prediction_keys
from sim.simulate import simulate
from sim.workload import Workload


@dataclass(frozen=True)
class Bench:
    """What every plan runs: a prompt and a generation at each depth, some times over."""

    n_prompt: int
    n_gen: int
    depths: tuple[int, ...]
    repetitions: int
    seed: int = 0

    def at(self, n_depth: int) -> Workload:
        """The workload at one depth."""
        return Workload(self.n_prompt, self.n_gen, n_depth=n_depth, seed=self.seed)

    @property
    def deepest(self) -> Workload:
        """The workload that needs the longest context."""
        return self.at(max(self.depths))


@dataclass(frozen=True)
class Target:
    """The model and machine that plans run on; device and threads as `load_planned` takes them."""

    folder: Path
    spec: ModelSpec
    tokenizer: PreTrainedTokenizerBase | None
    profile: HardwareProfile
    device: str = "auto"
    cpu_threads: int | None = None
    host_bytes: int | None = None


def bench(target: Target, plans: Sequence[Plan], job: Bench, progress: bool) -> list[Row]:
    """Measured rows with the simulator's speed and error, one per plan and depth.

    Every plan is loaded once. Raises PlanError before loading if a plan's context is too short for the
    greatest depth.
    """
    rows = []
    total = len(plans) * len(job.depths)
    with tqdm(total=total, desc=f"bench {target.spec.name}", unit="row", disable=not progress, leave=False) as bar:
        for plan in plans:
            bar.set_postfix_str(plan.policy)
            model = load_planned(
                target.folder,
                plan,
                device=target.device,
                cpu_threads=target.cpu_threads,
                host_bytes=target.host_bytes,
                progress=progress,
            )
            try:
                for depth in job.depths:
                    rows.append(_measured(target, model, job.at(depth), job.repetitions))
                    bar.update()
            finally:
                model.close()
    return rows


def _measured(target: Target, model: PlannedModel, workload: Workload, repetitions: int) -> Row:
    spec, plan, profile = target.spec, model.plan, target.profile
    ids = prompt_ids(spec, target.tokenizer, workload.n_depth + workload.n_prompt)
    runs = measure(model, ids, workload.n_gen, repetitions, n_depth=workload.n_depth)
    shown = median_run(runs)
    replay = simulate(spec, plan, profile, workload, shown.routing)
    limit = limit_of(spec, profile, plan.vram_budget_bytes, workload, kind_of(plan))
    timelines = [run.timeline for run in runs]
    return {
        **measured_row(spec, plan, workload, timelines, shown.timeline, model.executor.device.kind),
        **prediction_keys(shown.timeline, replay, workload, limit),
        "profile_id": profile.id,
        "vram_bytes": shown.peak_vram_bytes,
    }
