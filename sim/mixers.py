"""AttentionSpec of every kind of token mixer, from a config."""

from __future__ import annotations

from hwmodels.errors import ModelError
from sim.config import Config
from sim.layers import AttentionSpec, Sparse

FLOAT32_BYTES = 4
_DELTA_FLOPS, _MAMBA_FLOPS = 7, 5
"""FLOPs per element of the state and row: decay it, read it, correct it, write it (delta); without correction."""


def mixer(config: Config, kind: str, layer: int) -> AttentionSpec:
    """The mixer of a layer of that kind; ModelError if the config lacks a size of it."""
    if kind == "linear_attention":
        return _LINEAR.get(config.family, _gated_delta)(config)
    if config.family == "deepseek_v4":
        return _compressed(config, kind)
    if config.values.get("kv_lora_rank") is not None:
        return _latent(config, layer)
    return _grouped(config, kind, layer)


# -- attention ----------------------------------------------------------------------------------------


def _grouped(config: Config, kind: str, layer: int) -> AttentionSpec:
    """Grouped-query attention; multi-head and multi-query attention are its ends."""
    d_model, family = config.need("hidden_size"), config.kind
    n_heads, n_kv, qk_dim, v_dim = _heads(config, kind, layer)
    q, k, v, o = n_heads * qk_dim, n_kv * qk_dim, n_kv * v_dim, n_heads * v_dim
    if family.gate == "element":
        q *= 2
    if config.flag("attention_k_eq_v") and kind == "full_attention":
        v = 0
    n_params = d_model * (q + k + v + o)
    if config.flag(family.bias_key, family.bias_default) and family.biases:
        n_params += q + k + v + (d_model if family.biases == "qkvo" else 0)
    if family.qk_norm and config.flag("use_qk_norm", config.family != "glm4_moe"):
        n_params += 2 * qk_dim if family.qk_norm == "head" else n_heads * qk_dim + k
    if family.gate == "head":
        n_params += d_model * n_heads
    if family.sinks == "all" or (family.sinks == "sliding" and kind == "sliding_attention"):
        n_params += n_heads
    sparse = None
    if kind == "minimax_m3_sparse":
        heads, dim = config.need("index_n_heads"), config.need("index_head_dim")
        n_params += d_model * (heads * dim + dim) + 2 * dim
        top_k = config.need("index_topk_blocks") * config.need("index_block_size")
        sparse = Sparse(1, top_k, index_elements=dim, index_flops=2 * heads * dim)
    return AttentionSpec(
        n_heads,
        n_kv,
        qk_dim,
        n_params,
        kv_elements_per_token=n_kv * (qk_dim + v_dim),
        pair_flops=2 * n_heads * (qk_dim + v_dim),
        window=_window(config, kind),
        sparse=sparse,
    )


