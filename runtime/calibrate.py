"""calibrate(): measure a hardware profile through the executor, for the shapes of one model.

rest     embedding, attention, head and sampling: a model of the same shapes with random weights and
         few layers, run by the executor with everything on the device, then with everything on the CPU
ffn      MLP parts over width and tokens, on CPU and GPU
copies   H2D and D2H over sizes, pinned and pageable
together CPU, GPU and H2D at work at once: the contention table
handoff  delays between tasks of different resources, read from an overlapping run
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache
from transformers.activations import ACT2FN

from hwmodels.calibrate import fastest, handoffs, summarise
from hwmodels.load import LoadMeter
from hwmodels.machine import fingerprint
from hwmodels.profile import RESOURCES, Contention, Curve, HardwareProfile, Resource, Sample
from hwmodels.work import Op, Work, copy
from runtime.adapter import Adapter
from runtime.checkpoint import read_config
from runtime.devices import device_name, open_device
from runtime.microbench import MicroBench
from runtime.session import PlannedModel
from runtime.synthetic import DEFAULT_CONFIG, random_model, shrunk, uniform_plan
from sim.compile import compile_step
from sim.graph import TaskGraph
from sim.model import ModelSpec, from_config
from sim.plan import Place
from sim.timeline import Timeline
from sim.workload import Step

_CALIBRATION_BYTES = 768 << 20  # weights of the model that stands for the real one
_COPY_BYTES = (1 << 20, 1 << 22, 1 << 24)  # smaller copies are read from an overlapping run, where caches are cold
N_PARTIAL = 3  # the overlapping run joins GG, CG and CC
_SETS: tuple[tuple[Resource, ...], ...] = (("CPU", "GPU"), ("CPU", "H2D"), ("GPU", "H2D"), ("CPU", "GPU", "H2D"))


@dataclass(frozen=True)
class Grid:
    """What is measured: tokens of a step, tokens in the cache before it, repetitions."""

    n_tokens: tuple[int, ...]
    past: tuple[int, ...]
    repetitions: int
    together_s: float


QUICK = Grid((1, 4, 16, 64, 256), (0, 256), 3, 0.15)
FULL = Grid((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (0, 128, 512, 2048), 7, 0.5)


def calibrate(
    folder: Path | None = None,
    device: str = "auto",
    quick: bool = False,
    cpu_threads: int | None = None,
    progress: bool = True,
    dtype: str = "auto",
) -> HardwareProfile:
    """Measure this machine for the shapes of a checkpoint's config (None: a small Llama's).

    Takes under a minute with quick. dtype is the config's unless given. Raises ModelError for a config
    that is not supported, PlanError for a device that is not here.
    """
    config = dict(read_config(folder)) if folder is not None else dict(DEFAULT_CONFIG)
    config |= {"dtype": dtype} if dtype != "auto" else {}
    name = folder.name if folder is not None else "default-shape"
    spec, device = Adapter.of(config, name).spec, device_name(device)
    grid = _within(QUICK if quick else FULL, spec)
    small = shrunk(config, _CALIBRATION_BYTES)
    curves: list[Curve] = []
    meter = LoadMeter.start()
    with tqdm(total=6, desc=f"calibrate for {name}", unit="part", disable=not progress, leave=False) as bar:
        for place in ("GPU", "CPU"):
            bar.set_postfix_str(f"attention and head on the {place}")
            with _model(small, place, 1.0, 0.0, grid, device, cpu_threads) as model:
                curves += _rest_curves(model, place, grid)
            bar.update()
        bar.set_postfix_str("hand-offs")
        with _model(small, "GPU", 0.25, 0.125, grid, device, cpu_threads) as model:
            handoff_s = handoffs(_delays(model))
            small_copies, joins = _overlapped_samples(model, grid)
        bar.update()
        micro, contention, threads = _micro(spec, str(config.get("hidden_act", "silu")), grid, device, cpu_threads, bar)
    curves += [_with_samples(c, small_copies.get((c.resource, c.op), [])) for c in micro] + [joins]
    return HardwareProfile(
        name=f"{device.partition(':')[0]}-{name}",
        device="emulated" if device == "emulated" else "cuda",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprint={**fingerprint(), **_versions(device), "others_load": _percent(meter.others())},
        vram_bytes=device_bytes(device),
        host_bytes=host_bytes(),
        cpu_threads=threads,
        peaks={r: fastest(curves, r) for r in RESOURCES},
        curves=tuple(curves),
        handoff_s=handoff_s,
        contention=tuple(contention),
    )


def _within(grid: Grid, spec: ModelSpec) -> Grid:
    most = spec.max_positions
    n_tokens = tuple(n for n in grid.n_tokens if n <= most // 2)
    past = tuple(p for p in grid.past if p + max(n_tokens) <= most)
    return Grid(n_tokens, past, grid.repetitions, grid.together_s)


def host_bytes() -> int:
    """Bytes of physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_bytes(device: str) -> int:
    """Bytes of device memory: the GPU's, or half the host's for an emulated device."""
    if device == "emulated":
        return host_bytes() // 2
    return int(torch.cuda.get_device_properties(torch.device(device)).total_memory)


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.0%}"


