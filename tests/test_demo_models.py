"""The demonstration models are real checkpoints: written whole, kept, repaired, and not degenerate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hwmodels.errors import CheckpointError
from runtime import demo_models
from runtime.checkpoint import INDEX_NAME, Checkpoint
from runtime.demo_models import MARKER, Demo, write_demo_models
from sim.model import load_model

SMALL: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
PROMPT = "Return a list of the words"


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return demo_models._train_tokenizer()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, trained: PreTrainedTokenizerFast) -> Callable[[Path, int], Path]:
    """Write one tiny demonstration model in place of the two large ones."""
    demo = Demo("small", LlamaForCausalLM, lambda vocab: LlamaConfig(vocab_size=vocab, **SMALL))
    monkeypatch.setattr(demo_models, "DEMOS", (demo,))
    monkeypatch.setattr(demo_models, "_train_tokenizer", lambda: trained)
    return lambda folder, seed: write_demo_models(folder, seed)["small"]


def stamps(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_an_intact_model_is_kept_and_a_damaged_one_is_written_anew(
    small: Callable[[Path, int], Path], tmp_path: Path
) -> None:
    folder = small(tmp_path, 0)
    first = stamps(folder)
    assert stamps(small(tmp_path, 0)) == first
    weights = next(folder.glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert small(tmp_path, 0) == folder
    assert weights.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_another_seed_is_another_model(small: Callable[[Path, int], Path], tmp_path: Path) -> None:
    weights = [next(small(tmp_path, seed).glob("*.safetensors")).read_bytes() for seed in (0, 1, 0)]
    assert weights[0] == weights[2] != weights[1]


def test_a_folder_of_somebody_else_is_left_alone(small: Callable[[Path, int], Path], tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is no demonstration model"):
        small(tmp_path, 0)
    assert (tmp_path / "small" / "notes.txt").read_text() == "mine"


def test_a_failure_leaves_nothing_behind(
    small: Callable[[Path, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PreTrainedModel, *args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(CheckpointError, match="no space left on device"):
        small(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name, experts", [("tiny-mixtral", 8), ("tiny-llama", 1)])
def test_the_weights_exceed_any_cache_and_lie_in_shards(demo_models: dict[str, Path], name: str, experts: int) -> None:
    spec = load_model(demo_models[name])
    assert spec.dtype == "float32"
    assert spec.layers[0].ffn.n_experts == experts
    active = sum(spec.ffn_bytes(i) // experts * la.ffn.top_k for i, la in enumerate(spec.layers))
    assert active > 64e6
    with Checkpoint.open(demo_models[name]) as checkpoint:
        assert checkpoint.n_bytes == spec.weight_bytes
    index = json.loads((demo_models[name] / INDEX_NAME).read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert (demo_models[name] / MARKER).is_file()


@pytest.mark.slow
def test_the_tokenizer_gives_back_any_text(demo_models: dict[str, Path]) -> None:
    for folder in demo_models.values():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        for text in (PROMPT, "Größe: 5 µs\n\t№ 7", "\U0001f600"):
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == 1
            assert tokenizer.decode(ids[1:]) == text
        chat = [{"role": "user", "content": "hello"}]
        asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert asked == "user: hello\nassistant:"


def count_experts(model: PreTrainedModel) -> list[torch.Tensor]:
    """Tokens per expert and layer, filled while the model runs."""
    counts: list[torch.Tensor] = []

    def watch(router: nn.Module) -> None:
        count = torch.zeros(8, dtype=torch.int64)
        counts.append(count)

        def add(module: nn.Module, given: object, out: tuple[torch.Tensor, ...]) -> None:
            count.add_(torch.bincount(out[2].flatten(), minlength=8))

        router.register_forward_hook(add)

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            watch(module)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-mixtral", "tiny-llama"])
def test_text_does_not_repeat_itself_and_routing_does_not_collapse(demo_models: dict[str, Path], name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_models[name])
    model: Any = AutoModelForCausalLM.from_pretrained(demo_models[name])
    counts = count_experts(model)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=64, do_sample=False, output_logits=True, return_dict_in_generate=True)
    new = out.sequences[0, prompt["input_ids"].shape[1] :].tolist()
    assert len(new) == 64
    assert len(set(new)) > 40
    assert str(tokenizer.decode(new)).isprintable()
    best, second = torch.cat(out.logits).topk(2).values.T
    assert (best - second).median() > 0.1
    assert (best - second).min() > 1e-4
    for count in counts:
        assert count.max() < 0.5 * count.sum()
        assert count.min() > 0
