"""How much faster is a layer whose CPU, link and device parts run at the same time?

    python -m experiments.overlap            3 minutes on 2 cores; writes experiments/results/overlap/
    python -m experiments.overlap --smoke    20 s on a tiny shape; writes nowhere unless --out is given

A Mixtral-like and a Llama-like shape with random weights, half of every MLP on the device, run by three
plans of one placement: one part after the other (serial), CC beside GG (overlap), and CC beside GG beside
CG (overlap-cg), and by the plan that the policy scheinfer balances in a device memory with room for half of
the MLPs. They are run for real, in turn, and replayed in simulation with and without contention.

One should see the serial plan's makespan equal the sum of its busy times, the overlapping plans' makespan
well below it, little more than what their busiest resource works (step_over_busiest, of decode), and the
simulation within some per cent of each; without contention it is too optimistic.
On a machine without a GPU the device is emulated, and the rows say so.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from experiments.record import RESULTS, record
from hwmodels.profile import RESOURCES, HardwareProfile
from runtime.budget import half_budget
from runtime.calibrate import QUICK, SMOKE, Extent, calibrate
from runtime.devices import open_device
from runtime.measure import Measured, measure, median_run
from runtime.session import PlannedModel
from runtime.synthetic import random_model
from sim.model import ModelSpec, from_config
from sim.plan import LayerPartition, Plan, Tier
from sim.planner import decide
from sim.policies.problem import Problem
from sim.simulate import simulate
from sim.timeline import Timeline
from sim.workload import Workload

Config = Mapping[str, Any]
_COMMON: Config = {"vocab_size": 4096, "max_position_embeddings": 4096, "hidden_act": "silu", "dtype": "float32"}
MIXTRAL_LIKE: Config = {
    **_COMMON,
    "model_type": "mixtral",
    "hidden_size": 1024,
    "intermediate_size": 896,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
LLAMA_LIKE: Config = {
    **_COMMON,
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}
TINY: Config = {
    **LLAMA_LIKE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SHAPES: Mapping[str, Config] = {"mixtral-like": MIXTRAL_LIKE, "llama-like": LLAMA_LIKE}
DEVICE_BYTES = 4 << 30


def plans(spec: ModelSpec, workload: Workload) -> list[Plan]:
    """Three plans of one placement: serial, CC beside GG, and CC beside GG beside CG.

    Sent columns are a sixteenth of an MLP in decode and an eighth in the prompt, taken from CC.
    """
    columns = spec.layers[0].ffn.columns
    layers = tuple(LayerPartition("GPU", (columns // 2,) * la.ffn.n_experts) for la in spec.layers)

    def tiers(overlap: bool, decode: int, prompt: int) -> tuple[Tier, ...]:
        slots = 2 if decode else 0
        return (
            Tier("decode", 1, overlap, (decode,) * spec.n_layers, None, slots),
            Tier("prompt", workload.n_ctx, overlap, (prompt,) * spec.n_layers, None, slots),
        )

    def plan(name: str, own: tuple[Tier, ...]) -> Plan:
        return Plan(name, spec.name, spec.id, "", spec.dtype, DEVICE_BYTES, workload.n_ctx, 1, True, "GPU", layers, own)

    return [
        plan("serial", tiers(False, 0, 0)),
        plan("overlap", tiers(True, 0, 0)),
        plan("overlap-cg", tiers(True, columns // 16, columns // 8)),
    ]


def balanced(spec: ModelSpec, profile: HardwareProfile, workload: Workload) -> Plan:
    """The plan of the policy scheinfer where half of all MLPs have room on the device."""
    return decide(Problem(spec, profile, half_budget(spec, workload), workload), "scheinfer").plan


def step_over_busiest(timeline: Timeline) -> float:
    """Time of all decode steps over what the resource that is busiest in them works."""
    steps = [timeline.step(name) for name in timeline.steps if name.startswith("decode")]
    busy_s = [sum(step.busy_s[resource] for step in steps) for resource in RESOURCES]
    return sum(timeline.step_s[name] for step in steps for name in step.steps) / max(busy_s)


@contextmanager
def loaded(config: Config, own: Sequence[Plan], device: str) -> Iterator[list[PlannedModel]]:
    """The model once per plan, all at the same time, so that plans can take turns."""
    with ExitStack() as stack:
        models = []
        for plan in own:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model = random_model(config, folder, plan, open_device(device, plan.vram_budget_bytes))
            stack.callback(model.close)
            models.append(model)
        yield models


def calibrated(name: str, config: Config, device: str, extent: Extent) -> HardwareProfile:
    """A new calibration for a shape."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(dict(config)))
        return calibrate(folder, device, extent=extent)


