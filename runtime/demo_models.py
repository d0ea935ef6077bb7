"""Two small checkpoints for demonstrations: written by transformers, seeded, with a real tokenizer.

The weights are random, so the text means nothing; sizes, files and arithmetic are those of a trained
model. Both exceed the last-level cache of a desktop CPU many times over, so that memory bandwidth
decides their speed, as it does for large models.
"""

from __future__ import annotations

import ast
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from hwmodels.errors import CheckpointError, FormatError
from hwmodels.schema import check_header, read_json, write_json
from runtime.checkpoint import Checkpoint

SCHEMA = "scheinfer.demo"
VERSION = 2
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
        hidden_size=1024,
        intermediate_size=896,
        num_hidden_layers=4,
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
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=4096,
        pad_token_id=0,
    )


DEMOS = (Demo("tiny-mixtral", MixtralForCausalLM, _mixtral), Demo("tiny-llama", LlamaForCausalLM, _llama))


def write_demo_models(folder: str | Path, seed: int = 0, progress: Progress | None = None) -> dict[str, Path]:
    """Folders of the demonstration models by name; each is written whole or not at all, and kept if intact.

    progress is called with one line of text per model that is written. Raises CheckpointError if a
    folder of that name exists and is not one of these, or if the disk refuses.
    """
    root = Path(folder)
    paths = {demo.name: root / demo.name for demo in DEMOS}
    missing = [demo for demo in DEMOS if not _is_intact(paths[demo.name], seed)]
    if not missing:
        return paths
    try:
        root.mkdir(parents=True, exist_ok=True)
        tokenizer = _train_tokenizer()
        for demo in missing:
            if progress is not None:
                progress(f"writing {demo.name} to {paths[demo.name]}")
            _write(demo, tokenizer, paths[demo.name], seed)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write demonstration models to {root}: {error}; they need 0.7 GB") from error
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
        _silence(model, _unprintable(tokenizer))
        with _no_progress_bars():
            model.save_pretrained(new, max_shard_size=SHARD)
        tokenizer.save_pretrained(new)
        write_json(new / MARKER, {"schema": SCHEMA, "version": VERSION, "seed": seed})
        if path.exists():
            path.rename(Path(scratch) / "old")
        new.rename(path)


# -- weights ------------------------------------------------------------------------------------------


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Normal weights scaled by fan-in, large enough that every part of every layer changes the next token.

    With the usual small initialisation the embedding of the last token decides everything: greedy text
    repeats itself and routers send all tokens to the same experts.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, _std(name, parameter), generator=generator)


_GAINS = {"q_proj": 2.0, "mlp.gate.": 2.0, "lm_head": 3.0, "down_proj": 1.5}


def _std(name: str, parameter: nn.Parameter) -> float:
    if "embed_tokens" in name:
        return 1.0
    gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
    return float(gain / parameter.shape[-1] ** 0.5)


@torch.no_grad()
def _silence(model: PreTrainedModel, tokens: list[int]) -> None:
    """Give tokens a logit of zero, far below the largest, so that they are hardly ever generated."""
    head = model.get_submodule("lm_head")
    assert isinstance(head, nn.Linear)
    head.weight[tokens] = 0.0


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


# -- tokenizer ----------------------------------------------------------------------------------------


def _train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the docstrings of this Python's standard library; ids as Llama's for <s>, </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_docstrings(), trainer)
    pad, bos, eos = SPECIAL
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _unprintable(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens that end the text, or that a terminal would not show as text."""
    texts = [str(tokenizer.decode([token], skip_special_tokens=True)) for token in range(len(tokenizer))]
    return [token for token, text in enumerate(texts) if not (text and text.isascii() and text.isprintable())]


def _docstrings() -> Iterator[str]:
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text
