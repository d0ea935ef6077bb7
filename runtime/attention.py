"""Attention of one new token on the CPU: the native kernel, or two float32 products; sdpa for everything else.

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
from transformers.masking_utils import sdpa_mask

from runtime import native

NAME = "scheinfer_sdpa"


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query [B, H, S, D], key and value [B, K, T, D] -> [B, S, H, D]; what transformers asks of an attention."""
    one = query.shape[2] == 1 and query.device.type == "cpu" and attention_mask is None
    if not one or kwargs.get("dropout") or (torch.is_grad_enabled() and query.requires_grad):
        out: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
        return out, None
    return attend_one(query, key, value, kwargs.get("scaling")).transpose(1, 2), None


def attend_one(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """One query per head over all keys: [B, H, 1, D]. Query heads of a KV head are rows of one product."""
    batch, n_heads, _, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    kernel = native.kernel()
    if kernel is not None and native.holds(query, key, value):
        return kernel.attend(query.reshape(batch, n_heads, width), key, value, scale)[:, :, None]
    n_kv = key.shape[1]
    rows = query.reshape(batch * n_kv, n_heads // n_kv, width).float()
    scores = torch.bmm(rows, key.reshape(batch * n_kv, -1, width).float().transpose(1, 2))
    weights = scores.mul_(scale).softmax(-1)
    mixed = torch.bmm(weights, value.reshape(batch * n_kv, -1, value.shape[-1]).float())
    return mixed.to(query.dtype).view(batch, n_heads, 1, -1)


def register() -> None:
    """Tell transformers of it, under NAME, with the masks of sdpa."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
