"""ModelSpec: a transformer's sizes layer by layer, from a Hugging Face config dict.

No weights, no torch: only what decides bytes and FLOPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hwmodels import work
from hwmodels.errors import ModelError
from hwmodels.schema import digest, read_json
from hwmodels.work import DTYPE_BYTES, Work


@dataclass(frozen=True)
class FfnSpec:
    """The MLP of a layer: `n_experts` parallel MLPs of `columns` intermediate columns each.

    A dense MLP is one expert that every token uses. Shared experts (`shared_columns`) run for every
    token and stay with the attention part of the layer: they are neither cut nor routed.
    """

    n_experts: int
    top_k: int
    columns: int
    n_matrices: int = 3
    shared_columns: int = 0

    @property
    def is_moe(self) -> bool:
        """Whether a router chooses among experts."""
        return self.n_experts > 1


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of a layer. window is None for full attention, else the tokens that stay visible."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_params: int
    window: int | None = None

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that one token adds to the KV cache."""
        return 2 * self.n_kv_heads * self.head_dim


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. other_params counts norms, the router and shared experts."""

    attention: AttentionSpec
    ffn: FfnSpec
    other_params: int


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer."""

    name: str
    family: str
    d_model: int
    vocab: int
    layers: tuple[LayerSpec, ...]
    tied_embeddings: bool
    dtype: str
    max_positions: int
    head_params: int

    @cached_property
    def id(self) -> str:
        """Twelve hex digits of the sizes (not of the name)."""
        return digest([self.family, self.d_model, self.vocab, self.layers, self.dtype, self.tied_embeddings])

    @property
    def dtype_bytes(self) -> int:
        """Bytes per weight."""
        return DTYPE_BYTES[self.dtype]

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def is_moe(self) -> bool:
        """Whether any layer routes tokens to experts."""
        return any(layer.ffn.is_moe for layer in self.layers)

    def column_bytes(self, layer: int) -> int:
        """Weight bytes of one intermediate column of one expert of a layer."""
        ffn = self.layers[layer].ffn
        return ffn.n_matrices * self.d_model * self.dtype_bytes

    def ffn_bytes(self, layer: int) -> int:
        """Weight bytes of all experts of a layer: what a plan may place."""
        ffn = self.layers[layer].ffn
        return ffn.n_experts * ffn.columns * self.column_bytes(layer)

    def rest_bytes(self, layer: int) -> int:
        """Weight bytes of a layer that are not its experts: attention, norms, router, shared experts."""
        spec = self.layers[layer]
        return (spec.attention.n_params + spec.other_params) * self.dtype_bytes

    def kv_bytes(self, layer: int, n_tokens: int) -> int:
        """KV cache bytes of `n_tokens` tokens in a layer."""
        attention = self.layers[layer].attention
        visible = n_tokens if attention.window is None else min(n_tokens, attention.window)
        return visible * attention.kv_elements_per_token * self.dtype_bytes

    @property
    def embed_bytes(self) -> int:
        """Bytes of the token embedding."""
        return self.vocab * self.d_model * self.dtype_bytes

    @property
    def head_bytes(self) -> int:
        """Bytes read by the output projection and final norm."""
        return self.head_params * self.dtype_bytes

    @property
    def n_params(self) -> int:
        """All parameters, a tied embedding counted once."""
        layers = sum(
            la.attention.n_params
            + la.other_params
            + la.ffn.n_experts * la.ffn.columns * la.ffn.n_matrices * self.d_model
            for la in self.layers
        )
        head = self.head_params - (self.vocab * self.d_model if self.tied_embeddings else 0)
        return layers + self.vocab * self.d_model + head

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return self.n_params * self.dtype_bytes

    # -- work -----------------------------------------------------------------------------------------

    def ffn_work(self, layer: int, n_tokens: int, columns: int) -> Work:
        """Work of `columns` of one expert for `n_tokens` tokens."""
        return work.ffn(n_tokens, self.d_model, columns, self.dtype, self.layers[layer].ffn.n_matrices)

    def attention_work(self, layer: int, n_tokens: int, kv_tokens: int, batch: int = 1) -> Work:
        """Work of everything in a layer but its experts, for `n_tokens` rows that see `kv_tokens` each.

        n_tokens counts rows over the whole batch; kv_tokens is the depth per sequence after this step.
        FLOPs: two per weight and row, and 4 * heads * head_dim per row and visible token. io_bytes is the
        KV cache that was there before the step: zero for a fresh prompt.
        """
        spec = self.layers[layer]
        attention = spec.attention
        n_new = n_tokens // batch
        mean_visible = kv_tokens - (n_new - 1) / 2
        if attention.window is not None:
            mean_visible = min(mean_visible, attention.window)
        weights = attention.n_params + spec.other_params
        flops = 2.0 * n_tokens * weights + 4.0 * n_tokens * mean_visible * attention.n_heads * attention.head_dim
        io_bytes = float(batch * self.kv_bytes(layer, kv_tokens - n_new))
        return Work("attn", self.dtype, n_tokens, flops, float(weights * self.dtype_bytes), io_bytes)

    def head_work(self, n_rows: int) -> Work:
        """Work of final norm and output projection for the rows that need logits."""
        return Work("head", self.dtype, n_rows, 2.0 * n_rows * self.head_params, float(self.head_bytes))

    def small_work(self, op: work.Op, n_tokens: int) -> Work:
        """Work of an operation over activations only (embed, join, sample)."""
        return Work(op, self.dtype, n_tokens, 0.0, 0.0, float(n_tokens * self.d_model * self.dtype_bytes))


