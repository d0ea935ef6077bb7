"""Which part of a machine would make generation faster if it were replaced?

    python -m experiments.what_if            under 3 minutes on a core; writes experiments/results/what_if/
    python -m experiments.what_if --smoke    3 s: one machine, a small model; writes nowhere unless --out is given

Host memory, link and arithmetic of the CPU at half, twice and four times their rates, device memory at half, twice
and three times its size, one at a time; each changed machine gets a plan of its own (policy `scheinfer`; 512 prompt
and 128 generated tokens, in 16 bits) and is compared with the machine as it is. Machines are put together from
published figures, so a faster link or memory also changes what both get beside each other. In simulation.

One should see host memory and device memory decide decode, and the link decide prompts where the CPU has no part in
them; twice of anything rarely brings twice the speed, but for device memory that a model then just fits.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.record import RESULTS, record
from hwmodels.errors import PlanError
from hwmodels.parts import Gpu, Host, Link, gpus, hosts, links, put_together
from hwmodels.profile import HardwareProfile, Source
from sim.chart import GREY, MARKERS, SERIES, Chart, styled
from sim.model import ModelSpec
from sim.planner import plan
from sim.policies.problem import total_s
from sim.shapes import shape
from sim.workload import Workload

MACHINES = (("rtx3060", "ryzen5900x", "pcie4x16"), ("rtx4090", "ryzen7950x", "pcie4x16"))
MODELS = ("mixtral-8x7b", "qwen3-30b-a3b")
FACTORS = {"host memory": (0.5, 2, 4), "link": (0.5, 2, 4), "CPU arithmetic": (0.5, 2, 4), "device memory": (0.5, 2, 3)}
WORKLOAD = Workload(512, 128)
_ESTIMATED: Source = "estimated"
_RAM_GIB = 256.0


def changed(gpu: Gpu, host: Host, link: Link, part: str, factor: float) -> HardwareProfile:
    """The machine with one part `factor` times as fast or large, and host memory that every model fits into."""

    def times(number: tuple[float, Source]) -> tuple[float, Source]:
        return number if factor == 1 else (number[0] * factor, _ESTIMATED)

    host = replace(host, ram_GiB=(_RAM_GIB, _ESTIMATED))
    if part == "host memory":
        host = replace(host, memory_GBps=times(host.memory_GBps))
    elif part == "CPU arithmetic":
        host = replace(host, float32_flop_per_cycle=times(host.float32_flop_per_cycle))
    elif part == "link":
        link = replace(link, pinned_GBps=times(link.pinned_GBps), pageable_GBps=times(link.pageable_GBps))
    else:
        gpu = replace(gpu, vram_GiB=times(gpu.vram_GiB))
    return put_together(gpu, host, link, f"{gpu.name}-{host.name}, {part} x {factor:g}")


def speeds(spec: ModelSpec, profile: HardwareProfile, workload: Workload) -> tuple[float, float, float] | None:
    """TTFT, TPOT and seconds of the whole generation; None where no plan fits."""
    try:
        made = plan(spec, profile, profile.vram_bytes, workload, "scheinfer")
    except PlanError:
        return None
    assert made.prediction is not None, "the planner predicts"
    return made.prediction.ttft_s, made.prediction.tpot_s, total_s(made.prediction, workload)


def cases(smoke: bool) -> Iterator[dict[str, Any]]:
    """A row per machine, model, part and factor: times as fast as the machine as it is."""
    workload = Workload(16, 8) if smoke else WORKLOAD
    for gpu_name, host_name, link_name in MACHINES[:1] if smoke else MACHINES:
        parts = gpus()[gpu_name], hosts()[host_name], links()[link_name]
        for model in ("olmoe-1b-7b",) if smoke else MODELS:
            spec = shape(model)
            now = speeds(spec, changed(*parts, "link", 1), workload)
            if now is None:
                continue
            for part, factors in FACTORS.items():
                for factor in factors[:2] if smoke else factors:
                    then = speeds(spec, changed(*parts, part, factor), workload)
                    gains = [None] * 3 if then is None else [a / b for a, b in zip(now, then, strict=True)]
                    names = ("prompt_speedup", "decode_speedup", "overall_speedup")
                    where = {"hardware": f"{gpu_name}-{host_name}", "model": model, "part": part, "factor": factor}
                    yield where | dict(zip(names, gains, strict=True))


@styled
def draw(rows: pd.DataFrame) -> Chart:
    """A panel per machine and model: overall speed over the factor, a line per part."""
    groups = list(rows.groupby(["hardware", "model"], sort=False))
    figure = Chart(figsize=(2.6 * len(groups) + 0.6, 2.9), dpi=160, layout="constrained")
    for k, ((machine, model), own) in enumerate(groups):
        axes = figure.add_subplot(1, len(groups), k + 1)
        for i, (part, line) in enumerate(own.groupby("part", sort=False)):
            points = sorted([*zip(line["factor"], line["overall_speedup"], strict=True), (1, 1.0)])
            axes.plot(*zip(*points, strict=True), color=SERIES[i], marker=MARKERS[i], markersize=3.5, label=str(part))
        axes.axhline(1, color=GREY, linewidth=0.6)
        axes.set_xscale("log", base=2)
        axes.set_xticks([0.5, 1, 2, 4], ["1/2", "1", "2", "4"])
        axes.set_ylim(0.45, max(2.0, 1.05 * rows["overall_speedup"].max()))
        axes.set_xlabel("times as fast or large")
        axes.set_title(f"{model}\n{machine}", loc="left", fontsize=7)
        if k == 0:
            axes.set_ylabel("generation, times as fast")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one machine and a small model, in seconds")
    parser.add_argument("--out", type=Path, help="folder to write to (default results/what_if, none if --smoke)")
    flags = parser.parse_args(argv)
    out = flags.out or (None if flags.smoke else RESULTS / "what_if")
    rows = list(cases(flags.smoke))
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format=lambda v: f"{v:.3g}"))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        draw(table).savefig(out / "figure.png")
    doubled = table[table["factor"] == 2].groupby("part", sort=False)["overall_speedup"].median()
    settings = {"command": "python -m experiments.what_if", "workload": [WORKLOAD.n_prompt, WORKLOAD.n_gen]}
    summary = {f"median gain of twice the {part}": round(float(gain), 3) for part, gain in doubled.items()}
    record(out, settings, rows, summary)


if __name__ == "__main__":
    main()
