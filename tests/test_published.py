"""The experiments that stand beside published numbers run, and their committed results are what the code says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from experiments import known_points, paper_speedups
from experiments.paper_speedups import Case, layer_split, llama_cpp_2024
from experiments.record import RESULTS
from hwmodels.catalog import hardware
from hwmodels.work import ffn
from sim.memory import memory
from sim.simulate import simulate


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "rows.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_smoke_run_of_the_papers_speedups_leaves_rows_figure_and_one_json_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paper_speedups.main(["--smoke", "--out", str(tmp_path)])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = rows_of(tmp_path)
    assert {row["baseline"] for row in rows} == set(paper_speedups.BASELINES)
    for row in rows:
        assert (row["decode_speedup"] == "") == (row["note"] != "")
    assert json.loads((tmp_path / "config.json").read_text())["summary"] == summary
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_speedup_is_a_ratio_of_times() -> None:
    row = paper_speedups.rows_of(Case("rtx4090-ryzen7950x", 12 << 30, "llama-2-7b", 64))[0]
    assert row["decode_speedup"] == pytest.approx(
        row["scheinfer_decode_tok_s"] / row["baseline_decode_tok_s"], rel=2e-3
    )
    assert row["overall_speedup"] == pytest.approx(row["baseline_total_s"] / row["scheinfer_total_s"], rel=2e-3)


def test_a_layer_split_leaves_no_room_for_one_more_layer() -> None:
    problem = Case("rtx3090-ryzen5950x", 12 << 30, "llama-2-13b", 64).problem
    plan, n_cpu = layer_split(problem)
    used = memory(problem.spec, plan).vram_bytes
    one_more = problem.spec.rest_bytes(0) + problem.spec.ffn_bytes(0)
    assert used <= 12 << 30 < used + one_more + problem.spec.kv_bytes(0, problem.workload.n_ctx)
    assert [part.rest for part in plan.layers] == ["CPU"] * n_cpu + ["GPU"] * (40 - n_cpu)


def test_a_layer_split_runs_one_resource_at_a_time() -> None:
    problem = Case("rtx3090-ryzen5950x", 12 << 30, "llama-2-13b", 64).problem
    timeline = simulate(problem.spec, layer_split(problem)[0], problem.profile, problem.workload, every_step=False)
    assert timeline.overlap <= 1 + 1e-9


def test_long_prompts_are_uploaded_where_that_is_faster_than_the_cpu() -> None:
    problem = Case("rtx3090-ryzen5950x", 12 << 30, "llama-2-13b", 512).problem
    n_cpu = layer_split(problem)[1]
    uploaded_s = paper_speedups.uploading_ttft_s(problem, n_cpu)
    assert llama_cpp_2024(problem).ttft_s == uploaded_s
    assert uploaded_s > n_cpu * problem.spec.ffn_bytes(0) / 9e9  # pageable memory over PCIe 4


@pytest.mark.parametrize("bits", [4.0, 8.0, 16.0])
def test_weights_of_fewer_bits_take_less_time_and_room_in_proportion(bits: float) -> None:
    profile = hardware("rtx4090-ryzen7950x")
    narrow = known_points.at_bits(profile, bits)
    work = ffn(1, 4096, 14336, "bfloat16")
    fixed_s = profile.peaks["CPU"].fixed_s
    assert narrow.time_s("CPU", work).seconds - fixed_s == pytest.approx(
        (profile.time_s("CPU", work).seconds - fixed_s) * bits / 16
    )
    assert narrow.vram_bytes == pytest.approx(profile.vram_bytes * 16 / bits)


def test_the_smoke_run_of_known_points_repeats_the_committed_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known_points.main(["--smoke", "--out", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["worst_absolute_error"] < 0.3
    committed: dict[str, Any] = {row["point"]: row for row in rows_of(RESULTS / "known_points")}
    for row in rows_of(tmp_path):
        assert committed[row["point"]] == row


def test_no_point_is_both_simulated_and_left_out() -> None:
    names = [point.name for point in known_points.points()]
    assert len(set(names)) == len(names)
    assert not set(names) & set(known_points.LEFT_OUT)
