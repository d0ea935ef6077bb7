"""Times of one layer's MLP tasks for many placements at once: what a candidate costs, from tables.

Layers are alike and candidates differ in few numbers, so every distinct (tokens, columns) is priced once and
everything else is a look-up. Arrays are indexed [u, s]: u is one placement of the layer's columns, s one way
of sending (Sending).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmodels.profile import HardwareProfile, Resource
from hwmodels.work import copy
from sim.layers import FfnSpec
from sim.model import ModelSpec
from sim.plan import Tier
from sim.workload import Routing

Seconds = NDArray[np.float64]
Count = NDArray[np.int64]
Mask = NDArray[np.bool_]

_NEVER = 2**62


@dataclass(frozen=True, slots=True)
class Sending:
    """What a tier sends: columns of every expert ahead, or routed experts' columns, or nothing.

    ahead        host columns of every expert, one layer ahead through two slots
    min_tokens   else: experts with at least so many tokens, after the router
    columns      of these, so many of their host columns; None: all
    fixed        (layer, columns) of layers that differ in what they send ahead
    """

    ahead: int = 0
    min_tokens: int | None = None
    columns: int | None = None
    n_slots: int = 0
    fixed: tuple[tuple[int, int], ...] = ()

    @property
    def sends_ahead(self) -> bool:
        """Whether any layer's columns are sent ahead."""
        return self.ahead > 0 or any(columns for _, columns in self.fixed)

    def ahead_of(self, layer: int) -> int:
        """Host columns of every expert of a layer that are sent ahead, at most."""
        return dict(self.fixed).get(layer, self.ahead) if self.fixed else self.ahead

    def tier(self, spec: ModelSpec, name: str, max_tokens: int) -> Tier:
        """An overlapping tier that sends so."""
        ahead = tuple(min(self.ahead_of(i), la.ffn.columns) for i, la in enumerate(spec.layers))
        return Tier(name, max_tokens, True, ahead, self.min_tokens, self.n_slots, self.columns)


class Prices:
    """Memo of times by layer and column count.

    Column counts are given positions as they turn up (`at`), zero columns position 0; times of one kind of
    task are vectors over positions. Layers with equal MLPs share all of it.
    """

    def __init__(self, spec: ModelSpec, profile: HardwareProfile, pinned: bool = True) -> None:
        self.spec, self.profile, self.pinned = spec, profile, pinned
        self._counts: dict[FfnSpec, list[int]] = {}
        self._position: dict[FfnSpec, Count] = {}
        self._times: dict[tuple[str, FfnSpec, int], list[float]] = {}
        self._vectors: dict[tuple[str, FfnSpec, int], Seconds] = {}

    def at(self, layer: int, columns: Count) -> Count:
        """Positions of column counts of one expert, any shape."""
        kind = self.spec.layers[layer].ffn
        if kind not in self._counts:
            self._counts[kind] = [0]
            self._position[kind] = np.full(kind.columns + 1, -1, dtype=np.int64)
            self._position[kind][0] = 0
        found = self._position[kind][columns]
        if (found < 0).any():
            new = np.unique(columns[found < 0])
            self._position[kind][new] = len(self._counts[kind]) + np.arange(len(new))
            self._counts[kind] += new.tolist()
            found = self._position[kind][columns]
        return np.asarray(found)

    def ffn_s(self, resource: Resource, layer: int, n_tokens: int) -> Seconds:
        """Seconds of n_tokens tokens, by position of the column count; zero columns take no time."""

        def seconds(columns: int) -> float:
            return self.profile.time_s(resource, self.spec.ffn_work(layer, n_tokens, columns)).seconds

        return self._vector(resource, layer, n_tokens, seconds)

    def send_s(self, layer: int) -> Seconds:
        """Seconds of sending columns of one expert, by position of the column count."""
        size = self.spec.column_bytes(layer)
        return self._vector("H2D", layer, 0, lambda columns: self.copy_s("H2D", float(columns * size), self.pinned))

    def _vector(self, resource: Resource, layer: int, n_tokens: int, seconds: Callable[[int], float]) -> Seconds:
        kind = self.spec.layers[layer].ffn
        key, counts = (resource, kind, n_tokens), self._counts[kind]
        vector = self._vectors.get(key)
        if vector is None or len(vector) < len(counts):
            known = self._times.setdefault(key, [0.0])
            known += [seconds(columns) for columns in counts[len(known) :]]
            vector = self._vectors[key] = np.array(known)
        return vector

    def copy_s(self, resource: Resource, n_bytes: float, pinned: bool) -> float:
        """Seconds of one copy; no bytes, no copy."""
        return self.profile.time_s(resource, copy(n_bytes, self.spec.dtype, pinned)).seconds if n_bytes else 0.0

    def send_all_s(self, layer: int, columns: Count) -> Seconds:
        """Seconds of sending that many columns, of all experts together, at once; any shape."""
        distinct, where = np.unique(columns, return_inverse=True)
        size = self.spec.column_bytes(layer)
        times = np.array([self.copy_s("H2D", float(c * size), self.pinned) for c in distinct.tolist()])
        return np.asarray(times[where].reshape(columns.shape))

    def activations_s(self, resource: Resource, n_tokens: int) -> float:
        """Seconds of copying the hidden states of a step."""
        return self.copy_s(resource, float(n_tokens * self.spec.d_model * self.spec.dtype_bytes), pinned=True)

    def join_s(self, n_tokens: int, most_partials: int) -> Seconds:
        """Seconds of a join of 0, 1, ... partial results."""
        works = [self.spec.small_work("join", n_tokens * max(n, 1)) for n in range(most_partials + 1)]
        return np.array([self.profile.time_s("GPU", work).seconds for work in works])

    def lag_s(self, before: str, after: str) -> float:
        """Hand-off delay between two resources."""
        return self.profile.handoff_s.get(f"{before}>{after}", 0.0)


