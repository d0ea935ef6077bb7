"""The CUDA device orders every access to shared memory, whatever the plan: checked without a GPU, by clocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime import session
from runtime.devices import cuda
from runtime.devices.cuda import CudaDevice
from sim.model import ModelSpec
from sim.plan import LayerPartition, Place, Plan
from sim.workload import Workload
from tests.caches import with_cache
from tests.conftest import TinyCheckpoint
from tests.planned import greedy, loaded, plan_for, shares, spec_of, three_ways, whole_experts
from tests.races import FakeStream, Races, Watch, install
from tests.test_executor import check_timeline, recording
from tests.tiny import eager, tokens

PLANS: dict[str, Callable[[ModelSpec], Plan]] = {
    "three ways": three_ways,
    "three ways, serial": lambda spec: three_ways(spec, overlap=False),
    "whole experts": whole_experts,
    "sent after the router, one slot": lambda spec: shares(spec, 0.3, stream_min_tokens=1, n_slots=1),
    "sent after the router in part, two slots": lambda spec: shares(spec, 0.3, stream_min_tokens=1, stream_columns=5),
    "all sent ahead": lambda spec: shares(spec, ahead=1.0),
    "cache of experts": lambda spec: with_cache(shares(spec, stream_min_tokens=1, n_slots=1), "model"),
    "cache of experts, written back": lambda spec: with_cache(shares(spec, stream_min_tokens=1), "layer"),
    "all on the CPU": lambda spec: shares(spec),
    "all on the device": lambda spec: shares(spec, gg=1.0),
}


def run(folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, planted: bool = False) -> Races:
    """Generate by a plan on the CUDA device over a driver of clocks; tokens must be Hugging Face's.

    planted: a wait was left out on purpose, so that tokens and order may come out wrong.
    """
    expected = greedy(eager(folder), tokens(5), 3)
    monkeypatch.setenv("SCHEINFER_KERNEL", "torch")  # the clocks see what torch reads and writes
    races = install(monkeypatch)
    monkeypatch.setattr(session, "open_device", lambda name, vram, threads: CudaDevice(0, vram, threads))
    with loaded(folder, plan, device="cuda:0") as model, Watch(races):
        greedy(model, tokens(2), 1)
        assert greedy(model, tokens(5), 3) == expected or planted
        timeline, routing = recording(model)
    if not planted:
        check_timeline(spec_of(folder), plan, timeline, routing, Workload(5, 3), clock_s=1.0)
    assert races.n_accesses > 1000
    return races


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("name", PLANS)
def test_no_plan_races(
    name: str, family: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(family)
    assert run(folder, PLANS[name](spec_of(folder)), monkeypatch).found == []


def test_layers_on_the_cpu_take_their_turn(tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    # clocks cannot tell the caller's own work from what it launches, so tokens and tasks are all that is checked
    folder = tiny_checkpoint("qwen2_moe")
    spec = spec_of(folder)
    cut = three_ways(spec)
    on_cpu = LayerPartition("CPU", (0,) * spec.layers[1].ffn.n_experts)
    places: tuple[Place, Place] = ("CPU", "GPU")
    for ends in places:
        plan = plan_for(spec, (cut.layers[0], on_cpu, cut.layers[2]), *cut.tiers, ends=ends)
        run(folder, plan, monkeypatch)


def no_wait(*args: object) -> None:
    """In place of a wait."""


PLANTED = {
    "streams do not wait for events": (FakeStream, "wait_event"),
    "the CPU does not wait for its input": (cuda._EventWait, "wait"),
    "streams do not wait for what they depend on": (CudaDevice, "_follow"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wait_that_is_left_out_is_found(
    name: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (owner, attribute) = tiny_checkpoint("llama"), PLANTED[name]
    monkeypatch.setattr(owner, attribute, no_wait)
    found = run(folder, three_ways(spec_of(folder)), monkeypatch, planted=True).found
    assert any("does not follow" in line for line in found)


def test_a_buffer_that_is_handed_on_too_early_is_found(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    # columns are sent two layers after those they overwrite: only the wait for their reader holds them back
    folder = tiny_checkpoint("llama")
    plan = shares(spec_of(folder), ahead=1.0)
    follow = CudaDevice._follow

    def forget_readers(self: CudaDevice, stream: FakeStream, name: str) -> None:
        if stream.name == "compute" or ".cg" not in name:
            follow(self, stream, name)  # type: ignore[arg-type]

    monkeypatch.setattr(CudaDevice, "_follow", forget_readers)
    found = run(folder, plan, monkeypatch, planted=True).found
    assert any(line.startswith("aten.copy_.default on copy 1") for line in found)
