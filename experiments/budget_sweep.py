"""How fast does Mixtral-8x7B get with every further GiB of device memory, and who makes most of it?

    python -m experiments.budget_sweep            3 minutes on 2 cores; writes experiments/results/budget_sweep/
    python -m experiments.budget_sweep --smoke    5 s, a small model, two budgets; writes nowhere unless --out is given

Every policy on an RTX 4090 with 124 GiB of host memory, whose CPU and link were measured beside each other by
others, with 3 to 22 GiB of device memory; 512 prompt and 128 generated tokens, in simulation. A plan may
leave a part of its budget unused: the figures show what it uses.

One should see decode rise from 3.2 to 4.2 tokens per second, by about 0.05 with every GiB, and `scheinfer` or `auto`
first at every budget, at about four fifths of the bound.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.record import RESULTS, record
from hwmodels.catalog import cache_folder, hardware
from sim.plot import pareto
from sim.rows import Row
from sim.shapes import shape
from sim.sweep import Point, grid, sweep, workloads

MODEL, MACHINE = "mixtral-8x7b", "rtx4090-tr5955wx"
GIB = 2**30
COLUMNS = ("vram_budget_bytes", "policy", "prefill_tok_s", "decode_tok_s", "bound_prefill_tok_s", "bound_decode_tok_s")
FIGURES = {"decode_tok_s": "figure.png", "prefill_tok_s": "figure_prefill.png"}


def points(smoke: bool) -> tuple[Point, ...]:
    """The grid; for a smoke run a small model, two budgets and two policies."""
    if smoke:
        budgets = [3 * GIB, 5 * GIB]
        return grid(
            [shape("olmoe-1b-7b")], [hardware(MACHINE)], ["fiddler", "scheinfer"], budgets, workloads([16], [4])
        )
    budgets = [gib * GIB for gib in range(3, 23)]
    return grid([shape(MODEL)], [hardware(MACHINE)], ["all"], budgets, workloads([512], [128]))


def fastest(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per budget: the fastest decode of all policies, who has it, and its share of the machine's bound."""
    table = pd.DataFrame([row for row in rows if row["refused"] is None])
    best = table.loc[table.groupby("vram_budget_bytes")["decode_tok_s"].idxmax()]
    return [
        {
            "budget_gib": row["vram_budget_bytes"] / GIB,
            "policy": row["policy"],
            "decode_tok_s": round(row["decode_tok_s"], 3),
            "share_of_bound": round(row["decode_tok_s"] / row["bound_decode_tok_s"], 3),
        }
        for row in best.to_dict("records")
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a small model and two budgets, in seconds")
    parser.add_argument("--workers", type=int, default=2, help="processes that simulate (default 2)")
    parser.add_argument("--out", type=Path, help="folder to write to (default results/budget_sweep, none if --smoke)")
    flags = parser.parse_args(argv)
    out = flags.out or (None if flags.smoke else RESULTS / "budget_sweep")
    kept = None if flags.smoke else cache_folder() / "experiments" / "budget_sweep"  # an interrupted run goes on
    made = points(flags.smoke)
    rows = sweep(made, kept, workers=1 if flags.smoke else flags.workers, progress=True).rows
    best = fastest(rows)
    decode = pd.DataFrame(list(rows)).pivot(index="vram_budget_bytes", columns="policy", values="decode_tok_s")
    print(decode.rename(index=lambda n_bytes: f"{n_bytes / GIB:g} GiB").to_string(float_format=lambda v: f"{v:.3g}"))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        for metric, name in FIGURES.items():
            pareto([row for row in rows if row["refused"] is None], metric, title(made)).savefig(out / name)
    settings = {"model": made[0].spec.name, "model_id": made[0].spec.id, "profile": MACHINE, "seed": 0}
    table = [{key: row[key] for key in (*COLUMNS, "vram_bytes", "h2d_bytes", "refused")} for row in rows]
    record(out, {**settings, "profile_id": made[0].profile.id}, table, {"fastest": best})


def title(made: Sequence[Point]) -> str:
    """What the figures are of."""
    workload = made[0].workload
    return f"{made[0].spec.name} on {made[0].profile.name}, pp{workload.n_prompt} tg{workload.n_gen}, simulated"


if __name__ == "__main__":
    main()
