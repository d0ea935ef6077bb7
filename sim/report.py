"""The report of a validation: a folder with a page for people, pictures, and the same numbers for programs.

    index.html     stands alone: what ran, on what, the ranking simulated against measured, Gantt charts, errors
    *.png          the page's pictures
    rows.json      every row with all its keys; rows.parquet the same as a table

A row is a mapping with the result keys; measured rows carry `predicted_<key>` beside `<key>`, simulated
rows carry only `<key>`. Rows are ranked by `decode_tok_s`.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hwmodels.profile import HardwareProfile
from hwmodels.schema import write_bytes, write_json, write_text
from hwmodels.units import format_bytes, format_number, format_seconds
from sim import page
from sim.candidates import DRAWN
from sim.compare import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = "scheinfer.rows"
VERSION = 1
OWN_POLICIES = ("auto", "scheinfer", DRAWN)
"""Policies of this project, and plans drawn from its search's space; all others are baselines."""

Row = Mapping[str, Any]
EMULATED = (
    "The device is emulated: a second set of threads on the same CPU computes in place of a GPU, from its own "
    "capped memory, and copies to it are paced like a link. Tensors, copies and waiting are real and so are the "
    "times; they show that plans, simulation and execution agree, not how fast a GPU would be."
)


@dataclass(frozen=True)
class ModelResult:
    """What was found for one model.

    model        its name
    rows         one mapping per policy or plan, with the result keys
    shape        one line on the model, such as "4 layers, 8 experts, 210 MB of weights"
    comparison   best plan, simulated against measured; None if nothing ran
    isolated     the same plan simulated without contention, against the same measurement; None if not done
    choice       which plan is kept, and what trusting the prediction would have cost, in words
    """

    model: str
    rows: Sequence[Row]
    shape: str = ""
    comparison: Comparison | None = None
    isolated: Comparison | None = None
    choice: str = ""


@dataclass(frozen=True)
class Report:
    """Everything a report says.

    created      ISO time
    command      what to type to repeat it
    fingerprint  the machine it ran on, a text by name
    versions     of this program and the libraries that matter, by name
    notes        findings to be read with the numbers, a sentence each
    files        other files in the folder, (name, what it holds)
    """

    results: Sequence[ModelResult]
    profile: HardwareProfile
    created: str
    command: str
    fingerprint: Mapping[str, str]
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    files: Sequence[tuple[str, str]] = ()
    title: str = "Simulated and measured"


def write_report(folder: str | Path, report: Report) -> Path:
    """Write the report into a folder, each file whole or not at all; the path of its page.

    Makes the folder where there is none; leaves other files in it alone. FormatError if it cannot be written.
    """
    folder = Path(folder)
    pictures = [_draw(result, name) for result, name in zip(report.results, _slugs(report.results), strict=True)]
    for drawn in pictures:
        for picture in drawn:
            write_bytes(folder / picture.name, picture.png)
    rows = [_plain(row) for result in report.results for row in result.rows]
    write_json(folder / "rows.json", {"schema": SCHEMA, "version": VERSION, "rows": rows})
    write_bytes(folder / "rows.parquet", _parquet(rows))
    write_text(folder / "index.html", page.document(report.title, _page(report, pictures)))
    return folder / "index.html"


# -- the page -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Picture:
    name: str
    png: bytes
    width_px: int
    alt: str
    caption: str


def _page(report: Report, pictures: list[list[_Picture]]) -> list[str]:
    profile = report.profile
    emulated = profile.device == "emulated"
    badge = page.text("span", f"{profile.device} device", "badge warn" if emulated else "badge")
    parts = [
        page.text("h1", report.title),
        f"<p>{badge} "
        + page.text("span", f"profile {profile.name} ({profile.id}) · {report.created}", "soft")
        + "</p>",
        "<ul>" + "".join(page.text("li", _headline(result)) for result in report.results) + "</ul>",
    ]
    if emulated:
        parts.append(page.text("p", EMULATED, "note"))
    parts += [page.text("p", note, "note") for note in report.notes]
    for result, drawn in zip(report.results, pictures, strict=True):
        parts += _section(result, drawn)
    parts += [page.text("h2", "Machine"), page.table((), _machine(report), css="words")]
    parts += [page.text("h2", "How to repeat"), page.text("pre", report.command)]
    if report.versions:
        parts.append(page.text("p", ", ".join(f"{k} {v}" for k, v in report.versions.items()), "soft"))
    names = [(p.name, p.caption) for drawn in pictures for p in drawn]
    tables = [("rows.json", "every row of the tables with all its keys"), ("rows.parquet", "the same as one table")]
    return [*parts, page.text("h2", "Files"), page.links([*tables, *report.files, *names])]


