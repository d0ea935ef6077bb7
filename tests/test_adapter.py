"""A model without its MLPs, filled by our reader, computes what transformers computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from hwmodels.errors import CheckpointError, ModelError
from runtime.activation import Activation, ClampedGlu, gated
from runtime.adapter import EMBEDDING, HEAD, Adapter, FfnKind, FfnWeights
from runtime.checkpoint import SINGLE_NAME, Checkpoint, read_config
from runtime.ffn import kwargs_elsewhere
from runtime.skeleton import LoadReport, build_skeleton, decoder_layers, load_rest
from sim.memory import ends_bytes
from tests.conftest import TinyCheckpoint
from tests.tiny import FAMILIES, eager, tiny_config, tokens

CPU = torch.device("cpu")


class PlainFfn(nn.Module):
    """A dense MLP or experts in a few lines of torch; the weights are set later and are no parameters."""

    def __init__(self, layer: int, kind: FfnKind, original: nn.Module) -> None:
        super().__init__()
        self.layer, self.kind = layer, kind
        self.act: Activation = original._modules.get("act_fn") or ClampedGlu()
        self.weights: list[FfnWeights] = []
        if "down_proj_bias" in original._parameters:
            self.down_proj_bias = original.down_proj_bias

    def forward(
        self, x: torch.Tensor, index: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        if index is None or scale is None:
            return self._expert(0, x)
        out = torch.zeros_like(x)
        for token in range(x.shape[0]):
            for expert, weight in zip(index[token].tolist(), scale[token], strict=True):
                out[token] += weight * self._expert(expert, x[token])
        return out

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up, down, bias = self.weights[expert]
        if bias is None:
            return gated(self.act, x @ gate.T, x @ up.T) @ down.T
        of_gate, of_up = bias.chunk(2)
        hidden = gated(self.act, x @ gate.T + of_gate, x @ up.T + of_up)
        return hidden @ down.T + self.down_proj_bias[expert]


def load_plain(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, LoadReport]:
    model = build_skeleton(folder, dtype, PlainFfn)
    with Checkpoint.open(folder) as checkpoint:
        adapter = Adapter.of(checkpoint.config)
        report = load_rest(model, checkpoint, adapter, lambda name: CPU, dtype)
        for module in model.modules():
            if isinstance(module, PlainFfn):
                n_experts = adapter.spec.layers[module.layer].ffn.n_experts
                module.weights = [adapter.read_ffn(checkpoint, module.layer, e) for e in range(n_experts)]
    return model, report


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(
    tiny_checkpoint: TinyCheckpoint, family: str, tied: bool, shards: bool
) -> None:
    folder = tiny_checkpoint(family, tie_word_embeddings=tied, shards=shards)
    model, report = load_plain(folder)
    expected = eager(folder)
    for n_tokens in (1, 37):
        ids = tokens(n_tokens, batch=2)
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-5)
    assert report.unused_keys == ()


def same_logits(folder: Path) -> None:
    ids = tokens(7)
    torch.testing.assert_close(load_plain(folder)[0](ids).logits, eager(folder)(ids).logits, atol=1e-5, rtol=1e-5)


def rewrite(folder: Path, new: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a checkpoint with tensors added, replaced, or (None) left out."""
    shutil.copytree(folder, new)
    tensors = {**load_file(new / SINGLE_NAME), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, new / SINGLE_NAME, {"format": "pt"})
    return new


def reconfigure(folder: Path, **changes: Any) -> None:
    config = dict(read_config(folder))
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


