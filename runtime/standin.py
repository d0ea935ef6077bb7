"""What calibration reads from whole forward passes: attention, ends, hand-offs, copies of activations, joins.

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
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from hwmodels.calibrate import handoffs, samples
from hwmodels.profile import Curve, Resource
from hwmodels.work import Op, Work, activations
from runtime.devices import open_device
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
    """Curves of attn over tokens and depth, embed over tokens, head and sample, and hand-offs, all on one place.

    What the device's thread does between steps is left to measure_overlapped: here it has nothing to wait for.
    """
    spec = model.executor.spec
    cases: list[Case[Work | str]] = [pass_case(model, n, p, place) for n in n_tokens for p in past]
    kinds: frozenset[Kind] = BETWEEN_STEPS if place == "CPU" else frozenset()
    times = yield from in_rounds([*cases, lambda: _decode_ends(model, kinds | _HEAD)], effort)
    rows: dict[Op, dict[Work, list[list[float]]]] = defaultdict(dict)
    for key, rounds in times.items():
        if not isinstance(key, str):
            rows[key.op][key] = rounds
    threads = model.executor.device.cpu_threads if place == "CPU" else 0
    curves = (Curve(place, op, spec.dtype, threads, "measured", samples(own)) for op, own in rows.items())
    delays_s = {key: flat(rounds) for key, rounds in times.items() if isinstance(key, str)}
    return replace(handoffs(delays_s), curves=tuple(curves))


def pass_case(model: PlannedModel, n_tokens: int, past: int, place: Place) -> Case[Work | str]:
    """One forward pass: times of its attention parts on a place, and of embed where it is a prompt's."""
    spec = model.executor.spec
    usual = statistics.mode(spec.rest_bytes(i) for i in range(spec.n_layers))  # other layers scale from these

    def visit() -> Iterator[tuple[Work | str, float]]:
        for span in forward(model, n_tokens, past)[0].spans:
            if span.kind == "attn" and span.resource == place and spec.rest_bytes(span.layer) == usual:
                yield spec.attention_work(span.layer, n_tokens, past + n_tokens), span.duration_s
            elif span.kind == "embed" and n_tokens > 1:
                yield spec.small_work("embed", n_tokens), span.duration_s

    return visit


def ends_times(spec: ModelSpec, timeline: Timeline, kinds: Collection[Kind]) -> Iterator[tuple[Work, float]]:
    """Times of a decode step's ends, of some kinds, as generate runs them."""
    works = {"embed": spec.small_work("embed", 1), "head": spec.head_work(1), "sample": spec.small_work("sample", 1)}
    for span in timeline.spans:
        if span.kind in kinds and span.step not in ("prefill", "decode1"):
            yield works[span.kind], span.duration_s


def _decode_ends(model: PlannedModel, kinds: Collection[Kind]) -> Iterator[tuple[Work | str, float]]:
    """Times of a decode step's ends, and its delays."""
    timeline = generate(model)
    yield from ends_times(model.executor.spec, timeline, kinds)
    yield from _decode_delays(model, timeline)


def forward(model: PlannedModel, n_tokens: int, past: int) -> tuple[Timeline, RoutingTrace]:
    """One forward pass of n_tokens new tokens over a cache of `past` tokens.

    One token comes after another, whose pass is not recorded: so it is in decode, where the cache has grown in place.
    """
    cache, executor = DynamicCache(config=model.config), model.executor
    if past:
        for i, layer in enumerate(executor.spec.layers):
            here = executor.device.torch_device if executor.plan.layers[i].rest == "GPU" else torch.device("cpu")
            shape = (1, layer.attention.n_kv_heads, past, layer.attention.head_dim)
            keys = torch.zeros(shape, dtype=getattr(torch, executor.spec.dtype), device=here)
            cache.update(keys, keys.clone(), i)
    ids = torch.randint(0, executor.spec.vocab, (1, n_tokens), device=model.device)
    with torch.no_grad():
        if n_tokens == 1:
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        executor.begin_run()
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return executor.end_run({})


def generate(model: PlannedModel) -> Timeline:
    """A prompt of a few tokens and N_DECODE steps after it."""
    ids = torch.randint(3, model.executor.spec.vocab, (1, 8), device=model.device)
    n_gen = N_DECODE + 1
    model.generate(ids, max_new_tokens=n_gen, min_new_tokens=n_gen, do_sample=False, pad_token_id=0)
    assert model.last_timeline is not None
    return model.last_timeline


# -- hand-offs, copies of activations, joins -----------------------------------------------------------

_Found = tuple[Resource, Work] | str
"""What a resource did, or a pair of resources that a task was handed along."""


def measure_overlapped(model: PlannedModel, n_tokens: Sequence[int], effort: Effort) -> Measuring:
    """Hand-offs of decode and what lies between its steps, activation copies and joins of passes of n_tokens.

    All of an overlapping plan: where the device waits for nothing, its calls between steps are 5 to 30 % faster.
    Of n_tokens only powers of two are run: nothing here changes from one token to the next.
    """
    spec = model.executor.spec
    cases: list[Case[_Found]] = [_overlapped_case(model, n) for n in n_tokens if n & (n - 1) == 0]
    times = yield from in_rounds([*cases, lambda: _between_steps(model)], effort)
    delays_s = {key: flat(rounds) for key, rounds in times.items() if isinstance(key, str)}
    rows: dict[tuple[Resource, Op], dict[Work, list[list[float]]]] = defaultdict(dict)
    for key, rounds in times.items():
        if not isinstance(key, str):
            resource, work = key
            rows[resource, work.op][work] = rounds
    curves = (Curve(r, op, spec.dtype, 0, "measured", samples(own)) for (r, op), own in rows.items())
    return replace(handoffs(delays_s), curves=tuple(curves))


def _between_steps(model: PlannedModel) -> Iterator[tuple[_Found, float]]:
    timeline = generate(model)
    yield from ((("GPU", work), s) for work, s in ends_times(model.executor.spec, timeline, BETWEEN_STEPS))
    yield from _decode_delays(model, timeline)


def _overlapped_case(model: PlannedModel, n_tokens: int) -> Case[_Found]:
    spec = model.executor.spec

    def visit() -> Iterator[tuple[_Found, float]]:
        for span in forward(model, n_tokens, 0)[0].spans:
            if span.kind in ("act_d2h", "act_h2d"):
                yield (span.resource, activations(span.bytes, spec.dtype)), span.duration_s
            elif span.kind == "join":
                yield ("GPU", spec.small_work("join", n_tokens * N_PARTIAL)), span.duration_s

    return visit


def _decode_delays(model: PlannedModel, timeline: Timeline) -> Iterator[tuple[str, float]]:
    """Delays of the decode steps of a generation that has just run, the first one left out."""
    assert model.last_routing is not None
    for number in range(2, N_DECODE):
        step = Step(f"decode{number}", 1, N_DECODE + number)
        yield from step_delays(model, step, timeline, model.last_routing)


def step_delays(
    model: PlannedModel, step: Step, timeline: Timeline, trace: RoutingTrace
) -> Iterator[tuple[str, float]]:
    """Delays of a step that ran."""
    executor = model.executor
    graph = compile_step(executor.spec, executor.plan, step, lambda s, layer: trace.counts[s.name, layer])
    return delays(graph, timeline)


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
