"""From a plan to tasks: the one place where dispatch is decided, used by simulator and runtime alike.

A step compiles layer by layer, because an MoE layer's routing is known only after its router ran. The
simulator calls `compile_step` with recorded or sampled routing; the runtime calls the same
StepCompiler layer by layer with the routing that happened. Equal inputs give equal graphs.

One layer, overlapping, in issue order (every resource works in this order):

    attn            GPU   norms, attention, router
    act_d2h         D2H   activations for the CPU
    cc              CPU   host columns that the CPU computes
    evict send      D2H   experts that leave the cache, where that writes back, and those that replace them
    send, send      H2D   columns sent after the router, up to n_slots at once
    gg              GPU   resident columns, and experts in the cache
    cg (send cg)*   GPU   sent columns, each followed by the send that reuses its slot
    act_h2d         H2D   the CPU's partial result
    send (ahead)    H2D   columns of the next layer on the device that need no router
    join            GPU   sum of partial results

A serial tier issues device parts, sent parts and the CPU's part one after the other, each waiting for
the one before, and sends nothing before the router has run. A layer that lives on the CPU is one cc, or where
the tier offloads it act_h2d, the device's tasks of such a tier, act_d2h.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from hwmodels import work
from hwmodels.profile import Resource
from sim.caching import NO_USE, CacheState, Fetch
from sim.graph import Kind, Part, Task, TaskGraph, graph
from sim.model import ModelSpec
from sim.plan import Place, Plan, Tier, caches_layer
from sim.workload import Routing, RoutingOf, Step


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Who computes which columns of a layer in this step."""

    gg: tuple[Part, ...]
    ahead: tuple[Part, ...]
    routed: tuple[Part, ...]
    cc: tuple[Part, ...]


def dispatch(
    columns: int, gg: tuple[int, ...], tier: Tier, layer: int, routing: Routing, cached: Collection[int] = ()
) -> Dispatch:
    """Split every expert that has tokens: [0, gg) GG, then columns that the tier sends (CG), the rest CC.

    Columns sent ahead are sent for every expert (the router has not run), but computed only for
    experts with tokens; a part with n_tokens 0 is sent and not computed. Of experts in the cache only
    the GG part is split off.
    """
    parts: tuple[list[Part], ...] = ([], [], [], [])
    for expert, n_tokens in enumerate(routing):
        resident = gg[expert]
        sent = min(resident + tier.ahead[layer], columns)
        if n_tokens and resident:
            parts[0].append(Part(expert, 0, resident, n_tokens))
        if expert in cached:
            continue
        if sent > resident:
            parts[1].append(Part(expert, resident, sent, n_tokens))
        if n_tokens and columns > sent:
            stop = _routed_stop(tier, sent, columns, n_tokens)
            if stop > sent:
                parts[2].append(Part(expert, sent, stop, n_tokens))
            if columns > stop:
                parts[3].append(Part(expert, stop, columns, n_tokens))
    return Dispatch(*(tuple(p) for p in parts))


def _routed_stop(tier: Tier, start: int, columns: int, n_tokens: int) -> int:
    """Where the columns that are sent after the router end, for an expert with n_tokens."""
    if tier.stream_min_tokens is None or n_tokens < tier.stream_min_tokens:
        return start
    return columns if tier.stream_columns is None else min(start + tier.stream_columns, columns)