# -- the skeleton -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_that_of_transformers(tiny_checkpoint: TinyCheckpoint, family: str) -> None:
    folder = tiny_checkpoint(family)
    ids = tokens(5)
    ask = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = eager(folder).generate(ids, **ask)  # type: ignore[operator]
    assert torch.equal(load_plain(folder)[0].generate(ids, **ask), expected)  # type: ignore[operator]


ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
    "llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "yarn": (
        "qwen2",
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "dynamic": ("qwen3", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
    "longrope": (
        "phimoe",
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "short_mscale": 1.25,
            "long_mscale": 1.5,
            "original_max_position_embeddings": 16,
        },
    ),
}


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_tables_are_computed_and_not_guessed(tiny_checkpoint: TinyCheckpoint, rope: str) -> None:
    family, parameters = ROPES[rope]
    folder = tiny_checkpoint(family, rope_parameters=parameters)
    model, expected = load_plain(folder)[0], eager(folder)
    buffers = dict(model.named_buffers())
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer)
    ids = tokens(90)  # beyond the original context, where the tables change
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_model_of_47_billion_parameters_takes_no_memory(tmp_path: Path) -> None:
    large = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "num_local_experts": 8,
    }
    tiny_config("mixtral", **large).save_pretrained(tmp_path)
    original: list[nn.Module] = []

    def keep(layer: int, kind: FfnKind, module: nn.Module) -> nn.Module:
        original.append(module)
        return nn.Identity()

    model = build_skeleton(tmp_path, torch.bfloat16, keep)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    replaced = sum(p.numel() for module in original for p in module.parameters())
    assert replaced == 32 * 8 * 3 * 4096 * 14336
    assert (sum(p.numel() for p in model.parameters()) + replaced) / 1e9 == pytest.approx(46.7, abs=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mlp_is_replaced_and_the_router_stays(tiny_checkpoint: TinyCheckpoint, family: str) -> None:
    model = build_skeleton(tiny_checkpoint(family), torch.float32, PlainFfn)
    adapter = Adapter.of(read_config(tiny_checkpoint(family)))
    for i, layer in enumerate(decoder_layers(model)):
        mlp = layer.get_submodule("mlp")
        put = mlp if adapter.kind(i) == "dense" else mlp.get_submodule("experts")
        assert isinstance(put, PlainFfn)
        assert (put.layer, put.kind) == (i, adapter.kind(i))
        left = {name for name, _ in mlp.named_parameters() if name in ("router.weight", "gate.weight")}
        assert len(left) == (adapter.kind(i) == "experts")


def test_a_failure_leaves_torch_and_transformers_as_they_were(tiny_checkpoint: TinyCheckpoint) -> None:
    def fail(layer: int, kind: FfnKind, module: nn.Module) -> nn.Module:
        raise RuntimeError("no memory for layer 0")

    folder = tiny_checkpoint("mixtral")
    with pytest.raises(RuntimeError, match="no memory for layer 0"):
        build_skeleton(folder, torch.bfloat16, fail)
    assert torch.empty(1).device.type == "cpu"
    assert torch.get_default_dtype() == torch.float32
    assert not any(p.is_meta for p in eager(folder).parameters())


def test_the_model_is_ready_for_inference_and_knows_its_folder(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    model, _ = load_plain(folder)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.name_or_path == str(folder)
    assert model.config._attn_implementation == "scheinfer_attention"  # runtime.attention
    assert model.generation_config.eos_token_id == 2


# -- loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_loaded_are_the_bytes_that_the_spec_counts(
    tiny_checkpoint: TinyCheckpoint, family: str, tied: bool
) -> None:
    folder = tiny_checkpoint(family, tie_word_embeddings=tied)
    spec = Adapter.of(read_config(folder)).spec
    rest = sum(spec.rest_bytes(i) for i in range(spec.n_layers))
    assert load_plain(folder)[1].n_bytes == ends_bytes(spec) + rest


def test_no_byte_of_an_mlp_is_read_with_the_rest(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = Checkpoint.tensor

    def recording(self: Checkpoint, key: str) -> torch.Tensor:
        read.append(key)
        return original(self, key)

    monkeypatch.setattr(Checkpoint, "tensor", recording)
    folder = tiny_checkpoint("qwen2_moe")
    model = build_skeleton(folder, torch.float32, PlainFfn)
    checkpoint = Checkpoint.open(folder)
    adapter = Adapter.of(checkpoint.config)
    load_rest(model, checkpoint, adapter, lambda name: CPU, torch.float32)
    assert not adapter.ffn_keys & set(read)
    assert set(read) == set(checkpoint.keys()) - adapter.ffn_keys


def test_every_parameter_and_buffer_is_placed_by_its_name_and_progress_adds_up(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    folder = tiny_checkpoint("mixtral")
    model = build_skeleton(folder, torch.bfloat16, PlainFfn)
    placed: list[str] = []
    loaded: list[int] = []

    def place(name: str) -> torch.device:
        placed.append(name)
        return CPU

    with Checkpoint.open(folder) as checkpoint:
        report = load_rest(model, checkpoint, Adapter.of(checkpoint.config), place, torch.bfloat16, loaded.append)
    assert sorted(placed) == sorted(name for name, _ in (*model.named_parameters(), *model.named_buffers()))
    assert sum(loaded) == report.n_bytes
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}


def test_corrections_of_router_scores_stay_float32_as_stored(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("deepseek_v3")
    model, key = load_plain(folder, torch.bfloat16)[0], "model.layers.1.mlp.gate.e_score_correction_bias"
    stored = load_file(folder / SINGLE_NAME)[key]
    assert torch.equal(model.get_buffer(key), stored.float())
    assert stored.abs().min() > 0


def test_rotary_tables_elsewhere_are_noticed_in_either_form() -> None:
    table = torch.ones(2)
    for tables in ((table, table), table):  # cosine and sine, or one complex table
        assert not kwargs_elsewhere({"position_embeddings": tables}, CPU)
        assert kwargs_elsewhere({"position_embeddings": tables}, torch.device("meta"))


def test_a_loaded_model_does_not_hang_on_the_file(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = rewrite(tiny_checkpoint("llama"), tmp_path / "copy")
    model, _ = load_plain(folder)
    before = [p.clone() for p in model.parameters()]
    (folder / SINGLE_NAME).write_bytes(bytes((folder / SINGLE_NAME).stat().st_size))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_tied_weights_are_one_tensor_whichever_name_is_stored(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3", tie_word_embeddings=True)
    embedding = load_file(folder / SINGLE_NAME)[EMBEDDING]
    both = rewrite(folder, tmp_path / "both", **{HEAD: embedding.clone()})
    head_only = rewrite(folder, tmp_path / "head", **{HEAD: embedding, EMBEDDING: None})
    for path in (folder, both, head_only):
        model, report = load_plain(path)
        assert model.get_parameter(HEAD) is model.get_parameter(EMBEDDING)
        assert report.unused_keys == ()
        same_logits(path)


def test_a_tied_head_that_differs_is_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3", tie_word_embeddings=True)
    other = rewrite(folder, tmp_path / "other", **{HEAD: load_file(folder / SINGLE_NAME)[EMBEDDING] + 1})
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        load_plain(other)
    reconfigure(other, tie_word_embeddings=False)
    same_logits(other)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "phimoe"])
def test_experts_may_be_stored_together(tiny_checkpoint: TinyCheckpoint, tmp_path: Path, family: str) -> None:
    apart = tiny_checkpoint(family)
    adapter = Adapter.of(read_config(apart))
    changes: dict[str, torch.Tensor | None] = {}
    with Checkpoint.open(apart) as checkpoint:
        for i, layer in enumerate(adapter.spec.layers):
            if not layer.ffn.is_moe:
                continue
            experts = [adapter.read_ffn(checkpoint, i, e) for e in range(layer.ffn.n_experts)]
            gate_up, down = adapter.fused_tensors(i)
            changes[gate_up] = torch.stack([torch.cat([e.gate_FD, e.up_FD]) for e in experts])
            changes[down] = torch.stack([e.down_DF for e in experts])
            for e in range(layer.ffn.n_experts):
                changes.update(dict.fromkeys(adapter.ffn_tensors(i, e)))
    together = rewrite(apart, tmp_path / "together", **changes)
    ids = tokens(7)
    expected = eager(apart)(ids).logits
    model, report = load_plain(together)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert report.unused_keys == ()


def test_keys_that_nothing_uses_are_reported_and_old_rotary_tables_are_not(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    extra = {"model.layers.9.norm.weight": torch.ones(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    folder = rewrite(tiny_checkpoint("llama"), tmp_path / "extra", **extra)
    assert load_plain(folder)[1].unused_keys == ("model.layers.9.norm.weight",)


def test_a_missing_parameter_is_named_with_all_its_names(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    router = "model.layers.1.block_sparse_moe.gate.weight"
    folder = rewrite(tiny_checkpoint("phimoe"), tmp_path / "hole", **{router: None})
    with pytest.raises(CheckpointError, match=r"no tensor for .*mlp\.router\.weight.*block_sparse_moe\.gate\.weight"):
        load_plain(folder)


def test_weights_of_another_size_are_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen2")
    for key in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        wrong = rewrite(folder, tmp_path / key, **{key: torch.ones(3)})
        with pytest.raises(CheckpointError, match=r"has shape \(3,\), config\.json makes it"):
            load_plain(wrong)


def test_quantised_weights_are_refused_before_anything_is_built(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = rewrite(tiny_checkpoint("llama"), tmp_path / "gptq")
    reconfigure(folder, quantization_config="int8")
    with pytest.raises(ModelError, match=r"the weights are quantised \(int8\)"):
        load_plain(folder)
    reconfigure(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"the weights are quantised \(gptq\)"):
        build_skeleton(folder, torch.float32, PlainFfn)


def test_an_unsupported_family_is_refused_with_the_supported_ones(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = rewrite(tiny_checkpoint("llama"), tmp_path / "other")
    reconfigure(folder, model_type="gpt2")
    with pytest.raises(ModelError, match="model_type 'gpt2' is not supported; supported: llama"):
        build_skeleton(folder, torch.float32, PlainFfn)


@pytest.mark.parametrize("changes", [{"rms_norm_eps": "small"}, {"hidden_act": "nonsense"}, {"rope_parameters": 3}])
def test_a_config_that_transformers_refuses_is_named(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = rewrite(tiny_checkpoint("llama"), tmp_path / "other")
    reconfigure(folder, **changes)
    with pytest.raises(ModelError, match=r"other: transformers cannot build this config\.json"):
        build_skeleton(folder, torch.float32, PlainFfn)
