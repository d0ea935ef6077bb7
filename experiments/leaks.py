"""Does a thousand generations, or fifty loads, leave anything behind?

    python -m experiments.leaks            5 minutes on 2 cores; writes results/leaks/
    python -m experiments.leaks --smoke    20 s on smaller checkpoints; writes nowhere unless --out is given

Small random checkpoints run through scheinfer.load() by overlapping plans: a Llama whose columns are CC, CG and GG in
every layer, a Mixtral whose columns are, and a Mixtral with an expert cache. After a warm-up, prompts of changing
length are generated from, and every few generations resident memory, the C and the Python heap, threads, open files
and device memory are read. Then a checkpoint is loaded, run and closed, over and over.

One should see threads, files and device memory that never change, and a drift of memory that is zero within its
uncertainty: memory wanders in steps, so the drift is the mean growth of ten stretches of equal length, and its 95 %
interval comes from their spread.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import scheinfer
from experiments.record import RESULTS, record
from runtime.session import PlannedModel
from sim.chart import GREY, SERIES, Chart, chart, styled
from sim.model import ModelSpec, load_model
from sim.plan import ExpertCache, LayerPartition, Plan, Tier

N_STRETCHES, STUDENT_T = 10, 2.262  # 95 % of Student's t at nine degrees of freedom
FLAT = ("threads", "files", "device_bytes")
WANDERING = ("rss_bytes", "c_heap_bytes", "python_blocks")
_N_GEN, _N_CTX, _DEVICE_BYTES = 5, 64, 1 << 30
SMALL: Mapping[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": None,
}
LARGE: Mapping[str, Any] = {**SMALL, "hidden_size": 512, "intermediate_size": 2048}  # 38 MB: one leaked is seen


MakePlan = Callable[[ModelSpec], Plan]


@dataclass(frozen=True)
class Held:
    """What this process holds. The C heap is 0 where the C library does not tell."""

    rss_bytes: int
    c_heap_bytes: int
    python_blocks: int
    threads: int
    files: int
    device_bytes: int


class _Mallinfo(ctypes.Structure):
    _NAMES = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _NAMES]


class Log:
    """What was held at up to so many times, in memory that is taken beforehand: no leak of its own."""

    def __init__(self, n: int) -> None:
        self._table = np.zeros((n, len(fields(Held))), dtype=np.int64)
        self._n = 0

    def add(self, now: Held) -> None:
        """Note what is held now."""
        self._table[self._n] = astuple(now)
        self._n += 1

    def all(self) -> list[Held]:
        """What was noted, first to last."""
        return [Held(*map(int, row)) for row in self._table[: self._n]]


def held(model: PlannedModel | None) -> Held:
    """Read everything, after the garbage is collected."""
    gc.collect()
    device = 0 if model is None else model.executor.device.arena.used_bytes
    return Held(
        rss_bytes=int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        c_heap_bytes=_c_heap_bytes(),
        python_blocks=sys.getallocatedblocks(),
        threads=len(os.listdir("/proc/self/task")),  # those of libraries, too
        files=len(os.listdir("/proc/self/fd")),
        device_bytes=device + (torch.cuda.memory_allocated() if torch.cuda.is_available() else 0),
    )


def _c_heap_bytes() -> int:
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return int(found.uordblks + found.hblkhd)


# -- what runs ----------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, family: str, sizes: Mapping[str, Any]) -> Path:
    """A random model of a family in folder/family."""
    experts = {"num_local_experts": 6, "num_experts_per_tok": 2} if family == "mixtral" else {}
    config = AutoConfig.for_model(family, **sizes, **experts)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder / family)
    return folder / family


def three_ways(spec: ModelSpec) -> Plan:
    """A quarter of all columns GG, a quarter CG, the rest CC, with overlap."""
    quarter = spec.layers[0].ffn.columns // 4
    layers = tuple(LayerPartition("GPU", (quarter,) * la.ffn.n_experts) for la in spec.layers)
    tiers = (Tier("all", _N_CTX, True, (quarter,) * spec.n_layers, None, 2),)
    return Plan("cc-cg-gg", spec.name, spec.id, "", spec.dtype, _DEVICE_BYTES, _N_CTX, 1, True, "GPU", layers, tiers)


def with_expert_cache(spec: ModelSpec) -> Plan:
    """Two experts of each layer in a cache on the device, every miss sent into it, a copy of what leaves sent back."""
    bare = three_ways(spec)
    tier = Tier("all", _N_CTX, True, (0,) * spec.n_layers, None, 0, fetch_share=1.0)
    cache = ExpertCache("layer", "lru", 2, (), n_spare=1, writeback=True)
    return replace(bare, policy="expert-cache", tiers=(tier,), cache=cache)


CASES: tuple[tuple[str, MakePlan], ...] = (
    ("llama", three_ways),
    ("mixtral", three_ways),
    ("mixtral", with_expert_cache),
)


def generate(model: PlannedModel, number: int) -> None:
    """One generation from a prompt whose length changes from call to call."""
    ids = torch.randint(1, 256, (1, 4 + number % 13), generator=torch.Generator().manual_seed(number))
    ids = ids.to(model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=_N_GEN, do_sample=False)
    assert out.shape[1] == ids.shape[1] + _N_GEN


def generations(folder: Path, make: MakePlan, device: str, n: int, every: int) -> list[Held]:
    """What is held every few of n generations in a row, after a warm-up of a quarter as many."""
    model, _ = scheinfer.load(folder, make(load_model(folder)), device=device)
    try:
        for number in range(n // 4):
            generate(model, number)
        log = Log(n // every + 1)
        log.add(held(model))
        for number in tqdm(range(1, n + 1), desc=f"{folder.name} {model.plan.policy}", leave=False):
            generate(model, number)
            if number % every == 0:
                log.add(held(model))
        return log.all()
    finally:
        model.close()


def loads(folder: Path, device: str, n: int) -> tuple[list[Held], int]:
    """What is held after each of n loads, runs and closes, after a warm-up of half as many.

    And the least resident memory that any close gave back.
    """
    plan, log, given_back = three_ways(load_model(folder)), Log(n + 1), np.zeros(n, dtype=np.int64)

    def once(number: int) -> int:
        model, _ = scheinfer.load(folder, plan, device=device)
        generate(model, number)
        loaded = held(model)
        model.close()
        return loaded.rss_bytes - held(None).rss_bytes

    for number in range(n // 2):
        once(number)
    log.add(held(None))
    for number in tqdm(range(n), desc=f"load {folder.name}", leave=False):
        given_back[number] = once(number)
        log.add(held(None))
    return log.all(), int(given_back.min())


# -- what it says -------------------------------------------------------------------------------------


def drift(values: Sequence[float], steps: int) -> tuple[float, float]:
    """Growth per step, and half of its 95 % interval, of something read at equal distances over so many steps."""
    at = np.linspace(0, len(values) - 1, N_STRETCHES + 1).round().astype(int)
    growth = np.diff(np.asarray(values, dtype=float)[at]) * N_STRETCHES / steps
    return float(growth.mean()), float(STUDENT_T * growth.std(ddof=1) / np.sqrt(N_STRETCHES))


def summarise(case: str, found: Sequence[Held], steps: int) -> dict[str, Any]:
    """One row: drift of what wanders, the span of what must not change."""
    row: dict[str, Any] = {"case": case, "steps": steps}
    for name in WANDERING:
        row[f"{name}_per_step"], row[f"{name}_uncertainty"] = drift([getattr(h, name) for h in found], steps)
    for name in FLAT:
        values = [getattr(h, name) for h in found]
        row[f"{name}_first"], row[f"{name}_span"] = values[0], max(values) - min(values)
    return row


@styled
def figure(table: pd.DataFrame) -> Chart:
    """Growth of resident memory since the warm-up, a line per case, over the share of the steps done."""
    drawn, axes = chart(5.2, 2.8)
    for (case, own), color in zip(table.groupby("case", sort=False), SERIES, strict=False):
        grown = (own["rss_bytes"] - own["rss_bytes"].iloc[0]) / 2**20
        axes.plot(100 * own["step"] / own["step"].max(), grown, color=color, label=f"{case}, {own['step'].max()} times")
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.set(xlabel="steps done, %", ylabel="resident memory gained, MiB", xlim=(0, 100))
    axes.margins(y=0.3)
    axes.grid(axis="y")
    drawn.legend(loc="outside lower center", ncols=2)
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="forty generations, ten loads, in seconds")
    parser.add_argument("--device", default="auto", help="auto, cuda:0 or emulated (default auto)")
    parser.add_argument("--out", type=Path, help=f"folder to write to (default {RESULTS.name}/leaks, none if --smoke)")
    flags = parser.parse_args(argv)
    n_generations, every, n_loads = (40, 4, 10) if flags.smoke else (1000, 10, 50)
    series: dict[str, tuple[int, list[Held]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for family, make in CASES:
            folder = Path(scratch) / "small" / family
            if not folder.is_dir():
                write_checkpoint(folder.parent, family, SMALL)
            found = generations(folder, make, flags.device, n_generations, every)
            series[f"{family} {make(load_model(folder)).policy}"] = (every, found)
        folder = write_checkpoint(Path(scratch) / "large", "llama", SMALL if flags.smoke else LARGE)
        found, given_back = loads(folder, flags.device, n_loads)
        series["load and close"], weight_bytes = (1, found), load_model(folder).weight_bytes
    rows = [
        {"case": case, "step": i * step, **asdict(h)}
        for case, (step, found) in series.items()
        for i, h in enumerate(found)
    ]
    cases = [summarise(case, found, step * (len(found) - 1)) for case, (step, found) in series.items()]
    print(pd.DataFrame(cases).set_index("case").T.to_string(float_format=lambda v: f"{v:.4g}"))
    out = flags.out or (None if flags.smoke else RESULTS / "leaks")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        figure(pd.DataFrame(rows)).savefig(out / "figure.png")
    summary = {
        "python_threads_left": sum(t.name.startswith("scheinfer") for t in threading.enumerate()),
        "most_rss_bytes_per_generation": max(row["rss_bytes_per_step"] for row in cases[:-1]),
        "rss_bytes_per_load": cases[-1]["rss_bytes_per_step"],
        "least_given_back_by_close_over_weights": given_back / weight_bytes,
        "changed": [f"{row['case']}: {name}" for row in cases for name in FLAT if row[f"{name}_span"]],
    }
    record(out, {"device": flags.device, "cases": cases}, rows, summary)


if __name__ == "__main__":
    main()
