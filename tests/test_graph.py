"""A task graph is a list of tasks that in-order queues can run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hwmodels.errors import GraphError
from hwmodels.work import Work
from sim.graph import Task, TaskGraph, graph
from tests.unit_machine import CPU, D2H, GPU, H2D, task


def test_dependencies_become_positions_and_resources_become_numbers() -> None:
    made = graph([task("w", H2D, 1), task("c", CPU, 1), task("g", GPU, 1, "w"), task("sum", GPU, 1, "c", "g")])
    assert made.arrays.deps == [(), (), (0,), (1, 2)]
    assert made.arrays.resource == [2, 0, 1, 1]
    assert made.index == {"w": 0, "c": 1, "g": 2, "sum": 3}


def test_work_of_a_task_adds_up() -> None:
    works = (Work("ffn", "float32", 1, 3.0, 4.0, 5.0), Work("ffn", "float32", 1, 10.0, 20.0, 30.0))
    both = Task("cc", "cc", CPU, works)
    assert both.flops == 13
    assert both.bytes == 59


def test_an_empty_graph_is_a_graph() -> None:
    assert len(TaskGraph(())) == 0
    assert TaskGraph(()).arrays.deps == []


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([task("a", CPU, 1), task("a", GPU, 1)], "'a' occurs twice"),
        ([task("a", CPU, 1, "b"), task("b", GPU, 1)], "'a' depends on 'b', which does not precede it"),
        ([task("a", CPU, 1, "a")], "'a' depends on 'a', which does not precede it"),
        ([task("a", CPU, 1, "nowhere")], "'a' depends on 'nowhere', which does not precede it"),
        (
            [replace(task("a", D2H, 1), resource="TPU")],  # type: ignore[arg-type]
            "'a' is on 'TPU'; resources are CPU, GPU, H2D, D2H",
        ),
    ],
)
def test_what_cannot_run_is_named(tasks: list[Task], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        _ = graph(tasks).arrays
