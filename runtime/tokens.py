"""Text to token ids and back: the folder's own tokenizer, or ids as numbers where it has none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from hwmodels.errors import CheckpointError, FormatError
from sim.model import ModelSpec

Message = dict[str, str]
"""One message of a conversation: its role and its content."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint folder, None if it has none; CheckpointError if it cannot be read."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise CheckpointError(f"{folder}: transformers cannot read the tokenizer: {error}") from error
    return tokenizer


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase | None, spec: ModelSpec) -> list[int]:
    """Token ids of a prompt; FormatError if there are none, or if the model has no such tokens."""
    ids = _numbers(text) if tokenizer is None else [int(i) for i in tokenizer(text)["input_ids"]]
    if not ids:
        raise FormatError("the prompt has no tokens; give --prompt a text")
    if max(ids) >= spec.vocab:
        raise FormatError(f"the prompt has token {max(ids)}; {spec.name} knows tokens 0 to {spec.vocab - 1}")
    return ids


def _numbers(text: str) -> list[int]:
    words = re.split(r"[\s,]+", text.strip())
    if not all(re.fullmatch(r"\d+", word) for word in words):
        raise FormatError("the folder has no tokenizer: give the prompt as token ids, such as --prompt '1 17 42'")
    return [int(word) for word in words]


def conversation_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation up to where the answer begins, by the tokenizer's template if it has one."""
    if tokenizer.chat_template is not None:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        assert isinstance(text, str), "one conversation is one text"
        return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    text = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
    return [int(i) for i in tokenizer(text)["input_ids"]]


class IdStreamer(BaseStreamer):
    """Writes token ids as they come, one space between; the prompt is not repeated."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._n_calls = 0

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt first, then one new token at a time."""
        if self._n_calls:
            self._out.write(" ".join(str(i) for i in value.flatten().tolist()) + " ")
            self._out.flush()
        self._n_calls += 1

    def end(self) -> None:
        """The last token has come."""
        self._out.write("\n")
        self._out.flush()


def decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Text of new tokens, or the ids themselves where there is no tokenizer."""
    if tokenizer is None:
        return " ".join(str(i) for i in ids)
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text
