"""A hardware profile as rows: every number, its unit, and where it comes from."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from hwmodels.calibrate import residuals
from hwmodels.profile import Curve, HardwareProfile, Peak
from hwmodels.units import format_number
from runtime.cli.table import Row, key

COLUMNS = (key("part"), key("number"), key("value"), key("unit"), key("source"))
LIST_COLUMNS = (key("name"), key("kind"), key("device"), key("cpu"), key("gpu"), key("vram"), key("ram"))


def figure_rows(profile: HardwareProfile) -> list[Row]:
    """Capacities, peaks, curves, hand-offs and contention of a profile, a row each."""
    rows = [*_capacities(profile)]
    for resource, peak in profile.peaks.items():
        rows += _peaks(resource, peak)
    rows += [_curve(curve) for curve in profile.curves]
    source = profile.sources.get("handoff_s", "measured")
    rows += [_row("hand-off", pair, s * 1e6, "µs", source) for pair, s in profile.handoff_s.items()]
    for entry in profile.contention:
        together = "+".join(entry.active)
        rows += [
            _row("contention", f"{name} in {together}", r, "of alone", entry.source) for name, r in entry.rate.items()
        ]
    return rows


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
    label = f"curve of {curve.op}, {curve.dtype}: {len(curve.samples)} points"
    if curve.source == "measured":
        label += f", spread {scatter:.0%}"
        for residual in residuals([curve]):
            label += f", a point left out is predicted within {residual.median:.0%} (worst {residual.worst:.0%})"
    return _row(curve.resource, label, fastest / 1e9, "GB/s at best", curve.source)
