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
from runtime.sinks import attend_with_sinks

NAME = "scheinfer_attention"


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query [B, H, S, D], key and value [B, K, T, D] -> [B, S, H, D]; what transformers asks of an attention."""
    if kwargs.get("s_aux") is not None:
        return attend_with_sinks(query, key, value, attention_mask, **kwargs), None
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


def register() -> None:
    """Tell transformers of it, under NAME, with the masks of sdpa or none."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, prompt.mask)
