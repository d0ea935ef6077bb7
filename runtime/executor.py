"""The executor: runs the task graph that sim.compile makes, one layer at a time, and records spans.

The model's own modules run embedding, attention and head on the calling thread; at every MLP the
executor compiles the layer for the tokens that arrived, binds its tasks to tensors, and lets the device
run them. What the calling thread does between MLPs is recorded as the embed, attn, head and sample
tasks of the same graph, so that measured and simulated timelines hold the same task ids.

    begin_step -> embed | enter_layer -> attn | run_mlp -> cc gg send cg ... | enter_head -> head | end_step
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hwmodels.errors import ExecutionError, PlanError
from runtime.activation import Activation
from runtime.binding import LayerBinding, sending
from runtime.devices.base import Body, Device, Mark
from runtime.memory import WeightStore
from runtime.projection import computes_prompt, computes_step
from runtime.recording import LayerRun, LayerRuns, Recording, WholeStep
from runtime.routing import Routed
from runtime.words import WordBinding, takes_words
from sim.caching import CacheState
from sim.compile import StepCompiler
from sim.graph import Task
from sim.model import ModelSpec
from sim.plan import Place, Plan
from sim.timeline import Timeline
from sim.workload import RoutingTrace, Step


@dataclass
class _StepState:
    """The step in progress: what was compiled, when the calling thread's tasks began and ended."""

    compiler: StepCompiler
    by_kernel: bool
    caller_tasks: list[tuple[Task, Mark, Mark]] = field(default_factory=list)
    open_task: Task | None = None
    sample: Task | None = None
    since: Mark = 0
    layers: LayerRuns | None = None
    n_entered: int = 0


