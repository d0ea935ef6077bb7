"""What no plan can beat on a machine: a lower bound of simulated time, by weak duality.

Claim. For every plan that fits the budget, the mean simulated time of a set of steps is at least `bound`'s.

Proof. Take any plan and any step of the set.
1.  A layer's cc, gg and cg tasks run between the end of its attention and the start of its join (of the next
    task of the chain, on the CPU), and these gaps are disjoint. With A the seconds of the chain (embedding,
    attention, joins, head, sampling), C those of all cc tasks, G of all gg and cg tasks, S of all sends:
    T >= A + C, T >= A + G (one CPU, one GPU) and T >= S (one link). Contention and hand-offs only add.
2.  So T >= c (A + C) + g (A + G) + s S for any c, g, s >= 0 with c + g + s = 1. This is linear: it holds for
    the mean over steps, too.
3.  The plan fits: M <= B, so that adding m (M - B) for any m >= 0 does not raise the right side. What
    remains is a sum over layers (where attention lives), columns (resident or not) and columns in a step
    (CPU or link and GPU). Taking the cheapest choice for each on its own can only lower it.
4.  An MLP part of k columns takes at least k times a floor per column, a copy at least a floor per byte
    (`_per_column_s`, `_per_byte_s`): between two nodes of a curve time over roofline is at least the smaller
    of the nodes' ratios (hwmodels.interpolate), and beyond its nodes the profile scales by the roofline. So
    the least ratio over the nodes holds everywhere.
5.  A plan with an expert cache changes what is resident from step to step. Let residency count at the start of
    each step: there M <= B holds as well. An expert that is not resident and is at the start of the next step
    was sent between (s times its bytes, in S), and may have been computed from that same send. What remains
    for every expert is a shortest path over the steps with two states, resident or not, which begins in either
    for nothing (`_Moving`). With one step nothing changes hands, so that prefill's bound needs no such care.
The bound is the largest value found over the multipliers; each of them proves it. A plan that leaves the device
alone needs no activations on it, the exception to 3.: A + C with everything on the CPU bounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hwmodels.profile import HardwareProfile, Resource
from hwmodels.work import DTYPE_BYTES, Op
from sim.memory import activation_bytes, ends_bytes
from sim.model import ModelSpec
from sim.plan import Place
from sim.simulate import routing_of
from sim.workload import Step, Workload

Floats = NDArray[np.float64]
_PLACES: tuple[Literal["CPU", "GPU"], ...] = ("CPU", "GPU")
_MOST_STEPS = 128
_SHAPE_TOLERANCE = 1.02  # a curve over tokens alone answers for weights up to 2 % larger than measured


@dataclass(frozen=True)
class Bound:
    """Seconds that no plan goes below, and tokens per second of all sequences that none exceeds.

    prefill_binds, decode_binds name the resource that the bound rests on most. Without decode steps
    decode_s, decode_tok_s are 0 and decode_binds is "GPU" or "CPU" as prefill's.
    """

    prefill_s: float
    decode_s: float
    prefill_tok_s: float
    decode_tok_s: float
    prefill_binds: Resource
    decode_binds: Resource

    def total_s(self, n_gen: int) -> float:
        """Seconds of a generation of n_gen tokens per sequence."""
        return self.prefill_s + (n_gen - 1) * self.decode_s


def bound(
    spec: ModelSpec,
    profile: HardwareProfile,
    vram_budget_bytes: int,
    workload: Workload,
    cached: bool = False,
    chunk_tokens: int | None = None,
) -> Bound:
    """The hardware's limit for a model, a budget and a workload: of plans that keep their placement.

    cached: of plans with an expert cache, too. No plan beats that either, but it lies lower, since such a cache
    might know the future. chunk_tokens: of plans that feed the prompt so.

    Decode is the mean over all decode steps, or 128 evenly spread ones if there are more; so are chunks. Routing is the
    workload's own: experts that it uses often may be resident, but not luckier ones.
    """
    chunks, decode = workload.prompt_steps(chunk_tokens), workload.steps()[1:]
    rows = min(workload.n_ctx, chunk_tokens or workload.n_ctx) * workload.batch
    free = vram_budget_bytes - activation_bytes(spec, rows, workload.batch)
    chunk_s, prefill_binds = _mean_step_s(spec, profile, free, workload, _few(chunks))
    prefill_s, decode_s, decode_binds = len(chunks) * chunk_s, 0.0, prefill_binds
    if decode:
        decode_s, decode_binds = _mean_step_s(spec, profile, free, workload, _few(decode), cached and spec.is_moe)
    decode_tok_s = workload.batch / decode_s if decode_s > 0 else 0.0
    n_tokens = workload.n_prompt * workload.batch
    return Bound(prefill_s, decode_s, n_tokens / prefill_s, decode_tok_s, prefill_binds, decode_binds)


def _few(steps: Sequence[Step]) -> list[Step]:
    return [steps[round(i)] for i in np.linspace(0, len(steps) - 1, min(_MOST_STEPS, len(steps)))]


# -- the relaxed problem --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Relaxed:
    """Means over steps. Per use (a layer's expert with so many tokens): seconds of all its columns.

    use_expert, expert_layer are indices; expert_bytes, rest_bytes count for the device if resident there.
    Experts of a layer that are used alike stand together as one: the problem is linear in columns.
    """

    use_expert: NDArray[np.int64]
    cpu_s: Floats
    gpu_s: Floats
    link_s: Floats
    expert_layer: NDArray[np.int64]
    expert_bytes: Floats
    rest_bytes: Floats
    chain_gpu_s: Floats
    chain_cpu_s: Floats
    ends_s: dict[Place, float]
    ends_bytes: int
    free_bytes: float

    def value(self, cpu: float, gpu: float, link: float, per_byte: float) -> float:
        """The dual's value: a lower bound of the mean step time for any multipliers."""
        n_experts, n_layers = len(self.expert_layer), len(self.rest_bytes)
        sent = np.minimum(cpu * self.cpu_s, gpu * self.gpu_s + link * self.link_s)
        hosted = np.bincount(self.use_expert, sent, n_experts)
        resident = np.bincount(self.use_expert, gpu * self.gpu_s, n_experts) + per_byte * self.expert_bytes
        mlp = np.bincount(self.expert_layer, np.minimum(hosted, resident), n_layers)
        return self.with_chain(cpu, gpu, per_byte, mlp)

    def with_chain(self, cpu: float, gpu: float, per_byte: float, mlp: NDArray[Any]) -> float:
        """The dual's value, given what the MLPs of each layer come to on the device."""
        n_experts, n_layers = len(self.expert_layer), len(self.rest_bytes)
        chain = cpu + gpu
        on_cpu = np.bincount(self.expert_layer, np.bincount(self.use_expert, cpu * self.cpu_s, n_experts), n_layers)
        layers = np.minimum(
            chain * self.chain_gpu_s + per_byte * self.rest_bytes + mlp, chain * self.chain_cpu_s + on_cpu
        )
        ends = min(chain * self.ends_s["GPU"] + per_byte * self.ends_bytes, chain * self.ends_s["CPU"])
        return float(layers.sum() + ends - per_byte * self.free_bytes)


@dataclass(frozen=True)
class _Moving:
    """The relaxed problem of plans with an expert cache: seconds and bytes by step and expert, [step, expert].

    alone is the problem of plans without; follows says whether a step comes right after the one before it.
    """

    alone: _Relaxed
    step_cpu_s: Floats
    step_gpu_s: Floats
    step_link_s: Floats
    send_s: Floats
    bytes_of: Floats
    layer_of: NDArray[np.int64]
    follows: NDArray[np.bool_]

    def value(self, cpu: float, gpu: float, link: float, per_byte: float) -> float:
        """The dual's value: a lower bound of the mean step time for any multipliers."""
        away = here = np.zeros(self.step_cpu_s.shape[1])
        stays_s, send_s = per_byte * self.bytes_of, link * self.send_s
        for t, follows in enumerate(self.follows.tolist()):
            if not follows:  # steps between are left out: anything may have been sent there
                away = here = np.minimum(away, here)
            on_cpu_s, on_gpu_s = cpu * self.step_cpu_s[t], gpu * self.step_gpu_s[t]
            used_s = np.minimum(on_cpu_s, on_gpu_s)
            kept = here + stays_s + used_s
            once = away + np.minimum(on_cpu_s, on_gpu_s + link * self.step_link_s[t])
            away, here = np.minimum(once, kept), np.minimum(away + send_s + used_s, kept)
        mlp_s = np.bincount(self.layer_of, np.minimum(away, here) / len(self.follows), len(self.alone.rest_bytes))
        return self.alone.with_chain(cpu, gpu, per_byte, mlp_s)


def _mean_step_s(
    spec: ModelSpec,
    profile: HardwareProfile,
    free: int,
    workload: Workload,
    steps: Sequence[Step],
    cached: bool = False,
) -> tuple[float, Resource]:
    if not profile.has_gpu or free <= 0:
        return float(np.mean([_cpu_only_s(spec, profile, workload, step) for step in steps])), "CPU"
    relaxed = _relax(spec, profile, free, workload, steps)
    best_s, (cpu, gpu, link) = _maximise(relaxed)
    if cached:
        moving = _move(relaxed, spec, profile, workload, steps)
        best_s, (cpu, gpu, link) = _maximise_near(moving, cpu, gpu)
    without_device_s = float(relaxed.chain_cpu_s.sum() + relaxed.ends_s["CPU"] + relaxed.cpu_s.sum())
    if best_s >= without_device_s:
        return without_device_s, "CPU"
    binds: tuple[tuple[float, Resource], ...] = ((gpu, "GPU"), (cpu, "CPU"), (link, "H2D"))
    return best_s, max(binds, key=lambda pair: pair[0])[1]


def _maximise(relaxed: _Relaxed) -> tuple[float, tuple[float, float, float]]:
    """The best multipliers of a grid over the simplex, refined twice; any of them would be a proof."""
    best_s, best = -np.inf, (1.0, 0.0)
    for width, n in ((1.0, 12), (0.1, 8), (0.015, 8)):
        centre = best if width < 1 else (0.5, 0.5)
        offsets = np.linspace(-width / 2, width / 2, n + 1)
        for cpu in np.clip(centre[0] + offsets, 0, 1):
            for gpu in np.clip(centre[1] + offsets, 0, 1):
                if cpu + gpu <= 1:
                    value = _best_per_byte(relaxed, float(cpu), float(gpu), relaxed.value)
                    best_s, best = max((best_s, best), (value, (float(cpu), float(gpu))))
    return best_s, (best[0], best[1], 1 - best[0] - best[1])


def _maximise_near(moving: _Moving, cpu: float, gpu: float) -> tuple[float, tuple[float, float, float]]:
    """The best of a few multipliers around those that are best for plans without a cache."""
    best_s, best = -np.inf, (cpu, gpu)
    for step in (0.12, 0.04):
        around = [(best[0] + a * step, best[1] + b * step) for a, b in ((0, 0), (1, 0), (0, 1), (-1, 0), (0, -1))]
        for c, g in around:
            if min(c, g, 1 - c - g) >= -1e-12:
                value = _best_per_byte(moving.alone, c, g, moving.value, 10)
                best_s, best = max((best_s, best), (value, (c, g)))
    return best_s, (best[0], best[1], 1 - best[0] - best[1])


_Value = Callable[[float, float, float, float], float]


def _best_per_byte(relaxed: _Relaxed, cpu: float, gpu: float, value: _Value, n_rounds: int = 30) -> float:
    """The dual is concave in the price of a device byte: golden section over its order of magnitude."""
    link, golden = 1 - cpu - gpu, 0.618033988749895
    worst_s = cpu * relaxed.cpu_s.sum() + relaxed.chain_cpu_s.sum() + relaxed.ends_s["CPU"]
    low, high = 0.0, float(worst_s / min(relaxed.free_bytes, relaxed.expert_bytes.min()))
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = value(cpu, gpu, link, left), value(cpu, gpu, link, right)
    best = max(value(cpu, gpu, link, 0.0), at_left, at_right)
    for _ in range(n_rounds):
        if at_left >= at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            best = max(best, at_left := value(cpu, gpu, link, left))
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            best = max(best, at_right := value(cpu, gpu, link, right))
    return best


def _relax(
    spec: ModelSpec, profile: HardwareProfile, free_bytes: float, workload: Workload, steps: Sequence[Step]
) -> _Relaxed:
    where, share = routing_of(spec, workload), 1 / len(steps)
    experts, cpu, gpu, link = [], [], [], []
    owners: list[int] = []
    sizes: list[float] = []
    per_byte_s = _per_byte_s(profile)
    for layer, la in enumerate(spec.layers):
        tokens = np.sort(np.array([where(step, layer) for step in steps]), axis=0)
        tokens, alike = np.unique(tokens, axis=1, return_counts=True)
        for n in np.unique(tokens[tokens > 0]).tolist():
            columns = (tokens == n).sum(axis=0) * share * la.ffn.columns * alike  # mean per step
            used = np.flatnonzero(columns)
            experts.append(len(owners) + used)
            cpu.append(columns[used] * _per_column_s(spec, profile, "CPU", layer, n))
            gpu.append(columns[used] * _per_column_s(spec, profile, "GPU", layer, n))
            link.append(columns[used] * spec.column_bytes(layer) * per_byte_s)
        sizes += (alike * float(la.ffn.columns * spec.column_bytes(layer))).tolist()
        owners += [layer] * len(alike)
    kv = [workload.batch * spec.kv_bytes(la, workload.n_ctx) for la in range(spec.n_layers)]
    return _Relaxed(
        use_expert=np.concatenate(experts),
        cpu_s=np.concatenate(cpu),
        gpu_s=np.concatenate(gpu),
        link_s=np.concatenate(link),
        expert_layer=np.array(owners, dtype=np.int64),
        expert_bytes=np.array(sizes),
        rest_bytes=np.array([float(spec.rest_bytes(la) + kv[la]) for la in range(spec.n_layers)]),
        chain_gpu_s=_chain_s(spec, profile, "GPU", steps),
        chain_cpu_s=_chain_s(spec, profile, "CPU", steps),
        ends_s={"GPU": _ends_s(spec, profile, "GPU", steps), "CPU": _ends_s(spec, profile, "CPU", steps)},
        ends_bytes=ends_bytes(spec),
        free_bytes=free_bytes,
    )


def _move(
    alone: _Relaxed, spec: ModelSpec, profile: HardwareProfile, workload: Workload, steps: Sequence[Step]
) -> _Moving:
    where, per_byte_s = routing_of(spec, workload), _per_byte_s(profile)
    cpu, gpu, link, send, size, owner = [], [], [], [], [], []
    for layer, la in enumerate(spec.layers):
        tokens = np.array([where(step, layer) for step in steps])
        floors = {
            n: [la.ffn.columns * _per_column_s(spec, profile, place, layer, n) if n else 0.0 for place in _PLACES]
            for n in np.unique(tokens).tolist()
        }
        table = np.array([floors[n] for n in tokens.ravel().tolist()]).reshape(*tokens.shape, 2)
        n_bytes = float(la.ffn.columns * spec.column_bytes(layer))
        cpu.append(table[..., 0])
        gpu.append(table[..., 1])
        link.append((tokens > 0) * n_bytes * per_byte_s)
        send.append(np.full(la.ffn.n_experts, n_bytes * per_byte_s))
        size.append(np.full(la.ffn.n_experts, n_bytes))
        owner.append(np.full(la.ffn.n_experts, layer))
    depths = np.array([step.kv_tokens for step in steps])
    return _Moving(
        alone=alone,
        step_cpu_s=np.concatenate(cpu, axis=1),
        step_gpu_s=np.concatenate(gpu, axis=1),
        step_link_s=np.concatenate(link, axis=1),
        send_s=np.concatenate(send),
        bytes_of=np.concatenate(size),
        layer_of=np.concatenate(owner),
        follows=np.diff(depths, prepend=depths[0] - 2) == 1,
    )


# -- times that no plan changes, and floors for those that it does ------------------------------------------------


def _chain_s(spec: ModelSpec, profile: HardwareProfile, place: Place, steps: Sequence[Step]) -> Floats:
    """Mean seconds of attention, and on the device of the join, of every layer."""
    known: dict[object, float] = {}
    for layer, kind in enumerate(spec.layers):
        if kind not in known:
            attention = (spec.attention_work(layer, s.n_tokens, s.kv_tokens, s.batch) for s in steps)
            total_s = sum(profile.time_s(place, work).seconds for work in attention)
            join_s = _join_s(spec, profile, kind.ffn.n_experts, steps) if place == "GPU" else 0.0
            known[kind] = total_s / len(steps) + join_s
    return np.array([known[kind] for kind in spec.layers])


def _join_s(spec: ModelSpec, profile: HardwareProfile, n_experts: int, steps: Sequence[Step]) -> float:
    """Seconds of the cheapest join of a layer, of any number of partial results."""
    partials = range(1, n_experts + 3)
    joins = (spec.small_work("join", n * k) for n in {step.n_tokens for step in steps} for k in partials)
    return min(profile.time_s("GPU", join).seconds for join in joins)


def _ends_s(spec: ModelSpec, profile: HardwareProfile, place: Place, steps: Sequence[Step]) -> float:
    """Mean seconds of embedding, head and sampling."""
    total_s = 0.0
    for step in steps:
        works = (
            spec.small_work("embed", step.n_tokens),
            spec.head_work(step.batch, step.n_tokens),
            spec.small_work("sample", step.batch),
        )
        total_s += sum(profile.time_s(place, work).seconds for work in works)
    return total_s / len(steps)


def _cpu_only_s(spec: ModelSpec, profile: HardwareProfile, workload: Workload, step: Step) -> float:
    where = routing_of(spec, workload)
    total_s = _ends_s(spec, profile, "CPU", [step]) + float(_chain_s(spec, profile, "CPU", [step]).sum())
    for layer, kind in enumerate(spec.layers):
        works = [spec.ffn_work(layer, n, kind.ffn.columns) for n in where(step, layer) if n]
        total_s += sum(profile.time_s("CPU", work).seconds for work in works)
    return total_s


def _per_column_s(spec: ModelSpec, profile: HardwareProfile, place: Literal["CPU", "GPU"], layer: int, n: int) -> float:
    """Seconds per column that no MLP part of n tokens on that place goes below."""
    one = spec.ffn_work(layer, n, 1)
    roof_s = profile.peak(place).roofline_s(one.dtype, one.flops, one.weight_bytes)
    return roof_s * _least_ratio(profile, place, "ffn", spec.dtype, float(n))


def _per_byte_s(profile: HardwareProfile) -> float:
    """Seconds per byte that no copy to the device goes below, of pinned or pageable memory."""
    kinds: tuple[Op, ...] = ("pinned", "pageable")
    dtypes = {c.dtype for c in profile.curves if c.resource == "H2D"} | set(DTYPE_BYTES)
    ratios = [_least_ratio(profile, "H2D", kind, dtype, 1.0) for kind in kinds for dtype in dtypes]
    return min(ratios) / profile.peak("H2D").bytes_per_s


def _least_ratio(profile: HardwareProfile, resource: Resource, op: Op, dtype: str, n_tokens: float) -> float:
    """Least ratio of time to roofline of an operation at n_tokens, over any size."""
    peak = profile.peak(resource)
    curve = profile.curve(resource, op, dtype)
    if curve is None:
        return 1.0 / peak.efficiency
    nodes = curve.grid.xs
    clamped = min(max(n_tokens, nodes[0]), nodes[-1])
    low, high = max(x for x in nodes if x <= clamped), min(x for x in nodes if x >= clamped)
    ratios = []
    for sample in curve.samples:
        roof_s = peak.roofline_s(dtype, sample.flops, sample.weight_bytes + sample.io_bytes)
        if low <= sample.n_tokens <= high:
            ratios.append(sample.median_s / roof_s if roof_s > 0 else 0.0)
    return min(ratios) / (_SHAPE_TOLERANCE if len(curve.grid.ys) == 1 else 1.0)
