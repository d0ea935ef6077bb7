"""Which policy is fastest on which machine, and what does a search gain over the best of them?

    python -m experiments.policy_sweep            2 minutes on 2 cores; writes experiments/results/policy_sweep/
    python -m experiments.policy_sweep --smoke    5 s, one small cell; writes nowhere unless --out is given

Every policy on three models that do not fit into the device, three machines whose CPU and link were measured
beside each other by others, two budgets, 512 prompt and 128 generated tokens, in simulation. A cell is all of that
but the policy. Times are of a whole generation; baselines are all policies but `scheinfer` and `auto`.

One should see freetoken as the best baseline in all cells of models with experts (12 of 18) and llama-cpp in the
others, `scheinfer` 1.01 to 1.30 times and `auto` 1.00 to 1.32 times as fast, at 61 to 83 % of the bound, and three
cells without a plan of `scheinfer`, because attention and KV cache alone pass the budget.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pandas as pd

from experiments.record import RESULTS, record
from hwmodels.catalog import cache_folder, hardware
from sim.chart import LIGHT, MARKERS, SERIES, Chart, chart, styled
from sim.shapes import shape
from sim.sweep import Point, Swept, grid, sweep, workloads

MODELS = ("mixtral-8x7b", "phi-3.5-moe", "llama-2-13b")
MACHINES = ("rtx4090-tr5955wx", "rtx3090-server32", "rtx5090-epyc-rome")
BUDGETS_GIB = (8, 16)
OURS = ("scheinfer", "auto")
CELL = ["model", "hardware", "vram_budget_bytes", "n_prompt"]
COLUMNS = [*CELL, "policy", "prefill_tok_s", "decode_tok_s", "total_s", "bound_s", "vram_bytes", "refused"]


def points(smoke: bool) -> tuple[Point, ...]:
    """The grid; for a smoke run a single cell and a few policies."""
    if smoke:
        lengths = workloads([16], [4])
        return grid(
            [shape("olmoe-1b-7b")], [hardware(MACHINES[0])], ["stream", "fiddler", "scheinfer"], [4 << 30], lengths
        )
    budgets = [gib << 30 for gib in BUDGETS_GIB]
    machines = [hardware(name) for name in MACHINES]
    return grid([shape(name) for name in MODELS], machines, ["all"], budgets, workloads([512], [128]))


def times(swept: Swept) -> pd.DataFrame:
    """Rows with seconds of a whole generation, and of the bound of the machine."""
    rows = pd.DataFrame(list(swept.rows))
    prompt, decoded = rows["n_prompt"] * rows["batch"], (rows["n_gen"] - 1) * rows["batch"]
    rows["total_s"] = rows["ttft_s"] + (rows["n_gen"] - 1) * rows["tpot_s"]
    rows["bound_s"] = prompt / rows["bound_prefill_tok_s"] + decoded / rows["bound_decode_tok_s"]
    return rows[COLUMNS]


def cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Per cell: the fastest baseline, the gains over it, and how far the fastest of all is from the bound."""
    table = rows.pivot(index=CELL, columns="policy", values="total_s")
    table = table.reindex(columns=list(dict.fromkeys([*rows["policy"], *OURS])))
    baselines = table.drop(columns=list(OURS)).dropna(how="all")
    best_s = baselines.min(axis=1)
    table = table.loc[baselines.index]
    return pd.DataFrame(
        {
            "best_baseline": baselines.idxmin(axis=1),
            "best_baseline_s": best_s,
            "gain_scheinfer": best_s / table["scheinfer"],
            "gain_auto": best_s / table["auto"],
            "share_of_bound": rows.groupby(CELL)["bound_s"].max().loc[table.index] / table.min(axis=1),
        }
    )


@styled
def draw(rows: pd.DataFrame) -> Chart:
    """A line per cell: the time of every policy as a multiple of the fastest one's."""
    shown = rows[rows["n_prompt"] == rows["n_prompt"].max()].dropna(subset=["total_s"])
    groups = list(shown.groupby(CELL, sort=False))
    figure, axes = chart(6.4, 0.9 + 0.2 * len(groups))
    policies = list(dict.fromkeys(shown["policy"]))
    for y, (_, cell) in enumerate(groups):
        relative = cell["total_s"] / cell["total_s"].min()
        axes.plot([1, relative.max()], [y, y], color=LIGHT, linewidth=1, zorder=0)
        for policy, x in zip(cell["policy"], relative, strict=True):
            i = policies.index(policy)
            axes.plot(x, y, MARKERS[i % len(MARKERS)], color=SERIES[i % len(SERIES)], markersize=5)
    for i, policy in enumerate(policies):
        axes.plot([], [], MARKERS[i % len(MARKERS)], color=SERIES[i % len(SERIES)], label=policy)
    axes.set_xscale("log")
    axes.set_yticks(range(len(groups)), [f"{m}, {h}, {b >> 30} GiB" for (m, h, b, _), _ in groups], fontsize=6.5)
    axes.invert_yaxis()
    axes.set_xlabel("time of a generation as a multiple of the fastest policy's, simulated")
    axes.set_title(f"{shown['n_prompt'].max()} prompt tokens, whole generation", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one small cell, in seconds")
    parser.add_argument("--workers", type=int, default=2, help="processes that simulate (default 2)")
    parser.add_argument("--out", type=Path, help="folder to write to (default results/policy_sweep, none if --smoke)")
    flags = parser.parse_args(argv)
    out = flags.out or (None if flags.smoke else RESULTS / "policy_sweep")
    kept = None if flags.smoke else cache_folder() / "experiments" / "policy_sweep"  # an interrupted run goes on
    made = points(flags.smoke)
    rows = times(sweep(made, kept, workers=1 if flags.smoke else flags.workers, progress=True))
    table = cells(rows)
    print(table.to_string(float_format=lambda v: f"{v:.3g}"))
    summary = {
        "n_points": len(rows),
        "n_refused": int(rows["refused"].notna().sum()),
        "n_cells": len(table),
        "best_baseline": dict(Counter(table["best_baseline"]).most_common()),
        "gain": {name: _spread(table[f"gain_{name}"]) for name in OURS},
        "share_of_bound": _spread(table["share_of_bound"]),
    }
    settings = {
        "models": {p.spec.name: p.spec.id for p in made},
        "profiles": {p.profile.name: p.profile.id for p in made},
        "seed": 0,
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        draw(rows).savefig(out / "figure.png")
    record(out, settings, [dict(zip(COLUMNS, row, strict=True)) for row in rows.itertuples(index=False)], summary)


def _spread(values: pd.Series[float]) -> list[float]:
    """Least, median and greatest; nothing of an empty column."""
    present = sorted(values.dropna())
    return [round(float(v), 4) for v in (present[0], median(present), present[-1])] if present else []


if __name__ == "__main__":
    main()
