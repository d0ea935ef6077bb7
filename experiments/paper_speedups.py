"""Does the simulator find the paper's speed-ups over llama.cpp and Fiddler, and where does it not?

    python -m experiments.paper_speedups            2 minutes on one core; writes experiments/results/paper_speedups/
    python -m experiments.paper_speedups --smoke    3 s: one machine, two models; writes nowhere unless --out is given

arXiv 2411.15715 reports, over llama.cpp and Fiddler of 2024, 1.11 to 1.80 times their decode speed, 1.69 to 6.33
times their prompt speed and 1.25 to 2.04 times overall, on three machines whose parts are not public, with
prompts that are not public. Here our reconstruction of its CC/CG/GG scheme (policy `scheinfer`) is simulated on
three machines of published figures, with all of their device memory and with 12 GiB of it, 64 and 512 tokens of
prompt and 128 generated, in 16 bits. RAM is enlarged to 256 GiB so that every model fits; it changes no speed.

Baselines: `llama-cpp`, the best of today's settings (experts or MLPs in host memory, uploads of used experts from
page-locked memory); `llama-cpp-2024`, its defaults then: -ngl layer split, weights mapped and pageable, whole
layers uploaded for prompts of 32 tokens and more; `fiddler`, for models with experts.

One should see (medians; smallest and largest of all cases are printed)
- over `llama-cpp-2024` decode 1.3, prompt 2.1, overall 1.35 times: inside the paper's three ranges. A layer split
  leaves attention of its CPU layers to the CPU and lets one side wait for the other; pageable copies do the rest;
- over today's llama.cpp 1.15, 1.27 and 1.15 times: decode still inside, prompt and overall below the paper's ranges;
- over Fiddler 1.13, 1.45 and 1.17 times: its decode is near ours, as both compute a host expert where it lies;
- wide spreads for prompts of dense models, from 0.2 to 5: every policy chooses for the whole generation, and
  trades its prompt for its decode differently;
- less than 1 where a vocabulary is large and memory small: the paper's partition, as we read it, keeps embedding
  and head on the device, llama.cpp does not. No plan for LLaMA-2 70B on 24 GiB, since its attention alone fills it.

Where they differ, and why, is in experiments/LOG.md. No number of the simulator was adjusted to come near the paper.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from experiments.record import RESULTS, record
from hwmodels.catalog import hardware, with_overrides
from hwmodels.errors import PlanError
from hwmodels.profile import HardwareProfile
from hwmodels.units import format_bytes
from hwmodels.work import copy
from sim import planner, shapes
from sim.chart import GREY, LIGHT, MARKERS, SERIES, Chart, styled
from sim.memory import check_memory, memory
from sim.model import ModelSpec
from sim.plan import LayerPartition, Plan, Prediction
from sim.policies.llama_cpp import OFFLOAD_MIN_BATCH
from sim.policies.problem import Problem, total_s
from sim.simulate import forecast
from sim.workload import Workload

Row = dict[str, Any]
PAPER = {"decode": (1.11, 1.80), "prompt": (1.69, 6.33), "overall": (1.25, 2.04)}
"""Speed-ups over llama.cpp and Fiddler that the paper's abstract reports."""
MACHINES = ("rtx3090-ryzen5950x", "rtx4090-ryzen7950x", "rtxa6000-epyc7r13")
MODELS = (
    "mixtral-8x7b",
    "phi-3.5-moe",
    "qwen1.5-moe-a2.7b",
    "qwen1.5-7b",
    "qwen1.5-14b",
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
)
BASELINES = ("llama-cpp", "llama-cpp-2024", "fiddler")
N_PROMPTS, N_GEN, RAM_GIB, SMALL_GIB = (64, 512), 128, 256, 12
_TICKS = (1, 1.5, 2, 3, 5, 10)


@dataclass(frozen=True)
class Case:
    """One model on one machine with one budget and prompt; batch 1, bfloat16."""

    machine: str
    vram_budget_bytes: int
    model: str
    n_prompt: int

    @property
    def problem(self) -> Problem:
        """What a policy is asked."""
        spec, profile = shapes.shape(self.model), machine(self.machine)
        return Problem(spec, profile, self.vram_budget_bytes, Workload(self.n_prompt, N_GEN))


@cache
def machine(name: str) -> HardwareProfile:
    """A machine of the catalog with enough host memory for every model."""
    return with_overrides(hardware(name), {"ram_GiB": RAM_GIB})


def cases(machines: Sequence[str], models: Sequence[str], n_prompts: Sequence[int]) -> Iterator[Case]:
    """All cases: every machine with all of its device memory and with 12 GiB of it."""
    for name in machines:
        for budget in (machine(name).vram_bytes, SMALL_GIB * 2**30):
            for model in models:
                yield from (Case(name, budget, model, n) for n in n_prompts)


# -- policies -----------------------------------------------------------------------------------------


