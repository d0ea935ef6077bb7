"""The native CPU kernel: gated MLPs and experts at the speed of memory, and whether it is there.

Compiled when the package is installed (hatch_build.py). SCHEINFER_KERNEL says what computes on the CPU:
`auto` (the default) takes the native kernel for what it can compute and torch for the rest, `native` insists
that it is there, `torch` never uses it. Sums are float32; between an MLP's products the values are float32, or
bfloat16 on CPUs that multiply it, where torch rounds to the weights' dtype three times. A result depends neither on
threads nor on other rows, but that many rows are summed in another order (panel.h: 32, 48 or 96 and more; amx.h: 9).
"""

from __future__ import annotations

import ctypes
import os
import threading
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from hwmodels.errors import ExecutionError, KernelError
from hwmodels.machine import Finding, read_machine
from runtime.native.layer import ForwardWords, LayersWords, LayerWords, declare

LIBRARY = Path(__file__).with_name("libscheinfer.so")
ISAS = ("portable", "AVX2", "AVX512", "AVX512_BF16", "AMX_BF16")
"""Instruction sets that the kernel is compiled for, the best last."""
CHOICES = ("auto", "native", "torch")
_INTERFACE, _NOT_OURS = 16, 3
MOST_WIDTH = 256
"""Of a head in a prompt's attention."""
_AMX_ROWS = 32  # as many as AMX computes in the time of one
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SILU, _GELU_TANH, _GELU_ERF = range(3)
_ACTIVATIONS = {
    "SiLU": _SILU,
    "SiLUActivation": _SILU,
    "GELUTanh": _GELU_TANH,
    "PytorchGELUTanh": _GELU_TANH,
    "NewGELUActivation": _GELU_TANH,
    "GELUActivation": _GELU_ERF,
}
_own = threading.local()
Piece = tuple[Tensor, Tensor]
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
            _DTYPES[x_SD.dtype],
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
            _DTYPES[x_SK.dtype],
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
        code, best = _DTYPES[x_SD.dtype], ISAS.index(isa or self.isa)
        check(self.library.scheinfer_norm(*pointers, n_rows, width, eps, code, best, threads()))
        return y_SD

    def layer_norm(self, x_SD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, isa: str | None = None) -> Tensor:
        """x less its mean, over its standard deviation, times weight, plus bias; rounded once. Contiguous tensors."""
        y_SD = torch.empty_like(x_SD)
        n_rows, width = x_SD.numel() // x_SD.shape[-1], x_SD.shape[-1]
        pointers = (tensor.data_ptr() for tensor in (x_SD, weight_D, bias_D, y_SD))
        code, best = _DTYPES[x_SD.dtype], ISAS.index(isa or self.isa)
        check(self.library.scheinfer_layer_norm(*pointers, n_rows, width, eps, code, best, threads()))
        return y_SD

    def add(self, x_SD: Tensor, y_SD: Tensor, isa: str | None = None) -> Tensor:
        """x + y, rounded once. Contiguous tensors of one shape."""
        sum_SD = torch.empty_like(x_SD)
        n_rows, width = x_SD.numel() // x_SD.shape[-1], x_SD.shape[-1]
        pointers = (x_SD.data_ptr(), y_SD.data_ptr(), sum_SD.data_ptr())
        code, best = _DTYPES[x_SD.dtype], ISAS.index(isa or self.isa)
        check(self.library.scheinfer_add(*pointers, n_rows, width, code, best, threads()))
        return sum_SD

    def turn(self, x_SHD: Tensor, cos: Tensor, sin: Tensor, isa: str | None = None) -> None:
        """Rotary embedding in place, by contiguous tables [S, D], or [1, D] for all rows; pairs are half of D apart."""
        n_rows, n_heads, width = x_SHD.shape
        stride = width if cos.shape[0] > 1 else 0
        pointers = (x_SHD.data_ptr(), cos.data_ptr(), sin.data_ptr())
        code, best = _DTYPES[x_SHD.dtype], ISAS.index(isa or self.isa)
        check(self.library.scheinfer_turn(*pointers, n_rows, n_heads, width, stride, code, best, threads()))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, isa: str | None = None) -> Tensor:
        """Causal attention of the last S of T tokens, sums in float32: [B, S, H, Dv].

        query [B, S, H, D] contiguous; key [B, K, T, D] and value [B, K, T, Dv] with contiguous rows; H / K query heads
        in a row share a KV head. A row is the same to the last bit whatever other rows are computed, but that many
        queries of a KV head are summed in another order: more than 4 to 32, by dtype and instruction set.
        """
        batch, n_new, n_heads, width = query.shape
        _, n_kv, n_keys, _ = key.shape
        out = query.new_empty((batch, n_new, n_heads, value.shape[-1]))
        sizes = (batch, n_new, n_heads, n_kv, n_keys, width, value.shape[-1])
        shape = array("q", (*sizes, *key.stride()[:3], *value.stride()[:3]))
        pointers = (tensor.data_ptr() for tensor in (query, key, value, out))
        code, best = _DTYPES[query.dtype], ISAS.index(isa or self.isa)
        check(self.library.scheinfer_attend(*pointers, shape.buffer_info()[0], scale, code, best, threads()))
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
        for gate_up, down in pieces:
            up = gate_up.data_ptr() + gate_up.nbytes // 2
            words.extend((gate_up.data_ptr(), up, down.data_ptr(), down.shape[1]))
        n_experts += 1
    return n_experts, words


