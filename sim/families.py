"""Layers of a model from its config: which mixer and which MLP each has, and what else it weighs."""

from __future__ import annotations

from typing import Any

from hwmodels.errors import ModelError
from sim.config import Config
from sim.layers import AttentionSpec, FfnSpec, LayerSpec
from sim.mixers import mixer, together

_EVERY: dict[str, tuple[str, int, str]] = {
    "gemma2": ("", 2, "sliding_attention"),
    "gemma3_text": ("sliding_window_pattern", 6, "sliding_attention"),
    "gemma4_text": ("", 6, "sliding_attention"),
    "gpt_oss": ("", 2, "sliding_attention"),
    "llama4_text": ("no_rope_layer_interval", 4, "chunked_attention"),
    "mimo_v2_flash": ("", 6, "sliding_attention"),
    "qwen3_5_moe_text": ("full_attention_interval", 4, "linear_attention"),
    "qwen3_5_text": ("full_attention_interval", 4, "linear_attention"),
    "qwen3_next": ("full_attention_interval", 4, "linear_attention"),
}
"""Where a config does not list its layers: every n-th has full attention (n by a key of the config, or always), the
others this kind."""
_REFUSED = {
    "mlp_bias": "MLPs with biases",
    "hidden_size_per_layer_input": "embeddings per layer",
    "num_kv_shared_layers": "layers that share a KV cache",
}
_BLOCKS = {"M": "linear_attention", "mamba": "linear_attention", "*": "full_attention", "attention": "full_attention"}
_BLOCKS |= {"E": "moe", "-": "mlp"}


def layers_of(config: Config) -> tuple[LayerSpec, ...]:
    """All layers; ModelError for a size that is missing or a structure that is not supported."""
    if config.family == "nemotron_h":
        return _blocks(config)
    kinds, routed = layer_kinds(config), _routed(config)
    return tuple(_layer(config, mixer(config, kinds[i], i), routed[i]) for i in range(len(kinds)))


def head_params(config: Config) -> int:
    """Parameters of the final norm and the output projection."""
    d_model, vocab = config.need("hidden_size"), config.need("vocab_size")
    extra = 0
    if config.family == "phimoe":
        extra = d_model + (vocab if config.flag("lm_head_bias") else 0)
    if config.family == "deepseek_v4":
        streams = config.may("hc_mult", 4)
        extra = streams * streams * d_model + streams + 1
    return vocab * d_model + d_model + extra


# -- kinds of layers ----------------------------------------------------------------------------------


def layer_kinds(config: Config) -> list[str]:
    """The kind of every layer's mixer: full_attention, sliding_attention, linear_attention and others."""
    family, n_layers = config.family, config.need("num_hidden_layers")
    if family in ("mistral", "mixtral", "phimoe"):
        return ["sliding_attention" if _has_window(config) else "full_attention"] * n_layers
    if family in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"):
        return _qwen_kinds(config, n_layers)
    listed = config.per_layer("layer_types")
    if listed is not None and family != "llama":
        return [str(kind) for kind in listed]
    if family == "kimi_linear":
        full = config.inside("linear_attn_config").values.get("full_attn_layers", ())
        return ["full_attention" if i + 1 in full else "linear_attention" for i in range(n_layers)]
    if family == "deepseek_v4":
        return _compression_kinds(config, n_layers)
    if family == "minimax_m3_vl_text":
        sparse = config.inside("sparse_attention_config").values.get("sparse_attention_freq", [0] * n_layers)
        return ["minimax_m3_sparse" if sparse[i] else "full_attention" for i in range(n_layers)]
    key, default, other = _EVERY.get(family, ("", 1, "full_attention"))
    every = config.may(key, default) if key else default
    kinds = [other if (i + 1) % every else "full_attention" for i in range(n_layers)]
    if family == "mimo_v2_flash":
        kinds[0] = "full_attention"
    if family == "gemma4_text":
        kinds[-1] = "full_attention"
    return kinds


def _has_window(config: Config) -> bool:
    window = config.values.get("sliding_window")
    return isinstance(window, int) and not isinstance(window, bool)


def _qwen_kinds(config: Config, n_layers: int) -> list[str]:
    if not (_has_window(config) and config.flag("use_sliding_window")):
        return ["full_attention"] * n_layers
    listed = config.per_layer("layer_types")
    if config.family == "qwen3_moe":
        slides = [True] * n_layers
    elif listed is not None:
        slides = [kind == "sliding_attention" for kind in listed]
    else:
        first_full = config.values.get("max_window_layers", 28)
        # in one family the limit counts from below, and only every second layer slides
        moe = config.family == "qwen2_moe"
        slides = [(i % 2 == 0 and i < first_full) if moe else i >= first_full for i in range(n_layers)]
    return ["sliding_attention" if s else "full_attention" for s in slides]


def _compression_kinds(config: Config, n_layers: int) -> list[str]:
    names = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    ratios = config.per_layer("compress_ratios") or [128, 128, *((4 if i % 2 else 128) for i in range(n_layers - 2))]
    return [names[ratio] for ratio in ratios]


# -- MLPs ---------------------------------------------------------------------------------------------


