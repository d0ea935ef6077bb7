"""Attention whose softmax knows one more score per head, of a value of nothing: gpt-oss's, in some layers by windows.

No attention of torch's own has such scores. The kernel computes them where no token is masked, torch elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from runtime import native

_SCORES = 1 << 23
"""Numbers that scores take at once."""


def attend_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    s_aux: Tensor,
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """query [B, H, S, D], key and value [B, K, T, D], s_aux [H] -> [B, S, H, D]; tokens see those before them.

    sliding_window: as many keys at most, where a mask [B, 1, S, T], true for what is seen, does not say which. Both
    at once are right where the mask hides all that the window hides. kwargs are what transformers tells of the rest.
    """
    n_new, n_keys = query.shape[2], key.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < n_keys else 0
    plain = attention_mask is None and kwargs.get("is_causal") is not False and not kwargs.get("dropout")
    if plain and (kernel := _kernel(window, query, key, value, s_aux)) is not None:
        rows = query.transpose(1, 2).contiguous()
        return kernel.attend(rows, key, value, scaling, sinks=s_aux.contiguous(), window=window)
    if attention_mask is None and (n_new > 1 or window) and kwargs.get("is_causal") is not False:
        attention_mask = lower_right_band(n_new, n_keys, window, query.device)[None, None]
    return _by_torch(query, key, value, attention_mask, s_aux, scaling, window)


def lower_right_band(n_new: int, n_keys: int, window: int, device: torch.device) -> Tensor:
    """[S, T], true where one of the last S of T tokens sees a key: `window` of them, 0 for all before it."""
    sees = torch.ones(n_new, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_new)
    return sees.triu(n_keys - n_new - window + 1) if window else sees


def _kernel(window: int, query: Tensor, *others: Tensor) -> native.Kernel | None:
    """The kernel if it computes this: few tokens, or many of heads that are not too wide."""
    kernel, n_new = native.kernel(), query.shape[2]
    if kernel is None or not native.holds(query, *others) or n_new > others[0].shape[2]:
        return None
    packs = kernel.attends_prompts and max(query.shape[-1], others[1].shape[-1]) <= native.MOST_WIDTH
    return kernel if packs or n_new == 1 else None


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor, scale: float, window: int
) -> Tensor:
    """In float32, of some tokens at a time over the keys that their windows may hold."""
    batch, n_heads, n_new, width = query.shape
    n_kv, n_keys = key.shape[1:3]
    keys, values = key.float().transpose(2, 3), value.float()
    grouped = sinks.float().view(1, n_kv, -1, 1, 1).expand(batch, -1, -1, -1, -1)
    out = query.new_empty((batch, n_new, n_heads, value.shape[-1]))
    at_once = max(1, min(_SCORES // (batch * n_heads * n_keys), window or n_new))
    for first in range(0, n_new, at_once):
        rows = query[:, :, first : first + at_once].float()
        n, end = rows.shape[2], n_keys - n_new + first + rows.shape[2]
        begin = max(0, end - n - window + 1) if window else 0
        there = rows.reshape(batch, n_kv, -1, width)  # heads of a KV head, then tokens
        scores = torch.matmul(there, keys[..., begin:]).mul_(scale).view(batch, n_kv, -1, n, n_keys - begin)
        if mask is not None:
            seen = mask[:, :, None, first : first + n, begin:n_keys]
            scores.masked_fill_(~seen, -torch.inf) if seen.dtype == torch.bool else scores.add_(seen)
        chances = torch.cat([scores, grouped.expand(-1, -1, -1, n, -1)], -1).softmax(-1)[..., :-1]
        mixed = torch.matmul(chances.flatten(2, 3), values[:, :, begin:]).view(batch, n_heads, n, -1)
        out[:, first : first + n] = mixed.transpose(1, 2)
    return out
