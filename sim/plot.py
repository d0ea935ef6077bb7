"""Pictures of results. Every function returns a Figure and shows nothing; save it or let a notebook show it.

Rows are mappings with the result keys of a run: `policy`, `model`, `decode_tok_s`, and where a run was
measured also `predicted_decode_tok_s`. A row without a predicted value is itself simulated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from hwmodels.errors import FormatError
from hwmodels.profile import HardwareProfile, Resource
from hwmodels.units import format_number
from hwmodels.work import Work
from sim.chart import BLACK, GREY, LIGHT, MARKERS, MEASURED, SERIES, SIMULATED, Chart, chart, styled
from sim.compare import Comparison
from sim.gantt import gantt, gantt_step

__all__ = ["error_bars", "gantt", "gantt_step", "pareto", "ranking", "roofline", "scatter"]

Row = Mapping[str, Any]
_AXIS = {
    "decode_tok_s": "decode speed in tokens/s",
    "prefill_tok_s": "prefill speed in tokens/s",
    "ttft_s": "time to first token in s",
    "tpot_s": "time per output token in s",
}


@styled
def ranking(rows: Sequence[Row], metric: str = "decode_tok_s", title: str | None = None) -> Chart:
    """Bars of every policy, best first: simulated beside measured with its spread, and the error between them.

    A line marks the hardware bound where all rows agree on it. FormatError if no row has the metric.
    """
    pairs = sorted(_pairs(rows, metric), key=lambda p: _best(p, metric))
    figure, axes = chart(5.6, 0.9 + 0.36 * len(pairs))
    for y, (row, simulated, measured) in enumerate(pairs):
        if simulated is not None:
            axes.barh(y + 0.19, simulated, 0.36, color=SIMULATED, label="simulated" if y == 0 else None)
        if measured is not None:
            axes.barh(y - 0.19, measured, 0.36, color=MEASURED, label="measured" if y == 0 else None)
            spread = row.get("stddev", {}).get(metric)
            axes.errorbar(measured, y - 0.19, xerr=spread, color=BLACK, capsize=2, linewidth=0.8)
        end = max(v for v in (simulated, measured) if v is not None)
        axes.annotate(_note(simulated, measured), (end, y), (5, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(pairs)), [str(row["policy"]) for row, _, _ in pairs])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(_AXIS.get(metric, metric))
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    _bound(axes, rows, metric)
    axes.set_title(title or _common(rows, "model"), loc="left")
    _outside_legend(figure, axes)
    return figure


@styled
def scatter(rows: Sequence[Row], metric: str = "decode_tok_s", title: str | None = None) -> Chart:
    """Simulated against measured on logarithmic axes, with the diagonal and a band of 20 %.

    A colour and marker per policy, filled or hollow by model. FormatError if no row was both simulated and measured.
    """
    pairs = [(row, s, m) for row, s, m in _pairs(rows, metric) if s is not None and m is not None]
    if not pairs:
        raise FormatError(f"no row has both {metric!r} and 'predicted_{metric}'; measure at least one plan")
    figure, axes = chart(5.0, 3.5)
    policies, models = _names(pairs, "policy"), _names(pairs, "model")
    _diagonal(axes, [v for _, s, m in pairs for v in (s, m)])
    for row, simulated, measured in pairs:
        i, k = policies.index(str(row["policy"])), models.index(str(row.get("model", "")))
        fill = (None, "white", LIGHT)[k % 3]
        axes.plot(measured, simulated, MARKERS[i % len(MARKERS)], color=SERIES[i % len(SERIES)], mfc=fill, zorder=3)
    for i, policy in enumerate(policies):
        axes.plot([], [], MARKERS[i % len(MARKERS)], color=SERIES[i % len(SERIES)], label=policy)
    for k, model in enumerate(models if len(models) > 1 else []):
        axes.plot([], [], "o", color=BLACK, mfc=(None, "white", LIGHT)[k % 3], label=model)
    axes.set_xlabel(f"measured {_AXIS.get(metric, metric)}")
    axes.set_ylabel(f"simulated {_AXIS.get(metric, metric)}")
    axes.set_title(title or "Simulated against measured", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


@styled
def error_bars(comparisons: Comparison | Mapping[str, Comparison], title: str | None = None) -> Chart:
    """Errors of time to first token, time per token, busy time by resource and by kind, as bars.

    Several comparisons by name, such as with and without contention, get a colour each. Resources and
    kinds that take less than 1 % of the measured time are left out: their error decides nothing.
    """
    named = {"": comparisons} if isinstance(comparisons, Comparison) else dict(comparisons)
    errors = {name: _errors(comparison) for name, comparison in named.items()}
    labels = list(dict.fromkeys(label for values in errors.values() for label in values))[::-1]
    if not labels:
        raise FormatError("there is no error to draw; compare a simulated with a measured timeline first")
    figure, axes = chart(5.6, 0.9 + 0.26 * len(labels) * max(1, len(errors) * 0.7))
    thickness = 0.8 / len(errors)
    for i, (name, values) in enumerate(errors.items()):
        at = {y + 0.4 - thickness * (i + 0.5): values[label] * 100 for y, label in enumerate(labels) if label in values}
        axes.barh(list(at), list(at.values()), thickness * 0.9, color=SERIES[i], label=name)
        for y, value in at.items():
            offset, align = (4, "left") if value >= 0 else (-4, "right")
            text = f"{value:+.1f} %"
            axes.annotate(text, (value, y), (offset, 0), textcoords="offset points", ha=align, va="center", fontsize=7)
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.use_sticky_edges = False  # labels need room on the side of zero, too
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.2)
    axes.set_xlabel("simulated − measured, in % of measured")
    axes.set_title(title or "Error of the simulation", loc="left")
    if len(errors) > 1:
        _outside_legend(figure, axes)
    return figure


@styled
def roofline(profile: HardwareProfile, works: Mapping[str, Work], title: str | None = None) -> Chart:
    """Roofline of CPU, GPU and link with the speed that the profile gives each work, by name.

    The link has a bandwidth but no arithmetic: it bounds work whose weights are sent. All works must
    share a dtype; FormatError otherwise, and without works.
    """
    dtypes = {w.dtype for w in works.values()}
    if len(dtypes) != 1:
        raise FormatError(f"works have dtypes {', '.join(sorted(dtypes)) or 'none'}; a roofline is of exactly one")
    (dtype,) = dtypes
    figure, axes = chart(5.6, 3.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    intensities = [w.intensity for w in works.values() if w.intensity > 0]
    span = np.geomspace(min(*intensities, 0.5), max(*intensities, 2000), 200)
    resources: list[Resource] = ["CPU", "GPU"] if profile.has_gpu else ["CPU"]
    for resource, colour in zip(resources, (SERIES[1], SERIES[2]), strict=False):
        peak = profile.peak(resource)
        roof = np.minimum(span * peak.bytes_per_s, peak.flops_per_s.get(dtype, np.inf))
        axes.plot(span, roof, color=colour, label=f"{resource}, {peak.bytes_per_s / 1e9:.0f} GB/s")
        _work_points(axes, profile, resource, works, colour)
    if profile.has_gpu:
        link = profile.peak("H2D").bytes_per_s
        axes.plot(span, span * link, "--", color=GREY, label=f"H2D, {link / 1e9:.0f} GB/s")
        axes.set_ylim(top=profile.peak("GPU").flops_per_s.get(dtype, 1e15) * 3)
    axes.grid(True, which="major")
    axes.set_xlabel("intensity in FLOP/byte")
    axes.set_ylabel(f"speed in FLOP/s ({dtype})")
    axes.set_title(title or profile.name, loc="left")
    axes.legend(loc="lower right")
    return figure


@styled
def pareto(rows: Sequence[Row], metric: str = "decode_tok_s", title: str | None = None) -> Chart:
    """Device memory against speed: a line per policy, and the front of what no other row beats.

    FormatError if no row has `vram_bytes` and the metric.
    """
    points = [(r["vram_bytes"] / 2**30, r[metric], str(r["policy"])) for r in rows if _has(r, "vram_bytes", metric)]
    if not points:
        raise FormatError(f"no row has both 'vram_bytes' and {metric!r}; nothing to draw")
    figure, axes = chart(5.6, 3.4)
    policies = list(dict.fromkeys(policy for _, _, policy in points))
    for i, policy in enumerate(policies):
        xs, ys = zip(*sorted((x, y) for x, y, name in points if name == policy), strict=True)
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(xs, ys, marker=marker, markersize=5, color=SERIES[i % len(SERIES)], label=policy, alpha=0.9)
    front = _front([(x, y) for x, y, _ in points])
    axes.step(*zip(*front, strict=True), where="post", color=LIGHT, linewidth=6, zorder=0, label="best for its memory")
    axes.grid(True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("device memory used in GiB")
    axes.set_ylabel(_AXIS.get(metric, metric))
    axes.set_title(title or _common(rows, "model"), loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


# -- rows ---------------------------------------------------------------------------------------------


def _has(row: Row, *keys: str) -> bool:
    return all(row.get(key) is not None and row[key] == row[key] for key in keys)  # NaN: a gap in a DataFrame


def _pairs(rows: Sequence[Row], metric: str) -> list[tuple[Row, float | None, float | None]]:
    """(row, simulated, measured) of the rows that have the metric."""
    pairs: list[tuple[Row, float | None, float | None]] = []
    for row in rows:
        if _has(row, metric, f"predicted_{metric}"):
            pairs.append((row, float(row[f"predicted_{metric}"]), float(row[metric])))
        elif _has(row, metric):
            pairs.append((row, float(row[metric]), None))
    if not pairs:
        raise FormatError(
            f"no row has {metric!r}; rows have {', '.join(sorted({k for r in rows for k in r})) or 'none'}"
        )
    return pairs


def _best(pair: tuple[Row, float | None, float | None], metric: str) -> float:
    _, simulated, measured = pair
    value = measured if measured is not None else simulated
    return (value or 0.0) * (-1 if metric.endswith("_s") and not metric.endswith("tok_s") else 1)


def _note(simulated: float | None, measured: float | None) -> str:
    if simulated is None or not measured:
        return format_number(simulated or measured or 0.0)
    return f"{format_number(measured)}  ({simulated / measured - 1:+.1%})"


def _names(pairs: Sequence[tuple[Row, float | None, float | None]], key: str) -> list[str]:
    return list(dict.fromkeys(str(row.get(key, "")) for row, _, _ in pairs))


def _common(rows: Sequence[Row], key: str) -> str:
    names = list(dict.fromkeys(str(row[key]) for row in rows if key in row))
    return ", ".join(names)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats with as little or less x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _errors(comparison: Comparison) -> dict[str, float]:
    names = {"ttft_s": "TTFT", "tpot_s": "TPOT"}
    errors = {names[str(k)]: float(v) for k, v in comparison.end_to_end["error"].items() if str(k) in names}
    for table, what in ((comparison.resources, "busy"), (comparison.kinds, "tasks")):
        counted = table[table["measured_s"] > 0.01 * comparison.measured.makespan_s]
        errors |= {f"{name} {what}": float(error) for name, error in counted["error"].items()}
    return {label: error for label, error in errors.items() if error == error}  # NaN: nothing was measured


# -- axes ---------------------------------------------------------------------------------------------


def _bound(axes: Axes, rows: Sequence[Row], metric: str) -> None:
    bounds = {round(float(row[f"bound_{metric}"]), 6) for row in rows if _has(row, f"bound_{metric}")}
    if len(bounds) == 1 and (bound := bounds.pop()) < 4 * axes.get_xlim()[1]:
        axes.axvline(bound, color=BLACK, linestyle=":", linewidth=1, label="hardware bound")
        axes.set_xlim(right=max(axes.get_xlim()[1], bound * 1.08))


def _outside_legend(figure: Chart, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)


def _diagonal(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values) / 1.4, max(values) * 1.4
    line = np.array([low, high])
    axes.fill_between(line, line * 0.8, line * 1.2, color="#EEEEEE", linewidth=0, label="within 20 %")
    axes.plot(line, line, color=GREY, linewidth=1)
    for axis, set_scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        set_scale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")


def _work_points(
    axes: Axes, profile: HardwareProfile, resource: Resource, works: Mapping[str, Work], colour: str
) -> None:
    for name, work in works.items():
        if work.flops:
            speed = work.flops / profile.time_s(resource, work).seconds
            axes.plot(work.intensity, speed, "o", color=colour, markeredgecolor="white", zorder=3)
            axes.annotate(
                name,
                (work.intensity, speed),
                (0, -10),
                textcoords="offset points",
                ha="center",
                fontsize=6.5,
                bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.6},
            )
