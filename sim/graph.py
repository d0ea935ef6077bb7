"""Task and TaskGraph: what has to be done, on which resource, after what. No time in here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from hwmodels.errors import GraphError
from hwmodels.profile import RESOURCES, Resource
from hwmodels.work import Work

Kind = Literal[
    "embed",
    "attn",
    "act_d2h",
    "cc",
    "send",
    "evict",
    "cg",
    "gg",
    "act_h2d",
    "join",
    "hidden_d2h",
    "hidden_h2d",
    "head",
    "sample",
]
"""What a task does.

embed, attn, head, sample   the parts of a step that are not MLPs (see hwmodels.work.Op)
act_d2h, act_h2d            activations to the host for CC, its partial result back
cc, cg, gg                  the MLP columns of that class
send                        weights of CG columns from host to a device slot
evict                       weights of an expert that leaves the expert cache, back to the host
join                        sum of partial results on the device
hidden_d2h, hidden_h2d      hidden states between a layer on the device and one on the CPU
"""

REST: frozenset[Kind] = frozenset(("embed", "attn", "head", "sample"))
"""What is not an MLP: small calls of torch and Python, one after the other on one thread."""


MOVES: dict[Literal["CPU", "GPU"], Kind] = {"CPU": "hidden_d2h", "GPU": "hidden_h2d"}
"""What brings a hidden state to a place."""


@dataclass(frozen=True, slots=True)
class Part:
    """Columns [start, stop) of one expert for n_tokens tokens: what a cc, cg, gg or send task covers.

    cached is the slot of the expert cache that holds them, -1 if they lie elsewhere.
    """

    expert: int
    start: int
    stop: int
    n_tokens: int
    cached: int = -1


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work on one resource.

    id      readable and unique within a run: ``decode3.L07.cc``
    works   what it asks of the resource, one after the other
    deps    ids of tasks that must have ended; they precede this task in the graph
    slot    index of the device slot a send fills or a cg reads, -1 for none
    """

    id: str
    kind: Kind
    resource: Resource
    works: tuple[Work, ...] = ()
    deps: tuple[str, ...] = ()
    step: str = ""
    layer: int = -1
    parts: tuple[Part, ...] = ()
    slot: int = -1

    @property
    def flops(self) -> float:
        """FLOPs of all its work."""
        return sum(w.flops for w in self.works)

    @property
    def bytes(self) -> float:
        """Bytes of all its work."""
        return sum(w.bytes for w in self.works)


@dataclass(frozen=True)
class TaskGraph:
    """Tasks in issue order. Each resource runs its tasks in this order, one at a time.

    Dependencies precede their users, so in-order queues cannot deadlock. GraphError otherwise.
    """

    tasks: tuple[Task, ...]

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of every task id; GraphError if an id occurs twice."""
        index: dict[str, int] = {}
        for i, task in enumerate(self.tasks):
            if task.id in index:
                raise GraphError(f"task id {task.id!r} occurs twice; ids must be unique")
            index[task.id] = i
        return index

    @cached_property
    def arrays(self) -> GraphArrays:
        """The graph as lists of integers, for engines; checks it on the way."""
        index = self.index
        deps: list[tuple[int, ...]] = []
        for i, task in enumerate(self.tasks):
            if task.resource not in RESOURCES:
                raise GraphError(f"task {task.id!r} is on {task.resource!r}; resources are {', '.join(RESOURCES)}")
            row = []
            for name in task.deps:
                j = index.get(name, i)
                if j >= i:
                    raise GraphError(f"task {task.id!r} depends on {name!r}, which does not precede it")
                row.append(j)
            deps.append(tuple(row))
        return GraphArrays([RESOURCES.index(t.resource) for t in self.tasks], deps)

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)


@dataclass(frozen=True)
class GraphArrays:
    """resource[i] is an index into RESOURCES; deps[i] are positions of task i's dependencies."""

    resource: list[int]
    deps: list[tuple[int, ...]]


def graph(tasks: Iterable[Task]) -> TaskGraph:
    """TaskGraph of any iterable of tasks."""
    return TaskGraph(tuple(tasks))
