"""Whatever fails, wherever: one error that names a task, nothing hangs, and the model works on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hwmodels.errors import ExecutionError
from runtime.devices.emulated import EmulatedDevice
from runtime.session import PlannedModel
from sim.model import ModelSpec
from sim.plan import LayerPartition, Plan
from tests.caches import with_cache
from tests.conftest import TinyCheckpoint
from tests.planned import greedy, loaded, shares, spec_of, three_ways
from tests.test_executor import at_rest, break_task, our_threads, watchdog  # noqa: F401 - a fixture
from tests.tiny import tokens

N_GEN = 4


@pytest.fixture
def mixtral(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("mixtral")


def cached(spec: ModelSpec) -> Plan:
    """Misses are sent into the cache, and a copy of what leaves goes back."""
    return with_cache(shares(spec, gg=0.25), "layer")


def mixed(spec: ModelSpec) -> Plan:
    """The middle layer lives on the CPU: activations go to and fro."""
    plan = three_ways(spec)
    on_cpu = LayerPartition("CPU", (0,) * spec.layers[1].ffn.n_experts)
    tiers = tuple(replace(tier, ahead=(tier.ahead[0], 0, tier.ahead[2])) for tier in plan.tiers)
    return replace(plan, layers=(plan.layers[0], on_cpu, plan.layers[2]), tiers=tiers)


PLANS: dict[str, Callable[[ModelSpec], Plan]] = {"three ways": three_ways, "cached": cached, "mixed": mixed}


class Cut:
    """A link that breaks at one copy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n_copies, self.breaks_at = 0, -1
        copy = EmulatedDevice.copy

        def counted(device: EmulatedDevice, *args: Any, **how: Any) -> None:
            self.n_copies += 1
            if self.n_copies == self.breaks_at:
                raise RuntimeError("the wire is cut")
            copy(device, *args, **how)

        monkeypatch.setattr(EmulatedDevice, "copy", counted)
        monkeypatch.setattr(EmulatedDevice, "takes_words", False)  # copies of native queues cannot fail


@pytest.mark.parametrize("name", PLANS)
def test_a_copy_that_fails_is_named_whichever_it_is(name: str, mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Cut(monkeypatch)
    with loaded(mixtral, PLANS[name](spec_of(mixtral))) as model:
        expected, threads = greedy(model, tokens(5), N_GEN), our_threads()
        empty_cache(model)
        cut.n_copies = 0
        greedy(model, tokens(5), N_GEN)
        n_copies, named = cut.n_copies, set()
        for at in range(1, n_copies + 1, max(1, n_copies // 24)):
            empty_cache(model)
            cut.n_copies, cut.breaks_at = 0, at
            with pytest.raises(
                ExecutionError, match=r"^task \S+ failed on (H2D|D2H): RuntimeError: the wire is cut$"
            ) as e:
                greedy(model, tokens(5), N_GEN)
            named.add(re.sub(r".*\.(\w+) failed.*", r"\1", str(e.value)))
            cut.breaks_at = -1
            at_rest(model, threads)
            assert greedy(model, tokens(5), N_GEN) == expected
    assert len(named) > 1, named


def empty_cache(model: PlannedModel) -> None:
    """Let every run miss alike."""
    if model.executor.cache is not None:
        model.executor.cache.clear()


MODULES = {
    "embed": ("model.embed_tokens", "prefill.embed", "GPU"),
    "attention": ("model.layers.1.self_attn", "prefill.L01.attn", "GPU"),
    "router": ("model.layers.2.mlp.gate", "prefill.L02.attn", "GPU"),
    "head": ("lm_head", "prefill.head", "GPU"),
}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_of_the_model_that_fails_is_named_by_its_task(
    module: str, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, task, resource = MODULES[module]
    with loaded(mixtral, three_ways(spec_of(mixtral))) as model:
        expected, threads = greedy(model, tokens(5), N_GEN), our_threads()
        with monkeypatch.context() as patched:
            patched.setattr(model.get_submodule(name), "forward", failing(RuntimeError("no kernel")))
            with pytest.raises(ExecutionError) as caught:
                greedy(model, tokens(5), N_GEN)
        assert str(caught.value) == f"task {task} failed on {resource}: RuntimeError: no kernel"
        assert str(caught.value.__cause__) == "no kernel"
        at_rest(model, threads)
        assert greedy(model, tokens(5), N_GEN) == expected


def failing(error: Exception) -> Callable[..., Iterator[None]]:
    def fail(*args: object, **how: object) -> Iterator[None]:
        raise error

    return fail


@pytest.mark.parametrize("kind", ["cc", "gg", "cg", "send"])
def test_memory_that_runs_out_in_a_task_names_it_and_says_what_to_do(
    kind: str, mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(mixtral, three_ways(spec_of(mixtral))) as model:
        expected = greedy(model, tokens(5), N_GEN)
        break_task(monkeypatch, f"decode1.L02.{kind}", torch.OutOfMemoryError("tried to allocate 1 GiB"))
        says = rf"^task decode1\.L02\.{kind} failed on \w+: OutOfMemoryError: tried .*; raise --vram-budget"
        with pytest.raises(ExecutionError, match=says):
            greedy(model, tokens(5), N_GEN)
        assert greedy(model, tokens(5), N_GEN) == expected


def test_two_tasks_that_fail_at_once_are_one_error(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(mixtral, three_ways(spec_of(mixtral))) as model:
        expected, threads = greedy(model, tokens(5), N_GEN), our_threads()
        for kind in ("cc", "send", "gg"):
            break_task(monkeypatch, f"decode1.L02.{kind}", RuntimeError(kind))
        with pytest.raises(ExecutionError, match=r"^task decode1\.L02\.(cc|gg|send) failed on \w+: RuntimeError: \w+$"):
            greedy(model, tokens(5), N_GEN)
        _until_all_failed(model)
        at_rest(model, threads)
        assert greedy(model, tokens(5), N_GEN) == expected


def _until_all_failed(model: PlannedModel) -> None:
    """Tasks that were given up before they began break at the next run: let them."""
    for _ in range(3):
        try:
            greedy(model, tokens(5), N_GEN)
        except ExecutionError:
            continue
        return
