"""stdout for results, stderr for everything else."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from hwmodels.errors import FormatError
from runtime.cli.table import Column, Row, render


def emit(flags: Namespace, rows: Sequence[Row], columns: Sequence[Column]) -> None:
    """Write rows to stdout in the format asked for."""
    sys.stdout.write(render(rows, columns, flags.output))
    sys.stdout.flush()


def emit_text(text: str) -> None:
    """Write a result that is a text to stdout."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def say(flags: Namespace, text: str) -> None:
    """Write lines for people to stdout; programs, which asked for another format, get only the table."""
    if flags.output == "md":
        sys.stdout.write(text.rstrip("\n") + "\n\n")


def note(flags: Namespace, text: str) -> None:
    """Write a remark to stderr, unless asked to be quiet."""
    if not flags.quiet:
        sys.stderr.write(text.rstrip("\n") + "\n")
        sys.stderr.flush()


def refuse_pins(flags: Namespace) -> None:
    """Raise FormatError for --pin beside --plan, which is complete."""
    if flags.pin:
        raise FormatError("--plan and --pin are both given; a plan file is complete: leave --pin out, or plan anew")
