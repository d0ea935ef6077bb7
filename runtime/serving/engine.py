"""One model that answers one request at a time, in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from runtime.prefix import PrefixCache
from runtime.serving.requests import Asked, RequestError
from runtime.serving.text import TextPieces
from runtime.session import PlannedModel
from runtime.tokens import conversation_ids

_POLL_S = 0.5
_GREEDY = 1e-5  # logits over less than that are not finite

Gone = Callable[[], bool]
"""Whether nobody waits for the answer any more."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Answer:
    """How an answer ended, and its tokens; n_cached of the prompt's were not computed again."""

    finish_reason: Literal["stop", "length"]
    n_prompt: int
    n_cached: int
    n_new: int


class Turns:
    """One at a time, first come, first served."""

    def __init__(self) -> None:
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def take(self, gone: Gone) -> Iterator[None]:
        """Wait for the turn, which is the block; ClientGone if whoever waits leaves before."""
        mine = object()
        with self._changed:
            self._waiting.append(mine)
        try:
            with self._changed:
                while self._waiting[0] is not mine and not gone():
                    self._changed.wait(_POLL_S)
            if gone():
                raise ClientGone("left before the answer began")
            yield
        finally:
            with self._changed:
                self._waiting.remove(mine)
                self._changed.notify_all()


class Engine:
    """A model with its tokenizer, as the server asks it. n_ctx: tokens of prompt and answer together."""

    def __init__(self, model: PlannedModel, tokenizer: PreTrainedTokenizerBase, name: str, n_ctx: int) -> None:
        self.name, self.n_ctx = name, n_ctx
        self._model, self._tokenizer = model, tokenizer
        self._prefix, self._turns = PrefixCache(model), Turns()

    def prompt(self, asked: Asked) -> list[int]:
        """Token ids of what was asked; RequestError if it has none, unknown ones, or more than the context."""
        ids = self._ids(asked)
        vocab, room = self._model.executor.spec.vocab, self.n_ctx - (asked.max_tokens or 1)
        where = "messages" if asked.is_chat else "prompt"
        if not ids or max(ids) >= vocab:
            raise RequestError(f"the prompt needs at least one token, of 0 to {vocab - 1}", where)
        if len(ids) > room:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and the answer may have {asked.max_tokens or 1}; together at most "
                f"{self.n_ctx} fit",
                where,
                "context_length_exceeded",
            )
        return ids

    def answer(self, asked: Asked, ids: Sequence[int], say: Callable[[str], None], gone: Gone) -> Answer:
        """Answer when it is this request's turn; say gets the text in pieces, on this thread.

        Raises ClientGone if gone becomes true, ExecutionError if a task fails; the next request is answered.
        """
        pieces = TextPieces(self._tokenizer, asked.stop)

        def listen(token: int) -> bool:
            if text := pieces.add(token):
                say(text)
            return pieces.stopped or gone()

        with self._turns.take(gone):
            new_ids = self._generate(asked, ids, listen)
            n_cached = self._prefix.n_kept
        if gone():
            raise ClientGone(f"left after {len(new_ids)} tokens")
        if text := pieces.end():
            say(text)
        ended = pieces.stopped or new_ids[-1] in self._end_tokens()
        return Answer("stop" if ended else "length", len(ids), n_cached, len(new_ids))

    def _ids(self, asked: Asked) -> list[int]:
        if isinstance(asked.prompt, str):
            return [int(i) for i in self._tokenizer(asked.prompt)["input_ids"]]
        if not asked.is_chat:
            return [i for i in asked.prompt if isinstance(i, int)]
        messages = [message for message in asked.prompt if isinstance(message, dict)]
        try:
            return conversation_ids(self._tokenizer, messages)
        except Exception as error:  # a template is a program that comes with the model
            raise RequestError(f"the model's chat template refuses this conversation: {error}", "messages") from error

    def _generate(self, asked: Asked, ids: Sequence[int], listen: Callable[[int], bool]) -> list[int]:
        if asked.seed is not None:  # steps of other lengths round otherwise: what must repeat begins anew
            self._prefix.clear()
            torch.manual_seed(asked.seed)
        else:
            torch.seed()
        return self._prefix.generate(
            ids,
            max_new_tokens=asked.max_tokens or self.n_ctx - len(ids),
            num_beams=1,
            stopping_criteria=StoppingCriteriaList([_Listener(listen)]),
            **self._sampling(asked),
        )

    def _sampling(self, asked: Asked) -> dict[str, bool | float]:
        own = self._model.generation_config
        temperature = _first(asked.temperature, own.temperature, 1.0)
        if temperature < _GREEDY:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": temperature,
            "top_p": _first(asked.top_p, own.top_p, 1.0),
            "top_k": _first(asked.top_k, own.top_k, 0),
        }

    def _end_tokens(self) -> tuple[int, ...]:
        found = self._model.generation_config.eos_token_id
        return tuple(found) if isinstance(found, list) else (found,) if found is not None else ()


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


class _Listener(StoppingCriteria):
    """Hands every new token on; generation ends when it is told so."""

    def __init__(self, listen: Callable[[int], bool]) -> None:
        self._listen = listen

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **how: object) -> torch.BoolTensor:
        stop = self._listen(int(input_ids[0, -1]))
        return torch.full((1,), stop, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]
