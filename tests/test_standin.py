"""Stand-ins of every family generate over a past of any length, and what calibration reads from them is there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hwmodels.work import APART
from runtime.byturns import measure_by_turns
from runtime.rounds import Effort, finish
from runtime.session import PlannedModel
from runtime.standin import StandIn, built, forward, generate, measure_rest, settled, with_gaps
from runtime.synthetic import shrunk
from sim.plan import Place
from sim.timeline import Timeline
from tests.tiny import FAMILIES, tiny_config

ONCE = Effort(1, 1, 1.0)


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(tiny_config(family, **changes).to_json_string(use_diff=False))
    return {**config, "dtype": "float32"}


@contextmanager
def stand_in(config: dict[str, Any], place: Place = "GPU", by_turns: bool = False) -> Iterator[PlannedModel]:
    with built(StandIn(config, place, 1.0, 0.0, 80, "emulated", 1 << 30, 1, True, by_turns)) as model:
        yield model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", ["CPU", "GPU"])
def test_every_family_goes_on_from_a_past_that_it_did_not_compute(family: str, place: Place) -> None:
    with stand_in(config_of(family), place) as model:
        n_layers = model.executor.spec.n_layers
        for step in settled(generate(model, 40)):
            assert [s.layer for s in step.spans if s.kind == "attn" and s.resource == place] == list(range(n_layers))
        timeline, _ = forward(model, 4, 40)
        assert {s.layer for s in timeline.spans if s.kind == "attn"} == set(range(n_layers))


def test_without_an_empty_past_ends_hand_offs_and_changes_of_place_are_measured_too() -> None:
    config = config_of("llama")
    with stand_in(config) as busy, stand_in(config, by_turns=True) as by_turns:
        part = finish(measure_by_turns(by_turns, busy, (24, 40), ONCE))
        assert {c.op for c in part.curves} == set(APART.values())
        assert {move.to for move in part.moves} == {"CPU", "GPU"}
        assert {"attn", "head"} <= {c.op for c in finish(measure_rest(busy, "GPU", (1,), (24,), ONCE)).curves}


def test_a_prompts_head_and_the_gaps_around_its_attention_on_the_cpu_are_measured() -> None:
    with stand_in(config_of("llama"), "CPU") as model:
        curves = {c.op: c for c in finish(measure_rest(model, "CPU", (1, 4, 40), (0,), ONCE)).curves}
        assert [s.n_tokens for s in curves["head_prompt"].samples] == [4, 40]
        assert [s.n_tokens for s in curves["head"].samples] == [1]
        spans = sorted(forward(model, 4, 0)[0].spans, key=lambda s: s.start_s)
        whole = with_gaps(Timeline("measured", tuple(spans), {}))
        for before, span, after in zip(whole.spans, whole.spans[1:], whole.spans[2:], strict=False):
            if span.kind == "attn":
                assert (span.start_s, span.end_s) == (before.end_s, after.start_s)


@pytest.mark.parametrize(("place", "by_turns"), [("GPU", False), ("CPU", False), ("GPU", True)])
def test_layers_with_and_without_windows_make_one_curve(place: Place, by_turns: bool) -> None:
    with stand_in(config_of("gpt_oss"), place, by_turns) as model:
        if by_turns:
            found = finish(measure_by_turns(model, model, (0, 24, 40), ONCE)).curves
        else:
            found = finish(measure_rest(model, place, (1, 4, 20, 40), (0, 24), ONCE)).curves
        (curve,) = (c for c in found if c.op in ("attn", APART["attn"]))
        assert by_turns or [s.n_tokens for s in curve.samples if s.n_tokens > 1] == [4, 4, 20, 20, 40, 40]


def test_a_config_that_says_no_cache_is_timed_with_one() -> None:
    with stand_in(config_of("llama", use_cache=False)) as model, stand_in(config_of("llama")) as usual:
        own, others = (
            [(s.kind, s.flops, s.bytes) for s in generate(m, 40).step("decode3").spans] for m in (model, usual)
        )
        assert own == others


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen2_moe"])
def test_a_model_of_one_layer_is_stood_for_by_two(family: str) -> None:
    small = shrunk(config_of(family, num_hidden_layers=1), 1 << 20, 1 << 20)
    with stand_in(small) as model:
        assert model.executor.spec.n_layers == 2
        assert len(settled(generate(model))) > 0