# -- from Hugging Face configs ------------------------------------------------------------------------

DENSE_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "phimoe")


# What transformers assumes where a config.json is silent, as far as it changes sizes.
_DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8},
    "qwen2_moe": {"num_key_value_heads": 16, "sliding_window": 4096},
    "qwen3_moe": {"num_key_value_heads": 4, "sliding_window": 4096},
    "phimoe": {"num_key_value_heads": 8},
}


def _need(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"{where}: {key} is {value!r}; expected a whole number above zero")
    return value


def _may(config: Mapping[str, Any], key: str, default: int, where: str) -> int:
    return default if config.get(key) is None else _need(config, key, where)


def _dtype(config: Mapping[str, Any], dtype: str, where: str) -> str:
    name = (config.get("dtype") or config.get("torch_dtype")) if dtype == "auto" else dtype
    name = str(name or "float32").removeprefix("torch.")
    name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(name, name)
    if name not in DTYPE_BYTES:
        raise ModelError(f"{where}: dtype {name!r} is not supported; choose {', '.join(DTYPE_BYTES)}")
    return name


def _attention(config: Mapping[str, Any], family: str, layer: int, where: str) -> AttentionSpec:
    d_model, n_heads = _need(config, "hidden_size", where), _need(config, "num_attention_heads", where)
    n_kv = _may(config, "num_key_value_heads", n_heads, where)
    if n_heads % n_kv:
        raise ModelError(f"{where}: {n_heads} attention heads cannot share {n_kv} key-value heads; expected a divisor")
    head_dim = _may(config, "head_dim", d_model // n_heads, where)
    q, kv = n_heads * head_dim, n_kv * head_dim
    n_params = d_model * (q + 2 * kv) + q * d_model + _attention_biases(config, family, q + 2 * kv)
    if family in ("qwen3", "qwen3_moe"):
        n_params += 2 * head_dim
    return AttentionSpec(n_heads, n_kv, head_dim, n_params, _window(config, family, layer))


def _attention_biases(config: Mapping[str, Any], family: str, qkv: int) -> int:
    if family == "qwen2" or (family == "qwen2_moe" and config.get("qkv_bias", True)):
        return qkv
    if family in ("llama", "qwen3", "qwen3_moe", "phimoe") and config.get("attention_bias"):
        return qkv + int(config["hidden_size"])
    return 0


def _window(config: Mapping[str, Any], family: str, layer: int) -> int | None:
    window = config.get("sliding_window")
    if not isinstance(window, int) or family == "llama":
        return None
    if family in ("mistral", "mixtral", "phimoe"):
        return window
    if not config.get("use_sliding_window"):
        return None
    return window if family == "qwen3_moe" or _is_sliding(config, family, layer) else None


def _is_sliding(config: Mapping[str, Any], family: str, layer: int) -> bool:
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and layer < len(kinds):
        return bool(kinds[layer] == "sliding_attention")
    first_full = config.get("max_window_layers", 28)
    if family == "qwen2_moe":  # there the limit counts from below, and only every second layer slides
        return layer % 2 == 0 and layer < first_full
    return bool(layer >= first_full)


def _ffn(config: Mapping[str, Any], family: str, layer: int, where: str) -> FfnSpec:
    if family in DENSE_FAMILIES or not _routes(config, family, layer):
        return FfnSpec(1, 1, _need(config, "intermediate_size", where))
    top_k = _need(config, "num_experts_per_tok", where)
    # transformers 5 writes one family's count under the other's name
    n_experts = _need(config, "num_local_experts" if "num_local_experts" in config else "num_experts", where)
    if not top_k <= n_experts or n_experts == 1:
        raise ModelError(
            f"{where}: num_experts_per_tok is {top_k} of {n_experts} experts; expected 1 to all of 2 or more"
        )
    if family in ("mixtral", "phimoe"):
        return FfnSpec(n_experts, top_k, _need(config, "intermediate_size", where))
    shared = _need(config, "shared_expert_intermediate_size", where) if family == "qwen2_moe" else 0
    return FfnSpec(n_experts, top_k, _need(config, "moe_intermediate_size", where), shared_columns=shared)


def _routes(config: Mapping[str, Any], family: str, layer: int) -> bool:
    if family in ("mixtral", "phimoe"):
        return True
    sparse_step = config.get("decoder_sparse_step") or 1
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % sparse_step == 0


def _layer(config: Mapping[str, Any], family: str, layer: int, where: str) -> LayerSpec:
    d_model = config["hidden_size"]
    ffn = _ffn(config, family, layer, where)
    norm = d_model * (2 if family == "phimoe" else 1)  # PhiMoE's LayerNorm has a bias
    other = 2 * norm
    if ffn.is_moe:
        other += ffn.n_experts * d_model
    if ffn.shared_columns:
        other += 3 * d_model * ffn.shared_columns + d_model
    return LayerSpec(_attention(config, family, layer, where), ffn, other)


def from_config(config: Mapping[str, Any], name: str = "model", dtype: str = "auto") -> ModelSpec:
    """ModelSpec of a Hugging Face config.json as a dict.

    Raises ModelError for a family that is not supported or a size that is missing.
    """
    if not isinstance(config, Mapping):
        raise ModelError(f"{name}: a model config is an object, found {type(config).__name__}")
    family = config.get("model_type")
    if family not in DENSE_FAMILIES + MOE_FAMILIES:
        known = ", ".join(DENSE_FAMILIES + MOE_FAMILIES)
        raise ModelError(f"{name}: model_type {family!r} is not supported; supported: {known}")
    config = {**_DEFAULTS[family], **config}
    if family == "llama" and config.get("mlp_bias"):
        raise ModelError(f"{name}: mlp_bias is set; MLPs with biases are not supported")
    d_model, vocab = _need(config, "hidden_size", name), _need(config, "vocab_size", name)
    head = vocab * d_model + d_model
    if family == "phimoe":
        head += d_model + (vocab if config.get("lm_head_bias") else 0)
    n_layers = _need(config, "num_hidden_layers", name)
    return ModelSpec(
        name=name,
        family=family,
        d_model=d_model,
        vocab=vocab,
        layers=tuple(_layer(config, family, i, name) for i in range(n_layers)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=_dtype(config, dtype, name),
        max_positions=_need(config, "max_position_embeddings", name),
        head_params=head,
    )


def load_model(path: str | Path, dtype: str = "auto") -> ModelSpec:
    """ModelSpec of a checkpoint folder or a config.json file."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{path}: no config.json here; expected a Hugging Face checkpoint folder or a config.json")
    name = path.name if path.is_dir() else path.parent.name
    return from_config(read_json(file, "model config"), name or "model", dtype)
