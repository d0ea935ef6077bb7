"""A Hugging Face config.json as numbers, with errors that name the key; and what its family adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from hwmodels.errors import ModelError


@dataclass(frozen=True)
class Family:
    """What decides sizes and is not in a config.

    biases      projections that have one, where the config's bias_key (or bias_default) says so
    qk_norm     norms of queries and keys: per head, or over all heads together
    gate        of attention's output: an element each, or one number per head
    sinks       a number per head: in all layers, or in sliding ones
    norms       of d_model weights each, in a layer
    experts     the config's key of an expert's columns; none where all layers are dense
    shared      the config's key of the shared experts' columns, or of their number
    dense       the config's key of a dense layer's columns
    corrected   whether the router corrects each expert's score by a number, float32 beside weights of any type
    """

    biases: Literal["", "qkv", "qkvo"] = ""
    bias_key: str = "attention_bias"
    bias_default: bool = False
    qk_norm: Literal["", "head", "all"] = ""
    gate: Literal["", "element", "head"] = ""
    sinks: Literal["", "all", "sliding"] = ""
    norms: int = 2
    experts: str = ""
    shared: str = ""
    shared_gate: bool = False
    dense: str = "intermediate_size"
    corrected: bool = False


_MOE, _PLAIN = "moe_intermediate_size", "intermediate_size"
_QWEN_SHARED = "shared_expert_intermediate_size"
_QWEN35 = Family("qkvo", qk_norm="head", gate="element", experts=_MOE, shared=_QWEN_SHARED, shared_gate=True)
_DEEPSEEK = Family("qkvo", experts=_MOE, shared="n_shared_experts")
_DEEPSEEK_V3 = replace(_DEEPSEEK, corrected=True)

FAMILIES: dict[str, Family] = {
    "llama": Family("qkvo"),
    "mistral": Family(),
    "qwen2": Family("qkv", "", True),
    "qwen3": Family("qkvo", qk_norm="head"),
    "mixtral": Family(experts=_PLAIN),
    "qwen2_moe": Family("qkv", "qkv_bias", True, experts=_MOE, shared=_QWEN_SHARED, shared_gate=True),
    "qwen3_moe": Family("qkvo", qk_norm="head", experts=_MOE),
    "phimoe": Family("qkvo", norms=4, experts=_PLAIN),  # two LayerNorms, each with a bias
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V3,
    "deepseek_v4": Family(sinks="all", experts=_MOE, shared="n_shared_experts"),
    "gemma2": Family("qkvo", norms=4),
    "gemma3_text": Family("qkvo", qk_norm="head", norms=4),
    "gemma4_text": Family("qkvo", qk_norm="head", norms=4, experts=_MOE, shared=_PLAIN),
    "glm4_moe": Family("qkv", qk_norm="head", experts=_MOE, shared="n_shared_experts"),
    "glm4_moe_lite": _DEEPSEEK,
    "glm_moe_dsa": _DEEPSEEK,
    "gpt_oss": Family("qkvo", bias_default=True, sinks="all", experts=_PLAIN),
    "kimi_k2": _DEEPSEEK_V3,
    "kimi_linear": Family(experts=_MOE, shared="num_shared_experts"),
    "llama4_text": Family("qkvo", experts=_PLAIN, shared=_PLAIN, dense="intermediate_size_mlp"),
    "mimo_v2_flash": Family("qkv", sinks="sliding", experts=_MOE),
    "minimax_m2": Family(qk_norm="all", experts=_PLAIN),
    "minimax_m3_vl_text": Family(
        qk_norm="head", experts=_PLAIN, shared="shared_intermediate_size", dense="dense_intermediate_size"
    ),
    "nemotron_h": Family(experts=_MOE, shared="moe_shared_expert_intermediate_size"),
    "olmoe": Family("qkvo", qk_norm="all", experts=_PLAIN),
    "qwen3_5_moe_text": _QWEN35,
    "qwen3_5_text": _QWEN35,
    "qwen3_next": _QWEN35,
    "step3p5": Family("qkvo", qk_norm="head", gate="head", experts=_MOE, shared="share_expert_dim"),
}

# What transformers assumes where a config.json is silent, as far as it changes sizes.
_DEFAULTS: dict[str, dict[str, int | bool]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8},
    "qwen2_moe": {"num_key_value_heads": 16, "sliding_window": 4096},
    "qwen3_moe": {"num_key_value_heads": 4, "sliding_window": 4096},
    "phimoe": {"num_key_value_heads": 8},
    "deepseek_v2": {"q_lora_rank": 1536, "first_k_dense_replace": 0, "n_shared_experts": 2},
    "deepseek_v3": {"q_lora_rank": 1536, "first_k_dense_replace": 3, "n_shared_experts": 1},
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128},
    "gemma2": {"tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True},
    "gemma4_text": {"tie_word_embeddings": True},
}
_OUTER = ("tie_word_embeddings", "dtype", "torch_dtype")
"""What a model with images says outside its language model's config."""


@dataclass(frozen=True)
class Config:
    """The values of a config.json; `where` names it in messages."""

    values: Mapping[str, Any]
    family: str
    where: str

    @staticmethod
    def of(values: Mapping[str, Any], where: str) -> Config:
        """A config with its family's defaults; of a model with images, its language model's.

        Raises ModelError for a family that is not known.
        """
        if not isinstance(values, Mapping):
            raise ModelError(f"{where}: a model config is an object, found {type(values).__name__}")
        inner = values.get("text_config")
        if isinstance(inner, Mapping):
            values = {**{key: values[key] for key in _OUTER if key in values}, **inner}
        family = values.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise ModelError(f"{where}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
        return Config({**_DEFAULTS.get(family, {}), **values}, family, where)

    @property
    def kind(self) -> Family:
        """What the family adds."""
        return FAMILIES[self.family]

    def need(self, *keys: str) -> int:
        """The first of these keys that is there, a whole number above zero; ModelError otherwise."""
        key = next((k for k in keys if self.values.get(k) is not None), keys[0])
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ModelError(f"{self.where}: {key} is {value!r}; expected a whole number above zero")
        return value

    def may(self, key: str, default: int) -> int:
        """A number, or the default where the config has none."""
        return default if self.values.get(key) is None else self.need(key)

    def flag(self, key: str, default: bool = False) -> bool:
        """A switch, or the default where the config has none."""
        return default if self.values.get(key) is None else bool(self.values[key])

    def per_layer(self, key: str) -> list[Any] | None:
        """A list with an entry for every layer, or None; ModelError if it is shorter.

        Published lists may go on after the last layer, for layers that predict further tokens.
        """
        listed, n_layers = self.values.get(key), self.need("num_hidden_layers")
        if not isinstance(listed, list):
            return None
        if len(listed) < n_layers:
            raise ModelError(f"{self.where}: {key} has {len(listed)} entries for {n_layers} layers")
        return listed[:n_layers]

    def inside(self, key: str) -> Config:
        """The values of an object inside this config; an empty one where there is none."""
        inner = self.values.get(key)
        return Config(inner if isinstance(inner, Mapping) else {}, self.family, f"{self.where}: {key}")
