"""The server: OpenAI's protocol through real sockets, one answer at a time, and an end without remains."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from hwmodels.errors import FormatError
from runtime.serving.engine import ClientGone, Engine, Turns
from runtime.serving.server import Server
from runtime.session import PlannedModel
from tests.planned import greedy, loaded, spec_of, three_ways
from tests.test_cli import speaking  # noqa: F401 - a fixture
from tests.test_executor import break_task

N_CTX = 128
ASK: dict[str, Any] = {"model": "any", "prompt": "w1 w2 w3", "max_tokens": 6, "temperature": 0}
TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 6, "temperature": 0}


class World:
    """A server with its model, and what a client does with it."""

    def __init__(self, server: Server, model: PlannedModel, told: list[str]) -> None:
        self.server, self.model, self.told = server, model, told
        self.port = int(server.server_address[1])

    def raw(self, method: str, path: str, body: bytes | None, **headers: str) -> tuple[int, str, bytes]:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        client.request(method, path, body, headers)
        answer = client.getresponse()
        found = answer.status, answer.headers["Content-Type"], answer.read()
        client.close()
        return found

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, kind, data = self.raw("POST", path, json.dumps(body).encode())
        assert kind == "application/json"
        return status, json.loads(data)

    def ok(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        status, reply = self.post(path, body)
        assert status == 200, reply
        return reply

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        status, kind, data = self.raw("POST", path, json.dumps({**body, "stream": True}).encode())
        assert (status, kind) == (200, "text/event-stream; charset=utf-8")
        *events, done, end = data.decode().split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def send_and_keep(self, path: str, body: dict[str, Any]) -> socket.socket:
        """A connection on which a request was sent and no answer read."""
        data = json.dumps(body).encode()
        client = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        return client

    def wait_for(self, text: str) -> None:
        until = time.monotonic() + 60
        while not any(text in line for line in self.told):
            assert time.monotonic() < until, self.told
            time.sleep(0.01)


@contextmanager
def serving(folder: Path, n_ctx: int = N_CTX) -> Iterator[World]:
    told: list[str] = []
    with loaded(folder, three_ways(spec_of(folder), n_ctx=n_ctx)) as model:
        server = Server("127.0.0.1", 0, told.append)
        server.open(Engine(model, AutoTokenizer.from_pretrained(folder), "tiny", n_ctx))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield World(server, model, told)
        finally:
            server.shutdown()
            thread.join(60)
            server.stop()


@pytest.fixture(scope="module")
def folder(speaking: Path) -> Path:  # noqa: F811
    return speaking


@pytest.fixture
def world(folder: Path) -> Iterator[World]:
    with serving(folder) as made:
        yield made


def expected_words(world: World, folder: Path, prompt: str, n: int) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return str(tokenizer.decode(greedy(world.model, ids, n)[0])).split()


# -- answers ------------------------------------------------------------------------------------------


def test_a_completion_is_the_models_and_counts_its_tokens(world: World, folder: Path) -> None:
    reply = world.ok("/v1/completions", ASK)
    assert reply["object"] == "text_completion"
    assert reply["model"] == "tiny"
    assert reply["choices"][0]["text"].split() == expected_words(world, folder, "w1 w2 w3", 6)
    assert reply["choices"][0]["finish_reason"] == "length"
    usage = {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    assert reply["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}


def test_a_prompt_may_be_token_ids(world: World) -> None:
    text = world.ok("/v1/completions", ASK)["choices"][0]["text"]
    ids = [int(i) for i in world.server.engine.prompt(_asked("w1 w2 w3"))]  # type: ignore[union-attr]
    for prompt in (ids, [ids], ["w1 w2 w3"]):
        assert world.ok("/v1/completions", {**ASK, "prompt": prompt})["choices"][0]["text"] == text


def _asked(prompt: str) -> Any:
    from runtime.serving.requests import Asked

    return Asked(prompt, is_chat=False)


def test_a_conversation_goes_on_from_its_cache(world: World) -> None:
    first = world.ok("/v1/chat/completions", TALK)
    answer = first["choices"][0]["message"]
    assert first["object"] == "chat.completion"
    assert answer["role"] == "assistant"
    messages = [*TALK["messages"], answer, {"role": "user", "content": [{"type": "text", "text": "w9"}]}]
    second = world.ok("/v1/chat/completions", {**TALK, "messages": messages})
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"]
    again = world.ok("/v1/chat/completions", {**TALK, "messages": messages, "seed": 0})  # computed anew
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["choices"] == second["choices"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_is_the_same_answer_in_pieces(world: World, path: str) -> None:
    body = ASK if path == "/v1/completions" else TALK
    whole = world.ok(path, body)
    *chunks, last, usage = world.stream(path, {**body, "stream_options": {"include_usage": True}})
    choices = [chunk["choices"][0] for chunk in chunks]
    if path == "/v1/completions":
        text, expected = "".join(c["text"] for c in choices), whole["choices"][0]["text"]
    else:
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        text, expected = "".join(c["delta"]["content"] for c in choices), whole["choices"][0]["message"]["content"]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len(chunks) >= 6
    assert text == expected
    assert (last["choices"][0]["finish_reason"], usage["choices"]) == ("length", [])
    assert usage["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert len({chunk["id"] for chunk in [*chunks, last, usage]}) == 1


def test_a_stop_text_ends_the_answer_before_it(world: World) -> None:
    words = world.ok("/v1/completions", ASK)["choices"][0]["text"].split()
    stop = next(w for w in words[1:] if w != words[0])
    reply = world.ok("/v1/completions", {**ASK, "stop": ["never", stop]})
    assert reply["choices"][0]["text"].split() == words[: words.index(stop)]
    assert reply["choices"][0]["finish_reason"] == "stop"
    pieces = world.stream("/v1/completions", {**ASK, "stop": stop})
    assert "".join(p["choices"][0]["text"] for p in pieces) == reply["choices"][0]["text"]


def test_an_end_token_is_a_stop(world: World, folder: Path) -> None:
    words = expected_words(world, folder, "w1 w2 w3", 6)
    third = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(words[2])
    world.model.generation_config.eos_token_id = third
    reply = world.ok("/v1/completions", ASK)
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == words.index(words[2]) + 1


def test_a_seed_repeats_what_was_sampled_and_without_one_it_is_drawn_anew(world: World) -> None:
    hot = {**ASK, "temperature": 1.5, "max_tokens": 24, "top_p": 0.99}

    def texts(*seeds: int | None) -> list[str]:
        return [world.ok("/v1/completions", {**hot, "seed": seed})["choices"][0]["text"] for seed in seeds]

    a, b, c = texts(1, 1, 2)
    assert a == b != c
    assert len(set(texts(None, None, None))) > 1


def test_without_a_limit_a_conversation_is_answered_to_the_end_of_the_context(world: World) -> None:
    reply = world.ok("/v1/chat/completions", {"messages": TALK["messages"], "temperature": 0})
    assert reply["usage"]["total_tokens"] == N_CTX
    assert world.ok("/v1/completions", {"prompt": "w1"})["usage"]["completion_tokens"] == 16


def test_the_models_are_one(world: World) -> None:
    status, _, data = world.raw("GET", "/v1/models", None)
    assert (status, [card["id"] for card in json.loads(data)["data"]]) == (200, ["tiny"])
    assert world.raw("GET", "/v1/models/tiny", None)[0] == 200
    assert world.raw("GET", "/health", None)[0] == 200


# -- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("/v1/completions", {}, "prompt", "prompt must be"),
        ("/v1/completions", {**ASK, "prompt": ""}, "prompt", "prompt must be"),
        ("/v1/completions", {**ASK, "prompt": ["a", "b"]}, "prompt", "one text"),
        ("/v1/completions", {**ASK, "prompt": [100_000]}, "prompt", "0 to 96"),
        ("/v1/completions", {**ASK, "max_tokens": 0}, "max_tokens", "at least 1"),
        ("/v1/completions", {**ASK, "max_tokens": "6"}, "max_tokens", "whole number"),
        ("/v1/completions", {**ASK, "max_tokens": N_CTX}, "prompt", "at most 128 fit"),
        ("/v1/completions", {**ASK, "temperature": 3}, "temperature", "from 0 to 2"),
        ("/v1/completions", {**ASK, "top_p": 0}, "top_p", "above 0"),
        ("/v1/completions", {**ASK, "stop": [""]}, "stop", "not empty"),
        ("/v1/completions", {**ASK, "stream": "yes"}, "stream", "true or false"),
        ("/v1/completions", {**ASK, "n": 2}, "n", "n is not supported"),
        ("/v1/completions", {**ASK, "seed": 2**64}, "seed", "whole number"),
        ("/v1/chat/completions", {}, "messages", "messages must be"),
        ("/v1/chat/completions", {**TALK, "messages": [{"role": "judge"}]}, "messages[0].role", "needs a role"),
        ("/v1/chat/completions", {**TALK, "messages": [{"role": "user"}]}, "messages[0].content", "must be a text"),
        ("/v1/chat/completions", {**TALK, "tools": [{"type": "function"}]}, "tools", "not supported"),
    ],
)
def test_a_bad_request_is_told_which_field_is_wrong(
    shared: World, path: str, body: dict[str, Any], param: str, says: str
) -> None:
    status, reply = shared.post(path, body)
    assert status == 400
    assert reply["error"]["type"] == "invalid_request_error"
    assert reply["error"]["param"] == param
    assert says in reply["error"]["message"]


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[World]:
    with serving(folder) as made:
        yield made


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b"[]", 400),
        ("POST", "/v1/completions", b"\xff", 400),
        ("POST", "/v1/embeddings", b"{}", 404),
        ("GET", "/v2/models", None, 404),
        ("PUT", "/v1/models", b"{}", 501),
    ],
)
def test_what_is_no_request_gets_an_error_in_the_same_form(
    shared: World, method: str, path: str, body: bytes | None, status: int
) -> None:
    found, kind, data = shared.raw(method, path, body)
    assert (found, kind) == (status, "application/json")
    assert json.loads(data)["error"]["message"]


def test_a_request_without_a_length_or_too_large_is_refused(shared: World) -> None:
    for head, status in (("", b"411"), ("Content-Length: 99999999999\r\n", b"413"), ("Content-Length: -1\r\n", b"411")):
        with socket.create_connection(("127.0.0.1", shared.port), timeout=60) as client:
            client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode())
            assert client.makefile("rb").readline().split()[1] == status


def test_a_template_that_refuses_is_the_requests_fault(world: World) -> None:
    tokenizer = world.server.engine._tokenizer  # type: ignore[union-attr]
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    status, reply = world.post("/v1/chat/completions", TALK)
    assert (status, reply["error"]["param"]) == (400, "messages")
    assert "roles must alternate" in reply["error"]["message"]


# -- failures, clients that leave, the end ------------------------------------------------------------


def test_a_task_that_fails_is_an_error_and_the_next_request_is_answered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = world.ok("/v1/completions", ASK)["choices"]
    break_task(monkeypatch, "decode2.L01.cc", RuntimeError("the wire is cut"))
    status, reply = world.post("/v1/completions", ASK)
    assert (status, reply["error"]["type"]) == (500, "server_error")
    assert reply["error"]["message"].startswith("task decode2.L01.cc failed on CPU")
    assert world.ok("/v1/completions", ASK)["choices"] == text
    break_task(monkeypatch, "decode2.L01.cc", RuntimeError("the wire is cut"))
    _, _, data = world.raw("POST", "/v1/completions", json.dumps({**ASK, "stream": True}).encode())
    last = data.decode().strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_generation(folder: Path, stream: bool) -> None:
    with serving(folder, n_ctx=20_000) as world:
        client = world.send_and_keep("/v1/completions", {**ASK, "max_tokens": 19_000, "stream": stream})
        if stream:
            client.recv(10)
        client.close()
        world.wait_for("/v1/completions: the client left")
        assert world.ok("/v1/completions", ASK)["usage"]["completion_tokens"] == 6


def test_who_leaves_the_queue_is_not_answered(folder: Path) -> None:
    with serving(folder, n_ctx=20_000) as world:
        first = world.send_and_keep("/v1/completions", {**ASK, "max_tokens": 19_000, "stream": True})
        first.recv(10)
        world.send_and_keep("/v1/completions", ASK).close()
        world.wait_for("left before the answer began")
        first.close()
        world.wait_for("left after")


def test_many_at_once_are_answered_one_after_the_other(world: World) -> None:
    alone = [world.ok("/v1/completions", {**ASK, "prompt": f"w{i}"})["choices"] for i in range(4)]
    found: dict[int, Any] = {}

    def ask(i: int) -> None:
        found[i] = world.ok("/v1/completions", {**ASK, "prompt": f"w{i % 4}"})["choices"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: alone[i % 4] for i in range(12)}


def test_stopping_ends_what_is_answered_and_who_waits_and_leaves_no_thread(folder: Path) -> None:
    before = set(threading.enumerate())
    with serving(folder, n_ctx=20_000) as world:
        busy = world.send_and_keep("/v1/completions", {**ASK, "max_tokens": 19_000, "stream": True})
        busy.recv(10)
        queued = world.send_and_keep("/v1/completions", ASK)
        silent = socket.create_connection(("127.0.0.1", world.port), timeout=60)
        time.sleep(0.1)
    assert {t for t in threading.enumerate() if t.is_alive()} == before
    assert b"[DONE]" not in busy.makefile("rb").read()
    for client in (busy, queued, silent):
        client.close()


def test_a_port_in_use_is_said(shared: World) -> None:
    with pytest.raises(FormatError, match=r"cannot listen on 127.0.0.1:\d+: .* choose another"):
        Server("127.0.0.1", shared.port, print)


def test_turns_are_taken_in_order() -> None:
    turns, order, ready = Turns(), list[int](), threading.Event()

    def take(i: int) -> None:
        with turns.take(lambda: False):
            order.append(i)
            ready.wait(60)

    threads = [threading.Thread(target=take, args=(i,)) for i in range(5)]
    for i, thread in enumerate(threads):
        thread.start()
        while len(turns._waiting) <= i:
            time.sleep(0.001)
    ready.set()
    for thread in threads:
        thread.join(60)
    assert order == [0, 1, 2, 3, 4]
    with pytest.raises(ClientGone), turns.take(lambda: True):
        pass
    assert not turns._waiting
