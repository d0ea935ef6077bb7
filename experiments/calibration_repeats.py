"""Do two calibrations of one machine predict the same speeds, and if not: is it the calibration or the machine?

    python -m experiments.calibration_repeats            8 minutes on 2 cores; writes results/calibration_repeats-MODEL/
    python -m experiments.calibration_repeats --full     30 minutes; writes results/calibration_repeats-full-MODEL/
    python -m experiments.calibration_repeats --smoke    20 s on a tiny shape; writes nowhere unless --out is given

Each shape is calibrated as --quick does, two calibrations at a time whose rounds take turns of a second: they see the
same minutes of the machine, and what they differ by is the calibration's own. Then two more, later: what those differ
by from the first is that and the machine's drift. With --full there are two in all, one after the other, each as
`scheinfer calibrate` makes it. Later ones are made in another process, as they would be (in the same one the second
was 4 % slower, twice). Every policy's plan for half of the MLP weights on the device is predicted by each of them.

One should see speeds that differ by less than 5 % between calibrations in turns. Those apart differ by more where
slow_share, the share of time in which the cores were below their pace, does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pandas as pd
from tqdm import tqdm

from experiments.overlap import SHAPES, TINY, Config
from experiments.record import RESULTS, record
from hwmodels.calibrate import residuals
from hwmodels.pace import SLOW, probe_s
from hwmodels.profile import AXES, Curve, HardwareProfile
from runtime.budget import half_budget
from runtime.calibrate import QUICK, SMOKE, Extent, calibrate, calibrating
from sim.chart import GREY, MARKERS, SERIES, Chart, chart, styled
from sim.model import from_config
from sim.planner import rank
from sim.simulate import forecast
from sim.workload import Workload

BAR = 0.05
"""Difference of two calibrations' predictions that is still called the same."""
AT_ONCE, GROUPS = 2, 2
"""Calibrations that take turns, and how often so many are made."""
STEPS = ("prefill", "decode")


@dataclass(frozen=True)
class Calibration:
    """One of a group whose rounds took turns, and the pace of the cores at its turns."""

    group: int
    number: int
    profile: HardwareProfile
    probes_s: tuple[float, ...]


def in_turns(name: str, config: Config, device: str, extent: Extent, n_turns: int, group: int) -> list[Calibration]:
    """Calibrations of a shape that take turns."""
    with ExitStack() as stack:
        folder = stack.enter_context(_folder_of(name, config))
        own = [stack.enter_context(calibrating(folder, n_turns, device, extent=extent)) for _ in range(AT_ONCE)]
        probes_s: list[list[float]] = [[] for _ in own]
        for turn in tqdm(range(n_turns), desc=f"calibrate {name}", unit="turn", leave=False):
            for i in range(AT_ONCE) if turn % 2 else reversed(range(AT_ONCE)):
                probes_s[i] += probe_s()
                own[i].turn()
        made = [calibration.profile() for calibration in own]
    return [Calibration(group, i, profile, tuple(probes_s[i])) for i, profile in enumerate(made)]


def whole(name: str, config: Config, device: str, extent: Extent | None, group: int) -> Calibration:
    """A calibration of a shape as the command makes it, full unless an extent is given."""
    before = probe_s()
    with _folder_of(name, config) as folder:
        profile = calibrate(folder, device, extent=extent)
    return Calibration(group, 0, profile, (*before, *probe_s()))


@contextmanager
def _folder_of(name: str, config: Config) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(dict(config)))
        yield folder


def rows_of(name: str, config: Config, found: Sequence[Calibration], workload: Workload) -> Iterator[dict[str, Any]]:
    """A row per policy that has a plan and calibration: its prediction of the plan that the first one makes."""
    spec = from_config(config, name)
    fastest_s = min(s for one in found for s in one.probes_s)
    first = found[0].profile
    for ranked in rank(spec, first, half_budget(spec, workload), workload):
        if ranked.plan is None:
            continue
        for one in found:
            predicted = forecast(spec, ranked.plan, one.profile, workload)
            yield {
                "model": name,
                "policy": ranked.plan.policy,
                "plan_id": ranked.plan.id,
                "group": one.group,
                "calibration": one.number,
                "device": first.device,
                "prefill_tok_s": predicted.prefill_tok_s,
                "decode_tok_s": predicted.decode_tok_s,
                "slow_share": fmean(s >= SLOW * fastest_s for s in one.probes_s),
                "others_load": one.profile.fingerprint["others_load"],
            }


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """A row per plan and pair of calibrations: how much faster one says it is, and whether they took turns."""
    rows = []
    for (model, policy), own in table.groupby(["model", "policy"], sort=False):
        for (_, one), (_, other) in combinations(own.iterrows(), 2):
            for step in STEPS:
                speeds = one[f"{step}_tok_s"], other[f"{step}_tok_s"]
                how = "in turns" if one["group"] == other["group"] else "apart"
                rows.append((model, policy, step, how, max(speeds) / min(speeds) - 1))
    return pd.DataFrame(rows, columns=["model", "policy", "step", "calibrations", "difference"])


def curves_apart(found: Sequence[Calibration]) -> pd.DataFrame:
    """How far points of each curve lie apart, by calibrations in turns and apart: median and worst point."""
    rows: list[dict[str, Any]] = []
    for one, other in combinations(found, 2):
        how = "in turns" if one.group == other.group else "apart"
        others = {_name(c): c for c in other.profile.curves}
        for curve in one.profile.curves:
            apart = _points_apart(curve, others[_name(curve)])
            rows.append({"curve": _name(curve), "calibrations": how, "median": median(apart), "worst": max(apart)})
        for pair, seconds in one.profile.handoff_s.items():
            both = [max(s, 1e-6) for s in (seconds, other.profile.handoff_s.get(pair, seconds))]
            rows.append({"curve": pair, "calibrations": how, "median": max(both) / min(both) - 1})
    table = pd.DataFrame(rows).groupby(["curve", "calibrations"]).mean()
    return pd.DataFrame(table.unstack())


