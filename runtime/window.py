"""A sliding layer of a KV cache in buffers with room behind it: transformers copies a whole window for every token.

What leaves the window is passed over; once the buffers end, what is held begins others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicSlidingWindowLayer

from runtime.kv import Room

_LEAST_ROOM = 64
_MOST_WINDOWS = 4
"""A prompt's buffers that are larger than so many windows are not kept."""


def knows_windows(config: object) -> bool:
    """Whether windows of a model's layers are attention's own business, so that no mask need tell of them."""
    return bool(getattr(config, "model_type", "") == "gpt_oss")


@dataclass(frozen=True)
class Held:
    """As Room, of the last tokens: words begin with the first one held, n_dropped came before it."""

    words: tuple[int, ...]
    n_written: int
    n_dropped: int


class GrowingWindow(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A sliding layer whose keys and values are a part of larger buffers.

    As transformers' layer where something else has put other tensors in their place, or wants all tokens kept.
    """

    keys: Tensor
    values: Tensor
    _buffers: Room | None = None
    _first: int = 0
    """Of the buffers' tokens, the first one held."""

    def room(self, sizes: tuple[Any, ...], n_new: int = 1) -> Held | None:
        """Room for tokens behind those held; None if those are not of sizes (see Room.holds), or for a first one."""
        n_held = self._n_held()
        if getattr(self, "record_past", False) or n_held != min(self.cumulative_length, self.sliding_window - 1):
            return None
        if n_held == 0 and (n_new == 1 or not self._begin(sizes)):
            return None
        buffers = self._going_on(n_held, n_new) or self._moved(n_held, n_new)
        if not buffers.holds(sizes):
            return None
        keys, values = buffers.keys, buffers.values
        at = [t.data_ptr() + self._first * t.stride(2) * t.element_size() for t in (keys, values)]
        words = (*at, *keys.stride()[:3], *values.stride()[:3])
        return Held(words, self.cumulative_length, self.cumulative_length - n_held)

    def written(self, n_new: int) -> None:
        """As many tokens have been written behind those held."""
        buffers = self._buffers
        assert buffers is not None, "has given room"
        end = buffers.n_written = self._first + self._n_held() + n_new
        self.cumulative_length += n_new
        self._first = max(self._first, end - self.sliding_window + 1)
        held = [t[:, :, self._first : end] for t in (buffers.keys, buffers.values)]
        if buffers.keys.shape[2] > _MOST_WINDOWS * self.sliding_window + _LEAST_ROOM:
            held, self._buffers = [t.clone() for t in held], None
        self.keys, self.values = held[0], held[1]

    def _n_held(self) -> int:
        return self.keys.shape[2] if self.is_initialized and self.keys.numel() else 0

    def _begin(self, sizes: tuple[Any, ...]) -> bool:
        """Become a layer of no tokens of these sizes; whether it is one."""
        if self.cumulative_length:
            return False
        batch, n_heads, *widths, dtype = sizes
        nothing = [torch.empty((batch, n_heads, 0, width), dtype=dtype, device="cpu") for width in widths]
        if not self.is_initialized:
            self.lazy_initialization(*nothing)
        self.keys, self.values = nothing[0], nothing[1]
        return True

    def _going_on(self, n_held: int, n_new: int) -> Room | None:
        """The buffers, if keys and values are what was written last, with room behind them."""
        buffers, end = self._buffers, self._first + n_held
        if buffers is None or n_held == 0 or end != buffers.n_written or not buffers.takes(end + n_new):
            return None
        both = ((buffers.keys, self.keys), (buffers.values, self.values))
        return buffers if all(_is_part(part, buffer, self._first) for buffer, part in both) else None

    def _moved(self, n_held: int, n_new: int) -> Room:
        n_room = n_held + n_new + max(_LEAST_ROOM, self.sliding_window)
        found = [t.new_empty((*t.shape[:2], n_room, t.shape[3])) for t in (self.keys, self.values)]
        for buffer, held in zip(found, (self.keys, self.values), strict=True):
            buffer[:, :, :n_held] = held
        self._buffers, self._first = Room(found[0], found[1], n_held), 0
        self.keys, self.values = found[0][:, :, :n_held], found[1][:, :, :n_held]
        return self._buffers


def _is_part(part: Tensor, buffer: Tensor, first: int) -> bool:
    """Whether a tensor is a buffer's tokens from one on."""
    at = buffer.data_ptr() + first * buffer.stride(2) * buffer.element_size()
    alike = part.shape[:2] == buffer.shape[:2] and part.shape[3] == buffer.shape[3]
    return alike and part.data_ptr() == at and part.stride() == buffer.stride()


def slide_in_place(cache: object) -> None:
    """Let a cache's sliding layers on the CPU, and empty ones, be such."""
    for layer in cache.layers if isinstance(cache, Cache) and not torch.is_grad_enabled() else ():
        if type(layer) is DynamicSlidingWindowLayer and (not layer.is_initialized or layer.device.type == "cpu"):
            layer.__class__ = GrowingWindow
