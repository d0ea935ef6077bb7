"""A prompt's attention on the CPU by the native kernel: several new tokens per sequence, each up to itself.

torch's sdpa takes six times as long over 512 tokens in bfloat16 (18.7 against 3.0 ms for 32 heads of 64 on two cores
of a Zen 5, torch 2.13), a sixth of a whole prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

from runtime import native
from runtime.projection import project
from runtime.window import knows_windows

Tables = tuple[Tensor, Tensor]


def mask(*, kv_length: int, q_length: int | None = None, **kwargs: Any) -> Tensor | None:
    """What sdpa_mask makes, but None wherever each new token sees all before it and itself, as attention supplies.

    sdpa_mask leaves out the mask where torch's `is_causal`, aligned at the first key, is the same; here it is left out
    where the last query sees the last key.
    """
    n_new = kwargs["cache_position"].shape[0] if q_length is None else q_length  # transformers 5.0 tells positions
    if _is_plain(n_new, kv_length, **kwargs):
        return None  # and of layers with windows only where runtime.sinks supplies those, too
    aligned = n_new in (1, kv_length) and kwargs.pop("allow_is_causal_skip", True)
    told: dict[str, Any] = {} if q_length is None else {"q_length": q_length}
    found: Tensor | None = sdpa_mask(kv_length=kv_length, **told, **{**kwargs, "allow_is_causal_skip": aligned})
    return found


def _is_plain(q_length: int, kv_length: int, **kwargs: Any) -> bool:
    positions = kwargs.get("cache_position")
    device = kwargs.get("device", "cpu" if positions is None else positions.device)
    if torch.device(device).type != "cpu":  # sdpa would need the mask in every layer
        return False
    if not kwargs.get("allow_is_causal_skip", True):
        return False
    by_window = kwargs.get("local_size") is not None
    if by_window and not knows_windows(kwargs.get("config")):
        return False
    if not by_window and kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        return False
    first = kwargs.get("q_offset", 0) if positions is None else int(positions[0])
    ends = first + q_length == kwargs.get("kv_offset", 0) + kv_length
    padding = kwargs.get("attention_mask")
    return bool(ends) and (padding is None or (padding.shape[-1] == kv_length and bool(padding.all())))


def lower_right(n_new: int, n_keys: int, device: torch.device) -> Tensor:
    """The mask that None stands for: [S, T], true where a new token sees a key."""
    return torch.ones(n_new, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_new)


def attends(query: Tensor, key: Tensor, value: Tensor) -> native.Kernel | None:
    """The kernel if it computes a prompt's attention of these, [B, H, S, D] and [B, K, T, D]."""
    if query.shape[2] > key.shape[2]:
        return None
    return may_attend(max(query.shape[-1], value.shape[-1]), query, key, value)


def may_attend(width: int, *tensors: Tensor) -> native.Kernel | None:
    """The kernel if it computes a prompt's attention of heads of this width from these tensors."""
    kernel = native.kernel()
    if kernel is None or not kernel.attends_prompts or width > native.MOST_WIDTH:
        return None
    return kernel if native.holds(*tensors) else None


def are_of(hidden: Tensor, tables: Tables, width: int) -> bool:
    """Whether cosine and sine are of each new token of hidden [B, S, D], of every sequence or of all alike."""
    cos, sin = tables
    batch, n_new = hidden.shape[:2]
    return cos.shape == sin.shape and tuple(cos.shape) in ((1, n_new, width), (batch, n_new, width))


def heads_of(module: nn.Module, flats: Sequence[Tensor], width: int) -> list[Tensor]:
    """What an attention module turns and attends of its projections of rows [..., N * D]: heads [..., N, D].

    A norm is of each head, or of all heads of a row where it has a weight for each of their numbers.
    """
    found, clip = [], getattr(getattr(module, "config", None), "clip_qkv", None)
    for name, flat in zip(("q_norm", "k_norm", ""), flats, strict=True):
        norm: Any = module._modules.get(name)
        whole = norm is not None and norm.weight.shape[0] == flat.shape[-1]
        heads = (norm(flat) if whole else flat).unflatten(-1, (-1, width))
        heads = heads if norm is None or whole else norm(heads)
        found.append(heads if clip is None else heads.clamp_(-clip, clip))
    return found


def attend_layer(
    module: nn.Module, kernel: native.Kernel, hidden: Tensor, tables: Tables, past: Any, layer: int, scale: float
) -> Tensor:
    """An attention module's output for hidden [B, S, D] that sees all of `past` and, causally, itself."""
    batch, n_new, _ = hidden.shape
    cos, sin = (table.expand(batch, -1, -1).reshape(batch * n_new, -1) for table in tables)
    width = cos.shape[-1]
    projections = [module.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj")]
    flats = [flat.view(batch * n_new, -1) for flat in project(projections, hidden)]
    query, key, value = heads_of(module, flats, width)
    kernel.turn(query, cos, sin)
    kernel.turn(key, cos, sin)
    keys, values = (flat.view(batch, n_new, -1, width).transpose(1, 2) for flat in (key, value))
    if past is not None:
        keys, values = past.update(keys, values, layer)
    mixed = kernel.attend(query.view(batch, n_new, -1, width), keys, values, scale)
    projected: Tensor = module.get_submodule("o_proj")(mixed.view(batch, n_new, -1))
    return projected
