"""The checkpoints of experiments.peer_models as BF16 GGUF, for llama.cpp; needs the package gguf.

Norms, biases and routers are float32, as in llama.cpp's own conversions. There is no vocabulary: tokens are fed as ids.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.adapter import Adapter
from runtime.checkpoint import Checkpoint, read_config

_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_NORMS = {"input_layernorm.weight": "attn_norm", "post_attention_layernorm.weight": "ffn_norm"}
_SHARED = "mlp.shared_expert"


def write_gguf(folder: Path) -> Path:
    """The file beside a checkpoint, unless it is there."""
    path = folder / "model.gguf"
    if path.is_file():
        return path
    gguf: Any = importlib.import_module("gguf")
    config = read_config(folder)
    adapter = Adapter.of(config, folder.name)
    is_qwen = config["model_type"] == "qwen2_moe"
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen2moe" if is_qwen else "llama")
    _describe(writer, config)
    with Checkpoint.open(folder) as checkpoint:
        for name, ours in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")):
            _add(writer, gguf, f"{ours}.weight", checkpoint.tensor(f"{name}.weight"))
        for layer in range(config["num_hidden_layers"]):
            _add_layer(writer, gguf, adapter, checkpoint, layer, None if is_qwen else config)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


def _describe(writer: Any, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_feed_forward_length(config["intermediate_size"])
    if config["model_type"] == "llama":
        return
    writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if config["model_type"] == "qwen2_moe":
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _add_layer(
    writer: Any, gguf: Any, adapter: Adapter, checkpoint: Checkpoint, layer: int, turned: Mapping[str, Any] | None
) -> None:
    """turned: the config of a family whose heads llama.cpp turns in neighbouring pairs, not in halves."""

    def stored(name: str) -> Tensor:
        return checkpoint.tensor(adapter.checkpoint_key(f"model.layers.{layer}.{name}", checkpoint))

    def add(name: str, tensor: Tensor, kind: str = "weight") -> None:
        _add(writer, gguf, f"blk.{layer}.{name}.{kind}", tensor)

    for theirs, ours in _NORMS.items():
        add(ours, stored(theirs))
    for theirs, ours in _ATTENTION.items():
        weight = stored(f"{theirs}.weight")
        if turned is not None and ours in ("attn_q", "attn_k"):
            weight = _in_pairs(weight, weight.shape[0] * turned["num_attention_heads"] // turned["hidden_size"])
        add(ours, weight)
        if f"model.layers.{layer}.{theirs}.bias" in checkpoint:
            add(ours, stored(f"{theirs}.bias"), "bias")
    ffn = adapter.spec.layers[layer].ffn
    matrices = zip(*(adapter.read_ffn(checkpoint, layer, e) for e in range(ffn.n_experts)), strict=True)
    for name, parts in zip(("gate", "up", "down"), matrices, strict=True):
        add(f"ffn_{name}_exps" if ffn.is_moe else f"ffn_{name}", torch.stack(parts) if ffn.is_moe else parts[0])
    if ffn.is_moe:
        add("ffn_gate_inp", stored("mlp.gate.weight").float())
    if f"model.layers.{layer}.{_SHARED}_gate.weight" in checkpoint:
        add("ffn_gate_inp_shexp", stored(f"{_SHARED}_gate.weight")[0])
        for name in ("gate", "up", "down"):
            add(f"ffn_{name}_shexp", stored(f"{_SHARED}.{name}_proj.weight"))


def _in_pairs(weight: Tensor, n_heads: int) -> Tensor:
    halves = weight.view(n_heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _add(writer: Any, gguf: Any, name: str, tensor: Tensor) -> None:
    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        writer.add_tensor(name, tensor.float().numpy())
        return
    raw = tensor.contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
