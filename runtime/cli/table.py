"""Rows to text: an aligned Markdown table for people; CSV, JSON and JSON lines with all keys for programs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, object]


@dataclass(frozen=True)
class Column:
    """A column for people: its heading, and the text of a row's cell."""

    heading: str
    cell: Callable[[Row], str]
    right: bool = False


def key(name: str, heading: str = "") -> Column:
    """A column that shows one key as it is."""
    return Column(heading or name, lambda row: "" if row.get(name) is None else str(row[name]))


def quantity(name: str, heading: str, shown: Callable[[float], str]) -> Column:
    """A right-aligned column of one number; empty where the row has none."""

    def cell(row: Row) -> str:
        value = row.get(name)
        return shown(float(value)) if isinstance(value, (int, float)) and math.isfinite(value) else ""

    return Column(heading, cell, right=True)


def render(rows: Sequence[Row], columns: Sequence[Column], form: str) -> str:
    """Text of rows in one of the formats md, csv, json, jsonl; ends with a line break.

    md shows `columns`; the others hold every key of every row. NaN and infinity become null.
    """
    if form == "md":
        return markdown(rows, columns)
    plain = [{k: _plain(v) for k, v in row.items()} for row in rows]
    if form == "json":
        return json.dumps(plain, indent=1) + "\n"
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in plain)
    return _csv(plain)


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """An aligned Markdown table; columns in which no row has anything are left out."""
    columns = [c for c in columns if not rows or any(c.cell(row) for row in rows)]
    lines = [[c.heading for c in columns], *([_one_line(c.cell(row)) for c in columns] for row in rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    rule = [("-" * (w - 1) + ":") if c.right else "-" * w for c, w in zip(columns, widths, strict=True)]
    padded = [[_pad(t, c, w) for t, c, w in zip(line, columns, widths, strict=True)] for line in lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (padded[0], rule, *padded[1:]))


def _pad(text: str, column: Column, width: int) -> str:
    return text.rjust(width) if column.right else text.ljust(width)


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _csv(rows: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in row.items()})
    return text.getvalue()


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
