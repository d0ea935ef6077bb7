"""What calibration reads from whole steps: attention, ends, hand-offs, copies of activations, joins.

A model of the same shapes with random weights and few layers stands for the real one. Its passes are run
by the executor; the spans of its timelines are the measurements.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from hwmodels.calibrate import handoffs, samples, slowness_of
from hwmodels.profile import Curve, Resource
from hwmodels.work import Op, Work, activations
from runtime.devices import open_device
from runtime.kv import grow_in_place
from runtime.rounds import Case, Effort, Measuring, flat, in_rounds
from runtime.session import PlannedModel
from runtime.synthetic import random_model, uniform_plan
from sim.compile import compile_step
from sim.graph import Kind, TaskGraph
from sim.model import ModelSpec, from_config
from sim.plan import Place
from sim.timeline import Timeline
from sim.workload import RoutingTrace, Step

N_PARTIAL = 3  # the overlapping run joins GG, CG and CC
N_DECODE = 8
_N_PROMPT = 8
_FAR = 1 << 24  # tokens: beyond any window
_HEAD: frozenset[Kind] = frozenset(("head",))
BETWEEN_STEPS: frozenset[Kind] = frozenset(("embed", "sample"))
"""What is called once a step: all that a step does has gone through the caches since."""


@dataclass(frozen=True)
class StandIn:
    """A stand-in to build: its config, where its attention lives, shares of columns that are GG and sent ahead.

    Without overlap its tasks run one after the other. by_turns: every second layer and the ends are the CPU's.
    """

    config: Mapping[str, Any]
    place: Place
    gg_share: float
    ahead_share: float
    n_ctx: int
    device: str
    device_bytes: int
    cpu_threads: int | None
    overlap: bool = True
    by_turns: bool = False


@contextmanager
def built(stand_in: StandIn) -> Iterator[PlannedModel]:
    """The model with random weights, closed at the end."""
    s = stand_in
    spec = from_config(s.config, "stand-in")
    plan = uniform_plan(spec, s.place, s.gg_share, s.ahead_share, s.n_ctx, s.device_bytes, s.overlap, s.by_turns)
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(s.config, Path(folder), plan, open_device(s.device, s.device_bytes, s.cpu_threads))
    try:
        yield model
    finally:
        model.close()


# -- attention and the ends of a step -----------------------------------------------------------------


def measure_rest(
    model: PlannedModel, place: Place, n_tokens: Sequence[int], past: Sequence[int], effort: Effort
) -> Measuring:
    """Curves of attn over tokens and depth, embed and head over tokens, sample, and hand-offs, all on one place.

    What the device's thread does between steps is left to measure_overlapped: here it has nothing to wait for.
    """
    spec = model.executor.spec
    kinds: frozenset[Kind] = BETWEEN_STEPS | _HEAD if place == "CPU" else _HEAD
    cases: list[Case[Work | str]] = [_pass_case(model, n, p, place) for n in n_tokens if n > 1 for p in past]
    cases += [partial(_decode, model, p, place, kinds if p == min(past) else None) for p in past]
    times = yield from in_rounds(cases, effort)
    rows: dict[Op, dict[Work, list[list[float]]]] = defaultdict(dict)
    for key, rounds in times.items():
        if not isinstance(key, str):
            rows[key.op][key] = rounds
    # One for all: what is timed once in a pass, as embed is, tells a slice's slowness badly.
    slowness = slowness_of({key: rounds for own in rows.values() for key, rounds in own.items()})
    threads = model.executor.device.cpu_threads if place == "CPU" else 0
    curves = (Curve(place, op, spec.dtype, threads, "measured", samples(own, slowness)) for op, own in rows.items())
    delays_s = {key: flat(rounds) for key, rounds in times.items() if isinstance(key, str)}
    return replace(handoffs(delays_s), curves=tuple(curves))


def _pass_case(model: PlannedModel, n_tokens: int, past: int, place: Place) -> Case[Work | str]:
    """A forward pass of more than one token: times of its attention parts on a place, of embed and of head."""
    spec = model.executor.spec
    ends = {"embed": spec.small_work("embed", n_tokens), "head": spec.head_work(1, n_tokens)}

    def visit() -> Iterator[tuple[Work | str, float]]:
        timeline, _ = forward(model, n_tokens, past)
        whole = with_gaps(timeline) if place == "CPU" else timeline
        yield from _attention_times(spec, whole, n_tokens, past, place)
        yield from ((ends[s.kind], s.duration_s) for s in timeline.spans if s.kind in ends)

    return visit


def with_gaps(timeline: Timeline) -> Timeline:
    """A pass of the CPU alone in which attention lasts from the end of what ran before it to the start of its MLP.

    Hand-offs between tasks of the CPU are decode's, where one native call holds many; here layers are begun in between.
    """
    spans = sorted(timeline.spans, key=lambda s: s.start_s)
    for i, span in enumerate(spans[1:-1], 1):
        if span.kind == "attn":
            spans[i] = replace(span, start_s=spans[i - 1].end_s, end_s=spans[i + 1].start_s)
    return replace(timeline, spans=tuple(spans))


def _decode(
    model: PlannedModel, past: int, place: Place, kinds: Collection[Kind] | None
) -> Iterator[tuple[Work | str, float]]:
    """A generation: times of one token's attention parts, and of ends of these kinds and delays, unless it is None."""
    timeline = generate(model, past)
    yield from decode_attention(model.executor.spec, timeline, past, place)
    if kinds is not None:
        yield from ends_times(model.executor.spec, timeline, kinds)
        yield from decode_delays(model, timeline)


