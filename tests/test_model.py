"""ModelSpec counts what transformers builds, parameter by parameter, and the published totals come out."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel

from hwmodels.errors import ModelError
from sim.model import ModelSpec, from_config, load_model
from tests.tiny import FAMILIES, tiny_config, tiny_model

ODD_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": None, "attention_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 20}),
    ("mistral", {"sliding_window": 7, "attention_bias": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "use_sliding_window": True}),
    ("mixtral", {"head_dim": 12, "attention_bias": True, "sliding_window": 16}),
    ("qwen2_moe", {"qkv_bias": False, "mlp_only_layers": [], "decoder_sparse_step": 3}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    ("qwen3_moe", {"attention_bias": True, "mlp_only_layers": [0, 2], "use_sliding_window": True}),
    ("phimoe", {"attention_bias": False, "lm_head_bias": False, "tie_word_embeddings": True}),
    ("phimoe", {"sliding_window": 12}),
    ("deepseek_v2", {"q_lora_rank": 22, "attention_bias": True, "first_k_dense_replace": 0}),
    ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True, "first_k_dense_replace": 3}),
    ("deepseek_v3", {"tie_word_embeddings": True, "n_shared_experts": 1, "first_k_dense_replace": 2}),
]
CASES: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in FAMILIES] + ODD_CONFIGS
IDS = [f"{family} {' '.join(changes)}".strip() for family, changes in CASES]


def built(config: PreTrainedConfig) -> PreTrainedModel:
    """The model as transformers builds it, without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-any-return, no-untyped-call]


def spec_of(config: PreTrainedConfig) -> ModelSpec:
    """The spec of a config as it is written to config.json."""
    return from_config(json.loads(config.to_json_string()), dtype="bfloat16")


def assert_same_sizes(spec: ModelSpec, model: PreTrainedModel) -> None:
    assert spec.n_params == sum(p.numel() for p in model.parameters())
    for i, layer in enumerate(model.get_submodule("model.layers").children()):
        mlp = layer.get_submodule("mlp")
        ffn = mlp.get_submodule("experts") if hasattr(mlp, "experts") else mlp
        # What down begins with belongs to no column.
        ffn_bytes = sum(p.nbytes for name, p in ffn.named_parameters() if name != "down_proj_bias")
        assert spec.ffn_bytes(i) == ffn_bytes
        corrections = sum(4 * buffer.numel() for buffer in layer.buffers())
        assert spec.rest_bytes(i) == sum(p.nbytes for p in layer.parameters()) - ffn_bytes + corrections
        assert spec.layers[i].ffn.is_moe == hasattr(mlp, "experts")
    embedding, head, norm = (model.get_submodule(name) for name in ("model.embed_tokens", "lm_head", "model.norm"))
    assert spec.embed_bytes == sum(p.nbytes for p in embedding.parameters())
    assert spec.head_bytes == sum(p.nbytes for module in (head, norm) for p in module.parameters())


@pytest.mark.parametrize("family, changes", CASES, ids=IDS)
def test_every_byte_of_every_layer_is_counted(family: str, changes: dict[str, Any]) -> None:
    config = tiny_config(family, **changes)
    assert_same_sizes(spec_of(config), built(config))


@pytest.mark.parametrize("family, changes", CASES, ids=IDS)
def test_a_layer_slides_where_its_cache_does(family: str, changes: dict[str, Any]) -> None:
    config = tiny_config(family, **changes)
    cache = DynamicCache(config=config)
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    assert [layer.attention.window for layer in spec_of(config).layers] == windows


@pytest.mark.parametrize("family, changes", CASES, ids=IDS)
def test_a_cache_holds_the_bytes_that_the_spec_counts(family: str, changes: dict[str, Any]) -> None:
    # with latent attention the latent and the rotary part, not keys and values of every head
    model = tiny_model(family, **changes)
    model.set_experts_implementation("eager")
    spec, cache = from_config(json.loads(model.config.to_json_string())), DynamicCache(config=model.config)
    for n_tokens in (5, 1):
        with torch.no_grad():
            model(torch.ones(2, n_tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    for i, layer in enumerate(cache.layers):
        window = spec.layers[i].attention.window
        # a window counts the token at hand, which transformers need not keep
        n_kept = 6 if window is None else min(6, window - 1)
        assert layer.keys.nbytes + layer.values.nbytes == 2 * spec.kv_bytes(i, n_kept) <= 2 * spec.kv_bytes(i, 6)


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 3), (4, 4)]),
    head_dim=st.sampled_from([2, 8]),
    columns=st.integers(1, 70),
    n_layers=st.integers(1, 4),
    vocab=st.integers(5, 300),
    tied=st.booleans(),
    bias=st.booleans(),
)
def test_sizes_agree_for_any_shape(
    family: str, heads: tuple[int, int], head_dim: int, columns: int, n_layers: int, vocab: int, tied: bool, bias: bool
) -> None:
    head_dim = 24 // heads[0] if family == "olmoe" else head_dim  # its norms are as wide as the model
    config = tiny_config(
        family,
        layer_types=None,
        hidden_size=24,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head_dim,
        intermediate_size=columns,
        moe_intermediate_size=columns + 1,
        num_hidden_layers=n_layers,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        attention_bias=bias,
        pad_token_id=None,
    )
    assert_same_sizes(spec_of(config), built(config))


def shape(
    family: str, d_model: int, columns: int, n_layers: int, heads: str, vocab: int, **more: Any
) -> dict[str, Any]:
    n_heads, n_kv, head_dim = (int(n) for n in heads.split("/"))
    return {
        "model_type": family,
        "hidden_size": d_model,
        "intermediate_size": columns,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        **more,
    }


