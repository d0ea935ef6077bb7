"""Pictures: right rows, right units, readable labels, no display needed."""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import combinations
from typing import Any

import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from hwmodels import work
from hwmodels.catalog import hardware
from hwmodels.errors import FormatError
from sim import plot
from sim.compare import compare
from sim.timeline import Timeline
from tests.timelines import MEASURED, SIMULATED, timeline

POLICIES = ("auto", "scheinfer", "llama-cpp", "fiddler", "ktransformers", "hybrimoe", "stream-overlap", "cpu-only")


def rows(model: str = "mixtral") -> list[dict[str, Any]]:
    """Policies that decode at 8, 7, 6, ... tokens/s; simulated at a tenth more."""
    return [
        {
            "model": model,
            "policy": policy,
            "decode_tok_s": 8.0 - i,
            "predicted_decode_tok_s": (8.0 - i) * 1.1,
            "stddev": {"decode_tok_s": 0.1},
            "bound_decode_tok_s": 10.0,
            "vram_bytes": (8 - i) * 2**30,
        }
        for i, policy in enumerate(POLICIES)
    ]


def drawn(figure: Figure) -> Figure:
    figure.savefig(io.BytesIO(), format="png")
    return figure


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in figure.findobj(Text) if t.get_text() and t.get_visible()]


