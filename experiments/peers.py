"""How fast is this runtime on the CPU alone, beside others on the same weights and beside what memory allows?

    python -m experiments.peers            5 minutes on 2 cores; writes experiments/results/peers-<model>/
    python -m experiments.peers --smoke    30 s on tiny shapes; writes nowhere unless --out is given

Three checkpoints of 1 to 2 B random bfloat16 parameters (experiments.peer_models), run by policy `cpu-only`, by
transformers with each of its implementations of experts, and by llama.cpp where llama-cpp-python and gguf are
installed, on the same weights as BF16 GGUF (experiments.peer_gguf). All of a model are loaded at once and take turns,
round after round, on the same threads: a prompt, then token after token with a KV cache. Before and after each a loop
that only reads memory runs. Numbers are medians over the rounds, spread half of the distance between quartiles over the
median; read_share is the time of reading a token's weights at the median read rate, over TPOT.

One should see ours at 0.75 of what memory allows or more, ahead of the others. On a busy machine the spread is larger
than any difference: others_load tells. No device is involved.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from experiments.peer_gguf import write_gguf
from experiments.peer_models import SHAPES, token_bytes, write
from experiments.record import RESULTS, record
from hwmodels.catalog import cache_folder
from hwmodels.load import LoadMeter
from hwmodels.profile import HardwareProfile, Peak
from runtime import native
from runtime.pages import large_pages
from runtime.session import PlannedModel, load_planned
from sim.model import load_model
from sim.planner import plan
from sim.workload import Workload

PEERS = {"eager": ("eager", "eager"), "grouped_mm": ("grouped_mm", "grouped_mm")}
PEERS["batched_mm"] = ("grouped_mm", "batched_mm")
"""What transformers computes experts by, in the prompt and after it: batched_mm copies the weights of each token's
experts, 34 GB for 512 tokens here."""
DTYPE = "bfloat16"
OWN = "scheinfer cpu-only"
_RATE, _BYTES, _PROBE_BYTES, _REST_S = 1e12, 1 << 36, 1 << 28, 0.05
Run = Callable[[torch.Tensor, int], tuple[float, float]]
"""Prompt and number of tokens -> TTFT and TPOT in seconds."""


def ours(folder: Path, dtype: str, workload: Workload) -> PlannedModel:
    """The checkpoint by policy cpu-only, whose plan depends on no rate of the machine."""
    spec = load_model(folder, dtype)
    peak = Peak({dtype: _RATE}, _RATE, 1.0, 0.0, "estimated")
    machine = HardwareProfile("any", "none", "", {}, 0, _BYTES, torch.get_num_threads(), {"CPU": peak})
    made = plan(spec, machine, 0, workload, "cpu-only")
    return load_planned(folder, made, dtype, "emulated", torch.get_num_threads())


def theirs(folder: Path, experts: str) -> PreTrainedModel:
    """The checkpoint by transformers."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, DTYPE), experts_implementation=experts, local_files_only=True
    )
    return model


def runs_of(model: PreTrainedModel, experts: Sequence[str] = ()) -> Run:
    """Greedy generation by a transformers model, with implementations of experts in prompt and decode if named."""

    @torch.no_grad()
    def run(ids: torch.Tensor, n_gen: int) -> tuple[float, float]:
        cache, fed, times = DynamicCache(config=model.config), ids, [time.perf_counter()]
        for i in range(n_gen):
            if experts and i < len(experts):
                model.set_experts_implementation(experts[i])
            logits = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            fed = logits[:, -1].argmax(-1, keepdim=True)
            times.append(time.perf_counter())
        return times[1] - times[0], (times[-1] - times[1]) / (n_gen - 1)

    return run


def runs_of_llama_cpp(gguf: Path, n_ctx: int) -> Run:
    """The same by llama.cpp."""
    n = torch.get_num_threads()
    module: Any = importlib.import_module("llama_cpp")
    model = module.Llama(str(gguf), n_ctx=n_ctx, n_batch=n_ctx, n_threads=n, n_threads_batch=n, verbose=False)

    def run(ids: torch.Tensor, n_gen: int) -> tuple[float, float]:
        model.reset()
        fed, times = ids[0].tolist(), [time.perf_counter()]
        for _ in range(n_gen):
            model.eval(fed)
            fed = [model.sample(temp=0.0)]
            times.append(time.perf_counter())
        return times[1] - times[0], (times[-1] - times[1]) / (n_gen - 1)

    return run


def read_rate(probe: torch.Tensor) -> float:
    """Bytes per second of a loop that reads memory and does nothing else."""
    kernel = native.kernel()
    time.sleep(_REST_S)  # torch's threads spin for a while after they worked
    start_s = time.perf_counter()
    if kernel is None:
        probe.sum()
    else:
        kernel.read(probe)
    return probe.nbytes / (time.perf_counter() - start_s)


