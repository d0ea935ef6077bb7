"""What comes in and goes out, and where a router sends it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import FormatError
from sim.workload import RoutingTrace, Step, Workload, popularity, sample_routing
from tests.unit_machine import dense, mixed, moe


def test_a_generation_is_a_prefill_and_a_decode_step_for_every_token_but_the_first() -> None:
    assert Workload(n_prompt=5, n_gen=3, batch=2, n_depth=10).steps() == (
        Step("prefill", n_tokens=10, kv_tokens=15, batch=2),
        Step("decode1", n_tokens=2, kv_tokens=16, batch=2),
        Step("decode2", n_tokens=2, kv_tokens=17, batch=2),
    )


def test_one_token_is_a_prefill_alone() -> None:
    assert [step.name for step in Workload(n_prompt=5, n_gen=1).steps()] == ["prefill"]


def test_the_cache_must_hold_depth_prompt_and_generation() -> None:
    assert Workload(n_prompt=5, n_gen=3, n_depth=10).n_ctx == 18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_prompt": 0}, "n_prompt is 0; expected at least 1"),
        ({"n_gen": 0}, "n_gen is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"n_depth": -1}, "n_depth is -1; expected at least 0"),
        ({"skew": -0.5}, "skew is -0.5; expected a Zipf exponent"),
        ({"skew": float("nan")}, "skew is nan"),
        ({"skew": (1.0, -1.0)}, "expected a Zipf exponent"),
        ({"skew": ()}, "expected a Zipf exponent"),
    ],
)
def test_impossible_workloads_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Workload(**{"n_prompt": 4, "n_gen": 4, **change})  # type: ignore[arg-type]


# -- sampled routing ----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    n_experts=st.integers(2, 12),
    data=st.data(),
    n_tokens=st.integers(1, 50) | st.sampled_from((8192, 8193, 1_000_003)),
    skew=st.sampled_from((0.0, 0.7, 2.0, 9.9)),
    seed=st.integers(-5, 10**9),
)
def test_each_token_chooses_top_k_different_experts(
    n_experts: int, data: st.DataObject, n_tokens: int, skew: float, seed: int
) -> None:
    top_k = data.draw(st.integers(1, n_experts))
    spec = moe(2, 4, n_experts, top_k)
    workload = Workload(4, 4, seed=seed, skew=skew)
    for layer in range(2):
        counts = sample_routing(spec, layer, Step("prefill", n_tokens, n_tokens), workload)
        assert len(counts) == n_experts
        assert sum(counts) == n_tokens * top_k
        assert all(0 <= n <= n_tokens for n in counts)


def test_a_prompt_too_long_to_draw_takes_experts_in_the_proportions_of_a_shorter_one() -> None:
    spec, workload = moe(n_experts=8), Workload(4, 4, skew=1.0)
    long, short = (sample_routing(spec, 0, Step("prefill", n, n), workload) for n in (819_200, 8192))
    assert long == tuple(100 * n for n in short)


def test_sampling_is_repeatable_and_differs_by_seed_step_and_layer() -> None:
    spec, step = moe(n_experts=8), Step("prefill", 64, 64)
    drawn = [
        sample_routing(spec, layer, Step(name, 64, 64), Workload(4, 4, seed=seed))
        for layer, name, seed in [(0, "prefill", 0), (1, "prefill", 0), (0, "decode1", 0), (0, "prefill", 1)]
    ]
    assert len(set(drawn)) == 4
    assert drawn[0] == sample_routing(moe(n_experts=8), 0, step, Workload(9, 9, seed=0))


def test_a_layer_is_routed_alike_however_deep_the_model_is() -> None:
    step, workload = Step("prefill", 64, 64), Workload(4, 4)
    assert sample_routing(moe(n_layers=2), 1, step, workload) == sample_routing(moe(n_layers=5), 1, step, workload)


def test_a_dense_layer_takes_all_tokens() -> None:
    step = Step("prefill", 7, 7)
    assert sample_routing(dense(), 0, step, Workload(4, 4)) == (7,)
    assert [len(sample_routing(mixed(), layer, step, Workload(4, 4))) for layer in range(3)] == [1, 4, 1]


def test_experts_are_chosen_by_popularity() -> None:
    # top-1 of 4 experts, 20000 tokens: five standard deviations are at most 5 * sqrt(0.25 / 20000) = 1.8 %
    workload, n_tokens = Workload(4, 4, seed=3, skew=1.0), 20_000
    counts = sample_routing(moe(n_experts=4, top_k=1), 2, Step("prefill", n_tokens, n_tokens), workload)
    shares = popularity(4, 1.0, 3, 2)
    assert sorted(shares, reverse=True) == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25])
    for n, share in zip(counts, shares, strict=True):
        assert n / n_tokens == pytest.approx(share, abs=0.018)


def test_layers_take_exponents_in_turn() -> None:
    spec, step = moe(n_layers=4, n_experts=8), Step("prefill", 4000, 4000)
    workload = Workload(4, 4, skew=(0.0, 3.0))
    most = [max(sample_routing(spec, layer, step, workload)) / 4000 for layer in range(4)]
    assert most[0] < 0.3 > most[2]  # a quarter each, of two experts per token
    assert most[1] > 0.9 < most[3]


def test_without_skew_all_experts_are_equally_popular() -> None:
    n_tokens = 20_000
    counts = sample_routing(moe(n_experts=8, top_k=2), 0, Step("prefill", n_tokens, n_tokens), Workload(4, 4))
    assert all(n / n_tokens == pytest.approx(1 / 4, abs=0.018) for n in counts)


def test_a_second_choice_excludes_the_first() -> None:
    # weights 1 and 1/1024: the popular expert is nearly always in, so the others share the second choice
    counts = sample_routing(moe(n_experts=3, top_k=2), 0, Step("prefill", 1000, 1000), Workload(4, 4, skew=9.9))
    assert max(counts) > 990
    assert sum(counts) == 2000


def test_long_prompts_are_sampled_block_by_block() -> None:
    n_tokens = 100_000
    counts = sample_routing(
        moe(n_layers=1, n_experts=64, top_k=4), 0, Step("prefill", n_tokens, n_tokens), Workload(4, 4)
    )
    assert sum(counts) == 4 * n_tokens


# -- recorded routing ---------------------------------------------------------------------------------

TRACE = RoutingTrace({("prefill", 0): (3, 0, 5), ("prefill", 1): (8,), ("decode1", 0): (0, 1, 1)})


def test_a_trace_answers_what_it_recorded() -> None:
    assert TRACE.at("prefill", 0) == (3, 0, 5)
    assert TRACE.at("decode1", 1) is None


def test_a_trace_reads_back(tmp_path: Path) -> None:
    TRACE.save(tmp_path / "trace.parquet")
    assert RoutingTrace.load(tmp_path / "trace.parquet") == TRACE


def test_files_that_are_no_trace_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    with pytest.raises(FormatError, match="cannot read routing trace"):
        RoutingTrace.load(path)
    path.write_text("not parquet")
    with pytest.raises(FormatError, match="cannot read routing trace"):
        RoutingTrace.load(path)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"step": ["a"], "layer": [0], "expert": [0]}, "no column 'n_tokens'"),
        ({"step": ["a"], "layer": [0], "expert": [0], "n_tokens": ["many"]}, "not all whole numbers"),
        ({"step": ["a"], "layer": [0], "expert": [0], "n_tokens": [None]}, "not all whole numbers"),
        ({"step": ["a"] * 2, "layer": [0] * 2, "expert": [0, 2], "n_tokens": [1, 1]}, "for expert 2 after 1 experts"),
        ({"step": ["a"] * 2, "layer": [0] * 2, "expert": [0, 0], "n_tokens": [1, 1]}, "for expert 0 after 1 experts"),
        ({"step": ["a"], "layer": [0], "expert": [0], "n_tokens": [-1]}, "found -1 tokens"),
    ],
)
def test_traces_with_gaps_or_nonsense_are_refused(tmp_path: Path, frame: dict[str, list[object]], message: str) -> None:
    pd.DataFrame(frame).to_parquet(tmp_path / "trace.parquet")
    with pytest.raises(FormatError, match=message):
        RoutingTrace.load(tmp_path / "trace.parquet")
