"""Where MLP weights lie: resident pieces on the device, host slabs, slots that sent columns pass through.

A plan cuts an expert's columns at gg and, per tier, after what is sent. Between two cuts lies a piece, stored
as gate | up | down (| biases) without gaps, pieces in column order: any range between two cuts is one run of
memory, so that sending it is one copy, and its down part is contiguous.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from runtime.devices.base import Body, Device
from runtime.ops import Piece, piece_views
from sim.caching import CacheState
from sim.graph import Part
from sim.memory import cache_slot_bytes, cache_slots, host_columns, slot_bytes
from sim.model import ModelSpec
from sim.plan import Plan, Tier

_MOST_KEPT = 8  # of an expert; one that a cache moves about is seen in hundreds of slots, and views of each take 1 KB


def cuts(columns: int, gg: int, sent: Sequence[int]) -> tuple[int, ...]:
    """Column positions at which an expert is cut: 0, gg, gg + what each tier sends, columns; sorted, distinct."""
    return tuple(sorted({0, gg, columns, *(min(gg + a, columns) for a in sent)}))


@dataclass(frozen=True)
class ExpertStore:
    """Weights of one expert: columns [0, gg) in `device`, [gg, columns) in `host`, both flat; width elements each."""

    d_model: int
    width: int
    gg: int
    cuts: tuple[int, ...]
    device: Tensor
    host: Tensor
    _kept: dict[tuple[int, int, int], list[Piece]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Views made before, by address, start and stop: making one takes longer than waking a thread."""

    def pieces(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The pieces that make up columns [start, stop)."""
        inner = [c for c in self.cuts if start <= c <= stop]
        return list(pairwise(inner))

    def resident(self) -> list[Piece]:
        """The GG piece."""
        return self.views(self.device, 0, self.gg) if self.gg else []

    def host_run(self, start: int, stop: int) -> Tensor:
        """The run of host memory that holds columns [start, stop)."""
        return self.host[(start - self.gg) * self.width : (stop - self.gg) * self.width]

    def views(self, flat: Tensor, start: int, stop: int) -> list[Piece]:
        """The pieces of columns [start, stop) in a run of memory that begins with column `start`."""
        key = flat.data_ptr(), start, stop
        found = self._kept.get(key)
        if found is None:
            found, width = [], self.width
            for a, b in self.pieces(start, stop):
                found.append(piece_views(flat[(a - start) * width : (b - start) * width], self.d_model, b - a))
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept[key] = found
        return found

    def fill(
        self,
        gate_FD: Tensor,
        up_FD: Tensor,
        down_DF: Tensor,
        bias_2F: Tensor | None = None,
        after_each: Callable[[], object] = lambda: None,
    ) -> None:
        """Copy an expert's weights from the checkpoint's tensors to where they belong, one matrix after the other."""
        pieces: list[tuple[slice, Piece]] = []
        for a, b in pairwise(self.cuts):
            flat = self.device if b <= self.gg else self.host_run(a, b)
            pieces.append((slice(a, b), piece_views(flat, self.d_model, b - a)))
        for columns, (gate_up, _, _) in pieces:
            gate_up[: gate_up.shape[0] // 2].copy_(gate_FD[columns])
        after_each()
        for columns, (gate_up, _, _) in pieces:
            gate_up[gate_up.shape[0] // 2 :].copy_(up_FD[columns])
        after_each()
        for columns, (_, down, _) in pieces:
            down.copy_(down_DF[:, columns])
        after_each()
        for columns, (_, _, bias) in pieces:
            if bias is not None and bias_2F is not None:
                bias.view(2, -1).copy_(bias_2F.view(2, -1)[:, columns])


@dataclass(frozen=True)
class LayerStore:
    """The experts of one layer (a dense MLP is one expert)."""

    experts: tuple[ExpertStore, ...]


class Slots:
    """Device buffers that sent columns pass through, and what each holds; kept: bodies of sends made before."""

    def __init__(self, buffers: tuple[Tensor, ...]) -> None:
        self._buffers = buffers
        self._held: list[dict[int, Tensor]] = [{} for _ in buffers]
        self.kept: dict[object, tuple[Body, dict[int, Tensor]]] = {}

    def place(self, slot: int, parts: Sequence[Part], width: int) -> list[Tensor]:
        """Lay parts one after the other into a slot; the run of device memory of each."""
        runs, first = [], 0
        for part in parts:
            n = (part.stop - part.start) * width
            runs.append(self._buffers[slot][first : first + n])
            first += n
        self._held[slot] = {part.expert: run for part, run in zip(parts, runs, strict=True)}
        return runs

    def held(self, slot: int) -> dict[int, Tensor]:
        """The run of memory of each expert that was laid into a slot last."""
        return self._held[slot]

    def hold(self, slot: int, runs: dict[int, Tensor]) -> None:
        """Lay into a slot what `held` told before."""
        self._held[slot] = runs

    def run(self, slot: int, expert: int) -> Tensor:
        """The run of memory that holds an expert's sent columns."""
        return self._held[slot][expert]


@dataclass(frozen=True)
class WeightStore:
    """All MLP weights of a model, placed as a plan says; slots by tier; cache holds the expert cache's slots."""

    layers: tuple[LayerStore, ...]
    slots: dict[Tier, Slots]
    cache: tuple[Tensor, ...] = ()

    @property
    def device_bytes(self) -> int:
        """Bytes of resident columns."""
        return sum(e.device.nbytes for la in self.layers for e in la.experts)

    @property
    def host_bytes(self) -> int:
        """Bytes of columns in host memory."""
        return sum(e.host.nbytes for la in self.layers for e in la.experts)


def cached_run(cache: Sequence[Tensor], part: Part, width: int) -> Tensor:
    """The run of the expert cache that holds a part, of columns of so many elements."""
    return cache[part.cached][: (part.stop - part.start) * width]


def allocate(spec: ModelSpec, plan: Plan, device: Device) -> WeightStore:
    """Exact-size memory for every column, one host slab and one device slab per layer, and the slots."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    layers = []
    for i, layer in enumerate(spec.layers):
        width, gg = spec.column_elements(i), plan.layers[i].gg
        host = host_columns(spec, plan, i)
        slab = device.host_slab(sum(host) * width, dtype, plan.pinned)
        resident = device.allocate(sum(gg) * width, dtype, "GG weights")
        sent = [t.stream_columns or t.ahead[i] for t in plan.tiers]
        experts, at_host, at_device = [], 0, 0
        for g, h in zip(gg, host, strict=True):
            store = ExpertStore(
                spec.d_model,
                width,
                g,
                cuts(layer.ffn.columns, g, sent),
                resident[at_device : at_device + g * width],
                slab[at_host : at_host + h * width],
            )
            experts.append(store)
            at_host, at_device = at_host + h * width, at_device + g * width
        layers.append(LayerStore(tuple(experts)))
    n_slots, size = cache_slots(spec, plan), cache_slot_bytes(spec, plan) // dtype.itemsize
    region = device.allocate(n_slots * size, dtype, "expert cache")
    cache = tuple(region[i * size : (i + 1) * size] for i in range(n_slots))
    return WeightStore(tuple(layers), _slots(spec, plan, device, dtype), cache)


def _slots(spec: ModelSpec, plan: Plan, device: Device, dtype: torch.dtype) -> dict[Tier, Slots]:
    # Tiers never run at once: one region serves them all, cut anew for each tier's slot size.
    sizes = [slot_bytes(spec, plan, t) // dtype.itemsize for t in plan.tiers]
    total = max(t.n_slots * size for t, size in zip(plan.tiers, sizes, strict=True))
    region = device.allocate(total, dtype, "slots")
    return {
        tier: Slots(tuple(region[i * size : (i + 1) * size] for i in range(tier.n_slots)))
        for tier, size in zip(plan.tiers, sizes, strict=True)
    }


def fill_cache(spec: ModelSpec, plan: Plan, store: WeightStore) -> None:
    """Copy the experts that the expert cache begins with from host memory into its slots."""
    if plan.cache is None:
        return
    state = CacheState.of(spec, plan)
    for layer, expert in state.contents:
        gg, columns = plan.layers[layer].gg[expert], spec.layers[layer].ffn.columns
        part = Part(expert, gg, columns, 0, state.slot(layer, expert) or 0)
        home = store.layers[layer].experts[expert]
        cached_run(store.cache, part, home.width).copy_(home.host_run(gg, columns))


def trim_heap() -> None:
    """Let the C library return freed memory to the system: glibc keeps up to 64 MiB of it, more between live blocks."""
    with suppress(OSError, AttributeError):  # other C libraries have no such call
        ctypes.CDLL(None).malloc_trim(0)
