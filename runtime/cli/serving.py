"""serve: OpenAI's protocol over HTTP."""

from __future__ import annotations

import signal
from argparse import Namespace

from hwmodels.errors import CheckpointError
from runtime.cli.console import emit_text, note
from runtime.cli.running import load, open_source
from runtime.cli.talk import conversation_workload
from runtime.serving.engine import Engine
from runtime.serving.server import Server


def serve(flags: Namespace) -> None:
    """Answer requests until Ctrl-C or SIGTERM; the base URL for clients is the one line on stdout."""
    source = open_source(flags)
    if source.tokenizer is None:
        raise CheckpointError(f"{source.folder}: no tokenizer, serve needs one; scheinfer generate takes token ids")
    workload = conversation_workload(flags, source.spec)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = Server(flags.host, flags.port, tell=lambda text: note(flags, text))
    try:
        model = load(flags, source, workload)
        try:
            _answer(flags, server, Engine(model, source.tokenizer, source.spec.name, workload.n_ctx))
        finally:
            server.stop()
            model.close()
    finally:
        server.server_close()


def _answer(flags: Namespace, server: Server, engine: Engine) -> None:
    server.open(engine)
    emit_text(server.url)
    note(flags, f"{engine.name} is answered for at {server.url}, {engine.n_ctx} tokens of context; Ctrl-C ends")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        note(flags, "\nended")