@dataclass(frozen=True)
class AheadCosts:
    """A layer's task times where columns are sent ahead, [u, s]; masks say whether the task exists."""

    gg_s: Seconds
    cg_s: Seconds
    cc_s: Seconds
    send_s: Seconds
    has_gg: Mask
    has_cg: Mask
    has_cc: Mask
    has_send: Mask


def ahead_costs(prices: Prices, layer: int, gg: Count, routing: Routing, ahead: Sequence[int]) -> AheadCosts:
    """Times of gg, cg, cc and send for placements gg [u, expert] and every number of columns sent ahead."""
    columns = prices.spec.layers[layer].ffn.columns
    gg = gg[:, None, :]
    sent = np.minimum(np.array(ahead, dtype=np.int64)[None, :, None], columns - gg)
    cc = columns - gg - sent
    active = np.array(routing) > 0
    all_sent = sent.sum(axis=2)
    has_send = all_sent > 0
    return AheadCosts(
        gg_s=_sum_ffn(prices, "GPU", layer, routing, np.broadcast_to(gg, sent.shape)),
        cg_s=_sum_ffn(prices, "GPU", layer, routing, sent),
        cc_s=_sum_ffn(prices, "CPU", layer, routing, cc),
        send_s=prices.send_all_s(layer, all_sent),
        has_gg=np.broadcast_to((gg[:, :, active] > 0).any(axis=2), has_send.shape),
        has_cg=np.any(sent[:, :, active] > 0, axis=2),
        has_cc=np.any(cc[:, :, active] > 0, axis=2),
        has_send=has_send,
    )


def _sum_ffn(prices: Prices, resource: Resource, layer: int, routing: Routing, columns: Count) -> Seconds:
    """Seconds of all experts' parts of `columns` [u, s, expert] columns, one after the other."""
    total = np.zeros(columns.shape[:2])
    where = prices.at(layer, columns)
    for expert, n_tokens in enumerate(routing):
        if n_tokens:
            total += prices.ffn_s(resource, layer, n_tokens)[where[:, :, expert]]
    return total


