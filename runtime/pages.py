"""Pages of 2 MiB for weights, where the system gives them to those who ask.

A weight that is read once a token comes through the translation of addresses page by page: with pages of 4 KiB reading
took 0 to 5 % longer on a virtual machine (experiments/LOG.md).
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

from torch import Tensor

PAGE_BYTES = 2 << 20
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone


def large_pages(values: Tensor) -> Tensor:
    """The tensor, host memory that nobody wrote to yet, whose whole large pages become such when they are written to.

    No byte more is taken: only pages that lie in the tensor altogether are asked for. Where the system has none to give
    it stays as it is.
    """
    first = -(-values.data_ptr() // PAGE_BYTES) * PAGE_BYTES
    n_bytes = (values.data_ptr() + values.nbytes) // PAGE_BYTES * PAGE_BYTES - first
    if n_bytes > 0 and _ADVICE is not None and (advise := _madvise()) is not None:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(n_bytes), ctypes.c_int(_ADVICE))
    return values


@cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), "madvise", None)
