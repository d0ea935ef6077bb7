"""A model's bytes and FLOPs by part, as rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hwmodels.units import format_bytes, format_number
from runtime.cli.table import Row, key, quantity
from sim.model import ModelSpec

COLUMNS = (
    key("part"),
    quantity("bytes", "size", format_bytes),
    quantity("bytes_per_token", "read per token", format_bytes),
    quantity("flops_per_token", "MFLOP per token", lambda flops: format_number(flops / 1e6)),
    key("note"),
)


@dataclass(frozen=True)
class Part:
    """Bytes held, and bytes read and FLOPs done by one decode step at the start of a text."""

    part: str
    bytes: float
    bytes_per_token: float
    flops_per_token: float
    note: str = ""


def part_rows(spec: ModelSpec) -> list[Row]:
    """Embedding, attention, MLPs, head, all together, and the KV cache of one token."""
    parts = [
        Part("embedding", spec.embed_bytes, spec.d_model * spec.dtype_bytes, 0.0, _tied(spec)),
        _attention(spec),
        _mlps(spec),
        Part("head", spec.head_bytes, spec.head_bytes, spec.head_work(1).flops),
    ]
    total = Part(
        "all",
        spec.weight_bytes,
        sum(part.bytes_per_token for part in parts),
        sum(part.flops_per_token for part in parts),
        f"{spec.n_params / 1e9:.3g} billion parameters, {spec.dtype}, {spec.max_positions} positions",
    )
    kv_bytes = sum(spec.kv_bytes(i, 1) for i in range(spec.n_layers))
    return [asdict(part) for part in (*parts, total, Part("KV cache of a token", kv_bytes, 0.0, 0.0))]


def _tied(spec: ModelSpec) -> str:
    return "shared with the head" if spec.tied_embeddings else ""


def _attention(spec: ModelSpec) -> Part:
    works = [spec.attention_work(i, 1, 1) for i in range(spec.n_layers)]
    return Part(
        "attention, norms, router, shared experts",
        sum(spec.rest_bytes(i) for i in range(spec.n_layers)),
        sum(work.weight_bytes for work in works),
        sum(work.flops for work in works),
        f"{spec.n_layers} layers",
    )


def _mlps(spec: ModelSpec) -> Part:
    works = [(layer.ffn.top_k, spec.ffn_work(i, 1, layer.ffn.columns)) for i, layer in enumerate(spec.layers)]
    widest = max((layer.ffn for layer in spec.layers), key=lambda ffn: ffn.n_experts)
    experts = f"{widest.n_experts} experts of {widest.columns} columns, {widest.top_k} per token"
    return Part(
        "MLPs",
        sum(spec.ffn_bytes(i) for i in range(spec.n_layers)),
        sum(top_k * work.weight_bytes for top_k, work in works),
        sum(top_k * work.flops for top_k, work in works),
        experts if widest.is_moe else f"dense, {widest.columns} columns",
    )