class Executor:
    """Runs MLPs by plan. Owned by one model, driven by one thread at a time."""

    def __init__(self, spec: ModelSpec, plan: Plan, device: Device, store: WeightStore, act: Activation) -> None:
        self.spec, self.plan, self.device, self.store, self.act = spec, plan, device, store, act
        self.cache = CacheState.of(spec, plan) if plan.cache is not None else None
        self._recording = self._fresh()
        self._step: _StepState | None = None
        self._in_run, self._closed = False, False
        self._all_on_cpu = all(layer.rest == "CPU" for layer in plan.layers)
        self.knows_attention = False
        """Whether the native kernel computes prompts in all of the model's attention modules."""

    # -- a run ----------------------------------------------------------------------------------------

    def begin_run(self) -> None:
        """Forget what was recorded; the next step is the prefill. ExecutionError if closed."""
        self._check_open()
        self._abandon_step()
        self._recording, self._in_run = self._fresh(), True

    def end_run(self, info: dict[str, object]) -> tuple[Timeline, RoutingTrace]:
        """Timeline and routing of everything since the run began."""
        self._in_run = False
        if self._step is None:
            self._close_sample(self.device.mark(self.plan.ends))
        self._recording.unfold(lambda step: StepCompiler(self.spec, self.plan, step, self.cache))
        spans = self._recording.spans()
        trace = RoutingTrace(dict(self._recording.routing), self._recording.cached)
        return Timeline("measured", spans, info), trace

    def cache_info(self) -> dict[str, object]:
        """Share of uses of experts that found them in the expert cache, since the run began."""
        return {"cache_hit_rate": self.cache.hit_rate} if self.cache is not None else {}

    def feed_prompt(self, chunked: bool) -> None:
        """Until told otherwise, steps are chunks of the prompt."""
        self._recording.in_prompt = chunked

    def stop(self) -> None:
        """Let no further step begin: a run in another thread ends with an ExecutionError."""
        self._closed = True

    def close(self) -> None:
        """Give threads and memory back; safe to call twice."""
        self.stop()
        with self.device.driving():
            self._abandon_step()
            self.store = WeightStore((), {})
            self.device.close()

    # -- a step ---------------------------------------------------------------------------------------

    def begin_step(self, n_tokens: int, kv_tokens: int, batch: int, masked: bool = False) -> None:
        """A forward pass begins: n_tokens rows in all, kv_tokens of depth per sequence after it.

        masked: some tokens of a prompt do not see all before them, so that its attention is not the kernel's. Outside
        a run, a pass without a past begins a new recording. ExecutionError if closed, PlanError without
        a token, or if the KV cache outgrows the plan.
        """
        self._check_open()
        self._check_room(n_tokens, kv_tokens, batch)
        self._abandon_step()
        if not self._in_run and n_tokens == kv_tokens * batch:
            self._recording = self._fresh()
        prompt = self.knows_attention and not masked and computes_prompt(getattr(torch, self.spec.dtype), n_tokens)
        by_kernel = computes_step(n_tokens) or prompt
        self.device.work_at(self.plan.ends, self.plan.ends == "CPU" and by_kernel)
        self.device.set_clock()
        now = self.device.mark(self.plan.ends)
        record = self._recording
        self._close_sample(now)
        name = record.next_step()
        compiler = StepCompiler(self.spec, self.plan, Step(name, n_tokens, kv_tokens, batch), self.cache)
        embed, *ahead = compiler.begin()
        self._step = _StepState(compiler, by_kernel, open_task=embed, since=now)
        self._send_ahead(ahead)

    def enter_layer(self, layer: int, hidden: Tensor) -> Tensor:
        """A layer begins; its input, carried to where it lives. ExecutionError if another's columns were sent."""
        step = self._current()
        if layer != step.n_entered and any(step.compiler.tier.ahead):
            raise ExecutionError(
                f"layer {layer} comes where the plan sends columns of layer {step.n_entered} ahead; leave the layers "
                "as they were loaded, or plan for a checkpoint with the layers that you want"
            )
        step.n_entered += 1
        if step.open_task is not None:
            self._close()
        *moves, attn = step.compiler.attention(layer)
        hidden = self._move(moves, hidden)
        self._work_at(self.plan.layers[layer].rest)
        step.open_task = attn
        return hidden

    def run_mlp(self, layer: int, x_SD: Tensor, routed: Routed | None) -> Tensor:
        """The MLP of a layer for the rows x_SD; the sum of all parts, where the layer lives."""
        step = self._current()
        compiler = step.compiler
        counts = routed.counts if routed is not None else (x_SD.shape[0],)
        self._recording.routing[compiler.step.name, layer] = counts
        tasks = compiler.mlp(layer, counts)
        slots = self.store.slots[compiler.tier]
        store, pinned = self.store.layers[layer], self.plan.pinned
        on_cpu = self.plan.layers[layer].rest == "CPU"
        kind = WordBinding if takes_words(self.device, self.act, x_SD, self.spec.dtype) else LayerBinding
        binding = kind(store, slots, self.device, pinned, self.act, x_SD, routed, self.store.cache, on_cpu)
        bodies = {t.id: binding.bind(t, self.store.layers[t.layer]) for t in tasks}
        self._close()  # deciding and binding is the caller's work and counts as part of attn
        self.device.run(tasks, bodies, inline_cpu=on_cpu)
        step.since = self.device.mark(self.plan.layers[layer].rest)
        return binding.output

    def computes_layer(self, layer: int) -> bool:
        """Whether the kernel may compute a layer whole in the step in progress: all of it is the CPU's."""
        step = self._current()
        return step.by_kernel and self.plan.layers[layer].rest == "CPU" and not step.compiler.tier.offload

    def run_layer(self, layer: int, compute: Callable[[], LayerRun]) -> None:
        """A layer that one call computes whole, in place of its attention and run_mlp; same tasks.

        What fails in it is named by the first of them, attention.
        """
        step = self._current()
        attn = step.open_task
        assert attn is not None, "the layer was entered"
        try:
            run = compute()
        except ExecutionError as error:
            raise ExecutionError(f"task {attn.id} failed on CPU: {error}") from error
        self._recording.routing[step.compiler.step.name, layer] = run.counts
        (cc,) = step.compiler.mlp(layer, run.counts)
        step.caller_tasks.append((attn, step.since, run.mlp_ns))
        self.device.finished(cc, run.mlp_ns, run.end_ns)
        step.open_task, step.since = None, run.end_ns

    def computes_layers(self) -> bool:
        """Whether the kernel may compute all layers in one call in the step in progress."""
        return self._all_on_cpu and self.computes_layer(0)

    def run_layers(self, compute: Callable[[], Sequence[LayerRun]], n_done: Callable[[], int]) -> None:
        """All layers, which one call computes, in place of entering and running each; n_done of them if it fails."""
        step = self._current()
        self._close()
        since = self.device.resolve(step.since)
        try:
            runs = compute()
        except ExecutionError as error:
            (attn,) = step.compiler.attention(n_done())
            raise ExecutionError(f"task {attn.id} failed on CPU: {error}") from error
        step.layers, step.since = LayerRuns(step.compiler.step, since, runs), runs[-1].end_ns

    def most_tokens(self, batch: int) -> int:
        """Tokens that the plan has room for in the KV cache of each of so many sequences."""
        return self.plan.n_ctx * self.plan.batch // max(batch, 1)

    def enter_head(self, hidden: Tensor) -> Tensor:
        """The layers have ended; their output, carried to where the head lives."""
        step = self._current()
        *moves, head, step.sample = step.compiler.end()
        hidden = self._move(moves, hidden)
        self._work_at(self.plan.ends)
        step.open_task = head
        return hidden

    def end_step(self) -> None:
        """The forward pass has ended: read all its times."""
        step = self._current()
        self._close()
        for ticket in self.device.drain():
            self._recording.add(ticket.task, ticket.start_ns, ticket.end_ns)
        for task, start, end in step.caller_tasks:
            self._recording.add(task, self.device.resolve(start), self.device.resolve(end))
        if step.layers is not None:
            self._recording.layers.append(step.layers)
        assert step.sample is not None, "the head was entered"
        self._recording.sample = (step.sample, self.device.resolve(step.since))
        self._step = None

    # -- a step in one call ---------------------------------------------------------------------------

    def computes_steps(self, n_tokens: int) -> bool:
        """Whether the kernel may compute steps of so many tokens in one call, embedding and head with them."""
        all_here = self._all_on_cpu and self.plan.ends == "CPU"
        return all_here and computes_step(n_tokens) and not self.plan.tier(n_tokens).offload

    def check_step(self, n_tokens: int, kv_tokens: int, batch: int) -> None:
        """A step in one call begins. Raises as begin_step."""
        self._check_open()
        self._check_room(n_tokens, kv_tokens, batch)
        self._abandon_step()
        self.device.work_at("CPU", True)

    def has_computed(self, step: Callable[[str], WholeStep]) -> None:
        """A step in one call has ended; its words, of its name."""
        self._recording.add_step(step(self._recording.next_step()))

    def failed_task(self, n_tokens: int, kv_tokens: int, batch: int, n_parts: int) -> Task:
        """What a step in one call was at, of whose parts, embedding and head among them, it had computed so many."""
        compiler = StepCompiler(
            self.spec, self.plan, Step(self._recording.next_step(), n_tokens, kv_tokens, batch), self.cache
        )
        layers = (compiler.attention(i)[0] for i in range(self.spec.n_layers))
        return [compiler.begin()[0], *layers, compiler.end()[-2]][n_parts]

    @property
    def open_task(self) -> Task | None:
        """What the calling thread is at, between MLPs: the task to name if a module of the model raises."""
        return self._step.open_task if self._step is not None else None

    # -- inside ---------------------------------------------------------------------------------------

    def _fresh(self) -> Recording:
        if self.cache is None:
            return Recording()
        self.cache.n_hits = self.cache.n_uses = 0
        return Recording(self.cache.contents)

    def _check_open(self) -> None:
        if self._closed:
            raise ExecutionError(f"{self.spec.name} is closed and its weights are gone; load it again")

    def _check_room(self, n_tokens: int, kv_tokens: int, batch: int) -> None:
        if n_tokens < 1:
            raise PlanError("a step without a token is asked for; give every sequence at least one")
        if kv_tokens * batch > self.plan.n_ctx * self.plan.batch:
            raise PlanError(
                f"a KV cache of {kv_tokens} tokens for each of {batch} sequences is asked for, the plan has room for "
                f"{self.plan.n_ctx} for each of {self.plan.batch}; plan with a larger --ctx-size or --batch"
            )
        if n_tokens > self.plan.step_tokens * self.plan.batch:
            raise PlanError(
                f"a step of {n_tokens} tokens is asked for, the plan has activations for chunks of "
                f"{self.plan.step_tokens} for each of {self.plan.batch}; call generate, which cuts the prompt, or feed "
                f"it in chunks"
            )

    def _current(self) -> _StepState:
        if self._step is None:
            raise ExecutionError(f"a part of {self.spec.name} was called by itself; call the model or its generate")
        return self._step

    def _abandon_step(self) -> None:
        # An exception left the step before: its tasks have come to rest, its spans mean nothing.
        if self._step is not None:
            self.device.forget()
            self._step = None
            if self.cache is not None:  # some of its sends did not run
                self.cache.clear()

    def _close(self) -> None:
        step = self._current()
        task = step.open_task
        assert task is not None, "a task of the calling thread is open"
        end = self.device.mark("CPU" if task.resource == "CPU" else "GPU")  # the caller's tasks are CPU or GPU
        step.caller_tasks.append((task, step.since, end))
        step.open_task, step.since = None, end

    def _close_sample(self, now: Mark) -> None:
        if self._recording.sample is not None:
            self._recording.close_sample(self.device.resolve(now))

    def _move(self, moves: Sequence[Task], hidden: Tensor) -> Tensor:
        for task in moves:
            to_host = task.kind == "hidden_d2h"
            target = self.device.staging(hidden, f"{task.kind}.L{task.layer}", to_host)
            self.device.run([task], {task.id: self.device.copying([(target, hidden)], True)}, inline_cpu=False)
            self._current().since = self.device.mark("CPU" if to_host else "GPU")
            hidden = target.clone() if task.layer == 0 else target  # callers keep embeddings, the next step overwrites
        return hidden

    def _work_at(self, place: Place) -> None:
        self.device.work_at(place, place == "CPU" and self._current().by_kernel)

    def _send_ahead(self, tasks: Sequence[Task]) -> None:
        bodies: dict[str, Body] = {}
        for task in tasks:
            slots = self.store.slots[self._current().compiler.tier]
            bodies[task.id] = sending(self.device, self.store.layers[task.layer], slots, task, self.plan.pinned)
        if tasks:
            self.device.issue(tasks, bodies)
