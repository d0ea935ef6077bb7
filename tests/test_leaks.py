"""Generations leave nothing behind, a closed model gives its memory back, and drift is told from noise."""

from __future__ import annotations

from pathlib import Path

import pytest

import scheinfer
from experiments import leaks
from experiments.leaks import CASES, FLAT, drift, generate, generations, held, write_checkpoint
from sim.model import load_model


def test_what_stands_still_has_no_drift() -> None:
    assert drift([7.0] * 101, steps=1000) == (0.0, 0.0)


def test_a_line_has_its_slope_without_doubt() -> None:
    # 101 readings over 1000 steps, 30 more each time: 3 per step
    slope, uncertainty = drift([30.0 * i for i in range(101)], steps=1000)
    assert slope == pytest.approx(3)
    assert uncertainty == pytest.approx(0, abs=1e-9)


def test_one_jump_is_not_told_from_noise() -> None:
    slope, uncertainty = drift([0.0] * 50 + [4096.0] * 51, steps=1000)
    assert slope == pytest.approx(4.096)
    assert uncertainty > slope


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1].__name__ if isinstance(case, tuple) else "")
def test_threads_files_and_device_memory_do_not_change_from_one_generation_to_the_next(
    case: tuple[str, leaks.MakePlan], tmp_path: Path
) -> None:
    family, make = case
    found = generations(write_checkpoint(tmp_path, family, leaks.SMALL), make, "emulated", 16, 4)
    assert len(found) == 5
    assert {tuple(getattr(h, name) for name in FLAT) for h in found} == {
        tuple(getattr(found[0], name) for name in FLAT)
    }


def test_a_closed_model_gives_its_memory_back_to_the_system(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llama", leaks.LARGE)
    spec, threads_left = load_model(folder), set()
    for _ in range(3):  # the first times the C library keeps less
        model, _ = scheinfer.load(folder, leaks.three_ways(spec), device="emulated")
        generate(model, 0)
        loaded = held(model)
        model.close()
        closed = held(None)
        assert loaded.rss_bytes - closed.rss_bytes > 0.9 * spec.weight_bytes
        assert closed.threads <= loaded.threads - 3  # CPU, H2D and D2H, twice where the kernel has queues of its own
        threads_left.add(closed.threads)
        assert closed.files == loaded.files
    assert len(threads_left) == 1
