"""How much device memory a plan may use where nobody said."""

from __future__ import annotations

import torch

from runtime.devices import device_name
from sim.memory import activation_bytes, ends_bytes
from sim.model import ModelSpec
from sim.workload import Workload

FREE_SHARE = 0.9
"""Share of a GPU's free memory that is taken: the rest is for the CUDA context and fragmentation."""


def fixed_bytes(spec: ModelSpec, workload: Workload) -> int:
    """Device bytes beside MLP weights: embedding, attention, head, KV cache and activations."""
    layers = sum(spec.rest_bytes(i) + workload.batch * spec.kv_bytes(i, workload.n_ctx) for i in range(spec.n_layers))
    return ends_bytes(spec) + layers + activation_bytes(spec, workload.n_ctx * workload.batch, workload.batch)


def half_budget(spec: ModelSpec, workload: Workload) -> int:
    """A device that holds everything but the MLPs, and half of those: a model twice too large for it."""
    return fixed_bytes(spec, workload) + sum(spec.ffn_bytes(i) for i in range(spec.n_layers)) // 2


def default_vram_budget(spec: ModelSpec, workload: Workload, device: str) -> int:
    """Bytes: most of what is free on a CUDA device; `half_budget` for the emulated one, which has no memory to ask.

    Raises PlanError for a device that is not here.
    """
    name = device_name(device)
    if name == "emulated":
        return half_budget(spec, workload)
    free, _ = torch.cuda.mem_get_info(torch.device(name))
    return int(FREE_SHARE * free)
