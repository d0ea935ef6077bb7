"""What a request asks for, read from its JSON body; what cannot be answered is refused, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hwmodels.errors import FormatError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_NEUTRAL: Mapping[str, tuple[object, ...]] = {  # what would change the answer, and the values that do not
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}
_MOST_STOPS = 16

Body = Mapping[str, Any]
Message = dict[str, str]


class RequestError(FormatError):
    """A request that cannot be answered: HTTP status, OpenAI's code, the field that is wrong."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class Asked:
    """One request. None: as the model's generation_config says.

    prompt        a text, token ids, or the messages of a conversation
    max_tokens    None: what the context has room for
    seed          the answer can be repeated; None: it is drawn anew
    """

    prompt: str | tuple[int, ...] | tuple[Message, ...]
    is_chat: bool
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False

    @staticmethod
    def chat(text: bytes) -> Asked:
        """The body of /v1/chat/completions."""
        body = _object(text)
        return _asked(body, _messages(body), is_chat=True, max_tokens=None)

    @staticmethod
    def completion(text: bytes) -> Asked:
        """The body of /v1/completions; without max_tokens it is 16, as OpenAI has it."""
        body = _object(text)
        return _asked(body, _prompt(body), is_chat=False, max_tokens=16)


def _asked(
    body: Body, prompt: str | tuple[int, ...] | tuple[Message, ...], is_chat: bool, max_tokens: int | None
) -> Asked:
    for name, neutral in _NEUTRAL.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise RequestError(f"{name} is not supported; leave it out", name, "unsupported_parameter")
    most = _whole(body, "max_completion_tokens", 1)
    most = most if most is not None else _whole(body, "max_tokens", 1)
    options = _mapping(body, "stream_options")
    return Asked(
        prompt,
        is_chat,
        most if most is not None else max_tokens,
        _number(body, "temperature", 0, 2),
        _share(body, "top_p"),
        _whole(body, "top_k", 0),
        _whole(body, "seed", -(2**63), 2**64 - 1),
        _stop(body),
        _switch(body, "stream"),
        _switch(options, "include_usage"),
    )


# -- fields -------------------------------------------------------------------------------------------


def _object(text: bytes) -> Body:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError('the body is not a JSON object; expected one such as {"prompt": "Hello"}')
    return body


def _messages(body: Body) -> tuple[Message, ...]:
    found = body.get("messages")
    if not isinstance(found, list) or not found:
        raise RequestError("messages must be a list of one message or more", "messages")
    return tuple(_message(value, f"messages[{i}]") for i, value in enumerate(found))


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        raise RequestError(f"{where} needs a role: {', '.join(ROLES)}", f"{where}.role")
    return {"role": ROLES[value["role"]], "content": _content(value.get("content"), f"{where}.content")}


def _content(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in value
    ):
        raise RequestError(f"{where} must be a text, or a list of parts of type text", where)
    return "".join(part["text"] for part in value)


def _prompt(body: Body) -> str | tuple[int, ...]:
    found = body.get("prompt")
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], (str, list)):
        found = found[0]
    if isinstance(found, str) and found:
        return found
    if isinstance(found, list) and found and all(type(i) is int and i >= 0 for i in found):
        return tuple(found)
    raise RequestError("prompt must be one text that is not empty, or one list of token ids", "prompt")


def _stop(body: Body) -> tuple[str, ...]:
    found = body.get("stop")
    texts = [found] if isinstance(found, str) else found or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise RequestError("stop must be a text that is not empty, or a list of such texts", "stop")
    if len(texts) > _MOST_STOPS:
        raise RequestError(f"stop has {len(texts)} texts; expected at most {_MOST_STOPS}", "stop")
    return tuple(texts)


def _number(body: Body, name: str, least: float, most: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise RequestError(f"{name} is {json.dumps(value)}; expected a number from {least} to {most}", name)
    return float(value)


def _share(body: Body, name: str) -> float | None:
    value = _number(body, name, 0, 1)
    if value == 0:
        raise RequestError(f"{name} is 0; expected a number above 0, up to 1", name)
    return value


def _whole(body: Body, name: str, least: int, most: int = 2**31) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise RequestError(f"{name} is {json.dumps(value)}; expected a whole number of at least {least}", name)
    return value


def _switch(body: Body, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{name} is {json.dumps(value)}; expected true or false", name)
    return bool(value)


def _mapping(body: Body, name: str) -> Body:
    value = body.get(name)
    if value is not None and not isinstance(value, dict):
        raise RequestError(f"{name} must be an object", name)
    return value or {}
