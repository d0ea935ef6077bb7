"""Work: what an operation asks of a machine, in FLOPs and bytes. No time in here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

Op = Literal[
    "ffn",
    "attn",
    "attn_apart",
    "head",
    "head_apart",
    "head_prompt",
    "embed",
    "embed_apart",
    "join",
    "sample",
    "activations",
    "pinned",
    "pageable",
    "stream_read",
    "stream_copy",
]
"""Names of the curves a profile may hold.

ffn          a gated or plain MLP part: columns of one MLP or expert
attn         everything in a layer that is not its MLP (norms, attention, router, shared experts)
attn_apart   the same of one token on the CPU, where other layers of the plan are the device's: layers come one by one
head         final norm and output projection
head_apart   the same of one token on the CPU, where layers of the plan are the device's
head_prompt  the same of a prompt: all its tokens are normed, the last one's logits are made
embed        token embedding and the mask and position set-up of a step
embed_apart  the same of one token on the CPU, where layers of the plan are the device's
join         the sum of a layer's partial outputs
sample       from logits to the next step's input: the host's loop
activations  a copy of hidden states through page-locked buffers, right after what made them, beside other work
pinned       a copy of weights between device memory and page-locked host memory
pageable     a copy of weights between device memory and ordinary host memory
stream_read  reading a large array of a resource's memory: a yardstick, no task of a plan
stream_copy  copying one, bytes read and written both counted, as the STREAM benchmark does
"""

AXES: dict[Op, tuple[str, str]] = {
    "ffn": ("n_tokens", "weight_bytes"),
    "head": ("n_tokens", "weight_bytes"),
    "attn": ("n_tokens", "io_bytes"),
    "attn_apart": ("n_tokens", "io_bytes"),
    "head_apart": ("n_tokens", "weight_bytes"),
    "head_prompt": ("n_tokens", "weight_bytes"),
    "embed_apart": ("n_tokens", "io_bytes"),
    "embed": ("n_tokens", "io_bytes"),
    "join": ("n_tokens", "io_bytes"),
    "sample": ("n_tokens", "io_bytes"),
    "activations": ("n_tokens", "io_bytes"),
    "pinned": ("n_tokens", "io_bytes"),
    "pageable": ("n_tokens", "io_bytes"),
    "stream_read": ("n_tokens", "io_bytes"),
    "stream_copy": ("n_tokens", "io_bytes"),
}
"""Which two quantities of a Work each curve is a function of."""

APART: dict[Op, Op] = {"attn": "attn_apart", "head": "head_apart", "embed": "embed_apart"}
"""What one token's work on the CPU is where other layers of the plan are the device's."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


_once = lru_cache(maxsize=4096)  # steps repeat themselves, and asking is faster than making


@dataclass(frozen=True, slots=True)
class Work:
    """One operation's demand.

    n_tokens      rows of the activation matrix
    flops         floating point operations, a multiply-add counted as two
    weight_bytes  bytes of weights read once per call
    io_bytes      other bytes read or written: KV cache, activations, the payload of a copy
    """

    op: Op
    dtype: str
    n_tokens: int
    flops: float
    weight_bytes: float
    io_bytes: float = 0.0

    @property
    def bytes(self) -> float:
        """All bytes moved."""
        return self.weight_bytes + self.io_bytes

    @property
    def intensity(self) -> float:
        """FLOPs per byte: below the machine's ridge point bandwidth decides."""
        return self.flops / self.bytes if self.bytes else 0.0


@_once
def ffn(n_tokens: int, d_model: int, columns: int, dtype: str, n_matrices: int = 3) -> Work:
    """Work of `columns` of an MLP's intermediate dimension for `n_tokens` rows.

    With three matrices y_TD = (act(x_TD @ gate_DF) * (x_TD @ up_DF)) @ down_FD, T = n_tokens,
    D = d_model, F = columns; two matrices are an ungated MLP. The weights are read once per call, so
    at T = 1 these are GEMVs and bandwidth decides.

    >>> one = ffn(1, d_model=4096, columns=14336, dtype="bfloat16")  # a Mixtral-8x7B expert
    >>> f"{one.weight_bytes / 1e6:.1f} MB, {one.intensity:.2f} FLOP/byte"
    '352.3 MB, 1.00 FLOP/byte'
    """
    size = DTYPE_BYTES[dtype]
    weights = n_matrices * d_model * columns
    return Work(
        op="ffn",
        dtype=dtype,
        n_tokens=n_tokens,
        flops=2.0 * n_tokens * weights,
        weight_bytes=float(weights * size),
        io_bytes=float(2 * n_tokens * d_model * size),
    )


@_once
def copy(n_bytes: float, dtype: str, pinned: bool = True) -> Work:
    """Work of moving `n_bytes` between host and device memory."""
    return Work("pinned" if pinned else "pageable", dtype, 1, 0.0, 0.0, float(n_bytes))


@_once
def activations(n_bytes: float, dtype: str) -> Work:
    """Work of moving a step's activations, `n_bytes`, through page-locked buffers: right after what made them."""
    return Work("activations", dtype, 1, 0.0, 0.0, float(n_bytes))


def apart(work: Work) -> Work:
    """The same work of a step whose other parts are in another place."""
    return replace(work, op=APART[work.op])
