"""What a calibration can have and computes with: memory that is free now, versions of software and GPU."""

from __future__ import annotations

import torch

from hwmodels.errors import PlanError
from hwmodels.machine import read_machine
from hwmodels.units import format_bytes
from runtime import native
from runtime.gpu import gpus

_SLACK_BYTES = 64 << 20  # blocks of the device's allocator are rounded up


def host_bytes() -> int:
    """Bytes of host memory that can be had now: container limits and what other programs hold are respected."""
    return read_machine().free_bytes


def check_free(n_bytes: int, what: str) -> None:
    """PlanError where so many bytes of host memory cannot be had: a system kills what takes more than there is."""
    free_bytes = host_bytes()
    if n_bytes > free_bytes:
        raise PlanError(
            f"{what} takes {format_bytes(n_bytes)} of memory, {format_bytes(free_bytes)} are free; end other programs, "
            "or raise the container's limit"
        )


def device_bytes(device: str) -> int:
    """Bytes of device memory that can be had now: of an emulated device half of the host's, of a GPU by trying."""
    if device == "emulated":
        return host_bytes() // 2
    free_bytes, _ = torch.cuda.mem_get_info(torch.device(device))
    n_bytes = free_bytes + int(torch.cuda.memory_reserved(torch.device(device))) - _SLACK_BYTES
    while n_bytes > 0:
        try:
            torch.empty(n_bytes, dtype=torch.uint8, device=device)
            break
        except torch.OutOfMemoryError:
            n_bytes = int(0.95 * n_bytes)
    torch.cuda.empty_cache()
    return n_bytes


def software(device: str) -> dict[str, str]:
    """Versions and names that a profile's fingerprint holds beside the machine's."""
    found: dict[str, str] = {"torch": str(torch.__version__), "kernels": native.describe()}
    if device != "emulated":
        index = torch.device(device).index or 0
        gpu = gpus()[index]
        found |= {"gpu": gpu.name, "cuda": str(torch.version.cuda), "driver": gpu.driver or "unknown"}
        found["gpu_memory_bytes"] = str(gpu.vram_bytes)
        found["link"] = f"PCIe {gpu.link_gen_max} x{gpu.link_width}" if gpu.link_width else "unknown"
    return found
