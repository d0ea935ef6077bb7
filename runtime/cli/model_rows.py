"""A model's bytes and FLOPs by part, as rows."""

from __future__ import annotations

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


def part_rows(spec: ModelSpec) -> list[Row]:
    """Embedding, attention, MLPs, head, all together, and the KV cache of one token.

    Per token means one decode step at depth 1 with one sequence: every weight that such a step reads.
    """
    layers = range(spec.n_layers)
    attention = [spec.attention_work(i, 1, 1) for i in layers]
    top_k = [spec.layers[i].ffn.top_k for i in layers]
    ffn = [spec.ffn_work(i, 1, spec.layers[i].ffn.columns) for i in layers]
    rows = [
        _row("embedding", spec.embed_bytes, spec.d_model * spec.dtype_bytes, 0.0, _tied(spec)),
        _row(
            "attention, norms, router, shared experts",
            sum(spec.rest_bytes(i) for i in layers),
            sum(w.weight_bytes for w in attention),
            sum(w.flops for w in attention),
            f"{spec.n_layers} layers",
        ),
        _row(
            "MLPs",
            sum(spec.ffn_bytes(i) for i in layers),
            sum(k * w.weight_bytes for k, w in zip(top_k, ffn, strict=True)),
            sum(k * w.flops for k, w in zip(top_k, ffn, strict=True)),
            _mlps(spec),
        ),
        _row("head", spec.head_bytes, spec.head_bytes, spec.head_work(1).flops, ""),
    ]
    total = _row(
        "all",
        spec.weight_bytes,
        sum(float(str(row["bytes_per_token"])) for row in rows),
        sum(float(str(row["flops_per_token"])) for row in rows),
        f"{spec.n_params / 1e9:.3g} billion parameters, {spec.dtype}, {spec.max_positions} positions",
    )
    kv_bytes = sum(spec.kv_bytes(i, 1) for i in layers)
    return [*rows, total, _row("KV cache of a token", kv_bytes, 0.0, 0.0, "")]


def _row(part: str, n_bytes: float, bytes_per_token: float, flops_per_token: float, remark: str) -> Row:
    return {
        "part": part,
        "bytes": n_bytes,
        "bytes_per_token": bytes_per_token,
        "flops_per_token": flops_per_token,
        "note": remark,
    }


def _tied(spec: ModelSpec) -> str:
    return "shared with the head" if spec.tied_embeddings else ""


def _mlps(spec: ModelSpec) -> str:
    widest = max((layer.ffn for layer in spec.layers), key=lambda ffn: ffn.n_experts)
    if not widest.is_moe:
        return f"dense, {widest.columns} columns"
    return f"{widest.n_experts} experts of {widest.columns} columns, {widest.top_k} per token"
