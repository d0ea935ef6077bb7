"""Ctrl-C: whatever a command is doing it ends, with exit code 130, and leaves neither threads nor half a file."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from runtime import session
from runtime.binding import LayerBinding
from runtime.cli import main
from runtime.cli.entry import DONE, INTERRUPTED
from runtime.devices.base import Body
from runtime.executor import Executor
from runtime.forward import Forward
from runtime.memory import LayerStore
from runtime.native import Kernel
from runtime.native.layer import LayerWords
from sim.graph import Task
from tests.conftest import TinyCheckpoint
from tests.test_cli import ROOT, small_machine, speaking  # noqa: F401 - a fixture

Place = Callable[[pytest.MonkeyPatch], None]


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("scheinfer")]


def while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    load = session._load_ffns

    def interrupted(*args: Any) -> None:
        ctrl_c()
        load(*args)

    monkeypatch.setattr(session, "_load_ffns", interrupted)


def in_task(step: str, kind: str) -> Place:
    """When a step's first task of a kind begins, on whichever thread it runs; the signal reaches the main thread."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        bind, once = LayerBinding.bind, [(step, kind)]

        def bind_one(self: LayerBinding, task: Task, ahead: LayerStore | None) -> Body:
            body = bind(self, task, ahead)

            def interrupted() -> None:
                once.clear()
                ctrl_c()
                body()

            return interrupted if (task.step, task.kind) in once else body

        monkeypatch.setattr(LayerBinding, "bind", bind_one)

    return patch


def in_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a prompt's first layer has been computed, but not yet noted; or in its first cc, where it is no call."""
    compute, once = Kernel.layer, ["prefill"]

    def interrupted(self: Kernel, words: LayerWords) -> None:
        compute(self, words)
        if once:
            once.clear()
            ctrl_c()

    monkeypatch.setattr(Kernel, "layer", interrupted)
    in_task("prefill", "cc")(monkeypatch)


def entering(step: str) -> Place:
    """When a step's first layer begins: where one call computes layers or steps, their tasks have no bodies."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        enter, run, once = Executor.enter_layer, Executor.run_layers, [step]
        compute, n_whole = Forward._call, 0

        def interrupt(executor: Executor) -> None:
            if executor.open_task is not None and executor.open_task.step in once:
                once.clear()
                ctrl_c()

        def enter_one(self: Executor, layer: int, hidden: Tensor) -> Tensor:
            interrupt(self)
            return enter(self, layer, hidden)

        def run_all(self: Executor, *how: Any) -> None:
            interrupt(self)
            run(self, *how)

        def whole(self: Forward, *how: Any) -> bool:
            nonlocal n_whole
            n_whole += 1
            if f"decode{n_whole}" in once:
                once.clear()
                ctrl_c()
            return compute(self, *how)

        monkeypatch.setattr(Forward, "_call", whole)
        monkeypatch.setattr(Executor, "enter_layer", enter_one)
        monkeypatch.setattr(Executor, "run_layers", run_all)

    return patch


def while_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a file: a part of it is on the disk."""
    replace = os.replace

    def interrupted(*args: Any, **how: Any) -> None:
        ctrl_c()
        replace(*args, **how)

    monkeypatch.setattr(os, "replace", interrupted)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small_machine().save(tmp_path / "hw.json")
    return str(tmp_path / "hw.json")


PLACES: dict[str, Place] = {
    "load": while_loading,
    "prompt": in_task("prefill", "cc"),
    "prompt, on the device": in_task("prefill", "gg"),
    "decode": in_task("decode3", "cc"),
    "decode, on the device": in_task("decode3", "gg"),
    "trace": while_writing,
}


@pytest.mark.parametrize("place", PLACES)
def test_generate_ends_at_once_and_writes_nothing(
    place: str,
    tiny_checkpoint: TinyCheckpoint,
    machine: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    PLACES[place](monkeypatch)
    before, out = our_threads(), tmp_path / "out"
    out.mkdir()
    words = ("--prompt", "5 6 7", "-n", "8", "--trace", str(out / "t.json"), "--routing-out", str(out / "r.parquet"))
    budget = ("--vram-budget", "300KiB", "--policy", "fiddler", "--device", "emulated", "--hardware", machine)
    assert main(["generate", "-m", str(tiny_checkpoint("mixtral")), *budget, *words]) == INTERRUPTED
    assert our_threads() == before
    assert list(out.iterdir()) == []
    assert "Traceback" not in capsys.readouterr().err


def test_a_plan_that_is_interrupted_while_it_is_written_is_not_there(
    tiny_checkpoint: TinyCheckpoint, machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    while_writing(monkeypatch)
    out = tmp_path / "out"
    words = ("--hardware", machine, "-p", "8", "-n", "6", "--policy", "cpu-only", "--out", str(out / "plan.json"))
    assert main(["plan", "-q", "-m", str(tiny_checkpoint("llama")), *words]) == INTERRUPTED
    assert list(out.iterdir()) == []


# -- chat ---------------------------------------------------------------------------------------------

CHAT = ("--device", "emulated", "-n", "6", "-c", "64", "--policy", "cpu-only")


@pytest.mark.parametrize("place", [in_prompt, entering("decode3")], ids=["prompt", "decode"])
def test_chat_stops_the_answer_and_goes_on_as_if_it_had_not_been_asked(
    place: Place,
    speaking: Path,  # noqa: F811
    machine: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = our_threads()

    def talk(lines: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        assert main(["chat", "-m", str(speaking), "--hardware", machine, *CHAT]) == DONE
        out, err = capsys.readouterr()
        return out, err

    expected, _ = talk("w3\n")
    place(monkeypatch)
    out, err = talk("w1 w2\n!clear\nw3\n")
    assert "stopped" in err
    assert out.splitlines()[-1] == expected.splitlines()[0]
    assert our_threads() == before


def test_chat_ends_by_an_interrupt_where_a_line_is_awaited(
    speaking: Path,  # noqa: F811
    machine: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Keyboard(io.StringIO):
        def readline(self, *args: Any) -> str:
            ctrl_c()
            return super().readline(*args)

    before = our_threads()
    monkeypatch.setattr(sys, "stdin", Keyboard("w1\n"))
    assert main(["chat", "-m", str(speaking), "--hardware", machine, *CHAT]) == INTERRUPTED
    assert our_threads() == before
    assert "Traceback" not in capsys.readouterr().err


# -- serve --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_in_the_middle_of_an_answer(
    how: signal.Signals,
    speaking: Path,  # noqa: F811
    machine: str,
) -> None:
    words = ["serve", "-m", str(speaking), "--hardware", machine, "--port", "0", "-c", "200", *CHAT[:4], *CHAT[6:]]
    code = "import sys; from runtime.cli import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), server.communicate()[1]
        body = json.dumps({"prompt": "w1", "max_tokens": 190, "stream": True}).encode()
        with urllib.request.urlopen(f"{url}/completions", body, timeout=60) as answer:
            assert answer.readline().startswith(b"data: {")
            server.send_signal(how)
            answer.read()
        _, err = server.communicate(timeout=60)
    assert server.returncode == DONE
    assert "ended" in err
    assert "Traceback" not in err
