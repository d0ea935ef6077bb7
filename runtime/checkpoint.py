"""Our own reader of safetensors checkpoints: mapped files, zero-copy tensors, errors with file and size.

A safetensors file is an 8-byte little-endian header length, a JSON header
``{key: {dtype, shape, data_offsets}}``, and the tensors' bytes without gaps. A checkpoint is one such
file, or several that ``model.safetensors.index.json`` assigns keys to.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import torch

from hwmodels.errors import CheckpointError, FormatError
from hwmodels.schema import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference reader

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: bytes [start, stop) of a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """The tensors of a checkpoint folder, read when asked for. Use `Checkpoint.open`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
        self.folder = folder
        self.config = config
        self._entries = dict(entries)
        self._maps: dict[Path, mmap.mmap] | None = {}

    @staticmethod
    def open(folder: str | Path) -> Checkpoint:
        """Read config.json and every header; tensors stay on disk.

        Raises CheckpointError if a file is missing, truncated, malformed or contradicts the index.
        """
        folder = Path(folder)
        return Checkpoint(folder, read_config(folder), _read_entries(folder))

    def keys(self) -> tuple[str, ...]:
        """All tensor names."""
        return tuple(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, from its header."""
        return self._entry(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of a tensor, from its header."""
        return self._entry(key).dtype

    def n_bytes_of(self, key: str) -> int:
        """Stored bytes of a tensor."""
        entry = self._entry(key)
        return entry.stop - entry.start

    @property
    def n_bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(e.stop - e.start for e in self._entries.values())

    def tensor(self, key: str) -> torch.Tensor:
        """A view of the mapped file: no copy, read from disk when touched.

        The map is private: writing to the tensor changes memory of this process, never the file.
        """
        entry = self._entry(key)
        if entry.stop == entry.start:
            return torch.empty(entry.shape, dtype=entry.dtype)
        mapped = self._map(entry.file)
        count = math.prod(entry.shape)
        if entry.start % entry.dtype.itemsize:  # legal in the format, but no kernel may be given such a pointer
            copied = bytearray(mapped[entry.start : entry.stop])
            return torch.frombuffer(copied, dtype=entry.dtype, count=count).view(entry.shape)
        return torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=entry.start).view(entry.shape)

    def tensor_of(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """`tensor(key)`, after checking the shape that config.json demands; CheckpointError if it is another."""
        found = self.shape(key)
        if found != shape:
            raise CheckpointError(
                f"{self.folder}: {key!r} has shape {found}, config.json makes it {shape}; "
                f"config.json and weights are not of one model"
            )
        return self.tensor(key)

    def release(self) -> None:
        """Give back the memory that tensors read so far take; touched again, they come from the file as it is."""
        for mapped in (self._maps or {}).values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Read no more. Files stay mapped until the last tensor that views them is gone."""
        self._maps = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, key: str) -> Entry:
        try:
            return self._entries[key]
        except KeyError:
            raise CheckpointError(f"{self.folder}: no tensor {key!r}; {_nearest(key, self._entries)}") from None

    def _map(self, file: Path) -> mmap.mmap:
        if self._maps is None:
            raise CheckpointError(f"{self.folder}: the checkpoint is closed; open it again to read tensors")
        mapped = self._maps.get(file)
        if mapped is None:
            with file.open("rb") as handle:
                # A private map, because torch warns about read-only memory and would let it be written.
                mapped = self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return mapped


def _nearest(key: str, known: Iterable[str]) -> str:
    tail = key.rsplit(".", 2)[-2:]
    alike = [k for k in known if k.rsplit(".", 2)[-2:] == tail]
    return f"there is {alike[0]!r}" if alike else "the checkpoint has nothing of that kind"


# -- the folder ---------------------------------------------------------------------------------------


def read_config(folder: Path) -> Mapping[str, Any]:
    """config.json of a checkpoint folder; CheckpointError says what is there instead."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise CheckpointError(f"{folder}: found {found}; expected a Hugging Face checkpoint folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; found {_listing(folder)}; expected a Hugging Face checkpoint")
    return _read_object(folder / "config.json", "model config")


def _read_entries(folder: Path) -> dict[str, Entry]:
    if (folder / SINGLE_NAME).is_file():
        return read_header(folder / SINGLE_NAME)
    if not (folder / INDEX_NAME).is_file():
        raise CheckpointError(
            f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME}; found {_listing(folder)}; "
            f"save the model again with save_pretrained, which writes safetensors"
        )
    return _read_shards(folder)


