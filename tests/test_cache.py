"""Profiles and parts in the cache: found again only where they belong, never trusted when damaged."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from hwmodels.calibrate import Part, handoffs
from hwmodels.profile import HardwareProfile, Peak
from runtime import cache, resume
from runtime.autoplan import Request, choose_profile
from runtime.cache import cached_profile, profile_path
from runtime.cli import main
from runtime.resume import KeptParts, measurement_key
from sim.model import load_model
from sim.workload import Workload
from tests.conftest import TinyCheckpoint

PEAK = Peak({"float32": 1e9}, 1e9, 1.0, 0.0, "measured")
PROFILE = HardwareProfile("here", "emulated", "today", {"cpu": "this one"}, 1, 1, 1, {"CPU": PEAK})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "scheinfer"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """Folders that were calibrated; each calibration is PROFILE with another number."""
    calls: list[Path | None] = []

    def calibrate(folder: Path | None, *rest: object) -> HardwareProfile:
        calls.append(folder)
        return PROFILE.with_(host_bytes=len(calls))

    monkeypatch.setattr(cache, "calibrate", calibrate)
    return calls


@pytest.fixture
def llama(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama")


# -- profiles -----------------------------------------------------------------------------------------


def test_a_profile_is_measured_once(llama, measured):
    first, second = (cached_profile(llama, "emulated", progress=False) for _ in range(2))
    assert first == second
    assert measured == [llama]


def test_repeats_are_measured_anew_and_kept_as_one(llama, measured):
    found = cached_profile(llama, "emulated", progress=False, repeats=3)
    assert measured == [llama] * 3
    assert found.host_bytes == 1, "the least memory that was to be had"
    assert found.notes == ("The mean of 3 calibrations, the first of today.",)
    assert cached_profile(llama, "emulated", progress=False) == found


def test_fresh_measures_again_and_keeps_the_new_one(llama, measured):
    cached_profile(llama, "emulated", progress=False)
    assert cached_profile(llama, "emulated", progress=False, fresh=True).host_bytes == 2
    assert cached_profile(llama, "emulated", progress=False).host_bytes == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": "scheinfer.plan"}', "\x00\xff"])
def test_a_damaged_file_is_measured_anew_and_replaced(llama, measured, content):
    path = profile_path(llama, "emulated", False, None)
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("latin-1"))
    assert cached_profile(llama, "emulated", progress=False).host_bytes == 1
    assert json.loads(path.read_text())["name"] == "here"


def test_an_older_schema_in_the_cache_is_measured_anew(llama, measured):
    cached_profile(llama, "emulated", progress=False)
    path = profile_path(llama, "emulated", False, None)
    path.write_text(path.read_text().replace('"version": 1', '"version": 0'))
    assert cached_profile(llama, "emulated", progress=False).host_bytes == 2


def test_a_thorough_profile_of_an_older_schema_is_not_measured_anew_unasked(llama, measured):
    request = Request(llama, load_model(llama), Workload(4, 2), device="emulated")
    cached_profile(llama, "emulated", progress=False)
    assert choose_profile(request, False, print).host_bytes == 1
    path = profile_path(llama, "emulated", False, None)
    path.write_text(path.read_text().replace('"version": 1', '"version": 0'))
    assert choose_profile(request, False, print).host_bytes == 2
    assert profile_path(llama, "emulated", True, None).is_file(), "the quick one is measured"


def test_what_the_numbers_depend_on_is_in_the_name(llama, tiny_checkpoint, monkeypatch):
    own = profile_path(llama, "emulated", False, None)
    others = [
        profile_path(tiny_checkpoint("mixtral"), "emulated", False, None),
        profile_path(llama, "emulated", True, None),
        profile_path(llama, "emulated", False, 2),
        profile_path(llama, "emulated", False, None, "bfloat16"),
    ]
    monkeypatch.setattr(resume, "fingerprint", lambda: {"cpu": "another one", "cores": "64"})
    others.append(profile_path(llama, "emulated", False, None))
    assert len({own, *others}) == 6


def test_one_damaged_file_does_not_hide_the_other_profiles(folder, capsys):
    (folder / "profiles").mkdir(parents=True)
    (folder / "profiles" / "broken.json").write_text("{")
    PROFILE.save(folder / "profiles" / "whole.json")
    assert main(["hardware", "-o", "json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["whole"]["cpu"] == "this one"
    assert "broken.json: not JSON" in rows["broken"]["kind"]


# -- parts --------------------------------------------------------------------------------------------

PART = Part(handoff_s={"CPU>GPU": 1.0}, others_load=0.25)


def test_a_part_survives_its_file(folder):
    kept = KeptParts.of("key")
    part = handoffs({"CPU>GPU": [1.0, 2.0, 3.0]})
    kept.save("hand-offs and joins", part)
    assert KeptParts.of("key").load("hand-offs and joins") == part
    assert KeptParts.of("other").load("hand-offs and joins") is None


def test_a_part_older_than_an_hour_is_not_used():
    kept = KeptParts.of("key")
    kept.save("copies", PART)
    (path,) = kept.folder.iterdir()
    then = time.time() - resume.MAX_AGE_S - 1
    os.utime(path, (then, then))
    assert kept.load("copies") is None


@pytest.mark.parametrize("content", ["", "{}", '{"schema": "scheinfer.calibration-part", "version": 9}'])
def test_a_damaged_part_is_not_used(content):
    kept = KeptParts.of("key")
    kept.save("copies", PART)
    (path,) = kept.folder.iterdir()
    path.write_text(content)
    assert kept.load("copies") is None


def test_a_cache_that_cannot_be_written_does_not_stop_a_calibration(tmp_path):
    (tmp_path / "file").write_text("")
    kept = KeptParts(tmp_path / "file" / "parts")
    kept.save("copies", PART)
    assert kept.load("copies") is None
    kept.clear()


def test_parts_are_of_one_machine_one_model_and_one_extent(llama):
    spec = load_model(llama)
    keys = {measurement_key(spec, "emulated", threads, extent) for threads in (None, 1) for extent in ("quick", "full")}
    assert len(keys) == 4
