"""How fast is this runtime on the CPU alone, beside transformers' own ways to run the same checkpoint?

    python -m experiments.peers            2 minutes on 2 cores; writes experiments/results/peers/
    python -m experiments.peers --smoke    20 s on a tiny shape; writes nowhere unless --out is given

One Mixtral-like checkpoint of random weights, loaded by transformers with each of its implementations of experts and
by this runtime with policy `cpu-only`, in float32 and bfloat16, on the same threads. All of a dtype are loaded at
once and take turns, round after round; one loop drives them all: a prompt, then token after token with a KV cache.
Numbers are medians over the rounds; the spread is half of the distance between quartiles over the median.

One should see `grouped_mm` as the nearest of the others and `batched_mm`, which copies the weights of every chosen
expert, far behind at prompts. On a busy machine the spread is larger than any difference: others_load tells. No
device is involved.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from experiments.record import RESULTS, record
from hwmodels.catalog import cache_folder
from hwmodels.load import LoadMeter
from hwmodels.profile import HardwareProfile, Peak
from runtime import native
from runtime.demo_models import write_demo_models
from runtime.session import PlannedModel, load_planned
from sim.model import load_model
from sim.planner import plan
from sim.workload import Workload

PEERS = ("eager", "batched_mm", "grouped_mm")
DTYPES = ("float32", "bfloat16")
_RATE, _BYTES = 1e12, 1 << 36


def ours(folder: Path, dtype: str, workload: Workload) -> PlannedModel:
    """The checkpoint by policy cpu-only, whose plan depends on no rate of the machine."""
    spec = load_model(folder, dtype)
    peak = Peak({dtype: _RATE}, _RATE, 1.0, 0.0, "estimated")
    machine = HardwareProfile("any", "none", "", {}, 0, _BYTES, torch.get_num_threads(), {"CPU": peak})
    made = plan(spec, machine, 0, workload, "cpu-only")
    return load_planned(folder, made, dtype, "emulated", torch.get_num_threads())


def theirs(folder: Path, dtype: str, experts: str) -> PreTrainedModel:
    """The checkpoint by transformers."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), experts_implementation=experts, local_files_only=True
    )
    return model


@torch.no_grad()
def generate(model: PreTrainedModel, ids: torch.Tensor, n_gen: int) -> tuple[float, float, list[int]]:
    """TTFT, TPOT and the greedy tokens."""
    cache, fed, tokens, times = DynamicCache(config=model.config), ids, [], [time.perf_counter()]
    for _ in range(n_gen):
        logits = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        fed = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(fed[0, 0]))
        times.append(time.perf_counter())
    return times[1] - times[0], (times[-1] - times[1]) / (n_gen - 1), tokens


def write_tiny(folder: Path) -> None:
    """A checkpoint that takes no time."""
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(folder)


def compare(folder: Path, dtype: str, workload: Workload, n_rounds: int) -> list[dict[str, Any]]:
    """A row per implementation."""
    draw = torch.Generator().manual_seed(0)
    vocab = load_model(folder, dtype).vocab
    ids = torch.randint(3, vocab, (1, workload.n_prompt), generator=draw)
    models: dict[str, PreTrainedModel] = {f"transformers {name}": theirs(folder, dtype, name) for name in PEERS}
    own = ours(folder, dtype, workload)
    models["scheinfer cpu-only"] = own
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    tokens: dict[str, list[int]] = {}
    meter = LoadMeter.start()
    try:
        for k in tqdm(range(n_rounds + 1), desc=dtype, unit="round", leave=False):
            for name, model in models.items():
                ttft_s, tpot_s, tokens[name] = generate(model, ids, workload.n_gen)
                found[name] += [(ttft_s, tpot_s)] if k else []  # the first round warms up
    finally:
        own.close()
    return [_row(folder, dtype, name, runs, tokens, meter.others()) for name, runs in found.items()]


def _row(
    folder: Path,
    dtype: str,
    name: str,
    runs: Sequence[tuple[float, float]],
    tokens: dict[str, list[int]],
    others: float | None,
) -> dict[str, Any]:
    ttft, tpot = ([run[i] for run in runs] for i in range(2))
    reference = tokens[f"transformers {PEERS[0]}"]
    same = next((i for i, (a, b) in enumerate(zip(tokens[name], reference, strict=True)) if a != b), len(reference))
    return {
        "model": folder.name,
        "dtype": dtype,
        "runs_by": name,
        "ttft_s": median(ttft),
        "ttft_spread": _spread(ttft),
        "tpot_s": median(tpot),
        "tpot_spread": _spread(tpot),
        "decode_tok_s": 1 / median(tpot),
        "tokens_as_eager": same,
        "rounds": len(runs),
        "others_load": others,
    }


def _spread(values: Sequence[float]) -> float:
    first, _, third = quantiles(values, n=4)
    return (third - first) / 2 / median(values)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, in seconds")
    parser.add_argument("--out", type=Path, help="folder to write to (default results/peers, none if --smoke)")
    flags = parser.parse_args(argv)
    out = flags.out or (None if flags.smoke else RESULTS / "peers")
    workload, n_rounds = (Workload(8, 4), 2) if flags.smoke else (Workload(64, 16), 5)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tiny" if flags.smoke else write_demo_models(cache_folder() / "demo")["tiny-mixtral"]
        if flags.smoke:
            write_tiny(folder)
        rows = [row for dtype in DTYPES for row in compare(folder, dtype, workload, n_rounds)]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format=lambda v: f"{v:.3g}"))
    summary = {}
    for dtype, own in table.groupby("dtype", sort=False):
        times = own.set_index("runs_by")
        others = times.drop(index="scheinfer cpu-only")
        for key in ("ttft_s", "tpot_s"):
            summary[f"{dtype} {key}: best peer over ours"] = round(
                float(others[key].min() / times.loc["scheinfer cpu-only", key]), 3
            )
    kernel = native.kernel()
    settings = {
        "command": "python -m experiments.peers",
        "n_prompt": workload.n_prompt,
        "n_gen": workload.n_gen,
        "threads": torch.get_num_threads(),
        "kernel": kernel.isa if kernel is not None else "torch",
    }
    record(out, settings, rows, summary)


if __name__ == "__main__":
    main()
