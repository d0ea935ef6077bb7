"""How much longer attention takes after its thread waited: read from stand-ins that wait for CPU and link.

In a plan that keeps all columns on the device, the thread that runs attention never rests, and what it calls stays
in its caches. Where it waits for a result of the CPU, or for weights on the link, others take these meanwhile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from hwmodels.calibrate import handoffs, repeats, trimmed_mean
from hwmodels.profile import Cold
from runtime.rounds import Effort, Measuring, Progress
from runtime.session import PlannedModel
from runtime.standin import decode_delays, generate, settled
from sim.graph import REST
from sim.timeline import Timeline

WAITING = ((0.5, 0.0, True), (0.0, 0.0, False), (0.75, 0.25, False), (0.0, 1.0, False))
"""Shares of columns that are GG and sent ahead in the stand-ins that wait, and whether their tasks overlap.

The CPU computes what is left.
"""
_N_STEPS = 3  # of a generation: where all weights are sent, each takes as long as ten others
_LEAST_S = 1e-6  # the clock's own step, and a wait that is none
_Found = list[tuple[float, float]]


def measure_cold(busy: PlannedModel, waiting: Sequence[PlannedModel], effort: Effort) -> Measuring:
    """Waits of every model that waits, and what they cost; its generations take turns with those of one that does not.

    A round gives each model's median over layers and steps of the wait, and the mean of the time beyond the same
    layer's in the busy model; the profile gets means over rounds. Hand-offs are those of the last model, which sends
    everything.
    """
    found: list[_Found] = [[] for _ in waiting]
    delays_s: dict[str, list[float]] = defaultdict(list)
    for model in (busy, *waiting):
        generate(model, n_steps=1)
    progress = Progress(effort)
    while progress.share < 1.0:
        progress.begin()
        warm_s = {layer: trimmed_mean(times_s) for layer, (_, times_s) in _by_layer(busy)[1].items()}
        for rows, model in zip(found, waiting, strict=True):
            timeline, cold = _by_layer(model)
            more_s = [s - warm_s[layer] for layer, (_, times_s) in cold.items() for s in times_s]
            waits_s = [s for waited_s, _ in cold.values() for s in waited_s]
            rows.append((median(waits_s), trimmed_mean(more_s)))
        for pair, seconds in decode_delays(model, timeline):
            delays_s[pair].append(seconds)
        yield progress.end()
    return replace(handoffs(delays_s), cold=tuple(sorted(map(_entry, found), key=lambda entry: entry.waited_s)))


def _by_layer(model: PlannedModel) -> tuple[Timeline, dict[int, tuple[list[float], list[float]]]]:
    """A generation, and by layer the waits before attention and its times."""
    timeline = generate(model, n_steps=_N_STEPS)
    found: dict[int, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for step in settled(timeline):
        for layer, (waited_s, seconds) in attention(step).items():
            found[layer][0].append(waited_s)
            found[layer][1].append(seconds)
    return timeline, found


def attention(timeline: Timeline) -> dict[int, tuple[float, float]]:
    """Wait before it, and seconds, of attention in every layer but the first; all on the device.

    A wait is what lies between it and the last task that is no MLP's, less the MLP parts that the device computed.
    """
    found: dict[int, tuple[float, float]] = {}
    since_s: float | None = None
    for span in sorted((s for s in timeline.spans if s.resource == "GPU"), key=lambda s: s.start_s):
        if span.kind == "attn" and span.layer > 0 and since_s is not None:
            found[span.layer] = max(0.0, span.start_s - since_s), span.duration_s
        if span.kind in REST:
            since_s = span.end_s
        elif since_s is not None:
            since_s += span.duration_s
    return found


def _entry(rows: _Found) -> Cold:
    waits_s, more_s = zip(*rows, strict=True)
    return Cold(max(_LEAST_S, trimmed_mean(waits_s)), max(0.0, trimmed_mean(more_s)), "measured", repeats(more_s))
