"""Checkpoints of 1 to 2 B random bfloat16 parameters, in three shapes, and what one token reads of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from sim.model import ModelSpec

SHAPES: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "mixtral": MixtralForCausalLM,
    "qwen-moe": Qwen2MoeForCausalLM,
}


def config_of(name: str, tiny: bool) -> PreTrainedConfig:
    """A config: 1.1 B parameters, 1.8 B of which 0.6 are active, 2.2 B of which 0.5 are; or next to none."""
    kind: type[PreTrainedConfig]
    own: dict[str, int]
    common = {"vocab_size": 256, "hidden_size": 64} if tiny else {"vocab_size": 32000, "hidden_size": 2048}
    if name == "llama":
        kind, heads, n_layers = LlamaConfig, (32, 4), 22
        own = {"intermediate_size": 128 if tiny else 5632}
    elif name == "mixtral":
        kind, heads, n_layers = MixtralConfig, (32, 8), 8
        own = {"intermediate_size": 128 if tiny else 4096, "num_local_experts": 8}
    else:
        kind, heads, n_layers = Qwen2MoeConfig, (16, 16), 6
        own = {"moe_intermediate_size": 32 if tiny else 768, "num_experts": 64, "num_experts_per_tok": 6}
        own["shared_expert_intermediate_size"] = 64 if tiny else 3072
    n_heads, n_kv_heads = (4, 2) if tiny else heads
    layers = {
        "num_hidden_layers": 2 if tiny else n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "max_position_embeddings": 4096,
    }
    config: PreTrainedConfig = kind.from_dict({**common, **own, **layers})
    return config


@torch.no_grad()
def write(name: str, folder: Path, tiny: bool) -> None:
    """The checkpoint, unless it is there: normal weights scaled by fan-in, the same block of them over and over."""
    if (folder / "model.safetensors").is_file():
        return
    with torch.device("meta"):
        model = SHAPES[name](config_of(name, tiny))
    nn.Module.to(model, torch.bfloat16).to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 22, generator=draw).bfloat16()
    for key, parameter in model.named_parameters():
        if "norm" in key or key.endswith("bias"):
            parameter.fill_(float("norm" in key))
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
