"""A KV cache that grows in place: transformers copies all keys and values of a layer for every new token."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

_LEAST_ROOM = 64


@dataclass(eq=False)
class Room:
    """Buffers [B, K, T, D] of keys and values, and how many of the T tokens have been written.

    Copies of a layer share them; whichever writes first goes on in them, the others move. words are what the native
    kernel is told of them: addresses, then strides in elements of sequence, head and token of keys and of values.

    Of latent attention keys are latents, and values, narrower, the rotated part of keys: each token's lie side by side,
    and are a row of keys to the kernel.
    """

    keys: Tensor
    values: Tensor
    n_written: int
    words: tuple[int, ...] = field(init=False)
    n_dropped: int = field(init=False, default=0)
    """Tokens that came before the first one held."""
    is_apart: bool = field(init=False)
    """Whether they are of different widths, and do not lie side by side."""
    _n_room: int = field(init=False)
    _is_inference: bool = field(init=False)
    _sizes: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        keys, values = self.keys, self.values
        self.words = (keys.data_ptr(), values.data_ptr(), *keys.stride()[:3], *values.stride()[:3])
        self._n_room, self._is_inference = keys.shape[-2], keys.is_inference()
        uneven = _may_be_rows(keys, values)
        self.is_apart = uneven and not _are_rows(keys, values)
        even = keys.shape == values.shape and keys.dtype == values.dtype
        known = even or (uneven and not self.is_apart)
        self._sizes = (*keys.shape[:2], keys.shape[3], values.shape[3], keys.dtype) if known else ()

    def __reduce__(self) -> tuple[object, ...]:
        """What was pickled lies elsewhere, and its words say where."""
        return Room, (self.keys, self.values, self.n_written)

    def takes(self, n_tokens: int) -> bool:
        """Whether there is room for so many, that may be written now."""
        return n_tokens <= self._n_room and (not self._is_inference or torch.is_inference_mode_enabled())

    def holds(self, sizes: tuple[object, ...]) -> bool:
        """Whether keys and values are of so many sequences and heads, of these widths and dtype."""
        return self._sizes == sizes


def _may_be_rows(keys: Tensor, values: Tensor) -> bool:
    """Whether keys and values differ in width alone, in memory of the CPU."""
    if keys.dim() != 4 or keys.shape == values.shape or keys.shape[:3] != values.shape[:3]:
        return False
    if keys.dtype != values.dtype:
        return False
    return keys.device.type == "cpu" and values.device.type == "cpu"


def _are_rows(keys: Tensor, values: Tensor) -> bool:
    """Whether each token's keys and values lie side by side, without gaps between tokens."""
    follows = keys.data_ptr() + keys.shape[3] * keys.element_size() == values.data_ptr()
    return follows and keys.stride() == values.stride() and keys.stride(2) == keys.shape[3] + values.shape[3]


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a DynamicCache whose keys and values are the beginnings of larger buffers.

    New tokens are written behind them. Where something else has put other tensors in their place (a beam, a batch
    that was repeated), the next update copies those, as DynamicLayer always does. Views of the buffers are made when
    keys and values are asked for: the kernel needs none.
    """

    most_tokens: int = 0
    """Tokens of a sequence that are planned for; 0 if that is not known."""
    _room: Room | None = None
    _n_unseen: int = 0
    """Tokens held, where no view of them has been made; else 0."""

    @property
    def keys(self) -> Tensor | None:
        """[B, K, T, D] of the tokens held."""
        return self._seen("keys")

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        """Others in their place."""
        self._put("keys", keys)

    @property
    def values(self) -> Tensor | None:
        """[B, K, T, D] of the tokens held."""
        return self._seen("values")

    @values.setter
    def values(self, values: Tensor | None) -> None:
        """Others in their place."""
        self._put("values", values)

    def __deepcopy__(self, memo: dict[int, Any]) -> GrowingLayer:
        """Of the buffers only what has been written, in others of its own."""
        keys, values = (self.keys, self.values) if self.is_initialized else (None, None)
        own = {name: value for name, value in vars(self).items() if name not in ("keys", "values", "_room")}
        found = type(self).__new__(type(self))
        memo[id(self)] = found
        vars(found).update(deepcopy(own, memo), keys=keys, values=values)
        if keys is not None and values is not None and keys.numel():
            n = self.get_seq_length()
            found._room = room = found._moved(keys, values, n, n)
            room.n_written = n
            vars(found).update(keys=room.keys[:, :, :n], values=room.values[:, :, :n])
        return found

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._n_unseen or int(super().get_seq_length())

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
        keys, values = self.keys, self.values
        assert keys is not None, "written"
        assert values is not None, "written"
        return keys, values

    def room(self, sizes: tuple[Any, ...], n_new: int = 1) -> Room | None:
        """Room for tokens behind those held; None if those are not of sizes (see Room.holds), or for a first one."""
        room = self._room
        if (
            self._n_unseen == 0
            or room is None
            or room.n_written != self._n_unseen
            or not room.takes(self._n_unseen + n_new)
        ):
            held = self._held(sizes, n_new)
            if held is None:
                return None
            room = self._room_for(*held, n_new)
        return room if room.holds(sizes) else None

    def _held(self, sizes: tuple[Any, ...], n_new: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values [B, K, T, D], alike but for widths, of no tokens where a prompt begins; None without any."""
        if n_new > 1 and self.get_seq_length() == 0:
            batch, n_heads, *widths, dtype = sizes
            nothing = [torch.empty((batch, n_heads, 0, width), dtype=dtype, device="cpu") for width in widths]
            if not self.is_initialized:
                self.lazy_initialization(*nothing)
            return nothing[0], nothing[1]
        keys, values = (self.keys, self.values) if self.is_initialized else (None, None)
        if keys is None or values is None or keys.shape[:3] != values.shape[:3] or keys.dim() != 4 or not keys.shape[2]:
            return None
        return keys, values

    def written(self, n_new: int) -> None:
        """As many tokens have been written behind those held."""
        room = self._room
        assert room is not None, "has given room"
        room.n_written = self._n_unseen = self.get_seq_length() + n_new

    def _seen(self, name: str) -> Tensor | None:
        held = self.__dict__
        if n := self._n_unseen:
            room = self._room
            assert room is not None, "has given room"
            held["keys"], held["values"], self._n_unseen = room.keys[:, :, :n], room.values[:, :, :n], 0
        found: Tensor | None = held.get(name)
        return found

    def _put(self, name: str, value: Tensor | None) -> None:
        self._seen(name)
        self.__dict__[name] = value

    def _room_for(self, key_states: Tensor, value_states: Tensor, n_new: int) -> Room:
        n_past = self.get_seq_length()
        if self._room is None or not self._fits(key_states, n_past + n_new):
            self._room = self._moved(key_states, value_states, n_past, n_past + n_new)
        return self._room

    def _fits(self, key_states: Tensor, n_tokens: int) -> bool:
        """Whether keys and values are what was written last, with room behind them."""
        room, keys, values = self._room, self.keys, self.values
        if room is None or room.is_apart or keys is None or values is None or keys.dim() != key_states.dim():
            return False
        there = ((room.keys, keys), (room.values, values))
        same = all(b.data_ptr() == t.data_ptr() and b.stride() == t.stride() for b, t in there)
        return same and self.get_seq_length() == room.n_written and room.takes(n_tokens)

    def _moved(self, key_states: Tensor, value_states: Tensor, n_past: int, n_tokens: int) -> Room:
        # As much again: a prompt in chunks or a long answer copies tokens once or twice. What is not written takes no
        # memory of the CPU, and of a device what is planned for.
        most = min(n_tokens, self.most_tokens - n_tokens) if self.most_tokens else n_tokens // 8
        n_room = n_tokens + max(_LEAST_ROOM, most)
        widths = key_states.shape[-1], value_states.shape[-1]
        if _may_be_rows(key_states, value_states):
            rows = key_states.new_empty((*key_states.shape[:2], n_room, sum(widths)))
            buffers = [rows[..., : widths[0]], rows[..., widths[0] :]]
        else:
            buffers = [new.new_empty((*new.shape[:2], n_room, new.shape[-1])) for new in (key_states, value_states)]
        for buffer, held in zip(buffers, (self.keys, self.values), strict=True):
            if n_past and held is not None:
                buffer[:, :, :n_past] = held
        return Room(buffers[0], buffers[1], n_past)


def grows(cache: object) -> TypeGuard[DynamicCache]:
    """Whether a cache is one whose layers on the CPU grow in place."""
    return type(cache) is DynamicCache and "update" not in vars(cache) and not cache.offloading


def grow_in_place(cache: object, most_tokens: int = 0) -> None:
    """Let a cache's layers on the CPU grow in place, and empty ones; quantised layers stay, sliding ones see window.py.

    most_tokens: of a sequence, that are planned for; 0 if that is not known.
    """
    if isinstance(cache, Cache) and not torch.is_grad_enabled():
        for layer in cache.layers:
            if type(layer) is DynamicLayer and (not layer.is_initialized or layer.device.type == "cpu"):
                layer.__class__ = GrowingLayer
                assert isinstance(layer, GrowingLayer)
                layer.most_tokens = most_tokens
