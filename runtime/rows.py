"""Result rows: one mapping per run or simulation, with the same keys everywhere."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from hwmodels.profile import HardwareProfile
from sim.bounds import Bound
from sim.memory import memory
from sim.model import ModelSpec
from sim.plan import Plan
from sim.timeline import Timeline
from sim.workload import Workload

Row = dict[str, object]


def simulated_row(
    spec: ModelSpec, plan: Plan, profile: HardwareProfile, workload: Workload, timeline: Timeline, limit: Bound
) -> Row:
    """Keys of a simulated run; memory is what the plan takes."""
    row = _identity(spec, plan, workload, profile.device) | _speeds(timeline, workload)
    return row | _bounds(row, limit) | _usage(spec, plan, timeline) | {"evidence": timeline.info["evidence"]}


def measured_row(spec: ModelSpec, plan: Plan, workload: Workload, timeline: Timeline, device: str) -> Row:
    """Keys of one measured run."""
    return _identity(spec, plan, workload, device) | _speeds(timeline, workload) | _usage(spec, plan, timeline)


def with_samples(row: Row, runs: Sequence[Timeline], workload: Workload) -> Row:
    """A measured row with the speeds of all repetitions, and their standard deviations."""
    speeds = [_speeds(timeline, workload) for timeline in runs]
    samples = {key: [float(str(s[key])) for s in speeds] for key in ("prefill_tok_s", "decode_tok_s")}
    stddev = {key: statistics.stdev(v) if len(v) > 1 else 0.0 for key, v in samples.items()}
    return row | {"stddev": stddev, "samples": samples}


def with_prediction(row: Row, replay: Timeline, workload: Workload, limit: Bound) -> Row:
    """A measured row with what the simulator says of the same plan and routing, and its relative errors."""
    predicted = _speeds(replay, workload)
    error = {key: _error(predicted[key], row[key]) for key in ("ttft_s", "tpot_s", "prefill_tok_s", "decode_tok_s")}
    return (
        row
        | _bounds(row, limit)
        | {"evidence": replay.info["evidence"]}
        | {f"predicted_{key}": value for key, value in predicted.items()}
        | {"error": error}
    )


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


def _speeds(timeline: Timeline, workload: Workload) -> Row:
    """Times and tokens per second of all sequences together; decode is 0 where nothing was decoded."""
    ttft_s, tpot_s = timeline.ttft_s, timeline.tpot_s
    return {
        "prefill_tok_s": workload.n_prompt * workload.batch / ttft_s,
        "decode_tok_s": workload.batch / tpot_s if tpot_s > 0 else 0.0,
        "ttft_s": ttft_s,
        "tpot_s": tpot_s,
    }


def _bounds(row: Row, limit: Bound) -> Row:
    """The hardware's bound, and the share of it that is reached: in decode, or in prefill without decode steps."""
    decode = float(str(row["decode_tok_s"]))
    if decode > 0:
        fraction = decode / limit.decode_tok_s if limit.decode_tok_s > 0 else 0.0
    else:
        fraction = float(str(row["prefill_tok_s"])) / limit.prefill_tok_s
    return {
        "bound_prefill_tok_s": limit.prefill_tok_s,
        "bound_decode_tok_s": limit.decode_tok_s,
        "bound_fraction": fraction,
    }


def _usage(spec: ModelSpec, plan: Plan, timeline: Timeline) -> Row:
    need = memory(spec, plan)
    makespan_s = timeline.makespan_s
    busy = {name: seconds / makespan_s if makespan_s > 0 else 0.0 for name, seconds in timeline.busy_s.items()}
    return {
        "vram_bytes": need.vram_bytes,
        "host_bytes": need.host_bytes,
        "h2d_bytes": sum(span.bytes for span in timeline.spans if span.resource == "H2D"),
        "cpu_busy": busy["CPU"],
        "gpu_busy": busy["GPU"],
        "h2d_busy": busy["H2D"],
    }


def _error(predicted: object, measured: object) -> float | None:
    """(predicted - measured) / measured; None where nothing was measured."""
    found = float(str(measured))
    return float(str(predicted)) / found - 1.0 if found > 0 else None