def _versions(device: str) -> dict[str, str]:
    found: dict[str, str] = {"torch": str(torch.__version__)}
    if device != "emulated":
        properties = torch.cuda.get_device_properties(torch.device(device))
        found |= {"gpu": properties.name, "cuda": str(torch.version.cuda)}
        found["gpu_memory_bytes"] = str(properties.total_memory)
    return found


# -- the part of a step that is not MLPs ---------------------------------------------------------------


@contextmanager
def _model(
    config: Mapping[str, Any],
    place: Place,
    gg_share: float,
    ahead_share: float,
    grid: Grid,
    device: str,
    cpu_threads: int | None,
) -> Iterator[PlannedModel]:
    """A stand-in model with random weights, closed at the end."""
    spec = from_config(config, "stand-in")
    n_ctx = max(grid.n_tokens) + max(grid.past) + 16
    plan = uniform_plan(spec, place, gg_share, ahead_share, n_ctx, device_bytes(device))
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(config, Path(folder), plan, open_device(device, plan.vram_budget_bytes, cpu_threads))
    try:
        yield model
    finally:
        model.close()


def _rest_curves(model: PlannedModel, place: Place, grid: Grid) -> list[Curve]:
    """Curves of attn, embed, head and sample from the spans of real forward passes."""
    spec = model.executor.spec
    times: dict[tuple[Op, Work], list[float]] = defaultdict(list)
    for repetition in range(grid.repetitions + 1):  # rounds outermost: a disturbance touches one of each case
        for n_tokens in grid.n_tokens:
            for past in grid.past:
                timeline = _forward(model, n_tokens, past)
                if repetition:  # the first round warms up
                    _collect(times, spec, timeline, n_tokens, past)
    times.update(_generate_times(model))
    samples: dict[Op, list[Sample]] = defaultdict(list)
    for (op, work), seconds in times.items():
        samples[op].append(summarise(work, seconds))
    threads = model.executor.device.cpu_threads if place == "CPU" else 0
    return [Curve(place, op, spec.dtype, threads, "measured", tuple(rows)) for op, rows in samples.items()]


def _forward(model: PlannedModel, n_tokens: int, past: int) -> Timeline:
    """One forward pass of n_tokens new tokens over a cache of `past` tokens."""
    cache, executor = DynamicCache(config=model.config), model.executor
    if past:
        for i, layer in enumerate(executor.spec.layers):
            here = executor.device.torch_device if executor.plan.layers[i].rest == "GPU" else torch.device("cpu")
            shape = (1, layer.attention.n_kv_heads, past, layer.attention.head_dim)
            keys = torch.zeros(shape, dtype=getattr(torch, executor.spec.dtype), device=here)
            cache.update(keys, keys.clone(), i)
    ids = torch.randint(0, executor.spec.vocab, (1, n_tokens), device=model.device)
    executor.begin_run()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return executor.end_run({})[0]


def _collect(
    times: dict[tuple[Op, Work], list[float]], spec: ModelSpec, timeline: Timeline, n_tokens: int, past: int
) -> None:
    usual = statistics.mode(spec.rest_bytes(i) for i in range(spec.n_layers))  # other layers scale from these
    for span in timeline.spans:
        if span.kind == "attn" and spec.rest_bytes(span.layer) == usual:
            times["attn", spec.attention_work(span.layer, n_tokens, past + n_tokens)].append(span.duration_s)
        elif span.kind == "embed":
            times["embed", spec.small_work("embed", n_tokens)].append(span.duration_s)
        elif span.kind == "head":
            times["head", spec.head_work(1)].append(span.duration_s)


