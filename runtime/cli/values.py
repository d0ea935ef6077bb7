"""What people type after a flag, read once: sizes, counts, lists, ranges, names. ValueError says what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from hwmodels.errors import FormatError
from hwmodels.units import parse_size

_RANGE = re.compile(r"(\d+)-(\d+)(?:([+*])(\d+))?")
_SIZE_RANGE = re.compile(r"([^-+]+)-([^-+]+)\+([^-+]+)")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_MAX_LIST = 10_000


def size(text: str) -> int:
    """Bytes of a size above zero."""
    n_bytes = parse_size(text)
    if n_bytes == 0:
        raise FormatError(f"{text!r} is zero bytes; expected a size above zero, such as 8GiB")
    return n_bytes


def bandwidth(text: str) -> int:
    """Bytes per second, written as a size per second.

    >>> bandwidth("80GB/s")
    80000000000
    """
    amount, slash, unit = text.partition("/")
    if (slash, unit.strip()) != ("/", "s"):
        raise FormatError(f"{text!r} is not a bandwidth; write it like 80GB/s")
    return size(amount)


def link(text: str) -> str:
    """The name of a link: ``4x16`` is short for ``pcie4x16``."""
    return f"pcie{text}" if text[:1].isdigit() else text


def changes(text: str) -> dict[str, str]:
    """Figures to change: a comma list of KEY=VALUE.

    >>> changes("dram_read_GBps=160,vram_GiB=16")
    {'dram_read_GBps': '160', 'vram_GiB': '16'}
    """
    found: dict[str, str] = {}
    for item in names(text):
        name, sign, value = item.partition("=")
        if not (name.strip() and sign and value.strip()):
            raise FormatError(f"{item!r} is not KEY=VALUE, such as dram_read_GBps=160")
        found[name.strip()] = value.strip()
    return found


def sizes(text: str) -> tuple[int, ...]:
    """Sizes above zero: a comma list with ranges `first-last+step`.

    >>> sizes("1GiB,4KiB-12KiB+4KiB")
    (1073741824, 4096, 8192, 12288)
    """
    found: list[int] = []
    for item in names(text):
        match = _SIZE_RANGE.fullmatch(item)
        if match is None:
            found.append(size(item))
        else:
            first, last, step = (size(part) for part in match.groups())
            if first > last or (last - first) // step >= _MAX_LIST:
                raise FormatError(f"the range {item!r} does not rise, or has more than {_MAX_LIST} sizes")
            found += range(first, last + 1, step)
    return tuple(dict.fromkeys(found))


def count(text: str) -> int:
    """A whole number above zero."""
    return _whole(text, 1)


def whole(text: str) -> int:
    """A whole number, zero or more."""
    return _whole(text, 0)


def port(text: str) -> int:
    """A TCP port; 0 is any that is free."""
    found = _whole(text, 0)
    if found > 65535:
        raise FormatError(f"{text!r} is no port; expected 0 to 65535")
    return found


def _whole(text: str, least: int) -> int:
    if not re.fullmatch(r"[+-]?\d+", text.strip()) or int(text) < least:
        raise FormatError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def number(text: str) -> float:
    """A finite number, zero or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise FormatError(f"{text!r} is not a number of at least 0")
    return value


def numbers(text: str) -> float | tuple[float, ...]:
    """A number as `number` reads it, or several as a comma list."""
    found = tuple(number(item) for item in names(text))
    return found[0] if len(found) == 1 else found


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers above zero: a comma list with ranges `first-last+step` and `first-last*factor`.

    >>> counts("32,512-1536+512")
    (32, 512, 1024, 1536)
    """
    return _numbers(text, count)


def wholes(text: str) -> tuple[int, ...]:
    """As `counts`, zero allowed."""
    return _numbers(text, whole)


def _numbers(text: str, single: Callable[[str], int]) -> tuple[int, ...]:
    found: list[int] = []
    for item in names(text):
        match = _RANGE.fullmatch(item)
        found += [single(str(value)) for value in _range(match, item)] if match else [single(item)]
    return tuple(dict.fromkeys(found))


def _range(match: re.Match[str], text: str) -> list[int]:
    value, last, sign, step = int(match[1]), int(match[2]), match[3] or "+", int(match[4] or 1)
    if value > last or step < 1 or (sign == "*" and (step < 2 or value < 1)):
        raise FormatError(f"the range {text!r} does not rise; write it as first-last+step or first-last*factor")
    values = []
    while value <= last:
        values.append(value)
        value = value + step if sign == "+" else value * step
        if len(values) > _MAX_LIST:
            raise FormatError(f"the range {text!r} has more than {_MAX_LIST} values; take a larger step")
    return values


def names(text: str) -> tuple[str, ...]:
    """A comma list of words, none of them empty."""
    items = tuple(item.strip() for item in text.split(","))
    if not all(items):
        raise FormatError(f"{text!r} has an empty entry; write it as a,b,c")
    return items


def path(text: str) -> Path:
    """A file or folder name that is not empty."""
    if not text.strip():
        raise FormatError("the file name is empty")
    return Path(text).expanduser()


def paths(text: str) -> tuple[Path, ...]:
    """A comma list of file names."""
    return tuple(path(item) for item in names(text))


def one_of(*choices: str) -> Callable[[str], str]:
    """Reader of one of some words."""

    def read(text: str) -> str:
        if text not in choices:
            raise FormatError(f"{text!r} is not known; choose {', '.join(choices)}")
        return text

    return read


def dtype(text: str) -> str:
    """A weight type by its full or short name."""
    return one_of("auto", "bfloat16", "float16", "float32")(_DTYPES.get(text, text))


def device(text: str) -> str:
    """The name of a device; whether it is here is found out when it is used."""
    if text not in ("auto", "emulated", "cuda") and not re.fullmatch(r"cuda:\d+", text):
        raise FormatError(f"{text!r} is not known; choose auto, cuda:0 or emulated")
    return text