def compare(name: str, folder: Path, workload: Workload, n_rounds: int, gguf: Path | None) -> list[dict[str, Any]]:
    """A row per implementation."""
    spec = load_model(folder, DTYPE)
    ids = torch.randint(3, spec.vocab, (1, workload.n_prompt), generator=torch.Generator().manual_seed(0))
    other = theirs(folder, "eager")
    runs: dict[str, Run] = {"transformers": runs_of(other)}
    if spec.is_moe:
        runs = {f"transformers {experts}": runs_of(other, by) for experts, by in PEERS.items()}
    if gguf is not None:
        runs["llama.cpp"] = runs_of_llama_cpp(gguf, workload.n_prompt + workload.n_gen)
    own = ours(folder, DTYPE, workload)
    runs[OWN] = runs_of(own)
    probe = large_pages(torch.empty(_PROBE_BYTES // 8, dtype=torch.int64)).fill_(1)
    found: dict[str, list[tuple[float, float]]] = {key: [] for key in runs}
    rates: list[float] = []
    meter = LoadMeter.start()
    try:
        for k in tqdm(range(n_rounds + 1), desc=name, unit="round", leave=False):
            for key, run in runs.items():
                rates.append(read_rate(probe))
                if k:
                    found[key].append(run(ids, workload.n_gen))
                else:  # warms up
                    run(ids[:, :16], 3)
            rates.append(read_rate(probe))
    finally:
        own.close()
    limit_s = token_bytes(spec) / median(rates)
    return [_row(name, key, times, limit_s, rates, meter.others()) for key, times in found.items()]


def _row(
    name: str,
    key: str,
    times: Sequence[tuple[float, float]],
    limit_s: float,
    rates: Sequence[float],
    others: float | None,
) -> dict[str, Any]:
    ttft, tpot = ([run[i] for run in times] for i in range(2))
    return {
        "model": name,
        "dtype": DTYPE,
        "runs_by": key,
        "ttft_s": median(ttft),
        "ttft_spread": _spread(ttft),
        "tpot_s": median(tpot),
        "tpot_spread": _spread(tpot),
        "decode_tok_s": 1 / median(tpot),
        "read_share": limit_s / median(tpot),
        "best_read_share": limit_s / min(tpot),
        "read_bytes_per_s": median(rates),
        "read_spread": _spread(rates),
        "rounds": len(times),
        "others_load": others,
    }


def _spread(values: Sequence[float]) -> float:
    first, _, third = quantiles(values, n=4)
    return (third - first) / 2 / median(values)


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Bars of one model: the share of what memory allows, and ours over the best of the others."""
    own = next(row for row in rows if row["runs_by"] == OWN)
    others = [row for row in rows if row is not own]
    return {
        "read_share": round(own["read_share"], 3),
        "decode: best peer's TPOT over ours": round(min(row["tpot_s"] for row in others) / own["tpot_s"], 3),
        "prompt: best peer's TTFT over ours": round(min(row["ttft_s"] for row in others) / own["ttft_s"], 3),
    }


def has_llama_cpp() -> bool:
    """Whether llama.cpp takes part; a message where it does not."""
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"llama.cpp is left out: not installed: {', '.join(missing)}", file=sys.stderr)
    return not missing


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, in seconds")
    parser.add_argument(
        "--out", type=Path, help="folder to write to, -MODEL is added (default results/peers, none if --smoke)"
    )
    parser.add_argument("--model", choices=SHAPES, action="append", help="which models (default all)")
    flags = parser.parse_args(argv)
    out = flags.out or (None if flags.smoke else RESULTS / "peers")
    workload, n_rounds = (Workload(16, 4), 2) if flags.smoke else (Workload(512, 16), 4)
    with_llama_cpp = has_llama_cpp()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) if flags.smoke else cache_folder() / "experiments" / "peers"
        for name in flags.model or SHAPES:
            write(name, root / name, flags.smoke)
            rows = compare(name, root / name, workload, n_rounds, write_gguf(root / name) if with_llama_cpp else None)
            table = pd.DataFrame(rows)
            print(table.to_string(index=False, float_format=lambda v: f"{v:.3g}"))
            settings = {
                "command": f"python -m experiments.peers --model {name}",
                "n_prompt": workload.n_prompt,
                "n_gen": workload.n_gen,
                "threads": torch.get_num_threads(),
                "kernel": native.describe(),
            }
            record(None if out is None else out.with_name(f"{out.name}-{name}"), settings, rows, summary_of(rows))


if __name__ == "__main__":
    main()
