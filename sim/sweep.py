"""Sweep: a grid of simulations, by any number of workers, kept as it goes.

Same grid and same program, same rows, whoever works on it and however often it was interrupted.
"""

from __future__ import annotations

import traceback
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hwmodels.errors import ExecutionError, FormatError, PlanError, ProfileError
from hwmodels.profile import HardwareProfile
from hwmodels.provenance import provenance
from hwmodels.schema import digest
from hwmodels.units import format_bytes
from sim import planner, shards
from sim.bounds import Bound
from sim.limit import Kind, kind_of, limit_of
from sim.model import ModelSpec
from sim.plan import Plan
from sim.policies import known_policies
from sim.rows import Row, simulated_row
from sim.simulate import simulate
from sim.workers import Batches, run_here, run_in_processes, run_on
from sim.workload import Workload, check_context


@lru_cache(maxsize=1)
def program_id() -> str:
    """Twelve hex digits of all code that a row depends on, numpy's random numbers included."""
    sim = Path(__file__).parent
    code = sha256(np.__version__.encode())
    for folder in (sim.parent / "hwmodels", sim):
        for path in sorted(folder.rglob("*.py")):
            code.update(path.relative_to(sim.parent).as_posix().encode() + b"\0" + path.read_bytes())
    return code.hexdigest()[:12]


@dataclass(frozen=True)
class Point:
    """One simulation of a grid, with all that it needs: it can be sent to any worker that has this program."""

    spec: ModelSpec
    profile: HardwareProfile
    policy: str
    vram_budget_bytes: int
    workload: Workload
    program: str = field(default_factory=program_id)

    @cached_property
    def id(self) -> str:
        """Twelve hex digits of everything that the row depends on."""
        parts = [self.spec.id, self.spec.name, self.profile.id, self.policy, self.vram_budget_bytes, self.workload]
        return digest([self.program, *parts])

    def __str__(self) -> str:
        """The point in words, for messages."""
        w = self.workload
        return (
            f"{self.spec.name} on {self.profile.name} by {self.policy}, {format_bytes(self.vram_budget_bytes)}, "
            f"pp{w.n_prompt} tg{w.n_gen} d{w.n_depth} b{w.batch}"
        )


def grid(
    models: Sequence[ModelSpec],
    hardware: Sequence[HardwareProfile],
    policies: Sequence[str],
    vram_budgets_bytes: Sequence[int] | None,
    workloads: Sequence[Workload],
) -> tuple[Point, ...]:
    """Every combination once: by model, then machine, workload, budget and policy.

    Without budgets, each machine's whole device memory. Raises PlanError for a policy that is not known.
    """
    points = {}
    for spec, known, workload in product(models, hardware, workloads):
        profile = replace(known)  # without what it remembers: that would travel with every point
        for budget, policy in product(vram_budgets_bytes or (profile.vram_bytes,), known_policies(policies)):
            point = Point(spec, profile, policy, budget, workload)
            points[point.id] = point
    return tuple(points.values())


def workloads(
    n_prompts: Sequence[int],
    n_gens: Sequence[int],
    n_depths: Sequence[int] = (0,),
    batches: Sequence[int] = (1,),
    seed: int = 0,
    skew: float = 0.0,
) -> tuple[Workload, ...]:
    """Every combination of lengths and batch sizes."""
    lengths = product(n_prompts, n_gens, n_depths, batches)
    return tuple(Workload(n_prompt, n_gen, batch, n_depth, seed, skew) for n_prompt, n_gen, n_depth, batch in lengths)


# -- one point ----------------------------------------------------------------------------------------


def evaluate(point: Point) -> Row:
    """The row of a point. `refused` says why there is no plan, `failed` what went wrong in making it."""
    try:
        if point.program != program_id():
            raise ExecutionError(f"the worker has program {program_id()}, expected {point.program}; install it anew")
        return {**_given(point), **_simulated(point)}
    except (FormatError, PlanError, ProfileError) as error:
        return {**_given(point), "refused": str(error)}
    except Exception as error:
        return _failed(point, error)


def _simulated(point: Point) -> Row:
    spec, profile, budget, workload = point.spec, point.profile, point.vram_budget_bytes, point.workload
    check_context(spec, workload)
    if profile.device == "cuda" and budget > profile.vram_bytes:
        raise PlanError(f"the budget is {format_bytes(budget)}, {profile.name} has {format_bytes(profile.vram_bytes)}")
    plan = planner.plan(spec, profile, budget, workload, point.policy)
    return simulated_row(spec, plan, profile, workload, simulate(spec, plan, profile, workload), _bound(point, plan))


