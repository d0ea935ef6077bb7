"""The KV cache between generations: a prompt that begins as the last one did computes only what is new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from runtime.session import PlannedModel


class PrefixCache:
    """A model with the KV cache of the tokens that it saw last; for one sequence at a time.

    Answers are those of computing the whole prompt anew, up to the rounding of steps of other lengths.
    """

    def __init__(self, model: PlannedModel) -> None:
        self.model = model
        self.n_kept = 0
        """Tokens of the last prompt that were not computed again."""
        self._ids: list[int] = []
        self._cache: DynamicCache | None = None

    def generate(self, ids: Sequence[int], **how: Any) -> list[int]:
        """New tokens after the prompt ids; how is what transformers' generate takes.

        Whatever is raised, the next call computes its whole prompt.
        """
        cache, model = self._beginning_of(ids), self.model
        self.clear()
        self.n_kept = int(cache.get_seq_length())
        tokens = torch.tensor([list(ids)], device=model.device)
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            use_cache=True,
            return_dict_in_generate=False,
            pad_token_id=model.generation_config.pad_token_id or 0,
            **how,
        )
        found = [int(token) for token in out[0]]
        self._ids, self._cache = found[: cache.get_seq_length()], cache  # the last token was not computed
        return found[len(ids) :]

    def clear(self) -> None:
        """Forget all tokens."""
        self._ids, self._cache, self.n_kept = [], None, 0

    def _beginning_of(self, ids: Sequence[int]) -> DynamicCache:
        """The cache cut to what the prompt shares with it, without the prompt's last token; else an empty one."""
        n_shared = shared(self._ids, ids[:-1])
        if self._cache is not None and n_shared > 0 and can_be_cut(self._cache, n_shared):
            if n_shared < len(self._ids):
                self._cache.crop(n_shared - len(self._ids))
            return self._cache
        return DynamicCache(config=self.model.config)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the beginning that two sequences have in common."""
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))


def can_be_cut(cache: DynamicCache, n_tokens: int) -> bool:
    """Whether a cache can become that of its first n_tokens: a sliding window that is full has lost what it needs."""
    length = cache.get_seq_length()
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return n_tokens == length or all(length < window for window in windows)
