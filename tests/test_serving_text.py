"""Text in pieces: joined they are the text, up to the first stop string, and no character is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from runtime.serving.text import TextPieces

ALPHABET = "ab é€😀"


def bytewise() -> PreTrainedTokenizerFast:
    """A tokenizer whose every token is one byte: a character comes in up to four."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


TOKENIZER = bytewise()


def pieces_of(text: str, stop: tuple[str, ...]) -> tuple[list[str], bool]:
    pieces = TextPieces(TOKENIZER, stop)
    found = []
    for token in TOKENIZER(text)["input_ids"]:
        found.append(pieces.add(token))
        if pieces.stopped:
            break
    return [*found, pieces.end()], pieces.stopped


def until(text: str, stop: tuple[str, ...]) -> str:
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]


@given(st.text(ALPHABET, max_size=12), st.lists(st.text(ALPHABET, min_size=1, max_size=3), max_size=2).map(tuple))
def test_pieces_are_the_text_up_to_the_first_stop(text: str, stop: tuple[str, ...]) -> None:
    found, stopped = pieces_of(text, stop)
    assert stopped == any(s in text for s in stop)
    # where two stop strings overlap, the one that is complete first ends the text
    first = min((text.index(s) + len(s) for s in stop if s in text), default=len(text))
    assert "".join(found) == until(text[:first], stop)


def test_a_character_comes_whole() -> None:
    found, _ = pieces_of("a€b", ())
    assert found == ["a", "", "", "€", "b", ""]


def test_what_may_be_a_stop_is_held_until_it_is_none() -> None:
    found, stopped = pieces_of("abab ", ("abb",))
    assert (found, stopped) == (["", "", "ab", "", "ab ", ""], False)


@pytest.mark.parametrize("cut", [1, 2])
def test_a_character_that_never_ends_is_shown_as_such(cut: int) -> None:
    pieces = TextPieces(TOKENIZER, ())
    for token in TOKENIZER("€")["input_ids"][:cut]:
        assert pieces.add(token) == ""
    assert set(pieces.end()) == {"\N{REPLACEMENT CHARACTER}"}
