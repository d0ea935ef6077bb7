"""At which numbers of tokens another kernel computes a layer's products: what lies between them is not interpolated."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from runtime import native

_LAST_BY_ROWS = 24
"""Tokens up to which the kernel takes weights row by row, beyond by blocks of columns (runtime/native/tile.h)."""


def beside_changes(n_tokens: Iterable[int], dtype: str) -> tuple[int, ...]:
    """Token counts, with the last before and the first after every change of kernel among them.

    Of changes beyond the kernel's tiles of few tokens, which lie so close that calibration measures every count there.
    """
    known = set(n_tokens)
    numbers: torch.dtype = getattr(torch, dtype)
    leaves = [native.leaves_to_torch(numbers, n) for n in range(max(known) + 1)]
    firsts = {_LAST_BY_ROWS + 1, *(n for n in range(1, len(leaves)) if leaves[n] != leaves[n - 1])}
    beside = {n for first in firsts if min(known) < first <= max(known) for n in (first - 1, first)}
    return tuple(sorted(known | beside))