def speeds(problem: Problem, policy: str) -> Prediction:
    """Simulated speeds of a policy's plan; PlanError if it has none."""
    if policy == "llama-cpp-2024":
        return llama_cpp_2024(problem)
    plan = planner.plan(problem.spec, problem.profile, problem.vram_budget_bytes, problem.workload, policy)
    assert plan.prediction is not None
    return plan.prediction


def llama_cpp_2024(problem: Problem) -> Prediction:
    """-ngl with the defaults of 2024: pageable weights; a prompt on the CPU, or with whole layers uploaded.

    The upload counts attention weights, too, and its buffer is not held against the budget.
    """
    split, n_cpu = layer_split(problem)
    check_memory(problem.spec, split, problem.profile.host_bytes)
    on_cpu = forecast(problem.spec, split, problem.profile, problem.workload)
    ttft_s = on_cpu.ttft_s
    if n_cpu and problem.workload.n_prompt >= OFFLOAD_MIN_BATCH:
        ttft_s = min(ttft_s, uploading_ttft_s(problem, n_cpu))
    return Prediction(ttft_s, on_cpu.tpot_s, problem.workload.n_prompt / ttft_s, on_cpu.decode_tok_s)


def layer_split(problem: Problem) -> tuple[Plan, int]:
    """As many last layers on the device as fit, whole, and how many stay on the CPU; embedding and head fit."""
    spec, tiers = problem.spec, problem.both(problem.tier("", 1, overlap=False))
    for n_cpu in range(spec.n_layers + 1):
        layers = [_whole(spec, i, i >= n_cpu) for i in range(spec.n_layers)]
        plan = problem.plan("llama-cpp-2024", layers, tiers, pinned=False)
        if memory(spec, plan).vram_bytes <= problem.vram_budget_bytes:
            return plan, n_cpu
    raise PlanError(f"{spec.name}: not even embedding and head fit in {format_bytes(problem.vram_budget_bytes)}")


def _whole(spec: ModelSpec, layer: int, on_gpu: bool) -> LayerPartition:
    ffn = spec.layers[layer].ffn
    return LayerPartition("GPU" if on_gpu else "CPU", (ffn.columns if on_gpu else 0,) * ffn.n_experts)


def uploading_ttft_s(problem: Problem, n_cpu: int) -> float:
    """Seconds of a prompt whose first n_cpu layers are copied to the device one by one, nothing overlapping."""
    spec, profile = problem.spec, problem.profile
    tiers = problem.both(problem.tier("", 1, overlap=False, ahead=True, n_slots=1))
    ffns = [layer.ffn for layer in spec.layers]
    layers = [LayerPartition("GPU", (0 if i < n_cpu else f.columns,) * f.n_experts) for i, f in enumerate(ffns)]
    plan = problem.plan("llama-cpp-2024", layers, tiers, pinned=False)
    one_step = Workload(problem.workload.n_prompt, 1)
    attention_s = sum(
        profile.time_s("H2D", copy(spec.rest_bytes(i), spec.dtype, pinned=False)).seconds for i in range(n_cpu)
    )
    return forecast(spec, plan, profile, one_step).ttft_s + attention_s


# -- rows ---------------------------------------------------------------------------------------------


def rows_of(case: Case) -> list[Row]:
    """A row per baseline: speeds, speed-ups, or why there are none."""
    problem = case.problem
    ours, note = _try(problem, "scheinfer")
    if _try(problem, "gpu-only")[0] is not None:
        note = "fits on the device"
    rows = []
    for name in BASELINES:
        if name != "fiddler" or problem.spec.is_moe:
            other, no_plan = _try(problem, name)
            rows.append(_row(case, name, ours, other, note or no_plan))
    return rows


def _try(problem: Problem, policy: str) -> tuple[Prediction | None, str]:
    try:
        return speeds(problem, policy), ""
    except PlanError as error:
        return None, f"no plan: {error}".split(".")[0]


def _row(case: Case, baseline: str, ours: Prediction | None, other: Prediction | None, note: str) -> Row:
    workload = Workload(case.n_prompt, N_GEN)
    row: Row = {
        "machine": case.machine,
        "vram_budget_GiB": round(case.vram_budget_bytes / 2**30, 2),
        "model": case.model,
        "n_prompt": case.n_prompt,
        "n_gen": N_GEN,
        "baseline": baseline,
        "note": note,
    }
    for key, speed in (("scheinfer", ours), ("baseline", other)):
        row[f"{key}_decode_tok_s"] = round(speed.decode_tok_s, 3) if speed else None
        row[f"{key}_prefill_tok_s"] = round(speed.prefill_tok_s, 2) if speed else None
        row[f"{key}_total_s"] = round(total_s(speed, workload), 3) if speed else None
    for what in PAPER:
        row[f"{what}_speedup"] = _speedup(what, ours, other, workload) if ours and other and not note else None
    return row


