"""A hardware profile as rows: every number, its unit, and where it comes from."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from hwmodels.calibrate import GOOD_MEDIAN, GOOD_WORST, residuals
from hwmodels.profile import Curve, HardwareProfile, Peak, Repeats
from hwmodels.units import format_number
from runtime.cli.table import Row, key

COLUMNS = (key("part"), key("number"), key("value"), key("unit"), key("source"))
LIST_COLUMNS = (key("name"), key("kind"), key("device"), key("cpu"), key("gpu"), key("vram"), key("ram"))


def figure_rows(profile: HardwareProfile) -> list[Row]:
    """Capacities, peaks, curves, hand-offs, contention and cold starts of a profile, a row each."""
    rows = [*_capacities(profile)]
    for resource, peak in profile.peaks.items():
        rows += _peaks(resource, peak)
    rows += [_curve(curve) for curve in profile.curves]
    source = profile.sources.get("handoff_s", "measured")
    for pair, seconds in profile.handoff_s.items():
        label = pair + _spread(profile.handoff_repeats.get(pair), 1e6, " µs")
        rows.append(_row("hand-off", label, seconds * 1e6, "µs", source))
    for entry in profile.contention:
        for name, rate in entry.rate.items():
            others = "+".join(f"{r} computing" if r in entry.computing else r for r in entry.active)
            label = f"{name} in {others}{_spread(entry.repeats.get(name), 1.0, '')}"
            rows.append(_row("contention", label, rate, "of alone", entry.source))
    for cold in profile.cold:
        label = f"no MLP's, after waiting {format_number(cold.waited_s * 1e3)} ms{_spread(cold.repeats, 1e6, ' µs')}"
        rows.append(_row("cold start", label, cold.cold_s * 1e6, "µs more", cold.source))
    for move in profile.moves:
        told = {
            f"before the copy{_spread(move.repeats, 1e6, ' µs')}": move.before_s,
            "after the copy": move.after_s,
            "more for what comes next": move.cold_s,
        }
        rows += [_row(f"move to {move.to}", label, s * 1e6, "µs", move.source) for label, s in told.items()]
    return rows


def _spread(repeats: Repeats | None, scale: float, unit: str) -> str:
    return f": {repeats.count} repeats, spread {format_number(repeats.spread * scale)}{unit}" if repeats else ""


def _row(part: str, number: str, value: float, unit: str, source: str) -> Row:
    return {"part": part, "number": number, "value": format_number(value), "unit": unit, "source": source}


def _capacities(profile: HardwareProfile) -> Iterator[Row]:
    for name, label in (("vram_bytes", "device memory"), ("host_bytes", "host memory")):
        source = profile.sources.get(name, "measured")
        yield _row("capacity", label, getattr(profile, name) / 2**30, "GiB", source)
    yield _row("capacity", "CPU threads", profile.cpu_threads, "", profile.sources.get("cpu_threads", "measured"))


def _peaks(resource: str, peak: Peak) -> Iterator[Row]:
    for dtype, rate in peak.flops_per_s.items():
        yield _row(resource, f"peak arithmetic, {dtype}", rate / 1e12, "TFLOP/s", peak.source_of(dtype))
    yield _row(resource, "peak bandwidth", peak.bytes_per_s / 1e9, "GB/s", peak.source_of("bytes_per_s"))
    yield _row(resource, "share of peak without a curve", peak.efficiency, "of peak", peak.source_of("efficiency"))
    yield _row(resource, "start of an operation", peak.fixed_s * 1e6, "µs", peak.source_of("fixed_s"))


def _curve(curve: Curve) -> Row:
    """The best that a curve's samples reach, and how they scatter."""
    fastest = max((s.weight_bytes + s.io_bytes) / s.median_s for s in curve.samples)
    scatter = statistics.median(s.spread_s / s.median_s for s in curve.samples)
    threads = f", {curve.threads} thread{'s' * (curve.threads > 1)}" if curve.threads else ""
    label = f"curve of {curve.op}, {curve.dtype}{threads}: {len(curve.samples)} points"
    if curve.source == "measured":
        repeats, far = sum(s.count for s in curve.samples), sum(s.outliers for s in curve.samples)
        label += f", {repeats} repeats, {far} of them far off, spread {scatter:.0%}"
        for residual in residuals([curve]):
            label += f", a point left out is predicted within {residual.median:.0%} (worst {residual.worst:.0%})"
    return _row(curve.resource, label, fastest / 1e9, "GB/s at best", curve.source)


def accuracy(profile: HardwareProfile) -> list[str]:
    """How well the measured curves predict points that are left out, in a sentence; another one for every bad curve."""
    found = residuals(curve for curve in profile.curves if curve.source == "measured")
    if not found:
        return []
    worst = max(found, key=lambda r: r.worst)
    heading = (
        f"Points left out of a curve are predicted within {max(r.median for r in found):.0%} in the median of every "
        f"curve, {worst.worst:.0%} at worst ({worst.curve})."
    )
    advice = "expect such errors between its points, or calibrate again on a quiet machine"
    bad = [r for r in found if r.median > GOOD_MEDIAN or r.worst > GOOD_WORST]
    return [heading, *(f"{r.curve}: {r.median:.0%} in the median, {r.worst:.0%} at worst; {advice}." for r in bad)]
