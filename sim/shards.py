"""Rows of a sweep on disk: shards named by their content, and the table they become in the end.

    shards/<hash>.parquet   rows in the order they were finished; the name is a hash of the file
    rows.parquet, rows.csv  all rows in the order of the grid
    manifest.json           what was asked, and by which program and machine it was answered

Every file is written beside its place and renamed, so that a kill leaves whole files only; a shard whose
content is not what its name says counts as missing.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hwmodels.errors import FormatError
from hwmodels.schema import write_bytes, write_json, write_text
from sim.cost import EVIDENCE
from sim.rows import Row

SCHEMA = "scheinfer.sweep"
VERSION = 1

_TYPES = {
    pa.string(): "point_id model hardware policy plan_id profile_id device dtype refused failed",
    pa.int64(): "vram_budget_bytes n_prompt n_gen n_depth batch seed vram_bytes host_bytes",
    pa.struct([(name, pa.int64()) for name in EVIDENCE]): "evidence",
}
_ORDER = (
    "model hardware policy plan_id profile_id device dtype vram_budget_bytes n_prompt n_gen n_depth batch seed skew "
    "prefill_tok_s decode_tok_s ttft_s tpot_s bound_prefill_tok_s bound_decode_tok_s bound_fraction "
    "vram_bytes host_bytes h2d_bytes cpu_busy gpu_busy h2d_busy cache_hit_rate evidence refused failed point_id"
)
COLUMNS = pa.schema(
    [(name, next((t for t, names in _TYPES.items() if name in names.split()), pa.float64())) for name in _ORDER.split()]
)
"""What a row of a sweep holds, null where a point has no plan."""


@dataclass(frozen=True)
class Kept:
    """Rows that a folder holds, by point, and how many of its shards were damaged."""

    rows: dict[str, Row]
    n_damaged: int


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and keep other sweeps out of it; FormatError if one is in there, or it cannot be made."""
    shards = folder / "shards"
    try:
        shards.mkdir(parents=True, exist_ok=True)
        lock = os.open(shards, os.O_RDONLY)
    except OSError as error:
        raise FormatError(f"cannot write into {str(folder)!r}: {error.strerror}") from error
    try:
        _lock(lock, folder)
        yield
    finally:
        os.close(lock)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however this process ends
    except OSError as error:
        raise FormatError(
            f"another sweep writes into {str(folder)!r} ({error.strerror}); wait for it or name another folder"
        ) from error


def read_shards(folder: Path) -> Kept:
    """All rows of all whole shards; removes damaged shards and what a kill left half written."""
    rows: dict[str, Row] = {}
    n_damaged = 0
    for leftover in (folder / "shards").glob("*.part"):
        leftover.unlink()
    for path in sorted((folder / "shards").glob("*.parquet")):
        content = path.read_bytes()
        if path.stem != _name(content):
            path.unlink()
            n_damaged += 1
            continue
        rows |= {str(row["point_id"]): row for row in pq.read_table(io.BytesIO(content)).to_pylist()}
    return Kept(rows, n_damaged)


def write_shard(folder: Path, rows: Sequence[Row]) -> Path | None:
    """Keep finished rows, if there are any; on return they are on disk."""
    if not rows:
        return None
    content = _parquet(rows)
    path = folder / "shards" / f"{_name(content)}.parquet"
    write_bytes(path, content)
    return path


def join_shards(folder: Path) -> None:
    """One shard in place of many. A kill in between leaves rows twice in shards, never in a table."""
    paths = sorted((folder / "shards").glob("*.parquet"))
    if len(paths) > 1:
        joined = write_shard(folder, list(read_shards(folder).rows.values()))
        for path in paths:
            if path != joined:
                path.unlink(missing_ok=True)


def write_table(folder: Path, rows: Sequence[Row], manifest: Mapping[str, object]) -> None:
    """rows.parquet, rows.csv and, last, manifest.json with a hash of the rows."""
    text = csv_text(rows)
    write_bytes(folder / "rows.parquet", _parquet(rows))
    write_text(folder / "rows.csv", text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_json(folder / "manifest.json", {"schema": SCHEMA, "version": VERSION, **manifest, "rows_csv_sha256": digest})


def uniform(rows: Sequence[Row]) -> list[Row]:
    """Rows with all columns and their types, as they read back from a shard."""
    uniform_rows: list[Row] = pa.Table.from_pylist(rows, COLUMNS).to_pylist()
    return uniform_rows


def csv_text(rows: Sequence[Row]) -> str:
    """Rows as CSV with all columns; numbers are written so that they read back the same."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS.names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, Mapping) else v for k, v in row.items()})
    return text.getvalue()


def _parquet(rows: Sequence[Row]) -> bytes:
    content = io.BytesIO()
    # One row is the usual shard: statistics and dictionaries would be most of it.
    pq.write_table(pa.Table.from_pylist(rows, COLUMNS), content, use_dictionary=False, write_statistics=False)
    return content.getvalue()


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
