"""How often does a GPU cache find its expert, how does that depend on routing, and what does it bring?

    python -m experiments.cache_hits            4 minutes on 2 cores; writes experiments/results/cache_hits/
    python -m experiments.cache_hits --smoke    5 s, a small model; writes nowhere unless --out is given

Tokens draw their experts by Zipf popularity of several exponents, each on its own. A cache with room for a share of
every layer's experts fetches every miss: by least recent use (LRU), by running score (HybriMoE's rule), and, for
comparison, with the most popular experts that never change (static) and with knowledge of the future (Belady's
rule). Then the policies that rest on a cache, and ktransformers with its static placement, are simulated on an RTX
4090 with as much memory for experts. Hit rates that others measured with LRU stand beside: 30.2 and 80.6 % for
Mixtral with a quarter and three quarters cached, 47.7 % for DeepSeek-V2-Lite and 45.0 % for Qwen2-57B with a quarter.

One should see that without skew every rule hits as often as its share says, that with skew the static choice is
never behind LRU, since independent tokens have no memory, and which skew explains the measured rates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from experiments.record import RESULTS, record
from hwmodels.catalog import hardware
from hwmodels.errors import PlanError
from sim.caching import CacheWalk
from sim.chart import GREY, MARKERS, SERIES, Chart, chart, styled
from sim.memory import memory
from sim.model import ModelSpec
from sim.placement import popularity_ranks
from sim.plan import CacheRule, ExpertCache
from sim.planner import plan as make_plan
from sim.policies.caches import on_host, popular
from sim.policies.problem import Problem
from sim.shapes import shape
from sim.simulate import routing_of
from sim.workload import Workload

MACHINE = "rtx4090-tr5955wx"
MODELS = ("mixtral-8x7b", "qwen2-57b-a14b", "deepseek-v2-lite")
SKEWS, SHARES = (0.0, 0.5, 1.0, 1.5), (0.25, 0.5, 0.75)
PUBLISHED = {
    ("mixtral-8x7b", 0.25): 0.302,
    ("mixtral-8x7b", 0.75): 0.806,
    ("deepseek-v2-lite", 0.25): 0.477,
    ("qwen2-57b-a14b", 0.25): 0.450,
}
POLICIES = ("ktransformers", "freetoken", "hybrimoe", "mixtral-offloading")
RULES = {
    "clairvoyant": "knows the future",
    "static": "most popular, static",
    "score": "running score",
    "lru": "least recently used",
}
HOST_BYTES = 256 << 30


def rows_of(model: str, skew: float, share: float, n_gen: int) -> dict[str, Any]:
    """Hit rates by rule, and decode speeds by policy."""
    spec, workload = shape(model), Workload(64, n_gen, skew=skew)
    profile = hardware(MACHINE).with_(host_bytes=HOST_BYTES)
    asked = Problem(spec, profile, 1 << 50, workload)
    n_slots = round(share * max(la.ffn.n_experts for la in spec.layers))
    rules: tuple[CacheRule, ...] = ("lru", "score")
    rates = {rule: hit_rate(asked, n_slots, rule) for rule in rules}
    return {
        "model": model,
        "skew": skew,
        "cached_share": share,
        "published_lru": PUBLISHED.get((model, share), ""),
        **{rule: round(rate, 3) for rule, rate in rates.items()},
        "static": round(static_rate(asked, n_slots), 3),
        "clairvoyant": round(clairvoyant_rate(asked, n_slots), 3),
        **{f"{name}_tok_s": speed(asked, share, name) for name in POLICIES},
    }


def hit_rate(asked: Problem, n_slots: int, rule: CacheRule) -> float:
    """Of a cache of n_slots experts in every layer that fetches every miss."""
    tiers = asked.both(replace(asked.tier("", 1, overlap=True), fetch_share=1.0))
    bare = asked.plan("by hand", on_host(asked.spec), tiers, pinned=True)
    made = replace(bare, cache=ExpertCache("layer", rule, n_slots, popular(asked, "layer", n_slots)))
    decode = asked.workload.steps()[1:]
    walk = CacheWalk(asked.spec, made, decode, routing_of(asked.spec, asked.workload))
    state = walk.before(decode[-1])
    assert state is not None, "the plan has a cache"
    return state.hit_rate


def used(asked: Problem, layer: int) -> list[list[int]]:
    """Experts that each decode step uses in a layer."""
    where = routing_of(asked.spec, asked.workload)
    return [[e for e, n in enumerate(where(step, layer)) if n] for step in asked.workload.steps()[1:]]


def static_rate(asked: Problem, n_slots: int) -> float:
    """Of the n_slots most popular experts of every layer, which never change."""
    hits = uses = 0
    for layer in moe_layers(asked.spec):
        ranks = popularity_ranks(asked.spec, asked.workload, layer)
        for step in used(asked, layer):
            hits += sum(int(ranks[e]) < n_slots for e in step)
            uses += len(step)
    return hits / uses


def clairvoyant_rate(asked: Problem, n_slots: int) -> float:
    """Of a cache that lets go what is used again last (Belady), fetching every miss."""
    hits = uses = 0
    for layer in moe_layers(asked.spec):
        steps = used(asked, layer)
        after: list[dict[int, int]] = [{} for _ in steps]  # when each expert is used next, after a step
        known: dict[int, int] = {}
        for i in range(len(steps) - 1, -1, -1):
            after[i] = dict(known)
            known |= dict.fromkeys(steps[i], i)
        held = set(sorted(known, key=lambda e: known[e])[:n_slots])
        for i, step in enumerate(steps):
            hits += sum(e in held for e in step)
            uses += len(step)
            held |= set(step)
            kept = sorted(held, key=lambda e: after[i].get(e, len(steps)))
            held = set(kept[:n_slots])
    return hits / uses


def moe_layers(spec: ModelSpec) -> list[int]:
    """Layers that have experts."""
    return [i for i, la in enumerate(spec.layers) if la.ffn.is_moe]


def speed(asked: Problem, share: float, policy: str) -> float | str:
    """Decode tokens per second with device memory for that share of the experts; empty where no plan fits."""
    spec, workload = asked.spec, asked.workload
    tiers = asked.both(asked.tier("", 1, overlap=True))
    fixed = memory(spec, asked.plan("", on_host(spec), tiers, pinned=True)).vram_bytes
    experts = sum(spec.ffn_bytes(i) for i in moe_layers(spec))
    try:
        made = make_plan(spec, asked.profile, fixed + round(share * experts), workload, policy)
    except PlanError:
        return ""
    assert made.prediction is not None, "the planner predicts"
    return round(made.prediction.decode_tok_s, 3)


@styled
def figure(table: pd.DataFrame) -> Chart:
    """Hit rates over skew, a panel per model, with a quarter of the experts cached."""
    quarter = table[table["cached_share"] == table["cached_share"].min()]
    models = list(dict.fromkeys(quarter["model"]))
    drawn, _ = chart(2.4 * len(models) + 1.8, 2.6)
    drawn.clear()
    for number, model in enumerate(models, start=1):
        axes = drawn.add_subplot(1, len(models), number)
        own = quarter[quarter["model"] == model]
        for (name, label), color, marker in zip(RULES.items(), SERIES, MARKERS, strict=False):
            axes.plot(own["skew"], 100 * own[name], color=color, marker=marker, markersize=4, label=label)
        published = own["published_lru"].iloc[0]
        if published != "":
            axes.axhline(100 * published, color=GREY, linestyle="--", label="least recently used, published")
        axes.set(title=model, xlabel="Zipf exponent of popularity", ylim=(0, 100))
        axes.grid(axis="y")
        if number == 1:
            axes.set_ylabel("hits, % of uses")
        if number == len(models):
            drawn.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a small model, two skews, in seconds")
    parser.add_argument("--out", type=Path, help="folder to write to (default results/cache_hits, none if --smoke)")
    flags = parser.parse_args(argv)
    out = flags.out or (None if flags.smoke else RESULTS / "cache_hits")
    models, skews, shares = (("olmoe-1b-7b",), (0.0, 1.0), (0.25,)) if flags.smoke else (MODELS, SKEWS, SHARES)
    n_gen = 4 if flags.smoke else 128
    cases = [(model, skew, share) for model in models for share in shares for skew in skews]
    rows = [rows_of(*case, n_gen) for case in tqdm(cases, desc="cache hits", leave=False)]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format=lambda v: f"{v:.3g}"))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        figure(table).savefig(out / "figure.png")
    behind = [row["clairvoyant"] - row["lru"] for row in rows]
    summary = {
        "lru_behind_clairvoyant_most": max(behind),
        "static_ahead_of_lru": sum(row["static"] > row["lru"] for row in rows),
    }
    record(out, {"profile": MACHINE, "host_bytes": HOST_BYTES, "n_gen": n_gen, "seed": 0}, rows, summary)


if __name__ == "__main__":
    main()