def codes(kernel: Kernel, dtype: torch.dtype, act: int) -> tuple[int, int, int]:
    """Dtype, activation and best instruction set as the library numbers them."""
    return _DTYPES[dtype], act, ISAS.index(kernel.isa)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def load(path: Path) -> Kernel:
    """Load a library. KernelError if it is missing, damaged or made from other sources."""
    try:
        library = ctypes.CDLL(str(path))
        interface = library.scheinfer_interface()
    except (OSError, AttributeError) as error:
        raise KernelError(f"the native kernel is not there ({error}); install a C++ compiler and reinstall") from error
    if interface != _INTERFACE:
        raise KernelError(f"{path} has interface {interface}, expected {_INTERFACE}; reinstall the package")
    declare(library)
    return Kernel(library, tuple(name for i, name in enumerate(ISAS) if library.scheinfer_has(i)))


def choice() -> str:
    """What SCHEINFER_KERNEL says. KernelError if it is none of CHOICES."""
    found = os.environ.get("SCHEINFER_KERNEL") or "auto"
    if found not in CHOICES:
        raise KernelError(f"SCHEINFER_KERNEL={found!r}; choose one of {', '.join(CHOICES)}")
    return found


@cache
def installed() -> Kernel | KernelError:
    """The kernel that came with the package, or why there is none."""
    try:
        return load(LIBRARY)
    except KernelError as error:
        return error


def kernel() -> Kernel | None:
    """The kernel that SCHEINFER_KERNEL allows; None where torch computes. KernelError if it insists in vain."""
    wanted = choice()
    found = None if wanted == "torch" else installed()
    if isinstance(found, KernelError) and wanted == "native":
        raise found
    return found if isinstance(found, Kernel) else None


def describe() -> str:
    """What computes MLPs on the CPU, for fingerprints: equal texts mean equal kernels."""
    found = kernel()
    by_torch = f"torch linear, {torch.backends.cpu.get_cpu_capability()}"
    return by_torch if found is None else f"native {_INTERFACE}, {found.isa}"


def why_not() -> str:
    """Why the native kernel is not used; empty where it is."""
    if choice() == "torch":
        return "SCHEINFER_KERNEL=torch"
    found = installed()
    return str(found) if isinstance(found, KernelError) else ""


