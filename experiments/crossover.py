"""From how many tokens on is it faster to send weights to the GPU than to compute them on the CPU?

    python -m experiments.crossover            1 minute on one core; writes experiments/results/crossover/
    python -m experiments.crossover --smoke    2 s: one machine, one model; writes nowhere unless --out is given

Two questions of machines of published figures, in simulation, in 16 bits. Of one expert or MLP: the tokens from
which sending it and computing it on the GPU takes less time than the CPU takes. Of a whole prompt: its length from
which sending all experts or MLPs a layer ahead beats computing all of them on the CPU; with experts, each sees only
its share of the tokens, so the prompt is longer by experts over experts per token, and the link sends experts
during attention, which makes it shorter again.

A rule of thumb: weights of b bytes are sent in b / L seconds and computed for S tokens in 2 S / P seconds, so they
cross at S = b P / 2 L. It needs the CPU to compute and not to read, and the GPU to be hidden behind the link.

One should see 11 to 21 tokens for one expert on most hosts and 123 to 132 on the one whose CPU multiplies bfloat16,
3 to 21 % above the rule of thumb; a dense model's prompt at the same length, and prompts of models with experts
3.5 to 15 times as long.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.record import RESULTS, record
from hwmodels.catalog import hardware
from hwmodels.profile import HardwareProfile
from hwmodels.work import DTYPE_BYTES, copy, ffn
from sim.chart import LIGHT, MARKERS, SERIES, Chart, chart, styled
from sim.model import ModelSpec
from sim.plan import LayerPartition
from sim.policies.problem import Problem
from sim.shapes import shape
from sim.simulate import forecast
from sim.workload import Workload

MACHINES = ("rtx4090-tr5955wx", "rtx3090-server32", "rtx5090-epyc-rome", "rtx4090-ryzen7950x", "rtx3060-ryzen5900x")
MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "llama-2-13b")
MOST_TOKENS = 16384


def first(holds: Callable[[int], bool], most: int = MOST_TOKENS) -> int | None:
    """The smallest number from 1 to `most` for which it holds, None if for none; once it holds, it holds on."""
    if not holds(most):
        return None
    low, high = 0, most  # holds(high), not holds(low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def of_one_expert(spec: ModelSpec, profile: HardwareProfile) -> int | None:
    """Tokens from which one expert or MLP of the last layer is computed sooner by way of the link."""
    columns = spec.layers[-1].ffn.columns
    send_s = profile.time_s("H2D", copy(columns * spec.column_bytes(spec.n_layers - 1), spec.dtype)).seconds

    def pays(n: int) -> bool:
        work = ffn(n, spec.d_model, columns, spec.dtype)
        return send_s + profile.time_s("GPU", work).seconds <= profile.time_s("CPU", work).seconds

    return first(pays)


def thumb(spec: ModelSpec, profile: HardwareProfile) -> float:
    """b P / 2 L."""
    cpu, link = profile.peak("CPU"), profile.peak("H2D")
    flops, n_bytes = cpu.flops_per_s[spec.dtype] * cpu.efficiency, link.bytes_per_s * link.efficiency
    return DTYPE_BYTES[spec.dtype] * flops / (2 * n_bytes)


def of_a_prompt(spec: ModelSpec, profile: HardwareProfile) -> int | None:
    """Length of prompt from which sending everything beats computing every host column on the CPU."""
    layers = tuple(LayerPartition("GPU", (0,) * la.ffn.n_experts) for la in spec.layers)

    def pays(n: int) -> bool:
        problem = Problem(spec, profile, profile.vram_bytes, Workload(n, 1))
        sent = problem.tier("prompt", problem.prompt_tokens, overlap=True, ahead=True, n_slots=2)
        kept = problem.tier("prompt", problem.prompt_tokens, overlap=True)
        times = [
            forecast(spec, problem.plan("all", layers, [tier], pinned=True), profile, problem.workload).ttft_s
            for tier in (sent, kept)
        ]
        return times[0] <= times[1]

    return first(pays, 4096)


def cases(smoke: bool) -> list[dict[str, Any]]:
    """A row per machine and model."""
    rows = []
    for machine in MACHINES[:1] if smoke else MACHINES:
        profile = hardware(machine)
        for model in ("olmoe-1b-7b",) if smoke else MODELS:
            spec = shape(model)
            widest = spec.layers[-1].ffn
            rows.append(
                {
                    "hardware": machine,
                    "model": model,
                    "experts": widest.n_experts,
                    "experts_per_token": widest.top_k,
                    "one_expert_tokens": of_one_expert(spec, profile),
                    "rule_of_thumb_tokens": round(thumb(spec, profile), 1),
                    "prompt_tokens": of_a_prompt(spec, profile),
                }
            )
    return rows


@styled
def draw(rows: Sequence[dict[str, Any]]) -> Chart:
    """A line per machine, a marker per model: from one expert's crossover to a prompt's."""
    figure, axes = chart(5.8, 0.9 + 0.2 * len(rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    for y, row in enumerate(rows):
        ends = [n for n in (row["one_expert_tokens"], row["prompt_tokens"]) if n]
        i = models.index(row["model"])
        axes.plot(ends, [y] * len(ends), color=LIGHT, linewidth=1, zorder=0)
        for n, fill in ((row["one_expert_tokens"], SERIES[i]), (row["prompt_tokens"], "white")):
            if n:
                axes.plot(n, y, MARKERS[i], color=SERIES[i], markerfacecolor=fill, markersize=5)
    for i, model in enumerate(models):
        axes.plot([], [], MARKERS[i], color=SERIES[i], label=model)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [row["hardware"] if row["model"] == models[0] else "" for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel("tokens from which sending wins; full: of one expert, hollow: of a prompt")
    axes.set_title("Crossover of CPU and link, simulated", loc="left")
    figure.legend(loc="outside lower center", ncols=len(models))
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one machine and a small model, in seconds")
    parser.add_argument("--out", type=Path, help="folder to write to (default results/crossover, none if --smoke)")
    flags = parser.parse_args(argv)
    out = flags.out or (None if flags.smoke else RESULTS / "crossover")
    rows = cases(flags.smoke)
    print(pd.DataFrame(rows).to_string(index=False))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        draw(rows).savefig(out / "figure.png")
    ratios = sorted(r["one_expert_tokens"] / r["rule_of_thumb_tokens"] for r in rows if r["one_expert_tokens"])
    names = dict.fromkeys(r["hardware"] for r in rows)
    settings = {"command": "python -m experiments.crossover", "profiles": {n: hardware(n).id for n in names}}
    prompts = [r["prompt_tokens"] for r in rows if r["prompt_tokens"]]
    summary = {
        "over_rule_of_thumb": [round(ratios[0], 2), round(ratios[-1], 2)] if ratios else [],
        "prompt_tokens": [min(prompts), max(prompts)] if prompts else [],
    }
    record(out, settings, rows, summary)


if __name__ == "__main__":
    main()
