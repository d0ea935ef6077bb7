"""chat: a conversation in the terminal."""

from __future__ import annotations

import sys
from argparse import Namespace

from transformers import PreTrainedTokenizerBase, TextStreamer

from hwmodels.errors import CheckpointError, FormatError
from runtime.cli.console import emit_text, note
from runtime.cli.running import complete, load, open_source, timings
from runtime.prefix import PrefixCache
from runtime.session import PlannedModel
from runtime.tokens import Message, conversation_ids, decode
from sim.model import ModelSpec
from sim.workload import Workload, check_context

HELP = "!help shows this, !clear forgets the conversation, !exit ends (so does Ctrl-D); Ctrl-C stops an answer"
_LEAST_PROMPT = 16


def chat(flags: Namespace) -> None:
    """Answer line by line until !exit or the end of input."""
    source = open_source(flags)
    tokenizer = source.tokenizer
    if tokenizer is None:
        raise CheckpointError(f"{source.folder}: no tokenizer, chat needs one; scheinfer generate takes token ids")
    workload = conversation_workload(flags, source.spec)
    model = load(flags, source, workload)
    try:
        _converse(flags, tokenizer, model, workload.n_ctx - flags.n_gen)
    finally:
        model.close()


def conversation_workload(flags: Namespace, spec: ModelSpec) -> Workload:
    """What a plan for --ctx-size tokens is made for; FormatError if --n-gen leaves no room for a prompt."""
    n_ctx = min(flags.ctx_size, spec.max_positions)
    if n_ctx < flags.n_gen + _LEAST_PROMPT:
        raise FormatError(
            f"--n-gen {flags.n_gen} leaves no room for a prompt in a context of {n_ctx} tokens; "
            f"expected at most {n_ctx - _LEAST_PROMPT}"
        )
    n_prompt = min(256, n_ctx - flags.n_gen)
    workload = Workload(n_prompt, flags.n_gen, n_depth=n_ctx - n_prompt - flags.n_gen, seed=flags.seed)
    check_context(spec, workload)
    return workload


def _converse(flags: Namespace, tokenizer: PreTrainedTokenizerBase, model: PlannedModel, most_prompt: int) -> None:
    note(flags, HELP)
    prefix = PrefixCache(model)
    messages: list[Message] = []
    while (line := _read_line(flags)) is not None:
        if line == "!exit":
            return
        if line == "!clear":
            messages = []
            prefix.clear()
            note(flags, "forgotten")
        elif line.startswith("!"):
            note(flags, HELP if line == "!help" else f"{line} is not known. {HELP}")
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _answer(flags, tokenizer, prefix, messages, most_prompt)
            messages.append({"role": "assistant", "content": answer})


def _read_line(flags: Namespace) -> str | None:
    """The next line typed, None at the end of input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except EOFError:
        note(flags, "")
        return None


def _answer(
    flags: Namespace,
    tokenizer: PreTrainedTokenizerBase,
    prefix: PrefixCache,
    messages: list[Message],
    most_prompt: int,
) -> str:
    ids = _fitting_ids(flags, tokenizer, messages, most_prompt)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        new_ids = complete(prefix, ids, flags, streamer)
    except KeyboardInterrupt:
        emit_text("")  # the answer's line ends where it was
        note(flags, "stopped")
        return ""
    kept = f"{prefix.n_kept} tokens kept; " if prefix.n_kept else ""
    note(flags, kept + timings(prefix.model, Workload(len(ids) - prefix.n_kept, len(new_ids))))
    return decode(new_ids, tokenizer)


def _fitting_ids(
    flags: Namespace, tokenizer: PreTrainedTokenizerBase, messages: list[Message], most_prompt: int
) -> list[int]:
    """Ids of the conversation; its oldest messages are dropped where it outgrows the context."""
    ids = conversation_ids(tokenizer, messages)
    while len(ids) > most_prompt and len(messages) > 1:
        del messages[0]
        note(flags, "the context is full: the oldest message is forgotten")
        ids = conversation_ids(tokenizer, messages)
    if len(ids) > most_prompt:
        note(flags, f"the message has {len(ids)} tokens: only its last {most_prompt} are read")
    return ids[-most_prompt:]
