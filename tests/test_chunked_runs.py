"""Prompts fed in chunks say what Hugging Face says of whole ones, and run the graphs that the simulator compiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from hwmodels.errors import PlanError
from runtime.measure import measure
from sim.anatomy import anatomy
from sim.compile import compile_step
from sim.simulate import simulate
from sim.workload import Workload
from tests.conftest import TinyCheckpoint
from tests.planned import greedy, left_padded, loaded, logits, plans, shares, spec_of, three_ways
from tests.tiny import eager, tokens
from tests.unit_machine import UNIT

N_GEN = 4


def chunks_agree(folder: Path, n_examples: int) -> Callable[[], None]:
    """A property over plans, chunk sizes and prompts: tokens, and the scores they were chosen by, are eager's."""
    spec, model_of_hf = spec_of(folder), eager(folder)

    @settings(max_examples=n_examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(plans(spec), st.integers(1, 20), st.integers(1, 19), st.sampled_from((1, 3)))
    def agree(plan, n, chunk, batch):
        ids, mask = left_padded(tokens(n, batch), [n, max(1, n // 3), max(1, n - 1)][:batch])
        with loaded(folder, replace(plan, chunk_tokens=chunk)) as model:
            assert greedy(model, ids, N_GEN, mask) == greedy(model_of_hf, ids, N_GEN, mask)
            first = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=1,
                output_logits=True,
                return_dict_in_generate=True,
                do_sample=False,
                pad_token_id=0,
            )
            expected = logits(model_of_hf, ids, mask)[:, -1]
            torch.testing.assert_close(first.logits[0], expected, atol=1e-4, rtol=0)

    return agree


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_any_plan_with_any_chunk_says_what_eager_hugging_face_says(family: str, tiny_checkpoint: TinyCheckpoint):
    chunks_agree(tiny_checkpoint(family), 12)()


@pytest.mark.parametrize(("family", "chunk", "n_depth"), [("llama", 4, 0), ("llama", 3, 5), ("mixtral", 4, 0)])
def test_a_chunked_run_is_the_graphs_that_the_simulator_compiles(family, chunk, n_depth, tiny_checkpoint):
    folder = tiny_checkpoint(family)
    spec, workload = spec_of(folder), Workload(9, N_GEN, n_depth=n_depth)
    plan = replace(three_ways(spec), chunk_tokens=chunk)
    ids = tokens(workload.n_depth + workload.n_prompt)[0].tolist()
    with loaded(folder, plan) as model:
        (run,) = measure(model, ids, N_GEN, repetitions=1, n_depth=n_depth)
    simulated = simulate(spec, plan, UNIT, workload, run.routing)
    assert run.timeline.steps == simulated.steps == tuple(step.name for step in workload.steps(chunk))
    for step in workload.steps(chunk):
        graph = compile_step(spec, plan, step, lambda s, layer: run.routing.counts[s.name, layer])
        spans = {span.task: span for span in run.timeline.step(step.name).spans}
        assert set(spans) == {task.id for task in graph}
        assert all((spans[task.id].bytes, spans[task.id].flops) == (task.bytes, task.flops) for task in graph)
    prefill = [run.timeline.step_s[f"prefill{i or ''}"] for i in range(3)]
    assert run.ttft_s == pytest.approx(sum(prefill))
    assert list(anatomy(spec, plan, UNIT, workload, run.timeline, run.routing)["step"]) == list(run.timeline.steps)


def test_a_step_larger_than_the_chunk_is_refused_with_what_to_do(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    with loaded(folder, replace(shares(spec_of(folder), gg=0.5), chunk_tokens=4)) as model:
        with pytest.raises(PlanError, match="a step of 15 tokens.*chunks of 4 for each of 3; call generate"):
            model(tokens(15))
        assert len(greedy(model, tokens(15), 2)[0]) == 2


def test_a_user_may_cut_a_prompt_that_the_plan_feeds_whole(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    with loaded(folder, three_ways(spec_of(folder))) as model:
        whole = greedy(model, tokens(9), 3)
        model.generate(
            tokens(9), max_new_tokens=3, min_new_tokens=3, prefill_chunk_size=5, do_sample=False, pad_token_id=0
        )
        assert model.last_timeline is not None
        assert model.last_timeline.steps == ("prefill", "prefill1", "decode1", "decode2")
        assert greedy(model, tokens(9), 3) == whole


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_checkpoint_that_training_left_without_a_cache_generates_with_one(chunk, tiny_checkpoint):
    folder, asked = tiny_checkpoint("llama", use_cache=False), {"max_new_tokens": N_GEN, "do_sample": False}
    plan = replace(three_ways(spec_of(folder)), chunk_tokens=chunk)
    with loaded(folder, plan) as model:
        (run,) = measure(model, tokens(9)[0].tolist(), N_GEN, repetitions=1)
        assert run.timeline.steps == tuple(step.name for step in Workload(9, N_GEN).steps(chunk))
        mlps = [s for s in run.timeline.spans if s.kind in ("cc", "gg", "cg") and s.layer == 0]
        assert len({sum(s.flops for s in mlps if s.step == f"decode{i}") for i in range(1, N_GEN)}) == 1
        cached = model.generate(tokens(9), pad_token_id=0, **asked).tolist()
        assert cached == model.generate(tokens(9), pad_token_id=0, use_cache=False, **asked).tolist()
        own = GenerationConfig(use_cache=False, pad_token_id=0, **asked)
        assert cached == model.generate(tokens(9), generation_config=own).tolist()
        assert cached == model.generate(tokens(9), own).tolist()
        assert cached == eager(folder).generate(tokens(9), pad_token_id=0, **asked).tolist()
