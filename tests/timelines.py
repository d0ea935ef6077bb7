"""Made-up timelines of a model of eight layers."""

from __future__ import annotations

from typing import Any

from hwmodels.profile import Resource
from sim.timeline import SourceName, Span, Timeline


def timeline(
    source: SourceName, unit_s: float, steps: tuple[str, ...] = ("prefill", "decode1"), **info: Any
) -> Timeline:
    # per layer: |attn| then |cc| on the CPU beside |send|gg| on link and device; a layer takes 4 units
    spans, now = [], 100.0
    for step in steps:
        for layer in range(8):
            for kind, resource, start, end in (
                ("attn", "GPU", 0, 1),
                ("cc", "CPU", 1, 4),
                ("send", "H2D", 1, 3),
                ("gg", "GPU", 1, 2),
                ("act_d2h", "D2H", 1, 1.001),
            ):
                spans.append(span(step, layer, kind, resource, now + start * unit_s, now + end * unit_s))
            now += 4 * unit_s
    return Timeline(source, tuple(spans), info)


def span(step: str, layer: int, kind: str, resource: Resource | str, start_s: float, end_s: float) -> Span:
    return Span(f"{step}.L{layer}.{kind}", kind, resource, step, layer, start_s, end_s)  # type: ignore[arg-type]


SIMULATED, MEASURED = timeline("simulated", 0.001), timeline("measured", 0.00125)