def decode_attention(spec: ModelSpec, timeline: Timeline, past: int, place: Place) -> Iterator[tuple[Work, float]]:
    """Times of attention parts on a place, of the decode steps of a generation over `past` tokens."""
    for step in settled(timeline):
        yield from _attention_times(spec, step, 1, past, place)


def _attention_times(
    spec: ModelSpec, timeline: Timeline, n_tokens: int, past: int, place: Place
) -> Iterator[tuple[Work, float]]:
    spans = [s for s in timeline.spans if s.kind == "attn" and s.resource == place]
    usual = _usual_layers(spec, {s.layer for s in spans})
    for span in spans:
        if span.layer in usual:
            yield spec.attention_work(span.layer, n_tokens, past + n_tokens), span.duration_s


def _usual_layers(spec: ModelSpec, layers: Collection[int]) -> set[int]:
    """Of some layers those that other layers' times scale from: of the commonest size, without windows if any are.

    A curve holds one sample per number of tokens and bytes of the cache: of a prompt a window changes neither.
    """
    size = statistics.mode(spec.rest_bytes(i) for i in range(spec.n_layers))
    read = {i: spec.layers[i].attention.read_elements(_FAR, 1) for i in layers if spec.rest_bytes(i) == size}
    most = max(read.values(), default=0)
    return {i for i, elements in read.items() if elements == most}


def ends_times(spec: ModelSpec, timeline: Timeline, kinds: Collection[Kind]) -> Iterator[tuple[Work, float]]:
    """Times of a decode step's ends, of some kinds, as generate runs them."""
    works = {"embed": spec.small_work("embed", 1), "head": spec.head_work(1), "sample": spec.small_work("sample", 1)}
    for step in settled(timeline):
        yield from ((works[span.kind], span.duration_s) for span in step.spans if span.kind in kinds)


def settled(timeline: Timeline) -> list[Timeline]:
    """The decode steps of a generation but for the first, which comes upon what the prompt left."""
    return [timeline.step(name) for name in timeline.steps if name.startswith("decode") and name != "decode1"]


def forward(model: PlannedModel, n_tokens: int, past: int) -> tuple[Timeline, RoutingTrace]:
    """One forward pass of n_tokens new tokens over a cache of `past` tokens."""
    cache, executor = _cache(model, past), model.executor
    ids = torch.randint(0, executor.spec.vocab, (1, n_tokens), device=model.device)
    executor.begin_run()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return executor.end_run({})


