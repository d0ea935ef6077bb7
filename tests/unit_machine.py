"""A machine where a FLOP, or a byte, takes a second; small models and random plans to run on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from hwmodels.profile import RESOURCES, Contention, HardwareProfile, Peak, Resource
from hwmodels.work import Work
from sim.cost import Prices, price
from sim.graph import Task, TaskGraph, graph
from sim.model import ModelSpec, from_config
from sim.plan import LayerPartition, Place, Plan, Tier
from sim.workload import Step
from tests.caches import cached

CPU: Resource = "CPU"
GPU: Resource = "GPU"
H2D: Resource = "H2D"
D2H: Resource = "D2H"


def peak(flops_per_s: float = 1.0, bytes_per_s: float = 1.0) -> Peak:
    """No overhead, full efficiency: the roofline itself."""
    return Peak({"float32": flops_per_s}, bytes_per_s, efficiency=1.0, fixed_s=0.0, source="datasheet")


def machine(
    peaks: dict[str, Peak] | None = None,
    handoff_s: dict[str, float] | None = None,
    contention: Sequence[Contention] = (),
) -> HardwareProfile:
    return HardwareProfile(
        name="unit",
        device="cuda",
        created="2026-01-01",
        fingerprint={},
        vram_bytes=2**40,
        host_bytes=2**40,
        cpu_threads=1,
        peaks={str(r): peak() for r in RESOURCES} if peaks is None else peaks,
        handoff_s=handoff_s or {},
        contention=tuple(contention),
    )


UNIT = machine()


def task(name: str, resource: Resource, flops: float, *deps: str) -> Task:
    """A task that takes as many seconds as it has FLOPs."""
    return Task(name, "gg", resource, (Work("ffn", "float32", 1, flops, 0.0),), deps, step="decode1")


def unit_graph(*tasks: Task) -> tuple[TaskGraph, Prices]:
    """A graph and its prices on UNIT."""
    made = graph(tasks)
    return made, price(made, UNIT)


# -- models and plans ---------------------------------------------------------------------------------


def dense(n_layers: int = 3, columns: int = 12, **changes: Any) -> ModelSpec:
    return from_config(
        {
            "model_type": "llama",
            "hidden_size": 8,
            "intermediate_size": columns,
            "num_hidden_layers": n_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 16,
            "max_position_embeddings": 4096,
            "dtype": "float32",
            **changes,
        },
        "dense",
    )


def moe(n_layers: int = 3, columns: int = 12, n_experts: int = 4, top_k: int = 2) -> ModelSpec:
    experts = {"num_local_experts": n_experts, "num_experts_per_tok": top_k}
    return dense(n_layers, columns, model_type="mixtral", **experts)


def plan_of(spec: ModelSpec, layers: Sequence[LayerPartition], *tiers: Tier, ends: Place = "GPU") -> Plan:
    return Plan(
        policy="by-hand",
        model=spec.name,
        model_id=spec.id,
        profile_id="",
        dtype=spec.dtype,
        vram_budget_bytes=2**40,
        n_ctx=1024,
        batch=1,
        pinned=True,
        ends=ends,
        layers=tuple(layers),
        tiers=tiers,
    )


def tier(
    spec: ModelSpec,
    overlap: bool = True,
    ahead: int = 0,
    stream_min_tokens: int | None = None,
    stream_columns: int | None = None,
    n_slots: int = 2,
    max_tokens: int = 10**6,
) -> Tier:
    """A tier that treats every layer alike."""
    return Tier("all", max_tokens, overlap, (ahead,) * spec.n_layers, stream_min_tokens, n_slots, stream_columns)


def uniform(spec: ModelSpec, gg: int | Sequence[int] = 0, ends: Place = "GPU", **how: Any) -> Plan:
    """A plan with every layer on the device alike: gg columns of each expert, or by expert."""
    n_experts = spec.layers[0].ffn.n_experts
    row = (gg,) * n_experts if isinstance(gg, int) else tuple(gg)
    return plan_of(spec, [LayerPartition("GPU", row)] * spec.n_layers, tier(spec, **how), ends=ends)


def on_cpu(spec: ModelSpec) -> Plan:
    """A plan that needs no device."""
    layers = [LayerPartition("CPU", (0,) * la.ffn.n_experts) for la in spec.layers]
    return plan_of(spec, layers, tier(spec, n_slots=0), ends="CPU")


def mixed(n_layers: int = 3, columns: int = 12, n_experts: int = 4, top_k: int = 2) -> ModelSpec:
    """Every other layer is dense, with twice the columns of an expert."""
    experts = {"num_experts": n_experts, "num_experts_per_tok": top_k, "moe_intermediate_size": columns}
    return dense(n_layers, 2 * columns, model_type="qwen3_moe", decoder_sparse_step=2, head_dim=4, **experts)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    n_layers, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    if draw(st.booleans()):
        return dense(n_layers, columns)
    n_experts = draw(st.integers(2, 5))
    kind = draw(st.sampled_from((moe, mixed)))
    return kind(n_layers, columns, n_experts, draw(st.integers(1, n_experts)))


@st.composite
def plans(draw: st.DrawFn, spec: ModelSpec) -> Plan:
    """Any plan that check_plan and load_plan accept: every mode, mixed layers, any cut."""
    layers = []
    for layer in spec.layers:
        rest: Place = "CPU" if draw(st.integers(0, 2)) == 2 else "GPU"
        most = layer.ffn.columns if rest == "GPU" else 0
        layers.append(LayerPartition(rest, tuple(draw(st.integers(0, most)) for _ in range(layer.ffn.n_experts))))
    overlap, n_slots = draw(st.booleans()), draw(st.integers(2, 3))
    ahead, stream_min_tokens, stream_columns = [0] * spec.n_layers, None, None
    if draw(st.booleans()):
        ahead = [draw(st.integers(0, layer.ffn.columns)) for layer in spec.layers]
    elif draw(st.booleans()):
        stream_min_tokens, stream_columns = draw(st.integers(1, 4)), draw(st.none() | st.integers(1, 9))
        n_slots = draw(st.integers(1, 3))
    how = Tier("all", 10**6, overlap, tuple(ahead), stream_min_tokens, n_slots, stream_columns)
    plan = plan_of(spec, layers, how, ends="GPU" if draw(st.booleans()) else "CPU")
    return draw(cached(spec, plan)) if spec.is_moe and draw(st.booleans()) else plan


@st.composite
def steps(draw: st.DrawFn) -> Step:
    n_tokens = draw(st.integers(1, 6))
    return Step("decode1", n_tokens, 8, n_tokens) if draw(st.booleans()) else Step("prefill", n_tokens, n_tokens)
