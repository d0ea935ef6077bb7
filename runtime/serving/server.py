"""Sockets: requests in, JSON or an event stream out, one request per connection."""

from __future__ import annotations

import json
import select
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast

from hwmodels.errors import FormatError, ScheInferError
from hwmodels.units import format_number
from runtime.serving.engine import ClientGone, Engine
from runtime.serving.replies import Reply, Shape, error, model_card
from runtime.serving.requests import Asked, RequestError

MOST_BYTES = 32 << 20
_SILENT_S = 60.0
_POSTS: Mapping[str, Callable[[bytes], Asked]] = {
    "/v1/chat/completions": Asked.chat,
    "/v1/completions": Asked.completion,
}

Tell = Callable[[str], None]
"""Receives a line per answer, for a log."""


class Server(ThreadingHTTPServer):
    """Bound from the beginning, so that a port in use is known before a model is loaded; answers once opened."""

    daemon_threads = False  # stop waits for them
    request_queue_size = 64

    def __init__(self, host: str, port: int, tell: Tell) -> None:
        self.tell, self.closing, self.created = tell, threading.Event(), int(time.time())
        self.engine: Engine | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__((host, port), Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except (OSError, OverflowError) as problem:
            self.socket.close()
            raise FormatError(
                f"cannot listen on {host}:{port}: {problem}; choose another --host or --port"
            ) from problem

    @property
    def url(self) -> str:
        """Where the interface is: the base URL that clients are given."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/v1"

    def open(self, engine: Engine) -> None:
        """Let clients connect; serve_forever answers them."""
        self.engine = engine
        self.server_activate()

    def stop(self) -> None:
        """After serve_forever: end what is being answered, wait for its threads, close the port."""
        self.closing.set()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)  # wakes whoever waits for a request that never comes
        self.server_close()

    def server_bind(self) -> None:
        """As TCPServer's: HTTPServer's asks a name server for a name that is not used here."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that broke is no news; anything else is one line."""
        problem = sys.exc_info()[1]
        if not isinstance(problem, OSError):
            self.tell(f"{client_address}: {type(problem).__name__}: {problem}")

    def entered(self, connection: socket.socket) -> None:
        """A connection is being answered."""
        with self._lock:
            self._open.add(connection)

    def left(self, connection: socket.socket) -> None:
        """A connection is about to be closed."""
        with self._lock:
            self._open.discard(connection)


class Handler(BaseHTTPRequestHandler):
    """One connection and its request."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "scheinfer", ""
    disable_nagle_algorithm = True  # a token is to be seen when it is there
    timeout = _SILENT_S  # of a client that sends no request, or does not read its answer

    def setup(self) -> None:
        """Know the server and how the answer went."""
        super().setup()
        self._server = cast(Server, self.server)
        self._lost, self._streaming = False, False
        self._server.entered(self.connection)

    def finish(self) -> None:
        """Flush, unless the client has left."""
        self._server.left(self.connection)
        with suppress(OSError):
            super().finish()

    # -- requests -------------------------------------------------------------------------------------

    def do_GET(self) -> None:
        """The model, and whether there is one."""
        engine, path = self._engine(), self.path.partition("?")[0]
        card = model_card(engine.name, self._server.created)
        if path == "/v1/models":
            self._send(200, {"object": "list", "data": [card]})
        elif path == f"/v1/models/{engine.name}":
            self._send(200, card)
        elif path == "/health":
            self._send(200, {"status": "ok"})
        else:
            self._refuse_path()

    def do_POST(self) -> None:
        """A completion."""
        read = _POSTS.get(self.path.partition("?")[0])
        if read is None:
            self._refuse_path()
            return
        try:
            self._answer(read(self._body()))
        except RequestError as problem:
            self._fail(str(problem), problem.status, problem.param, problem.code)
        except ClientGone as problem:
            self._server.tell(f"{self.path}: the client {problem}")
        except OSError:
            self._server.tell(f"{self.path}: the connection broke")
        except ScheInferError as problem:
            self._fail(str(problem), 500)
        except Exception as problem:  # one request must not end the server
            self._fail(f"{type(problem).__name__}: {problem}", 500)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RequestError("the request needs a Content-Length", status=411)
        if int(length) > MOST_BYTES:
            raise RequestError(f"the body has {length} bytes; at most {MOST_BYTES} are read", status=413)
        return self.rfile.read(int(length))

    def _answer(self, asked: Asked) -> None:
        engine, pieces, begun_s = self._engine(), list[str](), time.perf_counter()
        ids, shape = engine.prompt(asked), Shape(asked, engine.name)

        def say(text: str) -> None:
            if not asked.stream:
                pieces.append(text)
                return
            if not self._streaming:
                self._begin_stream(shape)
            self._event(shape.piece(text))

        answer = engine.answer(asked, ids, say, self._gone)
        if asked.stream:
            if not self._streaming:
                self._begin_stream(shape)
            for chunk in shape.closing(answer):
                self._event(chunk)
            self._write(b"data: [DONE]\n\n")
        else:
            self._send(200, shape.whole("".join(pieces), answer))
        speed = format_number(answer.n_new / (time.perf_counter() - begun_s))
        self._server.tell(
            f"{self.path}: {answer.n_prompt} prompt tokens ({answer.n_cached} kept), {answer.n_new} generated, "
            f"{speed} tok/s in all"
        )

    def _engine(self) -> Engine:
        assert self._server.engine is not None, "clients connect after open()"
        return self._server.engine

    # -- answers --------------------------------------------------------------------------------------

    def _gone(self) -> bool:
        """Whether the client hung up, or the server ends."""
        if self._lost or self._server.closing.is_set():
            return True
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        try:
            self._lost = bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            self._lost = True
        return self._lost

    def _begin_stream(self, shape: Shape) -> None:
        self._streaming = True
        self._head(200, {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"})
        for chunk in shape.opening():
            self._event(chunk)

    def _event(self, chunk: Reply) -> None:
        self._write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def _write(self, data: bytes) -> None:
        """Send; a client that has left is noticed by whoever generates, and raises nothing there."""
        try:
            if not self._lost:
                self.wfile.write(data)
        except OSError:
            self._lost = True

    def _send(self, status: int, reply: Reply) -> None:
        data = json.dumps(reply).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(data))})
        if self.command != "HEAD":
            self._write(data)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response_only(status)
        for name, value in {**headers, "Date": self.date_time_string(), "Connection": "close"}.items():
            self.send_header(name, value)
        with suppress(OSError):
            self.end_headers()

    def _fail(self, message: str, status: int, param: str | None = None, code: str | None = None) -> None:
        reply = error(message, status, param, code)
        if self._streaming:  # the status is sent already
            self._event(reply)
        else:
            self._send(status, reply)
        self._server.tell(f"{self.path}: {status}: {message}")

    def _refuse_path(self) -> None:
        known = ", ".join(["GET /v1/models", *(f"POST {path}" for path in _POSTS)])
        self._fail(f"no {self.command} {self.path} here; there is {known}", 404, code="not_found")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What BaseHTTPRequestHandler refuses, in the form of all other errors."""
        del explain
        self.close_connection, self.command = True, getattr(self, "command", "") or ""
        self._send(code, error(message or HTTPStatus(code).phrase, code))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is http.server's
        """Nothing: answers are told one by one."""
