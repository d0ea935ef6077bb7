"""Seconds of a step for many placements and ways of sending at once, equal to the engine without contention.

A layer that sends nothing ahead leaves every queue empty at its join, so such steps are a sum over layers.
Sends ahead couple neighbouring layers: for them the engine's recurrence (start = max of what is waited for)
runs over the layers once, each number in it an array over candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hwmodels.profile import RESOURCES, Resource
from hwmodels.work import Work
from sim.layercost import AheadCosts, Count, Mask, Prices, Seconds, Sending, Slowdown, ahead_costs, factor, routed_mlp_s
from sim.placement import Filling
from sim.plan import Place
from sim.workload import Routing, Step

_MOST_UNITS_PRICED_WHOLE = 128


@dataclass
class StepTimes:
    """One step of one model on one machine, with its routing; remembers the tables of its layers."""

    prices: Prices
    step: Step
    routing: tuple[Routing, ...]
    slowed: Slowdown | None = None

    def __post_init__(self) -> None:
        self._routed: dict[object, tuple[Seconds, Seconds]] = {}
        self._ahead: dict[object, AheadCosts] = {}
        self._chains_s: dict[tuple[tuple[int, ...], Place], float] = {}
        self._cpu_mlps_s: dict[int, float] = {}

    def seconds(
        self, filling: Filling, ends: Place, levels: Count, sendings: Sequence[Sending], contended: bool = False
    ) -> Seconds:
        """Seconds of the step, [level, sending], for the first `level` units of a filling on the device.

        contended estimates them with contention (Slowdown).
        """
        units = filling.per_layer(levels)
        total = np.empty((len(levels), len(sendings)))
        routed = [i for i, s in enumerate(sendings) if not s.sends_ahead]
        ahead = [i for i, s in enumerate(sendings) if s.sends_ahead]
        if routed:
            total[:, routed] = self._sum(filling, ends, units, tuple(sendings[i] for i in routed), contended)
        if ahead:
            total[:, ahead] = self._recur(filling, ends, units, tuple(sendings[i] for i in ahead), contended)
        return total

    def _placements(self, filling: Filling, layer: int, units: Count) -> tuple[object, Count, Count]:
        """What decides a layer's tables, its distinct placements, and which of them each level has.

        Tables of all placements serve every order of filling, and dense layers each other; only where they
        would be large they hold no more than is asked for.
        """
        ffn, column, n_units = self.prices.spec.layers[layer].ffn, units[:, layer], filling.units(layer)
        rows = np.arange(n_units + 1) if n_units <= _MOST_UNITS_PRICED_WHOLE else np.unique(column)
        # Whose experts come first, and what is pinned, differs by layer.
        owner = layer if filling.unit == "experts" or any(filling.pins.of_experts(layer)) else None
        return (filling.unit, ffn, self.routing[layer], rows.tobytes(), owner), rows, np.searchsorted(rows, column)

    # -- nothing sent ahead ---------------------------------------------------------------------------

    def _sum(
        self, filling: Filling, ends: Place, units: Count, sendings: tuple[Sending, ...], contended: bool
    ) -> Seconds:
        chain = tuple(filling.device_layers), ends
        if chain not in self._chains_s:
            self._chains_s[chain] = self._chain_s(filling, ends)
        total = np.full((len(units), len(sendings)), self._chains_s[chain])
        for layer in filling.device_layers:
            kind, rows, which = self._placements(filling, layer, units)
            key = (kind, sendings)
            if key not in self._routed:
                gg, routing = filling.gg(layer, rows), self.routing[layer]
                self._routed[key] = routed_mlp_s(self.prices, layer, gg, routing, sendings, self.slowed)
            total += self._routed[key][contended][which]
        return total

    def _chain_s(self, filling: Filling, ends: Place) -> float:
        """Seconds of what no placement changes: embedding, attention, CPU layers, moves, head, sampling."""
        clock = _Clock(self.prices, np.zeros(1), ends)
        clock.run(ends, self._end("embed"))
        for layer in range(self.prices.spec.n_layers):
            place: Place = "CPU" if filling.on_cpu(layer) else "GPU"
            clock.move(place, self.step.n_tokens)
            clock.run(place, self._attention(layer))
            if place == "CPU":
                clock.run_s("CPU", self._cpu_mlp_s(layer))
        self._finish(clock, ends)
        return float(clock.end_s[0])

    # -- columns sent ahead ---------------------------------------------------------------------------

    def _recur(
        self, filling: Filling, ends: Place, units: Count, sendings: tuple[Sending, ...], contended: bool
    ) -> Seconds:
        clock = _Clock(self.prices, np.zeros((len(units), len(sendings))), ends)
        link = _Link(self.prices, clock)
        n_layers = self.prices.spec.n_layers
        costs = [
            None
            if filling.on_cpu(layer)
            else self._ahead_costs(filling, layer, units, tuple(s.ahead_of(layer) for s in sendings), contended)
            for layer in range(n_layers)
        ]
        clock.run(ends, self._end("embed"))
        link.send(costs[0])
        for layer, cost in enumerate(costs):
            following = costs[layer + 1] if layer + 1 < n_layers else None
            clock.move("CPU" if cost is None else "GPU", self.step.n_tokens)
            clock.run("CPU" if cost is None else "GPU", self._attention(layer))
            if cost is None:
                clock.run_s("CPU", self._cpu_mlp_s(layer))
                link.send(following)
            else:
                link.mlp(cost, following, self.step.n_tokens)
        self._finish(clock, ends)
        return clock.end_s

    def _ahead_costs(
        self, filling: Filling, layer: int, units: Count, ahead: tuple[int, ...], contended: bool
    ) -> AheadCosts:
        kind, rows, u = self._placements(filling, layer, units)
        key = (kind, ahead)
        if key not in self._ahead:
            gg = filling.gg(layer, rows)
            self._ahead[key] = ahead_costs(self.prices, layer, gg, self.routing[layer], ahead)
        table = self._ahead[key]
        gg_s, cg_s, cc_s, send_s = table.gg_s, table.cg_s, table.cc_s, table.send_s
        if contended and self.slowed is not None:
            cc_s, gpu_s, send_s = self.slowed.beside(cc_s, gg_s + cg_s, send_s)
            stretch = factor(gpu_s, gg_s + cg_s)
            gg_s, cg_s = gg_s * stretch, cg_s * stretch
        return AheadCosts(
            gg_s=gg_s[u],
            cg_s=cg_s[u],
            cc_s=cc_s[u],
            send_s=send_s[u],
            has_gg=table.has_gg[u],
            has_cg=table.has_cg[u],
            has_cc=table.has_cc[u],
            has_send=table.has_send[u],
        )

    # -- parts that are not MLPs ----------------------------------------------------------------------

    def _end(self, op: str) -> Work:
        spec = self.prices.spec
        if op == "head":
            return spec.head_work(self.step.batch)
        return (
            spec.small_work("embed", self.step.n_tokens)
            if op == "embed"
            else spec.small_work("sample", self.step.batch)
        )

    def _attention(self, layer: int) -> Work:
        step = self.step
        return self.prices.spec.attention_work(layer, step.n_tokens, step.kv_tokens, step.batch)

    def _cpu_mlp_s(self, layer: int) -> float:
        if layer not in self._cpu_mlps_s:
            self._cpu_mlps_s[layer] = self._whole_mlp_s(layer)
        return self._cpu_mlps_s[layer]

    def _whole_mlp_s(self, layer: int) -> float:
        every = self.prices.at(layer, np.array([self.prices.spec.layers[layer].ffn.columns]))
        return float(sum(self.prices.ffn_s("CPU", layer, n)[every[0]] for n in self.routing[layer] if n))

    def _finish(self, clock: _Clock, ends: Place) -> None:
        clock.move(ends, self.step.n_tokens)
        clock.run(ends, self._end("head"))
        clock.run(ends, self._end("sample"))


class _Clock:
    """The chain of tasks that every step has, and when each resource is free again."""

    def __init__(self, prices: Prices, start_s: Seconds, place: Place) -> None:
        self.prices = prices
        self.place: Place = place
        self.end_s = start_s
        self.free: dict[str, Seconds] = dict.fromkeys(RESOURCES, start_s)
        self.before = ""

    def run(self, place: Place, work: Work) -> None:
        """The next task of the chain, on the resource of that place."""
        self.run_s(place, self.prices.profile.time_s(place, work).seconds)

    def run_s(self, resource: str, seconds: float | Seconds) -> None:
        """The next task of the chain, of that many seconds."""
        lag_s = self.prices.lag_s(self.before, resource) if self.before else 0.0
        self.end_s = np.maximum(self.free[resource], self.end_s + lag_s) + seconds
        self.free[resource] = self.end_s
        self.before = resource

    def move(self, place: Place, n_tokens: int) -> None:
        """Copy the hidden states if the next task runs elsewhere."""
        if place != self.place:
            copier: Resource = "H2D" if place == "GPU" else "D2H"
            self.run_s(copier, self.prices.activations_s(copier, n_tokens))
            self.place = place


class _Link:
    """Sends one layer ahead through two slots, and the MLPs that use them."""

    def __init__(self, prices: Prices, clock: _Clock) -> None:
        self.prices, self.clock = prices, clock
        never = np.full_like(clock.end_s, -np.inf)
        self.slots = [never, never]  # when the slot of the next send, and of the one after it, is free
        self.arrived = never

    def send(self, cost: AheadCosts | None) -> None:
        """Send a layer's columns, where it has any to send."""
        if cost is None:
            return
        clock = self.clock
        end = np.maximum(clock.free["H2D"], self.slots[0]) + cost.send_s
        clock.free["H2D"] = _where(cost.has_send, end, clock.free["H2D"])
        self.arrived = _where(cost.has_send, end, np.full_like(end, -np.inf))
        user = end + self.prices.lag_s("H2D", "H2D")
        self.slots = [_where(cost.has_send, self.slots[1], self.slots[0]), _where(cost.has_send, user, self.slots[1])]

    def mlp(self, cost: AheadCosts, following: AheadCosts | None, n_tokens: int) -> None:
        """One layer's MLP; the next layer's columns follow the CPU's result over the link."""
        clock, lag_s, prices = self.clock, self.prices.lag_s, self.prices
        attn_s, free = clock.end_s, clock.free
        down = np.maximum(free["D2H"], attn_s + lag_s("GPU", "D2H")) + prices.activations_s("D2H", n_tokens)
        cc = np.maximum(free["CPU"], down + lag_s("D2H", "CPU")) + cost.cc_s
        gg = attn_s + lag_s("GPU", "GPU") + cost.gg_s
        gpu = _where(cost.has_gg, gg, attn_s)
        waits = np.maximum(attn_s + lag_s("GPU", "GPU"), self.arrived + lag_s("H2D", "GPU"))
        cg = np.maximum(gpu, waits) + cost.cg_s
        gpu = _where(cost.has_cg, cg, gpu)
        self.slots[1] = _where(cost.has_cg, cg + lag_s("GPU", "H2D"), self.slots[1])
        up = np.maximum(free["H2D"], cc + lag_s("CPU", "H2D")) + prices.activations_s("H2D", n_tokens)
        for name, end in (("D2H", down), ("CPU", cc), ("H2D", up)):
            free[name] = _where(cost.has_cc, end, free[name])
        self.send(following)
        own = np.where(cost.has_gg | cost.has_cg, lag_s("GPU", "GPU"), 0.0)
        ready = _where(cost.has_cc, up + lag_s("H2D", "GPU"), np.full_like(up, -np.inf))
        n_partial = cost.has_gg.astype(int) + cost.has_cg + cost.has_cc
        clock.end_s = np.maximum(gpu + own, ready) + prices.join_s(n_tokens, 3)[n_partial]
        free["GPU"] = clock.end_s


def _where(mask: Mask, yes: Seconds, no: Seconds) -> Seconds:
    return np.asarray(np.where(mask, yes, no))
