"""At which numbers of tokens another kernel computes a layer's products: what lies between them is not interpolated."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from runtime import native

_BY_BLOCKS, _BY_BLOCKS_OF_SMALL_TILES = 25, 9
"""Tokens from which on the kernel takes weights by blocks of columns, not row by row, with AVX-512 and without
(runtime/native/tile.h)."""
_BY_PANELS, _BY_PANELS_OF_PAIRS = {"float32": 48, "float16": 32, "bfloat16": 32}, 96
"""Tokens from which on AVX-512 lays weights out first; bfloat16 where it multiplies pairs (runtime/native/panel.h)."""
_BY_TILES = 9
"""Tokens from which on AMX multiplies bfloat16 (runtime/native/amx.h)."""
_FEW_QUERIES = {"float32": 32, "float16": 12, "bfloat16": 12}
_FEW_QUERIES_OF_PAIRS, _FEW_QUERIES_OF_TILES = 8, 4
"""Queries of a KV head up to which AVX-512 and AMX attend over keys as they lie (few_queries in runtime/native)."""


def beside_changes(n_tokens: Iterable[int], dtype: str, queries: int = 0) -> tuple[int, ...]:
    """Token counts, with the last before and the first after every change of kernel among them.

    Of changes beyond the kernel's tiles of few tokens, which lie so close that calibration measures every count there.
    queries: of a token, that share a KV head; with them the change in how tokens attend counts, too.
    """
    known = set(n_tokens)
    firsts = _firsts(dtype, max(known)) | ({packed_from(dtype, queries)} if queries else set())
    beside = {n for first in firsts if min(known) < first <= max(known) for n in (first - 1, first)}
    return tuple(sorted(known | beside))


def packed_from(dtype: str, queries: int) -> int:
    """Tokens from which on attention packs keys first; 0 if it never does."""
    kernel = native.kernel()
    if kernel is None or not kernel.attends_prompts:
        return 0
    few = _FEW_QUERIES[dtype]
    if dtype == "bfloat16" and kernel.multiplies_bfloat16:
        few = _FEW_QUERIES_OF_TILES if kernel.isa == "AMX_BF16" else _FEW_QUERIES_OF_PAIRS
    return max(2, few // queries + 1)


def _firsts(dtype: str, most: int) -> set[int]:
    """Token counts up to `most` from which on another kernel computes."""
    numbers: torch.dtype = getattr(torch, dtype)
    leaves = [native.leaves_to_torch(numbers, n) for n in range(most + 1)]
    by_torch = {n for n in range(1, len(leaves)) if leaves[n] != leaves[n - 1]}
    kernel = native.kernel()
    if kernel is None:
        return by_torch
    if dtype == "bfloat16" and kernel.isa == "AMX_BF16":
        return {_BY_TILES}
    if not kernel.attends_prompts:
        return by_torch | {_BY_BLOCKS_OF_SMALL_TILES}
    pairs = dtype == "bfloat16" and kernel.multiplies_bfloat16
    return by_torch | {_BY_BLOCKS, _BY_PANELS_OF_PAIRS if pairs else _BY_PANELS[dtype]}
