"""Latent attention on the CPU in one native call, but for the output projection: DeepSeek-V2's and -V3's.

transformers makes keys and values of all heads from every latent in the cache again for each new token: a third of the
time of a token behind 512 others. The kernel turns the query to the latents instead (runtime/native/latent.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime import native
from runtime.kv import GrowingLayer, Room, grows
from runtime.native.layer import HALVES, PAIRS, PAIRS_APART, LayerWords
from runtime.projection import FEW_ROWS, computes_prompt, is_kernels
from runtime.prompt import Tables, are_of
from runtime.reader import Reader, UnfitError
from runtime.watch import Watch

LATENT = frozenset(("DeepseekV2Attention", "DeepseekV3Attention"))
"""Attention modules that keep latents of tokens."""
_MOST_LATENT = 4096


@dataclass(frozen=True)
class Prepared:
    """An attention module's words for the kernel, and what they were read from."""

    words: LayerWords
    dtype: torch.dtype
    watch: Watch


class LatentAttention(nn.Module):
    """Latent attention by the kernel, in place of the module whose weights it holds."""

    layer_idx: int
    latent: Prepared

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, S, D] -> [B, S, D]."""
        given = None if args else self._given(hidden_states, kwargs)
        if given is None:
            out: tuple[Tensor, Tensor | None] = super().forward(hidden_states, *args, **kwargs)
            return out
        projected: Tensor = self.get_submodule("o_proj")(self._mix(hidden_states, *given))
        return projected, None

    def _given(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tables, GrowingLayer, Room] | None:
        """Tables, and what the cache holds with room behind it; None where the kernel does not compute this call."""
        words, dtype, n_rows = self.latent.words, self.latent.dtype, hidden.numel() // hidden.shape[-1]
        if kwargs.get("attention_mask") is not None or kwargs.get("is_causal") is False:
            return None
        if n_rows > FEW_ROWS and not (is_kernels(n_rows) and computes_prompt(dtype, n_rows)):
            return None
        tables, cache = real_tables(kwargs.get("position_embeddings"), words), kwargs.get("past_key_values")
        if tables is None or not is_plain(hidden, tables, dtype, words) or not self.latent.watch.holds():
            return None
        if not grows(cache) or self.layer_idx >= len(cache.layers):
            return None
        past, sizes = cache.layers[self.layer_idx], cache_sizes(words, hidden.shape[0], dtype)
        if not isinstance(past, GrowingLayer) or (room := past.room(sizes, hidden.shape[1])) is None:
            return None
        return tables, past, room

    def _mix(self, hidden: Tensor, tables: Tables, past: GrowingLayer, room: Room) -> Tensor:
        kernel, words = native.kernel(), self.latent.words
        assert kernel is not None, "asked before"
        n_new, kept = hidden.shape[1], write_tables(words, hidden, tables)
        words.n_past, words.x = past.get_seq_length(), hidden.data_ptr()
        words.keys, words.values = room.words[:2]
        words.key_strides[:], words.value_strides[:] = room.words[2:5], room.words[5:]
        out = hidden.new_empty((*hidden.shape[:2], words.n_heads * words.value_width))
        kernel.latent(words, out)
        del kept
        past.written(n_new)
        return out


def real_tables(given: object, words: LayerWords) -> Tables | None:
    """Cosine and sine of each token, or twice one table of both where they are complex; None if they are otherwise."""
    if words.latent and words.turns == PAIRS:
        if not isinstance(given, Tensor) or given.dtype != torch.complex64 or given.dim() != 3:
            return None
        pairs = torch.view_as_real(given).flatten(-2)
        return pairs, pairs
    if not isinstance(given, tuple):
        return None
    if words.norms_once and len(given) == 2 and given[0].shape[-1] * 2 == words.head_width:  # gpt-oss's, of one half
        return torch.cat([given[0], given[0]], -1), torch.cat([given[1], given[1]], -1)
    return given


def table_dtype(words: LayerWords, dtype: torch.dtype) -> torch.dtype:
    """Of tables of rotations, for weights of a dtype."""
    return torch.float32 if words.latent and words.turns == PAIRS else dtype


def cache_sizes(words: LayerWords, batch: int, dtype: torch.dtype) -> tuple[object, ...]:
    """Of the keys and values that a layer goes on from: see Room.holds."""
    if words.latent:
        return batch, 1, words.latent_width, words.head_width, dtype
    return batch, words.n_kv_heads, words.head_width, words.head_width, dtype


def widest_head(words: LayerWords) -> int:
    """Width of a head's queries or values, whichever are wider."""
    return int(max(words.pass_width + words.head_width, words.value_width) if words.latent else words.head_width)


