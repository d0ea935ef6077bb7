"""Weights stored as MXFP4: blocks of 32 numbers of four bits that share a power of two.

Every such number is one of bfloat16, so that nothing is lost in reading it as one. Format: OCP Microscaling (MX) 1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
_BIAS = 127
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor((*_POSITIVE, *(-v for v in _POSITIVE)))
_PAIRS = torch.stack([_VALUES.repeat(16), _VALUES.repeat_interleave(16)], dim=1).to(torch.bfloat16)
"""What a byte stands for: its lower half comes first."""


def blocks_shape(rows: int, width: int) -> tuple[int, int, int]:
    """Shape of the bytes that hold so many rows."""
    return rows, width // BLOCK, BLOCK // 2


def widened(blocks: Tensor, scales: Tensor) -> Tensor:
    """bfloat16 [rows, width] of bytes [rows, width / 32, 16] and exponents [rows, width / 32], both uint8."""
    values = _PAIRS[blocks.int()].flatten(-2)
    return torch.ldexp(values, scales.int()[..., None] - _BIAS).flatten(-2)