def routed_mlp_s(
    prices: Prices,
    layer: int,
    gg: Count,
    routing: Routing,
    sendings: Sequence[Sending],
    slowed: Slowdown | None,
) -> tuple[Seconds, Seconds]:
    """Seconds from the end of attention to the end of the join, [u, s], where nothing is sent ahead.

    gg [u, expert] are placements; the two results are without contention, and estimated with it.
    Everything that such a layer starts ends before its join does, so layers add up. The loop follows
    sim.compile's issue order: sends through the slots, each followed by its cg; the CPU's part beside.
    """
    run = _RoutedLayer(prices, layer, gg, routing, sendings)
    if slowed is None:
        alone_s = run.go(run.cc_s, np.ones(run.shape), np.ones(run.shape))
        return alone_s, alone_s
    cc_s, gpu_s, send_s = slowed.beside(run.cc_s, run.gpu_s, run.sends_s)
    one = np.ones(run.shape)
    # Both at once: these arrays are small, and numpy's calls would cost more than their arithmetic.
    both = run.go(
        np.stack((run.cc_s, cc_s)),
        np.stack((one, factor(gpu_s, run.gpu_s))),
        np.stack((one, factor(send_s, run.sends_s))),
    )
    return both[0], both[1]


def factor(slowed_s: Seconds, alone_s: Seconds) -> Seconds:
    """How much longer; 1 where there is nothing to do."""
    return np.divide(slowed_s, alone_s, out=np.ones_like(alone_s), where=alone_s > 0)


@dataclass(frozen=True)
class Slowdown:
    """Contention as an estimate: rates of the CPU beside the link and beside the GPU, each pair on its own.

    The two tasks of a pair are taken to begin together; the longer one runs alone once the shorter one ends.
    """

    cpu_by_link: float
    link: float
    cpu_by_gpu: float
    gpu: float

    def beside(self, cc_s: Seconds, gpu_s: Seconds, send_s: Seconds) -> tuple[Seconds, Seconds, Seconds]:
        """Times of a layer's CPU part, GPU parts and sends while they run beside each other."""
        with_link = np.minimum(cc_s / self.cpu_by_link, send_s / self.link)
        with_gpu = np.minimum(cc_s / self.cpu_by_gpu, gpu_s / self.gpu)
        return (
            cc_s + (1 - self.cpu_by_link) * with_link + (1 - self.cpu_by_gpu) * with_gpu,
            gpu_s + (1 - self.gpu) * with_gpu,
            send_s + (1 - self.link) * with_link,
        )


def slowdown(profile: HardwareProfile) -> Slowdown | None:
    """The estimate for a machine; None where nothing slows anything."""
    link, gpu = profile.rates(frozenset({"CPU", "H2D"})), profile.rates(frozenset({"CPU", "GPU"}))
    known = Slowdown(link["CPU"], link["H2D"], gpu["CPU"], gpu["GPU"])
    return None if known == Slowdown(1.0, 1.0, 1.0, 1.0) else known


