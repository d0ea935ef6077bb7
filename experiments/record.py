"""What every experiment leaves behind: its settings with versions and host, its rows, one JSON line."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hwmodels.machine import fingerprint
from hwmodels.schema import write_json

RESULTS = Path(__file__).parent / "results"
_VERSIONS = ("simpy", "numpy", "numba", "pandas", "torch", "transformers")


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


def provenance() -> dict[str, Any]:
    """Commit of the code, versions of what it used, and the machine."""
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _VERSIONS},
        "host": fingerprint(),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
