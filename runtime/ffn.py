"""The modules put in place of layer.mlp and layer.mlp.experts, and the hooks that mark a step's parts.

They hold no weights: those belong to the executor's store.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hwmodels.errors import ExecutionError
from runtime.executor import Executor
from runtime.kv import grow_in_place
from runtime.routing import Routed
from runtime.skeleton import decoder_layers
from runtime.window import knows_windows, slide_in_place

_DETACHED = "the model is closed and its weights are gone; load it again"
_NO_STATE = (
    "the model runs by a plan: its MLPs are cut and not among its parameters, so it neither gives nor takes a state "
    "dict; use the one of the model that transformers loads from the same checkpoint"
)


class _Partitioned(nn.Module):
    """An MLP without parameters: whatever holds one has no state dict, where it would be missing without a word."""

    def _save_to_state_dict(self, *args: Any) -> NoReturn:
        raise ExecutionError(_NO_STATE)

    def _load_from_state_dict(self, *args: Any) -> NoReturn:
        raise ExecutionError(_NO_STATE)


class PartitionedMlp(_Partitioned):
    """A dense MLP that an executor runs: [..., D] -> [..., D]."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.executor: Executor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer's MLP by plan."""
        if self.executor is None:
            raise ExecutionError(_DETACHED)
        rows = x.reshape(-1, x.shape[-1])
        return self.executor.run_mlp(self.layer, rows, None).reshape(x.shape)


class PartitionedExperts(_Partitioned):
    """Routed experts that an executor runs, with the call that transformers 5 makes; adds their down's biases."""

    def __init__(self, layer: int, n_experts: int, down_proj_bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.layer, self.num_experts = layer, n_experts
        self.executor: Executor | None = None
        if down_proj_bias is not None:  # [E, D]: no column's, so that no part of a cut MLP has it
            self.down_proj_bias = down_proj_bias

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [S, D], top_k_index and top_k_weights [S, k] -> [S, D]."""
        if self.executor is None:
            raise ExecutionError(_DETACHED)
        routed = Routed.of(top_k_index, top_k_weights, self.num_experts)
        out = self.executor.run_mlp(self.layer, hidden_states, routed)
        bias_ED: Tensor | None = self._parameters.get("down_proj_bias")
        return out if bias_ED is None else torch.addmm(out, _by_expert(top_k_index, top_k_weights, bias_ED), bias_ED)


def _by_expert(top_k_index: Tensor, top_k_weights: Tensor, bias_ED: Tensor) -> Tensor:
    """Weights [S, E] of a choice [S, k], zero for experts not chosen; the index E means "masked"."""
    n_experts = bias_ED.shape[0]
    weights = top_k_weights.new_zeros((top_k_index.shape[0], n_experts + 1), dtype=bias_ED.dtype)
    return weights.scatter_(1, top_k_index, top_k_weights.to(bias_ED.dtype))[:, :n_experts]


def attach(model: PreTrainedModel, executor: Executor) -> None:
    """Let the executor run the model's MLPs, and tell it where steps, layers and the head begin."""
    for module in model.modules():
        if isinstance(module, (PartitionedMlp, PartitionedExperts)):
            module.executor = executor
    names = tuple(inspect.signature(model.forward).parameters)
    model.register_forward_pre_hook(_begin_step(executor, names), with_kwargs=True)
    model.register_forward_hook(lambda *_: executor.end_step())
    for i, layer in enumerate(decoder_layers(model)):
        layer.register_forward_pre_hook(_enter_layer(executor, i), with_kwargs=True)
    norm = model.get_submodule("model.norm")
    norm.register_forward_pre_hook(lambda _, args: (executor.enter_head(args[0]), *args[1:]))


Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def _begin_step(executor: Executor, names: Sequence[str]) -> Callable[[nn.Module, Args, Kwargs], None]:
    def hook(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        rows = ids if ids is not None else embeds
        if rows is None:
            raise ExecutionError("the model was called with neither input_ids nor inputs_embeds")
        batch, n_new = rows.shape[:2]
        cache = given.get("past_key_values")
        grow_in_place(cache, executor.most_tokens(batch))
        if knows_windows(module.config):
            slide_in_place(cache)
        depth = int(cache.get_seq_length()) if cache is not None else 0
        # Asked of prompts that the kernel may compute alone: reading a mask would wait for a GPU.
        masked = n_new > 1 and executor.knows_attention and _masked(module, given.get("attention_mask"), depth + n_new)
        executor.begin_step(batch * n_new, depth + n_new, batch, masked)

    return hook


def _masked(model: nn.Module, mask: object, n_tokens: int) -> bool:
    """Whether some tokens do not see all before them: of so many, some are padding or beyond a window."""
    window = None if knows_windows(model.config) else getattr(model.config, "sliding_window", None)
    return bool(window and n_tokens >= window) or (isinstance(mask, Tensor) and not bool(mask.all()))


def _enter_layer(executor: Executor, layer: int) -> Callable[[nn.Module, Args, Kwargs], tuple[Args, Kwargs]]:
    def hook(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        del module
        before = args[0]
        hidden = executor.enter_layer(layer, before)
        if hidden.device != before.device or kwargs_elsewhere(kwargs, hidden.device):
            kwargs = {name: moved(value, hidden.device) for name, value in kwargs.items()}
        return (hidden, *args[1:]), kwargs

    return hook


def kwargs_elsewhere(kwargs: dict[str, Any], device: torch.device) -> bool:
    """Whether the rotary tables that a layer is given, cosine and sine or one complex, lie elsewhere than its input."""
    tables = kwargs.get("position_embeddings")
    first = tables[0] if isinstance(tables, tuple) and tables else tables
    return isinstance(first, Tensor) and first.device != device


def moved(value: Any, device: torch.device) -> Any:
    """Tensors, and tuples of tensors, on another device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)
    return value
