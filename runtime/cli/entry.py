"""From words on the command line to an exit code: 0 done, 1 the job failed, 2 wrong usage or unusable input."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from hwmodels.errors import ExecutionError, ScheInferError
from runtime.cli.commands import COMMANDS, Command
from runtime.cli.options import Option

DONE, FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130
_EPILOG = (
    "Every flag can also be set by an environment variable: SCHEINFER_ and its long name in capitals, as in "
    "SCHEINFER_VRAM_BUDGET=8GiB. A flag wins over its variable. Results go to stdout, all else to stderr. "
    "Exit codes: 0 done, 1 the job failed, 2 wrong usage or unusable input."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Never raises for what a user did."""
    words = list(sys.argv[1:] if argv is None else argv)
    flags = argparse.Namespace(debug="--debug" in words)
    try:
        flags = _parser().parse_args(_with_environment(words, os.environ))
        _set_up_logging(flags.verbose)
        _load(flags.command)(flags)
        sys.stdout.flush()
        return DONE
    except SystemExit as exit_:  # argparse has said what there is to say
        return exit_.code if isinstance(exit_.code, int) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has gone, as `head` does: nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except ScheInferError as error:
        _complain(str(error), flags.debug)
        return FAILED if isinstance(error, ExecutionError) else UNUSABLE
    except Exception as error:
        hint = "" if flags.debug else " (--debug shows where)"
        _complain(f"{type(error).__name__}: {error}{hint}", flags.debug)
        return FAILED


def _complain(message: str, with_traceback: bool) -> None:
    if with_traceback:
        traceback.print_exc()
    sys.stderr.write(f"scheinfer: error: {' '.join(message.split())}\n")


def _load(command: Command) -> Callable[[argparse.Namespace], None]:
    module, _, function = command.run.partition(":")
    run: Callable[[argparse.Namespace], None] = getattr(importlib.import_module(module), function)
    return run


def _set_up_logging(verbose: bool) -> None:
    """Libraries speak on stderr only if asked."""
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        logging.captureWarnings(True)
        logging.getLogger("py.warnings").addHandler(logging.NullHandler())


# -- parsing ------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """One line per error, in the form of all others."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"scheinfer: error: {message} (see {self.prog} --help)\n")
        raise SystemExit(UNUSABLE)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="scheinfer",
        description="Run large language models on a CPU and a small GPU together: simulate the schedule, then run it.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"scheinfer {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for command in COMMANDS:
        about = _capital(command.summary)
        sub = commands.add_parser(
            command.name,
            help=command.summary,
            description=about,
            epilog=_EPILOG,
            allow_abbrev=False,
        )
        for option in command.all_options:
            _add(sub, option)
        sub.set_defaults(command=command)
    return parser


def _add(parser: argparse.ArgumentParser, option: Option) -> None:
    text = option.full_help.replace("%", "%%")
    if option.parse is None:
        parser.add_argument(*option.names, action="store_true", help=text)
    elif option.positional:
        nargs = None if option.required else "?"
        parser.add_argument(*option.names, nargs=nargs, type=_reader(option), metavar=option.metavar, help=text)
    else:
        parser.add_argument(
            *option.names,
            type=_reader(option),
            default=option.default,
            metavar=option.metavar or option.names[-1].lstrip("-").upper(),
            required=option.required,
            help=text,
        )


def _reader(option: Option) -> Callable[[str], object]:
    parse = option.parse
    assert parse is not None, "switches take no text"

    def read(text: str) -> object:
        try:
            return parse(text)
        except ScheInferError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _capital(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _version() -> str:
    try:
        return version("scheinfer")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "(not installed)"


def _with_environment(words: list[str], environment: Mapping[str, str]) -> list[str]:
    """The words with the environment's flags before the user's own, so that these win."""
    commands = {command.name: command for command in COMMANDS}
    if not words or words[0] not in commands:
        return words
    command = commands[words[0]]
    given: list[str] = []
    for option in command.all_options:
        value = environment.get(option.variable)
        if value is None or option.positional:
            continue
        if option.parse is not None:
            given.append(f"{option.names[-1]}={value}")
        elif _switched_on(option, value):
            given.append(option.names[-1])
    return [words[0], *given, *words[1:]]


def _switched_on(option: Option, value: str) -> bool:
    text = value.strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("", "0", "false", "no", "off"):
        return False
    sys.stderr.write(f"scheinfer: error: {option.variable} is {value!r}; expected 1 or 0\n")
    raise SystemExit(UNUSABLE)