def _section(result: ModelResult, pictures: list[_Picture]) -> list[str]:
    ranked = _ranked(result.rows)
    by_name = {p.name.rsplit("-", 1)[-1].removesuffix(".png"): p for p in pictures}

    def shown(kind: str) -> list[str]:
        found = by_name.get(kind)
        return [page.picture(found.png, found.width_px, found.alt, found.caption)] if found else []

    setting = "; ".join(text for text in (result.shape, _setting(ranked)) if text)
    parts = [page.text("h2", result.model), page.text("p", setting, "soft"), page.text("h3", "Ranking")]
    parts += [page.table(_HEAD, [_cells(row) for row in ranked], best=0), *shown("ranking")]
    if (agreement := _agreement(ranked)) is not None:
        parts.append(page.text("p", agreement))
    if result.choice:
        parts.append(page.text("p", result.choice))
    if result.comparison is not None:
        parts += [page.text("h3", "What every resource did"), *shown("decode"), *shown("prefill")]
        parts += [page.text("h3", "Error of the simulation"), _error_table(result), *shown("errors")]
    return parts


def _headline(result: ModelResult) -> str:
    """The result in one sentence: the fastest policy, the error of its prediction, the best baseline."""
    ranked = _ranked(result.rows)
    measured = [row for row in ranked if _is_measured(row)]
    if not measured:
        best = ranked[0] if ranked else None
        speed = (
            f"{best['policy']} is simulated fastest at {format_number(best['decode_tok_s'])} tokens/s"
            if best
            else "no row"
        )
        return f"{result.model}: {speed}; nothing was measured."
    best = measured[0]
    measured_speed, simulated_speed, error = _speeds(best, "decode_tok_s")
    text = f"{result.model}: {best['policy']} decodes fastest, {measured_speed} tokens/s measured "
    text += f"(simulated {simulated_speed}, {error})"
    others = [row for row in measured if row["policy"] not in OWN_POLICIES]
    own = [row for row in measured if row["policy"] in OWN_POLICIES]
    if own and others:
        ratio = own[0]["decode_tok_s"] / others[0]["decode_tok_s"]
        text += f"; {own[0]['policy']} runs at {ratio:.2f} times the best baseline, {others[0]['policy']}"
    return text + "."


def _agreement(ranked: Sequence[Row]) -> str | None:
    """How far one could have chosen by simulation alone; None with fewer than two measured rows."""
    measured = [row for row in ranked if _is_measured(row)]
    if len(measured) < 2:
        return None
    pairs = list(combinations(measured, 2))
    right = sum(a["predicted_decode_tok_s"] >= b["predicted_decode_tok_s"] for a, b in pairs)
    chosen = max(measured, key=lambda row: float(row["predicted_decode_tok_s"]))
    lost = 1 - chosen["decode_tok_s"] / measured[0]["decode_tok_s"]
    errors = sorted(abs(r["predicted_decode_tok_s"] / r["decode_tok_s"] - 1) for r in measured)
    cost = f"which is {lost:.1%} slower than the fastest" if lost > 0 else "the fastest indeed"
    return (
        f"The simulation put {right} of {len(pairs)} pairs of policies in the order that was measured. Its error of "
        f"the decode speed is {errors[len(errors) // 2]:.1%} at the median and {errors[-1]:.1%} at worst. Choosing by "
        f"simulation alone would have picked {chosen['policy']}, {cost}."
    )


# -- tables -------------------------------------------------------------------------------------------

_HEAD = (
    "policy",
    "decode measured, tok/s",
    "simulated",
    "error",
    "prefill measured, tok/s",
    "simulated",
    "error",
    "of hardware bound",
    "device memory",
    "sent to device",
)


def _cells(row: Row) -> tuple[str, ...]:
    bound = row.get("bound_fraction")
    sizes = (row.get("vram_bytes"), row.get("h2d_bytes"))
    return (
        str(row["policy"]),
        *_speeds(row, "decode_tok_s"),
        *_speeds(row, "prefill_tok_s"),
        "" if _absent(bound) else f"{bound:.0%}",
        *("" if size is None or _absent(size) else format_bytes(size) for size in sizes),
    )


def _speeds(row: Row, key: str) -> tuple[str, str, str]:
    """Measured, simulated and error of a key as texts; a dash for what was not measured."""
    value, predicted = row.get(key), row.get(f"predicted_{key}")
    if value is None or _absent(value):
        return "–", "–", ""
    if predicted is None or _absent(predicted):
        return "–", format_number(value), ""
    stddev = row.get("stddev", {}).get(key)
    spread = "" if stddev is None or _absent(stddev) else f" ± {stddev:.2g}"
    error = f"{predicted / value - 1:+.1%}" if value else ""
    return f"{format_number(value)}{spread}", format_number(predicted), error


