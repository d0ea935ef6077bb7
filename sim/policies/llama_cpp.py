"""llama-cpp: whole layers, or the MLPs of some layers, on the CPU; large batches are uploaded; all in sequence.

Source: ggml-org/llama.cpp at 0054c01 (ggml/src/ggml-backend.cpp, src/llama-context.cpp); -ncffn from PR 26622.
Placement: -ngl N, the last N layers on the device with their KV cache, the others on the CPU; or all
    layers' attention and KV cache on the device and the MLPs (experts) of N layers in host memory:
    -ncffn, --n-cpu-moe, the first N or, with a tensor override, the last N; or both together where not
    even attention fits.
Bytes over PCIe: hidden states; in steps of 32 tokens and more the weights of MLPs in host memory, of experts
    only those used.
Compute site: where the weights are; uploaded weights on the GPU, of layers that -ngl leaves to the CPU, too.
Dispatch rule: GGML_OP_OFFLOAD_MIN_BATCH, 32 tokens; --no-op-offload turns it off. Prompts in micro-batches of 512
    tokens (-ub), or larger ones, up to the whole prompt.
Overlap: none within a step: graph splits run in order, and one device with overrides has one copy of each.
Cache and prefetch: none; the upload buffer is refilled for every step.
Derived by us: the best of these settings in simulation, with a page-locked host buffer. Runs of neighbouring
    experts are uploaded in one copy by the source; both extremes, one copy per used expert and one per layer,
    are tried. Of a layer that -ngl leaves to the CPU the source uploads attention weights as well, which a plan
    cannot say: attention stays on the CPU. Its prompts are slower here by the CPU's time for it less that of the
    upload, so that what is said of such plans errs against llama.cpp; where all attention fits on the device,
    plans without such layers compete, and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from hwmodels.profile import HardwareProfile
from sim.model import ModelSpec
from sim.placement import Filling, Order
from sim.plan import LayerPartition, Place, Plan, Tier
from sim.policies.problem import Problem
from sim.workload import Workload

NAME = "llama-cpp"
OFFLOAD_MIN_BATCH = 32
MICRO_BATCHES = (512, 2048)
_ORDERS: tuple[Order, ...] = ("last", "first")


def propose(spec: ModelSpec, profile: HardwareProfile, vram_budget_bytes: int, workload: Workload) -> Plan:
    """The best of its settings in simulation; PlanError if the machine has no GPU or host memory is too small."""
    problem = Problem(spec, profile, vram_budget_bytes, workload)
    problem.need_gpu(NAME)
    return problem.best(setting for part in _micro_batches(problem) for setting in _settings(part))


def _micro_batches(problem: Problem) -> Iterator[Problem]:
    """-ub: 512 tokens of all sequences, four times as many, or the whole prompt."""
    batch, prompt = problem.workload.batch, problem.workload.n_prompt
    chunks = (max(1, n // batch) for n in MICRO_BATCHES)
    yield from (replace(problem, chunk_tokens=chunk) for chunk in (None, *(c for c in chunks if c < prompt)))


def _settings(problem: Problem) -> Iterator[Callable[[], Plan]]:
    for tiers in _tiers(problem):
        first = _fewest_on_cpu(problem, tiers)
        for order in _ORDERS:
            filling = Filling(problem.spec, problem.workload, "layers", order, first)
            yield partial(problem.fullest, filling, partial(problem.plan, NAME, tiers=tiers, pinned=True))
        yield partial(_layer_split, problem, tiers, "GPU")
        yield partial(_layer_split, problem, tiers, "CPU")


def _tiers(problem: Problem) -> Iterator[tuple[Tier, ...]]:
    """Without uploads, and with uploads per used expert or per layer."""
    most = problem.prompt_tokens
    small = problem.tier("small", min(OFFLOAD_MIN_BATCH - 1, most), overlap=False)
    yield problem.both(problem.tier("", 1, overlap=False))
    if most >= OFFLOAD_MIN_BATCH:
        routed = problem.tier("prompt", most, overlap=False, stream_min_tokens=1, n_slots=1)
        yield small, replace(routed, offload=True)
        if problem.spec.is_moe:
            yield small, replace(problem.tier("prompt", most, overlap=False, ahead=True, n_slots=1), offload=True)


def _fewest_on_cpu(problem: Problem, tiers: tuple[Tier, ...]) -> int:
    """How many first layers must live on the CPU wholly, so that the others' attention fits on the device."""
    spec = problem.spec
    for first in range(spec.n_layers):
        filling = Filling(spec, problem.workload, "layers", "last", first)
        if problem.fits(problem.plan(NAME, filling.layers(0), tiers, pinned=True)):
            return first
    return spec.n_layers


def _layer_split(problem: Problem, tiers: tuple[Tier, ...], ends: Place) -> Plan:
    """-ngl: as many last layers as fit, whole. Versions differ in whether the head goes first or last."""
    n = problem.spec.n_layers
    plans = (problem.plan(NAME, _last_layers(problem.spec, k), tiers, pinned=True, ends=ends) for k in range(n, -1, -1))
    plan = next((plan for plan in plans if problem.fits(plan)), None)
    return plan or problem.plan(NAME, _last_layers(problem.spec, 0), problem.both(tiers[0]), pinned=True, ends="CPU")


def _last_layers(spec: ModelSpec, n_gpu: int) -> list[LayerPartition]:
    first = spec.n_layers - n_gpu
    return [
        LayerPartition("GPU" if i >= first else "CPU", (la.ffn.columns if i >= first else 0,) * la.ffn.n_experts)
        for i, la in enumerate(spec.layers)
    ]
