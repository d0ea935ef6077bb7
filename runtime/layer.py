"""A decoder layer of a small step or a prompt in one native call, where the CPU computes all of it.

Between calls of the kernel transformers and torch take a third of a small step: modules, norms, routers and sums of a
few thousand numbers, 10 to 30 us each (experiments/LOG.md). Any condition that does not hold leaves the layer to the
modules it is made of.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime import native
from runtime.executor import Executor
from runtime.ffn import PartitionedExperts, PartitionedMlp
from runtime.kv import GrowingLayer, Room, grows
from runtime.latent import LatentAttention, cache_sizes, is_plain, read_latent, real_tables, write_tables
from runtime.native.layer import LayerWords
from runtime.projection import FEW_ROWS, is_kernels
from runtime.prompt import Tables
from runtime.reader import Reader, UnfitError
from runtime.recording import LayerRun
from runtime.router import read_router, read_shared
from runtime.skeleton import decoder_layers
from runtime.watch import Watch
from runtime.window import GrowingWindow, Held

_SPARSE = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "Phimoe")
_OTHERS = ("DeepseekV2Moe", "DeepseekV3MoE", "GptOssMLP")
MIXTURES = frozenset((*(f"{family}SparseMoeBlock" for family in _SPARSE), *_OTHERS))
"""Mixtures that add what a router chose, and what all rows have beside it."""
_LATENT = ("DeepseekV2", "DeepseekV3")
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", *_SPARSE, *_LATENT, "GptOss")
LAYERS = frozenset(f"{family}DecoderLayer" for family in _FAMILIES)
"""Layers that add attention of a norm, then an MLP of a norm."""


Growing = GrowingLayer | GrowingWindow
"""Layers of a cache that grow in place."""


@dataclass(frozen=True)
class Prepared:
    """A layer's words for the kernel, and what they were read from: a module is replaced, a weight moved."""

    words: LayerWords
    dtype: torch.dtype
    counts: array[int]
    table: array[int]
    watch: Watch
    told: list[tuple[int, ...]]
    """Words of the keys and values that are written in words: none, or the last."""

    def past_sizes(self, batch: int) -> tuple[object, ...]:
        """Of the keys and values that the layer goes on from."""
        return cache_sizes(self.words, batch, self.dtype)

    def write_past(self, room: Room | Held) -> None:
        """The words of keys and values."""
        words, found = self.words, room.words
        if self.told and self.told[0] is found:
            return
        self.told[:] = [found]
        words.n_dropped = room.n_dropped
        words.keys, words.values = found[:2]
        words.key_strides[:], words.value_strides[:] = found[2:5], found[5:]

    def run(self) -> LayerRun:
        """What the kernel has told of the layer."""
        return LayerRun(tuple(self.counts), self.words.times[1], self.words.times[2])


