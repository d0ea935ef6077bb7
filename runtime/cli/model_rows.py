"""Built-in models, and a model's bytes and FLOPs by part, as rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hwmodels.units import format_bytes, format_number
from runtime.cli.table import Row, key, quantity
from sim.model import ModelSpec
from sim.shapes import names, shape, shapes

LIST_COLUMNS = (
    key("name"),
    key("family"),
    quantity("billions", "billion parameters", format_number),
    quantity("active_billions", "active", format_number),
    key("experts"),
    quantity("bytes", "size", format_bytes),
    key("source", "sizes from"),
    key("note"),
)
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
        f"{format_number(spec.n_params / 1e9)} billion parameters, {spec.dtype}, {spec.max_positions} positions",
    )
    rows = [*parts, total, Part("KV cache of a token", _kv_bytes(spec, 1) - _kv_bytes(spec, 0), 0.0, 0.0)]
    if _kv_bytes(spec, 0):
        rows.append(Part("recurrent state", _kv_bytes(spec, 0), 0.0, 0.0, "of a sequence, whatever its length"))
    return [asdict(part) for part in rows]


def shape_rows() -> list[Row]:
    """Every built-in model, in its 16-bit form."""
    return [_shape_row(name, shape(name)) for name in names()]


def _shape_row(name: str, spec: ModelSpec) -> Row:
    widest = max((layer.ffn for layer in spec.layers), key=lambda ffn: ffn.n_experts)
    experts = sum(la.ffn.top_k * spec.ffn_work(i, 1, la.ffn.columns).weight_bytes for i, la in enumerate(spec.layers))
    active_bytes = experts + spec.head_bytes + sum(spec.rest_bytes(i) for i in range(spec.n_layers))
    return {
        "name": name,
        "family": spec.family,
        "billions": spec.n_params / 1e9,
        "active_billions": active_bytes / spec.dtype_bytes / 1e9,
        "experts": f"{widest.top_k} of {widest.n_experts}" if widest.is_moe else "",
        "bytes": spec.weight_bytes,
        "layers": spec.n_layers,
        "published_billions": shapes()[name].billions,
        "source": shapes()[name].source,
        "note": shapes()[name].note,
    }


def _kv_bytes(spec: ModelSpec, n_tokens: int) -> int:
    return sum(spec.kv_bytes(i, n_tokens) for i in range(spec.n_layers))


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
