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


def beside_changes(n_tokens: Iterable[int], dtype: str) -> tuple[int, ...]:
    """Token counts, with the last before and the first after every change of kernel among them.

    Of changes beyond the kernel's tiles of few tokens, which lie so close that calibration measures every count there.
    """
    known = set(n_tokens)
    beside = {n for first in _firsts(dtype, max(known)) if min(known) < first <= max(known) for n in (first - 1, first)}
    return tuple(sorted(known | beside))


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
