"""How many candidate plans are weighed, how fast, and how does that grow?

    python -m experiments.search_speed            2 minutes on 2 cores; writes experiments/results/search_speed/
    python -m experiments.search_speed --smoke    20 s; writes nowhere unless --out is given

`auto` plans Mixtral-8x7B, Qwen3-30B-A3B and LLaMA-2-70B for an RTX 4090 desktop with 20 GiB for the model; then a
Mixtral-like shape with half and twice the layers, experts and prompt, one changed at a time. Host memory is
raised to 256 GiB, so that what is timed is the search and not a refusal.

One should see at least 100,000 candidates a model in under 10 seconds, and times that grow with layers and
experts far less than in proportion, since alike layers are timed once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from experiments.record import RESULTS, record
from hwmodels.catalog import hardware
from hwmodels.profile import HardwareProfile
from sim.model import ModelSpec, from_config
from sim.planner import plan
from sim.policies.problem import Problem
from sim.search import search
from sim.shapes import shape
from sim.space import further_space, paper_space
from sim.workload import Workload

MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "llama-2-70b")
BUDGET_BYTES = 20 << 30
BARS = {"candidates": 100_000, "plan_s": 10.0}
BASE: Mapping[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 7168,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "dtype": "bfloat16",
}


def machine() -> HardwareProfile:
    """An RTX 4090 desktop with enough host memory for any of the models."""
    return replace(hardware("rtx4090-ryzen7950x"), host_bytes=256 << 30)


def timed(case: str, spec: ModelSpec, profile: HardwareProfile, workload: Workload) -> dict[str, Any]:
    """Candidates of the search for one model, and seconds of the search and of the whole plan."""
    start_s = time.perf_counter()
    problem = Problem(spec, profile, BUDGET_BYTES, workload)
    found = search(problem, "auto", [paper_space(problem), further_space(problem)])
    search_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    made = plan(spec, profile, BUDGET_BYTES, workload, "auto")
    plan_s = time.perf_counter() - start_s
    assert made.prediction is not None, "a plan carries its prediction"
    return {
        "case": case,
        "layers": spec.n_layers,
        "experts": spec.layers[-1].ffn.n_experts,
        "n_prompt": workload.n_prompt,
        "candidates": found.n_candidates,
        "pruned": found.certificate.n_pruned,
        "simulated": found.n_simulated,
        "left": found.certificate.n_left,
        "search_s": round(search_s, 2),
        "plan_s": round(plan_s, 2),
        "us_per_candidate": round(search_s / found.n_candidates * 1e6, 2),
        "decode_tok_s": round(made.prediction.decode_tok_s, 2),
    }


def growth() -> list[tuple[str, ModelSpec, Workload]]:
    """The base shape and its variants: layers, experts and prompt, each halved and doubled."""
    cases = [("base", BASE, 512)]
    for factor, name in ((0.5, "half"), (2, "twice")):
        cases.append((f"{name} the layers", {**BASE, "num_hidden_layers": int(32 * factor)}, 512))
        experts = {"num_local_experts": int(16 * factor), "intermediate_size": int(7168 / factor)}
        cases.append((f"{name} the experts", {**BASE, **experts}, 512))
        cases.append((f"{name} the prompt", BASE, int(512 * factor)))
    return [(name, from_config(config, name), Workload(n_prompt, 128)) for name, config, n_prompt in cases]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one model, no growth")
    parser.add_argument("--out", type=Path, help=f"folder to write to (default {RESULTS.name}/search_speed)")
    flags = parser.parse_args(argv)
    out = flags.out or (None if flags.smoke else RESULTS / "search_speed")
    profile, workload = machine(), Workload(512, 128)
    names = MODELS[:1] if flags.smoke else MODELS
    cases = [(name, shape(name), workload) for name in names] + ([] if flags.smoke else growth())
    rows = [timed(name, spec, profile, load) for name, spec, load in tqdm(cases, desc="search", leave=False)]
    print(pd.DataFrame(rows).to_string(index=False))
    of_models = rows[: len(names)]
    summary = {
        "fewest_candidates": min(row["candidates"] for row in of_models),
        "slowest_plan_s": max(row["plan_s"] for row in of_models),
        "bars": BARS,
    }
    record(out, {"machine": profile.name, "vram_budget_bytes": BUDGET_BYTES}, rows, summary)


if __name__ == "__main__":
    main()
