"""validate(): predicted, run, replayed, reported; and what happens where the machine changes its speed meanwhile."""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hwmodels.profile import Curve, HardwareProfile, load_profile
from runtime import validate as module
from runtime.calibrate import SMOKE, calibrate
from runtime.validate import Job, validate
from sim.rows import Row
from tests.conftest import TinyCheckpoint

JOB = Job("emulated", n_prompt=6, n_gen=3, policies=("cpu-only", "stream"), repetitions=2, n_top=1, progress=False)
Validate = Callable[[float], list[Row]]


@pytest.fixture(scope="module")
def calibrated(tiny_checkpoint: TinyCheckpoint) -> HardwareProfile:
    return calibrate(tiny_checkpoint("mixtral"), "emulated", progress=False, extent=SMOKE)


@pytest.fixture
def validated(
    tiny_checkpoint: TinyCheckpoint, calibrated: HardwareProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Validate:
    """Validates on a machine whose yardstick runs so many times as fast as when it was calibrated.

    Calibrated again, everything takes three seconds more to hand over.
    """

    slower = {pair: 3.0 + seconds for pair, seconds in calibrated.handoff_s.items()}

    def run(speed: float) -> list[Row]:
        then = tuple(c for c in calibrated.curves if c.op in ("stream_read", "stream_copy"))
        monkeypatch.setattr(module, "cached_profile", lambda *args: calibrated)
        monkeypatch.setattr(module, "calibrate", lambda *args: calibrated.with_(handoff_s=slower))
        monkeypatch.setattr(module, "yardstick", lambda *args: tuple(at_speed(curve, speed) for curve in then))
        return validate([tiny_checkpoint("mixtral")], tmp_path, JOB, "scheinfer validate", io.StringIO())

    return run


def at_speed(curve: Curve, speed: float) -> Curve:
    return replace(curve, samples=tuple(replace(s, median_s=s.median_s / speed) for s in curve.samples))


def page(folder: Path) -> str:
    return html.unescape((folder / "index.html").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_plan_has_its_measured_and_its_simulated_speed_and_one_is_kept(validated: Validate, tmp_path: Path):
    rows = validated(1.0)
    assert {"cpu-only", "stream"} <= {row["policy"] for row in rows}
    assert sum(bool(row["kept"]) for row in rows) == 1
    assert sorted(row["predicted_rank"] for row in rows) == list(range(1, len(rows) + 1))  # type: ignore[type-var]
    for row in rows:
        error = row["error"]["decode_tok_s"]  # type: ignore[index]
        assert error == pytest.approx(row["predicted_decode_tok_s"] / row["decode_tok_s"] - 1)  # type: ignore[operator]
    assert (tmp_path / "index.html").is_file()
    assert not list(tmp_path.glob("*.hardware.both.json")), "the machine kept its speed"
    assert "calibrated again" not in page(tmp_path)


@pytest.mark.slow
def test_a_machine_that_changed_its_speed_is_calibrated_again_and_simulated_by_both(
    validated: Validate, calibrated: HardwareProfile, tmp_path: Path
):
    rows = validated(0.5)
    both = load_profile(next(tmp_path.glob("*.hardware.both.json")))
    added = {pair: both.handoff_s[pair] - s for pair, s in calibrated.handoff_s.items()}
    assert added == dict.fromkeys(added, pytest.approx(1.5)), "the mean of both"
    assert load_profile(next(tmp_path.glob("*.hardware.json"))) == calibrated, "what plans were made with is kept"
    stream = next(row for row in rows if row["policy"] == "stream")
    assert stream["predicted_ttft_s"] > 1.5, "replays rest on both"  # type: ignore[operator]
    assert "calibrated again after the runs; what is simulated here rests on the mean of both" in page(tmp_path)
