"""Result rows: one mapping per run or simulation, with the same keys everywhere."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hwmodels.profile import HardwareProfile
from sim.bounds import Bound
from sim.memory import memory
from sim.model import ModelSpec
from sim.plan import Plan
from sim.timeline import Timeline
from sim.workload import Workload

Row = dict[str, object]


@dataclass(frozen=True)
class Speeds:
    """Times of one generation and tokens per second of all its sequences; decode is 0 where none was decoded."""

    prefill_tok_s: float
    decode_tok_s: float
    ttft_s: float
    tpot_s: float

    @staticmethod
    def of(timeline: Timeline, workload: Workload) -> Speeds:
        """Speeds that a timeline of a workload shows."""
        ttft_s, tpot_s = timeline.ttft_s, timeline.tpot_s
        decode_tok_s = workload.batch / tpot_s if tpot_s > 0 else 0.0
        return Speeds(workload.n_prompt * workload.batch / ttft_s, decode_tok_s, ttft_s, tpot_s)

    def errors_of(self, predicted: Speeds) -> dict[str, float | None]:
        """(predicted - self) / self by key; None where nothing was measured."""
        guess = asdict(predicted)
        return {key: guess[key] / value - 1.0 if value > 0 else None for key, value in asdict(self).items()}


def simulated_row(
    spec: ModelSpec, plan: Plan, profile: HardwareProfile, workload: Workload, timeline: Timeline, limit: Bound
) -> Row:
    """Keys of a simulated run; memory is what the plan takes."""
    speeds = Speeds.of(timeline, workload)
    return (
        _identity(spec, plan, workload, profile.device)
        | asdict(speeds)
        | _bounds(speeds, limit)
        | _usage(spec, plan, timeline)
        | {"evidence": timeline.info["evidence"]}
    )


def measured_row(
    spec: ModelSpec, plan: Plan, workload: Workload, runs: Sequence[Timeline], shown: Timeline, device: str
) -> Row:
    """Keys of repeated measured runs: the speeds of the run that is shown, and the spread of all."""
    speeds = [Speeds.of(timeline, workload) for timeline in runs]
    samples = {key: [float(asdict(s)[key]) for s in speeds] for key in ("prefill_tok_s", "decode_tok_s")}
    return (
        _identity(spec, plan, workload, device)
        | asdict(Speeds.of(shown, workload))
        | _usage(spec, plan, shown)
        | {"stddev": {key: statistics.stdev(v) if len(v) > 1 else 0.0 for key, v in samples.items()}}
        | {"samples": samples}
    )


def prediction_keys(shown: Timeline, replay: Timeline, workload: Workload, limit: Bound) -> Row:
    """Keys that a measured row gains: what the simulator says of the same plan and routing, and its errors."""
    measured, predicted = Speeds.of(shown, workload), Speeds.of(replay, workload)
    return {
        **_bounds(measured, limit),
        "evidence": replay.info["evidence"],
        **{f"predicted_{key}": value for key, value in asdict(predicted).items()},
        "error": measured.errors_of(predicted),
    }


def _identity(spec: ModelSpec, plan: Plan, workload: Workload, device: str) -> Row:
    return {
        "model": spec.name,
        "policy": plan.policy,
        "plan_id": plan.id,
        "profile_id": plan.profile_id,
        "device": device,
        "dtype": spec.dtype,
        "vram_budget_bytes": plan.vram_budget_bytes,
        "n_prompt": workload.n_prompt,
        "n_gen": workload.n_gen,
        "n_depth": workload.n_depth,
        "batch": workload.batch,
    }


def _bounds(speeds: Speeds, limit: Bound) -> Row:
    """The hardware's bound and the share of it that is reached: in decode, or in prefill without decode steps."""
    if speeds.decode_tok_s > 0:
        fraction = speeds.decode_tok_s / limit.decode_tok_s if limit.decode_tok_s > 0 else 0.0
    else:
        fraction = speeds.prefill_tok_s / limit.prefill_tok_s
    return {
        "bound_prefill_tok_s": limit.prefill_tok_s,
        "bound_decode_tok_s": limit.decode_tok_s,
        "bound_fraction": fraction,
    }


def _usage(spec: ModelSpec, plan: Plan, timeline: Timeline) -> Row:
    need, makespan_s = memory(spec, plan), timeline.makespan_s
    busy = {name: seconds / makespan_s if makespan_s > 0 else 0.0 for name, seconds in timeline.busy_s.items()}
    return {
        "vram_bytes": need.vram_bytes,
        "host_bytes": need.host_bytes,
        "h2d_bytes": sum(span.bytes for span in timeline.spans if span.resource == "H2D"),
        "cpu_busy": busy["CPU"],
        "gpu_busy": busy["GPU"],
        "h2d_busy": busy["H2D"],
        "cache_hit_rate": timeline.info.get("cache_hit_rate"),
    }
