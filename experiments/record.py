"""What every experiment leaves behind: its settings with versions and host, its rows, one JSON line."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hwmodels.provenance import provenance
from hwmodels.schema import write_json

RESULTS = Path(__file__).parent / "results"


def record(
    folder: Path | None, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> None:
    """Write config.json and rows.csv into a folder, if one is given, and print the summary as one JSON line.

    All rows have the columns of the first.
    """
    if folder is not None:
        write_json(folder / "config.json", {**settings, "provenance": provenance(), "summary": dict(summary)})
        with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(json.dumps(summary, allow_nan=False))
