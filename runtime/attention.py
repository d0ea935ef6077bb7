"""Attention on the CPU: one new token by the native kernel or two float32 products, prompts by the kernel; else sdpa.

torch's sdpa of one query in bfloat16 takes ten times as long on the CPU (1.6 ms against 0.14 ms over 530 tokens of
8 KV heads on one core of a Zen 5, torch 2.13), which in decode is more than reading the layer's weights. The kernel
reads the cache as it lies, on all threads; torch's products need a float32 copy of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from runtime import native, prompt

NAME = "scheinfer_attention"
_SCORES = 1 << 23


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query [B, H, S, D], key and value [B, K, T, D] -> [B, S, H, D]; what transformers asks of an attention."""
    if kwargs.get("s_aux") is not None:
        return attend_with_sinks(module, query, key, value, attention_mask, **kwargs), None
    on_cpu = query.device.type == "cpu" and attention_mask is None and not kwargs.get("dropout")
    scale = kwargs.get("scaling")
    if on_cpu and query.shape[2] == 1 and not (torch.is_grad_enabled() and query.requires_grad):
        return attend_one(query, key, value, scale).transpose(1, 2), None
    is_causal = kwargs.get("is_causal")
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    kernel = prompt.attends(query, key, value) if on_cpu and causal else None
    if kernel is not None:
        rows = query.transpose(1, 2).contiguous()
        return kernel.attend(rows, key, value, query.shape[-1] ** -0.5 if scale is None else scale), None
    if attention_mask is None and causal and 1 < query.shape[2] < key.shape[2]:
        attention_mask = prompt.lower_right(query.shape[2], key.shape[2], query.device)
    out: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
    return out, None


def attend_one(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """One query per head over all keys: [B, H, 1, D]. Query heads of a KV head are rows of one product."""
    batch, n_heads, _, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    kernel = native.kernel()
    if kernel is not None and native.holds(query, key, value):
        return kernel.attend(query.reshape(batch, 1, n_heads, width), key, value, scale).transpose(1, 2)
    n_kv = key.shape[1]
    rows = query.reshape(batch * n_kv, n_heads // n_kv, width).float()
    scores = torch.bmm(rows, key.reshape(batch * n_kv, -1, width).float().transpose(1, 2))
    weights = scores.mul_(scale).softmax(-1)
    mixed = torch.bmm(weights, value.reshape(batch * n_kv, -1, value.shape[-1]).float())
    return mixed.to(query.dtype).view(batch, n_heads, 1, -1)


def attend_with_sinks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    s_aux: Tensor,
    scaling: float,
    **kwargs: Any,
) -> Tensor:
    """As attend, [B, S, H, D], of a softmax that knows one more score per head, s_aux [H], whose value is nothing.

    In float32, some queries at a time, so that scores take _SCORES numbers at most. A mask is boolean, [B, 1, S, T].
    """
    batch, n_heads, n_new, width = query.shape
    n_kv, n_keys = key.shape[1:3]
    if attention_mask is None and n_new > 1 and kwargs.get("is_causal") is not False and module.is_causal:
        attention_mask = prompt.lower_right(n_new, n_keys, query.device)[None, None]
    keys, values = key.float().transpose(2, 3), value.float()
    sinks = s_aux.float().view(1, n_kv, -1, 1, 1).expand(batch, -1, -1, -1, -1)
    out = query.new_empty((batch, n_new, n_heads, value.shape[-1]))
    at_once = max(1, _SCORES // (batch * n_heads * n_keys))
    for first in range(0, n_new, at_once):
        rows = query[:, :, first : first + at_once].float()
        grouped = rows.reshape(batch, n_kv, -1, width)  # heads of a KV head, then tokens
        scores = torch.matmul(grouped, keys).mul_(scaling).view(batch, n_kv, -1, rows.shape[2], n_keys)
        if attention_mask is not None:
            hidden = ~attention_mask[:, :, None, first : first + at_once, :n_keys]
            scores.masked_fill_(hidden, -torch.inf)
        chances = torch.cat([scores, sinks.expand(-1, -1, -1, rows.shape[2], -1)], -1).softmax(-1)[..., :-1]
        mixed = torch.matmul(chances.flatten(2, 3), values).view(batch, n_heads, rows.shape[2], -1)
        out[:, first : first + at_once] = mixed.transpose(1, 2)
    return out


def register() -> None:
    """Tell transformers of it, under NAME, with the masks of sdpa or none."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, prompt.mask)
