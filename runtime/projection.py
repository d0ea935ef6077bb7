"""Dense projections on the CPU by the native kernel: attention's, shared experts', the head.

At one token a projection is as fast as its weights are read; F.linear in bfloat16 reads them at two thirds of
what memory gives (experiments.cpu_kernels). Prompts are torch's but where the kernel computes all of them: its threads
and torch's, which spin after each call, would wait for each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from transformers import PreTrainedModel

from runtime import native

FEW_ROWS = 8
_MOST_ROWS = 256
"""Of a prompt in float32 or float16: with torch's products 512 take 0.97 of the time, 128 1.05, 9 1.4."""


def computes_step(n_rows: int) -> bool:
    """Whether the kernel computes all that is large in a step of n_rows on the CPU, but for attention's past."""
    return n_rows <= FEW_ROWS and native.kernel() is not None


def computes_prompt(dtype: torch.dtype, n_rows: int) -> bool:
    """Whether the kernel computes all that is large in a prompt on the CPU, if it knows the model's attention."""
    kernel = native.kernel()
    if kernel is None or not kernel.attends_prompts or native.dtype_code(dtype) is None:
        return False
    most = math.inf if dtype == torch.bfloat16 else _MOST_ROWS
    return n_rows <= most and not native.leaves_to_torch(dtype, most)


def is_kernels(n_rows: int) -> bool:
    """Whether so many rows are the kernel's: few, or on threads that are its alone."""
    return n_rows <= FEW_ROWS or torch.get_num_threads() == 1


def untouched(modules: Iterable[nn.Module]) -> bool:
    """Whether nobody listens to any of these, and each computes what its class does."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return False
    return not hooks._has_any_global_hook()  # type: ignore[no-untyped-call]


def _own(rows: Tensor) -> bool:
    n_rows = rows.shape[0]
    return n_rows <= FEW_ROWS or (is_kernels(n_rows) and computes_prompt(rows.dtype, n_rows))


class Projection(nn.Linear):
    """A linear layer, in place of the one whose weights it holds."""

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias, [..., in] -> [..., out]."""
        kernel, rows = native.kernel(), x.reshape(-1, x.shape[-1])
        if kernel is None or not _own(rows) or not self.takes(rows):
            return super().forward(x)
        return kernel.linear(rows, self.weight, self.bias).view(*x.shape[:-1], self.weight.shape[0])

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel computes this layer of such rows."""
        return native.projects(x, self.weight, self.bias)


def project(modules: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """What each of them makes of x, in one call of the kernel where all are its and nobody listens: same bits."""
    kernel, rows = native.kernel(), x.reshape(-1, x.shape[-1])
    layers = [module for module in modules if type(module) is Projection and module.takes(rows)]
    if kernel is None or len(layers) < len(modules) or not _own(rows) or not untouched(modules):
        return [module(x) for module in modules]
    found = kernel.linears(rows, [(layer.weight, layer.bias) for layer in layers])
    return [flat.view(*x.shape[:-1], flat.shape[-1]) for flat in found]


def use_projections(model: PreTrainedModel) -> None:
    """Let the kernel compute the model's linear layers where they lie on the CPU."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = Projection
