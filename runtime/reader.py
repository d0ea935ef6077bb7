"""Reads modules of a layer into words for the kernel, and remembers what it read: addresses, shapes, settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from runtime.projection import Projection
from runtime.watch import Fact, Link, Value


class UnfitError(Exception):
    """A layer is not as the kernel takes it."""


class Reader:
    """Reads a layer's modules and remembers what it read. UnfitError if the kernel does not take it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.links: list[Link] = []
        self.values: list[Value] = []
        self.facts: list[Fact] = []

    def part(self, owner: nn.Module, name: str, fits: Callable[[nn.Module], bool]) -> nn.Module:
        """A module of another, if it is of the kind asked for."""
        module = owner._modules.get(name)
        if module is None or not fits(module):
            raise UnfitError(name)
        self.links.append((owner._modules, name, module))
        return module

    def address(self, module: nn.Module, name: str = "weight", shape: tuple[int, ...] | None = None) -> int:
        """Where a parameter lies; 0 if the module has none of that name."""
        value = module._parameters.get(name)
        self.values.append((module._parameters, name, 0 if value is None else value.data_ptr()))
        if value is None and shape is None:
            return 0
        if value is None:
            raise UnfitError(name)
        wrong = value.dtype != self.dtype or value.device.type != "cpu" or not value.is_contiguous()
        if wrong or (shape is not None and value.shape != shape):
            raise UnfitError(name)
        return value.data_ptr()

    def buffer(self, module: nn.Module, name: str, shape: tuple[int, ...]) -> int:
        """Where a buffer in float32 lies."""
        value = module._buffers.get(name)
        wrong = value is None or value.dtype != torch.float32 or value.device.type != "cpu"
        if value is None or wrong or value.shape != shape or not value.is_contiguous():
            raise UnfitError(name)
        self.values.append((module._buffers, name, value.data_ptr()))
        return value.data_ptr()

    def fact(self, owner: object, name: str) -> Any:
        """An attribute that is neither module nor parameter; None if there is none."""
        self.facts.append((owner, name, getattr(owner, name, None)))
        return self.facts[-1][-1]

    def linear(self, owner: nn.Module, name: str, shape: tuple[int, int]) -> tuple[int, int]:
        """Addresses of a projection's weight [out, in] and of its bias, 0 for none."""
        module = self.part(owner, name, lambda m: type(m) is Projection)
        return self.address(module, "weight", shape), self.address(module, "bias")

    def norm(self, owner: nn.Module, name: str, width: int) -> tuple[int, float]:
        """Address of a root mean square norm's weight, and its epsilon."""
        module = self.part(owner, name, lambda m: type(m).__name__.endswith("RMSNorm"))
        return self.address(module, "weight", (width,)), float(self.fact(module, "variance_epsilon"))

    def any_norm(self, owner: nn.Module, name: str, width: int) -> tuple[int, int, float]:
        """The same of a norm of either kind, and between them its bias's address, 0 of a root mean square norm."""
        module = owner._modules.get(name)
        if module is None or not is_layer_norm(module):
            weight, eps = self.norm(owner, name, width)
            return weight, 0, eps
        self.part(owner, name, is_layer_norm)
        if self.fact(module, "normalized_shape") != (width,):
            raise UnfitError(name)
        weight, bias = (self.address(module, of, (width,)) for of in ("weight", "bias"))
        return weight, bias, float(self.fact(module, "eps"))


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a module subtracts the mean, as torch's own does."""
    return isinstance(module, nn.LayerNorm) and type(module).__name__ == "LayerNorm"
