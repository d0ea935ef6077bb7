"""The speed experiment runs and leaves what it promises."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from experiments.simulator_speed import main


def test_the_smoke_run_times_every_engine_and_ends_with_one_json_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--smoke", "--out", str(tmp_path)])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    with (tmp_path / "rows.csv").open(encoding="utf-8") as file:
        rows = {row["engine"]: row for row in csv.DictReader(file)}
    assert {"simpy", "simpy, contention", "heap", "recurrence"} <= set(rows)
    assert all(float(row["median_us_per_task"]) > 0 for row in rows.values())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["summary"] == summary
    assert config["provenance"]["versions"]["python"]
