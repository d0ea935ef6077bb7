"""What surrounds the layers in a small step that the kernel computes: embedding, rotary tables, norm, and no masks.

One new token for each sequence sees all of its past: transformers takes a millisecond to find that it needs no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast
from transformers.utils.generic import ModelOutput

from runtime.executor import Executor
from runtime.layer import Growing, StepLayer
from runtime.projection import FEW_ROWS
from runtime.span import Span, span_of
from runtime.window import knows_windows

_OWN = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
ASKED = ("output_hidden_states", "output_attentions", "output_router_logits")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek_v2", "deepseek_v3", "gpt_oss")


class StepModel(nn.Module):
    """Embedding, layers and last norm, in place of the model whose modules it holds."""

    executor: Executor
    config: PreTrainedConfig
    layers: nn.ModuleList
    span: Span | None
    """All layers in one call, if their form allows it."""

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """input_ids [B, S] -> last_hidden_state [B, S, D]."""
        if not args and self._is_step(kwargs):
            return self._step(kwargs["input_ids"], kwargs.get("position_ids"), kwargs["past_key_values"])
        found: ModelOutput = super().forward(*args, **kwargs)
        return found

    def _is_step(self, kwargs: dict[str, Any]) -> bool:
        ids, cache, mask = (kwargs.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
        if ids is None or ids.dim() != 2 or ids.shape[1] != 1 or ids.shape[0] > FEW_ROWS or torch.is_grad_enabled():
            return False
        if kwargs.get("inputs_embeds") is not None or kwargs.get("use_cache") is False or self._is_asked(kwargs):
            return False
        if type(cache) is not DynamicCache or not self.executor.computes_layer(0):
            return False
        if len(cache.layers) < len(self.layers) or any(not isinstance(layer, Growing) for layer in cache.layers):
            return False
        n_tokens = cache.get_seq_length() + 1
        window = None if knows_windows(self.config) else getattr(self.config, "sliding_window", None)
        if n_tokens == 1 or (window and n_tokens >= window):
            return False
        if mask is None:
            return True
        return isinstance(mask, Tensor) and mask.shape == (ids.shape[0], n_tokens) and bool(mask.all())

    def _is_asked(self, kwargs: dict[str, Any]) -> bool:
        """Whether the caller wants more than the last hidden state and the cache."""
        more = (value for name, value in kwargs.items() if name not in _OWN)
        return not all(value is None or value is False for value in more) or any(
            getattr(self.config, name, False) for name in ASKED
        )

    def _step(self, ids: Tensor, positions: Tensor | None, cache: DynamicCache) -> ModelOutput:
        if positions is None:
            positions = torch.full((1, 1), cache.get_seq_length(), device="cpu")
        hidden: Tensor = self.get_submodule("embed_tokens")(ids)
        tables = self.get_submodule("rotary_emb")(hidden, positions)
        whole = None if self.span is None else self.span.compute(hidden, tables, cache)
        return self._output(self._by_layers(hidden, positions, cache, tables) if whole is None else whole, cache)

    def _by_layers(
        self, hidden: Tensor, positions: Tensor, cache: DynamicCache, tables: tuple[Tensor, Tensor]
    ) -> Tensor:
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=tables,
            )
        normed: Tensor = self.get_submodule("norm")(hidden)
        return normed

    def _output(self, hidden: Tensor, cache: DynamicCache) -> ModelOutput:
        kind = MoeModelOutputWithPast if self.executor.spec.family in MIXTURES else BaseModelOutputWithPast
        return kind(last_hidden_state=hidden, past_key_values=cache)


def use_lean_steps(model: PreTrainedModel, executor: Executor) -> None:
    """Let small steps skip what they do not need, where the kernel computes all layers and the plan's ends."""
    inner = model.get_submodule("model")
    layers = inner.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    if executor.plan.ends != "CPU" or not all(isinstance(layer, StepLayer) for layer in layers):
        return
    cls = type(inner)
    inner.__class__ = type(cls.__name__, (StepModel, cls), {"__module__": cls.__module__})
    assert isinstance(inner, StepModel)
    inner.executor, inner.span = executor, span_of(inner, executor)
