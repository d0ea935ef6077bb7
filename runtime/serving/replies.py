"""Answers as OpenAI shapes them: whole, in chunks, or an error."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

from hwmodels.schema import Json
from runtime.serving.engine import Answer
from runtime.serving.requests import Asked

Reply = dict[str, Json]


@dataclass(frozen=True)
class Shape:
    """What all JSON of one answer has in common."""

    asked: Asked
    model: str
    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, answer: Answer) -> Reply:
        """The answer in one piece."""
        content: Reply = {"message": {"role": "assistant", "content": text}} if self.asked.is_chat else {"text": text}
        return {**self._head(chunk=False), "choices": [_choice(content, answer.finish_reason)], "usage": _usage(answer)}

    def opening(self) -> list[Reply]:
        """What comes before the first piece."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None)] if self.asked.is_chat else []

    def piece(self, text: str) -> Reply:
        """One piece of the answer."""
        return self._chunk({"delta": {"content": text}} if self.asked.is_chat else {"text": text}, None)

    def closing(self, answer: Answer) -> list[Reply]:
        """What comes after the last piece."""
        last = self._chunk({"delta": {}} if self.asked.is_chat else {"text": ""}, answer.finish_reason)
        usage: Reply = {**self._head(chunk=True), "choices": [], "usage": _usage(answer)}
        return [last, usage] if self.asked.include_usage else [last]

    def _chunk(self, content: Reply, finish_reason: str | None) -> Reply:
        return {**self._head(chunk=True), "choices": [_choice(content, finish_reason)]}

    def _head(self, chunk: bool) -> Reply:
        kind = "text_completion" if not self.asked.is_chat else f"chat.completion{'.chunk' if chunk else ''}"
        prefix = "chatcmpl" if self.asked.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.number}", "object": kind, "created": self.created, "model": self.model}


def model_card(name: str, created: int) -> Reply:
    """An entry of /v1/models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "scheinfer"}


def error(message: str, status: int, param: str | None = None, code: str | None = None) -> Reply:
    """An error of a status; of the client below 500."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _choice(content: Reply, finish_reason: str | None) -> Reply:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


def _usage(answer: Answer) -> Reply:
    return {
        "prompt_tokens": answer.n_prompt,
        "completion_tokens": answer.n_new,
        "total_tokens": answer.n_prompt + answer.n_new,
        "prompt_tokens_details": {"cached_tokens": answer.n_cached},
    }
