"""Times of one layer's MLP tasks for many placements at once: what a candidate costs, from tables.

Layers are alike and candidates differ in few numbers, so every distinct (tokens, columns) is priced once and
everything else is a look-up. Arrays are indexed [u, s]: u is one placement of the layer's columns, s one way
of sending (Sending).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from hwmodels.profile import HardwareProfile, Resource
from hwmodels.work import activations, copy
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
        n_bytes = n_tokens * self.spec.d_model * self.spec.dtype_bytes
        return self.profile.time_s(resource, activations(n_bytes, self.spec.dtype)).seconds if n_bytes else 0.0

    def join_s(self, n_tokens: int, most_partials: int) -> Seconds:
        """Seconds of a join of 0, 1, ... partial results."""
        works = [self.spec.small_work("join", n_tokens * max(n, 1)) for n in range(most_partials + 1)]
        return np.array([self.profile.time_s("GPU", work).seconds for work in works])

    def lag_s(self, before: str, after: str) -> float:
        """Hand-off delay between two resources."""
        return self.profile.handoff_s.get(f"{before}>{after}", 0.0)


@dataclass(frozen=True)
class AheadCosts:
    """A layer's task times where columns are sent ahead, [alone or contended, step, u, s]; masks say what exists.

    own_s    hand-off to the join, where the device has parts of its own
    join_s   the join of as many partial results as there are
    """

    gg_s: Seconds
    cg_s: Seconds
    cc_s: Seconds
    send_s: Seconds
    own_s: Seconds
    join_s: Seconds
    has_gg: Mask
    has_cg: Mask
    has_cc: Mask
    has_send: Mask

    def at(self, units: Count, steps: slice) -> AheadCosts:
        """Of some steps, for every level's number of units."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return AheadCosts(**{name: table[:, steps].take(units, axis=2) for name, table in found.items()})


Uses = Sequence[tuple[Count, Routing, Count]]
"""Per step: resident columns of the experts that have tokens, [row, expert], their tokens, and each u's row."""


def ahead_costs(prices: Prices, layer: int, gg: Count, uses: Uses, ahead: Sequence[int]) -> AheadCosts:
    """Times of gg, cg, cc and send for placements gg [u, expert] and every number of columns sent ahead."""
    columns = prices.spec.layers[layer].ffn.columns
    all_sent = np.minimum(np.array(ahead)[None, :, None], columns - gg[:, None, :]).sum(axis=2)
    shape = (1, len(uses), *all_sent.shape)
    known: dict[object, tuple[Seconds, Mask]] = {}
    times, masks = np.empty((3, *shape)), np.empty((3, *shape), dtype=bool)
    for t, (rows, tokens, row) in enumerate(uses):
        key = tokens, rows.tobytes()
        if key not in known:
            known[key] = _ahead_parts(prices, layer, rows, tokens, ahead)
        times[:, 0, t], masks[:, 0, t] = known[key][0][:, row], known[key][1][:, row]
    n_tokens = sum(uses[0][1]) // prices.spec.layers[layer].ffn.top_k
    join_s, n_partial = prices.join_s(n_tokens, 3), masks.sum(axis=0)
    return AheadCosts(
        gg_s=times[0],
        cg_s=times[1],
        cc_s=times[2],
        send_s=np.broadcast_to(prices.send_all_s(layer, all_sent), shape),
        own_s=np.where(masks[0] | masks[1], prices.lag_s("GPU", "GPU"), 0.0),
        join_s=join_s[n_partial],
        has_gg=masks[0],
        has_cg=masks[1],
        has_cc=masks[2],
        has_send=np.broadcast_to(all_sent > 0, shape),
    )


def _ahead_parts(prices: Prices, layer: int, gg: Count, routing: Routing, ahead: Sequence[int]) -> tuple[Seconds, Mask]:
    """Times of gg, cg and cc, and whether there are such parts: two arrays [part, u, s]."""
    columns, resident = prices.spec.layers[layer].ffn.columns, gg[:, None, :]
    sent = np.minimum(np.array(ahead)[None, :, None], columns - resident)
    parts = (("GPU", np.broadcast_to(resident, sent.shape)), ("GPU", sent), ("CPU", columns - resident - sent))
    times = [_sum_ffn(prices, "CPU" if place == "CPU" else "GPU", layer, routing, part) for place, part in parts]
    return np.stack(times), np.stack([(part > 0).any(axis=2) for _, part in parts])


