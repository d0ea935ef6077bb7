"""Tokens to text while they come: whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from runtime.tokens import decode

_PART = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes the first bytes of a character to


class TextPieces:
    """The text of an answer in pieces, none of which is taken back; text that a stop string begins is held."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop string came; the text ends before it."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._first, self._n_read = 0, 0  # decoded beside what came before: some tokenizers write a space between
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is now sure, after one more token."""
        self._ids.append(token)
        new = self._new_text()
        if new.endswith(_PART):
            return ""
        self._first, self._n_read = self._n_read, len(self._ids)
        return self._release(new)

    def end(self) -> str:
        """The rest of the text: no token follows."""
        if self.stopped:
            return ""
        rest = self._release(self._new_text())
        held, self._held = self._held, ""
        return rest if self.stopped else rest + held

    def _new_text(self) -> str:
        before = decode(self._ids[self._first : self._n_read], self._tokenizer)
        return decode(self._ids[self._first :], self._tokenizer)[len(before) :]

    def _release(self, new: str) -> str:
        text = self._held + new
        ends = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        n_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that a stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
