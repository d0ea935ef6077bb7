"""A conversation computes only its new tokens, and answers as if it had computed all of them."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.errors import ExecutionError
from runtime.prefix import PrefixCache, shared
from sim.plan import Plan
from tests.caches import with_cache
from tests.conftest import TinyCheckpoint
from tests.planned import greedy, loaded, shares, spec_of, three_ways
from tests.tiny import tokens

HOW: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def ids_of(n: int, seed: int = 0) -> list[int]:
    return [int(token) for token in tokens(n, seed=seed)[0]]


def anew(model: Any, ids: list[int]) -> list[int]:
    import torch

    return greedy(model, torch.tensor([ids]), 6)[0]


def computed(model: Any) -> int:
    """Tokens that the last run's prompt step computed, each routed to or through one MLP of the first layer."""
    counts = model.last_routing.counts["prefill", 0]
    return sum(counts) // model.executor.spec.layers[0].ffn.top_k


@pytest.fixture
def mixtral(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("mixtral")


def wide(folder: Path) -> Plan:
    return three_ways(spec_of(folder), n_ctx=200)


def test_a_second_turn_computes_its_own_tokens_alone(mixtral: Path) -> None:
    # turn 1 asks 9 and answers 6: 14 are in the cache, as the last one was chosen and not computed; turn 2 adds 4
    with loaded(mixtral, wide(mixtral)) as model:
        talk, first = PrefixCache(model), ids_of(9)
        answer = talk.generate(first, **HOW)
        assert (talk.n_kept, computed(model)) == (0, 9)
        second = [*first, *answer, *ids_of(4, seed=1)]
        found = talk.generate(second, **HOW)
        assert (talk.n_kept, computed(model)) == (14, 5)
        assert found == anew(model, second)


def test_the_same_prompt_again_computes_its_last_token(mixtral: Path) -> None:
    with loaded(mixtral, wide(mixtral)) as model:
        talk = PrefixCache(model)
        answers = [talk.generate(ids_of(9), **HOW) for _ in range(3)]
        assert talk.n_kept == 8
        assert answers == [anew(model, ids_of(9))] * 3


def test_a_template_that_rewrites_history_falls_back_to_what_is_common(mixtral: Path) -> None:
    with loaded(mixtral, wide(mixtral)) as model:
        talk = PrefixCache(model)
        talk.generate(ids_of(20), **HOW)
        rewritten = [*ids_of(20)[:12], *ids_of(5, seed=3)]
        assert shared(ids_of(20), rewritten) == 12
        assert talk.generate(rewritten, **HOW) == anew(model, rewritten)
        assert talk.n_kept == 12


def test_a_prompt_in_chunks_goes_on_from_what_is_kept(mixtral: Path) -> None:
    # 9 tokens in chunks of 4 are three steps; the next turn's 5 new ones are two
    with loaded(mixtral, replace(wide(mixtral), chunk_tokens=4)) as model:
        talk, first = PrefixCache(model), ids_of(9)
        second = [*first, *talk.generate(first, **HOW), *ids_of(4, seed=1)]
        found = talk.generate(second, **HOW)
        steps = model.last_timeline.steps if model.last_timeline is not None else ()
        assert [step for step in steps if step.startswith("prefill")] == ["prefill", "prefill1"]
        assert found == anew(model, second)


def test_what_is_forgotten_is_computed_again(mixtral: Path) -> None:
    with loaded(mixtral, wide(mixtral)) as model:
        talk = PrefixCache(model)
        talk.generate(ids_of(9), **HOW)
        talk.clear()
        assert talk.generate(ids_of(9), **HOW) == anew(model, ids_of(9))
        assert talk.n_kept == 0


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "mixtral"])
def test_any_conversation_is_answered_as_if_computed_anew(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(family)
    spec = spec_of(folder)
    plan = shares(spec, gg=0.5, n_ctx=200)
    turn = st.tuples(st.integers(0, 30), st.lists(st.integers(3, 96), min_size=1, max_size=5))

    with loaded(folder, with_cache(plan, "layer") if spec.is_moe else plan) as model:

        @settings(max_examples=15)
        @given(st.lists(turn, min_size=1, max_size=4))
        def check(turns: list[tuple[int, list[int]]]) -> None:
            talk, history = PrefixCache(model), list[int]()
            for n_kept, new in turns:  # each turn keeps some of the history, and says something new
                history = [*history[:n_kept], *new]
                answer = talk.generate(history, **HOW)
                assert answer == anew(model, history)
                history += answer

        check()


@pytest.mark.parametrize(("n_first", "n_back", "kept"), [(4, 2, 3), (9, 0, 14), (9, 4, 0), (30, 20, 0)])
def test_a_sliding_window_is_cut_while_it_is_not_full_and_else_computed_again(
    n_first: int, n_back: int, kept: int, tiny_checkpoint: TinyCheckpoint
) -> None:
    # a window of 12: 4 + 5 tokens fit and can be taken back; 9 + 5 fill it, and only going on is possible
    folder = tiny_checkpoint("mistral", sliding_window=12)
    with loaded(folder, wide(folder)) as model:
        talk, first = PrefixCache(model), ids_of(n_first)
        answer = talk.generate(first, **HOW)
        history = [*first, *answer]
        second = [*(first[: n_first - n_back + 1] if n_back else history), *ids_of(3, seed=5)]
        assert talk.generate(second, **HOW) == anew(model, second)
        assert talk.n_kept == kept


def test_after_a_failure_the_next_prompt_is_computed_whole(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_executor import break_task

    with loaded(mixtral, wide(mixtral)) as model:
        talk = PrefixCache(model)
        talk.generate(ids_of(9), **HOW)
        longer = [*ids_of(9), *ids_of(3, seed=2)]
        with monkeypatch.context() as patched:
            break_task(patched, "decode2.L01.cc", RuntimeError("the wire is cut"))
            with pytest.raises(ExecutionError, match=r"decode2\.L01\.cc"):
                talk.generate(longer, **HOW)
        assert talk.generate(longer, **HOW) == anew(model, longer)
        assert talk.n_kept == 0


def test_no_thread_is_added(mixtral: Path) -> None:
    with loaded(mixtral, wide(mixtral)) as model:
        before = threading.active_count()
        PrefixCache(model).generate(ids_of(3), **HOW)
        assert threading.active_count() == before
