"""ScheInfer's front door: plan, simulate and run a large language model on a CPU and a small GPU together.

    hw   = scheinfer.hardware("rtx4090-ryzen7950x")      # or scheinfer.calibrate("path/to/checkpoint")
    spec = scheinfer.model("path/to/checkpoint")
    plan = scheinfer.plan(spec, hw, vram_budget="20GiB", n_prompt=512, n_gen=128)
    sim  = scheinfer.simulate(plan, spec, hw)
    model, tok = scheinfer.load("path/to/checkpoint", plan=plan)

Nothing here imports torch until `calibrate` or `load` is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hwmodels.errors import (
    CheckpointError,
    ExecutionError,
    FormatError,
    GraphError,
    KernelError,
    ModelError,
    PlanError,
    ProfileError,
    ScheInferError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor

    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from hwmodels.profile import HardwareProfile
    from runtime.session import PlannedModel
    from sim.compare import Comparison
    from sim.model import ModelSpec
    from sim.plan import Plan
    from sim.timeline import Timeline
    from sim.workload import RoutingTrace

__all__ = [
    "CheckpointError",
    "ExecutionError",
    "FormatError",
    "GraphError",
    "KernelError",
    "ModelError",
    "PlanError",
    "ProfileError",
    "ScheInferError",
    "calibrate",
    "compare",
    "hardware",
    "load",
    "model",
    "plan",
    "simulate",
    "sweep",
]


def hardware(name: str | Path) -> HardwareProfile:
    """A hardware profile by name or by file; ProfileError lists the known names."""
    from hwmodels.catalog import hardware as find

    return find(name)


def calibrate(
    model: str | Path | None = None,
    device: str = "auto",
    quick: bool = False,
    progress: bool = True,
    repeats: int = 1,
) -> HardwareProfile:
    """Measure this machine's profile for the shapes of a checkpoint (None: a small Llama's).

    device is auto, cuda:N or emulated. Takes minutes, with quick under one, repeats times over: a machine that others
    use too changes its speed within seconds, and the mean of several calibrations is kept.
    """
    from hwmodels.pool import pooled
    from runtime.calibrate import calibrate as measure
    from runtime.resolve import resolve_folder

    folder = resolve_folder(model) if model is not None else None
    return pooled([measure(folder, device, quick, progress=progress) for _ in range(repeats)])


def model(name: str | Path, dtype: str = "auto") -> ModelSpec:
    """Sizes of a model: of a checkpoint folder, a config.json, or a hub id in the local cache."""
    from runtime.resolve import resolve_model

    return resolve_model(name, dtype)


def plan(
    spec: ModelSpec,
    hardware: HardwareProfile,
    vram_budget: str | int | None = None,
    n_prompt: int = 512,
    n_gen: int = 128,
    policy: str = "auto",
    *,
    batch: int = 1,
    n_depth: int = 0,
    seed: int = 0,
    skew: float | tuple[float, ...] = 0.0,
    pin: str | Sequence[str] = (),
) -> Plan:
    """The plan that a policy makes for a workload; PlanError if nothing fits.

    vram_budget is a size such as "8GiB" or bytes (None: all that the profile has); skew is the Zipf
    exponent of expert popularity that routing is sampled with, or several that layers take in turn.
    pin, such as ["layers.0.mlp=gpu"], decides parts of a plan by auto or scheinfer: REGEX=gpu|cpu|stream of whole
    unit names (sim.pins).
    """
    from hwmodels.units import parse_size
    from sim import planner
    from sim.pins import parse_pins
    from sim.workload import Workload, check_context

    workload = Workload(n_prompt, n_gen, batch, n_depth, seed, skew)
    check_context(spec, workload)
    budget = hardware.vram_bytes if vram_budget is None else parse_size(vram_budget, "vram_budget")
    pins = [one for text in ([pin] if isinstance(pin, str) else pin) if text for one in parse_pins(text)]
    return planner.plan(spec, hardware, budget, workload, policy, pins)


def simulate(
    plan: Plan,
    spec: ModelSpec,
    hardware: HardwareProfile,
    n_prompt: int = 512,
    n_gen: int = 128,
    *,
    batch: int | None = None,
    n_depth: int = 0,
    seed: int = 0,
    skew: float | tuple[float, ...] = 0.0,
    routing: RoutingTrace | None = None,
    contention: bool = True,
) -> Timeline:
    """The simulated timeline of a generation by plan, with .to_frame(), .plot() and .save_chrome_trace().

    routing replays what a run recorded (model.last_routing); without it, routing is sampled. batch is
    the plan's unless given.
    """
    from sim.simulate import simulate as run
    from sim.workload import Workload

    workload = Workload(n_prompt, n_gen, plan.batch if batch is None else batch, n_depth, seed, skew)
    return run(spec, plan, hardware, workload, routing, contention)


def load(
    path: str | Path,
    plan: Plan | str | Path = "auto",
    dtype: str = "auto",
    device: str = "auto",
    *,
    vram_budget: str | int | None = None,
    n_prompt: int = 512,
    n_gen: int = 128,
    cpu_threads: int | None = None,
    progress: bool = False,
) -> tuple[PlannedModel, PreTrainedTokenizerBase | None]:
    """A Hugging Face model that runs by plan, and its tokenizer (None where the folder has none).

    The model keeps `generate`, streamers and caches; close it with `model.close()`. plan is a Plan, a plan
    file, or "auto": then this machine's profile is measured quickly or taken from the cache, and a plan
    is made for vram_budget, n_prompt and n_gen, which matter to "auto" alone.
    """
    from runtime.resolve import check_checkpoint, resolve_folder
    from runtime.session import load_planned
    from runtime.tokens import load_tokenizer

    folder = resolve_folder(path)
    check_checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    chosen = _plan_for(folder, plan, dtype, device, vram_budget, (n_prompt, n_gen), cpu_threads, progress)
    return load_planned(folder, chosen, dtype, device, cpu_threads, progress=progress), tokenizer


def _plan_for(
    folder: Path,
    plan: Plan | str | Path,
    dtype: str,
    device: str,
    vram_budget: str | int | None,
    lengths: tuple[int, int],
    cpu_threads: int | None,
    progress: bool,
) -> Plan:
    from hwmodels.units import parse_size
    from runtime.autoplan import Request, choose_plan
    from runtime.resolve import resolve_model
    from sim.plan import Plan, load_plan
    from sim.workload import Workload, check_context

    if isinstance(plan, Plan):
        return plan
    if plan != "auto":
        return load_plan(plan)
    spec, workload = resolve_model(folder, dtype), Workload(*lengths)
    check_context(spec, workload)
    budget = None if vram_budget is None else parse_size(vram_budget, "vram_budget")
    request = Request(folder, spec, workload, device=device, vram_budget_bytes=budget, cpu_threads=cpu_threads)
    return choose_plan(request, progress, tell=lambda text: None).plan


def compare(simulated: Timeline, measured: Timeline) -> Comparison:
    """Two timelines of one plan side by side: errors as tables, .plot() for the Gantt chart."""
    from sim.compare import compare as side_by_side

    return side_by_side(simulated, measured)


def sweep(
    models: Sequence[ModelSpec | str | Path],
    hardware: Sequence[HardwareProfile | str | Path],
    policies: str | Sequence[str] = "all",
    vram_budgets: Sequence[str | int] | None = None,
    n_prompt: Sequence[int] = (512,),
    n_gen: Sequence[int] = (128,),
    *,
    batch: Sequence[int] = (1,),
    n_depth: Sequence[int] = (0,),
    seed: int = 0,
    skew: float = 0.0,
    executor: Executor | None = None,
    workers: int = 1,
    out: str | Path | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Simulate every combination; one row each, with `refused` where a policy has no plan.

    executor is any of concurrent.futures' (a Dask client has `get_executor()`); without one, `workers`
    processes simulate. vram_budgets None is all that each machine has. With a folder `out`, what is there
    already is not simulated again. Where a simulation went wrong, `failed` says how, and a warning how many.
    """
    import warnings

    import pandas as pd

    from hwmodels.units import parse_size
    from sim.sweep import grid, workloads
    from sim.sweep import sweep as run

    points = grid(
        [_spec(item) for item in models],
        [_profile(item) for item in hardware],
        [policies] if isinstance(policies, str) else policies,
        None if vram_budgets is None else [parse_size(size, "vram_budgets") for size in vram_budgets],
        workloads(n_prompt, n_gen, n_depth, batch, seed, skew),
    )
    swept = run(points, None if out is None else Path(out), executor, workers, progress)
    if swept.failures:
        first = swept.failures[0]["failed"]
        warnings.warn(
            f"{len(swept.failures)} of {len(points)} simulations failed, the first with {first}", stacklevel=2
        )
    return pd.DataFrame(list(swept.rows))


def _spec(item: ModelSpec | str | Path) -> ModelSpec:
    return model(item) if isinstance(item, (str, Path)) else item


def _profile(item: HardwareProfile | str | Path) -> HardwareProfile:
    from hwmodels.catalog import hardware as find

    return find(item) if isinstance(item, (str, Path)) else item
