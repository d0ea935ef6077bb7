"""The report: a page that stands alone, says what was measured, and numbers that programs can read."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hwmodels.catalog import hardware
from hwmodels.errors import FormatError
from sim.compare import compare
from sim.report import ModelResult, Report, write_report
from tests.timelines import MEASURED, SIMULATED

HW = hardware("rtx4090-ryzen7950x")


def row(policy: str, measured: float, simulated: float, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "policy": policy,
        "n_prompt": 32,
        "n_gen": 8,
        "dtype": "float32",
        "decode_tok_s": measured,
        "predicted_decode_tok_s": simulated,
        "samples": [measured, measured],
        "evidence": {"measured": 10, "interpolated": 2},
        **more,
    }


# Measured 10, 8, 4; simulated 9, 12, 4: one of three pairs is in the wrong order.
ROWS = [row("llama-cpp", 8.0, 12.0), row("auto", 10.0, 9.0), row("stream", 4.0, 4.0)]
RESULT = ModelResult("tiny", ROWS, "8 layers", compare(SIMULATED, MEASURED), compare(SIMULATED, MEASURED))
REPORT = Report([RESULT], HW, "2026-01-01 12:00", "scheinfer validate -m tiny --out out", {"cpu": "made up"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report") / "new", REPORT).parent


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def page_of(tmp_path: Path, **changes: Any) -> str:
    bare = replace(REPORT, results=[ModelResult("tiny", ROWS)])
    return write_report(tmp_path, replace(bare, **changes)).read_text(encoding="utf-8")


class Balance(HTMLParser):
    """Every tag that opens closes, in order."""

    VOID = ("meta", "img", "br", "hr", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed(html):
    balance = Balance()
    balance.feed(html)
    assert balance.open == []


def test_the_page_fetches_nothing(html):
    assert re.findall(r'(?:src|href)="(?!data:image/png|[\w.-]+")|url\(|<script|@import', html) == []


def test_every_linked_file_lies_beside_the_page(folder, html):
    linked = re.findall(r'href="([^"]+)"', html)
    assert {"rows.json", "rows.parquet", "tiny-ranking.png", "tiny-decode.png", "tiny-prefill.png"} <= set(linked)
    assert all((folder / name).stat().st_size > 0 for name in linked)


def test_the_page_names_the_fastest_policy_and_the_best_baseline(html):
    assert "tiny: auto decodes fastest, 10.0 tokens/s measured (simulated 9.00, -10.0%)" in html
    assert "auto runs at 1.25 times the best baseline, llama-cpp" in html


def test_the_page_says_how_far_simulation_alone_would_have_led(html):
    assert "put 2 of 3 pairs of policies in the order that was measured" in html
    assert "would have picked llama-cpp, which is 20.0% slower than the fastest" in html


def test_the_table_is_ranked_by_what_was_measured(html):
    table = html[html.index("<tbody>") : html.index("</tbody>")]
    assert re.findall(r"<td>([a-z-]+)</td>", table) == ["auto", "llama-cpp", "stream"]


def test_the_page_says_what_the_costs_rest_on(html):
    assert "10 measured, 2 interpolated" in html


def test_errors_stand_with_and_without_contention(html):
    assert "error without contention" in html
    assert "time per output token" in html


def test_the_page_says_how_to_repeat_it_and_where_it_ran(html):
    assert "<pre>scheinfer validate -m tiny --out out</pre>" in html
    assert "made up" in html
    assert HW.id in html


def test_an_emulated_device_is_said_at_the_top(tmp_path):
    emulated = page_of(tmp_path, profile=replace(HW, device="emulated"))
    assert emulated.index("The device is emulated") < emulated.index("<h2>")
    assert "The device is emulated" not in page_of(tmp_path)


def test_names_cannot_break_the_page(tmp_path):
    evil = '<script>alert("&")</script>'
    result = ModelResult(evil, [row(evil, 1.0, 1.0)])
    page = page_of(tmp_path, results=[result], command=evil, notes=[evil], fingerprint={evil: evil}, title=evil)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_rows_read_back_as_json_with_every_key(folder):
    found = json.loads((folder / "rows.json").read_text())
    assert (found["schema"], found["version"]) == ("scheinfer.rows", 1)
    assert found["rows"] == ROWS


def test_rows_read_back_as_parquet_with_a_column_per_entry(folder):
    frame = pd.read_parquet(folder / "rows.parquet")
    assert list(frame["policy"]) == ["llama-cpp", "auto", "stream"]
    assert list(frame["evidence_measured"]) == [10, 10, 10]


def test_a_gap_and_a_numpy_scalar_can_be_written(tmp_path):
    rows = [row("auto", 1.0, 1.0, noise=math.nan, vram_bytes=np.int64(2**30), evidence={}), row("cpu-only", 1.0, 1.0)]
    page_of(tmp_path, results=[ModelResult("tiny", rows)])
    first = json.loads((tmp_path / "rows.json").read_text())["rows"][0]
    assert (first["noise"], first["vram_bytes"]) == (None, 2**30)
    assert len(pd.read_parquet(tmp_path / "rows.parquet")) == 2


def test_a_row_that_was_not_measured_shows_a_dash(tmp_path):
    only = {"policy": "gpu-only", "decode_tok_s": 3.0}
    page = page_of(tmp_path, results=[ModelResult("tiny", [only])])
    assert "gpu-only is simulated fastest at 3.00 tokens/s; nothing was measured" in page
    assert "<td>gpu-only</td><td>–</td><td>3.00</td>" in page


def test_two_results_of_one_model_keep_their_pictures_apart(tmp_path):
    page_of(tmp_path, results=[ModelResult("tiny", ROWS), ModelResult("tiny", ROWS[:1])])
    assert {p.name for p in tmp_path.glob("*.png")} == {"tiny-ranking.png", "tiny-2-ranking.png"}


def test_a_report_is_written_over_an_older_one_and_leaves_the_rest(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    page_of(tmp_path)
    page_of(tmp_path, title="Second")
    assert "Second" in (tmp_path / "index.html").read_text()
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert not list(tmp_path.glob("*.part"))


def test_a_folder_that_cannot_be_made_is_an_error_with_its_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="cannot write"):
        page_of(tmp_path / "file")