class _RoutedLayer:
    """One layer whose host experts are sent after the router; arrays are [u, s]."""

    def __init__(self, prices: Prices, layer: int, gg: Count, routing: Routing, sendings: Sequence[Sending]) -> None:
        self.prices, self.layer = prices, layer
        self.n_tokens = sum(routing) // prices.spec.layers[layer].ffn.top_k
        self.n_slots = np.array([max(s.n_slots, 1) for s in sendings])
        least = np.array([_NEVER if s.min_tokens is None else s.min_tokens for s in sendings])
        columns = prices.spec.layers[layer].ffn.columns
        most = np.array([columns if s.columns is None else s.columns for s in sendings])
        self.shape = (len(gg), len(sendings))
        self.cc_s, self.sends_s, self.cgs_s = np.zeros(self.shape), np.zeros(self.shape), np.zeros(self.shape)
        self.gg_s = np.zeros((len(gg), 1))
        self.has_cc, self.has_gg = np.zeros(self.shape, dtype=bool), np.zeros((len(gg), 1), dtype=bool)
        self.sent: list[tuple[int, Count]] = []  # tokens of an expert, positions in the grid of what is sent of it
        for expert, n in enumerate(routing):
            if not n:
                continue
            resident = gg[:, [expert]]
            sent = np.where(n >= least, np.minimum(columns - resident, most), 0)
            cc, where = columns - resident - sent, prices.at(layer, sent)
            cc_where, gg_where = prices.at(layer, cc), prices.at(layer, resident)
            gpu_s = prices.ffn_s("GPU", layer, n)
            self.sent.append((n, where))
            self.cc_s += prices.ffn_s("CPU", layer, n)[cc_where]
            self.sends_s += prices.send_s(layer)[where]
            self.cgs_s += gpu_s[where]
            self.gg_s += gpu_s[gg_where]
            self.has_cc |= cc > 0
            self.has_gg |= resident > 0

    @property
    def gpu_s(self) -> Seconds:
        """Seconds of all the GPU's parts."""
        return self.gg_s + self.cgs_s

    def go(self, cc_s: Seconds, gpu_factor: Seconds, send_factor: Seconds) -> Seconds:
        """Seconds to the end of the join, with the GPU's and the link's tasks stretched by their factors.

        Arrays are [..., u, s].
        """
        prices, lag_s = self.prices, self.prices.lag_s
        gpu_free = np.where(self.has_gg, lag_s("GPU", "GPU") + self.gg_s * gpu_factor, 0.0)
        link_free, n_sent = np.zeros(cc_s.shape), np.zeros(self.shape, dtype=np.int64)
        slots = _Slots(self.n_slots, cc_s.shape)
        send_s = prices.send_s(self.layer)
        for n, where in self.sent:
            busy = where > 0
            if not busy.any():
                continue
            slot_free = slots.free() + lag_s("GPU", "H2D")
            send_end = np.maximum(link_free, slot_free) + send_s[where] * send_factor
            cg_s = prices.ffn_s("GPU", self.layer, n)[where] * gpu_factor
            cg_end = np.maximum(gpu_free, send_end + lag_s("H2D", "GPU")) + cg_s
            link_free, gpu_free = np.where(busy, send_end, link_free), np.where(busy, cg_end, gpu_free)
            slots.use(busy, cg_end)
            n_sent += busy
        cc_end = lag_s("GPU", "D2H") + prices.activations_s("D2H", self.n_tokens) + lag_s("D2H", "CPU") + cc_s
        act_end = np.maximum(link_free, cc_end + lag_s("CPU", "H2D")) + prices.activations_s("H2D", self.n_tokens)
        ready = np.where(self.has_cc, act_end + lag_s("H2D", "GPU"), 0.0)
        own = np.where(self.has_gg | (n_sent > 0), lag_s("GPU", "GPU"), 0.0)
        n_partial = self.has_gg + n_sent + self.has_cc
        join_s = prices.join_s(self.n_tokens, int(n_partial.max()))
        return np.asarray(np.maximum(gpu_free + own, ready) + join_s[n_partial])


class _Slots:
    """When the slots of each candidate are free: ends of its last cg tasks, the latest last."""

    def __init__(self, n_slots: Count, shape: tuple[int, ...]) -> None:
        self.most = int(n_slots.max())
        self.groups = [(n, np.flatnonzero(n_slots == n)) for n in sorted(set(n_slots.tolist()))]
        self.ends = [np.zeros(shape)] * self.most

    def free(self) -> Seconds:
        """When the slot of the next send is free: as many users back as there are slots."""
        if len(self.groups) == 1:
            return self.ends[0]
        free = np.empty_like(self.ends[0])
        for n, where in self.groups:
            free[..., where] = self.ends[self.most - n][..., where]
        return free

    def use(self, busy: Mask, end_s: Seconds) -> None:
        """A slot is used up to end_s, where busy."""
        later = [*self.ends[1:], end_s]
        self.ends = [np.where(busy, after, before) for before, after in zip(self.ends, later, strict=True)]
