"""Checkpoints of 1 to 2 B random bfloat16 parameters, a shape of each family, and what one token reads of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from sim.model import ModelSpec


@dataclass(frozen=True)
class Shape:
    """A family, its query and KV heads, and what its config says beside what all say; tiny: what it says instead."""

    family: str
    n_layers: int
    heads: tuple[int, int]
    sizes: dict[str, Any]
    tiny: dict[str, Any]
    in_llama_cpp: bool = False
    """Whether experiments.peer_gguf converts it."""
    width: int = 2048
    always: dict[str, Any] = field(default_factory=dict)


_LATENT = {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "kv_lora_rank": 512}
_TINY_LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 32}
_GREEDY = {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}

SHAPES: dict[str, Shape] = {
    "llama": Shape("llama", 22, (32, 4), {"intermediate_size": 5632}, {"intermediate_size": 128}, True),
    "mixtral": Shape(
        "mixtral",
        8,
        (32, 8),
        {"intermediate_size": 4096},
        {"intermediate_size": 128},
        True,
        always={"num_local_experts": 8},
    ),
    "qwen-moe": Shape(
        "qwen2_moe",
        6,
        (16, 16),
        {"moe_intermediate_size": 768, "shared_expert_intermediate_size": 3072},
        {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
        True,
        always={"num_experts": 64, "num_experts_per_tok": 6},
    ),
    "qwen3-moe": Shape(
        "qwen3_moe",
        6,
        (32, 4),
        {"moe_intermediate_size": 768, "head_dim": 128},
        {"moe_intermediate_size": 32, "head_dim": 16},
        always={"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True},
    ),
    "phimoe": Shape(
        "phimoe",
        6,
        (16, 4),
        {"intermediate_size": 3200},
        {"intermediate_size": 128},
        always={"num_local_experts": 16, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
    ),
    "olmoe": Shape(
        "olmoe",
        4,
        (16, 16),
        {"intermediate_size": 1024},
        {"intermediate_size": 32},
        always={"num_experts": 64, "num_experts_per_tok": 8, "eos_token_id": 2},
    ),
    "deepseek-v2": Shape(
        "deepseek_v2",
        4,
        (16, 16),
        {**_LATENT, "intermediate_size": 10944, "moe_intermediate_size": 1408},
        {**_TINY_LATENT, "intermediate_size": 128, "moe_intermediate_size": 32},
        always={**_GREEDY, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2}
        | {"first_k_dense_replace": 1},
    ),
    "gpt-oss": Shape(
        "gpt_oss",
        4,
        (64, 8),
        {"intermediate_size": 2880, "head_dim": 64},
        {"intermediate_size": 64, "head_dim": 16},
        width=2880,
        always={"num_local_experts": 16, "num_experts_per_tok": 4},
    ),
}
"""A token reads 0.3 to 1.0 B parameters of them."""


def config_of(name: str, tiny: bool) -> PreTrainedConfig:
    """A config of a shape, or of next to nothing."""
    shape = SHAPES[name]
    n_heads, n_kv_heads = (4, 2 if shape.heads[0] > shape.heads[1] else 4) if tiny else shape.heads
    common = {
        "vocab_size": 256 if tiny else 32000,
        "hidden_size": 64 if tiny else shape.width,
        "num_hidden_layers": 2 if tiny else shape.n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "max_position_embeddings": 4096,
    }
    given = {**common, **(shape.tiny if tiny else shape.sizes), **shape.always}
    config: PreTrainedConfig = AutoConfig.for_model(shape.family, **given)
    return config


@torch.no_grad()
def write(name: str, folder: Path, tiny: bool) -> None:
    """The checkpoint, unless it is there: normal weights scaled by fan-in, the same block of them over and over."""
    if (folder / "model.safetensors").is_file():
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name, tiny), dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    nn.Module.to_empty(model, device="cpu")
    draw = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 22, generator=draw).bfloat16()
    for key, parameter in model.named_parameters():
        if "norm" in key or key.endswith(("bias", "sinks")):
            parameter.fill_(float("norm" in key and not key.endswith("bias")))
            continue
        flat, scale = parameter.view(-1), 1.0 if "embed" in key else parameter.shape[-1] ** -0.5
        for first in range(0, flat.numel(), block.numel()):
            part = flat[first : first + block.numel()]
            torch.mul(block[: part.numel()], scale, out=part)
    model.save_pretrained(folder)


def token_bytes(spec: ModelSpec) -> int:
    """Bytes of weights that one token reads: attention, router, shared and chosen experts, head; no embedding."""
    total = spec.head_bytes
    for i, layer in enumerate(spec.layers):
        total += spec.rest_bytes(i) + spec.ffn_bytes(i) * layer.ffn.top_k // layer.ffn.n_experts
    return total
