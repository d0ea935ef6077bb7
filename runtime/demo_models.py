"""Two small checkpoints for demonstrations: written by transformers, seeded, with a real tokenizer.

The weights are random, so the text means nothing; sizes, files and arithmetic are those of a trained
model. Both exceed the last-level cache of a desktop CPU many times over, so that memory bandwidth
decides their speed, as it does for large models.
"""

from __future__ import annotations

import ast
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig, PreTrainedTokenizerFast
from transformers import LlamaForCausalLM, MixtralForCausalLM, PreTrainedModel

from hwmodels.errors import CheckpointError, FormatError
from hwmodels.schema import check_header, read_json, write_json
from runtime.checkpoint import Checkpoint

SCHEMA = "scheinfer.demo"
VERSION = 1
MARKER = "scheinfer-demo.json"
SPECIAL = ("<pad>", "<s>", "</s>")
VOCAB = 4096
SHARD = "64MB"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

Progress = Callable[[str], object]


@dataclass(frozen=True)
class Demo:
    """A demonstration model: its folder's name, its class, its sizes but for the vocabulary."""

    name: str
    model: type[PreTrainedModel]
    config: Callable[[int], PreTrainedConfig]


def _mixtral(vocab: int) -> PreTrainedConfig:
    return MixtralConfig(
        vocab_size=vocab,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        pad_token_id=0,
    )


def _llama(vocab: int) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=4096,
        pad_token_id=0,
    )


DEMOS = (Demo("tiny-mixtral", MixtralForCausalLM, _mixtral), Demo("tiny-llama", LlamaForCausalLM, _llama))


def write_demo_models(folder: str | Path, seed: int = 0, progress: Progress | None = None) -> dict[str, Path]:
    """Folders of the demonstration models by name; each is written whole or not at all, and kept if intact.

    progress is called with one line of text per model that is written. Raises CheckpointError if a
    folder of that name exists and is not one of these.
    """
    root = Path(folder)
    paths = {demo.name: root / demo.name for demo in DEMOS}
    missing = [demo for demo in DEMOS if not _is_intact(paths[demo.name], seed)]
    if not missing:
        return paths
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer()
    for demo in missing:
        if progress is not None:
            progress(f"writing {demo.name} to {paths[demo.name]}")
        _write(demo, tokenizer, paths[demo.name], seed)
    return paths


def _is_intact(path: Path, seed: int) -> bool:
    if not path.exists():
        return False
    if not (path / MARKER).is_file():
        raise CheckpointError(f"{path} exists and is no demonstration model; choose another folder or move it away")
    try:
        marker = check_header(read_json(path / MARKER, "marker"), SCHEMA, VERSION, str(path / MARKER))
        Checkpoint.open(path).close()
    except (FormatError, CheckpointError):
        return False
    return marker == {"seed": seed} and (path / "tokenizer.json").is_file()


def _write(demo: Demo, tokenizer: PreTrainedTokenizerFast, path: Path, seed: int) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{demo.name}-") as scratch:
        new = Path(scratch) / "new"
        model = demo.model(demo.config(len(tokenizer)))
        _draw_weights(model, seed)
        model.save_pretrained(new, max_shard_size=SHARD)
        tokenizer.save_pretrained(new)
        write_json(new / MARKER, {"schema": SCHEMA, "version": VERSION, "seed": seed})
        if path.exists():
            path.rename(Path(scratch) / "old")
        new.rename(path)


# -- weights ------------------------------------------------------------------------------------------