def taking_turns(
    config: Config, own: Sequence[Plan], workload: Workload, device: str, repetitions: int
) -> list[list[Measured]]:
    """Runs of every plan: one of each, then again, so that a disturbance touches one run of each."""
    prompt = [3 + i % 1000 for i in range(workload.n_prompt)]
    runs: list[list[Measured]] = [[] for _ in own]
    with loaded(config, own, device) as models:
        for _ in tqdm(range(repetitions), desc="run", unit="round", leave=False):
            for found, model in zip(runs, models, strict=True):
                found += measure(model, prompt, workload.n_gen, 1)
    return runs


def run(name: str, config: Config, workload: Workload, device: str, repetitions: int, extent: Extent) -> list[Any]:
    """(row, simulated, measured) of every plan for one shape, and its profile at the end."""
    spec, profile = from_config(config, name), calibrated(name, config, device, extent)
    own = [*plans(spec, workload), balanced(spec, profile, workload)]
    runs = taking_turns(config, own, workload, device, repetitions)
    return [
        _result(spec, plan, profile, workload, median_run(found)) for plan, found in zip(own, runs, strict=True)
    ] + [profile]


def _result(
    spec: ModelSpec, plan: Plan, profile: HardwareProfile, workload: Workload, shown: Measured
) -> tuple[dict[str, Any], Timeline, Timeline]:
    replay = simulate(spec, plan, profile, workload, shown.routing)
    alone = simulate(spec, plan, profile, workload, shown.routing, contention=False)
    measured = shown.timeline
    row = {
        "model": spec.name,
        "plan": plan.policy,
        "device": profile.device,
        "measured_ttft_s": measured.ttft_s,
        "simulated_ttft_s": replay.ttft_s,
        "ttft_error": replay.ttft_s / measured.ttft_s - 1,
        "measured_tpot_s": measured.tpot_s,
        "simulated_tpot_s": replay.tpot_s,
        "tpot_error": replay.tpot_s / measured.tpot_s - 1,
        "tpot_error_without_contention": alone.tpot_s / measured.tpot_s - 1,
        "step_over_busiest": step_over_busiest(measured),
        "measured_overlap": measured.overlap,
        "simulated_overlap": replay.overlap,
        "makespan_s": measured.makespan_s,
        "sum_of_busy_s": sum(measured.busy_s.values()),
    }
    return row, replay, measured


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, in seconds")
    parser.add_argument("--device", default="auto", help="auto, cuda:0 or emulated (default auto)")
    parser.add_argument("--repetitions", type=int, default=7, help="rounds over all plans (default 7)")
    parser.add_argument(
        "--out", type=Path, help=f"folder to write to (default {RESULTS.name}/overlap, none if --smoke)"
    )
    flags = parser.parse_args(argv)
    shapes = {"tiny": TINY} if flags.smoke else SHAPES
    workload = Workload(16, 6) if flags.smoke else Workload(128, 32)
    repetitions = 1 if flags.smoke else flags.repetitions
    out = flags.out or (None if flags.smoke else RESULTS / "overlap")
    rows, profiles = [], {}
    for name, config in shapes.items():
        extent = SMOKE if flags.smoke else QUICK
        *results, profile = run(name, config, workload, flags.device, repetitions, extent)
        profiles[name] = profile.id
        rows += [row for row, _, _ in results]
        if out is not None:
            _save(out, name, results, profile)
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    summary = {
        "device": rows[0]["device"],
        "worst_tpot_error": max(abs(row["tpot_error"]) for row in rows),
        "worst_ttft_error": max(abs(row["ttft_error"]) for row in rows),
        "best_overlap": max(row["measured_overlap"] for row in rows),
        "step_over_busiest": {row["model"]: row["step_over_busiest"] for row in rows if row["plan"] == "scheinfer"},
    }
    record(out, {"workload": [workload.n_prompt, workload.n_gen], "profiles": profiles}, rows, summary)


def _save(out: Path, name: str, results: Sequence[tuple[dict[str, Any], Timeline, Timeline]], profile: Any) -> None:
    out.mkdir(parents=True, exist_ok=True)
    profile.save(out / f"{name}.hardware.json")
    for row, simulated, measured in results:
        simulated.save_parquet(out / f"{name}.{row['plan']}.simulated.parquet")
        measured.save_parquet(out / f"{name}.{row['plan']}.measured.parquet")


if __name__ == "__main__":
    main()