def _generate_times(model: PlannedModel) -> dict[tuple[Op, Work], list[float]]:
    """Times of a decode step's ends as generate runs them: embed, head and the loop between steps."""
    spec = model.executor.spec
    ids = torch.randint(3, spec.vocab, (1, 8), device=model.device)
    timeline = _generate(model, ids, 14)
    demands: dict[str, tuple[Op, Work]] = {
        "embed": ("embed", spec.small_work("embed", 1)),
        "head": ("head", spec.head_work(1)),
        "sample": ("sample", spec.small_work("sample", 1)),
    }
    found: dict[tuple[Op, Work], list[float]] = defaultdict(list)
    for span in timeline.spans:
        if span.kind in demands and span.step not in ("prefill", "decode1"):
            found[demands[span.kind]].append(span.duration_s)
    return found


def _generate(model: PlannedModel, ids: torch.Tensor, n_gen: int) -> Timeline:
    model.generate(ids, max_new_tokens=n_gen, min_new_tokens=n_gen, do_sample=False, pad_token_id=0)
    assert model.last_timeline is not None
    return model.last_timeline


# -- hand-offs ----------------------------------------------------------------------------------------


def _delays(model: PlannedModel) -> dict[str, list[float]]:
    """Delays between the end of a task's last dependency and its start, where nothing else held it back."""
    ids = torch.randint(3, model.executor.spec.vocab, (1, 8), device=model.device)
    timeline = _generate(model, ids, 8)
    trace = model.last_routing
    assert trace is not None
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(2, 8):
        step = Step(f"decode{number}", 1, 8 + number)
        graph = compile_step(
            model.executor.spec, model.executor.plan, step, lambda s, layer: trace.counts[s.name, layer]
        )
        for pair, delay_s in delays(graph, timeline):
            found[pair].append(delay_s)
    return found


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


def _overlapped_samples(model: PlannedModel, grid: Grid) -> tuple[dict[tuple[Resource, Op], list[Sample]], Curve]:
    """Samples of activation copies, by resource, and the curve of joins, from overlapping forward passes."""
    spec = model.executor.spec
    copies: dict[tuple[Resource, Work], list[float]] = defaultdict(list)
    joins: dict[Work, list[float]] = defaultdict(list)
    for repetition in range(grid.repetitions + 1):
        for n_tokens in grid.n_tokens:
            timeline = _forward(model, n_tokens, 0)
            for span in timeline.spans if repetition else ():
                if span.kind in ("act_d2h", "act_h2d"):
                    copies[span.resource, copy(span.bytes, spec.dtype)].append(span.duration_s)
                elif span.kind == "join":
                    joins[spec.small_work("join", n_tokens * N_PARTIAL)].append(span.duration_s)
    found: dict[tuple[Resource, Op], list[Sample]] = defaultdict(list)
    for (resource, work), seconds in copies.items():
        if work.io_bytes < _COPY_BYTES[0]:
            found[resource, "pinned"].append(summarise(work, seconds))
    rows = tuple(summarise(work, seconds) for work, seconds in joins.items())
    return found, Curve("GPU", "join", spec.dtype, 0, "measured", rows)


def _with_samples(curve: Curve, samples: list[Sample]) -> Curve:
    return replace(curve, samples=(*samples, *curve.samples))


# -- micro-benchmarks ---------------------------------------------------------------------------------


def _micro(
    spec: ModelSpec, act: str, grid: Grid, device: str, cpu_threads: int | None, bar: tqdm[Any]
) -> tuple[list[Curve], list[Contention], int]:
    opened = open_device(device, device_bytes(device), cpu_threads)
    try:
        bench = MicroBench(spec, opened, ACT2FN[act], grid.repetitions)
        columns = sorted({max(1, bench.columns // 8), max(1, bench.columns // 2), bench.columns})
        curves = []
        bar.set_postfix_str("MLP parts")
        for resource in ("CPU", "GPU"):
            curves.append(bench.ffn_curve(resource, grid.n_tokens, columns))
        bar.update()
        bar.set_postfix_str("copies")
        for link in ("H2D", "D2H"):
            curves.append(bench.copy_curve(link, _COPY_BYTES, pinned=True))
        curves.append(bench.copy_curve("H2D", _COPY_BYTES, pinned=False))
        bar.update()
        bar.set_postfix_str("resources together")
        together = bench.contention(_SETS, grid.together_s)
        bar.update()
        return curves, together, opened.cpu_threads
    finally:
        opened.close()