def contended(alone: AheadCosts, slowed: Slowdown) -> AheadCosts:
    """The same without contention first, and with it second."""
    gpu_alone_s = alone.gg_s + alone.cg_s
    cc_s, gpu_s, send_s = slowed.beside(alone.cc_s, gpu_alone_s, alone.send_s)
    stretch = stretched(gpu_s, gpu_alone_s)
    return replace(
        alone,
        gg_s=np.concatenate((alone.gg_s, alone.gg_s * stretch)),
        cg_s=np.concatenate((alone.cg_s, alone.cg_s * stretch)),
        cc_s=np.concatenate((alone.cc_s, cc_s)),
        send_s=np.concatenate((alone.send_s, send_s)),
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
) -> Seconds:
    """Seconds from the end of attention to the end of the join, where nothing is sent ahead.

    gg [u, expert] are placements. The result is [alone, u, s], or [alone or contended, u, s] if anything is slowed.
    Everything that such a layer starts ends before its join does, so layers add up. The loop follows
    sim.compile's issue order: sends through the slots, each followed by its cg; the CPU's part beside.
    """
    run = _RoutedLayer(prices, layer, gg, routing, sendings)
    if slowed is None:
        return run.go(run.cc_s, np.ones(run.shape), np.ones(run.shape))[None]
    cc_s, gpu_s, send_s = slowed.beside(run.cc_s, run.gpu_s, run.sends_s)
    one = np.ones(run.shape)
    # Both at once: these arrays are small, and numpy's calls would cost more than their arithmetic.
    return run.go(
        np.stack((run.cc_s, cc_s)),
        np.stack((one, stretched(gpu_s, run.gpu_s))),
        np.stack((one, stretched(send_s, run.sends_s))),
    )


def stretched(slowed_s: Seconds, alone_s: Seconds) -> Seconds:
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


def slowdown(profile: HardwareProfile, spec: ModelSpec, n_tokens: int) -> Slowdown | None:
    """The estimate for steps of so many tokens; None where nothing slows anything.

    How far MLP parts compute or read is judged by one expert with its mean number of tokens.
    """
    layer = max(range(spec.n_layers), key=lambda i: spec.layers[i].ffn.n_experts)
    ffn = spec.layers[layer].ffn
    demand = spec.ffn_work(layer, max(1, round(n_tokens * ffn.top_k / ffn.n_experts)), ffn.columns)
    computing = profile.computing({"CPU": demand, "GPU": demand})
    link, gpu = (profile.rates(frozenset({"CPU", other}), computing) for other in ("H2D", "GPU"))
    known = Slowdown(link["CPU"], link["H2D"], gpu["CPU"], gpu["GPU"])
    return None if known == Slowdown(1.0, 1.0, 1.0, 1.0) else known