def _speedup(what: str, ours: Prediction, other: Prediction, workload: Workload) -> float:
    pairs = {
        "decode": (other.tpot_s, ours.tpot_s),
        "prompt": (other.ttft_s, ours.ttft_s),
        "overall": (total_s(other, workload), total_s(ours, workload)),
    }
    slow_s, fast_s = pairs[what]
    return round(slow_s / fast_s, 3)


def ranges(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """Smallest, median and largest speed-up, by baseline and phase."""
    found: dict[str, dict[str, list[float]]] = {}
    for baseline in BASELINES:
        chosen = [row for row in rows if row["baseline"] == baseline and not row["note"]]
        if chosen:
            found[baseline] = {what: _spread(chosen, what) for what in PAPER}
    return found


def _spread(rows: Sequence[Row], what: str) -> list[float]:
    gains = [row[f"{what}_speedup"] for row in rows]
    return [min(gains), round(median(gains), 3), max(gains)]


# -- output -------------------------------------------------------------------------------------------


@styled
def draw(rows: Sequence[Row], path: Path) -> None:
    """Every speed-up as a point, by phase and baseline; the paper's range behind them."""
    figure = Chart(figsize=(8, 3), dpi=160, layout="constrained")
    for axes, (what, (low, high)) in zip(figure.subplots(1, len(PAPER), sharey=True), PAPER.items(), strict=True):
        axes.axvspan(low, high, color=LIGHT, zorder=0, label="the paper's range")
        axes.axvline(1.0, color=GREY, linewidth=0.8)
        for y, baseline in enumerate(reversed(BASELINES)):
            for k, name in enumerate(MACHINES):
                chosen = [r for r in rows if (r["baseline"], r["machine"]) == (baseline, name)]
                gains = [r[f"{what}_speedup"] for r in chosen if r[f"{what}_speedup"]]
                style = {"color": SERIES[k], "marker": MARKERS[k], "linestyle": "", "markersize": 3, "alpha": 0.8}
                axes.plot(gains, [y + 0.2 * (1 - k)] * len(gains), label=name if y == 0 else None, **style)
        axes.set(xscale="log", xlabel=f"{what} speed-up", yticks=range(len(BASELINES)))
        axes.set_yticklabels(reversed(BASELINES))
        most = max([high, *(r[f"{what}_speedup"] for r in rows if not r["note"])])
        ticks = [tick for tick in _TICKS if tick <= most]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def print_table(rows: Sequence[Row]) -> None:
    """Smallest, median and largest speed-up of every model over every baseline, then of all beside the paper's."""
    print(f"{'':<36}{'cases':>6}" + "".join(f"{what:>22}" for what in PAPER) + "    smallest, median, largest")
    for baseline in BASELINES:
        for model in dict.fromkeys(row["model"] for row in rows):
            chosen = [row for row in rows if (row["baseline"], row["model"]) == (baseline, model)]
            _print_line(f"{model} over {baseline}", chosen)
    print()
    for baseline in BASELINES:
        _print_line(f"all over {baseline}", [row for row in rows if row["baseline"] == baseline])
    print(f"{'paper':<42}" + "".join(f"{low:>8.2f}      {high:>8.2f}" for low, high in PAPER.values()))
    notes = Counter(row["note"].split(":")[0] for row in rows if row["note"])
    print("\nleft out: " + (", ".join(f"{n} cases: {note}" for note, n in notes.items()) or "none") + "\n")


def _print_line(name: str, rows: Sequence[Row]) -> None:
    compared = [row for row in rows if not row["note"]]
    if compared:
        texts = ("".join(f"{gain:>7.2f}" for gain in _spread(compared, what)) for what in PAPER)
        print(f"{name:<36}{len(compared):>6}" + "".join(f"{text:>22}" for text in texts))


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate all cases, print them beside the paper's ranges, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one machine, two models, one prompt length")
    parser.add_argument("--out", type=Path, help="folder of the results")
    args = parser.parse_args(argv)
    chosen = (
        (MACHINES[:1], ("mixtral-8x7b", "llama-2-7b"), N_PROMPTS[:1]) if args.smoke else (MACHINES, MODELS, N_PROMPTS)
    )
    todo = list(cases(*chosen))
    rows = [row for case in tqdm(todo, unit="case", disable=args.smoke, leave=False) for row in rows_of(case)]
    summary = ranges(rows)
    print_table(rows)
    settings = {
        "question": "does the simulator find the paper's speed-ups over llama.cpp and Fiddler?",
        "machines": {name: machine(name).id for name in chosen[0]},
        "models": {name: shapes.shape(name).id for name in chosen[1]},
        "n_prompt": list(chosen[2]),
        "n_gen": N_GEN,
        "dtype": "bfloat16",
        "seed": Workload(1, 1).seed,
        "skew": Workload(1, 1).skew,
        "paper": PAPER,
    }
    out = args.out or (None if args.smoke else RESULTS / "paper_speedups")
    if out is not None:
        draw(rows, out / "figure.png")
    record(out, settings, rows, {"paper": PAPER, **summary})


if __name__ == "__main__":
    main()
