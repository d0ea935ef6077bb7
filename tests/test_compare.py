"""Simulated against measured: the errors are those one computes by hand, and the critical path is the one drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import FormatError, GraphError
from hwmodels.profile import RESOURCES, Resource
from sim.compare import Comparison, compare, critical_path, path_shares
from sim.cost import Prices
from sim.engine import execute
from sim.graph import Task, graph
from sim.timeline import Span, Timeline
from tests.unit_machine import CPU, D2H, GPU, H2D, task, unit_graph


def span(task: str, kind: str, resource: Resource, start_s: float, end_s: float) -> Span:
    return Span(task, kind, resource, task.split(".")[0], 0, start_s, end_s)


# simulated  CPU |--cc--|      |cc|        measured  CPU |-----cc-----|        |-cc-|
#            GPU        |-gg-|    |gg|               GPU              |-gg-|        |-gg-|
#            s   0      2    4 5  6  7                   0            4    6   7    9    10
SIMULATED = Timeline(
    "simulated",
    (
        span("prefill.cc", "cc", CPU, 0, 2),
        span("prefill.gg", "gg", GPU, 2, 4),
        span("decode1.cc", "cc", CPU, 5, 6),
        span("decode1.gg", "gg", GPU, 6, 7),
    ),
)
MEASURED = Timeline(
    "measured",
    (
        span("prefill.cc", "cc", CPU, 0, 4),
        span("prefill.gg", "gg", GPU, 4, 6),
        span("decode1.cc", "cc", CPU, 7, 9),
        span("decode1.gg", "gg", GPU, 9, 10),
    ),
)
BOTH = compare(SIMULATED, MEASURED)


def test_each_task_has_both_durations_and_its_error() -> None:
    assert BOTH.tasks["task"].tolist() == [s.task for s in SIMULATED.spans]
    assert BOTH.tasks["simulated_s"].tolist() == [2, 2, 1, 1]
    assert BOTH.tasks["measured_s"].tolist() == [4, 2, 2, 1]
    assert BOTH.tasks["error"].tolist() == [-0.5, 0, -0.5, 0]


def test_errors_are_summed_by_kind_and_resource() -> None:
    assert BOTH.kinds[["simulated_s", "measured_s", "error"]].values.tolist() == [[3, 6, -0.5], [3, 3, 0]]
    assert list(BOTH.kinds.loc["cc", ["median", "p90", "worst", "rows"]]) == [0.5, 0.5, 0.5, 2]
    assert BOTH.resources.index.tolist() == ["CPU", "GPU"]
    assert BOTH.resources["error"].tolist() == [-0.5, 0]


def test_steps_and_end_to_end_times_are_wall_times() -> None:
    assert list(BOTH.steps.loc["prefill"]) == pytest.approx([4, 6, -1 / 3])
    assert list(BOTH.steps.loc["decode1"]) == pytest.approx([2, 3, -1 / 3])
    assert list(BOTH.end_to_end.loc["ttft_s"]) == pytest.approx([4, 6, -1 / 3])
    assert list(BOTH.end_to_end.loc["tpot_s"]) == pytest.approx([2, 3, -1 / 3])
    assert list(BOTH.end_to_end.loc["tok_s"]) == pytest.approx([2 / 6, 2 / 9, 0.5])


def test_the_summary_has_median_p90_and_worst_for_programs_and_people() -> None:
    summary = BOTH.summary()
    assert summary["tasks"] == pytest.approx({"median": 0.25, "p90": 0.5, "worst": 0.5, "rows": 4})
    assert summary["steps"] == pytest.approx({"median": 1 / 3, "p90": 1 / 3, "worst": 1 / 3, "rows": 2})
    assert summary["end_to_end"] == pytest.approx({"ttft_s": -1 / 3, "tpot_s": -1 / 3, "tok_s": 0.5})
    text = str(BOTH)
    assert "ttft_s: simulated 4.00 s, measured 6.00 s, error -33.3%" in text
    assert "tok_s: simulated 0.333, measured 0.222, error +50.0%" in text
    assert "missing" not in text


def test_a_timeline_equals_itself() -> None:
    same = compare(SIMULATED, replace(SIMULATED, source="measured"))
    assert all(row["worst"] == 0 for name, row in same.summary().items() if name != "end_to_end")
    assert set(same.summary()["end_to_end"].values()) == {0}


def test_tasks_in_one_timeline_only_are_listed_and_left_out_of_the_errors() -> None:
    shorter = replace(MEASURED, spans=(*MEASURED.spans[:3], span("decode9.cc", "cc", CPU, 20, 30)))
    both = compare(SIMULATED, shorter)
    assert both.missing == {"simulated": ("decode9.cc",), "measured": ("decode1.gg",)}
    assert both.tasks["task"].tolist() == ["prefill.cc", "prefill.gg", "decode1.cc"]
    assert both.steps.index.tolist() == ["prefill", "decode1"]
    assert "1 tasks are missing from the measured timeline, the first is decode1.gg" in str(both)


def test_a_prefill_alone_has_no_time_per_output_token() -> None:
    both = compare(SIMULATED.step("prefill"), MEASURED.step("prefill"))
    assert both.end_to_end.index.tolist() == ["ttft_s", "tok_s"]


def test_a_task_that_took_no_time_has_no_relative_error() -> None:
    instant = replace(MEASURED, spans=(replace(MEASURED.spans[0], end_s=0.0), *MEASURED.spans[1:]))
    both = compare(SIMULATED, instant)
    assert both.tasks["error"].isna().tolist() == [True, False, False, False]
    assert both.summary()["tasks"]["rows"] == 3


def test_what_cannot_be_compared_is_refused() -> None:
    empty = Timeline("measured", ())
    with pytest.raises(FormatError, match="the measured timeline is empty"):
        compare(SIMULATED, empty)
    with pytest.raises(FormatError, match="the simulated timeline is empty"):
        compare(Timeline("simulated", ()), MEASURED)
    with pytest.raises(FormatError, match=r"no task in common: .*'prefill.cc'.*'other.cc'"):
        compare(SIMULATED, Timeline("measured", (span("other.cc", "cc", CPU, 0, 1),)))
    with pytest.raises(FormatError, match=r"'prefill.cc' twice"):
        compare(SIMULATED, replace(MEASURED, spans=(*MEASURED.spans, MEASURED.spans[0])))


def test_the_plot_shows_both() -> None:
    figure = BOTH.plot()
    assert len(figure.axes) >= 1


# -- critical path ------------------------------------------------------------------------------------


def test_the_critical_path_follows_what_each_task_waited_for() -> None:
    # H2D: |--w--|
    # GPU:       |g|    |sum|        sum waited for c, not for g
    # CPU: |------c-----|
    made, prices = unit_graph(
        task("w", H2D, 2), task("c", CPU, 4), task("g", GPU, 1, "w"), task("sum", GPU, 1, "g", "c")
    )
    timeline = execute(made, prices)
    assert critical_path(made, timeline) == critical_path(None, timeline) == ("c", "sum")


def test_a_task_may_have_waited_for_its_resource() -> None:
    # GPU: |--a--|--b--|   b depends on nothing
    made, prices = unit_graph(task("a", GPU, 2), task("b", GPU, 2))
    assert critical_path(made, execute(made, prices)) == ("a", "b")


def test_shares_of_the_path_add_up_and_what_is_left_is_waiting() -> None:
    # D2H: |d|...|   1 s of work, 2 s of hand-off, 1 s of work
    # CPU:       |c|
    made = graph([Task("d", "act_d2h", D2H), Task("c", "cc", CPU, deps=("d",))])
    timeline = execute(made, Prices([1.0, 1.0], [(), (2.0,)], {}))
    assert path_shares(timeline, critical_path(made, timeline)) == {"wait": 0.5, "act_d2h": 0.25, "cc": 0.25}


def test_a_comparison_shows_both_critical_paths() -> None:
    assert list(BOTH.critical.loc["cc"]) == pytest.approx([3 / 7, 6 / 10])
    assert list(BOTH.critical.loc["gg"]) == pytest.approx([3 / 7, 3 / 10])
    assert list(BOTH.critical.loc["wait"]) == pytest.approx([1 / 7, 1 / 10])


def test_an_empty_timeline_has_no_path() -> None:
    assert critical_path(None, Timeline("measured", ())) == ()
    assert path_shares(Timeline("measured", ()), ()) == {}


def test_a_timeline_that_lacks_a_task_of_the_graph_is_refused() -> None:
    made, prices = unit_graph(task("a", GPU, 2), task("b", GPU, 2))
    timeline = execute(made, prices)
    with pytest.raises(GraphError, match="lacks task 'b'"):
        critical_path(made, replace(timeline, spans=timeline.spans[:1]))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(RESOURCES), st.integers(0, 9), st.sets(st.integers(1, 4))), min_size=1, max_size=20
    )
)
def test_without_hand_offs_the_critical_path_lasts_as_long_as_the_run(
    rows: list[tuple[Resource, int, set[int]]],
) -> None:
    made, prices = unit_graph(
        *(task(f"t{i}", r, s, *(f"t{i - k}" for k in back if k <= i)) for i, (r, s, back) in enumerate(rows))
    )
    timeline = execute(made, prices)
    duration_s = dict(zip(made.index, prices.duration_s, strict=True))
    for path in (critical_path(made, timeline), critical_path(None, timeline)):
        assert sum(duration_s[name] for name in path) == timeline.makespan_s


def test_a_comparison_is_data() -> None:
    assert isinstance(BOTH, Comparison)
    with pytest.raises(AttributeError):
        BOTH.missing = {}  # type: ignore[misc]
