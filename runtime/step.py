"""What a step of few tokens computes on the CPU beside MLPs, by the native kernel: norms and attention in few calls.

At one token a layer's small operators cost as much as reading its weights: each call of torch takes 10 to 30 us there,
since the weights that pass have put its code out of the caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime import native
from runtime.attention import attend_one
from runtime.latent import LatentAttention
from runtime.projection import FEW_ROWS, Projection, is_kernels, untouched
from runtime.prompt import are_of, attend_layer, heads_of, may_attend

ATTENTIONS = frozenset(
    f"{family}Attention"
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "Phimoe")
)
"""Modules that project, norm heads or rows if they have norms for them, turn halves of heads, attend, project again."""


class StepNorm(nn.Module):
    """A root mean square norm, in place of the one whose weight it holds."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        kernel, x = native.kernel(), hidden_states
        few = is_kernels(x.numel() // self.weight.shape[0]) or (x.dim() == 4 and x.shape[0] * x.shape[1] <= FEW_ROWS)
        if kernel is not None and few and x.is_contiguous() and native.holds(x, self.weight):
            return kernel.norm(x, self.weight, self.variance_epsilon)
        out: Tensor = super().forward(x)
        return out


class StepLayerNorm(nn.LayerNorm):
    """A layer norm, in place of the one whose weight and bias it holds."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """[..., D] -> [..., D]."""
        kernel, x = native.kernel(), input
        known = is_kernels(x.numel() // max(1, x.shape[-1])) and self.normalized_shape == x.shape[-1:]
        if kernel is None or not known or not x.is_contiguous() or not native.holds(x, self.weight, self.bias):
            return super().forward(x)
        return kernel.layer_norm(x, self.weight, self.bias, self.eps)


class StepAttention(nn.Module):
    """Attention of one new token per sequence in four calls, in place of the module whose weights it holds."""

    layer_idx: int
    head_dim: int
    scaling: float
    is_causal: bool

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, S, D] -> [B, S, D]."""
        kernel = native.kernel()
        causal = kwargs.get("is_causal") is not False and attention_mask is None
        if causal and (by := self._prompt_kernel(hidden_states, position_embeddings)) is not None:
            assert position_embeddings is not None, "a prompt has them"
            past, layer = past_key_values, self.layer_idx
            return attend_layer(self, by, hidden_states, position_embeddings, past, layer, self.scaling), None
        if kernel is None or attention_mask is not None or not self._is_step(hidden_states, position_embeddings):
            out: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            return out
        assert position_embeddings is not None, "a step has them"
        batch, width = hidden_states.shape[0], self.head_dim
        layers = [(p.weight, p.bias) for p in self._projections()]
        flats = kernel.linears(hidden_states.view(batch, -1), layers)
        query, key, value = (heads[:, 0] for heads in heads_of(self, [flat[:, None] for flat in flats], width))
        cos, sin = (table.reshape(-1, width) for table in position_embeddings)
        kernel.turn(query, cos, sin)
        kernel.turn(key, cos, sin)
        keys, values = key[:, :, None], value[:, :, None]
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        mixed = attend_one(query[:, :, None], keys, values, self.scaling)
        projected: Tensor = self.get_submodule("o_proj")(mixed.reshape(batch, 1, -1))
        return projected, None

    def _prompt_kernel(self, hidden: Tensor, tables: object) -> native.Kernel | None:
        """The kernel if it computes this call: several new tokens per sequence, whole heads turned."""
        if hidden.dim() != 3 or hidden.shape[1] == 1 or not isinstance(tables, tuple) or self.training:
            return None
        if not are_of(hidden, tables, self.head_dim) or not self.is_causal or not self._projections():
            return None
        return may_attend(self.head_dim, hidden, *tables)

    def _is_step(self, hidden: Tensor, tables: object) -> bool:
        """Whether the kernel computes this call: one new token for each of few sequences, whole heads turned."""
        if hidden.dim() != 3 or hidden.shape[1] != 1 or hidden.shape[0] > FEW_ROWS or not hidden.is_contiguous():
            return False
        if not isinstance(tables, tuple) or self.training or torch.is_grad_enabled():
            return False
        cos, sin = tables
        if cos.shape[-1] != self.head_dim or cos.numel() not in (self.head_dim, hidden.shape[0] * self.head_dim):
            return False
        layers = self._projections()
        return bool(layers) and native.holds(hidden, cos, sin) and all(p.takes(hidden) for p in layers)

    def _projections(self) -> list[Projection]:
        """Those of query, key and value; none if one was wrapped, or anybody listens to what is turned in place."""
        parts = self._modules
        layers = [p for p in map(parts.get, ("q_proj", "k_proj", "v_proj")) if type(p) is Projection]
        norms = [p for p in map(parts.get, ("q_norm", "k_norm")) if p is not None]
        return layers if len(layers) == 3 and untouched((*layers, *norms)) else []


def use_steps(model: PreTrainedModel) -> bool:
    """Let the kernel compute norms and attention of modules on the CPU; whether it knows all attention."""
    everywhere = True
    for module in model.modules():
        mixin = _mixin(module)
        if mixin is not None and all(parameter.device.type == "cpu" for parameter in module.parameters()):
            cls = type(module)
            module.__class__ = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})
        elif type(module).__name__.endswith("Attention") and not _is_known(module):
            everywhere = False
    return everywhere


def _is_known(module: nn.Module) -> bool:
    """Whether the kernel attends in a module that is no StepAttention."""
    if type(module).__name__ == "GptOssAttention":  # by runtime.sinks
        return all(parameter.device.type == "cpu" for parameter in module.parameters())
    return isinstance(module, LatentAttention)


def _mixin(module: nn.Module) -> type[nn.Module] | None:
    name = type(module).__name__
    if name in ATTENTIONS:
        return StepAttention
    if name == "GptOssRMSNorm":  # which rounds once, after its weight
        return None
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1 and module.bias is not None:
        return StepLayerNorm
    return StepNorm if name.endswith("RMSNorm") and hasattr(module, "variance_epsilon") else None