_BOUNDS: dict[tuple[str, str, int, Workload, Kind], Bound] = {}


def _bound(point: Point, plan: Plan) -> Bound:
    """Policies share a bound, those with a cache, chunks or threads of their own another: a worker remembers them."""
    spec, profile, budget, workload = point.spec, point.profile, point.vram_budget_bytes, point.workload
    key = (spec.id, profile.id, budget, workload, kind_of(plan))
    if key not in _BOUNDS:
        _BOUNDS[key] = limit_of(spec, profile, budget, workload, kind_of(plan))
    return _BOUNDS[key]


def _given(point: Point) -> Row:
    return {
        "point_id": point.id,
        "model": point.spec.name,
        "hardware": point.profile.name,
        "policy": point.policy,
        "profile_id": point.profile.id,
        "device": point.profile.device,
        "dtype": point.spec.dtype,
        "vram_budget_bytes": point.vram_budget_bytes,
        "n_prompt": point.workload.n_prompt,
        "n_gen": point.workload.n_gen,
        "n_depth": point.workload.n_depth,
        "batch": point.workload.batch,
        "seed": point.workload.seed,
        "skew": point.workload.skews[0],
    }


def _failed(point: Point, error: BaseException) -> Row:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return {**_given(point), "failed": f"{type(error).__name__}: {error}{place}"}


# -- all points ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swept:
    """Rows in the order of the grid; how many were there before, and how many damaged shards were redone."""

    rows: tuple[Row, ...]
    n_found: int
    n_damaged: int

    @property
    def failures(self) -> tuple[Row, ...]:
        """Rows of points that went wrong; they are not kept, and the next sweep tries them again."""
        return tuple(row for row in self.rows if row["failed"] is not None)


def sweep(
    points: Sequence[Point],
    folder: Path | None = None,
    executor: Executor | None = None,
    workers: int = 1,
    progress: bool = False,
) -> Swept:
    """Simulate every point that the folder does not hold yet; with a folder, write its table in the end.

    executor is left open; without one, `workers` processes are started, or none for one worker. Interrupted
    at any time, the next call goes on. Raises FormatError for a folder that cannot be used.
    """
    with shards.held(folder) if folder is not None else nullcontext():
        kept = shards.read_shards(folder) if folder is not None else shards.Kept({}, 0)
        rows = {point.id: kept.rows[point.id] for point in points if point.id in kept.rows}
        n_found = len(rows)
        todo = [point for point in points if point.id not in rows]
        bar = tqdm(total=len(points), initial=n_found, desc="sweep", unit="point", disable=not progress, smoothing=0.1)
        with bar, closing(_finished(todo, executor, workers)) as batches:
            for finished in batches:
                if folder is not None:
                    shards.write_shard(folder, [row for row in finished if row["failed"] is None])
                rows |= {str(row["point_id"]): row for row in finished}
                bar.update(len(finished))
        swept = Swept(tuple(rows[point.id] for point in points), n_found, kept.n_damaged)
        if folder is not None:
            shards.write_table(folder, swept.rows, _manifest(points, swept))
            shards.join_shards(folder)
    return swept


def _finished(points: Sequence[Point], executor: Executor | None, workers: int) -> Generator[list[Row], None, None]:
    """Rows as they come; whatever works on them is stopped when the caller stops."""
    batches: Batches[Point, Row]
    if executor is not None:
        batches = run_on(executor, evaluate, points)
    elif workers > 1 and len(points) > 1:
        batches = run_in_processes(evaluate, points, min(workers, len(points)))
    else:
        batches = run_here(evaluate, points)
    with closing(batches):
        for batch in batches:
            yield shards.uniform([_failed(d.item, d.error) if d.error is not None else d.result or {} for d in batch])


def _manifest(points: Sequence[Point], swept: Swept) -> dict[str, object]:
    """What was asked, who answered, and how many rows have what."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": {
            "models": _named({p.spec.id: p.spec.name for p in points}),
            "hardware": _named({p.profile.id: p.profile.name for p in points}),
            "policies": list(dict.fromkeys(p.policy for p in points)),
            "vram_budgets_bytes": sorted({p.vram_budget_bytes for p in points}),
            "workloads": [asdict(workload) for workload in dict.fromkeys(p.workload for p in points)],
        },
        "seed": sorted({p.workload.seed for p in points}),
        "n_rows": len(swept.rows),
        "n_refused": sum(row["refused"] is not None for row in swept.rows),
        "n_failed": len(swept.failures),
        "program": program_id(),
        "provenance": provenance(),
    }


def _named(names: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "id": id_} for id_, name in names.items()]
