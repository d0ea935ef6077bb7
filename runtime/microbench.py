"""Micro-benchmarks through a device's own queues: MLP parts, copies, and resources working together.

Everything runs as tasks of runtime.devices, with the bodies that the executor uses, so that what is
measured is what a plan will pay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from hwmodels import work
from hwmodels.calibrate import contention, group_medians, summarise
from hwmodels.profile import Contention, Curve, Resource, Sample
from hwmodels.work import Work
from runtime.devices.base import Body, Device
from runtime.ops import Activation, Piece, gated_mlp, piece_views, routed_mlp
from runtime.synthetic import fill_small
from sim.graph import Kind, Task
from sim.model import ModelSpec

BodyOf = Callable[[int], Body]
"""The body of a measurement's i-th task: each touches other weights than the one before."""

_POOL_BYTES = 192 << 20  # several times any cache: weights must come from memory
_ROUNDS = 3
_Load = tuple[Work, BodyOf, float]
"""What a resource is kept at work with: a demand, its bodies, and seconds of one task alone."""
_KIND: dict[Resource, Kind] = {"CPU": "cc", "GPU": "gg", "H2D": "send", "D2H": "act_d2h"}


class MicroBench:
    """Synthetic weights and activations of a model's shapes, and timings of tasks over them."""

    def __init__(self, spec: ModelSpec, device: Device, act: Activation, repetitions: int) -> None:
        self.spec, self.device, self.act, self.repetitions = spec, device, act, repetitions
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.layer = max(range(spec.n_layers), key=lambda i: spec.layers[i].ffn.n_experts)
        self.columns = spec.layers[self.layer].ffn.columns
        one = 3 * spec.d_model * self.columns
        n_elements = max(_POOL_BYTES // self.dtype.itemsize, 2 * one)
        self.host = fill_small(device.host_slab(n_elements, self.dtype, pinned=True))
        self.resident = fill_small(device.allocate(n_elements, self.dtype, "micro-benchmark weights"))
        self._issued = 0

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

    def _samples(self, resource: Resource, cases: Sequence[tuple[Work, BodyOf]]) -> tuple[Sample, ...]:
        """Samples of several works. Rounds over all of them, so that a disturbance touches one round of each."""
        times: list[list[float]] = [[] for _ in cases]
        for number in range(self.repetitions):
            for seconds, (demand, body_of) in zip(times, cases, strict=True):
                tasks = [(self.task(resource, demand), body_of(3 * number + i)) for i in range(3)]
                _, *kept = self.times_s(tasks)[resource]  # the first one warms up
                seconds += [end - start for start, end in kept]
        return tuple(summarise(demand, seconds) for seconds, (demand, _) in zip(times, cases, strict=True))

    # -- MLP parts ------------------------------------------------------------------------------------

    def ffn_curve(self, resource: Resource, n_tokens: Sequence[int], columns: Sequence[int]) -> Curve:
        """Time of MLP parts of several widths for several token counts."""
        cases = [
            (self.spec.ffn_work(self.layer, n, c), self._ffn_bodies(resource, n, c)) for c in columns for n in n_tokens
        ]
        threads = self.device.cpu_threads if resource == "CPU" else 0
        return Curve(resource, "ffn", self.spec.dtype, threads, "measured", self._samples(resource, cases))

    def _ffn_bodies(self, resource: Resource, n_tokens: int, columns: int) -> BodyOf:
        pool = self.host if resource == "CPU" else self.resident
        x = torch.randn(n_tokens, self.spec.d_model, dtype=self.dtype).to(pool.device)
        size = 3 * self.spec.d_model * columns
        stride = max(size, pool.numel() // 64 // 64 * 64)

        def body_of(i: int) -> Body:
            first = (i * stride) % (pool.numel() - size + 1)
            pieces = [piece_views(pool[first : first + size], self.spec.d_model, columns)]
            return lambda: self._mlp(x, pieces)

        return body_of

    def _mlp(self, x: Tensor, pieces: Sequence[Piece]) -> None:
        if not self.spec.layers[self.layer].ffn.is_moe:
            gated_mlp(x, pieces, self.act)
            return
        rows = torch.arange(x.shape[0], device=x.device)
        routed_mlp(x, [(rows, torch.ones(x.shape[0], dtype=x.dtype, device=x.device), pieces)], self.act)

    # -- copies ---------------------------------------------------------------------------------------

    def copy_curve(self, resource: Resource, sizes: Sequence[int], pinned: bool) -> Curve:
        """Time of copies of several sizes on H2D or D2H, from page-locked or ordinary host memory."""
        host = self.host if pinned else fill_small(torch.empty_like(self.host, device="cpu"))
        cases = []
        for n_bytes in sizes:
            n = n_bytes // self.dtype.itemsize
            demand = work.copy(n * self.dtype.itemsize, self.spec.dtype, pinned)
            cases.append((demand, self._copy_bodies(resource, host, n, pinned)))
        op: work.Op = "pinned" if pinned else "pageable"
        return Curve(resource, op, self.spec.dtype, 0, "measured", self._samples(resource, cases))

    def _copy_bodies(self, resource: Resource, host: Tensor, n: int, pinned: bool) -> BodyOf:
        def body_of(i: int) -> Body:
            first = (i * n) % (host.numel() - n + 1)
            near, far = host[first : first + n], self.resident[:n]
            target, source = (far, near) if resource == "H2D" else (near, far)
            return lambda: self.device.copy([(target, source)], pinned)

        return body_of

    # -- together -------------------------------------------------------------------------------------

    def contention(self, sets: Sequence[tuple[Resource, ...]], seconds: float) -> list[Contention]:
        """Rates of resources working at once on what decode asks of them, each set against running alone."""
        members: list[Resource] = sorted({r for active in sets for r in active})
        loads = {r: self._load(r) for r in members}
        alone: dict[str, list[float]] = {r: [] for r in members}
        together: list[dict[str, list[float]]] = [{r: [] for r in active} for active in sets]
        for _ in range(_ROUNDS):
            for r in members:
                alone[r].append(self._together((r,), loads, seconds / _ROUNDS)[r])
            for active, found in zip(sets, together, strict=True):
                for name, each_s in self._together(active, loads, seconds / _ROUNDS).items():
                    found[name].append(each_s)
        alone_s = {r: median(values) for r, values in alone.items()}
        return [contention(alone_s, {r: median(values) for r, values in found.items()}) for found in together]

    def _together(
        self, active: Sequence[Resource], loads: Mapping[Resource, _Load], seconds: float
    ) -> dict[str, float]:
        """Median task time of each resource while all of them are at work."""
        tasks: list[tuple[Task, Body]] = []
        for resource in active:
            demand, body_of, each_s = loads[resource]
            n = max(4, int(seconds / each_s))
            tasks += [(self.task(resource, demand), body_of(i)) for i in range(n)]
        # Inline tasks last: the other queues must be at work when the calling thread starts.
        tasks.sort(key=lambda pair: pair[0].resource == "GPU")
        spans = self.times_s(tasks)
        first = max(s[0][0] for s in spans.values())
        last = min(s[-1][1] for s in spans.values())
        inside = [(r, e - s) for r, rows in spans.items() for s, e in rows if s >= first and e <= last]
        return group_medians(inside)

    def _load(self, resource: Resource) -> _Load:
        if resource in ("CPU", "GPU"):
            columns = self.columns
            demand, bodies = self.spec.ffn_work(self.layer, 1, columns), self._ffn_bodies(resource, 1, columns)
        else:
            n = (4 << 20) // self.dtype.itemsize
            demand = work.copy(n * self.dtype.itemsize, self.spec.dtype)
            bodies = self._copy_bodies(resource, self.host, n, pinned=True)
        return demand, bodies, self._samples(resource, [(demand, bodies)])[0].median_s
