"""Reads mixtures of experts into words for the kernel: how a router chooses, and experts that see every row.

Routers of one name compute the same thing; what they compute is in runtime/native/router.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from runtime import native
from runtime.native.layer import SIGMOID, SOFTMAX, SOFTMAX_OF_CHOSEN, SPARSE_MIXER, LayerWords
from runtime.reader import Reader, UnfitError

_MOST_EXPERTS = 4096


def read_router(words: LayerWords, reader: Reader, router: Any) -> None:
    """How a router chooses experts of rows of words.width. UnfitError if the kernel does not know it."""
    read = _ROUTERS.get(type(router).__name__)
    if read is None:
        raise UnfitError(type(router).__name__)
    words.n_experts, words.top_k = router.weight.shape[0], reader.fact(router, "top_k")
    words.router = reader.address(router, "weight", (words.n_experts, words.width))
    words.scaling = 1.0
    read(words, reader, router)
    most = words.n_experts // words.n_groups * words.top_groups if words.n_groups else words.n_experts
    if not 0 < words.top_k <= most <= words.n_experts <= _MOST_EXPERTS:
        raise UnfitError("top_k")


def _softmax(words: LayerWords, reader: Reader, router: Any) -> None:
    words.routing = SOFTMAX
    normalises = reader.fact(router, "norm_topk_prob")
    words.normalises = normalises or not hasattr(router, "norm_topk_prob")  # Mixtral's, for one
    words.rounds = not type(router).__name__.startswith("Mixtral")  # whose weights stay float32


def _sparse_mixer(words: LayerWords, reader: Reader, router: Any) -> None:
    words.routing, words.rounds = SPARSE_MIXER, 1
    words.jitter = reader.fact(router, "router_jitter_noise")
    if reader.fact(router, "training") or words.top_k != 2 or words.n_experts < 2:
        raise UnfitError("sparsemixer")


def _groups_of_softmax(words: LayerWords, reader: Reader, router: Any) -> None:
    words.routing, words.wide_logits = SOFTMAX, 1
    words.scaling = reader.fact(router, "routed_scaling_factor")
    method = reader.fact(router, "topk_method")
    if method == "group_limited_greedy":
        _read_groups(words, reader, router, 1)
    elif method != "greedy":
        raise UnfitError("topk_method")


def _groups_of_sigmoid(words: LayerWords, reader: Reader, router: Any) -> None:
    words.routing, words.wide_logits = SIGMOID, 1
    words.scaling = reader.fact(router, "routed_scaling_factor")
    words.normalises = bool(reader.fact(router, "norm_topk_prob"))
    words.correction = reader.buffer(router, "e_score_correction_bias", (words.n_experts,))
    _read_groups(words, reader, router, 2)


def _softmax_of_chosen(words: LayerWords, reader: Reader, router: Any) -> None:
    words.routing, words.rounds = SOFTMAX_OF_CHOSEN, 1
    words.router_bias = reader.address(router, "bias", (words.n_experts,))


_ROUTERS: dict[str, Callable[[LayerWords, Reader, Any], None]] = {
    **{f"{family}TopKRouter": _softmax for family in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe")},
    "PhimoeTopKRouter": _sparse_mixer,
    "DeepseekV2TopkRouter": _groups_of_softmax,
    "DeepseekV3TopkRouter": _groups_of_sigmoid,
    "GptOssTopKRouter": _softmax_of_chosen,
}


def _read_groups(words: LayerWords, reader: Reader, router: Any, least: int) -> None:
    """Groups of experts of one size, each of so many experts at least."""
    words.n_groups, words.top_groups = reader.fact(router, "num_group"), reader.fact(router, "topk_group")
    n_groups = words.n_groups
    if n_groups < 1 or words.n_experts % n_groups or words.n_experts < least * n_groups:
        raise UnfitError("num_group")
    if not 0 < words.top_groups <= n_groups:
        raise UnfitError("topk_group")


def read_shared(words: LayerWords, reader: Reader, mlp: nn.Module, act: int) -> None:
    """Experts for all rows beside those chosen, if a mixture has some: weighed by a gate (Qwen), or not (DeepSeek)."""
    name = "shared_expert" if hasattr(mlp, "shared_expert") else "shared_experts"
    if not hasattr(mlp, name):
        return
    shared: Any = reader.part(mlp, name, lambda m: True)
    reader.part(shared, "act_fn", lambda m: native.activation_code(m) == act)
    columns = words.shared_columns = shared.gate_proj.weight.shape[0]
    words.shared_gate, gate_bias = reader.linear(shared, "gate_proj", (columns, words.width))
    words.shared_up, up_bias = reader.linear(shared, "up_proj", (columns, words.width))
    words.shared_down, down_bias = reader.linear(shared, "down_proj", (words.width, columns))
    if name == "shared_expert":
        words.shared_weight, _ = reader.linear(mlp, "shared_expert_gate", (1, words.width))
    if gate_bias or up_bias or down_bias:
        raise UnfitError(name)
