"""Sizes as people write them, converted once at the door; SI everywhere inside."""

from __future__ import annotations

import math
import re

from hwmodels.errors import FormatError

_FACTORS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "T": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str | int | float, what: str = "size") -> int:
    """Bytes of a size such as ``8GiB``, ``8000MiB``, ``500MB`` or a plain number of bytes.

    Raises FormatError for anything else, for negative and for non-finite values.

    >>> parse_size("1.5GiB")
    1610612736
    """
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        value, factor = float(text), 1
    else:
        match = _SIZE.fullmatch(str(text))
        if match is None or match[2].upper() not in _FACTORS:
            raise FormatError(f"{what}: cannot read {text!r} as a size; write it like 8GiB, 8000MiB or 500MB")
        value, factor = float(match[1]), _FACTORS[match[2].upper()]
    if not math.isfinite(value) or value < 0:
        raise FormatError(f"{what}: {text!r} must be a finite number of bytes, zero or more")
    return int(value * factor)


def format_bytes(n_bytes: float) -> str:
    """A size for people: binary units, three digits.

    >>> format_bytes(1610612736)
    '1.50 GiB'
    """
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            digits = ".0f" if unit == "B" or abs(value) >= 99.95 else ".2f"
            return f"{value:{digits}} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def format_number(value: float) -> str:
    """A number for people: three digits, all before the point where there are more.

    >>> format_number(0.12345), format_number(12.345), format_number(12345.6)
    ('0.123', '12.3', '12346')
    """
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def format_seconds(seconds: float) -> str:
    """A duration for people.

    >>> format_seconds(0.0123)
    '12.3 ms'
    """
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if abs(seconds) < limit:
            return f"{format_number(seconds * scale)} {unit}"
    return f"{format_number(seconds)} s"
