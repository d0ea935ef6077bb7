"""From a layer's tasks to bodies: what each task does to which tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from runtime.activation import Activation
from runtime.devices.base import Body, Device
from runtime.memory import LayerStore, Slots, cached_run
from runtime.ops import Piece, gated_mlp, routed_mlp
from runtime.routing import Routed
from sim.graph import Part, Task

_MOST_KEPT = 1024  # an expert cache changes what is sent ahead
PiecesOf = Callable[[Part], list[Piece]]


class LayerBinding:
    """Binds the MLP tasks of one layer for one step.

    x_SD is the layer's input where the layer lives, on_cpu whether that is the CPU; the result [S, D] is in
    `output` once the last task has ended. routed is None for a dense MLP.
    """

    def __init__(
        self,
        store: LayerStore,
        slots: Slots,
        device: Device,
        pinned: bool,
        act: Activation,
        x_SD: Tensor,
        routed: Routed | None,
        cache: Sequence[Tensor] = (),
        on_cpu: bool = False,
    ) -> None:
        self._cache, self._on_cpu = cache, on_cpu
        self._store, self._slots, self._device, self._pinned, self._act = store, slots, device, pinned, act
        self._x, self._routed = x_SD, routed
        self._host_x = x_SD
        self._host_y = x_SD
        self._partial: dict[str, Tensor] = {}
        self._joined: list[str] = []
        self.output = x_SD

    def bind(self, task: Task, ahead: LayerStore | None) -> Body:
        """The body of a task; `ahead` holds the weights that an ahead send of the next layer moves.

        Tasks are bound in the order of the graph.
        """
        return self._body(task, ahead)

    def _body(self, task: Task, ahead: LayerStore | None) -> Body:
        if self._on_cpu and task.kind in ("act_h2d", "act_d2h"):
            return self._up if task.kind == "act_h2d" else self._down
        if task.kind in ("gg", "cg", "act_h2d"):
            self._joined.append(task.id)
        if task.kind in ("send", "evict") and task.parts[0].cached >= 0:
            return self._move_expert(task)
        if task.kind == "send":
            return self._send(task, ahead or self._store)
        if task.kind == "act_d2h":
            return self._to_host
        if task.kind == "act_h2d":
            return lambda: self._to_device(task.id)
        if task.kind == "cc":
            return lambda: self._compute_on_host(task.parts)
        if task.kind in ("gg", "cg"):
            pieces_of = self._pieces_of(task)
            return lambda: self._compute(task, pieces_of)
        assert task.kind == "join", f"no body for a {task.kind} task"
        return self._join

    # -- copies ---------------------------------------------------------------------------------------

    def _send(self, task: Task, store: LayerStore) -> Body:
        return sending(self._device, store, self._slots, task, self._pinned)

    def _move_expert(self, task: Task) -> Body:
        """An expert's host part into its slot of the cache, or back."""
        (part,) = task.parts
        expert = self._store.experts[part.expert]
        there, here = cached_run(self._cache, part, expert.width), expert.host_run(part.start, part.stop)
        pair = (there, here) if task.kind == "send" else (here, there)
        return self._device.copying([pair], self._pinned)

    def _to_host(self) -> None:
        self._host_x = self._device.staging(self._x, "act_d2h", on_host=True)
        self._device.copy([(self._host_x, self._x)], pinned=True)

    def _to_device(self, name: str) -> None:
        target = self._device.staging(self._x, "act_h2d", on_host=False)
        self._device.copy([(target, self._host_y)], pinned=True)
        self._partial[name] = target

    def _up(self) -> None:
        """The input of a layer that lives on the CPU, for the device."""
        target = self._device.staging(self._x, "act_h2d", on_host=False)
        self._device.copy([(target, self._x)], pinned=True)
        self._x = target
        self._routed = self._routed.on(target.device) if self._routed is not None else None

    def _down(self) -> None:
        """The device's result, for a layer that lives on the CPU."""
        target = self._device.staging(self.output, "act_d2h", on_host=True)
        self._device.copy([(target, self.output)], pinned=True)
        self.output = target

    # -- arithmetic -----------------------------------------------------------------------------------

    def _compute(self, task: Task, pieces_of: PiecesOf) -> None:
        self._partial[task.id] = self._mlp(self._x, task.parts, pieces_of, on_host=False)

    def _compute_on_host(self, parts: Sequence[Part]) -> None:
        y = self._mlp(self._host_x, parts, self._host, on_host=True)
        if self._on_cpu:
            self.output = y
            return
        self._host_y = self._device.staging(y, "cc", on_host=True)
        self._host_y.copy_(y)
        self.output = y

    def _mlp(self, x: Tensor, parts: Sequence[Part], pieces_of: PiecesOf, on_host: bool) -> Tensor:
        if self._routed is None:
            (part,) = parts
            return gated_mlp(x, pieces_of(part), self._act)
        experts = [(*self._routed.of_expert(p.expert, on_host), pieces_of(p)) for p in parts]
        return routed_mlp(x, experts, self._act)

    def _pieces_of(self, task: Task) -> PiecesOf:
        """Where an MLP task's weights lie: in host memory, resident or cached, or in the slot they are sent to."""
        if task.kind == "cc":
            return self._host
        if task.kind == "gg" or task.parts[0].cached >= 0:
            return self._resident
        runs = {p.expert: self._slots.run(task.slot, p.expert) for p in task.parts}
        return lambda part: self._sent(part, runs)

    def _host(self, part: Part) -> list[Piece]:
        expert = self._store.experts[part.expert]
        return expert.views(expert.host_run(part.start, part.stop), part.start, part.stop)

    def _resident(self, part: Part) -> list[Piece]:
        expert = self._store.experts[part.expert]
        if part.cached < 0:
            return expert.resident()
        return expert.views(cached_run(self._cache, part, expert.width), part.start, part.stop)

    def _sent(self, part: Part, runs: dict[int, Tensor]) -> list[Piece]:
        return self._store.experts[part.expert].views(runs[part.expert], part.start, part.stop)

    def _join(self) -> None:
        # In the order of the graph, not of arrival: equal runs give equal bits.
        first, *others = (self._partial[name] for name in self._joined)
        for y in others:
            first.add_(y)
        self.output = first


