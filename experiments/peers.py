"""How fast is this runtime on the CPU alone, beside others on the same weights and beside what memory allows?

    python -m experiments.peers            18 minutes on 2 cores; writes experiments/results/peers-<model>/
    python -m experiments.peers --smoke    15 s on tiny shapes; writes nowhere unless --out is given

Checkpoints of 1 to 2 B random bfloat16 parameters (experiments.peer_models), run by policy `cpu-only`, by
transformers with each of its implementations of experts, and, the first three of them, by llama.cpp where
llama-cpp-python and gguf are installed, on the same weights as BF16 GGUF (experiments.peer_gguf). All of a model are
loaded at once and take turns on the same threads: in each round a prompt each, then turns of few tokens each with a
KV cache, every other turn in the opposite order, so that all meet the same speeds of a machine that others use, too.
The first token of a turn is not counted: it finds in no cache what a run of tokens would. Beside them a loop that only
reads memory runs. Numbers are medians over rounds (TTFT) and turns (TPOT), spread half of the distance between
quartiles over the median; over_ours is the median over turns of TPOT over ours in the same turn, with the standard
error of that median; read_share is the time of reading a token's weights at the median read rate, over TPOT.

One should see ours at 0.75 of what memory allows or more, ahead of the others. On a busy machine the spread is larger
than any difference: others_load tells. No device is involved.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any, Protocol

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
_TURN = 6
"""Tokens in a turn, of which the first is not counted."""


class Peer(Protocol):
    """A model that generates greedily, one sequence at a time."""

    def prompt(self, ids: torch.Tensor) -> None:
        """Begin with tokens [1, S] and compute the first new one."""

    def token(self) -> None:
        """Compute the next one."""


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


class ByTransformers:
    """A transformers model, with implementations of experts in prompt and decode if named."""

    def __init__(self, model: PreTrainedModel, experts: tuple[str, str] | None = None) -> None:
        self._model, self._experts = model, experts
        self._cache, self._fed = DynamicCache(config=model.config), torch.empty(0)

    def prompt(self, ids: torch.Tensor) -> None:
        """Begin with tokens [1, S] and compute the first new one."""
        self._cache = DynamicCache(config=self._model.config)
        self._feed(ids, 0)

    def token(self) -> None:
        """Compute the next one."""
        self._feed(self._fed, 1)

    @torch.no_grad()
    def _feed(self, ids: torch.Tensor, phase: int) -> None:
        if self._experts and self._model.config._experts_implementation != self._experts[phase]:
            self._model.set_experts_implementation(self._experts[phase])
        logits = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        self._fed = logits[:, -1].argmax(-1, keepdim=True)


class ByLlamaCpp:
    """The same by llama.cpp."""

    def __init__(self, gguf: Path, n_ctx: int) -> None:
        n = torch.get_num_threads()
        module: Any = importlib.import_module("llama_cpp")
        self._model = module.Llama(str(gguf), n_ctx=n_ctx, n_batch=n_ctx, n_threads=n, n_threads_batch=n, verbose=False)
        self._fed: list[int] = []

    def prompt(self, ids: torch.Tensor) -> None:
        """Begin with tokens [1, S] and compute the first new one."""
        self._model.reset()
        self._fed = ids[0].tolist()
        self.token()

    def token(self) -> None:
        """Compute the next one."""
        self._model.eval(self._fed)
        self._fed = [self._model.sample(temp=0.0)]


@dataclass
class Times:
    """TTFT of each round, TPOT of each turn, seconds."""

    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Extent:
    """Rounds, turns in each, and tokens of the prompt."""

    n_rounds: int
    n_turns: int
    n_prompt: int

    @property
    def n_gen(self) -> int:
        """Tokens generated after a prompt."""
        return 1 + self.n_turns * _TURN


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


def peers_of(folder: Path, extent: Extent, gguf: Path | None) -> dict[str, Peer]:
    """All others that there are, loaded."""
    other = theirs(folder, "eager")
    peers: dict[str, Peer] = {"transformers": ByTransformers(other)}
    if load_model(folder, DTYPE).is_moe:
        peers = {f"transformers {experts}": ByTransformers(other, by) for experts, by in PEERS.items()}
    if gguf is not None:
        peers["llama.cpp"] = ByLlamaCpp(gguf, extent.n_prompt + extent.n_gen)
    return peers


def compare(name: str, folder: Path, extent: Extent, gguf: Path | None) -> list[dict[str, Any]]:
    """A row per implementation."""
    spec = load_model(folder, DTYPE)
    ids = torch.randint(3, spec.vocab, (1, extent.n_prompt), generator=torch.Generator().manual_seed(0))
    peers = peers_of(folder, extent, gguf)
    own = ours(folder, DTYPE, Workload(extent.n_prompt, extent.n_gen))
    peers[OWN] = ByTransformers(own)
    probe = large_pages(torch.empty(_PROBE_BYTES // 8, dtype=torch.int64)).fill_(1)
    found, rates = {key: Times() for key in peers}, list[float]()
    meter = LoadMeter.start()
    try:
        for peer in peers.values():  # warms up
            peer.prompt(ids[:, :16])
            peer.token()
        for _ in tqdm(range(extent.n_rounds), desc=name, unit="round", leave=False):
            for key, peer in peers.items():
                rates.append(read_rate(probe))
                found[key].ttft.append(_seconds(partial(peer.prompt, ids)))
            for turn in range(extent.n_turns):
                rates.append(read_rate(probe))
                for key in list(peers)[:: 1 if turn % 2 else -1]:
                    peers[key].token()
                    found[key].tpot.append(fmean(_seconds(peers[key].token) for _ in range(_TURN - 1)))
    finally:
        own.close()
    limit_s = token_bytes(spec) / median(rates)
    return [_row(name, key, times, found[OWN], limit_s, rates, meter.others()) for key, times in found.items()]


def _seconds(work: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def _row(
    name: str,
    key: str,
    times: Times,
    own: Times,
    limit_s: float,
    rates: Sequence[float],
    others: float | None,
) -> dict[str, Any]:
    ttft, tpot = times.ttft, times.tpot
    over = [one / other for one, other in zip(tpot, own.tpot, strict=True)]
    return {
        "model": name,
        "dtype": DTYPE,
        "runs_by": key,
        "ttft_s": median(ttft),
        "ttft_spread": _spread(ttft),
        "tpot_s": median(tpot),
        "tpot_spread": _spread(tpot),
        "over_ours": median(over),
        "over_ours_error": _error(over),
        "decode_tok_s": 1 / median(tpot),
        "read_share": limit_s / median(tpot),
        "best_read_share": limit_s / min(tpot),
        "read_bytes_per_s": median(rates),
        "read_spread": _spread(rates),
        "rounds": len(ttft),
        "turns": len(tpot),
        "others_load": others,
    }


def _spread(values: Sequence[float]) -> float:
    first, _, third = quantiles(values, n=4)
    return (third - first) / 2 / median(values)


def _error(values: Sequence[float]) -> float:
    """Of a median, the standard error that values of a normal distribution with these quartiles have."""
    first, _, third = quantiles(values, n=4)
    return 1.253 * (third - first) / 1.349 / math.sqrt(len(values))


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Bars of one model: the share of what memory allows, and ours over the best of the others."""
    own = next(row for row in rows if row["runs_by"] == OWN)
    others = [row for row in rows if row is not own]
    best = min(others, key=lambda row: float(row["over_ours"]))
    return {
        "read_share": round(own["read_share"], 3),
        "decode: best peer's TPOT over ours": round(best["over_ours"], 3),
        "decode: standard error of that": round(best["over_ours_error"], 3),
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
    extent = Extent(2, 2, 16) if flags.smoke else Extent(4, 8, 512)
    with_llama_cpp = has_llama_cpp()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) if flags.smoke else cache_folder() / "experiments" / "peers"
        for name in flags.model or SHAPES:
            write(name, root / name, flags.smoke)
            converted = with_llama_cpp and SHAPES[name].in_llama_cpp
            rows = compare(name, root / name, extent, write_gguf(root / name) if converted else None)
            table = pd.DataFrame(rows)
            print(table.to_string(index=False, float_format=lambda v: f"{v:.3g}"))
            settings = {
                "command": f"python -m experiments.peers --model {name}",
                "n_prompt": extent.n_prompt,
                "n_gen": extent.n_gen,
                "threads": torch.get_num_threads(),
                "kernel": native.describe(),
            }
            record(None if out is None else out.with_name(f"{out.name}-{name}"), settings, rows, summary_of(rows))


if __name__ == "__main__":
    main()