def _read_shards(folder: Path) -> dict[str, Entry]:
    index = folder / INDEX_NAME
    weight_map = _read_object(index, "safetensors index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map; expected an object of tensor names to file names")
    entries: dict[str, Entry] = {}
    for name in dict.fromkeys(weight_map.values()):
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: names the file {name!r}; expected a plain file name beside the index")
        if not (folder / name).is_file():
            raise CheckpointError(f"{index}: names {name}, which is not in the folder; the download is incomplete")
        for key, entry in read_header(folder / name).items():
            if key in entries:
                raise CheckpointError(f"{folder}: tensor {key!r} is in {entries[key].file.name} and in {name}")
            entries[key] = entry
    for key, name in weight_map.items():
        if key not in entries or entries[key].file.name != name:
            where = f"it is in {entries[key].file.name}" if key in entries else "no file holds it"
            raise CheckpointError(f"{index}: says {key!r} is in {name}, but {where}; download the checkpoint again")
    return entries


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return shown or "an empty folder"


def _read_object(file: Path, what: str) -> Mapping[str, Any]:
    try:
        value = read_json(file, what)
    except FormatError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected an object, found {type(value).__name__}")
    return value


# -- one file -----------------------------------------------------------------------------------------


def read_header(file: Path) -> dict[str, Entry]:
    """Entries of one safetensors file, checked against its size; CheckpointError says what is wrong."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        n_header = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= n_header <= MAX_HEADER_BYTES:
            raise CheckpointError(f"{file}: not a safetensors file: it is {size} bytes and gives its header {n_header}")
        text = handle.read(n_header)
    if len(text) < n_header:
        raise CheckpointError(f"{file}: truncated: found {size} bytes, the header alone takes {8 + n_header}")
    header = _parse_header(file, text)
    entries = {k: _entry(file, k, v, 8 + n_header) for k, v in header.items() if k != "__metadata__"}
    _check_layout(file, entries, 8 + n_header, size)
    return entries


def _parse_header(file: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) < len(pairs):
            twice = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
            raise CheckpointError(f"{file}: the header names {twice!r} twice")
        return built

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not JSON ({error}); download the file again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is a {type(header).__name__}, expected an object")
    return header


def _entry(file: Path, key: str, value: object, base: int) -> Entry:
    fields = value if isinstance(value, dict) else {}
    name, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if name not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {key!r} has dtype {name!r}; supported: {', '.join(DTYPES)}; "
            f"a quantised checkpoint must be replaced by its original"
        )
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{file}: tensor {key!r} has shape {shape} and data_offsets {offsets}; expected numbers")
    entry = Entry(file, DTYPES[name], tuple(shape), base + offsets[0], base + offsets[1])
    expected = math.prod(entry.shape) * entry.dtype.itemsize
    if entry.stop - entry.start != expected:
        raise CheckpointError(
            f"{file}: tensor {key!r} of shape {shape} and dtype {name} takes {expected} bytes, "
            f"its data_offsets {offsets} give {entry.stop - entry.start}"
        )
    return entry


def _is_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)


def _check_layout(file: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    end = base
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else "leaves a gap before it"
            raise CheckpointError(f"{file}: tensor {key!r} {what}: it starts at byte {entry.start}, expected {end}")
        end = entry.stop
    if size != end:
        what = "truncated" if size < end else "too long"
        raise CheckpointError(f"{file}: {what}: found {size} bytes, its header describes {end}; download it again")
