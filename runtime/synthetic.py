"""Models with random weights and a real config's shapes: what calibration measures instead of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtime.devices import Device
from runtime.memory import WeightStore
from runtime.pages import large_pages
from runtime.session import PlannedModel, assemble, placement
from sim.model import ModelSpec, from_config
from sim.plan import LayerPartition, Place, Plan, Tier

DEFAULT_CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "dtype": "float32",
}
"""Shape that is measured when no model is named."""

_COLUMN_FIELDS = ("intermediate_size", "moe_intermediate_size")


def shrunk(config: Mapping[str, Any], read_bytes: int, max_bytes: int) -> dict[str, Any]:
    """The config with so few layers that one token reads read_bytes and all hold max_bytes, but two at least.

    Narrower MLPs if two pass max_bytes still. Attention, router and shared experts keep their sizes: those are what
    the stand-in measures. What one token reads decides what it finds in the caches; experts that it leaves out do not.
    """
    small = dict(config)
    spec = from_config(small)
    layers = range(spec.n_layers)
    read = max(spec.rest_bytes(i) + spec.ffn_bytes(i) * _share_read(spec, i) for i in layers)
    held = max(spec.rest_bytes(i) + spec.ffn_bytes(i) for i in layers)
    n_layers = max(2, min(spec.n_layers, int(read_bytes // read), max_bytes // held))
    small["num_hidden_layers"] = n_layers
    if isinstance(small.get("layer_types"), list):
        small["layer_types"] = (small["layer_types"] * 2)[:n_layers]  # a model of one layer gets a second
    while _bytes(small) > max_bytes and any(small.get(f, 0) > 64 for f in _COLUMN_FIELDS):
        for name in _COLUMN_FIELDS:
            if name in small:
                small[name] = max(64, small[name] // 2)
    return small


def _share_read(spec: ModelSpec, layer: int) -> float:
    """Of a layer's experts that one token meets; of a dense MLP all."""
    ffn = spec.layers[layer].ffn
    return ffn.top_k / ffn.n_experts


def _bytes(config: Mapping[str, Any]) -> int:
    spec = from_config(config)
    return sum(spec.ffn_bytes(i) + spec.rest_bytes(i) for i in range(spec.n_layers))


def uniform_plan(
    spec: ModelSpec,
    place: Place,
    gg_share: float,
    ahead_share: float,
    n_ctx: int,
    vram_bytes: int,
    overlap: bool = True,
    by_turns: bool = False,
) -> Plan:
    """A plan that treats all layers alike: shares of every expert's columns that are GG and sent ahead.

    by_turns: but every second layer, from the first on, and the ends are the CPU's.
    """
    layers, ahead = [], []
    for i, layer in enumerate(spec.layers):
        here: Place = "CPU" if by_turns and i % 2 == 0 else place
        gg = round(layer.ffn.columns * gg_share) if here == "GPU" else 0
        layers.append(LayerPartition(here, (gg,) * layer.ffn.n_experts))
        ahead.append(round(layer.ffn.columns * ahead_share) if here == "GPU" else 0)
    tier = Tier("all", max(n_ctx, 1), overlap, tuple(ahead), None, 2 if any(ahead) else 0)
    ends: Place = "CPU" if by_turns else place
    return Plan(
        "calibration", spec.name, spec.id, "", spec.dtype, vram_bytes, n_ctx, 1, True, ends, tuple(layers), (tier,)
    )


def random_model(config: Mapping[str, Any], folder: Path, plan: Plan, device: Device) -> PlannedModel:
    """A model of a config with random weights; writes config.json into an empty folder first."""
    (folder / "config.json").write_text(json.dumps(dict(config)))
    spec = replace(from_config(config, plan.model), dtype=plan.dtype)

    def fill(model: PreTrainedModel, store: WeightStore) -> None:
        place = placement(plan, device)
        for name, parameter in list(model.named_parameters()):
            owner = model.get_submodule(name.rpartition(".")[0])
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=place(name))
            value = large_pages(value) if value.device.type == "cpu" else value
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(fill_small(value), requires_grad=False))
        model.tie_weights()
        for name, buffer in list(model.named_buffers()):
            owner = model.get_submodule(name.rpartition(".")[0])
            known = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer  # a checkpoint has it
            setattr(owner, name.rpartition(".")[2], known.to(place(name)))
        for layer in store.layers:
            for expert in layer.experts:
                fill_small(expert.host)
                fill_small(expert.device)

    return assemble(folder, spec, plan, device, fill)


def fill_small(values: Tensor) -> Tensor:
    """Small random numbers, cheaply and in place: denormals and NaN would change the speed of arithmetic."""
    flat = values.view(-1)
    block = _small_numbers(flat.dtype)[: flat.numel()]
    for first in range(0, flat.numel(), max(1, block.numel())):
        last = min(first + block.numel(), flat.numel())
        flat[first:last].copy_(block[: last - first])
    return values


@cache
def _small_numbers(dtype: torch.dtype) -> Tensor:
    """Drawn once: that takes ten times as long as copying."""
    return torch.randn(1 << 20).mul_(0.02).to(dtype)