class _RoutedLayer:
    """One layer whose host experts are sent after the router; arrays are [u, s].

    Experts differ in their tokens and in how much of them is resident: each such pair is priced once, and a
    placement is how many experts it has of each pair. Only the sends, which wait for each other, go one by one.
    """

    def __init__(self, prices: Prices, layer: int, gg: Count, routing: Routing, sendings: Sequence[Sending]) -> None:
        self.prices = prices
        self.n_tokens = sum(routing) // prices.spec.layers[layer].ffn.top_k
        self.n_slots = np.array([max(s.n_slots, 1) for s in sendings])
        self.shape = (len(gg), len(sendings))
        experts = np.flatnonzero(routing)
        tokens, of_tokens = np.unique(np.array(routing)[experts], return_inverse=True)
        resident, of_resident = np.unique(gg[:, experts], return_inverse=True)
        pair = of_tokens * len(resident) + of_resident.reshape(len(gg), len(experts))  # [u, expert]
        sent, self.send_s, self.cg_s, cc, cc_s, gg_s = _pairs(prices, layer, tokens, resident, sendings)
        rows = np.arange(len(gg))[:, None] * len(cc)
        count = np.bincount((rows + pair).ravel(), minlength=len(gg) * len(cc)).reshape(len(gg), len(cc))
        self.cc_s, self.sends_s, self.cgs_s = count @ cc_s, count @ self.send_s, count @ self.cg_s
        self.gg_s = (count @ gg_s)[:, None]
        self.has_cc = np.asarray(count @ (cc > 0) > 0)
        self.has_gg = np.any(gg[:, experts] > 0, axis=1)[:, None]
        self.n_sent = count @ (sent > 0).astype(np.int64)
        self._order_sends(np.asarray(sent > 0), pair)

    def _order_sends(self, is_sent: Mask, pair: Count) -> None:
        """Pair of every candidate's first, second, ... send, [send, u, s], and whether it has so many."""
        busy = is_sent[pair.T]  # [expert, u, s]
        expert, u, s = np.nonzero(busy)
        nth = (np.cumsum(busy, axis=0) - 1)[expert, u, s]
        self.sends = np.zeros((int(self.n_sent.max(initial=0)), *self.shape), dtype=np.int64)
        self.sends[nth, u, s] = pair[u, expert]
        self.is_send = np.arange(len(self.sends))[:, None, None] < self.n_sent

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
        link_free, gpu_free = self._send(gpu_free, gpu_factor, send_factor)
        cc_end = lag_s("GPU", "D2H") + prices.activations_s("D2H", self.n_tokens) + lag_s("D2H", "CPU") + cc_s
        act_end = np.maximum(link_free, cc_end + lag_s("CPU", "H2D")) + prices.activations_s("H2D", self.n_tokens)
        ready = np.where(self.has_cc, act_end + lag_s("H2D", "GPU"), 0.0)
        own = np.where(self.has_gg | (self.n_sent > 0), lag_s("GPU", "GPU"), 0.0)
        n_partial = self.has_gg + self.n_sent + self.has_cc
        join_s = prices.join_s(self.n_tokens, int(n_partial.max()))
        return np.asarray(np.maximum(gpu_free + own, ready) + join_s[n_partial])

    def _send(self, gpu_free: Seconds, gpu_factor: Seconds, send_factor: Seconds) -> tuple[Seconds, Seconds]:
        """When link and GPU are free after all sends, each followed by its cg."""
        lag_s, sending = self.prices.lag_s, np.arange(self.shape[1])
        sends = self.sends, sending
        extra = (slice(None), *[None] * (gpu_factor.ndim - 2))  # [send, ..., u, s]
        send_s = np.where(self.is_send, self.send_s[sends], 0.0)[extra] * send_factor
        cg_s = np.where(self.is_send, self.cg_s[sends], 0.0)[extra] * gpu_factor
        link_waits = np.where(self.is_send, lag_s("GPU", "H2D"), -np.inf)  # a send that is none waits for nothing
        gpu_waits = np.where(self.is_send, lag_s("H2D", "GPU"), -np.inf)
        link_free, ends = np.zeros_like(gpu_free), [gpu_free]
        slots = [(n, self.n_slots == n) for n in np.unique(self.n_slots).tolist()]
        for k in range(len(self.sends)):
            slot_free = self._slot_free(ends, k, slots)
            link_free = np.maximum(link_free, slot_free + link_waits[k]) + send_s[k]
            ends.append(np.maximum(ends[-1], link_free + gpu_waits[k]) + cg_s[k])
        return link_free, ends[-1]

    @staticmethod
    def _slot_free(ends: list[Seconds], k: int, slots: list[tuple[int, Mask]]) -> Seconds | float:
        """When the slot of send k is free: at the end of the cg as many sends ago as there are slots."""
        frees = [ends[k + 1 - n] if k >= n else 0.0 for n, _ in slots]
        free = frees[0]
        for (_, has), other in zip(slots[1:], frees[1:], strict=True):
            free = np.where(has, other, free)
        return free


def _pairs(
    prices: Prices, layer: int, tokens: Count, resident: Count, sendings: Sequence[Sending]
) -> tuple[Count, Seconds, Seconds, Count, Seconds, Seconds]:
    """Of every pair of tokens and resident columns of an expert: columns sent, seconds of send and cg, columns of cc
    and seconds of it, all [pair, s], and seconds of gg [pair]."""
    columns = prices.spec.layers[layer].ffn.columns
    least = np.array([_NEVER if s.min_tokens is None else s.min_tokens for s in sendings])
    most = np.array([columns if s.columns is None else s.columns for s in sendings])
    host = (columns - resident)[None, :, None]
    sent = np.where(tokens[:, None, None] >= least, np.minimum(host, most), 0)
    cc = host - sent
    sent_at, cc_at, resident_at = prices.at(layer, sent), prices.at(layer, cc), prices.at(layer, resident)
    cpu_s = np.stack([prices.ffn_s("CPU", layer, n) for n in tokens.tolist()])
    gpu_s = np.stack([prices.ffn_s("GPU", layer, n) for n in tokens.tolist()])
    each = np.arange(len(tokens))[:, None, None]
    flat = (len(tokens) * len(resident), len(sendings))
    send_s, cg_s, cc_s = prices.send_s(layer)[sent_at], gpu_s[each, sent_at], cpu_s[each, cc_at]
    gg_s = gpu_s[:, resident_at].ravel()
    return sent.reshape(flat), send_s.reshape(flat), cg_s.reshape(flat), cc.reshape(flat), cc_s.reshape(flat), gg_s