def _heads(config: Config, kind: str, layer: int) -> tuple[int, int, int, int]:
    """Query heads, key-value heads, dimension of queries and keys, dimension of values."""
    n_heads = config.need("num_attention_heads")
    n_kv = config.need("num_attention_groups") if "num_attention_groups" in config.values else 0
    n_kv = n_kv or config.may("num_key_value_heads", n_heads)
    head_dim = config.may("head_dim", config.need("hidden_size") // n_heads)
    if kind == "sliding_attention":
        n_heads = config.may("num_sliding_attention_heads", n_heads)
        n_heads = config.inside("attention_other_setting").may("num_attention_heads", n_heads)
        if config.family == "mimo_v2_flash":
            n_kv = config.may("swa_num_key_value_heads", 2 * n_kv)
    if config.family == "gemma4_text" and kind == "full_attention":
        head_dim = config.may("global_head_dim", 512)
        n_kv = config.may("num_global_key_value_heads", n_kv) if config.flag("attention_k_eq_v") else n_kv
        own = config.inside("per_layer_config").inside(f"{layer:02d}")
        head_dim, n_kv = own.may("head_dim", head_dim), own.may("num_key_value_heads", n_kv)
    if n_heads % n_kv:
        raise ModelError(
            f"{config.where}: {n_heads} attention heads cannot share {n_kv} key-value heads; expected a divisor"
        )
    return n_heads, n_kv, head_dim, config.may("v_head_dim", head_dim)


def _window(config: Config, kind: str) -> int | None:
    if kind == "chunked_attention":  # a row sees its chunk only: half of it on average, which is not modelled
        return config.need("attention_chunk_size")
    return config.need("sliding_window") if kind == "sliding_attention" else None


def _latent(config: Config, layer: int) -> AttentionSpec:
    """Multi-head latent attention; with an index, sparse."""
    d_model, n_heads = config.need("hidden_size"), config.need("num_attention_heads")
    q_rank, kv_rank = config.may("q_lora_rank", 0), config.need("kv_lora_rank")
    rope, nope, v_dim = (config.need(k) for k in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    qk_dim = nope + rope
    q = q_rank * (d_model + 1 + n_heads * qk_dim) if q_rank else d_model * n_heads * qk_dim
    kv = d_model * (kv_rank + rope) + kv_rank * (1 + n_heads * (nope + v_dim))
    n_params = q + kv + n_heads * v_dim * d_model
    if config.flag("attention_bias"):
        n_params += q_rank + kv_rank + rope + d_model
    if config.flag("mla_use_output_gate"):
        n_params += d_model * n_heads * v_dim
    sparse = None
    if config.values.get("index_topk") is not None:
        heads, dim = config.need("index_n_heads"), config.need("index_head_dim")
        sparse = Sparse(1, config.need("index_topk"))
        if _has_index(config, layer):
            n_params += q_rank * heads * dim + d_model * (dim + heads) + 2 * dim
            sparse = Sparse(1, config.need("index_topk"), dim, 2 * heads * dim)
    return AttentionSpec(
        n_heads,
        n_heads,
        qk_dim,
        n_params,
        kv_elements_per_token=kv_rank + rope,
        pair_flops=2 * n_heads * (qk_dim + v_dim),
        absorbed_pair_flops=2 * n_heads * (2 * kv_rank + rope),
        expand_flops=2 * kv_rank * n_heads * (nope + v_dim),
        sparse=sparse,
    )


def _has_index(config: Config, layer: int) -> bool:
    """Whether a layer scores tokens itself; others take over what the last one chose."""
    kinds = config.per_layer("indexer_types")
    if kinds is not None:
        return bool(kinds[layer] == "full")
    every, first = config.may("index_topk_freq", 1), config.may("index_skip_topk_offset", 2)
    return max(layer - first + 1, 0) % every == 0


def _compressed(config: Config, kind: str) -> AttentionSpec:
    """DeepSeek-V4: the last tokens in full, all others as one entry for every few tokens, chosen by an index or all."""
    d_model, n_heads, head_dim = (config.need(k) for k in ("hidden_size", "num_attention_heads", "head_dim"))
    q_rank, groups, o_rank = (config.need(k) for k in ("q_lora_rank", "o_groups", "o_lora_rank"))
    q = q_rank * (d_model + 1 + n_heads * head_dim)
    o = n_heads * head_dim * o_rank + groups * o_rank * d_model
    n_params = q + d_model * head_dim + head_dim + o + n_heads
    sparse = None
    if kind == "heavily_compressed_attention":
        stride = 128
        n_params += head_dim * (2 * d_model + stride + 1)
        sparse = Sparse(stride)
    elif kind == "compressed_sparse_attention":
        stride, heads, dim = 4, config.need("index_n_heads"), config.need("index_head_dim")
        n_params += head_dim * (4 * d_model + 2 * stride + 1) + dim * (4 * d_model + 2 * stride + 1)
        n_params += q_rank * heads * dim + d_model * heads
        sparse = Sparse(stride, config.need("index_topk"), dim, 2 * heads * dim)
    return AttentionSpec(
        n_heads,
        1,
        head_dim,
        n_params,
        kv_elements_per_token=head_dim,  # keys are values
        pair_flops=4 * n_heads * head_dim,
        window=config.need("sliding_window"),
        sparse=sparse,
    )


# -- recurrences --------------------------------------------------------------------------------------


def _recurrent(heads: tuple[int, int, int], n_params: int, state: int, conv: int, flops: int) -> AttentionSpec:
    """heads: of values, of keys, and a key's dimension; state and conv are elements."""
    return AttentionSpec(
        *heads,
        n_params,
        kv_elements_per_token=0,
        pair_flops=0,
        state_bytes=FLOAT32_BYTES * (state + conv),
        row_flops=flops * state,
    )


def _gated_delta(config: Config) -> AttentionSpec:
    """Gated DeltaNet: a state of key x value dimension per head."""
    d_model, kernel = config.need("hidden_size"), config.need("linear_conv_kernel_dim")
    n_keys, n_values = config.need("linear_num_key_heads"), config.need("linear_num_value_heads")
    key_dim, value_dim = config.need("linear_key_head_dim"), config.need("linear_value_head_dim")
    keys, values = n_keys * key_dim, n_values * value_dim
    conv = 2 * keys + values
    n_params = d_model * (conv + values + 2 * n_values) + conv * kernel + 2 * n_values + value_dim + values * d_model
    state = n_values * key_dim * value_dim
    return _recurrent((n_values, n_keys, key_dim), n_params, state, conv * kernel, _DELTA_FLOPS)


def _kimi_delta(config: Config) -> AttentionSpec:
    """Kimi Delta Attention: a gated delta rule that decays every channel on its own."""
    d_model, linear = config.need("hidden_size"), config.inside("linear_attn_config")
    n_heads, dim, kernel = (linear.need(k) for k in ("num_heads", "head_dim", "short_conv_kernel_size"))
    width = n_heads * dim
    low_rank = d_model * dim + dim * width
    gates = low_rank + (d_model * width if linear.flag("use_full_rank_gate") else low_rank)  # decay, and output
    n_params = 4 * d_model * width + gates + 3 * width * kernel + width + n_heads + d_model * n_heads + dim
    return _recurrent((n_heads, n_heads, dim), n_params, n_heads * dim * dim, 3 * width * kernel, _DELTA_FLOPS)


def _mamba(config: Config) -> AttentionSpec:
    """Mamba-2: a state of head x state dimension per head."""
    d_model, kernel, n_heads = config.need("hidden_size"), config.need("conv_kernel"), config.need("mamba_num_heads")
    head_dim, state_dim, groups = (config.need(k) for k in ("mamba_head_dim", "ssm_state_size", "n_groups"))
    inner = n_heads * head_dim
    conv = inner + 2 * groups * state_dim
    n_params = d_model * (inner + conv + n_heads) + inner * d_model + conv * kernel + 3 * n_heads + inner
    n_params += conv if config.flag("use_conv_bias", True) else 0
    return _recurrent((n_heads, groups, head_dim), n_params, inner * state_dim, conv * kernel, _MAMBA_FLOPS)


_LINEAR = {"kimi_linear": _kimi_delta, "nemotron_h": _mamba}


def together(mixers: list[AttentionSpec]) -> AttentionSpec:
    """Mixers that follow each other without an MLP between them, as one."""
    first, *others = sorted(mixers, key=lambda m: -m.kv_elements_per_token)
    if any(m.kv_elements_per_token for m in others):
        raise ModelError("two attention blocks follow each other without an MLP; this is not supported")
    return AttentionSpec(
        first.n_heads,
        first.n_kv_heads,
        first.head_dim,
        sum(m.n_params for m in mixers),
        first.kv_elements_per_token,
        first.pair_flops,
        window=first.window,
        state_bytes=sum(m.state_bytes for m in mixers),
        row_flops=sum(m.row_flops for m in mixers),
    )
