"""Ways to fill device memory with MLP weights: in which units, and in which order.

A unit is what goes to the device at once: some columns of every expert of a layer, a whole expert, or a
layer's whole MLP. An order says which unit goes first. The first n units of an order are a placement, so
placements of one order are nested: more memory only adds units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sim.model import ModelSpec
from sim.pins import NO_PINS, Pins
from sim.plan import LayerPartition
from sim.workload import Workload, popularity

Unit = Literal["columns", "experts", "layers"]
Order = Literal["even", "first", "last", "spread"]
ORDERS: tuple[Order, ...] = ("even", "first", "last", "spread")

_GOLDEN = 0.6180339887498949
_FEWEST_COLUMNS, _MOST_GRANULES = 64, 128


def granule(columns: int) -> int:
    """Columns of the smallest piece that a cut makes: a multiple of 64, at most 128 pieces per expert.

    Kernels lose on ragged widths; small test models, which have nothing to lose, are cut in 16.

    >>> granule(14336), granule(768), granule(32)
    (128, 64, 2)
    """
    if columns < 4 * _FEWEST_COLUMNS:
        return max(1, columns // 16)
    return -(-columns // (_FEWEST_COLUMNS * _MOST_GRANULES)) * _FEWEST_COLUMNS


@lru_cache(maxsize=4096)
def _ranks(n_experts: int, skew: float, seed: int, layer: int) -> NDArray[np.int64]:
    shares = np.array(popularity(n_experts, skew, seed, layer))
    return np.argsort(np.argsort(-shares, kind="stable"), kind="stable")


def popularity_ranks(spec: ModelSpec, workload: Workload, layer: int) -> NDArray[np.int64]:
    """Rank of each expert of a layer, 0 for the one that attracts most tokens, the first of equals first."""
    return _ranks(spec.layers[layer].ffn.n_experts, workload.skew_of(layer), workload.seed, layer)


@dataclass(frozen=True)
class Filling:
    """One order of units for a model. Layers on the CPU (below first_layer, or pinned) and pinned units get none."""

    spec: ModelSpec
    workload: Workload
    unit: Unit
    order: Order
    first_layer: int = 0
    pins: Pins = NO_PINS

    def on_cpu(self, layer: int) -> bool:
        """Whether a layer lives on the CPU."""
        return layer < self.first_layer or self.pins.of_rest(layer) == "cpu"

    @property
    def device_layers(self) -> list[int]:
        """Layers that live on the device."""
        return [i for i in range(self.spec.n_layers) if not self.on_cpu(i)]

    def _pinned(self, layer: int) -> NDArray[np.bool_]:
        n_experts = self.spec.layers[layer].ffn.n_experts
        return np.array([to is not None for to in self.pins.of_experts(layer) or (None,) * n_experts])

    def units(self, layer: int) -> int:
        """How many units a layer has that are not pinned."""
        ffn, pins = self.spec.layers[layer].ffn, self.pins.of_experts(layer)
        n_free = pins.count(None) if pins else ffn.n_experts
        if self.unit == "layers" or n_free == 0:
            return min(n_free, 1)
        return n_free if self.unit == "experts" else -(-ffn.columns // granule(ffn.columns))

    def gg(self, layer: int, units: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Resident columns of every expert, [u, expert], of a layer that holds its first units[u] units.

        By default for every number of units from none to all.
        """
        ffn = self.spec.layers[layer].ffn
        n_units = (np.arange(self.units(layer) + 1) if units is None else units)[:, None]
        pinned = self._pinned(layer)
        if self.unit == "experts":
            ranks = popularity_ranks(self.spec, self.workload, layer)
            among_free = np.argsort(np.argsort(np.where(pinned, ffn.n_experts, ranks), kind="stable"), kind="stable")
            free = np.where(among_free < n_units, ffn.columns, 0)
        else:
            step = granule(ffn.columns) if self.unit == "columns" else ffn.columns
            free = np.repeat(np.minimum(n_units * step, ffn.columns), ffn.n_experts, axis=1)
        if not pinned.any():
            return free
        kept = np.array([ffn.columns if to == "gpu" else 0 for to in self.pins.of_experts(layer)])
        return np.where(pinned, kept, free)

    @cached_property
    def sequence(self) -> NDArray[np.int64]:
        """Layer of each unit, in the order in which units go to the device."""
        n = self.spec.n_layers
        rank = {
            "even": [0.0] * n,
            "first": [float(i) for i in range(n)],
            "last": [float(-i) for i in range(n)],
            "spread": [(i * _GOLDEN) % 1.0 for i in range(n)],
        }[self.order]
        keys = [(rank[i], j / self.units(i), i) for i in self.device_layers for j in range(self.units(i))]
        return np.array([i for _, _, i in sorted(keys)], dtype=np.int64)

    @cached_property
    def bytes_of(self) -> NDArray[np.int64]:
        """Device bytes of the first n units, for n = 0 to all."""
        sizes = {i: np.diff(self.gg(i).sum(axis=1)) * self.spec.column_bytes(i) for i in set(self.sequence.tolist())}
        taken = dict.fromkeys(sizes, 0)
        total = [0]
        for i in self.sequence.tolist():
            total.append(total[-1] + int(sizes[i][taken[i]]))
            taken[i] += 1
        return np.array(total, dtype=np.int64)

    def per_layer(self, levels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Units of every layer, [level, layer], when the first `level` units are on the device."""
        counts = np.zeros((len(self.sequence) + 1, self.spec.n_layers), dtype=np.int64)
        counts[np.arange(1, len(counts)), self.sequence] = 1
        return np.asarray(counts.cumsum(axis=0)[levels])

    def layers(self, n_units: int) -> tuple[LayerPartition, ...]:
        """Placement of the first n_units units."""
        counts = np.bincount(self.sequence[:n_units], minlength=self.spec.n_layers)
        return tuple(
            LayerPartition("CPU" if self.on_cpu(i) else "GPU", tuple(self.gg(i, counts[[i]])[0].tolist()))
            for i in range(self.spec.n_layers)
        )