def experts(n: int, k: int, columns: int = 0, shared: int = 0) -> dict[str, Any]:
    sizes = {"moe_intermediate_size": columns, "shared_expert_intermediate_size": shared}
    return {"num_experts": n, "num_experts_per_tok": k, **{key: size for key, size in sizes.items() if size}}


PHI = {"num_local_experts": 16, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True}
MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
# Billions of parameters as published, with the shapes of the published config.json files.
PUBLISHED = {
    "Mixtral-8x7B": (46.7, shape("mixtral", 4096, 14336, 32, "32/8/128", 32000, **MIXTRAL)),
    "Mixtral-8x22B": (140.6, shape("mixtral", 6144, 16384, 56, "48/8/128", 32000, **MIXTRAL)),
    "Phi-3.5-MoE": (41.9, shape("phimoe", 4096, 6400, 32, "32/8/128", 32064, **PHI)),
    "Qwen1.5-MoE-A2.7B": (14.3, shape("qwen2_moe", 2048, 5632, 24, "16/16/128", 151936, **experts(60, 4, 1408, 5632))),
    "Qwen2-57B-A14B": (57.4, shape("qwen2_moe", 3584, 18944, 28, "28/4/128", 151936, **experts(64, 8, 2560, 20480))),
    "Qwen3-30B-A3B": (30.5, shape("qwen3_moe", 2048, 6144, 48, "32/4/128", 151936, **experts(128, 8, 768))),
    "Qwen3-235B-A22B": (235.1, shape("qwen3_moe", 4096, 12288, 94, "64/4/128", 151936, **experts(128, 8, 1536))),
    "Qwen3-Coder-480B": (480.2, shape("qwen3_moe", 6144, 8192, 62, "96/8/128", 151936, **experts(160, 8, 2560))),
    "Llama-2-7B": (6.74, shape("llama", 4096, 11008, 32, "32/32/128", 32000)),
    "Llama-2-13B": (13.0, shape("llama", 5120, 13824, 40, "40/40/128", 32000)),
    "Llama-2-70B": (69.0, shape("llama", 8192, 28672, 80, "64/8/128", 32000)),
    "Llama-3-8B": (8.03, shape("llama", 4096, 14336, 32, "32/8/128", 128256)),
    "Llama-3-70B": (70.6, shape("llama", 8192, 28672, 80, "64/8/128", 128256)),
    "Mistral-7B": (7.24, shape("mistral", 4096, 14336, 32, "32/8/128", 32000)),
    "Qwen2.5-7B": (7.62, shape("qwen2", 3584, 18944, 28, "28/4/128", 152064)),
    "Qwen2.5-72B": (72.7, shape("qwen2", 8192, 29568, 80, "64/8/128", 152064)),
    "Qwen3-4B": (4.02, shape("qwen3", 2560, 9728, 36, "32/8/128", 151936, tie_word_embeddings=True)),
    "Qwen3-8B": (8.19, shape("qwen3", 4096, 12288, 36, "32/8/128", 151936)),
    "Qwen3-32B": (32.8, shape("qwen3", 5120, 25600, 64, "64/8/128", 151936)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals_come_out(name: str) -> None:
    billions, config = PUBLISHED[name]
    assert from_config(config).n_params / 1e9 == pytest.approx(billions, rel=0.002)


@pytest.mark.parametrize("name", PUBLISHED)
def test_large_models_agree_with_transformers(name: str) -> None:
    config = dict(PUBLISHED[name][1])
    hf = AutoConfig.for_model(config.pop("model_type"), **config)
    assert_same_sizes(from_config(PUBLISHED[name][1], dtype="bfloat16"), built(hf))


def test_a_mixtral_expert_is_352_megabytes() -> None:
    spec = from_config(PUBLISHED["Mixtral-8x7B"][1], dtype="bfloat16")
    assert spec.column_bytes(0) == 3 * 4096 * 2
    assert spec.ffn_bytes(0) == 8 * 14336 * 3 * 4096 * 2
    assert spec.ffn_bytes(0) / 8 / 1e6 == pytest.approx(352.3, abs=0.1)


@cache
def silent(family: str) -> PreTrainedConfig:
    """A config.json that leaves out all that has a default."""
    top_k = {"num_experts_per_tok": 6} if family == "deepseek_v2" else {}  # the one size without a default
    return AutoConfig.for_model(family, **top_k)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_assumes(family: str) -> None:
    written = json.loads(silent(family).to_json_string())
    optional = {
        "num_key_value_heads", "head_dim", "sliding_window", "tie_word_embeddings", "attention_bias", "layer_types",
        "qkv_bias", "lm_head_bias", "mlp_bias", "max_window_layers", "use_sliding_window", "mlp_only_layers",
        "decoder_sparse_step", "q_lora_rank", "first_k_dense_replace", "n_shared_experts",
    }  # fmt: skip
    short = {key: value for key, value in written.items() if key not in optional}
    assert from_config(short).layers == from_config(written).layers
    assert from_config(short).n_params == from_config(written).n_params


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'; expected a whole number above zero"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({"mlp_bias": True}, "MLPs with biases are not supported"),
        ({"dtype": "int4"}, "dtype 'int4' is not supported; choose float32"),
    ],
)
def test_an_unusable_config_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    config = {**tiny_config("llama").to_dict(), **changes}
    with pytest.raises(ModelError, match=message):
        from_config(config)


def test_a_router_needs_two_experts_and_no_more_choices_than_experts() -> None:
    for n_experts, top_k in ((1, 1), (2, 3)):
        config = {**tiny_config("mixtral").to_dict(), "num_local_experts": n_experts, "num_experts_per_tok": top_k}
        with pytest.raises(ModelError, match=f"is {top_k} of {n_experts} experts"):
            from_config(config)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json here"):
        load_model(tmp_path)
