"""What calibration reads from a model whose layers are the device's and the CPU's by turns, its ends the CPU's.

A hidden state that changes place is handed on by Python, and the thread that follows it to the device finds nothing
in that core's caches: both cost more than a hand-off between tasks of one layer (experiments/LOG.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

from hwmodels.calibrate import Part, repeats, samples, trimmed_mean
from hwmodels.profile import Curve, Move
from hwmodels.work import Op, Work, apart
from runtime.rounds import Case, Effort, Measuring, flat, in_rounds
from runtime.session import PlannedModel
from runtime.standin import decode_attention, ends_times, generate, settled
from sim.graph import MOVES
from sim.timeline import Timeline

_Place = Literal["CPU", "GPU"]
_Key = Work | str


def measure_by_turns(model: PlannedModel, busy: PlannedModel, past: Sequence[int], effort: Effort) -> Measuring:
    """Curves of one token's attention, embedding and head on the CPU, and what it takes to change place.

    How much longer attention takes on the device after a change is relative to `busy`, which never leaves it.
    """
    spec, device = model.executor.spec, model.executor.device
    cases: list[Case[_Key]] = [partial(_decode, model, busy, p, p == min(past)) for p in past]
    times = yield from in_rounds(cases, effort)
    rows: dict[Op, dict[Work, list[list[float]]]] = defaultdict(dict)
    moved_s: dict[str, list[float]] = {}
    for key, rounds in times.items():
        if isinstance(key, Work):
            rows[key.op][key] = rounds
        else:
            moved_s[key] = flat(rounds)
    curves = (Curve("CPU", op, spec.dtype, device.cpu_threads, "measured", samples(own)) for op, own in rows.items())
    places: tuple[_Place, ...] = ("CPU", "GPU")
    return Part(tuple(curves), moves=tuple(_move(place, moved_s) for place in places))


def _decode(model: PlannedModel, busy: PlannedModel, past: int, with_moves: bool) -> Iterator[tuple[_Key, float]]:
    """A generation: times of one token on the CPU; and if so asked, what its ends and changes of place take."""
    spec, timeline = model.executor.spec, generate(model, past)
    yield from ((apart(work), s) for work, s in decode_attention(spec, timeline, past, "CPU"))
    if not with_moves:
        return
    yield from ((apart(work), s) for work, s in ends_times(spec, timeline, ("embed", "head")))
    usual_s = [s.duration_s for step in settled(generate(busy)) for s in step.spans if s.kind == "attn" and s.layer > 0]
    for step in settled(timeline):
        yield from moves(step, trimmed_mean(usual_s))


def moves(timeline: Timeline, usual_s: float) -> Iterator[tuple[str, float]]:
    """Waits before and after every change of place, and how much longer than usual attention on the device takes then.

    In a step whose tasks run one after the other; named after the place, as in "GPU before", "GPU after", "GPU cold".
    """
    spans = sorted(timeline.spans, key=lambda s: (s.start_s, s.end_s))
    for place, kind in MOVES.items():
        for before, copy, after in zip(spans, spans[1:], spans[2:], strict=False):
            if copy.kind == kind:
                yield f"{place} before", copy.start_s - before.end_s
                yield f"{place} after", after.start_s - copy.end_s
                if place == "GPU" and after.kind == "attn":
                    yield f"{place} cold", after.duration_s - usual_s


def _move(place: _Place, found_s: dict[str, list[float]]) -> Move:
    before, after = found_s[f"{place} before"], found_s[f"{place} after"]
    cold = found_s.get(f"{place} cold", [0.0])
    before_s, after_s, cold_s = (max(0.0, trimmed_mean(found)) for found in (before, after, cold))
    return Move(place, before_s, after_s, cold_s, "measured", repeats(before))
