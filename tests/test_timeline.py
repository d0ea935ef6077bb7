"""A timeline says what happened when, and every file it writes reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import FormatError
from hwmodels.profile import RESOURCES
from sim.timeline import Span, Timeline, load_timeline


def span(task: str, resource: Any, start_s: float, end_s: float) -> Span:
    return Span(task, "cc", resource, task.split(".")[0], 0, start_s, end_s, bytes=8.0, flops=16.0)


# CPU: |--prefill.cc--|      |decode1.cc|     |decode2.cc|
# GPU:   |prefill.gg|
# s    0   1        3 4      5          6     8          9
SIX = Timeline(
    "simulated",
    (
        span("prefill.cc", "CPU", 0, 4),
        span("prefill.gg", "GPU", 1, 3),
        span("decode1.cc", "CPU", 5, 6),
        span("decode2.cc", "CPU", 8, 9),
    ),
    {"model": "tiny", "evidence": {"measured": 3}},
)


def test_makespan_busy_time_and_overlap() -> None:
    assert (SIX.start_s, SIX.end_s, SIX.makespan_s) == (0, 9, 9)
    assert SIX.busy_s == {"CPU": 6, "GPU": 2, "H2D": 0, "D2H": 0}
    assert SIX.overlap == 8 / 9


def test_time_to_first_token_is_the_prefill_and_time_per_output_token_the_mean_decode_step() -> None:
    assert SIX.steps == ("prefill", "decode1", "decode2")
    assert SIX.step_s == {"prefill": 4, "decode1": 1, "decode2": 1}
    assert SIX.ttft_s == 4
    assert SIX.tpot_s == 1
    assert SIX.step("prefill").busy_s["GPU"] == 2


def test_an_empty_timeline_has_no_time() -> None:
    empty = Timeline("measured", ())
    assert (empty.makespan_s, empty.overlap, empty.ttft_s, empty.tpot_s) == (0, 0, 0, 0)
    assert empty.to_frame().empty


def test_the_frame_has_a_row_per_task() -> None:
    frame = SIX.to_frame()
    assert list(frame.columns) == ["task", "kind", "resource", "step", "layer", "start_s", "end_s", "bytes", "flops"]
    assert list(frame.loc[1]) == ["prefill.gg", "cc", "GPU", "prefill", 0, 1, 3, 8, 16]


def test_the_parquet_file_is_the_frame(tmp_path: Path) -> None:
    SIX.save_parquet(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), SIX.to_frame())


# -- Chrome trace -------------------------------------------------------------------------------------


def test_a_trace_has_a_process_per_source_and_a_thread_per_resource(tmp_path: Path) -> None:
    for source, pid in (("simulated", 1), ("measured", 2)):
        path = tmp_path / "trace.json"
        Timeline(source, SIX.spans).save_chrome_trace(path)  # type: ignore[arg-type]
        events = json.loads(path.read_text())["traceEvents"]
        assert {event["pid"] for event in events} == {pid}
        threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
        assert threads == {1: "CPU", 2: "GPU", 3: "H2D", 4: "D2H"}
        gg = next(e for e in events if e["ph"] == "X" and e["args"]["task"] == "prefill.gg")
        assert (gg["tid"], gg["ts"], gg["dur"], gg["cat"]) == (2, 1e6, 2e6, "kernel")


def test_a_trace_reads_back(tmp_path: Path) -> None:
    SIX.save_chrome_trace(tmp_path / "trace.json")
    assert load_timeline(tmp_path / "trace.json") == SIX


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(RESOURCES), st.floats(0, 1e4), st.floats(0, 10)), min_size=1, max_size=20))
def test_any_timeline_reads_back_from_its_start_to_a_nanosecond(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, float, float]]
) -> None:
    path = tmp_path_factory.mktemp("traces") / "trace.json"
    timeline = Timeline("measured", tuple(span(f"s.t{i}", r, at, at + d) for i, (r, at, d) in enumerate(rows)))
    timeline.save_chrome_trace(path)
    back = load_timeline(path)
    assert back.source == "measured"
    for before, after in zip(timeline.spans, back.spans, strict=True):
        assert after.start_s == pytest.approx(before.start_s - timeline.start_s, abs=1e-9)
        assert after.duration_s == pytest.approx(before.duration_s, abs=1e-9)
        assert (after.task, after.resource, after.bytes) == (before.task, before.resource, before.bytes)


def broken(tmp_path: Path, **changes: Any) -> Path:
    """A trace of SIX with fields of its first span replaced, or dropped where the new value is None."""
    path = tmp_path / "trace.json"
    SIX.save_chrome_trace(path)
    trace = json.loads(path.read_text())
    event = next(e for e in trace["traceEvents"] if e["ph"] == "X")
    for name, value in changes.items():
        event.pop(name) if value is None else event.update({name: value})
    path.write_text(json.dumps(trace))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tid": 0}, "tid is 0, expected 1 to 4"),
        ({"tid": 5}, "tid is 5"),
        ({"tid": "1"}, "malformed trace event"),
        ({"ts": "soon"}, "malformed trace event"),
        ({"dur": None}, "malformed trace event"),
        ({"args": {}}, "malformed trace event"),
    ],
)
def test_malformed_events_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        load_timeline(broken(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no 'scheinfer' header"),
        ("{}", "no 'scheinfer' header"),
        ("nonsense", "not JSON"),
        ('{"scheinfer": {"schema": "scheinfer.plan"}}', "is this the right file"),
        ('{"scheinfer": {"schema": "scheinfer.timeline", "version": 99}}', "version 99"),
        ('{"scheinfer": {"schema": "scheinfer.timeline", "version": 1, "source": "dreamt"}}', "source is 'dreamt'"),
        ('{"scheinfer": {"schema": "scheinfer.timeline", "version": 1, "source": "measured"}}', "traceEvents"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        load_timeline(path)