@dataclass
class StepCompiler:
    """Compiles one step in execution order: begin, layer 0 .. n-1, end. Holds what tasks depend on.

    cache is what earlier steps left in the expert cache, and advances with this one; by default what the
    plan begins with.
    """

    spec: ModelSpec
    plan: Plan
    step: Step
    cache: CacheState | None = None
    tier: Tier = field(init=False)
    _prev: str = field(init=False, default="")
    _slot_user: list[str] = field(init=False)
    _next_slot: int = field(init=False, default=0)
    _ahead: dict[int, tuple[str, int]] = field(init=False, default_factory=dict)
    _cache_user: dict[int, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.tier = self.plan.tier(self.step.n_tokens)
        self._slot_user = [""] * self.tier.n_slots
        if self.cache is None and self.plan.cache is not None:
            self.cache = CacheState.of(self.spec, self.plan)

    # -- parts of a step ------------------------------------------------------------------------------

    def begin(self) -> list[Task]:
        """Embedding, and the first columns that are sent ahead."""
        embed = self._end_task("embed", self._on(self.plan.ends, self.spec.small_work("embed", self.step.n_tokens)))
        return [embed, *self._send_ahead(-1)]

    def layer(self, layer: int, routing: Routing) -> list[Task]:
        """Tasks of one layer for the tokens that its router sent to each expert."""
        return [*self.attention(layer), *self.mlp(layer, routing)]

    def attention(self, layer: int) -> list[Task]:
        """Everything in a layer before its MLP, and a copy of the hidden state where the place changes."""
        place = self.plan.layers[layer].rest
        before = self.plan.ends if layer == 0 else self.plan.layers[layer - 1].rest
        tasks = self._move(layer, before, place)
        attention = self.spec.attention_work(layer, self.step.n_tokens, self.step.kv_tokens, self.step.batch)
        attn = self._task("attn", layer, place, (self._on(place, attention),), (self._prev,))
        self._prev = attn.id
        return [*tasks, attn]

    def mlp(self, layer: int, routing: Routing) -> list[Task]:
        """The MLP of a layer: who computes what is decided here."""
        part = self.plan.layers[layer]
        if part.rest == "CPU":
            return self._mlp_on_cpu(layer, routing)
        columns, use = self.spec.layers[layer].ffn.columns, NO_USE
        if self.cache is not None and caches_layer(self.plan, self.spec, layer):
            use = self.cache.use(layer, self.tier, part.gg, columns, routing)
        split = dispatch(columns, part.gg, self.tier, layer, routing, use.experts)
        if use.hits:
            split = replace(split, gg=split.gg + use.hits)
        issue = self._overlapping_mlp if self.tier.overlap else self._serial_mlp
        tasks = issue(layer, split, use.fetched)
        self._prev = tasks[-1].id
        return tasks

    def end(self) -> list[Task]:
        """Head and sampling."""
        last = self.plan.layers[-1].rest
        tasks = self._move(self.spec.n_layers, last, self.plan.ends)
        head = self._end_task(
            "head", self._on(self.plan.ends, self.spec.head_work(self.step.batch, self.step.n_tokens))
        )
        sample = self._end_task("sample", self.spec.small_work("sample", self.step.batch))
        return [*tasks, head, sample]

    # -- the MLP --------------------------------------------------------------------------------------

    def _overlapping_mlp(self, layer: int, split: Dispatch, fetched: Sequence[Fetch]) -> list[Task]:
        attn, tasks, partial = self._prev, [], []
        if split.cc:
            n_bytes = self._activation_bytes()
            down = self._copy("act_d2h", "D2H", layer, n_bytes, (attn,))
            cc = self._ffn("cc", layer, "CPU", split.cc, (down.id,))
            tasks += [down, cc]
        for fetch in fetched:
            if fetch.evicted is not None:
                tasks.append(self._cached_copy("evict", "D2H", layer, fetch.evicted, (attn,)))
            tasks.append(self._cached_copy("send", "H2D", layer, fetch.part, (attn,)))
        arrived = [task for task in tasks if task.kind == "send"]
        routed = [(part,) for part in split.routed]
        sends = [self._send(f"send{p[0].expert}", layer, p, (attn,)) for p in routed[: self.tier.n_slots]]
        tasks += sends
        if split.gg:
            tasks.append(self._ffn("gg", layer, "GPU", split.gg, (attn,)))
            partial.append(tasks[-1].id)
        if layer in self._ahead:
            send, slot = self._ahead.pop(layer)
            computed = tuple(p for p in split.ahead if p.n_tokens)
            if computed:
                tasks.append(self._ffn("cg", layer, "GPU", computed, (attn, send), slot))
                partial.append(tasks[-1].id)
        for task in arrived:
            tasks.append(self._ffn("cg", layer, "GPU", task.parts, (task.id,), name=f"cg{task.parts[0].expert}"))
            partial.append(tasks[-1].id)
        for i, parts in enumerate(routed):
            name = f"cg{parts[0].expert}"
            tasks.append(self._ffn("cg", layer, "GPU", parts, (sends[i].id,), sends[i].slot, name))
            partial.append(tasks[-1].id)
            if i + self.tier.n_slots < len(routed):
                after = routed[i + self.tier.n_slots]
                sends.append(self._send(f"send{after[0].expert}", layer, after, (attn,)))
                tasks.append(sends[-1])
        if split.cc:
            tasks.append(self._copy("act_h2d", "H2D", layer, self._activation_bytes(), (cc.id,)))
            partial.append(tasks[-1].id)
        tasks += self._send_ahead(layer)
        tasks.append(self._task("join", layer, "GPU", self._join_work(len(partial)), tuple(partial)))
        return tasks

    def _serial_mlp(self, layer: int, split: Dispatch, fetched: Sequence[Fetch]) -> list[Task]:
        """Device parts first, then sent parts one by one, then the CPU; each waits for the one before."""
        tasks: list[Task] = []
        computed = tuple(p for p in split.ahead if p.n_tokens)

        def after() -> tuple[str, ...]:
            return (tasks[-1].id if tasks else self._prev,)

        if split.gg:
            tasks.append(self._ffn("gg", layer, "GPU", split.gg, after()))
        if split.ahead:  # nothing is ahead of anything in a serial tier: the whole unit is sent now
            tasks.append(self._send("send", layer, split.ahead, after()))
        if computed:
            tasks.append(self._ffn("cg", layer, "GPU", computed, after(), tasks[-1].slot))
        for fetch in fetched:
            if fetch.evicted is not None:
                tasks.append(self._cached_copy("evict", "D2H", layer, fetch.evicted, after()))
            tasks.append(self._cached_copy("send", "H2D", layer, fetch.part, after()))
            parts = tasks[-1].parts
            tasks.append(self._ffn("cg", layer, "GPU", parts, after(), name=f"cg{parts[0].expert}"))
        for part in split.routed:
            tasks.append(self._send(f"send{part.expert}", layer, (part,), after()))
            tasks.append(self._ffn("cg", layer, "GPU", (part,), after(), tasks[-1].slot, f"cg{part.expert}"))
        if split.cc:
            tasks.append(self._copy("act_d2h", "D2H", layer, self._activation_bytes(), after()))
            tasks.append(self._ffn("cc", layer, "CPU", split.cc, after()))
            tasks.append(self._copy("act_h2d", "H2D", layer, self._activation_bytes(), after()))
        n_partial = bool(split.gg) + bool(computed) + len(fetched) + len(split.routed) + bool(split.cc)
        tasks.append(self._task("join", layer, "GPU", self._join_work(n_partial), after()))
        return tasks

    def _mlp_on_cpu(self, layer: int, routing: Routing) -> list[Task]:
        columns = self.spec.layers[layer].ffn.columns
        if self.tier.offload:
            return self._offloaded_mlp(layer, dispatch(columns, self.plan.layers[layer].gg, self.tier, layer, routing))
        parts = tuple(Part(e, 0, columns, n) for e, n in enumerate(routing) if n)
        cc = self._ffn("cc", layer, "CPU", parts, (self._prev,))
        self._prev = cc.id
        return [cc]

    def _offloaded_mlp(self, layer: int, split: Dispatch) -> list[Task]:
        """The hidden state up, what the device computes of its MLP, the result down; one after the other."""
        up = self._copy("act_h2d", "H2D", layer, self._activation_bytes(), (self._prev,))
        self._prev = up.id
        tasks = self._serial_mlp(layer, split, ())
        down = self._copy("act_d2h", "D2H", layer, self._activation_bytes(), (tasks[-1].id,))
        self._prev = down.id
        return [up, *tasks, down]

    def _send_ahead(self, after: int) -> list[Task]:
        """Columns of the next layer on the device: layers on the CPU before it give the link more time, not less."""
        later = (i for i in range(after + 1, self.spec.n_layers) if self.plan.layers[i].rest == "GPU")
        layer = next(later, None)
        if not self.tier.overlap or layer is None or not self.tier.ahead[layer]:
            return []
        columns = self.spec.layers[layer].ffn.columns
        gg = self.plan.layers[layer].gg
        parts = tuple(
            Part(e, g, min(g + self.tier.ahead[layer], columns), 0)
            for e, g in enumerate(gg)
            if g < columns and (self.cache is None or self.cache.slot(layer, e) is None)
        )
        if not parts:
            return []
        send = self._send("send", layer, parts, ())
        self._ahead[layer] = (send.id, send.slot)
        return [send]

    # -- single tasks ---------------------------------------------------------------------------------

    def _task(
        self, kind: Kind, layer: int, resource: Resource, works: tuple[work.Work, ...], deps: tuple[str, ...]
    ) -> Task:
        name = f"{self.step.name}.L{layer:02d}.{kind}"
        return Task(name, kind, resource, works, tuple(d for d in deps if d), self.step.name, layer)

    def _on(self, place: Place, demand: work.Work) -> work.Work:
        """What it is there: one token's on the CPU is another where other layers are the device's."""
        is_apart = place == "CPU" and self.step.n_tokens == 1 and self.plan.uses_gpu
        return work.apart(demand) if is_apart else demand

    def _end_task(self, kind: Kind, demand: work.Work) -> Task:
        deps = (self._prev,) if self._prev else ()
        task = Task(f"{self.step.name}.{kind}", kind, self.plan.ends, (demand,), deps, self.step.name)
        self._prev = task.id
        return task

    def _move(self, layer: int, before: str, after: str) -> list[Task]:
        if before == after:
            return []
        kind: Kind = "hidden_h2d" if after == "GPU" else "hidden_d2h"
        task = self._copy(kind, "H2D" if after == "GPU" else "D2H", layer, self._activation_bytes(), (self._prev,))
        self._prev = task.id
        return [task]

    def _copy(self, kind: Kind, resource: Resource, layer: int, n_bytes: float, deps: tuple[str, ...]) -> Task:
        # Activations pass through small page-locked buffers, whatever the weights lie in.
        return self._task(kind, layer, resource, (work.activations(n_bytes, self.spec.dtype),), deps)

    def _send(self, name: str, layer: int, parts: tuple[Part, ...], deps: tuple[str, ...]) -> Task:
        slot = self._next_slot
        self._next_slot = (slot + 1) % self.tier.n_slots
        n_bytes = sum(p.stop - p.start for p in parts) * self.spec.column_bytes(layer)
        demand = work.copy(n_bytes, self.spec.dtype, self.plan.pinned)
        user = self._slot_user[slot]
        deps = tuple(dict.fromkeys(d for d in (*deps, user) if d))
        task = Task(
            f"{self.step.name}.L{layer:02d}.{name}", "send", "H2D", (demand,), deps, self.step.name, layer, parts, slot
        )
        self._slot_user[slot] = task.id
        return task

    def _cached_copy(self, kind: Kind, resource: Resource, layer: int, part: Part, deps: tuple[str, ...]) -> Task:
        """An expert into its slot of the cache, or back to the host."""
        demand = work.copy((part.stop - part.start) * self.spec.column_bytes(layer), self.spec.dtype, self.plan.pinned)
        user = self._cache_user.get(part.cached, "")
        deps = tuple(dict.fromkeys(d for d in (*deps, user) if d))
        name = f"{self.step.name}.L{layer:02d}.{kind}{part.expert}"
        self._cache_user[part.cached] = name
        return Task(name, kind, resource, (demand,), deps, self.step.name, layer, (part,))

    def _ffn(
        self,
        kind: Kind,
        layer: int,
        resource: Resource,
        parts: tuple[Part, ...],
        deps: tuple[str, ...],
        slot: int = -1,
        name: str = "",
    ) -> Task:
        works = tuple(self.spec.ffn_work(layer, p.n_tokens, p.stop - p.start) for p in parts)
        task = Task(
            f"{self.step.name}.L{layer:02d}.{name or kind}",
            kind,
            resource,
            works,
            deps,
            self.step.name,
            layer,
            parts,
            slot,
        )
        if slot >= 0:
            self._slot_user[slot] = task.id
        self._cache_user.update((p.cached, task.id) for p in parts if p.cached >= 0)
        return task

    def _join_work(self, n_partial: int) -> tuple[work.Work, ...]:
        return (self.spec.small_work("join", self.step.n_tokens * max(n_partial, 1)),)

    def _activation_bytes(self) -> float:
        return float(self.step.n_tokens * self.spec.d_model * self.spec.dtype_bytes)


def compile_step(
    spec: ModelSpec, plan: Plan, step: Step, routing: RoutingOf, cache: CacheState | None = None
) -> TaskGraph:
    """TaskGraph of one forward pass; routing(step, layer) says where tokens went. Advances the cache, if given."""
    return graph(_step_tasks(StepCompiler(spec, plan, step, cache), routing))


def _step_tasks(compiler: StepCompiler, routing: RoutingOf) -> Iterator[Task]:
    yield from compiler.begin()
    for layer in range(compiler.spec.n_layers):
        yield from compiler.layer(layer, routing(compiler.step, layer))
    yield from compiler.end()
