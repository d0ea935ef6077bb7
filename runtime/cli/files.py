"""Output files: checked before long work, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hwmodels.errors import FormatError


def check_file(path: Path | None) -> None:
    """FormatError if no file can be written at `path`; None is fine. Leaves nothing behind."""
    if path is None:
        return
    if path.is_dir():
        raise FormatError(f"cannot write {str(path)!r}: it is a folder; name a file")
    _probe(path.parent, path)


def check_folder(path: Path | None) -> None:
    """FormatError if no file can be written into folder `path`, made if it is missing; None is fine."""
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise FormatError(f"cannot write into {str(path)!r}: it is a file; name a folder")
    _probe(path, path)


def _probe(folder: Path, wanted: Path) -> None:
    # Permission bits do not tell: a file is made and removed in the nearest folder that exists.
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".scheinfer-"):
            pass
    except OSError as error:
        raise FormatError(f"cannot write {str(wanted)!r}: {error.strerror}") from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place; FormatError if that cannot be."""
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        os.replace(beside, path)
    except OSError as error:
        raise FormatError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
