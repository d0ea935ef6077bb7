"""What a plan keeps where: the one estimator that planner, simulator and runtime share."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hwmodels.errors import PlanError
from hwmodels.units import format_bytes
from sim.model import ModelSpec
from sim.plan import Plan, Tier, caches_layer


@dataclass(frozen=True)
class Memory:
    """Bytes by part. Device parts first; host holds weights only."""

    ends: int
    rest: int
    gg: int
    slots: int
    kv: int
    activations: int
    host_weights: int
    host_kv: int
    cache: int = 0

    @property
    def vram_bytes(self) -> int:
        """Everything on the device."""
        return self.ends + self.rest + self.gg + self.slots + self.cache + self.kv + self.activations

    @property
    def loaded_bytes(self) -> int:
        """What is there once a model is loaded, on either side: weights, slots and expert cache."""
        return self.ends + self.rest + self.gg + self.slots + self.cache + self.host_weights

    @property
    def host_bytes(self) -> int:
        """Everything a plan keeps in host memory."""
        return self.host_weights + self.host_kv


def ends_bytes(spec: ModelSpec) -> int:
    """Embedding, final norm and head; a tied embedding is stored once."""
    tied = spec.vocab * spec.d_model * spec.dtype_bytes if spec.tied_embeddings else 0
    return spec.embed_bytes + spec.head_bytes - tied


def activation_bytes(spec: ModelSpec, n_tokens: int, batch: int) -> int:
    """Workspace of one step on the device: hidden states, attention projections, MLP intermediates, logits.

    A layer's temporaries are freed before the next layer's, so the largest layer counts once. The
    factor of six hidden states covers the residual, norm output, partial sums and staging.
    """
    size = spec.dtype_bytes
    widest = max(
        (la.attention.n_heads + 2 * la.attention.n_kv_heads) * la.attention.head_dim + 3 * la.ffn.columns
        for la in spec.layers
    )
    logits = batch * spec.vocab * (size + 4)
    return n_tokens * (6 * spec.d_model + widest) * size + logits


def host_columns(spec: ModelSpec, plan: Plan, layer: int) -> tuple[int, ...]:
    """Columns of each expert of a layer that stay in host memory."""
    total = spec.layers[layer].ffn.columns
    return tuple(total - g for g in plan.layers[layer].gg)


def slot_bytes(spec: ModelSpec, plan: Plan, tier: Tier) -> int:
    """Size of one slot: the largest unit that the tier sends.

    Sent ahead: the layer's ahead columns of all experts are one unit. Sent after the router: what is
    sent of one expert is one unit.
    """
    if tier.stream_min_tokens is None and not any(tier.ahead):
        return 0
    largest = 0
    for i, part in enumerate(plan.layers):
        if part.rest == "CPU" and not tier.offload:  # such a layer computes where it lives: nothing is sent
            continue
        columns, sent = spec.layers[i].ffn.columns, 0
        if tier.ahead[i]:
            most = tier.ahead[i]
            # Planning asks this thousands of times of models with hundreds of experts, most of them alike.
            sent = sum(n * min(most, columns - g) for g, n in Counter(part.gg).items())
        elif tier.stream_min_tokens is not None:
            most = columns if tier.stream_columns is None else tier.stream_columns
            sent = min(most, columns - min(part.gg))
        largest = max(largest, sent * spec.column_bytes(i))
    return largest


def cache_slot_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Size of one slot of the expert cache: the largest host part of an expert that it may hold; 0 without a cache."""
    parts = (
        (la.ffn.columns - min(plan.layers[i].gg)) * spec.column_bytes(i)
        for i, la in enumerate(spec.layers)
        if caches_layer(plan, spec, i)
    )
    return max(parts, default=0)


def cache_bytes(spec: ModelSpec, plan: Plan) -> int:
    """Device memory of the expert cache."""
    return cache_slots(spec, plan) * cache_slot_bytes(spec, plan)


def cache_slots(spec: ModelSpec, plan: Plan) -> int:
    """Slots of the expert cache of all layers."""
    n_layers = sum(caches_layer(plan, spec, i) for i in range(spec.n_layers))
    return plan.cache.total_slots(n_layers) if plan.cache is not None and n_layers else 0


def memory(spec: ModelSpec, plan: Plan, n_tokens: int | None = None) -> Memory:
    """Bytes by part of a plan; n_tokens is the largest step (default: the whole context, or a chunk of it)."""
    rows = (n_tokens if n_tokens is not None else plan.step_tokens) * plan.batch
    rest = kv = gg = host = host_kv = 0
    for i, part in enumerate(plan.layers):
        layer_kv = plan.batch * spec.kv_bytes(i, plan.n_ctx)
        on_device = sum(part.gg) * spec.column_bytes(i)
        gg += on_device
        host += spec.ffn_bytes(i) - on_device
        if part.rest == "GPU":
            rest += spec.rest_bytes(i)
            kv += layer_kv
        else:
            host += spec.rest_bytes(i)
            host_kv += layer_kv
    ends = ends_bytes(spec)
    slots = max(t.n_slots * slot_bytes(spec, plan, t) for t in plan.tiers)
    return Memory(
        ends=ends if plan.ends == "GPU" else 0,
        rest=rest,
        gg=gg,
        slots=slots,
        kv=kv,
        activations=activation_bytes(spec, rows, plan.batch) if plan.uses_gpu else 0,
        host_weights=host + (ends if plan.ends == "CPU" else 0),
        host_kv=host_kv,
        cache=cache_bytes(spec, plan),
    )


def check_memory(spec: ModelSpec, plan: Plan, host_bytes: int | None = None) -> Memory:
    """Memory of a plan; PlanError says how many bytes are missing and what would fit."""
    need = memory(spec, plan)
    if need.vram_bytes > plan.vram_budget_bytes:
        missing = need.vram_bytes - plan.vram_budget_bytes
        raise PlanError(
            f"{plan.policy} needs {format_bytes(need.vram_bytes)} of device memory, the budget is "
            f"{format_bytes(plan.vram_budget_bytes)}: {format_bytes(missing)} are missing. Fixed parts: embedding and "
            f"head {format_bytes(need.ends)}, attention {format_bytes(need.rest)}, KV cache {format_bytes(need.kv)}, "
            f"activations {format_bytes(need.activations)}, slots {format_bytes(need.slots + need.cache)}. "
            f"Raise --vram-budget to {format_bytes(need.vram_bytes - need.gg)} or lower the context"
        )
    if host_bytes is not None and need.host_bytes > host_bytes:
        raise PlanError(
            f"{plan.policy} keeps {format_bytes(need.host_bytes)} in host memory, "
            f"{format_bytes(host_bytes)} can be had; raise --vram-budget or --host-budget, or choose a smaller model"
        )
    return need
