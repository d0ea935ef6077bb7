"""Devices: where a plan's GPU part runs. `open_device` chooses; see `base` for the interface."""

from __future__ import annotations

import torch

from hwmodels.errors import PlanError
from runtime.devices.base import Device
from runtime.devices.cuda import CudaDevice
from runtime.devices.emulated import EmulatedDevice, Link

__all__ = ["Device", "Link", "device_name", "open_device"]


def device_name(name: str) -> str:
    """ "cuda:N" or "emulated" for a --device value; auto takes CUDA where there is one. PlanError otherwise."""
    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "emulated"
    if name == "emulated":
        return name
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise PlanError(f"no device {name!r}; choose auto, cuda:0 or emulated")
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= n_devices:
        raise PlanError(f"device {name!r} asked for, {n_devices} CUDA devices are here; use --device emulated")
    return f"cuda:{int(index or 0)}"


def open_device(name: str, vram_bytes: int, cpu_threads: int | None = None) -> Device:
    """Open a device whose memory is capped at vram_bytes."""
    name = device_name(name)
    if name == "emulated":
        return EmulatedDevice(vram_bytes, cpu_threads)
    return CudaDevice(int(name.removeprefix("cuda:")), vram_bytes, cpu_threads)
