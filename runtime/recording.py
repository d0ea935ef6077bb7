"""What a run records while it goes on, and the tasks and spans that are made of it once somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sim.caching import Key
from sim.compile import StepCompiler
from sim.graph import Task
from sim.timeline import Span
from sim.workload import Routing, Step


class LayerRun(NamedTuple):
    """What a call that computes a layer tells: tokens by expert, when its MLP began and ended on the host clock."""

    counts: Routing
    mlp_ns: int
    end_ns: int


class LayerRuns(NamedTuple):
    """Layers of a step that one call computed, one after the other from a time on the host clock."""

    step: Step
    since_ns: int
    runs: Sequence[LayerRun]


class WholeStep(NamedTuple):
    """A step that one call computed: when it began, what that call tells of times, tokens by expert of each layer.

    Of the times the first is left out; the others are when the embedding was there, when the MLP of each layer began
    and ended, when the head was there.
    """

    step: Step
    since_ns: int
    times: Sequence[int]
    counts: Sequence[Sequence[int]]


@dataclass
class Recording:
    """Everything recorded since a run began; sample, a task or that of a step, is open since a time on the host clock.

    cached is what the expert cache held then. Tasks that were computed in one call are made once somebody asks.
    """

    cached: tuple[Key, ...] | None = None
    times: list[tuple[Task, int, int]] = field(default_factory=list)
    layers: list[LayerRuns] = field(default_factory=list)
    steps: list[WholeStep] = field(default_factory=list)
    samples: list[tuple[Step, int, int]] = field(default_factory=list)
    routing: dict[tuple[str, int], Routing] = field(default_factory=dict)
    n_prompt: int = 0
    n_decode: int = 0
    in_prompt: bool = False
    sample: tuple[Task | Step, int] | None = None

    def next_step(self) -> str:
        """Name of a step that begins now, as sim.workload names it: steps of the prompt, then one per token."""
        if self.n_prompt == 0 or (self.in_prompt and self.n_decode == 0):
            self.n_prompt += 1
            return f"prefill{self.n_prompt - 1 or ''}"
        self.n_decode += 1
        return f"decode{self.n_decode}"

    def add(self, task: Task, start_ns: int, end_ns: int) -> None:
        """A task that ran."""
        self.times.append((task, start_ns, end_ns))  # spans are made once the run has ended

    def add_step(self, whole: WholeStep) -> None:
        """A step that one call computed."""
        self.close_sample(whole.since_ns)
        self.steps.append(whole)
        self.sample = whole.step, whole.times[-1]

    def close_sample(self, now_ns: int) -> None:
        """What comes after a step's head has ended, if it was open."""
        if self.sample is not None:
            of, since_ns = self.sample
            end_ns = max(since_ns, now_ns)
            if isinstance(of, Task):
                self.add(of, since_ns, end_ns)
            else:
                self.samples.append((of, since_ns, end_ns))
            self.sample = None

    def unfold(self, compiler_of: Callable[[Step], StepCompiler]) -> None:
        """Make the tasks of what was computed in one call."""
        for step, since_ns, runs in self.layers:
            self._unfold_layers(compiler_of(step), since_ns, runs)
        for step, since_ns, (_, embedded_ns, *of_layers, end_ns), counts in self.steps:
            compiler = compiler_of(step)
            self.add(compiler.begin()[0], since_ns, embedded_ns)
            times = zip(counts, of_layers[::2], of_layers[1::2], strict=True)
            runs = [LayerRun(tuple(found), mlp_ns, layer_ns) for found, mlp_ns, layer_ns in times]
            self._unfold_layers(compiler, embedded_ns, runs)
            self.add(compiler.end()[-2], runs[-1].end_ns, end_ns)
        for step, since_ns, end_ns in self.samples:
            self.add(compiler_of(step).end()[-1], since_ns, end_ns)
        for done in (self.layers, self.steps, self.samples):
            done.clear()

    def _unfold_layers(self, compiler: StepCompiler, since_ns: int, runs: Sequence[LayerRun]) -> None:
        for i, run in enumerate(runs):
            self.routing[compiler.step.name, i] = run.counts
            (attn,), (cc,) = compiler.attention(i), compiler.mlp(i, run.counts)
            self.add(attn, since_ns, run.mlp_ns)
            self.add(cc, run.mlp_ns, run.end_ns)
            since_ns = run.end_ns

    def spans(self) -> tuple[Span, ...]:
        """Spans in the order of time, from the first one's begin on."""
        origin_ns = min((start_ns for _, start_ns, _ in self.times), default=0)
        return tuple(_span(t, a - origin_ns, b - origin_ns) for t, a, b in sorted(self.times, key=lambda x: x[1:]))


def _span(task: Task, start_ns: int, end_ns: int) -> Span:
    times = start_ns / 1e9, end_ns / 1e9
    return Span(task.id, task.kind, task.resource, task.step, task.layer, *times, task.bytes, task.flops)
