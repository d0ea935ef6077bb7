"""Micro-benchmarks through a device's own queues: MLP parts, copies, and resources working together.

Everything runs as tasks of runtime.devices, with the bodies that the executor uses, so that what is
measured is what a plan will pay.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from statistics import fmean, median
from types import MappingProxyType

import torch
from torch import Tensor

from hwmodels import work
from hwmodels.calibrate import contention, samples
from hwmodels.machine import cache_bytes, read_machine
from hwmodels.profile import COMPUTERS, Contention, Curve, Resource
from hwmodels.together import Tokens, together
from hwmodels.work import Work
from runtime import native
from runtime.activation import Activation
from runtime.devices.base import Body, Device
from runtime.ops import Piece, gated_mlp, piece_views, routed_mlp
from runtime.rounds import Case, Effort, InRounds, Progress, in_rounds
from runtime.synthetic import fill_small
from runtime.words import mlp_words, takes_words
from sim.graph import Kind, Task
from sim.model import ModelSpec

NextBody = Callable[[], Body]
"""Makes the body of a measurement's next task: each touches other weights than those before, of whatever case."""

# Of weights, which must come from memory: several times the caches of most machines, and no less than those that tell
# of more hold, if memory has so much to spare. Two pools of so many are read by turns.
_POOL_BYTES = 192 << 20
_SPARE_SHARE = 1 / 32
_LONG_S = 3e-3  # a task that long needs no other before it to warm up
_LOAD_COPY_BYTES = 4 << 20
# Experts of a call, from how many tokens each on (of fewer memory decides, and a call of many is no slower), and up to
# what share of the tokens that single ones are measured with: some have more than the mean.
_TOGETHER, _LEAST_TOKENS, _MOST_SHARE = 8, 8, 0.25
_UNEVEN = 0.5, 1.5  # how often the rarest and the most frequent are chosen, relative to the mean
_LOAD_FLOPS = 2e9  # a task in some 10 ms on one core: short beside the time that sets work together
_Load = tuple[Work, NextBody, float]
"""What a resource is kept at work with: a demand, its bodies, and seconds of one task alone."""
_Times = dict[Resource, list[float]]
LINKS: tuple[Resource, Resource] = ("H2D", "D2H")
_KIND: dict[Resource, Kind] = {"CPU": "cc", "GPU": "gg", "H2D": "send", "D2H": "act_d2h"}


def pool_bytes(spec: ModelSpec) -> int:
    """Bytes of weights of which every task takes others; a bench has up to three such pools."""
    one = max(spec.column_elements(i) * layer.ffn.columns for i, layer in enumerate(spec.layers))
    cached = min(cache_bytes(), int(read_machine().ram_bytes * _SPARE_SHARE))
    return max(_POOL_BYTES, cached, 2 * one * spec.dtype_bytes)