def row_labels(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_a_gantt_chart_has_a_row_per_resource_with_measured_under_simulated():
    assert row_labels(drawn(plot.gantt([SIMULATED, MEASURED]))) == [
        "CPU  simulated",
        "measured",
        "GPU  simulated",
        "measured",
        "H2D  simulated",
        "measured",
        "D2H  simulated",
        "measured",
    ]


def test_a_single_timeline_needs_no_name_in_its_rows():
    assert row_labels(plot.gantt([SIMULATED])) == ["CPU", "GPU", "H2D", "D2H"]


def test_both_timelines_start_at_zero_and_time_is_in_ms():
    # 2 steps of 8 layers of 4 units: 64 ms simulated, 80 ms measured
    axes = plot.gantt([SIMULATED, MEASURED]).axes[0]
    assert axes.get_xlim() == pytest.approx((0.0, 80.0))
    assert axes.get_xlabel().endswith("in ms")
    bars = [p for c in axes.findobj(PolyCollection) for p in c.get_paths()]
    assert min(p.vertices[:, 0].min() for p in bars if len(p.vertices)) == pytest.approx(0.0)
    assert axes.get_title(loc="left") == "whole run: simulated 64.0 ms, measured 80.0 ms (-20.0%)"


def test_a_step_is_aligned_at_its_own_start():
    axes = plot.gantt([SIMULATED, MEASURED], step="decode1").axes[0]
    assert axes.get_xlim() == pytest.approx((0.0, 40.0))


def test_a_window_shows_its_part_of_the_time():
    assert plot.gantt([SIMULATED], window_s=(0.01, 0.02)).axes[0].get_xlim() == pytest.approx((10.0, 20.0))


def test_a_kind_has_one_colour_in_both_timelines():
    axes = plot.gantt([SIMULATED, MEASURED]).axes[0]
    colours = [
        {to_hex(c) for c in bars.get_facecolor()} for bars in axes.collections if isinstance(bars, PolyCollection)
    ]
    assert colours[0::2] == colours[1::2]


def test_the_legend_names_what_is_shown_and_nothing_else():
    legend = plot.gantt([SIMULATED]).legends[0]
    names = [t.get_text() for t in legend.get_texts()]
    assert any(name.startswith("CC") for name in names)
    assert not any("sent columns" in name for name in names)


def test_an_emulated_device_is_named_in_the_picture():
    emulated = timeline("measured", 0.001, device="emulated")
    assert "emulated" in plot.gantt([emulated]).axes[0].get_title(loc="left")
    assert "emulated" not in plot.gantt([MEASURED]).axes[0].get_title(loc="left")


def test_a_step_of_median_length_is_typical():
    # decode2 is slow, decode3 fast, decode1 between: the picture shows decode1
    steps = [
        timeline("measured", unit, (name,)) for name, unit in (("decode1", 2e-3), ("decode2", 9e-3), ("decode3", 1e-3))
    ]
    run = Timeline("measured", tuple(s for t in steps for s in t.spans))
    assert plot.gantt_step([run], n_layers=2).axes[0].get_title(loc="left").startswith("decode1, layers 3 to 4:")


def test_timelines_without_a_common_step_are_refused():
    with pytest.raises(FormatError, match="no step in common"):
        plot.gantt_step([timeline("simulated", 1.0, ("prefill",)), timeline("measured", 1.0, ("decode1",))])


def test_a_step_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(FormatError, match="has no step 'decode9'; it has prefill, decode1"):
        plot.gantt([SIMULATED], step="decode9")


def test_nothing_to_draw_is_refused():
    empty = Timeline("simulated", ())
    for draw in (lambda: plot.gantt([empty]), lambda: plot.gantt_step([]), lambda: plot.ranking([])):
        with pytest.raises(FormatError):
            draw()


def test_the_fastest_policy_stands_on_top():
    labels = row_labels(plot.ranking(list(reversed(rows()))))
    assert labels[::-1] == list(POLICIES)


def test_of_times_the_shortest_stands_on_top():
    timed = [{"policy": "slow", "tpot_s": 2.0}, {"policy": "fast", "tpot_s": 1.0}]
    assert row_labels(plot.ranking(timed, "tpot_s"))[-1] == "fast"


def test_a_ranking_prints_measured_speed_and_error():
    assert "8.00  (+10.0%)" in texts(plot.ranking(rows()))


def test_a_row_that_was_not_measured_is_drawn_as_simulated():
    figure = plot.ranking([{"policy": "auto", "decode_tok_s": 4.0}])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["simulated"]


def test_the_scatter_shows_measured_rows_only():
    figure = drawn(plot.scatter([*rows(), *rows("llama"), {"policy": "gpu-only", "decode_tok_s": 1.0}]))
    names = texts(figure)
    assert {"mixtral", "llama", "auto", "within 20 %"} <= set(names)
    assert "gpu-only" not in names


def test_errors_are_drawn_by_phase_resource_and_kind():
    labels = row_labels(drawn(plot.error_bars(compare(SIMULATED, MEASURED))))
    assert labels[::-1][:3] == ["TTFT", "TPOT", "CPU busy"]
    assert "act_d2h tasks" not in labels  # a thousandth of the time decides nothing


def test_comparisons_by_name_get_a_colour_each():
    both = {"with contention": compare(SIMULATED, MEASURED), "without": compare(MEASURED, MEASURED)}
    assert [t.get_text() for t in plot.error_bars(both).legends[0].get_texts()] == list(both)


def test_a_roofline_shows_every_work_on_every_resource():
    works = {f"T={n}": work.ffn(n, 4096, 14336, "bfloat16") for n in (1, 64)}
    names = texts(drawn(plot.roofline(hardware("rtx4090-ryzen7950x"), works)))
    assert (names.count("T=1"), names.count("T=64")) == (2, 2)
    assert "H2D, 25 GB/s" in names


def test_a_roofline_of_two_dtypes_is_refused():
    works = {dtype: work.ffn(1, 8, 8, dtype) for dtype in ("float16", "float32")}
    with pytest.raises(FormatError, match="float16, float32"):
        plot.roofline(hardware("rtx4090-ryzen7950x"), works)


def test_the_front_holds_what_nothing_beats():
    figure = drawn(plot.pareto([*rows(), {"policy": "waste", "vram_bytes": 2**33, "decode_tok_s": 0.5}]))
    front = next(line for line in figure.axes[0].lines if line.get_label() == "best for its memory")
    assert list(front.get_xdata()) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot.gantt([SIMULATED, MEASURED]),
        lambda: plot.ranking(rows()),
        lambda: plot.scatter(rows()),
        lambda: plot.pareto(rows()),
    ],
    ids=["gantt", "ranking", "scatter", "pareto"],
)
def test_no_two_labels_overlap(draw):
    figure = drawn(draw())
    shown = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]
    boxes = [(t.get_text(), t.get_window_extent()) for t in shown]
    touching = [(a, b) for (a, box), (b, other) in combinations(boxes, 2) if box.padded(-1).overlaps(other.padded(-1))]
    assert touching == []


def test_a_notebook_shows_a_figure_as_png():
    assert plot.gantt([SIMULATED])._repr_png_().startswith(b"\x89PNG")


def test_pictures_need_no_pyplot_and_no_display():
    code = "import sys; from sim import plot; print('matplotlib.pyplot' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_a_timeline_draws_itself():
    assert isinstance(SIMULATED.plot(step="prefill"), Figure)
