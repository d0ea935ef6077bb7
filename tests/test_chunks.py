"""A prompt fed in chunks: the same tokens in more steps, less memory, the same answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import FormatError
from sim.bounds import bound
from sim.memory import activation_bytes, memory
from sim.plan import Plan, load_plan
from sim.planner import explain, plan
from sim.policies.auto import decide
from sim.policies.problem import Problem
from sim.search import search
from sim.simulate import forecast, simulate
from sim.space import paper_space
from sim.workload import Step, Workload
from tests.machines import budget, dense, machine, moe
from tests.planned import three_ways


def chunked(spec, chunk_tokens: int | None, **how) -> Plan:
    return replace(three_ways(spec, **how), chunk_tokens=chunk_tokens)


# -- steps ------------------------------------------------------------------------------------------------------


def test_five_tokens_in_chunks_of_two_are_three_steps_of_growing_depth():
    assert Workload(n_prompt=5, n_gen=2, batch=3, n_depth=10).steps(2) == (
        Step("prefill", 6, 12, 3),
        Step("prefill1", 6, 14, 3),
        Step("prefill2", 3, 15, 3),
        Step("decode1", 3, 16, 3),
    )


@given(st.integers(1, 5000), st.integers(1, 5), st.integers(0, 9), st.none() | st.integers(1, 6000))
def test_chunks_add_up_to_the_prompt(n_prompt, batch, n_depth, chunk):
    steps = Workload(n_prompt, 3, batch, n_depth).prompt_steps(chunk)
    assert sum(step.n_tokens for step in steps) == n_prompt * batch
    assert len(steps) == -(-n_prompt // (chunk or n_prompt))
    assert [step.kv_tokens for step in steps] == sorted({step.kv_tokens for step in steps})
    assert steps[-1].kv_tokens == n_depth + n_prompt
    assert max(step.n_tokens for step in steps) <= (chunk or n_prompt) * batch


@given(st.integers(1, 300), st.integers(300, 900))
def test_a_chunk_as_long_as_the_prompt_is_no_chunk(n_prompt, chunk):
    assert Workload(n_prompt, 4).steps(chunk) == Workload(n_prompt, 4).steps()


# -- the plan ---------------------------------------------------------------------------------------------------


def test_a_plan_without_chunks_keeps_the_id_and_the_file_of_the_time_before_chunks(tmp_path):
    made = chunked(dense(), None)
    made.save(tmp_path / "plan.json")
    older = (tmp_path / "plan.json").read_text().replace(',\n "chunk_tokens": null', "")
    assert "chunk_tokens" not in older
    (tmp_path / "older.json").write_text(older)
    assert load_plan(tmp_path / "older.json") == made
    assert load_plan(tmp_path / "older.json").id == made.id
    assert chunked(dense(), 4).id != made.id


def test_a_plan_with_chunks_survives_its_file_and_a_chunk_of_nothing_is_refused(tmp_path):
    made = chunked(dense(), 4)
    made.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made
    chunked(dense(), 0).save(tmp_path / "plan.json")
    with pytest.raises(FormatError, match="chunk_tokens: is 0; expected at least 1"):
        load_plan(tmp_path / "plan.json")


def test_activations_count_a_chunk_and_nothing_else_changes():
    spec = dense()
    whole, cut = (memory(spec, chunked(spec, n, batch=2, n_ctx=64)) for n in (None, 16))
    assert whole.activations == activation_bytes(spec, 2 * 64, 2)
    assert cut.activations == activation_bytes(spec, 2 * 16, 2)
    assert replace(cut, activations=whole.activations) == whole


# -- simulation -------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.sampled_from((dense(2), moe(2))), st.integers(1, 30), st.integers(1, 8), st.booleans())
def test_a_forecast_of_few_chunks_is_what_simulating_all_of_them_says(spec, n_prompt, chunk, contention):
    profile = machine(together=(0.6, 0.7))
    made, workload = chunked(spec, chunk, batch=1), Workload(n_prompt, 3)
    whole = simulate(spec, made, profile, workload, contention=contention)
    said = forecast(spec, made, profile, workload, contention)
    assert [name for name in whole.steps if name.startswith("prefill")] == [
        s.name for s in workload.prompt_steps(chunk)
    ]
    # routing is sampled anew for every chunk: dense chunks are alike, those of experts nearly
    assert said.ttft_s == pytest.approx(whole.ttft_s, rel=1e-6 if not spec.is_moe else 0.25)
    assert said.prefill_tok_s == pytest.approx(n_prompt / said.ttft_s)


def test_chunks_send_the_weights_again_and_do_the_same_arithmetic():
    spec, workload = dense(), Workload(12, 1)
    one, three = (simulate(spec, chunked(spec, n, batch=1), machine(), workload) for n in (None, 4))

    def total(timeline, field, kinds):
        return sum(getattr(span, field) for span in timeline.spans if span.kind in kinds)

    assert total(three, "bytes", {"send"}) == 3 * total(one, "bytes", {"send"})
    mlp = {"gg", "cg", "cc"}
    assert total(three, "flops", mlp) == total(one, "flops", mlp)
    assert total(three, "flops", {"attn"}) == pytest.approx(total(one, "flops", {"attn"}))  # causal: the same pairs


@settings(max_examples=10, deadline=None)
@given(st.sampled_from((dense(2), moe(2))), st.integers(2, 40), st.integers(1, 20), st.floats(0.1, 1.2))
def test_no_plan_with_chunks_beats_the_bound_of_such_plans(spec, n_prompt, chunk, share):
    workload, profile = Workload(n_prompt, 3), machine()
    problem = Problem(spec, profile, budget(spec, workload, share), workload, chunk_tokens=chunk)
    found = search(problem, "auto", [paper_space(problem)])
    limit = bound(spec, profile, problem.vram_budget_bytes, workload, chunk_tokens=chunk)
    timeline = simulate(spec, found.plan, profile, workload)
    assert timeline.ttft_s >= limit.prefill_s * (1 - 1e-9)
    assert timeline.tpot_s >= limit.decode_s * (1 - 1e-9)
    assert found.plan.chunk_tokens == chunk


# -- the decision -----------------------------------------------------------------------------------------------

LONG = Workload(n_prompt=8192, n_gen=64)
WIDE = dense(4, columns=1024, max_position_embeddings=16384)


def test_auto_cuts_a_long_prompt_where_its_activations_would_take_the_place_of_weights():
    # all MLPs fit beside the activations of a chunk, none beside those of the whole prompt
    fixed = memory(WIDE, decide(Problem(WIDE, machine(), 10**9, LONG)).plan)
    of_chunk = activation_bytes(WIDE, 2048, 1)
    total = fixed.vram_bytes - fixed.activations + of_chunk
    slow_cpu = machine(cpu_gb_s=0.1, link_gb_s=0.1)
    made = plan(WIDE, slow_cpu, total, LONG)
    assert made.chunk_tokens is not None
    assert memory(WIDE, made).vram_bytes <= total
    assert f"chunks of at most {made.chunk_tokens} tokens" in explain(WIDE, slow_cpu, made, LONG)


def test_auto_leaves_a_prompt_whole_where_memory_is_plenty():
    assert plan(WIDE, machine(), 10**9, LONG).chunk_tokens is None


def test_auto_leaves_a_short_prompt_whole():
    workload = Workload(200, 4)
    assert plan(WIDE, machine(), budget(WIDE, workload, 0.3), workload).chunk_tokens is None
