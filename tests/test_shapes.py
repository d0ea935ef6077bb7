"""Built-in shapes weigh what transformers builds and what was published; each kind of layer costs what it should."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

from hwmodels.errors import ModelError
from runtime.adapter import Adapter
from runtime.resolve import resolve_model
from sim import shapes
from sim.config import Config
from sim.families import layer_kinds
from sim.layers import AttentionSpec, Sparse
from sim.memory import memory
from sim.model import ModelSpec, from_config
from sim.plan import LayerPartition, Plan, Tier

NAMES = shapes.names()
NOT_BUILT = {"kimi-k3": "transformers has Kimi-Linear, without K3's narrower experts and its gates"}
NO_HEAD = {"step-3.7-flash": "transformers builds its language model without a head"}
ROUNDED = {"deepseek-v4-pro": "published as 1.6 trillion"}


@cache
def shape(name: str) -> ModelSpec:
    return shapes.shape(name)


def attention(name: str, layer: int) -> AttentionSpec:
    return shape(name).layers[layer].attention


def hf_config(name: str) -> PreTrainedConfig:
    """The config as transformers completes it."""
    config = dict(shapes.shapes()[name].config)
    family = config.pop("model_type").replace("kimi_k2", "deepseek_v3")  # the same by another name
    return AutoConfig.for_model(family, **config)


def built(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return, no-untyped-call]


# -- totals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_BUILT])
def test_every_parameter_that_transformers_builds_is_counted(name: str) -> None:
    spec, config = shape(name), hf_config(name)
    with torch.device("meta"):
        model = Step3p7TextModel(config) if name in NO_HEAD else built(config)  # type: ignore[arg-type]
    head = spec.vocab * spec.d_model if name in NO_HEAD else 0
    assert spec.n_params == sum(p.numel() for p in model.parameters()) + head


def test_kimi_linear_without_k3s_changes_is_what_transformers_builds() -> None:
    k3 = {**shapes.shapes()["kimi-k3"].config, "num_hidden_layers": 5, "num_experts": 20, "num_shared_experts": 1}
    for key in ("routed_expert_hidden_size", "latent_moe_use_norm", "mla_use_output_gate"):
        del k3[key]
    linear = {**k3["linear_attn_config"], "use_full_rank_gate": False, "full_attn_layers": [4]}
    spec = from_config({**k3, "linear_attn_config": linear})
    names = {"num_local_experts": 20, "n_shared_experts": 1, "num_experts_per_tok": 16}
    linear_layers = {"linear_attn_config": {**linear, "kda_layers": [1, 2, 3, 5]}}
    model = built(AutoConfig.for_model(**{**k3, **names, **linear_layers}))
    assert spec.n_params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_published_total_comes_out(name: str) -> None:
    published = shapes.shapes()[name].billions
    assert shape(name).n_params / 1e9 == pytest.approx(published, rel=0.02 if name in ROUNDED else 0.01)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_BUILT])
def test_a_config_says_the_same_as_transformers_writes_it(name: str) -> None:
    written = from_config(json.loads(hf_config(name).to_json_string()), dtype="bfloat16")
    assert written.layers == shape(name).layers
    assert written.n_params == shape(name).n_params


# Rounded: MB of one expert, GB of routed experts read per token and held in all.
EXPERTS = {
    "mixtral-8x7b": (352.3, 22.6, 90.2),
    "mixtral-8x22b": (604.0, 67.7, 270.6),
    "phi-3.5-moe": (157.3, 10.1, 80.5),
    "qwen1.5-moe-a2.7b": (17.3, 1.66, 24.9),
    "qwen3-30b-a3b": (9.4, 3.62, 58.0),
    "qwen3-235b-a22b": (37.7, 28.4, 454),
    "qwen3-next-80b-a3b": (6.3, 3.02, 154.6),
    "olmoe-1b-7b": (12.6, 1.61, 12.9),
    "deepseek-v2-lite": (17.3, 2.70, 28.8),
    "deepseek-v3": (88.1, 40.9, 1308),
    "kimi-k3": (66.1, 97.2, 5446),
    "glm-4.5-air": (34.6, 12.5, 199.3),
    "gpt-oss-120b": (49.8, 7.17, 229.3),
    "llama-4-maverick": (251.7, 6.04, 773),
    "nemotron-3-nano-30b-a3b": (20.0, 2.8, 59),
    "step-3.7-flash": (31.5, 10.6, 380),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_weigh_what_is_published(name: str) -> None:
    spec = shape(name)
    routed = [i for i, layer in enumerate(spec.layers) if layer.ffn.is_moe]
    ffn = spec.layers[routed[-1]].ffn
    expert = ffn.columns * spec.column_bytes(routed[-1])
    numbers = (expert / 1e6, len(routed) * ffn.top_k * expert / 1e9, len(routed) * ffn.n_experts * expert / 1e9)
    assert numbers == pytest.approx(EXPERTS[name], rel=0.02)


# -- structure ----------------------------------------------------------------------------------------


def test_leading_layers_are_dense_and_others_have_experts() -> None:
    assert [layer.ffn.is_moe for layer in shape("deepseek-v3").layers] == [False] * 3 + [True] * 58
    assert [layer.ffn.is_moe for layer in shape("llama-4-maverick").layers] == [False, True] * 24
    assert shape("deepseek-v3").layers[0].ffn.columns == 18432


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("gpt-oss-20b", {"sliding_attention": 12, "full_attention": 12}),
        ("gemma-3-27b", {"sliding_attention": 52, "full_attention": 10}),
        ("gemma-4-31b", {"sliding_attention": 50, "full_attention": 10}),
        ("qwen3.5-397b-a17b", {"linear_attention": 45, "full_attention": 15}),
        ("kimi-k3", {"linear_attention": 69, "full_attention": 24}),
        ("mimo-v2-flash", {"sliding_attention": 39, "full_attention": 9}),
        ("minimax-m3", {"full_attention": 3, "minimax_m3_sparse": 57}),
    ],
)
def test_layers_of_each_kind_are_as_many_as_published(name: str, kinds: dict[str, int]) -> None:
    listed = layer_kinds(Config.of(shapes.shapes()[name].config, name))
    assert {kind: listed.count(kind) for kind in set(listed)} == kinds


def test_shared_experts_and_a_dense_mlp_beside_the_experts_stay_with_the_attention() -> None:
    assert shape("deepseek-v2-lite").layers[1].ffn.shared_columns == 2 * 1408
    gemma = shape("gemma-4-26b-a4b").layers[0]
    assert gemma.ffn.shared_columns == 2112
    assert gemma.other_params > 3 * 2816 * 2112


def test_experts_without_a_gate_have_two_matrices() -> None:
    spec = shape("nemotron-3-nano-30b-a3b")
    assert spec.column_bytes(0) == 2 * 2688 * 2
    assert spec.ffn_work(0, 1, 1856).flops == 2 * 2 * 2688 * 1856


def test_experts_may_be_narrower_than_the_model() -> None:
    spec = shape("kimi-k3")
    assert spec.d_model == 7168
    assert spec.column_bytes(1) == 3 * 3584 * 2
    assert spec.ffn_work(1, 1, 3072).weight_bytes == 3072 * spec.column_bytes(1)


def test_a_tied_embedding_is_held_once_and_read_as_the_head() -> None:
    spec = shape("qwen3-4b")
    assert spec.head_bytes - spec.embed_bytes == 2560 * 2  # the final norm
    assert spec.n_params * 2 == spec.weight_bytes < 4.03e9 * 2


def test_mixers_that_follow_each_other_are_one_layer() -> None:
    spec = shape("nemotron-3-nano-30b-a3b")
    assert spec.n_layers == 23
    both = [layer.attention for layer in spec.layers if layer.attention.kv_elements_per_token]
    assert len(both) == 6
    assert all(mixer.state_bytes > 4 * 64 * 64 * 128 for mixer in both)  # Mamba's state, and its convolution


# -- caches -------------------------------------------------------------------------------------------


def test_latent_attention_caches_the_latent_and_the_rotary_part() -> None:
    assert attention("deepseek-v3", 0).kv_elements_per_token == 512 + 64
    assert shape("deepseek-v3").kv_bytes(0, 1000) == 1000 * 576 * 2


def test_keys_and_values_may_differ_in_width() -> None:
    assert attention("mimo-v2-flash", 0).kv_elements_per_token == 4 * (192 + 128)
    assert attention("mimo-v2-flash", 1).kv_elements_per_token == 8 * (192 + 128)  # a sliding layer


def test_a_sliding_layer_caches_its_window() -> None:
    spec = shape("gpt-oss-20b")
    assert spec.kv_bytes(0, 10_000) == spec.kv_bytes(0, 128) == 128 * 2 * 8 * 64 * 2
    assert spec.kv_bytes(1, 10_000) == 10_000 * 2 * 8 * 64 * 2


def test_a_linear_layer_keeps_a_constant_state() -> None:
    spec = shape("qwen3-next-80b-a3b")
    state, conv = 32 * 128 * 128, (2 * 16 * 128 + 32 * 128) * 4
    assert spec.kv_bytes(0, 1) == spec.kv_bytes(0, 100_000) == 4 * (state + conv)
    assert spec.kv_bytes(3, 2) == 2 * 2 * 2 * 256 * 2  # every fourth has full attention


def test_compressed_attention_caches_the_window_and_an_entry_for_every_few_tokens() -> None:
    spec, n = shape("deepseek-v4-flash"), 1280
    assert spec.kv_bytes(0, n) == 128 * 512 * 2
    assert spec.kv_bytes(2, n) == (128 * 512 + n // 4 * (512 + 128)) * 2  # with an index
    assert spec.kv_bytes(3, n) == (128 * 512 + n // 128 * 512) * 2


def test_memory_counts_states_and_latents() -> None:
    spec = shape("kimi-k3")
    layers = tuple(LayerPartition("CPU", (0,) * la.ffn.n_experts) for la in spec.layers)
    tier = Tier("all", 1 << 20, False, (0,) * spec.n_layers, None, 0)
    plan = Plan("by hand", spec.name, spec.id, "", spec.dtype, 0, 1000, 2, False, "CPU", layers, (tier,))
    assert memory(spec, plan).host_kv == 2 * sum(spec.kv_bytes(i, 1000) for i in range(spec.n_layers))


# -- work ---------------------------------------------------------------------------------------------


def test_a_row_of_latent_attention_is_absorbed_and_a_prompt_is_not() -> None:
    mixer = attention("deepseek-v3", 0)
    assert mixer.mixing_flops(1, 4096, 4095) == 4096 * 2 * 128 * (512 + 64 + 512)
    assert mixer.mixing_flops(4096, 2048.5, 0) == 4096 * 2048.5 * 2 * 128 * (192 + 128)


def test_a_prompt_over_a_deep_latent_cache_pays_for_making_its_keys_and_values() -> None:
    mixer = attention("deepseek-v3", 0)
    rows, depth = 2048, 100_000
    plain = rows * depth * mixer.pair_flops + depth * 2 * 512 * 128 * (128 + 128)
    assert mixer.mixing_flops(rows, depth, depth) == plain < rows * depth * mixer.absorbed_pair_flops  # type: ignore[operator]


def test_a_row_of_sparse_attention_reads_what_its_index_chose_and_the_whole_index() -> None:
    spec = shape("deepseek-v3.2")
    mixer = spec.layers[0].attention
    assert mixer.read_elements(100_000, 1) == 2048 * 576 + 100_000 * 128
    assert mixer.read_elements(1000, 1) == 1000 * (576 + 128)
    scored = mixer.mixing_flops(1, 100_000, 99_999) - mixer.mixing_flops(1, 99_999, 99_998)
    assert scored == 2 * 64 * 128  # one more token to score, none more to attend to


def test_layers_that_take_over_the_choice_of_others_have_no_index() -> None:
    with_index = [la.attention.sparse.index_elements > 0 for la in shape("glm-5.2").layers if la.attention.sparse]
    assert with_index == [i < 3 or (i - 2) % 4 == 0 for i in range(78)]


def test_a_recurrence_costs_the_same_at_any_depth() -> None:
    spec = shape("qwen3.5-35b-a3b")
    assert spec.attention_work(0, 1, 10) == spec.attention_work(0, 1, 10_000)
    weights = spec.rest_bytes(0) // 2
    assert spec.attention_work(0, 1, 10).flops == 2 * weights + 7 * 32 * 128 * 128


def test_a_gated_query_doubles_its_projection() -> None:
    d_model, n_heads, head_dim, n_kv = 2048, 16, 256, 2
    q, kv = n_heads * head_dim, n_kv * head_dim
    assert attention("qwen3-next-80b-a3b", 3).n_params == d_model * (2 * q + 2 * kv + q) + 2 * head_dim


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(NAMES), depth=st.integers(0, 200_000), rows=st.integers(1, 4096), data=st.data())
def test_more_tokens_never_cost_less(name: str, depth: int, rows: int, data: st.DataObject) -> None:
    spec = shape(name)
    layer = data.draw(st.integers(0, spec.n_layers - 1))
    mixer = spec.layers[layer].attention
    assert mixer.cached_elements(depth) <= mixer.cached_elements(depth + rows)
    assert mixer.read_elements(depth, 1) <= mixer.read_elements(depth, rows) <= mixer.cached_elements(depth)
    one, deeper = spec.attention_work(layer, rows, depth + rows), spec.attention_work(layer, rows, depth + rows + 7)
    assert one.flops <= deeper.flops
    assert one.io_bytes <= deeper.io_bytes
    assert one.flops >= 2 * rows * one.weight_bytes / spec.dtype_bytes


def test_sparse_entries_without_a_limit_are_all_attended_to() -> None:
    mixer = AttentionSpec(1, 1, 8, 0, 16, 32, window=4, sparse=Sparse(stride=2))
    assert mixer.mixing_flops(1, 10, 9) == (4 + 5) * 32
    assert mixer.cached_elements(10) == (4 + 5) * 16


# -- by name ------------------------------------------------------------------------------------------


def test_a_shape_is_the_model_of_its_checkpoint() -> None:
    config = {
        **shapes.shapes()["mixtral-8x7b"].config,
        "architectures": ["MixtralForCausalLM"],
        "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    assert from_config(config, "a folder").id == shape("mixtral-8x7b").id


def test_a_model_with_images_is_its_language_model() -> None:
    inner = shapes.shapes()["gemma-3-4b"].config
    outer = {"model_type": "gemma3", "dtype": "bfloat16", "text_config": inner, "vision_config": {"hidden_size": 1152}}
    assert from_config(outer).id == shape("gemma-3-4b").id


def test_a_name_is_a_model_wherever_weights_are_not_needed() -> None:
    assert resolve_model("phi-3.5-moe").id == shape("phi-3.5-moe").id
    assert resolve_model("phi-3.5-moe", "float16").dtype == "float16"


def test_an_unknown_name_lists_the_nearest_and_all() -> None:
    with pytest.raises(ModelError, match="nearest are mixtral-8x7b") as error:
        shapes.shape("Mixtral-8x7")
    assert all(name in str(error.value) for name in NAMES)


def test_a_family_that_cannot_be_run_is_refused_before_it_is_loaded() -> None:
    with pytest.raises(ModelError, match=r"family glm4_moe can be planned and simulated, not run; families that run"):
        Adapter.of(shapes.shapes()["glm-4.5-air"].config, "glm-4.5-air")


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("gemma-4-31b", {"hidden_size_per_layer_input": 256}, "embeddings per layer are not supported"),
        ("gemma-4-31b", {"num_kv_shared_layers": 20}, "layers that share a KV cache are not supported"),
        ("nemotron-3-nano-30b-a3b", {"hybrid_override_pattern": "ME*"}, "an MLP last"),
        ("nemotron-3-nano-30b-a3b", {"hybrid_override_pattern": "MEE"}, "block 2 is an MLP that follows another"),
        ("nemotron-3-nano-30b-a3b", {"hybrid_override_pattern": "**E"}, "two attention blocks follow each other"),
        ("gpt-oss-20b", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 24 layers"),
        ("deepseek-v3", {"qk_rope_head_dim": None}, "qk_rope_head_dim is None"),
    ],
)
def test_a_structure_that_cannot_be_costed_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        from_config({**shapes.shapes()[name].config, **changes}, name)