def kernel_findings() -> list[Finding]:
    """What it costs that torch computes on the CPU, if it does."""
    reason = why_not()
    if not reason or choice() == "torch":
        return []
    limit = f"Torch computes MLPs on the CPU, at a third to three quarters of the native kernel's speed: {reason}"
    cure = "Install g++ and reinstall scheinfer, or run `python hatch_build.py` in its source"
    return [Finding("kernel", limit, cure)]


def dtype_code(dtype: torch.dtype) -> int | None:
    """The kernel's number of a dtype; None if it has none."""
    return _DTYPES.get(dtype)


def activation_code(act: object) -> int | None:
    """The kernel's number of an activation, a function or a module; None if it has none."""
    if act is functional.silu:
        return _SILU
    if act is functional.gelu:
        return _GELU_ERF
    if isinstance(act, nn.GELU):
        return _GELU_TANH if act.approximate == "tanh" else _GELU_ERF
    return _ACTIVATIONS.get(type(act).__name__)


@cache
def _has_amx() -> bool:
    return "AMX_BF16" in read_machine().isa


def leaves_to_torch(dtype: torch.dtype, n_rows: float) -> bool:
    """Whether `auto` takes torch for so many rows per expert: prompts in bfloat16 where torch uses AMX and it does not.

    Elsewhere the kernel was faster than F.linear, or at most an eighth slower (experiments.cpu_kernels).
    """
    if choice() != "auto" or dtype != torch.bfloat16 or n_rows < _AMX_ROWS or not _has_amx():
        return False
    return (found := kernel()) is None or found.isa != "AMX_BF16"


def takes(x_SD: Tensor, pieces: Sequence[Piece]) -> bool:
    """Whether the kernel computes these tensors: on the CPU, of one dtype that it knows, without gaps."""
    dtype = x_SD.dtype
    if x_SD.device.type != "cpu" or dtype not in _DTYPES or (x_SD.requires_grad and torch.is_grad_enabled()):
        return False
    return all(
        gate_up.dtype == dtype and down.dtype == dtype and gate_up.is_contiguous() and down.is_contiguous()
        for gate_up, down in pieces
    )


def holds(*tensors: Tensor) -> bool:
    """Whether the kernel takes these: on the CPU, of one dtype it knows, rows without gaps; no autograd or autocast."""
    dtype = tensors[0].dtype
    if dtype not in _DTYPES or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return all(t.dtype == dtype and t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)


def copies(to: Tensor, of: Tensor) -> bool:
    """Whether the kernel copies one to the other: in the same order of bytes."""
    return to.dtype == of.dtype and to.numel() == of.numel() and to.is_contiguous() and of.is_contiguous()


def projects(x_SK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> bool:
    """Whether the kernel computes a dense projection of these tensors: as takes says of an MLP's."""
    dtype, wanted = x_SK.dtype, torch.is_grad_enabled() and (x_SK.requires_grad or weight_NK.requires_grad)
    if x_SK.device.type != "cpu" or dtype not in _DTYPES or wanted:
        return False
    given = (weight_NK,) if bias_N is None else (weight_NK, bias_N)
    return all(t.dtype == dtype and t.device.type == "cpu" and t.is_contiguous() for t in given)


def threads() -> int:
    """Threads that compute for the calling thread: what set_threads said, else torch's number."""
    return getattr(_own, "n_threads", 0) or torch.get_num_threads()


def set_threads(n_threads: int) -> None:
    """Another number of threads than torch's for the calling thread; 0 for torch's.

    Threads of the kernel's own stay awake between calls, since nobody else's work on their cores.
    """
    _own.n_threads = n_threads
    if (found := kernel()) is not None:
        found.stay_awake(n_threads > 0)


def end_workers() -> None:
    """End the calling thread's workers, if the kernel was ever loaded."""
    if installed.cache_info().currsize and isinstance(found := installed(), Kernel):
        found.end_workers()
