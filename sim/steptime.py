"""Seconds of steps for many placements and ways of sending at once, equal to the engine without contention.

A layer that sends nothing ahead leaves every queue empty at its join, so such steps are a sum over layers.
Sends ahead couple neighbouring layers: for them the engine's recurrence (start = max of what is waited for)
runs over the layers once, each number in it an array over candidates and steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hwmodels.profile import RESOURCES, Move, Resource
from hwmodels.work import APART, Work, apart
from sim.layercost import AheadCosts, Count, Mask, Prices, Seconds, Sending, Slowdown, ahead_costs, contended
from sim.placement import Filling
from sim.plan import Place
from sim.tables import RoutedTable, Shares, Single, Used, by_table, used
from sim.workload import Routing, Step

_MOST_AT_ONCE = 1 << 14
"""Numbers in an array of the recurrence: more would not stay in a core's cache, fewer spend their time in calls."""


@dataclass
class StepTimes:
    """Steps of one size of one model on one machine, with their routing; remembers the tables of its layers.

    steps     each with how often it counts
    routing   [step][layer]
    slowed    contention as an estimate; None: nothing slows anything
    """

    prices: Prices
    steps: tuple[tuple[float, Step], ...]
    routing: tuple[tuple[Routing, ...], ...]
    slowed: Slowdown | None = None

    def __post_init__(self) -> None:
        self._counts = np.array([count for count, _ in self.steps])
        self._gg: dict[object, Count] = {}
        self._used: dict[object, tuple[Used, ...]] = {}
        self._tables: dict[object, list[Shares | Single]] = {}
        self._routed: dict[object, RoutedTable] = {}
        self._ahead: dict[object, AheadCosts] = {}
        self._beside_s: dict[object, Seconds] = {}
        self._chains_s: dict[object, float] = {}
        self._cpu_mlps_s: dict[int, Seconds] = {}

    @property
    def n_tokens(self) -> int:
        """Tokens of each of the steps."""
        return self.steps[0][1].n_tokens

    def seconds(self, filling: Filling, ends: Place, levels: Count, sendings: Sequence[Sending]) -> Seconds:
        """Seconds of all steps, [alone or contended, level, sending], for the first `level` units on the device.

        The first are exact without contention; the second, if anything slows anything, an estimate with it.
        """
        units = filling.per_layer(levels)
        total = np.empty((1 if self.slowed is None else 2, len(levels), len(sendings)))
        routed = [i for i, s in enumerate(sendings) if not s.sends_ahead]
        ahead = [i for i, s in enumerate(sendings) if s.sends_ahead]
        if routed:
            total[:, :, routed] = self._sum(filling, ends, units, tuple(sendings[i] for i in routed))
        if ahead:
            total[:, :, ahead] = self._recur_all(filling, ends, units, tuple(sendings[i] for i in ahead))
        return total

    # -- what steps use of a layer --------------------------------------------------------------------

    def _kind(self, filling: Filling, layer: int) -> object:
        """What decides a layer's tables: dense layers share them, whatever the order of filling."""
        # Whose experts come first, and what is pinned, differs by layer.
        owner = layer if filling.unit == "experts" or any(filling.pins.of_experts(layer)) else None
        ffn, routing = self.prices.spec.layers[layer].ffn, tuple(step[layer] for step in self.routing)
        return filling.unit, ffn, routing, owner

    def _resident(self, filling: Filling, layer: int, kind: object) -> Count:
        """Resident columns by units of a layer, [u, expert]."""
        if kind not in self._gg:
            self._gg[kind] = filling.gg(layer)
        return self._gg[kind]

    def _uses(self, filling: Filling, layer: int, kind: object) -> tuple[Used, ...]:
        """What each step uses of a layer."""
        if kind not in self._used:
            gg, columns = self._resident(filling, layer, kind), self.prices.spec.layers[layer].ffn.columns
            alike = {step[layer]: used(gg, step[layer], columns) for step in self.routing}
            self._used[kind] = tuple(alike[step[layer]] for step in self.routing)
        return self._used[kind]

    # -- nothing sent ahead ---------------------------------------------------------------------------

    def _sum(self, filling: Filling, ends: Place, units: Count, sendings: tuple[Sending, ...]) -> Seconds:
        chain = tuple(filling.device_layers), ends
        if chain not in self._chains_s:
            self._chains_s[chain] = float(self._counts @ self._chain_s(filling, ends))
        total = np.full((1 if self.slowed is None else 2, len(units), len(sendings)), self._chains_s[chain])
        shared: dict[int, tuple[RoutedTable, Seconds]] = {}
        for layer in filling.device_layers:
            for part in self._parts(filling, layer):
                table = self._table(layer, part, sendings)
                if isinstance(part, Single):
                    total += part.count * table.rows(part.of.row[units[:, layer]])
                elif id(table) in shared:
                    shared[id(table)][1][:] += part.count[units[:, layer]]
                else:
                    shared[id(table)] = table, part.count[units[:, layer]]
        for table, count in shared.values():
            total += count @ table.whole()
        return total

    def _parts(self, filling: Filling, layer: int) -> list[Shares | Single]:
        kind = self._kind(filling, layer)
        if kind not in self._tables:
            uses = self._uses(filling, layer, kind)
            self._tables[kind] = by_table(list(zip(self._counts.tolist(), uses, strict=True)))
        return self._tables[kind]

    def _table(self, layer: int, part: Shares | Single, sendings: tuple[Sending, ...]) -> RoutedTable:
        key = self.prices.spec.layers[layer].ffn, part.of.key, sendings
        if key not in self._routed:
            self._routed[key] = RoutedTable(self.prices, layer, part.of, sendings, self.slowed)
        return self._routed[key]

    def _chain_s(self, filling: Filling, ends: Place) -> Seconds:
        """Seconds of what no placement changes: embedding, attention, CPU layers, moves, head, sampling; [step]."""
        every = slice(None)
        clock = _Clock(self.prices, np.zeros((len(self.steps), 1, 1)), ends)
        alone = ends == "CPU" and not filling.device_layers
        clock.run_s(ends, self._end_s(ends, "embed", every, alone))
        for layer in range(self.prices.spec.n_layers):
            place: Place = "CPU" if filling.on_cpu(layer) else "GPU"
            clock.move(place, self.n_tokens)
            clock.run_s(place, self._layer_s(place, layer, every, alone))
            if place == "CPU":
                clock.run_s("CPU", self._cpu_mlp_s(layer, every))
        self._finish(clock, ends, every, alone)
        return clock.end_s[:, 0, 0]

    # -- columns sent ahead ---------------------------------------------------------------------------

    def _recur_all(self, filling: Filling, ends: Place, units: Count, sendings: tuple[Sending, ...]) -> Seconds:
        """The recurrence over a few steps at once."""
        n_each = max(1, _MOST_AT_ONCE // (units.shape[0] * len(sendings) * (1 if self.slowed is None else 2)))
        total = np.zeros((1 if self.slowed is None else 2, len(units), len(sendings)))
        for first in range(0, len(self.steps), n_each):
            some = slice(first, first + n_each)
            total += np.tensordot(self._recur(filling, ends, units, sendings, some), self._counts[some], (1, 0))
        return total

    def _recur(
        self, filling: Filling, ends: Place, units: Count, sendings: tuple[Sending, ...], some: slice
    ) -> Seconds:
        """Seconds of some of the steps, [alone or contended, step, level, sending]."""
        shape = 1 if self.slowed is None else 2, len(self._counts[some]), len(units), len(sendings)
        clock = _Clock(self.prices, np.zeros(shape), ends)
        link = _Link(self.prices, clock)
        n_layers = self.prices.spec.n_layers
        costs = [
            None
            if filling.on_cpu(layer)
            else self._ahead_costs(filling, layer, tuple(s.ahead_of(layer) for s in sendings)).at(units[:, layer], some)
            for layer in range(n_layers)
        ]
        clock.run_s(ends, self._end_s(ends, "embed", some, alone=False))
        link.send(costs[0])
        for layer, cost in enumerate(costs):
            following = costs[layer + 1] if layer + 1 < n_layers else None
            place: Place = "CPU" if cost is None else "GPU"
            clock.move(place, self.n_tokens)
            clock.run_s(place, self._layer_s(place, layer, some, alone=False))
            if cost is None:
                clock.run_s("CPU", self._cpu_mlp_s(layer, some))
                link.send(following)
            else:
                link.mlp(cost, following, self.n_tokens)
        self._finish(clock, ends, some, alone=False)
        return clock.end_s

    def _ahead_costs(self, filling: Filling, layer: int, ahead: tuple[int, ...]) -> AheadCosts:
        kind = self._kind(filling, layer)
        key = kind, ahead
        if key not in self._ahead:
            gg, uses = self._resident(filling, layer, kind), self._uses(filling, layer, kind)
            alone = ahead_costs(self.prices, layer, gg, [(use.gg, use.tokens, use.row) for use in uses], ahead)
            self._ahead[key] = alone if self.slowed is None else contended(alone, self.slowed)
        return self._ahead[key]

    # -- parts that are not MLPs ----------------------------------------------------------------------

    def _end_s(self, place: Place, op: str, some: slice, alone: bool) -> Seconds:
        """Seconds of embedding, head or sampling, [step, 1, 1]; alone: in a plan without the device."""
        key = place, op, alone
        if key not in self._beside_s:
            self._beside_s[key] = self._each_s(place, [self._end(op, step) for _, step in self.steps], alone)
        return self._beside_s[key][some]

    def _end(self, op: str, step: Step) -> Work:
        spec = self.prices.spec
        if op == "head":
            return spec.head_work(step.batch, step.n_tokens)
        return spec.small_work("embed", step.n_tokens) if op == "embed" else spec.small_work("sample", step.batch)

    def _layer_s(self, place: Place, layer: int, some: slice, alone: bool) -> Seconds:
        """Seconds of what a layer does beside its MLP, [step, 1, 1]; alone: in a plan without the device."""
        spec = self.prices.spec
        key = place, spec.layers[layer], alone
        if key not in self._beside_s:
            steps = [step for _, step in self.steps]
            works = [spec.attention_work(layer, s.n_tokens, s.kv_tokens, s.batch) for s in steps]
            self._beside_s[key] = self._each_s(place, works, alone)
        return self._beside_s[key][some]

    def _each_s(self, place: Place, works: list[Work], alone: bool) -> Seconds:
        if place == "CPU" and self.n_tokens == 1 and not alone:
            works = [apart(work) if work.op in APART else work for work in works]
        return np.array([self.prices.profile.time_s(place, work).seconds for work in works])[:, None, None]

    def _cpu_mlp_s(self, layer: int, some: slice) -> Seconds:
        """Seconds of a layer's whole MLP on the CPU, [step, 1, 1]."""
        if layer not in self._cpu_mlps_s:
            every = self.prices.at(layer, np.array([self.prices.spec.layers[layer].ffn.columns]))
            each = [
                float(sum(self.prices.ffn_s("CPU", layer, n)[every[0]] for n in step[layer] if n))
                for step in self.routing
            ]
            self._cpu_mlps_s[layer] = np.array(each)[:, None, None]
        return self._cpu_mlps_s[layer][some]

    def _finish(self, clock: _Clock, ends: Place, some: slice, alone: bool) -> None:
        clock.move(ends, self.n_tokens)
        clock.run_s(ends, self._end_s(ends, "head", some, alone))
        clock.run_s(ends, self._end_s(ends, "sample", some, alone))


class _Clock:
    """The chain of tasks that every step has, and when each resource is free again."""

    def __init__(self, prices: Prices, start_s: Seconds, place: Place) -> None:
        self.prices = prices
        self.place: Place = place
        self.end_s = start_s
        self.free: dict[str, Seconds] = dict.fromkeys(RESOURCES, start_s)
        self.before = ""
        self.moved: Move | None = None

    def run_s(self, resource: str, seconds: float | Seconds) -> None:
        """The next task of the chain, on that resource, of that many seconds."""
        lag_s = self.prices.lag_s(self.before, resource) if self.before else 0.0
        if self.moved is not None:
            lag_s, self.moved = self.moved.after_s, None
        self._run_s(resource, seconds, lag_s)

    def _run_s(self, resource: str, seconds: float | Seconds, lag_s: float) -> None:
        self.end_s = np.maximum(self.free[resource], self.end_s + lag_s) + seconds
        self.free[resource] = self.end_s
        self.before = resource

    def move(self, place: Place, n_tokens: int) -> None:
        """Copy the hidden states if the next task runs elsewhere."""
        if place != self.place:
            copier: Resource = "H2D" if place == "GPU" else "D2H"
            seconds = self.prices.activations_s(copier, n_tokens)
            self.moved = next((move for move in self.prices.profile.moves if move.to == place), None)
            lag_s = self.prices.lag_s(self.before, copier) if self.moved is None else self.moved.before_s
            self._run_s(copier, seconds, lag_s)
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
        ready = _where(cost.has_cc, up + lag_s("H2D", "GPU"), np.full_like(up, -np.inf))
        clock.end_s = np.maximum(gpu + cost.own_s, ready) + cost.join_s
        free["GPU"] = clock.end_s


def _where(mask: Mask, yes: Seconds, no: Seconds) -> Seconds:
    return np.asarray(np.where(mask, yes, no))