def _error_table(result: ModelResult) -> str:
    head = ["", "simulated", "measured", "error"]
    names = {"ttft_s": "time to first token", "tpot_s": "time per output token"}
    assert result.comparison is not None
    table = result.comparison.end_to_end
    isolated = result.isolated.end_to_end["error"] if result.isolated is not None else None
    rows = []
    for key, name in names.items():
        if key in table.index:
            simulated, measured, error = (float(table[column][key]) for column in ("simulated", "measured", "error"))
            row = [name, format_seconds(simulated), format_seconds(measured), f"{error:+.1%}"]
            rows.append(row + ([f"{float(isolated[key]):+.1%}"] if isolated is not None else []))
    tasks = result.comparison.summary()["tasks"]
    spread = f"{tasks['median']:.1%} at the median, {tasks['p90']:.1%} at the 90th percentile"
    head += ["error without contention"] if isolated is not None else []
    said = f"Single tasks ({tasks['rows']:.0f}): absolute error {spread}.{_evidence(result)}"
    return page.table(head, rows) + page.text("p", said, "soft")


def _evidence(result: ModelResult) -> str:
    """What the costs of the best plan rest on."""
    counts: Mapping[str, int] = next((row["evidence"] for row in _ranked(result.rows) if row.get("evidence")), {})
    known = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
    return f" Costs behind the best plan's simulation: {known}." if known else ""


def _setting(rows: Sequence[Row]) -> str:
    """The workload and budget that the rows share."""
    names = {"n_prompt": "prompt", "n_gen": "generated", "n_depth": "in the cache before", "batch": "batch"}
    found = [f"{name} {rows[0][key]}" for key, name in names.items() if rows and not _absent(rows[0].get(key))]
    if rows and not _absent(rows[0].get("vram_budget_bytes")):
        found.append(f"device memory budget {format_bytes(rows[0]['vram_budget_bytes'])}")
    return ", ".join([*found, str(rows[0]["dtype"])] if rows and rows[0].get("dtype") else found)


def _machine(report: Report) -> list[tuple[str, str]]:
    profile = report.profile
    described = [
        ("device", profile.device),
        ("device memory in the profile", format_bytes(profile.vram_bytes)),
        ("sources of the profile", ", ".join(sorted({c.source for c in profile.curves}) or ["peaks only"])),
    ]
    return [*((k.replace("_", " "), v) for k, v in report.fingerprint.items()), *described]


# -- rows ---------------------------------------------------------------------------------------------


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _is_measured(row: Row) -> bool:
    return not _absent(row.get("decode_tok_s")) and not _absent(row.get("predicted_decode_tok_s"))


def _ranked(rows: Sequence[Row]) -> list[Row]:
    """Measured rows first, fastest first."""
    usable = [row for row in rows if not _absent(row.get("decode_tok_s"))]
    return sorted(usable, key=lambda row: (not _is_measured(row), -float(row["decode_tok_s"])))


def _plain(row: Row) -> dict[str, Any]:
    """A row as JSON can hold it: no NaN, no numpy scalars."""
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in row.items()}
    return {key: None if _absent(value) else value for key, value in plain.items()}


def _parquet(rows: Sequence[Row]) -> bytes:
    flat = [{k: v for key, value in row.items() for k, v in _columns(key, value)} for row in rows]
    buffer = io.BytesIO()
    pd.DataFrame(flat).to_parquet(buffer, index=False)
    return buffer.getvalue()


def _columns(key: str, value: Any) -> list[tuple[str, Any]]:
    """A nested object becomes a column per entry: ``evidence_measured``."""
    return [(f"{key}_{k}", v) for k, v in value.items()] if isinstance(value, Mapping) else [(key, value)]


# -- pictures -----------------------------------------------------------------------------------------


def _draw(result: ModelResult, name: str) -> list[_Picture]:
    from sim import plot  # matplotlib is slow to load and only needed here

    ranked = _ranked(result.rows)
    pictures: list[_Picture] = []

    def add(kind: str, figure: Figure, alt: str, caption: str) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        width_px = round(figure.get_figwidth() * 120)
        pictures.append(_Picture(f"{name}-{kind}.png", buffer.getvalue(), width_px, alt, caption))

    if ranked:
        caption = "Decode speed by policy; in brackets the error of the simulation."
        add("ranking", plot.ranking(ranked), _headline(result), caption)
    if result.comparison is not None:
        both = [result.comparison.simulated, result.comparison.measured]
        for phase in ("decode", "prefill"):
            if any(s.startswith(phase) for s in both[1].steps):
                caption = f"A few layers of a typical {phase} step of the best plan, simulated above measured."
                add(phase, plot.gantt_step(both, phase), f"Gantt chart of a {phase} step", caption)
        errors = {"with contention": result.comparison, "without contention": result.isolated}
        named = {name: comparison for name, comparison in errors.items() if comparison is not None}
        caption = "Error by phase, resource and kind of task; what takes under 1 % of the time is left out."
        add("errors", plot.error_bars(named), "Bars of relative errors; the table has the numbers", caption)
    return pictures


def _slugs(results: Sequence[ModelResult]) -> list[str]:
    """A file name for every result: its model's, numbered where two results share a model."""
    names: list[str] = []
    for result in results:
        name = re.sub(r"[^a-z0-9.]+", "-", result.model.lower()).strip("-.") or "model"
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return names