class StepLayer(nn.Module):
    """A decoder layer in one call, in place of the one whose modules it holds."""

    index: int
    executor: Executor
    prepared: Prepared

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [B, S, D] -> [B, S, D]."""
        cache: Any = kwargs.get("past_key_values")
        tables = None if args else self._kernels_tables(hidden_states, kwargs)
        if tables is not None:
            room = self._room(cache, *hidden_states.shape[:2])
            if room is not None:
                out = torch.empty_like(hidden_states)
                past = cache.layers[self.index]
                self.executor.run_layer(self.index, partial(self._compute, hidden_states, out, tables, past, room))
                return out
        kernel = None if args else self._sums_of_prompt(hidden_states)
        if kernel is None:
            found: Tensor = super().forward(hidden_states, *args, **kwargs)
            return found
        modules: Any = self
        mixed, _ = modules.self_attn(hidden_states=modules.input_layernorm(hidden_states), **kwargs)
        hidden = _sum(kernel, hidden_states, mixed)
        made = modules.mlp(modules.post_attention_layernorm(hidden))
        return _sum(kernel, hidden, made[0] if isinstance(made, tuple) else made)

    def _sums_of_prompt(self, hidden: Tensor) -> native.Kernel | None:
        """The kernel, where torch has one thread and its sums of a prompt's rows would take as long as norms."""
        rows = hidden.numel() // hidden.shape[-1]
        if rows <= FEW_ROWS or not (is_kernels(rows) and hidden.is_contiguous() and native.holds(hidden)):
            return None
        return native.kernel() if self.prepared.watch.holds() else None

    def _kernels_tables(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tables | None:
        """Of rotations, if new tokens see all of their past, and the layer is the kernel's to compute."""
        words, causal = self.prepared.words, kwargs.get("is_causal") is not False
        if kwargs.get("attention_mask") is not None or (hidden.shape[1] > 1 and not causal):
            return None
        tables = real_tables(kwargs.get("position_embeddings"), words)
        if tables is None or not is_plain(hidden, tables, self.prepared.dtype, words):
            return None
        ours = self.executor.computes_layer(self.index) and self.prepared.watch.holds()
        return tables if ours else None

    def _room(self, cache: object, batch: int, n_new: int) -> Room | Held | None:
        """Room for tokens behind those that a cache holds of these sequences; None if it does not grow in place."""
        if not grows(cache) or self.index >= len(cache.layers):
            return None
        past = cache.layers[self.index]
        return past.room(self.prepared.past_sizes(batch), n_new) if isinstance(past, Growing) else None

    def _compute(self, hidden: Tensor, out: Tensor, tables: Tables, past: Growing, room: Room | Held) -> LayerRun:
        kernel = native.kernel()
        assert kernel is not None, "the step is the kernel's"
        words, kept = self.prepared.words, write_tables(self.prepared.words, hidden, tables)
        words.n_past, words.x, words.y = past.get_seq_length(), hidden.data_ptr(), out.data_ptr()
        self.prepared.write_past(room)
        kernel.layer(words)
        del kept
        past.written(words.n_new)
        return self.prepared.run()


def _sum(kernel: native.Kernel, one: Tensor, other: Tensor) -> Tensor:
    alike = one.shape == other.shape and other.is_contiguous() and native.holds(one, other)
    return kernel.add(one, other) if alike else one + other


def use_layers(model: PreTrainedModel, executor: Executor) -> None:
    """Let the kernel compute whole layers of small steps and prompts where the plan leaves them to the CPU."""
    kernel = native.kernel()
    if kernel is None:
        return
    for i, layer in enumerate(decoder_layers(model)):
        if executor.plan.layers[i].rest != "CPU" or any(executor.plan.layers[i].gg):
            continue
        try:
            prepared = prepare(layer, i, executor, kernel)
        except UnfitError:
            continue
        cls = type(layer)
        layer.__class__ = type(cls.__name__, (StepLayer, cls), {"__module__": cls.__module__})
        assert isinstance(layer, StepLayer)
        layer.index, layer.executor, layer.prepared = i, executor, prepared


# -- a layer's words ----------------------------------------------------------------------------------


def prepare(layer: nn.Module, index: int, executor: Executor, kernel: native.Kernel) -> Prepared:
    """A layer's words. UnfitError if the kernel does not compute such a layer."""
    dtype: torch.dtype = getattr(torch, executor.spec.dtype)
    code, act = native.dtype_code(dtype), native.activation_code(executor.act)
    if type(layer).__name__ not in LAYERS or code is None or act is None:
        raise UnfitError(type(layer).__name__)
    words, reader = LayerWords(), Reader(dtype)
    words.dtype, words.isa, words.act, words.width = code, native.ISAS.index(kernel.isa), act, executor.spec.d_model
    width = words.width
    words.input_norm, words.input_norm_bias, words.input_eps = reader.any_norm(layer, "input_layernorm", width)
    words.post_norm, words.post_norm_bias, words.post_eps = reader.any_norm(layer, "post_attention_layernorm", width)
    reader.fact(layer, "training")
    if type(layer).__name__.startswith(_LATENT):
        read_latent(words, reader, reader.part(layer, "self_attn", lambda m: isinstance(m, LatentAttention)))
    else:
        _read_attention(words, reader, layer)
    words.norms_once = type(layer).__name__.startswith("GptOss")
    _read_mlp(words, reader, layer, act)
    table = _table(words, executor, index)
    counts = array("q", [0] * words.n_experts)
    words.experts, words.counts = table.buffer_info()[0], counts.buffer_info()[0]
    return Prepared(words, dtype, counts, table, Watch.of(reader.links, reader.values, reader.facts), [])


def _read_attention(words: LayerWords, reader: Reader, layer: nn.Module) -> None:
    attention: Any = reader.part(layer, "self_attn", lambda m: hasattr(m, "scaling") and hasattr(m, "head_dim"))
    config, width = attention.config, reader.fact(attention, "head_dim")
    if not reader.fact(attention, "is_causal"):
        raise UnfitError("is_causal")
    words.n_heads, words.n_kv_heads, words.head_width = config.num_attention_heads, config.num_key_value_heads, width
    words.scale, clip = reader.fact(attention, "scaling"), reader.fact(config, "clip_qkv")
    words.clip = torch.inf if clip is None else clip
    n_query, n_key = words.n_heads * width, words.n_kv_heads * width
    words.query, words.query_bias = reader.linear(attention, "q_proj", (n_query, words.width))
    words.key, words.key_bias = reader.linear(attention, "k_proj", (n_key, words.width))
    words.value, words.value_bias = reader.linear(attention, "v_proj", (n_key, words.width))
    words.output, words.output_bias = reader.linear(attention, "o_proj", (words.width, n_query))
    if hasattr(attention, "sinks"):
        words.sinks = reader.address(attention, "sinks", (words.n_heads,))
        words.window = reader.fact(attention, "sliding_window") or 0
    if hasattr(attention, "q_norm"):
        words.norms_whole = type(layer).__name__.startswith("Olmoe")
        sizes = (n_query, n_key) if words.norms_whole else (width, width)
        words.query_norm, words.head_eps = reader.norm(attention, "q_norm", sizes[0])
        words.key_norm, _ = reader.norm(attention, "k_norm", sizes[1])


def _read_mlp(words: LayerWords, reader: Reader, layer: nn.Module, act: int) -> None:
    mlp = reader.part(layer, "mlp", lambda m: type(m) is PartitionedMlp or type(m).__name__ in MIXTURES)
    words.n_experts = 1
    if isinstance(mlp, PartitionedMlp):
        return
    experts: Any = reader.part(mlp, "experts", lambda m: type(m) is PartitionedExperts)
    name = "router" if "router" in mlp._modules else "gate"
    read_router(words, reader, reader.part(mlp, name, lambda m: True))
    noisy = reader.fact(mlp, "training") and reader.fact(mlp, "input_jitter_noise")
    if words.n_experts != experts.num_experts or noisy:
        raise UnfitError(name)
    if "down_proj_bias" in experts._parameters:
        words.down_bias = reader.address(experts, "down_proj_bias", (words.n_experts, words.width))
    read_shared(words, reader, mlp, act)


def _table(words: LayerWords, executor: Executor, index: int) -> array[int]:
    """Gate, up, down and columns of every piece of every expert, all in host memory."""
    columns, table = executor.spec.layers[index].ffn.columns, array("q")
    for expert in executor.store.layers[index].experts:
        pieces = expert.views(expert.host_run(0, columns), 0, columns)
        words.n_pieces = len(pieces)
        for piece in pieces:
            table.extend(native.piece_words(piece))
    return table
