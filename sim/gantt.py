"""Gantt charts: what every resource did when, simulated above measured on one time axis."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from hwmodels.errors import FormatError
from hwmodels.profile import RESOURCES, Resource
from hwmodels.units import format_seconds
from sim.chart import BLACK, GREY, Chart, chart, styled
from sim.timeline import Span, Timeline

# Okabe and Ito's colours: told apart with every common colour blindness.
_LEGEND: dict[str, tuple[str, tuple[str, ...]]] = {
    "attention, router": ("#56B4E9", ("attn",)),
    "GG: kept on the device": ("#009E73", ("gg",)),
    "CG: sent columns, computed": ("#E69F00", ("cg",)),
    "CG: weights being sent": ("#F0E442", ("send", "evict")),
    "CC: computed by the CPU": ("#D55E00", ("cc",)),
    "activations": ("#CC79A7", ("act_d2h", "act_h2d", "hidden_d2h", "hidden_h2d")),
    "join": (BLACK, ("join",)),
    "embedding, head, sampling": ("#0072B2", ("embed", "head", "sample")),
}
_COLOURS = {kind: colour for colour, kinds in _LEGEND.values() for kind in kinds}
_LANE = 0.82
_GAP = 0.45


@styled
def gantt(
    timelines: Sequence[Timeline],
    step: str | None = None,
    window_s: tuple[float, float] | None = None,
    title: str | None = None,
) -> Chart:
    """Gantt chart: a row per resource and timeline, every timeline starting at zero, time in ms.

    step      show this step alone; each timeline is aligned at the step's own start
    window_s  show this part of the time axis, in seconds after the start
    A timeline is named by its source, or by ``info["label"]`` where that is set. Raises FormatError
    without timelines, for a step that one of them lacks, and where there is nothing to draw.
    """
    shown = [_one_step(t, step) for t in timelines]
    if not any(t.spans for t in shown):
        raise FormatError("there is no span to draw; give timelines of a run with at least one task")
    rows = [(r, t) for r in RESOURCES for t in shown if any(s.resource == r for u in shown for s in u.spans)]
    n_resources = len({r for r, _ in rows})
    figure, axes = chart(7.2, 0.9 + 0.27 * len(rows) + 0.1 * n_resources)
    low_s, high_s = window_s or (0.0, max(t.makespan_s for t in shown))
    heights = _heights(rows)
    for (resource, timeline), y in zip(rows, heights, strict=True):
        _lane(axes, timeline, resource, y, (low_s, high_s))
    _ends(axes, shown, rows, heights, (low_s, high_s))
    axes.set_xlim(low_s * 1e3, high_s * 1e3)
    axes.set_ylim(heights[-1] - 0.6, heights[0] + 0.6)
    axes.set_yticks(heights, [_label(i, rows) for i in range(len(rows))])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time after the start in ms")
    axes.set_title(_title(shown, step, title), loc="left")
    _legend(figure, shown)
    return figure


def gantt_step(timelines: Sequence[Timeline], phase: str = "decode", n_layers: int = 4) -> Chart:
    """Gantt chart of a few layers of a typical step: the one of median duration whose name starts with `phase`.

    The layers come from the middle of the model; each timeline is aligned at the first of them. Falls
    back to the first step that all timelines have. FormatError if they have none in common.
    """
    if not timelines:
        raise FormatError("there is no timeline to draw; give at least one")
    common = [s for s in timelines[-1].steps if all(s in t.step_s for t in timelines)]
    if not common:
        raise FormatError("the timelines have no step in common; simulate the workload that was measured")
    step_s = timelines[-1].step_s
    typical = sorted((s for s in common if s.startswith(phase)), key=lambda s: step_s[s]) or common[:1]
    step = typical[len(typical) // 2]
    last = max(s.layer for s in timelines[-1].step(step).spans)
    first = max(0, (last + 1 - n_layers) // 2)
    cut = [_layers(t.step(step), first, first + n_layers) for t in timelines]
    where = f"{step}, layers {first} to {min(first + n_layers - 1, last)}"
    return gantt(cut if all(t.spans for t in cut) else [t.step(step) for t in timelines], title=where)


def _layers(timeline: Timeline, first: int, stop: int) -> Timeline:
    spans = tuple(s for s in timeline.spans if first <= s.layer < stop)
    return Timeline(timeline.source, spans, timeline.info)


def _one_step(timeline: Timeline, step: str | None) -> Timeline:
    if step is None:
        return timeline
    if step not in timeline.step_s:
        known = ", ".join(timeline.steps[:8]) + (", ..." if len(timeline.steps) > 8 else "")
        raise FormatError(f"the {timeline.source} timeline has no step {step!r}; it has {known}")
    return timeline.step(step)


def _name(timeline: Timeline) -> str:
    return str(timeline.info.get("label", timeline.source))


def _label(i: int, rows: list[tuple[Resource, Timeline]]) -> str:
    resource, timeline = rows[i]
    if len({id(t) for _, t in rows}) == 1:
        return resource
    is_first = i == 0 or rows[i - 1][0] != resource
    return f"{resource}  {_name(timeline)}" if is_first else _name(timeline)


def _heights(rows: list[tuple[Resource, Timeline]]) -> list[float]:
    """Centre of every row, downwards, with a gap between resources."""
    y, heights = 0.0, []
    for i, (resource, _) in enumerate(rows):
        if i:
            y -= 1.0 if rows[i - 1][0] == resource else 1.0 + _GAP
        heights.append(y)
    return heights


def _lane(axes: Axes, timeline: Timeline, resource: Resource, y: float, window_s: tuple[float, float]) -> None:
    low_s, high_s = window_s
    zero_s = timeline.start_s
    spans = [
        s
        for s in timeline.spans
        if s.resource == resource and s.end_s - zero_s >= low_s and s.start_s - zero_s <= high_s
    ]
    bars = [((s.start_s - zero_s) * 1e3, s.duration_s * 1e3) for s in spans]
    colours = [_COLOURS.get(s.kind, GREY) for s in spans]
    # A wide bar is set off by a white edge; a narrow one is its edge, or it would vanish.
    is_wide = [s.duration_s > 0.006 * (high_s - low_s) for s in spans]
    axes.axhspan(y - _LANE / 2, y + _LANE / 2, color="#F4F4F4", linewidth=0, zorder=0)
    axes.broken_barh(
        bars,
        (y - _LANE / 2, _LANE),
        facecolors=colours,
        edgecolors=["white" if wide else colour for wide, colour in zip(is_wide, colours, strict=True)],
        linewidth=0.4,
        zorder=2,
    )
    _layer_numbers(axes, spans, zero_s, y, high_s - low_s)


def _layer_numbers(axes: Axes, spans: list[Span], zero_s: float, y: float, width_s: float) -> None:
    """The layer of every bar that is wide enough to hold it."""
    for span in spans:
        if span.layer >= 0 and span.duration_s > 0.035 * width_s:
            middle_ms = (span.start_s + span.end_s - 2 * zero_s) / 2 * 1e3
            colour = "white" if span.kind in ("join", "cc", "gg") else BLACK
            text = f"L{span.layer}"
            axes.text(middle_ms, y, text, ha="center", va="center", fontsize=6, color=colour, clip_on=True, zorder=3)


def _ends(
    axes: Axes,
    shown: list[Timeline],
    rows: list[tuple[Resource, Timeline]],
    heights: list[float],
    window_s: tuple[float, float],
) -> None:
    """A tick at the end of every timeline, in its own rows."""
    for timeline in shown:
        if window_s[0] <= timeline.makespan_s <= window_s[1]:
            for (_, owner), y in zip(rows, heights, strict=True):
                if owner is timeline:
                    end_ms = timeline.makespan_s * 1e3
                    axes.plot([end_ms] * 2, [y - 0.5, y + 0.5], color=BLACK, linewidth=1, zorder=4, clip_on=False)


def _title(shown: list[Timeline], step: str | None, title: str | None) -> str:
    head = title or step or "whole run"
    spans = ", ".join(f"{_name(t)} {format_seconds(t.makespan_s)}" for t in shown)
    error = ""
    if len(shown) == 2 and shown[1].source == "measured" and shown[1].makespan_s > 0:
        error = f" ({shown[0].makespan_s / shown[1].makespan_s - 1:+.1%})"
    emulated = " · emulated device" if any(t.info.get("device") == "emulated" for t in shown) else ""
    return f"{head}: {spans}{error}{emulated}"


def _legend(figure: Chart, shown: list[Timeline]) -> None:
    present = {s.kind for t in shown for s in t.spans}
    handles = [
        Patch(color=colour, label=name) for name, (colour, kinds) in _LEGEND.items() if present.intersection(kinds)
    ]
    if present - set(_COLOURS):
        handles.append(Patch(color=GREY, label="other"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=7, handlelength=1.2)