def sending(device: Device, store: LayerStore, slots: Slots, task: Task, pinned: bool) -> Body:
    """The body of a send task. What is sent is the same in many steps, so that its body is made once."""
    key = (task.layer, task.slot, tuple((p.expert, p.start, p.stop) for p in task.parts), device.takes_words)
    kept = slots.kept.get(key)
    if kept is not None:
        slots.hold(task.slot, kept[1])
        return kept[0]
    body = device.copying(send_pairs(store, slots, task), pinned)
    if len(slots.kept) < _MOST_KEPT:
        slots.kept[key] = body, slots.held(task.slot)
    return body


def send_pairs(store: LayerStore, slots: Slots, task: Task) -> list[tuple[Tensor, Tensor]]:
    """(target, source) runs of a send task, neighbouring experts' runs merged into one copy."""
    targets = slots.place(task.slot, task.parts, store.experts[0].width)
    sources = [store.experts[p.expert].host_run(p.start, p.stop) for p in task.parts]
    pairs: list[tuple[Tensor, Tensor]] = []
    for target, source in zip(targets, sources, strict=True):
        if pairs and _follows(pairs[-1][1], source):
            pairs[-1] = (_joined(pairs[-1][0], target), _joined(pairs[-1][1], source))
        else:
            pairs.append((target, source))
    return pairs


def _follows(first: Tensor, second: Tensor) -> bool:
    same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    return same and first.storage_offset() + first.numel() == second.storage_offset()


def _joined(first: Tensor, second: Tensor) -> Tensor:
    return first.as_strided((first.numel() + second.numel(),), (1,), first.storage_offset())
