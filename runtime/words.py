"""Tasks of a layer as words for an emulated device's native queues: the same as runtime.binding's bodies.

All tensors lie in memory of this process, so that all addresses are known when a layer is bound: what a task's body
would leave for the next one is written where the next one reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime import native
from runtime.activation import Activation
from runtime.binding import LayerBinding
from runtime.devices.base import Body, Device
from runtime.memory import LayerStore
from runtime.native.queues import NativeBody, adding, computing
from sim.graph import Task


def takes_words(device: Device, act: Activation, x_SD: Tensor, dtype: str) -> bool:
    """Whether a layer's tasks for these rows can be words: the device takes them, the kernel computes all."""
    if not device.takes_words or native.activation_code(act) is None or x_SD.dtype != getattr(torch, dtype):
        return False
    if native.dtype_code(x_SD.dtype) is None or not x_SD.is_contiguous() or not native.takes(x_SD, ()):
        return False
    return not native.leaves_to_torch(x_SD.dtype, x_SD.shape[0])


def mlp_words(
    device: Device, x_SD: Tensor, y_SD: Tensor, experts: Sequence[native.Expert], act: Activation, on_host: bool
) -> NativeBody:
    """The sum of experts' MLPs for their rows of x, written to y: on the threads of the device, or of the CPU."""
    kernel, code = native.kernel(), native.activation_code(act)
    assert kernel is not None, "asked before"
    assert code is not None, "asked before"
    return computing(kernel, x_SD, y_SD, experts, code, device.cpu_threads if on_host else native.threads())


class WordBinding(LayerBinding):
    """A LayerBinding whose bodies are words."""

    def _body(self, task: Task, ahead: LayerStore | None) -> Body:
        if task.kind in ("send", "evict"):
            return super()._body(task, ahead)
        if task.kind == "act_h2d":
            return self._bring(task.id)
        if task.kind == "act_d2h":
            return self._take_back()
        if task.kind == "cc":
            return self._on_host(task)
        if task.kind == "join":
            return self._sum()
        y = self._partial[task.id] = torch.empty_like(self._x)
        self._joined.append(task.id)
        return self._mlp_words(self._x, y, task, on_host=False)

    def _bring(self, name: str) -> Body:
        """To the device: the input of a layer that lives on the CPU, or the CPU's result."""
        target = self._device.staging(self._x, "act_h2d", on_host=False)
        if self._on_cpu:
            source, self._x = self._x, target
        else:
            source, self._partial[name] = self._host_y, target
            self._joined.append(name)
        return self._device.copying([(target, source)], pinned=True)

    def _take_back(self) -> Body:
        """To the host: the device's result for a layer that lives on the CPU, or the input of the CPU's part."""
        if self._on_cpu:
            target = self._device.staging(self.output, "act_d2h", on_host=True)
            source, self.output = self.output, target
        else:
            target = self._device.staging(self._x, "act_d2h", on_host=True)
            source, self._host_x = self._x, target
        return self._device.copying([(target, source)], pinned=True)

    def _on_host(self, task: Task) -> Body:
        if self._on_cpu:
            y = self.output = torch.empty_like(self._host_x)
        else:
            y = self._host_y = self._device.staging(self._host_x, "cc", on_host=True)
        return self._mlp_words(self._host_x, y, task, on_host=True)

    def _mlp_words(self, x: Tensor, y: Tensor, task: Task, on_host: bool) -> NativeBody:
        pieces_of = self._pieces_of(task)
        if self._routed is None:
            experts: list[native.Expert] = [(None, None, pieces_of(part)) for part in task.parts]
        else:
            experts = []
            for part in task.parts:
                rows, weights = self._routed.of_expert(part.expert, on_host)
                experts.append((rows.contiguous(), weights.to(torch.float32).contiguous(), pieces_of(part)))
        return mlp_words(self._device, x, y, experts, self._act, on_host)

    def _sum(self) -> Body:
        kernel = native.kernel()
        assert kernel is not None, "asked before"
        first, *others = (self._partial[name] for name in self._joined)
        self.output = first
        return adding(kernel, first, others)
