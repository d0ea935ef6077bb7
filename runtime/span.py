"""All layers of a small step, and the norm after them, in one native call, where each of them is one.

Between two calls for a layer each the weights of a layer have put Python's own code and data out of the caches:
what is asked of a layer and noted of it costs ten times as much there as at once for all (experiments/LOG.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runtime import native
from runtime.executor import Executor
from runtime.kv import Room, grows
from runtime.latent import real_tables, table_dtype
from runtime.layer import Growing, Prepared, StepLayer
from runtime.native.layer import LayersWords, LayerWords
from runtime.reader import Reader, UnfitError
from runtime.recording import LayerRun
from runtime.watch import Watch, own_listeners
from runtime.window import Held, knows_windows

Place = tuple[Growing, Room | Held]
"""A layer of a cache, and where its keys and values go on."""


@dataclass(frozen=True)
class Span:
    """Words for the kernel, and all that must be as it was when they were written."""

    executor: Executor
    modules: dict[str, nn.Module]
    layers: list[nn.Module]
    prepared: tuple[Prepared, ...]
    norm: nn.Module
    words: LayersWords
    watch: Watch
    knows_windows: bool

    def compute(self, hidden: Tensor, tables: object, cache: object) -> Tensor | None:
        """The last norm's output for rows [B, 1, D] of the embedding; None, and nothing done, if anything is amiss."""
        real = real_tables(tables, self.prepared[0].words)
        if real is None or not self._takes(hidden, real) or not self._holds():
            return None
        rooms = self.rooms(hidden.shape[0], cache)
        if rooms is None:
            return None
        out = torch.empty_like(hidden)
        self._write(hidden, out, real, rooms)
        self.executor.run_layers(lambda: self._call(rooms), lambda: int(self.words.n_done))
        self.executor.enter_head(out)
        return out

    def _takes(self, hidden: Tensor, tables: tuple[Tensor, Tensor]) -> bool:
        first, (cos, sin) = self.prepared[0], tables
        if hidden.dtype != first.dtype or not hidden.is_contiguous() or not self.executor.computes_layers():
            return False
        width, kind = first.words.head_width, table_dtype(first.words, first.dtype)
        size = (width, hidden.shape[0] * width)
        if cos.shape[-1] != width or cos.numel() not in size or cos.shape != sin.shape or cos.dtype != kind:
            return False
        return cos.is_contiguous() and sin.is_contiguous() and native.holds(hidden) and native.holds(cos, sin)

    def _holds(self) -> bool:
        """Whether the layers and the norm are those that were read, with the executor alone listening."""
        return self.has_layers() and self.watch.holds()

    def has_layers(self) -> bool:
        """Whether the model has the layers and the norm that it had."""
        return list(self.layers_now()) == self.layers and self.modules.get("norm") is self.norm

    def layers_now(self) -> Sequence[nn.Module]:
        """Those of the model."""
        layers = self.modules.get("layers")
        return list(layers._modules.values()) if isinstance(layers, nn.ModuleList) else ()

    def rooms(self, batch: int, cache: object) -> list[Place] | None:
        """Where each layer's keys and values go on, of as many tokens in all layers."""
        if not grows(cache) or len(cache.layers) < len(self.layers):
            return None
        found: list[Place] = []
        for past, layer in zip(cache.layers, self.prepared, strict=False):
            if not isinstance(past, Growing) or (room := past.room(layer.past_sizes(batch))) is None:
                return None
            found.append((past, room))
        n_past = {room.n_written for _, room in found}
        return found if len(n_past) == 1 else None

    def _write(self, hidden: Tensor, out: Tensor, tables: tuple[Tensor, Tensor], rooms: list[Place]) -> None:
        words, (cos, sin) = self.words, tables
        words.rows, words.n_past = hidden.shape[0], rooms[0][1].n_written
        words.x, words.y = hidden.data_ptr(), out.data_ptr()
        words.cosine, words.sine = cos.data_ptr(), sin.data_ptr()
        words.table_stride = cos.shape[-1] if cos.numel() > cos.shape[-1] else 0
        self.write_past(rooms)

    def write_past(self, rooms: list[Place]) -> None:
        """Each layer's words of its keys and values."""
        for layer, (_, room) in zip(self.prepared, rooms, strict=True):
            layer.write_past(room)

    def _call(self, rooms: list[Place]) -> tuple[LayerRun, ...]:
        kernel = native.kernel()
        assert kernel is not None, "the step is the kernel's"
        kernel.layers(self.words)
        for past, _ in rooms:
            past.written(1)
        return tuple(layer.run() for layer in self.prepared)


def span_of(model: nn.Module, executor: Executor) -> Span | None:
    """The layers and the norm of a model whose layers are each computed in one call; None if they differ in form."""
    layers, norm = list(model.get_submodule("layers").children()), model.get_submodule("norm")
    prepared = tuple(_prepared(layer) for layer in layers)
    forms = {(p.dtype, p.words.width, p.words.head_width, p.words.turns) for p in prepared}
    if len(forms) > 1:
        return None
    reader = Reader(prepared[0].dtype)
    try:
        weight, bias, eps = reader.any_norm(model, "norm", prepared[0].words.width)
    except UnfitError:
        return None
    pointers = (ctypes.POINTER(LayerWords) * len(layers))(*(ctypes.pointer(p.words) for p in prepared))
    words = LayersWords(layers=pointers, n_layers=len(layers), norm=weight, norm_bias=bias, eps=eps)
    read = Watch.of((), reader.values, reader.facts, own_listeners((*layers, norm)))
    watch = Watch.of_all([*(p.watch for p in prepared), read])
    modules: dict[str, Any] = model._modules
    return Span(executor, modules, layers, prepared, norm, words, watch, knows_windows(model.config))


def _prepared(layer: nn.Module) -> Prepared:
    assert isinstance(layer, StepLayer), "asked when the model was made"
    return layer.prepared
