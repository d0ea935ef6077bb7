"""The CUDA devices of this machine: memory, driver and link, as torch and nvidia-smi tell them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hwmodels.machine import Finding

_QUERY = (
    "driver_version",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
)


@dataclass(frozen=True)
class Gpu:
    """A CUDA device. Driver and link are empty where nvidia-smi does not tell them."""

    name: str
    capability: str
    vram_bytes: int
    free_bytes: int
    driver: str = ""
    link_gen: str = ""
    link_gen_max: str = ""
    link_width: str = ""
    link_width_max: str = ""

    @property
    def link(self) -> str:
        """The PCIe link in words; an idle GPU lowers its generation to save power."""
        if not self.link_width:
            return "unknown"
        return f"PCIe {self.link_gen} x{self.link_width} now, up to {self.link_gen_max} x{self.link_width_max}"


def gpus() -> list[Gpu]:
    """The CUDA devices that torch can use; none where there is no driver."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free_bytes, _ = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append(Gpu(properties.name, capability, properties.total_memory, free_bytes, *_smi(str(properties.uuid))))
    return found


def _smi(uuid: str) -> list[str]:
    """Answers of nvidia-smi for one device; none if it is missing or does not answer."""
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    fields = [field.strip() for field in answer.strip().split(",")]
    return fields if len(fields) == len(_QUERY) else []


def gpu_findings(found: list[Gpu]) -> list[Finding]:
    """What of the devices limits the product, most severe first."""
    if not found:
        limit = "torch sees no CUDA device: runs use the emulated device, which shows schedules and not a GPU's speed"
        return [Finding("gpu", limit, "Install a driver and a CUDA build of torch if this machine has an NVIDIA GPU")]
    return [finding for index, gpu in enumerate(found) for finding in _limits(index, gpu)]


def _limits(index: int, gpu: Gpu) -> Iterator[Finding]:
    width, most = gpu.link_width, gpu.link_width_max
    if width.isdigit() and most.isdigit() and int(width) < int(most):
        limit = f"GPU {index} has {width} of {most} PCIe lanes: weights are sent that much slower"
        yield Finding("link", limit, "Move it to a full-width slot, or free the lanes that others share")
    if gpu.free_bytes < 0.8 * gpu.vram_bytes:
        limit = f"Only {gpu.free_bytes / gpu.vram_bytes:.0%} of GPU {index}'s memory is free"
        yield Finding("vram", limit, "End the other programs on it, or plan with a smaller --vram-budget")
