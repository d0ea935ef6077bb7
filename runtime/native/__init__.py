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
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from hwmodels.errors import KernelError
from hwmodels.machine import Finding, read_machine
from runtime.activation import ClampedGlu
from runtime.native.layer import declare
from runtime.native.library import (
    DTYPES,
    ISAS,
    Expert,
    Kernel,
    Piece,
    check,
    codes,
    expert_words,
    piece_words,
    set_own_threads,
    threads,
)

__all__ = ["ISAS", "Expert", "Kernel", "Piece", "check", "codes", "expert_words", "piece_words", "threads"]

LIBRARY = Path(__file__).with_name("libscheinfer.so")
CHOICES = ("auto", "native", "torch")
_INTERFACE = 17
MOST_WIDTH = 256
"""Of a head in a prompt's attention."""
_AMX_ROWS = 32  # as many as AMX computes in the time of one
_SILU, _GELU_TANH, _GELU_ERF, _CLAMPED_GLU = range(4)
_ACTIVATIONS = {
    "SiLU": _SILU,
    "SiLUActivation": _SILU,
    "GELUTanh": _GELU_TANH,
    "PytorchGELUTanh": _GELU_TANH,
    "NewGELUActivation": _GELU_TANH,
    "GELUActivation": _GELU_ERF,
}


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
    return DTYPES.get(dtype)


def activation_code(act: object) -> int | None:
    """The kernel's number of an activation, a function or a module; None if it has none."""
    if act is functional.silu:
        return _SILU
    if act is functional.gelu:
        return _GELU_ERF
    if isinstance(act, ClampedGlu):
        return _CLAMPED_GLU if act == ClampedGlu() else None
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
    if x_SD.device.type != "cpu" or dtype not in DTYPES or (x_SD.requires_grad and torch.is_grad_enabled()):
        return False
    parts = (tensor for piece in pieces for tensor in piece if tensor is not None)
    return all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in parts)


def holds(*tensors: Tensor) -> bool:
    """Whether the kernel takes these: on the CPU, of one dtype it knows, rows without gaps; no autograd or autocast."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return all(t.dtype == dtype and t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)


def copies(to: Tensor, of: Tensor) -> bool:
    """Whether the kernel copies one to the other: in the same order of bytes."""
    return to.dtype == of.dtype and to.numel() == of.numel() and to.is_contiguous() and of.is_contiguous()


def projects(x_SK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> bool:
    """Whether the kernel computes a dense projection of these tensors: as takes says of an MLP's."""
    dtype, wanted = x_SK.dtype, torch.is_grad_enabled() and (x_SK.requires_grad or weight_NK.requires_grad)
    if x_SK.device.type != "cpu" or dtype not in DTYPES or wanted:
        return False
    given = (weight_NK,) if bias_N is None else (weight_NK, bias_N)
    return all(t.dtype == dtype and t.device.type == "cpu" and t.is_contiguous() for t in given)


def set_threads(n_threads: int) -> None:
    """Another number of threads than torch's for the calling thread; 0 for torch's.

    Threads of the kernel's own stay awake between calls, since nobody else's work on their cores.
    """
    set_own_threads(n_threads)
    if (found := kernel()) is not None:
        found.stay_awake(n_threads > 0)


def end_workers() -> None:
    """End the calling thread's workers, if the kernel was ever loaded."""
    if installed.cache_info().currsize and isinstance(found := installed(), Kernel):
        found.end_workers()
