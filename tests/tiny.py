"""Tiny random models of every supported family, as transformers writes them to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

DENSE = ("llama", "mistral", "qwen2", "qwen3")
LATENT = ("deepseek_v2", "deepseek_v3")
FAMILIES = (*DENSE, "mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "olmoe", *LATENT, "gpt_oss")

# Sizes are all different, so that no two can be mistaken for each other.
_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "kv_lora_rank": 18,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None, "head_dim": 12},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "head_dim": 16,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
    },
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 2.0},
    "phimoe": {"num_local_experts": 5, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
    "deepseek_v2": {**_DEEPSEEK, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_DEEPSEEK, "q_lora_rank": 22},
    "gpt_oss": {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Config of a tiny model of a family, with changes."""
    config: PreTrainedConfig = AutoConfig.for_model(family, **{**_COMMON, **_FAMILY[family], **changes})
    return config


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model with weights large enough that every part matters to the logits; biases are not zero."""
    config = tiny_config(family, **changes)
    generator = torch.Generator().manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *_stored_buffers(model)):
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.2, generator=generator)
    return model.train(False)  # type: ignore[no-any-return]


def _stored_buffers(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    stored = model.state_dict()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in stored]


def write_tiny(folder: Path, family: str, shards: bool = False, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny checkpoint with save_pretrained, in one file or in several shards."""
    tiny_model(family, seed, **changes).save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    return folder


def eager(folder: Path) -> PreTrainedModel:
    """The model as transformers loads and runs it: float32, eager attention, eager experts."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.train(False)  # type: ignore[no-any-return]


def tokens(n_tokens: int, batch: int = 1, seed: int = 0, vocab: int = 97) -> torch.Tensor:
    """Random token ids [batch, n_tokens], none of them a special one."""
    return torch.randint(3, vocab, (batch, n_tokens), generator=torch.Generator().manual_seed(seed))