def _name(curve: Curve) -> str:
    threads = f", {curve.threads} threads" if curve.resource == "CPU" and curve.op == "ffn" else ""
    return f"{curve.resource} {curve.op} {curve.dtype}{threads}"


def _points_apart(one: Curve, other: Curve) -> list[float]:
    """Of the points that both have: how many bytes a step moves may depend on what it found."""
    axes = AXES[one.op]
    seconds = [{tuple(getattr(s, axis) for axis in axes): s.median_s for s in curve.samples} for curve in (one, other)]
    pairs = [(own, seconds[1][at]) for at, own in seconds[0].items() if at in seconds[1]]
    return [max(pair) / min(pair) - 1 for pair in pairs] or [0.0]


def summary_of(table: pd.DataFrame, found: Sequence[Calibration]) -> dict[str, Any]:
    """Median and worst difference by step and kind of pair, and how well curves predict points left out of them."""
    apart = differences(table)
    summary: dict[str, Any] = {"device": found[0].profile.device}
    for how in dict.fromkeys(apart["calibrations"]):
        for step in STEPS:
            own = apart.loc[(apart["calibrations"] == how) & (apart["step"] == step), "difference"]
            key = f"{step}_{how.replace(' ', '_')}"
            summary |= {f"{key}_median": float(own.median()), f"{key}_worst": float(own.max())}
    left_out = [residuals(c for c in one.profile.curves if c.source == "measured") for one in found]
    summary["left_out_median"] = max((r.median for own in left_out for r in own), default=0.0)
    summary["left_out_worst"] = max((r.worst for own in left_out for r in own), default=0.0)
    summary["slow_share"] = float(table["slow_share"].mean())
    return summary


@styled
def figure(table: pd.DataFrame) -> Chart:
    """Differences of every plan, in turns over apart."""
    apart = differences(table)
    policies = list(dict.fromkeys(apart["policy"]))
    drawn, axes = chart(5.2, 1.0 + 0.22 * len(policies))
    axes.axvline(100 * BAR, color=GREY, linestyle="--", label=f"bar of {BAR:.0%}")
    kinds = [(step, how) for how in ("apart", "in turns") for step in STEPS]
    for (step, how), color, marker in zip(kinds, SERIES, MARKERS, strict=False):
        own = apart[(apart["step"] == step) & (apart["calibrations"] == how)]
        if own.empty:
            continue
        heights = [len(policies) - 1 - policies.index(p) + (0.15 if how == "apart" else -0.15) for p in own["policy"]]
        label = f"{step}, {how}"
        axes.plot(100 * own["difference"], heights, marker, color=color, markersize=4, linestyle="none", label=label)
    axes.set_yticks(range(len(policies)), policies[::-1])
    axes.set(xlabel="predicted speeds of two calibrations differ by, %", title=str(table["model"].iloc[0]))
    axes.set_xlim(left=0)
    axes.grid(axis="x")
    drawn.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return drawn


def run(name: str, config: Config, device: str, full: bool, smoke: bool) -> list[Calibration]:
    """All calibrations of a shape, those of each group in a process of their own."""
    found: list[Calibration] = []
    for group in range(GROUPS):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found += process.submit(_group, name, config, device, full, smoke, group).result()
    return found


def _group(name: str, config: Config, device: str, full: bool, smoke: bool, group: int) -> list[Calibration]:
    if full:
        return [whole(name, config, device, SMOKE if smoke else None, group)]
    extent, n_turns = (SMOKE, 2) if smoke else (QUICK, round(QUICK.seconds))
    return in_turns(name, config, device, extent, n_turns, group)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, in seconds")
    parser.add_argument("--full", action="store_true", help="two full calibrations, not four quick ones")
    parser.add_argument("--device", default="auto", help="auto, cuda:0 or emulated (default auto)")
    parser.add_argument("--model", choices=SHAPES, action="append", help="which shapes (default all)")
    parser.add_argument(
        "--out", type=Path, help="folder, -MODEL is added (default results/calibration_repeats, none if --smoke)"
    )
    flags = parser.parse_args(argv)
    shapes: Mapping[str, Config] = {"tiny": TINY} if flags.smoke else {n: SHAPES[n] for n in flags.model or SHAPES}
    workload = Workload(16, 4) if flags.smoke else Workload(100, 24)
    usual = RESULTS / ("calibration_repeats-full" if flags.full else "calibration_repeats")
    out = flags.out or (None if flags.smoke else usual)
    for name, config in shapes.items():
        _report(name, config, run(name, config, flags.device, flags.full, flags.smoke), workload, out)


def _report(name: str, config: Config, found: Sequence[Calibration], workload: Workload, out: Path | None) -> None:
    rows = list(rows_of(name, config, found, workload))
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    print(curves_apart(found).to_string(float_format=lambda v: f"{v:.3f}"))
    own = None if out is None else out.with_name(f"{out.name}-{name}")
    if own is not None:
        own.mkdir(parents=True, exist_ok=True)
        figure(table).savefig(own / "figure.png")
        for one in found:
            one.profile.save(own / f"{one.group}.{one.number}.hardware.json")
    at_once = len({one.number for one in found})
    settings = {"workload": [workload.n_prompt, workload.n_gen], "at_once": at_once, "groups": GROUPS}
    record(own, settings, rows, summary_of(table, found))


if __name__ == "__main__":
    main()
