"""What does a simulated task cost, by engine?

    python -m experiments.simulator_speed            10 s; writes experiments/results/simulator_speed/
    python -m experiments.simulator_speed --smoke    1 s; writes nowhere unless --out is given

One decode step of Mixtral-8x7B with CC, CG and GG columns in each of its 32 layers (8 tasks a layer) is
run by every engine in turn, again and again, so that what disturbs the machine disturbs all alike. The
whole forecast of a generation (512 tokens of prompt, 128 generated) is timed beside them.

One should see the recurrence at a third of a microsecond per task, the heap at one, SimPy within 4 times
the heap without contention and within 10 times with it; compiling the graph costs more than running it.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from experiments.record import RESULTS, record
from hwmodels.catalog import hardware
from hwmodels.profile import Contention, HardwareProfile
from sim.compile import compile_step
from sim.cost import price
from sim.engine import schedule
from sim.heap import list_schedule, recur
from sim.model import ModelSpec, from_config
from sim.plan import LayerPartition, Plan, Tier
from sim.simulate import forecast, routing_of
from sim.workload import Workload

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "dtype": "bfloat16",
}
BARS = {"simpy": 4.0, "simpy, contention": 10.0}
"""At most so many times the heap's time per task."""


def cut_plan(spec: ModelSpec) -> Plan:
    """Every expert cut in three: 2048 columns resident, 1024 sent ahead, the rest on the CPU; prompts stream."""
    n = spec.n_layers
    return Plan(
        policy="by-hand",
        model=spec.name,
        model_id=spec.id,
        profile_id="",
        dtype=spec.dtype,
        vram_budget_bytes=24 * 2**30,
        n_ctx=640,
        batch=1,
        pinned=True,
        ends="GPU",
        layers=(LayerPartition("GPU", (2048,) * 8),) * n,
        tiers=(
            Tier("decode", 16, True, (1024,) * n, None, 2),
            Tier("prompt", 4096, True, (0,) * n, 20, 2),
        ),
    )


def machine() -> HardwareProfile:
    """A desktop whose CPU and link slow each other, as all do; how much does not matter here."""
    shared = Contention(("CPU", "H2D"), {"CPU": 0.8, "H2D": 0.9}, "estimated")
    return hardware("rtx4090-ryzen7950x").with_(contention=(shared,))


def engines(
    spec: ModelSpec, profile: HardwareProfile, workload: Workload
) -> tuple[int, dict[str, Callable[[], object]]]:
    """Number of tasks of the step, and what is timed, by name."""
    plan, step, where = cut_plan(spec), workload.steps()[1], routing_of(spec, workload)
    graph = compile_step(spec, plan, step, where)
    prices = price(graph, profile)
    arrays, duration_s, lag_s = graph.arrays, prices.duration_s, prices.lag_s
    return len(graph), {
        "simpy": lambda: schedule(graph, prices),
        "simpy, contention": lambda: schedule(graph, prices, profile.rates),
        "heap": lambda: list_schedule(arrays, duration_s, lag_s),
        "recurrence": lambda: recur(arrays, duration_s, lag_s),
        "compile": lambda: compile_step(spec, plan, step, where),
        "price": lambda: price(graph, profile),
    }


def interleaved(runs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of every repetition by name; each repetition runs all of them, one after the other."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    for _ in range(repetitions):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Time the engines, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few repetitions on few layers")
    parser.add_argument("--repetitions", type=int, default=1000, help="runs of every engine")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args(argv)
    repetitions, n_layers = (20, 4) if args.smoke else (args.repetitions, 32)

    spec = from_config({**MIXTRAL, "num_hidden_layers": n_layers}, "mixtral-8x7b")
    profile, workload = machine(), Workload(n_prompt=512, n_gen=128)
    n_tasks, runs = engines(spec, profile, workload)
    seconds = interleaved(runs, repetitions)
    whole = interleaved(
        {"forecast": lambda: forecast(spec, cut_plan(spec), profile, workload)}, max(5, repetitions // 50)
    )

    heap_us = median(seconds["heap"]) / n_tasks * 1e6
    rows = [_row(name, taken, n_tasks, heap_us) for name, taken in seconds.items()]
    summary = {f"{row['engine']}_us_per_task": row["median_us_per_task"] for row in rows}
    summary["forecast_ms"] = round(median(whole["forecast"]) * 1e3, 2)
    summary["bars_met"] = all(row["times_heap"] <= BARS[row["engine"]] for row in rows if row["engine"] in BARS)
    _print(rows, n_layers, n_tasks, summary)
    settings = {
        "question": "what does a simulated task cost, by engine?",
        "repetitions": repetitions,
        "n_layers": n_layers,
        "n_tasks": n_tasks,
        "profile": profile.name,
        "profile_id": profile.id,
        "seed": workload.seed,
        "bars_times_heap": BARS,
    }
    out = args.out or (None if args.smoke else RESULTS / "simulator_speed")
    record(out, settings, rows, summary)


def _row(name: str, seconds: list[float], n_tasks: int, heap_us: float) -> dict[str, Any]:
    ordered = sorted(s / n_tasks * 1e6 for s in seconds)
    return {
        "engine": name,
        "median_us_per_task": round(median(ordered), 4),
        "p10_us_per_task": round(ordered[len(ordered) // 10], 4),
        "p90_us_per_task": round(ordered[len(ordered) * 9 // 10], 4),
        "times_heap": round(median(ordered) / heap_us, 3),
    }


def _print(rows: list[dict[str, Any]], n_layers: int, n_tasks: int, summary: dict[str, Any]) -> None:
    print(f"{n_layers} layers, {n_tasks} tasks a step\n")
    print(f"{'':<20}{'µs per task':>12}{'p10':>8}{'p90':>8}{'x heap':>8}{'bar':>6}")
    for row in rows:
        bar = f"{BARS[row['engine']]:.0f}" if row["engine"] in BARS else ""
        numbers = "".join(f"{row[k]:>8.2f}" for k in ("p10_us_per_task", "p90_us_per_task", "times_heap"))
        print(f"{row['engine']:<20}{row['median_us_per_task']:>12.2f}{numbers}{bar:>6}")
    missed = "" if summary["bars_met"] else "; A BAR IS MISSED"
    print(f"\nforecast of the whole generation: {summary['forecast_ms']:.1f} ms{missed}")


if __name__ == "__main__":
    main()
