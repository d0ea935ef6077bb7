"""A KV cache that grows in place: transformers copies all keys and values of a layer for every new token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

_LEAST_ROOM = 64


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a DynamicCache whose keys and values are the beginnings of larger buffers.

    A new token is written behind them. Where something else has put other tensors in their place (a beam, a batch
    that was repeated), the next update copies those, as DynamicLayer always does.
    """

    _room: tuple[Tensor, Tensor] | None = None
    _n_written = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, K, S, D] each; all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n_past, n_new = self.get_seq_length(), key_states.shape[-2]
        if not self._fits(key_states, n_past + n_new):
            self._move(key_states, value_states, n_past, n_past + n_new)
        assert self._room is not None, "moved to a buffer"
        for buffer, new in zip(self._room, (key_states, value_states), strict=True):
            buffer[:, :, n_past : n_past + n_new] = new
        self._n_written = n_past + n_new
        self.keys, self.values = (buffer[:, :, : n_past + n_new] for buffer in self._room)
        return self.keys, self.values

    def _fits(self, key_states: Tensor, n_tokens: int) -> bool:
        """Whether keys and values are what was written last, with room behind them."""
        if self._room is None or self.keys is None or self.values is None or self.keys.dim() != key_states.dim():
            return False
        there = zip(self._room, (self.keys, self.values), strict=True)
        same = all(b.data_ptr() == t.data_ptr() and b.stride() == t.stride() for b, t in there)
        return same and self.get_seq_length() == self._n_written and n_tokens <= self._room[0].shape[-2]

    def _move(self, key_states: Tensor, value_states: Tensor, n_past: int, n_tokens: int) -> None:
        n_room = n_tokens + max(_LEAST_ROOM, n_tokens // 8)
        room: list[Tensor] = []
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            buffer = new.new_empty((*new.shape[:2], n_room, new.shape[-1]))
            if n_past and held is not None:
                buffer[:, :, :n_past] = held
            room.append(buffer)
        self._room = (room[0], room[1])


def grow_in_place(cache: object) -> None:
    """Let a cache's layers on the CPU grow in place; sliding windows, quantised layers and other devices stay."""
    if isinstance(cache, Cache) and not torch.is_grad_enabled():
        for layer in cache.layers:
            if type(layer) is DynamicLayer and (not layer.is_initialized or layer.device.type == "cpu"):
                layer.__class__ = GrowingLayer
