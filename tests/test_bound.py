"""A planned model says what it cannot do, instead of losing its MLPs or waiting for threads that are not there."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hwmodels.errors import ExecutionError, PlanError
from runtime.session import PlannedModel
from tests.conftest import TinyCheckpoint
from tests.planned import greedy, loaded, on_cpu, spec_of, three_ways
from tests.tiny import eager, tokens

PLANS = {"on the CPU": on_cpu, "three ways": three_ways}


@pytest.fixture
def mixtral(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("mixtral")


@pytest.fixture(params=PLANS)
def model(request: pytest.FixtureRequest, mixtral: Path) -> Iterator[PlannedModel]:
    with loaded(mixtral, PLANS[request.param](spec_of(mixtral))) as found:
        yield found


def told_by_a_fork(ask: Callable[[], object]) -> str:
    """What a forked child's question is answered, or its error; the child gets a minute."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            answer = str(ask())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the child hung or died"
    return answer


def test_a_fork_is_told_to_load_the_model_itself_and_leaves_its_parents_alone(model: PlannedModel) -> None:
    expected = greedy(model, tokens(5), 4)
    for ask in (lambda: greedy(model, tokens(5), 4), lambda: model(tokens(5))):
        assert "load the model after the fork, or start processes by multiprocessing's 'spawn'" in told_by_a_fork(ask)
    with model.executor.device.driving():  # as if another thread were in the middle of a step
        assert told_by_a_fork(model.close) == "None"
    assert greedy(model, tokens(5), 4) == expected


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_is_loaded_again_and_not_copied(duplicate: Callable[[object], object], model: PlannedModel) -> None:
    with pytest.raises(ExecutionError, match="cannot be copied or pickled; load it once more, by the same plan"):
        duplicate(model)


def test_it_is_not_saved_without_its_mlps(model: PlannedModel, tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match="cannot be saved; copy the checkpoint it was loaded from"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["", "model", "model.layers.0"])
def test_there_is_no_state_dict_without_its_mlps(part: str, model: PlannedModel, mixtral: Path) -> None:
    asked = model.get_submodule(part)
    with pytest.raises(ExecutionError, match="neither gives nor takes a state dict; use the one of the model that"):
        asked.state_dict()
    with pytest.raises(ExecutionError, match="neither gives nor takes a state dict"):
        asked.load_state_dict(eager(mixtral).get_submodule(part).state_dict(), strict=False)
    assert greedy(model, tokens(5), 4) == greedy(eager(mixtral), tokens(5), 4)


@pytest.mark.parametrize(
    "change", [torch.nn.Module.half, torch.nn.Module.double, lambda m: m.to(torch.bfloat16), lambda m: m.to("meta")]
)
def test_weights_stay_where_and_what_the_plan_says(
    change: Callable[[PlannedModel], object], model: PlannedModel, mixtral: Path
) -> None:
    with pytest.raises(PlanError, match=r"on cpu in torch.float32, asked for are .*; plan for them and load it once"):
        change(model)
    model.to("cpu").to(torch.float32).float()
    assert greedy(model, tokens(5), 4) == greedy(eager(mixtral), tokens(5), 4)


@pytest.mark.parametrize("shape", [(1, 0), (0, 4)])
def test_no_tokens_are_no_step(shape: tuple[int, int], model: PlannedModel) -> None:
    with pytest.raises(PlanError, match="without a token .*; give every sequence at least one"):
        model(torch.zeros(shape, dtype=torch.long))
    assert len(greedy(model, tokens(1), 2)[0]) == 2
