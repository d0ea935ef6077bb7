"""Checkpoints run by plan in tests: any plan for a model, and runs compared with Hugging Face's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import PreTrainedModel

from runtime.session import PlannedModel, load_planned
from sim.memory import memory
from sim.model import ModelSpec, load_model
from sim.plan import LayerPartition, Place, Plan, Tier
from tests.caches import cached

BUDGET_BYTES = 1 << 30


def plan_for(
    spec: ModelSpec,
    layers: Sequence[LayerPartition],
    *tiers: Tier,
    ends: Place = "GPU",
    batch: int = 3,
    n_ctx: int = 64,
    vram_budget_bytes: int = BUDGET_BYTES,
) -> Plan:
    """A plan made by hand, for all tokens and sequences that these tests ask for."""
    return Plan(
        "by-hand", spec.name, spec.id, "", spec.dtype, vram_budget_bytes, n_ctx, batch, True, ends, tuple(layers), tiers
    )


def shares(
    spec: ModelSpec,
    gg: float = 0.0,
    ahead: float = 0.0,
    overlap: bool = True,
    stream_min_tokens: int | None = None,
    stream_columns: int | None = None,
    n_slots: int = 2,
    **how: Any,
) -> Plan:
    """A plan that treats every layer alike, by shares of each expert's columns."""
    layers = [LayerPartition("GPU", (round(la.ffn.columns * gg),) * la.ffn.n_experts) for la in spec.layers]
    sent = tuple(round(la.ffn.columns * ahead) for la in spec.layers)
    return plan_for(spec, layers, Tier("all", 10**6, overlap, sent, stream_min_tokens, n_slots, stream_columns), **how)


def on_cpu(spec: ModelSpec, **how: Any) -> Plan:
    """A plan that leaves the device alone."""
    layers = [LayerPartition("CPU", (0,) * la.ffn.n_experts) for la in spec.layers]
    return plan_for(spec, layers, Tier("all", 10**6, True, (0,) * spec.n_layers, None, 0), ends="CPU", **how)


def whole_experts(spec: ModelSpec, **how: Any) -> Plan:
    """Every other expert on the device, the rest computed by the CPU."""
    layers = [
        LayerPartition("GPU", tuple(la.ffn.columns * (e % 2) for e in range(la.ffn.n_experts))) for la in spec.layers
    ]
    return plan_for(spec, layers, Tier("all", 10**6, True, (0,) * spec.n_layers, None, 0), **how)


def three_ways(spec: ModelSpec, **how: Any) -> Plan:
    """A quarter GG, a quarter CG (sent ahead), half CC: every resource has work in every layer."""
    return shares(spec, gg=0.25, ahead=0.25, **how)


# -- any plan -----------------------------------------------------------------------------------------


def _cut(columns: int) -> st.SearchStrategy[int]:
    return st.sampled_from(sorted({0, 1, columns // 2 | 1, columns})) | st.integers(0, columns)


@st.composite
def layer_partitions(draw: st.DrawFn, spec: ModelSpec) -> tuple[LayerPartition, ...]:
    layers = []
    for layer in spec.layers:
        n, columns = layer.ffn.n_experts, layer.ffn.columns
        rest: Place = "CPU" if draw(st.integers(0, 3)) == 3 else "GPU"
        cut = draw(st.sampled_from((_cut(columns), st.sampled_from((0, columns)), st.just(draw(_cut(columns))))))
        layers.append(LayerPartition(rest, tuple(draw(cut) for _ in range(n)) if rest == "GPU" else (0,) * n))
    return tuple(layers)


@st.composite
def tiers(draw: st.DrawFn, spec: ModelSpec, name: str, max_tokens: int) -> Tier:
    """Serial or overlapping; sends nothing, ahead, or after the router all or some columns; 1 to 3 slots."""
    overlap, way = draw(st.booleans()), draw(st.sampled_from(("ahead", "routed", "nothing")))
    if way == "ahead":
        sent = tuple(draw(_cut(layer.ffn.columns)) for layer in spec.layers)
        return Tier(name, max_tokens, overlap, sent, None, draw(st.integers(2 if overlap else 1, 3)))
    nothing = (0,) * spec.n_layers
    if way == "nothing":
        return Tier(name, max_tokens, overlap, nothing, None, 0)
    some = st.none() | st.integers(1, max(layer.ffn.columns for layer in spec.layers))
    return Tier(name, max_tokens, overlap, nothing, draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(some))


@st.composite
def offloading(draw: st.DrawFn, spec: ModelSpec) -> Tier:
    """A serial prompt tier that sends everything, of layers on the CPU, too: ahead or after the router."""
    if draw(st.booleans()):
        return Tier("prompt", 10**6, False, tuple(la.ffn.columns for la in spec.layers), None, 1, offload=True)
    return Tier("prompt", 10**6, False, (0,) * spec.n_layers, 1, draw(st.integers(1, 2)), offload=True)


@st.composite
def plans(draw: st.DrawFn, spec: ModelSpec) -> Plan:
    """Any plan: every cut, mixed layers, and steps of at most two rows run otherwise than longer ones."""
    few, many = draw(tiers(spec, "decode", 2)), draw(tiers(spec, "prompt", 10**6) | offloading(spec))
    ends: Place = draw(st.sampled_from(("GPU", "CPU")))
    plan = plan_for(spec, draw(layer_partitions(spec)), few, many, ends=ends)
    return draw(cached(spec, plan)) if spec.is_moe and draw(st.booleans()) else plan


# -- runs ---------------------------------------------------------------------------------------------


@contextmanager
def loaded(folder: Path, plan: Plan, **how: Any) -> Iterator[PlannedModel]:
    """A checkpoint loaded by plan on the emulated device, closed at the end."""
    model = load_planned(folder, plan, **{"device": "emulated", **how})
    try:
        yield model
    finally:
        model.close()


def spec_of(folder: Path, dtype: str = "auto") -> ModelSpec:
    return load_model(folder, dtype)


def exact_budget(spec: ModelSpec, plan: Plan) -> int:
    """The least device memory that a plan fits in."""
    return memory(spec, plan).vram_bytes


def left_padded(ids: torch.Tensor, n_real: Sequence[int], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, T] of which the last n_real[b] tokens of row b are kept, and the attention mask."""
    mask = torch.zeros_like(ids)
    for row, n in enumerate(n_real):
        mask[row, ids.shape[1] - n :] = 1
    return torch.where(mask.bool(), ids, pad), mask


def logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits [B, T, V] of one forward pass, of real tokens only where there is a mask."""
    with torch.no_grad():
        found: torch.Tensor = model(ids, attention_mask=mask).logits
    return found if mask is None else found * mask[..., None]


def greedy(model: PreTrainedModel, ids: torch.Tensor, n_gen: int, mask: torch.Tensor | None = None) -> list[list[int]]:
    """New tokens of each sequence, exactly n_gen."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=mask, max_new_tokens=n_gen, min_new_tokens=n_gen, do_sample=False, pad_token_id=0
    )
    return [[int(t) for t in row] for row in out[:, ids.shape[1] :]]
