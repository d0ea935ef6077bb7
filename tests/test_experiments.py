"""Every experiment answers its question in seconds with --smoke, and ends with one JSON line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments"
SUPPORT = {"__init__", "peer_gguf", "peer_models", "record"}
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in SUPPORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_smokes_and_ends_with_a_json_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module(f"experiments.{name}").main(["--smoke"])
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert table, "a table for people comes first"
    assert isinstance(json.loads(last), dict)


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_says_its_question_and_its_command(name: str) -> None:
    text = importlib.import_module(f"experiments.{name}").__doc__ or ""
    assert text.strip().splitlines()[0].rstrip().endswith("?")
    assert f"python -m experiments.{name}" in text
    assert "--smoke" in text


@pytest.mark.parametrize("name", sorted(p.name for p in (FOLDER / "results").iterdir() if p.is_dir()))
def test_a_committed_result_has_its_settings_and_provenance(name: str) -> None:
    config = json.loads((FOLDER / "results" / name / "config.json").read_text(encoding="utf-8"))
    assert {"commit", "versions", "host"} <= set(config["provenance"])