def is_plain(hidden: Tensor, tables: Tables, dtype: torch.dtype, words: LayerWords) -> bool:
    """Whether hidden [B, S, D] and its tables are as the kernel reads them, for a step of few tokens or a prompt."""
    if hidden.dim() != 3 or not hidden.is_contiguous() or hidden.dtype != dtype or torch.is_grad_enabled():
        return False
    cos, sin = tables
    if cos.dtype != table_dtype(words, dtype):
        return False
    if not are_of(hidden, tables, words.head_width) or not (cos.is_contiguous() and sin.is_contiguous()):
        return False
    kernel = native.kernel()
    if kernel is None or not native.holds(hidden) or not native.holds(cos, sin):
        return False
    return hidden.shape[1] == 1 or (kernel.attends_prompts and widest_head(words) <= native.MOST_WIDTH)


def write_tables(words: LayerWords, hidden: Tensor, tables: Tables) -> Tables:
    """The words of new tokens' number and of their rotations; the tables, which must be held until the call."""
    batch, n_new = hidden.shape[:2]
    alone = n_new == 1 and tables[0].numel() == words.head_width
    cos, sin = tables if alone else (t.expand(batch, -1, -1).contiguous() for t in tables)
    words.rows, words.n_new = batch * n_new, n_new
    words.cosine, words.sine = cos.data_ptr(), sin.data_ptr()
    words.table_stride = 0 if alone else words.head_width
    return cos, sin


def use_latents(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let the kernel compute latent attention of modules on the CPU."""
    kernel = native.kernel()
    for module in model.modules():
        if kernel is None or type(module).__name__ not in LATENT:
            continue
        try:
            prepared = _prepare(module, dtype, kernel)
        except UnfitError:
            continue
        cls = type(module)
        module.__class__ = type(cls.__name__, (LatentAttention, cls), {"__module__": cls.__module__})
        assert isinstance(module, LatentAttention)
        module.latent = prepared


def _prepare(module: nn.Module, dtype: torch.dtype, kernel: native.Kernel) -> Prepared:
    words, reader = LayerWords(), Reader(dtype)
    code = native.dtype_code(dtype)
    if code is None or not hasattr(module, "expand_kv"):  # which versions that cache keys and values lack
        raise UnfitError("dtype or cache")
    words.dtype, words.isa, words.width = code, native.ISAS.index(kernel.isa), module.hidden_size
    read_latent(words, reader, module)
    reader.fact(module, "training")
    return Prepared(words, dtype, Watch.of(reader.links, reader.values, reader.facts))


def read_latent(words: LayerWords, reader: Reader, attention: Any) -> None:
    """An attention module's words. UnfitError if the kernel does not compute it."""
    config, rank = attention.config, reader.fact(attention, "q_lora_rank")
    nope, rope, value = (reader.fact(attention, f"{name}_head_dim") for name in ("qk_nope", "qk_rope", "v"))
    latent = reader.fact(attention, "kv_lora_rank")
    words.n_heads, words.n_kv_heads, words.head_width = reader.fact(attention, "num_heads"), 1, rope
    words.latent_width, words.pass_width, words.value_width = latent, nope, value
    words.scale, words.clip = reader.fact(attention, "scaling"), torch.inf
    if rope % 2 or rope > native.MOST_WIDTH or rope == latent:  # as wide as each other they lie apart in the cache
        raise UnfitError("qk_rope_head_dim")
    if latent > _MOST_LATENT:
        raise UnfitError("kv_lora_rank")
    if not reader.fact(attention, "is_causal"):
        raise UnfitError("is_causal")
    if type(attention).__name__.startswith("DeepseekV2"):
        words.turns = PAIRS
    else:
        words.turns = PAIRS_APART if reader.fact(config, "rope_interleave") else HALVES
    n_query = words.n_heads * (nope + rope)
    words.key_norm, words.head_eps = reader.norm(attention, "kv_a_layernorm", latent)
    if rank is None:
        words.query, words.query_bias = reader.linear(attention, "q_proj", (n_query, words.width))
    else:
        words.query_rank = rank
        words.query_down, words.query_down_bias = reader.linear(attention, "q_a_proj", (rank, words.width))
        words.query_norm, eps = reader.norm(attention, "q_a_layernorm", rank)
        if eps != words.head_eps:
            raise UnfitError("q_a_layernorm")
        words.query, words.query_bias = reader.linear(attention, "q_b_proj", (n_query, rank))
    words.latent, words.latent_bias = reader.linear(attention, "kv_a_proj_with_mqa", (latent + rope, words.width))
    words.expand, bias = reader.linear(attention, "kv_b_proj", (words.n_heads * (nope + value), latent))
    if bias:
        raise UnfitError("kv_b_proj")
    words.output, words.output_bias = reader.linear(attention, "o_proj", (words.width, words.n_heads * value))
