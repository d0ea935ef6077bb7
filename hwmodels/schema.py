"""Frozen dataclasses to JSON and back, with errors that say where and what.

The reader is strict: an unknown key, a missing key, a wrong type, a NaN each raise FormatError with
the path of the field (``plan.json: tiers[1].max_tokens: expected a whole number, found 'many'``).
Nothing is coerced in silence, except that a whole number may stand for a float.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import tempfile
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from hwmodels.errors import FormatError

T = TypeVar("T")
Json = Any


def to_json(value: Any) -> Json:
    """Plain JSON values of a dataclass, tuple, mapping or scalar."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    return value


def from_json(kind: type[T], value: Json, where: str) -> T:
    """Build `kind` from JSON values; `where` names the file or field for messages."""
    return typing.cast(T, _read(kind, value, where))


def _read(kind: Any, value: Json, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _read_union(args, value, where)
    if origin is typing.Literal:
        if value not in args:
            raise FormatError(f"{where}: found {value!r}, expected one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        return _read_tuple(args, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise FormatError(f"{where}: expected an object, found {_short(value)}")
        return {k: _read(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    return _read_scalar(kind, value, where)


def _read_union(args: tuple[Any, ...], value: Json, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    kinds = [a for a in args if a is not type(None)]
    errors = []
    for kind in kinds:
        try:
            return _read(kind, value, where)
        except FormatError as error:
            errors.append(error)
    raise errors[0]


def _read_tuple(args: tuple[Any, ...], value: Json, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise FormatError(f"{where}: expected a list, found {_short(value)}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_read(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if len(args) != len(value):
        raise FormatError(f"{where}: expected {len(args)} entries, found {len(value)}")
    return tuple(_read(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))


def _read_dataclass(kind: Any, value: Json, where: str) -> Any:
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected an object ({kind.__name__}), found {_short(value)}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise FormatError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(fields)}")
    built = {}
    for name, field in fields.items():
        if name in value:
            built[name] = _read(hints[name], value[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise FormatError(f"{where}: field {name!r} is missing")
    try:
        return kind(**built)
    except ValueError as error:  # from the type's own checks: the fields were read above
        raise FormatError(f"{where}: {error}") from error


_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


_LEAST, _MOST = 1e-30, 1e30
"""No number of this program is smaller or larger; arithmetic with a few of them stays finite."""


def _read_scalar(kind: Any, value: Json, where: str) -> Any:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise FormatError(f"{where}: found {_short(value)}, expected a number of at most 63 bits")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind in _WORDS and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        raise FormatError(f"{where}: expected {_WORDS[kind]}, found {_short(value)}")
    if kind is float and not math.isfinite(value):
        raise FormatError(f"{where}: expected a finite number, found {value}")
    if kind is float and value != 0 and not _LEAST <= abs(value) <= _MOST:
        raise FormatError(f"{where}: found {value}, expected 0 or a size between {_LEAST:g} and {_MOST:g}")
    return value


def _short(value: Json) -> str:
    text = (
        f"a whole number of {value.bit_length()} bits" if isinstance(value, int) and abs(value) >> 128 else repr(value)
    )
    return text if len(text) <= 60 else text[:57] + "..."


def read_json(path: str | os.PathLike[str], what: str) -> Json:
    """JSON of a file; FormatError if it is missing or not JSON."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise FormatError(f"cannot read {what} {str(path)!r}: {reason}") from error
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON ({error}); expected a {what}") from error


def _once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """An object whose fields each stand there once: of two, one would be ignored in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} stands there twice")
    return found


def check_header(value: Json, schema: str, version: int, where: str) -> dict[str, Json]:
    """The object without its ``schema`` and ``version``, after checking both."""
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected an object with schema {schema!r}, found {_short(value)}")
    found = value.get("schema")
    if found != schema:
        raise FormatError(f"{where}: schema is {found!r}, expected {schema!r}; is this the right file?")
    given = value.get("version")
    if isinstance(given, bool) or given != version:
        raise FormatError(
            f"{where}: version {_short(given)} of {schema}, this program reads version {version}; write it anew"
        )
    return {k: v for k, v in value.items() if k not in ("schema", "version")}


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all; FormatError if it cannot be written."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole or not at all (temporary file, then rename); FormatError if it cannot be written."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    except OSError as error:
        raise FormatError(f"cannot write {str(target)!r}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise FormatError(f"cannot write {str(target)!r}: {error.strerror}") from error
    finally:  # not there any more if it was put in place; an interrupt leaves it behind otherwise
        Path(temporary).unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Json) -> None:
    """Write JSON whole or not at all; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def digest(value: Any) -> str:
    """Twelve hex digits that identify a value's JSON; 1 and 1.0 are the same number."""
    text = json.dumps(_same_numbers(to_json(value)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _same_numbers(value: Json) -> Json:
    if isinstance(value, list):
        return [_same_numbers(v) for v in value]
    if isinstance(value, dict):
        return {k: _same_numbers(v) for k, v in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value