class MicroBench:
    """Synthetic weights and activations of a model's shapes, and timings of tasks over them."""

    def __init__(self, spec: ModelSpec, device: Device, act: Activation) -> None:
        self.spec, self.device, self.act = spec, device, act
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.layer = max(range(spec.n_layers), key=lambda i: spec.layers[i].ffn.n_experts)
        self.columns, self.width = spec.layers[self.layer].ffn.columns, spec.column_elements(self.layer)
        n_elements = pool_bytes(spec) // self.dtype.itemsize
        self.host = fill_small(device.host_slab(n_elements, self.dtype, pinned=True))
        self.resident = fill_small(device.allocate(n_elements, self.dtype, "micro-benchmark weights"))
        self._issued = 0
        self._taken: dict[int, int] = {}

    # -- tasks ----------------------------------------------------------------------------------------

    def times_s(self, tasks: Sequence[tuple[Task, Body]]) -> dict[str, list[tuple[float, float]]]:
        """Start and end of every task, by resource, of one run of independent tasks."""
        self.device.run([t for t, _ in tasks], {t.id: b for t, b in tasks}, inline_cpu=False)
        spans: dict[str, list[tuple[float, float]]] = {}
        for ticket in self.device.drain():
            spans.setdefault(ticket.task.resource, []).append((ticket.start_ns / 1e9, ticket.end_ns / 1e9))
        return spans

    def task(self, resource: Resource, demand: Work) -> Task:
        """A task of its own, depending on nothing."""
        self._issued += 1
        return Task(f"micro.{resource}.{self._issued}", _KIND[resource], resource, (demand,))

    def _curves(
        self,
        cases: Sequence[tuple[Resource, Work, NextBody]],
        effort: Effort,
        calls: Mapping[Work, Tokens] = MappingProxyType({}),
    ) -> InRounds[list[Curve]]:
        """Curves of what several resources do alone, a case after the other; calls are cases of several experts."""
        n_curves = len({(resource, demand.op) for resource, demand, _ in cases})
        times = yield from in_rounds([self._case(*case) for case in cases], effort, n_curves)
        rows: dict[tuple[Resource, work.Op], dict[Work, list[list[float]]]] = defaultdict(dict)
        for (resource, demand), rounds in times.items():
            rows[resource, demand.op][demand] = rounds
        threads, curves = {"CPU": self.device.cpu_threads}, []
        for (r, op), own in rows.items():
            found = dict(zip(own, samples(own), strict=True))  # of a round's slowness calls tell, too
            calls_s = {calls[demand]: found.pop(demand).median_s for demand in own if demand in calls}
            alone = Curve(r, op, self.spec.dtype, threads.get(r, 0), "measured", tuple(found.values()))
            curves.append(together(alone, calls_s))
        return curves

    def _case(self, resource: Resource, demand: Work, next_body: NextBody) -> Case[tuple[Resource, Work]]:
        """Each visit runs three tasks over different weights and drops the first; of long ones it runs one."""
        longest_s = 0.0

        def visit() -> Iterator[tuple[tuple[Resource, Work], float]]:
            nonlocal longest_s
            n = 1 if longest_s > _LONG_S else 3
            spans = self.times_s([(self.task(resource, demand), next_body()) for _ in range(n)])[resource]
            for start, end in spans[-2:] if n > 1 else spans:
                longest_s = max(longest_s, end - start)
                yield (resource, demand), end - start

        return visit

    # -- MLP parts ------------------------------------------------------------------------------------

    def ffn_curves(
        self, resources: Sequence[Resource], n_tokens: Sequence[int], columns: Sequence[int], effort: Effort
    ) -> InRounds[list[Curve]]:
        """Times of MLP parts of several widths for several token counts; of experts as parts of a layer's call."""
        cases = [
            (r, self.spec.ffn_work(self.layer, n, c), self._ffn_bodies(r, n, c))
            for r in resources
            for c in columns
            for n in n_tokens
        ]
        calls: dict[Work, Tokens] = {}
        for rows in self._calls(n_tokens):
            tokens = tuple(len(own) for own in rows)
            works = [self.spec.ffn_work(self.layer, n, max(columns)) for n in tokens]
            demand = Work(
                "ffn",
                self.spec.dtype,
                sum(tokens),
                sum(w.flops for w in works),
                sum(w.weight_bytes for w in works),
                sum(w.io_bytes for w in works),
            )
            calls[demand] = tokens
            cases += [(r, demand, self._call_bodies(r, rows, max(columns))) for r in resources]
        return (yield from self._curves(cases, effort, calls))

    def _calls(self, n_tokens: Sequence[int]) -> Iterator[list[Tensor]]:
        """Rows of the experts of calls of several, of as many tokens each in the mean as a power of two tells.

        As a router chooses them for all tokens of a step, some experts more often than others. None for dense MLPs, and
        for experts so large that several do not fit into the pool: those find nothing in caches either way.
        """
        ffn = self.spec.layers[self.layer].ffn
        n_experts = min(ffn.n_experts, max(_TOGETHER, 2 * ffn.top_k))
        size = self.width * self.columns
        if n_experts < 2 * ffn.top_k or 2 * n_experts * size > self.host.numel():
            return
        generator = torch.Generator().manual_seed(0)
        for n in (n for n in n_tokens if n & (n - 1) == 0 and _LEAST_TOKENS <= n <= _MOST_SHARE * max(n_tokens)):
            often = torch.linspace(*_UNEVEN, n_experts).expand(n * n_experts // ffn.top_k, n_experts)
            chosen = torch.multinomial(often, ffn.top_k, generator=generator)
            rows = [(chosen == expert).any(dim=1).nonzero().flatten() for expert in range(n_experts)]
            yield [own for own in rows if len(own)]

    def _call_bodies(self, resource: Resource, rows: Sequence[Tensor], columns: int) -> NextBody:
        pool = self.host if resource == "CPU" else self.resident
        n_rows = sum(len(own) for own in rows) // self.spec.layers[self.layer].ffn.top_k
        x = torch.randn(n_rows, self.spec.d_model, dtype=self.dtype).to(pool.device)
        placed = [own.to(pool.device) for own in rows]
        weights = [torch.ones(len(own), dtype=x.dtype, device=x.device) for own in rows]
        size = self.width * columns

        def next_body() -> Body:
            pieces = [[piece_views(self._unread(pool, size), self.spec.d_model, columns)] for _ in rows]
            with self.device.driving():
                return self._experts(x, list(zip(placed, weights, pieces, strict=True)), resource)

        return next_body

    def _ffn_bodies(self, resource: Resource, n_tokens: int, columns: int) -> NextBody:
        pool = self.host if resource == "CPU" else self.resident
        x = torch.randn(n_tokens, self.spec.d_model, dtype=self.dtype).to(pool.device)
        size = self.width * columns

        def next_body() -> Body:
            pieces = [piece_views(self._unread(pool, size), self.spec.d_model, columns)]
            with self.device.driving():  # words name the number of threads that drive the device
                return self._mlp(x, pieces, resource)

        return next_body

    def _unread(self, pool: Tensor, n: int) -> Tensor:
        """The n elements of a pool that were taken longest ago: no cache holds them, whichever case took the last."""
        stride = (max(n, pool.numel() // 64) + 63) // 64 * 64  # the largest task takes one half, then the other
        first = self._taken.get(pool.data_ptr(), 0)
        if first + n > pool.numel():
            first = 0
        self._taken[pool.data_ptr()] = first + stride
        return pool[first : first + n]

    def _mlp(self, x: Tensor, pieces: Sequence[Piece], resource: Resource) -> Body:
        if self.spec.layers[self.layer].ffn.is_moe:
            rows = torch.arange(x.shape[0], device=x.device)
            weights = torch.ones(x.shape[0], dtype=x.dtype, device=x.device)
            return self._experts(x, [(rows, weights, pieces)], resource)
        if takes_words(self.device, self.act, x, self.spec.dtype):
            y, on_host = torch.empty_like(x), resource == "CPU"
            return mlp_words(self.device, x, y, [(None, None, pieces)], self.act, on_host)

        def compute() -> None:
            gated_mlp(x, pieces, self.act)

        return compute

    def _experts(
        self, x: Tensor, experts: Sequence[tuple[Tensor, Tensor, Sequence[Piece]]], resource: Resource
    ) -> Body:
        if takes_words(self.device, self.act, x, self.spec.dtype):
            own: list[native.Expert] = [(rows, weights.float(), pieces) for rows, weights, pieces in experts]
            return mlp_words(self.device, x, torch.empty_like(x), own, self.act, on_host=resource == "CPU")

        def compute() -> None:
            routed_mlp(x, experts, self.act)

        return compute

    # -- copies ---------------------------------------------------------------------------------------

    def copy_curves(
        self, pinned_sizes: Sequence[int], pageable_sizes: Sequence[int], effort: Effort
    ) -> InRounds[list[Curve]]:
        """Times of copies of several sizes to and from the device, from page-locked and ordinary host memory."""
        n_ordinary = min(self.host.numel(), _POOL_BYTES // self.dtype.itemsize)  # a link is slower than a cache
        ordinary = fill_small(torch.empty(n_ordinary, dtype=self.dtype))
        cases = []
        for pinned, sizes in ((True, pinned_sizes), (False, pageable_sizes)):
            for resource in LINKS:
                for n in (n_bytes // self.dtype.itemsize for n_bytes in sizes):
                    demand = work.copy(n * self.dtype.itemsize, self.spec.dtype, pinned)
                    host = self.host if pinned else ordinary
                    cases.append((resource, demand, self._copy_bodies(resource, host, n, pinned)))
        return (yield from self._curves(cases, effort))

    def _copy_bodies(self, resource: Resource, host: Tensor, n: int, pinned: bool) -> NextBody:
        def next_body() -> Body:
            near, far = self._unread(host, n), self.resident[:n]
            target, source = (far, near) if resource == "H2D" else (near, far)
            return self.device.copying([(target, source)], pinned)

        return next_body

    # -- yardstick ------------------------------------------------------------------------------------

    def stream_curves(self, effort: Effort) -> InRounds[list[Curve]]:
        """The yardstick: reading and copying arrays far larger than any cache, on CPU and GPU."""
        cases: list[tuple[Resource, Work, NextBody]] = []
        pools: dict[Resource, Tensor] = {"CPU": self.host, "GPU": self.resident}
        for resource, pool in pools.items():
            halves = pool[: pool.numel() // 128 * 128].view(torch.float32).chunk(2)
            n_bytes = float(halves[0].nbytes)
            read = Work("stream_read", self.spec.dtype, 1, 0.0, 0.0, n_bytes)
            both = Work("stream_copy", self.spec.dtype, 1, 0.0, 0.0, 2 * n_bytes)
            cases += [(resource, read, _reading(*halves)), (resource, both, _copying(*halves))]
        return (yield from self._curves(cases, effort))

    # -- together -------------------------------------------------------------------------------------

    def contention(
        self, sets: Sequence[tuple[Resource, ...]], n_tokens: int, slice_s: float, n_rounds: int
    ) -> InRounds[list[Contention]]:
        """Rates of resources working at once, each set against running alone in the same round.

        Every set is measured with MLP parts of one token, which read, and of n_tokens, which compute; it works for
        slice_s in each of n_rounds.
        """
        members: list[Resource] = sorted({r for active in sets for r in active})
        kinds = {n: {r: self._load(r, n) for r in members} for n in (1, n_tokens)}
        alone: dict[int, _Times] = {n: {r: [] for r in members} for n in kinds}
        together: dict[int, list[_Times]] = {n: [{r: [] for r in active} for active in sets] for n in kinds}
        progress = Progress(Effort(n_rounds, n_rounds, math.inf))
        for _ in range(n_rounds):
            progress.begin()
            for n, loads in kinds.items():
                for r in members:
                    alone[n][r].append(self._together((r,), loads, slice_s)[r])
                for found in together[n]:
                    for name, each_s in self._together(tuple(found), loads, slice_s).items():
                        found[name].append(each_s)
            yield progress.end()
        return [
            contention(alone[n], found, tuple(r for r in found if r in COMPUTERS and n > 1))
            for n in kinds
            for found in together[n]
        ]

    def _together(
        self, active: Sequence[Resource], loads: Mapping[Resource, _Load], seconds: float
    ) -> dict[Resource, float]:
        """Mean task time of each resource while all of them are at work."""
        tasks: list[tuple[Task, Body]] = []
        for resource in active:
            demand, next_body, each_s = loads[resource]
            n = max(4, int(seconds / each_s))
            tasks += [(self.task(resource, demand), next_body()) for _ in range(n)]
        # Inline tasks last: the other queues must be at work when the calling thread starts.
        tasks.sort(key=lambda pair: pair[0].resource == "GPU")
        spans = self.times_s(tasks)
        first = max(s[0][0] for s in spans.values())
        last = min(s[-1][1] for s in spans.values())
        inside: dict[Resource, float] = {}
        for resource in active:
            whole = [e - s for s, e in spans[resource] if s >= first and e <= last]
            inside[resource] = fmean(whole or [e - s for s, e in spans[resource]])
        return inside

    def _load(self, resource: Resource, n_tokens: int) -> _Load:
        if resource in ("CPU", "GPU"):
            columns = max(1, min(self.columns, int(_LOAD_FLOPS / self.spec.ffn_work(self.layer, n_tokens, 1).flops)))
            demand = self.spec.ffn_work(self.layer, n_tokens, columns)
            bodies = self._ffn_bodies(resource, n_tokens, columns)
        else:
            n = _LOAD_COPY_BYTES // self.dtype.itemsize
            demand = work.copy(n * self.dtype.itemsize, self.spec.dtype)
            bodies = self._copy_bodies(resource, self.host, n, pinned=True)
        _, *kept = self.times_s([(self.task(resource, demand), bodies()) for _ in range(4)])[resource]
        return demand, bodies, median(end - start for start, end in kept)


def _reading(one: Tensor, other: Tensor) -> NextBody:
    totals = torch.empty((), dtype=one.dtype, device=one.device)

    def read(of: Tensor) -> None:
        torch.sum(of, dim=0, out=totals)

    turns = cycle((one, other))
    return lambda: partial(read, next(turns))


def _copying(one: Tensor, other: Tensor) -> NextBody:
    def copy(target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    turns = cycle(((one, other), (other, one)))
    return lambda: partial(copy, *next(turns))