def generate(model: PlannedModel, past: int = 0, n_steps: int = N_DECODE) -> Timeline:
    """A prompt of a few tokens and decode steps after it, of which the middle one sees some `past` tokens.

    One token is timed so, not in passes of its own: what generate does between steps, and what the device's thread
    waits for in them, leaves other things in the caches (experiments/LOG.md, "One token as a generation runs it").
    """
    held = max(0, past - _N_PROMPT - n_steps // 2)
    ids = torch.randint(3, model.executor.spec.vocab, (1, held + _N_PROMPT), device=model.device)
    model.generate(
        ids,
        past_key_values=_cache(model, held),
        max_new_tokens=n_steps + 1,
        min_new_tokens=n_steps + 1,
        do_sample=False,
        pad_token_id=0,
    )
    assert model.last_timeline is not None
    return model.last_timeline


def _cache(model: PlannedModel, n_tokens: int) -> DynamicCache:
    """A cache that holds so many tokens, each layer's where its attention is."""
    cache, executor = DynamicCache(config=model.config), model.executor
    if n_tokens and any(layer.attention.absorbed_pair_flops is not None for layer in executor.spec.layers):
        return _continued(model, cache, n_tokens)
    with torch.no_grad():
        grow_in_place(cache, executor.most_tokens(1))  # so that no pass copies a long past first
    for i, layer in enumerate(executor.spec.layers if n_tokens else ()):
        here = executor.device.torch_device if executor.plan.layers[i].rest == "GPU" else torch.device("cpu")
        shape = (1, layer.attention.n_kv_heads, n_tokens, layer.attention.head_dim)
        keys = torch.zeros(shape, dtype=getattr(torch, executor.spec.dtype), device=here)
        cache.update(keys, keys.clone(), i)
    return cache


def _continued(model: PlannedModel, cache: DynamicCache, n_tokens: int) -> DynamicCache:
    """The same of latent attention: what of it is cached differs between versions of transformers, a token shows it."""
    with torch.no_grad():
        model(torch.zeros((1, 1), dtype=torch.int64, device=model.device), past_key_values=cache, use_cache=True)
    for i, layer in enumerate(cache.layers):
        assert isinstance(layer, CacheLayerMixin)
        assert layer.keys is not None
        assert layer.values is not None
        keys, values = (t.new_zeros((*t.shape[:2], n_tokens - 1, t.shape[3])) for t in (layer.keys, layer.values))
        cache.update(keys, values, i)
    return cache


# -- hand-offs, copies of activations, joins -----------------------------------------------------------

_Found = tuple[Resource, Work] | str
"""What a resource did, or a pair of resources that a task was handed along."""


def measure_overlapped(model: PlannedModel, unsent: PlannedModel, n_tokens: Sequence[int], effort: Effort) -> Measuring:
    """Hand-offs of decode and what lies between its steps, activation copies and joins of passes of n_tokens.

    All of overlapping plans: where the device waits for nothing, its calls between steps are 5 to 30 % faster. What
    lies between steps is that of `unsent`, which sends no weights: making a send takes half an embedding's time, and
    where there are sends the link decides.
    Of n_tokens only powers of two are run: nothing here changes from one token to the next. From 32 on also what lies
    between them: partial results leave one cache after the other there, and joins bend.
    """
    spec = model.executor.spec
    powers = [n for n in n_tokens if n & (n - 1) == 0]
    between = [n * 3 // 2 for n in powers if 32 <= n < max(powers)]
    cases: list[Case[_Found]] = [_overlapped_case(model, n) for n in sorted(powers + between)]
    times = yield from in_rounds([*cases, lambda: _between_steps(model, unsent)], effort)
    delays_s = {key: flat(rounds) for key, rounds in times.items() if isinstance(key, str)}
    rows: dict[tuple[Resource, Op], dict[Work, list[list[float]]]] = defaultdict(dict)
    for key, rounds in times.items():
        if not isinstance(key, str):
            resource, work = key
            rows[resource, work.op][work] = rounds
    curves = (Curve(r, op, spec.dtype, 0, "measured", samples(own)) for (r, op), own in rows.items())
    return replace(handoffs(delays_s), curves=tuple(curves))


def _between_steps(model: PlannedModel, unsent: PlannedModel) -> Iterator[tuple[_Found, float]]:
    yield from ((("GPU", work), s) for work, s in ends_times(model.executor.spec, generate(unsent), BETWEEN_STEPS))
    yield from decode_delays(model, generate(model))


def _overlapped_case(model: PlannedModel, n_tokens: int) -> Case[_Found]:
    spec = model.executor.spec

    def visit() -> Iterator[tuple[_Found, float]]:
        for span in forward(model, n_tokens, 0)[0].spans:
            if span.kind in ("act_d2h", "act_h2d"):
                yield (span.resource, activations(span.bytes, spec.dtype)), span.duration_s
            elif span.kind == "join":
                yield ("GPU", spec.small_work("join", n_tokens * N_PARTIAL)), span.duration_s

    return visit


def decode_delays(model: PlannedModel, timeline: Timeline) -> Iterator[tuple[str, float]]:
    """Delays of the decode steps of a generation that has just run, the first one left out."""
    trace, executor = model.last_routing, model.executor
    assert trace is not None
    for own in settled(timeline):
        (name,) = own.steps
        step = Step(name, 1, _N_PROMPT + int(name.removeprefix("decode")))
        graph = compile_step(executor.spec, executor.plan, step, lambda s, layer: trace.counts[s.name, layer])
        yield from delays(graph, own)


def delays(graph: TaskGraph, timeline: Timeline) -> Iterator[tuple[str, float]]:
    """("FROM>TO", seconds) for tasks that waited for a dependency and not for their resource."""
    span_of = {s.task: s for s in timeline.spans}
    free_s: dict[str, float] = {}
    for task in graph.tasks:
        span = span_of.get(task.id)
        if span is None:
            continue
        known = [span_of[d] for d in task.deps if d in span_of]
        if known:
            last = max(known, key=lambda s: s.end_s)
            if last.end_s >= free_s.get(task.resource, 0.0):
                yield f"{last.resource}>{task.resource}", span.start_s - last.end_s
        free_s[task.resource] = max(free_s.get(task.resource, 0.0), span.end_s)
