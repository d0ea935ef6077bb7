"""What people see of result rows; programs get all keys."""

from __future__ import annotations

from collections.abc import Mapping

from hwmodels.units import format_bytes, format_number, format_seconds
from runtime.cli.table import Column, Row, key, quantity


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _signed_percent(value: float) -> str:
    return f"{value:+.1%}"


def _inner(outer: str, name: str, heading: str) -> Column:
    """A column of one number inside a mapping, in percent with its sign."""

    def cell(row: Row) -> str:
        values = row.get(outer)
        value = values.get(name) if isinstance(values, Mapping) else None
        return _signed_percent(value) if isinstance(value, float) else ""

    return Column(heading, cell, right=True)


def _test(row: Row) -> str:
    """What ran, as llama-bench writes it: prompt and generated tokens, and the depth they start at."""
    depth = f" @ d{row['n_depth']}" if row.get("n_depth") else ""
    batch = f" b{row['batch']}" if row.get("batch", 1) != 1 else ""
    return f"pp{row['n_prompt']} tg{row['n_gen']}{depth}{batch}" if "n_prompt" in row else ""


_HEAD = (key("model"), key("policy"), key("device"), Column("test", _test))
_SPEEDS = (
    quantity("ttft_s", "TTFT", format_seconds),
    quantity("tpot_s", "TPOT", format_seconds),
    quantity("prefill_tok_s", "prefill tok/s", format_number),
    quantity("decode_tok_s", "decode tok/s", format_number),
)

SIMULATED_COLUMNS = (
    *_HEAD,
    *_SPEEDS,
    quantity("bound_fraction", "of bound", _percent),
    quantity("vram_bytes", "device memory", format_bytes),
    quantity("cpu_busy", "CPU busy", _percent),
    quantity("gpu_busy", "GPU busy", _percent),
    quantity("h2d_busy", "H2D busy", _percent),
)


def _reason(name: str) -> Column:
    """The start of a long text; programs get all of it."""

    def cell(row: Row) -> str:
        text = str(row.get(name) or "")
        return text if len(text) <= 72 else f"{text[:70]} ..."

    return Column(name, cell)


SWEPT_COLUMNS = (
    key("model"),
    key("hardware"),
    key("policy"),
    quantity("vram_budget_bytes", "budget", format_bytes),
    _HEAD[3],
    *_SPEEDS,
    quantity("bound_fraction", "of bound", _percent),
    _reason("refused"),
    _reason("failed"),
)

MEASURED_COLUMNS = (
    *_HEAD,
    _SPEEDS[2],
    quantity("predicted_prefill_tok_s", "simulated", format_number),
    _inner("error", "prefill_tok_s", "error"),
    _SPEEDS[3],
    quantity("predicted_decode_tok_s", "simulated", format_number),
    _inner("error", "decode_tok_s", "error"),
    quantity("bound_fraction", "of bound", _percent),
    quantity("vram_bytes", "device memory", format_bytes),
    key("refused"),
)


def _time_or_share(name: str) -> Column:
    """Seconds, or tokens per second and shares where a row is not a time."""

    def cell(row: Row) -> str:
        value = row[name]
        if not isinstance(value, float) or value != value:
            return ""
        if row["scope"] == "share of critical path":
            return _percent(value)
        return format_number(value) + " tok/s" if row["name"] == "tok_s" else format_seconds(value)

    return Column(name, cell, right=True)


ERROR_COLUMNS = (
    key("scope"),
    key("name"),
    _time_or_share("simulated"),
    _time_or_share("measured"),
    quantity("error", "error", _signed_percent),
)
