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
        for buffer, new in zip(
            self._room_for(key_states, value_states, n_new), (key_states, value_states), strict=True
        ):
            buffer[:, :, n_past : n_past + n_new] = new
        self.written(n_new)
        assert self.keys is not None, "written"
        assert self.values is not None, "written"
        return self.keys, self.values

    def room(self, n_new: int) -> tuple[Tensor, Tensor]:
        """Buffers [B, K, T, D] of keys and values with room for n_new tokens behind those held, which are some."""
        assert self.keys is not None, "holds tokens"
        assert self.values is not None, "holds tokens"
        return self._room_for(self.keys, self.values, n_new)

    def written(self, n_new: int) -> None:
        """As many tokens have been written behind those held."""
        assert self._room is not None, "has given room"
        n_tokens = self._n_written = self.get_seq_length() + n_new
        self.keys, self.values = (buffer[:, :, :n_tokens] for buffer in self._room)

    def _room_for(self, key_states: Tensor, value_states: Tensor, n_new: int) -> tuple[Tensor, Tensor]:
        n_past = self.get_seq_length()
        if self._room is None or not self._fits(key_states, n_past + n_new):
            self._room = self._moved(key_states, value_states, n_past, n_past + n_new)
        return self._room

    def _fits(self, key_states: Tensor, n_tokens: int) -> bool:
        """Whether keys and values are what was written last, with room behind them."""
        if self._room is None or self.keys is None or self.values is None or self.keys.dim() != key_states.dim():
            return False
        there = zip(self._room, (self.keys, self.values), strict=True)
        same = all(b.data_ptr() == t.data_ptr() and b.stride() == t.stride() for b, t in there)
        return same and self.get_seq_length() == self._n_written and n_tokens <= self._room[0].shape[-2]

    def _moved(self, key_states: Tensor, value_states: Tensor, n_past: int, n_tokens: int) -> tuple[Tensor, Tensor]:
        n_room = n_tokens + max(_LEAST_ROOM, n_tokens // 8)
        room: list[Tensor] = []
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            buffer = new.new_empty((*new.shape[:2], n_room, new.shape[-1]))
            if n_past and held is not None:
                buffer[:, :, :n_past] = held
            room.append(buffer)
        return room[0], room[1]


def grow_in_place(cache: object) -> None:
    """Let a cache's layers on the CPU grow in place; sliding windows, quantised layers and other devices stay."""
    if isinstance(cache, Cache) and not torch.is_grad_enabled():
        for layer in cache.layers:
            if type(layer) is DynamicLayer and (not layer.is_initialized or layer.device.type == "cpu"):
                layer.__class__ = GrowingLayer
