"""The compiled library's calls, tensors in and out. What may be given to them, runtime.native says."""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hwmodels.errors import ExecutionError
from runtime.native.layer import ForwardWords, LayersWords, LayerWords

ISAS = ("portable", "AVX2", "AVX512", "AVX512_BF16", "AMX_BF16")
"""Instruction sets that the kernel is compiled for, the best last."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of dtypes that it knows."""
_NOT_OURS = 3
_own = threading.local()


class Piece(NamedTuple):
    """Columns of an MLP: gate rows, then up rows [2C, D]; down [D, C]; their biases [2C], if they have any."""

    gate_up: Tensor
    down: Tensor
    bias: Tensor | None = None


Expert = tuple[Tensor | None, Tensor | None, Sequence[Piece]]
"""Row numbers (all rows if None), a weight for each (ones if None), pieces of columns."""


@dataclass(frozen=True)
class Kernel:
    """A loaded library and the instruction sets that this CPU and it have."""

    library: ctypes.CDLL
    isas: tuple[str, ...]

    @property
    def isa(self) -> str:
        """The best instruction set."""
        return self.isas[-1]

    @property
    def attends_prompts(self) -> bool:
        """Whether attend is made for many tokens, too."""
        return self.isa in ("AVX512", "AVX512_BF16", "AMX_BF16")

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether bfloat16 is multiplied as it is."""
        return self.isa in ("AVX512_BF16", "AMX_BF16")

    def mlp(self, x_SD: Tensor, experts: Iterable[Expert], act: int, isa: str | None = None) -> Tensor:
        """Sum over experts of their gated MLPs for their rows of x_SD, on threads() threads.

        All tensors contiguous, on the CPU and of x's dtype but for rows (int64) and weights (float32).
        ExecutionError if memory runs out.
        """
        x_SD, y_SD = x_SD.contiguous(), torch.empty_like(x_SD, memory_format=torch.contiguous_format)
        n_experts, words = expert_words(x_SD.shape[0], experts)
        failed = self.library.scheinfer_mlp(
            x_SD.data_ptr(),
            y_SD.data_ptr(),
            *x_SD.shape,
            DTYPES[x_SD.dtype],
            act,
            ISAS.index(isa or self.isa),
            threads(),
            n_experts,
            words.buffer_info()[0],
        )
        check(failed)
        return y_SD

    def linear(self, x_SK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, isa: str | None = None) -> Tensor:
        """x @ weight.T + bias: [S, N], rounded once, on threads() threads. Tensors as for mlp."""
        return self.linears(x_SK, [(weight_NK, bias_N)], isa)[0]

    def linears(
        self, x_SK: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]], isa: str | None = None
    ) -> list[Tensor]:
        """Several projections of the same rows in one call; each as linear's."""
        x_SK, found, words = x_SK.contiguous(), [], array("q")
        for weight_NK, bias_N in layers:
            found.append(x_SK.new_empty((x_SK.shape[0], weight_NK.shape[0])))
            words.extend((weight_NK.data_ptr(), _address(bias_N), found[-1].data_ptr(), weight_NK.shape[0]))
        failed = self.library.scheinfer_linear(
            x_SK.data_ptr(),
            *x_SK.shape,
            len(layers),
            words.buffer_info()[0],
            DTYPES[x_SK.dtype],
            ISAS.index(isa or self.isa),
            threads(),
        )
        check(failed)
        return found

    def norm(self, x_SD: Tensor, weight_D: Tensor, eps: float, isa: str | None = None) -> Tensor:
        """x over its root mean square, times weight; rounded before the weight and after it. Contiguous tensors."""
        y_SD = torch.empty_like(x_SD)
        n_rows, width = x_SD.numel() // x_SD.shape[-1], x_SD.shape[-1]
        pointers = (x_SD.data_ptr(), weight_D.data_ptr(), y_SD.data_ptr())
        code, best = DTYPES[x_SD.dtype], ISAS.index(isa or self.isa)
        check(self.library.scheinfer_norm(*pointers, n_rows, width, eps, code, best, threads()))
        return y_SD

    def layer_norm(self, x_SD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, isa: str | None = None) -> Tensor:
        """x less its mean, over its standard deviation, times weight, plus bias; rounded once. Contiguous tensors."""
        y_SD = torch.empty_like(x_SD)
        n_rows, width = x_SD.numel() // x_SD.shape[-1], x_SD.shape[-1]
        pointers = (tensor.data_ptr() for tensor in (x_SD, weight_D, bias_D, y_SD))
        code, best = DTYPES[x_SD.dtype], ISAS.index(isa or self.isa)
        check(self.library.scheinfer_layer_norm(*pointers, n_rows, width, eps, code, best, threads()))
        return y_SD

    def add(self, x_SD: Tensor, y_SD: Tensor, isa: str | None = None) -> Tensor:
        """x + y, rounded once. Contiguous tensors of one shape."""
        sum_SD = torch.empty_like(x_SD)
        n_rows, width = x_SD.numel() // x_SD.shape[-1], x_SD.shape[-1]
        pointers = (x_SD.data_ptr(), y_SD.data_ptr(), sum_SD.data_ptr())
        code, best = DTYPES[x_SD.dtype], ISAS.index(isa or self.isa)
        check(self.library.scheinfer_add(*pointers, n_rows, width, code, best, threads()))
        return sum_SD

    def turn(self, x_SHD: Tensor, cos: Tensor, sin: Tensor, isa: str | None = None) -> None:
        """Rotary embedding in place, by contiguous tables [S, D], or [1, D] for all rows; pairs are half of D apart."""
        n_rows, n_heads, width = x_SHD.shape
        stride = width if cos.shape[0] > 1 else 0
        pointers = (x_SHD.data_ptr(), cos.data_ptr(), sin.data_ptr())
        code, best = DTYPES[x_SHD.dtype], ISAS.index(isa or self.isa)
        check(self.library.scheinfer_turn(*pointers, n_rows, n_heads, width, stride, code, best, threads()))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        isa: str | None = None,
        *,
        sinks: Tensor | None = None,
        window: int = 0,
    ) -> Tensor:
        """Causal attention of the last S of T tokens, sums in float32: [B, S, H, Dv].

        query [B, S, H, D] contiguous; key [B, K, T, D] and value [B, K, T, Dv] with contiguous rows; H / K query heads
        in a row share a KV head. A row is the same to the last bit whatever other rows are computed, but that many
        queries of a KV head are summed in another order: more than 4 to 32, by dtype and instruction set. sinks [H],
        contiguous: a score more, of a value of zero. window: how many keys a token sees at most, 0 for all; of several
        tokens only where attends_prompts, and in the order of many.
        """
        batch, n_new, n_heads, width = query.shape
        _, n_kv, n_keys, _ = key.shape
        out = query.new_empty((batch, n_new, n_heads, value.shape[-1]))
        sizes = (batch, n_new, n_heads, n_kv, n_keys, width, value.shape[-1])
        shape = array("q", (*sizes, *key.stride()[:3], *value.stride()[:3], window))
        pointers = (tensor.data_ptr() for tensor in (query, key, value, out))
        code, best = DTYPES[query.dtype], ISAS.index(isa or self.isa)
        check(
            self.library.scheinfer_attend(
                *pointers, shape.buffer_info()[0], scale, _address(sinks), code, best, threads()
            )
        )
        return out

    def latent(self, words: LayerWords, out: Tensor) -> None:
        """Latent attention of words.x into out, before the output projection; see latent.cpp."""
        check(self.library.scheinfer_latent(ctypes.byref(words), out.data_ptr(), threads()))

    def route(self, words: LayerWords, x_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of each row and their weights, float32: [S, top_k] each, by the router of a layer's words."""
        chosen = torch.empty((x_SD.shape[0], words.top_k), dtype=torch.int64, device="cpu")
        weights = torch.empty(chosen.shape, dtype=torch.float32, device="cpu")
        pointers = (chosen.data_ptr(), weights.data_ptr(), threads())
        check(self.library.scheinfer_route(ctypes.byref(words), x_SD.data_ptr(), x_SD.shape[0], *pointers))
        return chosen, weights

    def layer(self, words: LayerWords) -> None:
        """A decoder layer for new tokens of each sequence, on threads() threads; see runtime.native.layer."""
        check(self.library.scheinfer_layer(ctypes.byref(words), threads()))

    def layers(self, words: LayersWords) -> None:
        """All layers for one new token of each, and the norm after them; words.n_done: what an ExecutionError is of."""
        check(self.library.scheinfer_layers(ctypes.byref(words), threads()))

    def forward(self, words: ForwardWords, n_threads: int) -> bool:
        """A whole step; False, and nothing done, if it is not this call's. words.n_parts tells what an error is of."""
        check((failed := int(self.library.scheinfer_forward(ctypes.byref(words), n_threads))) % _NOT_OURS)
        return failed == 0

    def read(self, flat: Tensor) -> None:
        """Read a tensor's memory and do nothing else, on threads() threads: what bounds mlp at one token."""
        self.library.scheinfer_read(flat.data_ptr(), flat.nbytes, threads())

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], bytes_per_s: float, chunk_bytes: int) -> None:
        """Copy pairs (to, from) of contiguous tensors chunk by chunk, never ahead of the rate. See link.cpp."""
        words = array("q")
        for to, of in pairs:
            words.extend((to.data_ptr(), of.data_ptr(), of.nbytes))
        self.library.scheinfer_copy(words.buffer_info()[0], len(words) // 3, bytes_per_s, chunk_bytes)

    def stay_awake(self, awake: bool) -> None:
        """Whether the calling thread's workers wait awake for its next call: for cores that nobody else works on."""
        self.library.scheinfer_stay_awake(awake)

    def end_workers(self) -> None:
        """End the threads that compute for the calling thread; its next call starts new ones."""
        self.library.scheinfer_end_workers()


def check(failed: int) -> None:
    """ExecutionError if a call of the library says that it failed."""
    if failed:
        raise ExecutionError(f"native kernel: {('no memory', 'no such instruction set')[failed - 1]}")


def expert_words(n_rows: int, experts: Iterable[Expert]) -> tuple[int, array[int]]:
    """Number of experts, and each with its pieces as mlp.cpp reads them; n_rows of x where an expert names none."""
    words, n_experts = array("q"), 0
    for rows, weights, pieces in experts:
        words.extend((_address(rows), _address(weights), n_rows if rows is None else rows.shape[0], len(pieces)))
        for piece in pieces:
            words.extend(piece_words(piece))
        n_experts += 1
    return n_experts, words


def piece_words(piece: Piece) -> tuple[int, int, int, int, int]:
    """Gate, up, down, columns and bias of a piece as mlp.cpp reads them."""
    gate_up, down, bias = piece
    gate = gate_up.data_ptr()
    return gate, gate + gate_up.nbytes // 2, down.data_ptr(), down.shape[1], _address(bias)


def codes(kernel: Kernel, dtype: torch.dtype, act: int) -> tuple[int, int, int]:
    """Dtype, activation and best instruction set as the library numbers them."""
    return DTYPES[dtype], act, ISAS.index(kernel.isa)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def threads() -> int:
    """Threads that compute for the calling thread: what set_threads said, else torch's number."""
    return getattr(_own, "n_threads", 0) or torch.get_num_threads()


def set_own_threads(n_threads: int) -> None:
    """What threads says from now on; 0: torch's number."""
    _own.n_threads = n_threads
