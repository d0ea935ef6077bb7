"""A KV cache that grows in place: transformers copies all keys and values of a layer for every new token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

_LEAST_ROOM = 64


@dataclass
class _Room:
    """Buffers [B, K, T, D] of keys and values, and how many of the T tokens have been written.

    Copies of a layer share them; whichever writes first goes on in them, the others move.
    """

    keys: Tensor
    values: Tensor
    n_written: int


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a DynamicCache whose keys and values are the beginnings of larger buffers.

    A new token is written behind them. Where something else has put other tensors in their place (a beam, a batch
    that was repeated), the next update copies those, as DynamicLayer always does.
    """

    _room: _Room | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, K, S, D] each; all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n_past, n_new = self.get_seq_length(), key_states.shape[-2]
        if n_past and self.keys is not None and self.keys.shape[0] != key_states.shape[0]:
            return super().update(key_states, value_states, *args, **kwargs)  # which says what is wrong
        room = self._room_for(key_states, value_states, n_new)
        for buffer, new in ((room.keys, key_states), (room.values, value_states)):
            buffer[:, :, n_past : n_past + n_new] = new
        self.written(n_new)
        assert self.keys is not None, "written"
        assert self.values is not None, "written"
        return self.keys, self.values

    def room(self, n_new: int) -> tuple[Tensor, Tensor]:
        """Buffers [B, K, T, D] of keys and values with room for n_new tokens behind those held, which are some."""
        assert self.keys is not None, "holds tokens"
        assert self.values is not None, "holds tokens"
        room = self._room_for(self.keys, self.values, n_new)
        return room.keys, room.values

    def written(self, n_new: int) -> None:
        """As many tokens have been written behind those held."""
        room = self._room
        assert room is not None, "has given room"
        room.n_written = self.get_seq_length() + n_new
        self.keys, self.values = (buffer[:, :, : room.n_written] for buffer in (room.keys, room.values))

    def _room_for(self, key_states: Tensor, value_states: Tensor, n_new: int) -> _Room:
        n_past = self.get_seq_length()
        if self._room is None or not self._fits(key_states, n_past + n_new):
            self._room = self._moved(key_states, value_states, n_past, n_past + n_new)
        return self._room

    def _fits(self, key_states: Tensor, n_tokens: int) -> bool:
        """Whether keys and values are what was written last, with room behind them."""
        room = self._room
        if room is None or self.keys is None or self.values is None or self.keys.dim() != key_states.dim():
            return False
        if room.keys.is_inference() and not torch.is_inference_mode_enabled():
            return False  # nothing may be written there now
        there = ((room.keys, self.keys), (room.values, self.values))
        same = all(b.data_ptr() == t.data_ptr() and b.stride() == t.stride() for b, t in there)
        return same and self.get_seq_length() == room.n_written and n_tokens <= room.keys.shape[-2]

    def _moved(self, key_states: Tensor, value_states: Tensor, n_past: int, n_tokens: int) -> _Room:
        n_room = n_tokens + max(_LEAST_ROOM, n_tokens // 8)
        buffers: list[Tensor] = []
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            buffer = new.new_empty((*new.shape[:2], n_room, new.shape[-1]))
            if n_past and held is not None:
                buffer[:, :, :n_past] = held
            buffers.append(buffer)
        return _Room(buffers[0], buffers[1], n_past)


def grow_in_place(cache: object) -> None:
    """Let a cache's layers on the CPU grow in place; sliding windows, quantised layers and other devices stay."""
    if isinstance(cache, Cache) and not torch.is_grad_enabled():
        for layer in cache.layers:
            if type(layer) is DynamicLayer and (not layer.is_initialized or layer.device.type == "cpu"):
                layer.__class__ = GrowingLayer