def _routed(config: Config) -> list[bool]:
    """Which layers have experts."""
    n_layers = config.need("num_hidden_layers")
    if not config.kind.experts or not any(config.values.get(key) for key in _N_EXPERTS):
        return [False] * n_layers
    listed = config.per_layer("mlp_layer_types")
    if listed is not None:
        return [kind != "dense" for kind in listed]
    frequency = config.per_layer("moe_layer_freq")
    if frequency is not None:
        return [bool(f) for f in frequency]
    if config.family == "gemma4_text":
        return [config.flag("enable_moe_block")] * n_layers
    if config.family == "step3p5":
        return [i in _enumerated(config) for i in range(n_layers)]
    if config.family == "llama4_text":
        every = config.may("interleave_moe_layer_step", 1)
        return [(i + 1) % every == 0 for i in range(n_layers)]
    first = config.values.get("first_k_dense_replace")
    if first is not None:
        return [i >= first for i in range(n_layers)]
    if config.family in ("glm4_moe_lite", "mimo_v2_flash"):
        return [i >= 1 for i in range(n_layers)]
    if not config.family.startswith("qwen"):
        return [True] * n_layers
    sparse_step, dense = config.values.get("decoder_sparse_step") or 1, config.values.get("mlp_only_layers") or ()
    return [i not in dense and (i + 1) % sparse_step == 0 for i in range(n_layers)]


def _enumerated(config: Config) -> set[int]:
    text: Any = config.values.get("moe_layers_enum", "")
    return {int(i) for i in (text.split(",") if isinstance(text, str) else text) if str(i).strip()}


# transformers 5 writes one family's count under another's name
_N_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k")
_MATRICES = {"nemotron_h": 2}


def _ffn(config: Config, routed: bool) -> FfnSpec:
    if not routed:
        return FfnSpec(1, 1, config.need(config.kind.dense), _MATRICES.get(config.family, 3))
    n_experts, top_k = config.need(*_N_EXPERTS), config.need(*_TOP_K)
    if not top_k <= n_experts or n_experts == 1:
        raise ModelError(
            f"{config.where}: num_experts_per_tok is {top_k} of {n_experts} experts; expected 1 to all of 2 or more"
        )
    latent = config.may("moe_latent_size", 0) or config.may("routed_expert_hidden_size", 0)
    return FfnSpec(
        n_experts,
        top_k,
        config.need(config.kind.experts),
        _MATRICES.get(config.family, 3),
        shared_columns=_shared_columns(config),
        width=latent or None,
        column_biases=2 if config.family == "gpt_oss" else 0,
    )


def _shared_columns(config: Config) -> int:
    key = config.kind.shared
    if not key:
        return 0
    if key in ("n_shared_experts", "num_shared_experts"):
        return (config.values.get(key) or 0) * config.need("moe_intermediate_size")
    return config.need(key)


# -- layers -------------------------------------------------------------------------------------------


def _layer(config: Config, attention: AttentionSpec, routed: bool, n_norms: int | None = None) -> LayerSpec:
    d_model, ffn = config.need("hidden_size"), _ffn(config, routed)
    other = (config.kind.norms if n_norms is None else n_norms) * d_model
    for key in ("mlp_bias", "hidden_size_per_layer_input", "num_kv_shared_layers"):
        if config.values.get(key):
            raise ModelError(f"{config.where}: {key} is set; {_REFUSED[key]} are not supported")
    if ffn.is_moe:
        other += _beside_experts(config, ffn, d_model)
    if config.family == "deepseek_v4":  # two hyper-connections: they mix the streams of the residual
        streams = config.may("hc_mult", 4)
        mixes = (2 + streams) * streams
        other += 2 * (mixes * (streams * d_model + 1) + 3)
    return LayerSpec(attention, ffn, other, ffn.n_experts if ffn.is_moe and config.kind.corrected else 0)


def _beside_experts(config: Config, ffn: FfnSpec, d_model: int) -> int:
    """Router, shared experts, projections to the experts' width, and biases."""
    params = ffn.n_experts * d_model + ffn.n_matrices * d_model * ffn.shared_columns
    if config.kind.shared_gate:
        params += d_model
    if ffn.width is not None:
        params += 2 * d_model * ffn.width + (ffn.width if config.flag("latent_moe_use_norm") else 0)
    if config.family == "gpt_oss":
        params += ffn.n_experts * (1 + d_model)  # the router's and down's; gate's and up's belong to columns
    if config.family == "gemma4_text":  # three more norms; scales of the router
        params += 4 * d_model + ffn.n_experts
    return params


def _blocks(config: Config) -> tuple[LayerSpec, ...]:
    """Nemotron-H lists mixers and MLPs one by one; a layer here is an MLP with the mixers before it."""
    listed = config.values.get("hybrid_override_pattern") or config.values.get("layers_block_type") or ()
    kinds = [_BLOCKS.get(str(kind), str(kind)) for kind in listed]
    if set(kinds) - set(_BLOCKS.values()) or kinds[-1:] not in (["moe"], ["mlp"]):
        raise ModelError(
            f"{config.where}: blocks are {listed!r}; expected a hybrid_override_pattern of M, *, E and -, an MLP last"
        )
    layers: list[LayerSpec] = []
    mixers: list[AttentionSpec] = []
    for i, kind in enumerate(kinds):
        if kind not in ("moe", "mlp"):
            mixers.append(mixer(config, kind, i))
            continue
        if not mixers:
            raise ModelError(f"{config.where}: block {i} is an MLP that follows another; this is not supported")
        layers.append(_layer(config, together(mixers), kind == "moe", n_norms=len(mixers) + 1))
        mixers = []
    return tuple(layers)
