"""Attention with a score more per head, and over the last keys only: the plain formula's, by kernel and by torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hwmodels.errors import ExecutionError
from runtime import native
from runtime.sinks import lower_right_band
from tests.test_prompt import INSTALLED, ISAS, TOLERANCE, drawn, needs_avx512, needs_kernel


def plainly(query: Tensor, key: Tensor, value: Tensor, scale: float, sinks: Tensor, window: int) -> Tensor:
    """[B, S, H, D] in float64; sinks [H], each beside the scores of a head's keys."""
    group, n_new, n_keys = query.shape[2] // key.shape[1], query.shape[1], key.shape[2]
    key, value = (t.double().repeat_interleave(group, 1) for t in (key, value))
    scores = query.double().transpose(1, 2) @ key.mT * scale
    scores = scores.masked_fill(~lower_right_band(n_new, n_keys, window, scores.device), -torch.inf)
    beside = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return (torch.cat([scores, beside], -1).softmax(-1)[..., :-1] @ value).transpose(1, 2)


def test_a_band_is_what_each_token_sees() -> None:
    assert lower_right_band(2, 4, 0, torch.device("cpu")).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert lower_right_band(2, 4, 2, torch.device("cpu")).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    assert lower_right_band(1, 4, 3, torch.device("cpu")).int().tolist() == [[0, 1, 1, 1]]


@needs_kernel
@settings(deadline=None, max_examples=150)
@given(
    n_new=st.one_of(st.integers(1, 9), st.integers(1, 140)),
    n_past=st.sampled_from([0, 1, 63, 64, 200, 255, 256, 600]),
    group=st.integers(1, 4),
    width=st.integers(1, 140),
    value_width=st.integers(1, 140),
    dtype=st.sampled_from(list(TOLERANCE)),
    isa=st.integers(0, 9),
    window=st.one_of(st.just(0), st.integers(1, 300)),
    height=st.sampled_from([None, -torch.inf, -3.0, 0.0, 8.0, 80.0]),
)
def test_scores_beside_those_of_keys_and_windows_are_the_formulas(
    n_new: int,
    n_past: int,
    group: int,
    width: int,
    value_width: int,
    dtype: torch.dtype,
    isa: int,
    window: int,
    height: float | None,
) -> None:
    assert isinstance(INSTALLED, native.Kernel)
    name = INSTALLED.isas[isa % len(INSTALLED.isas)]
    query, key, value = drawn(n_new, n_past, group, width, value_width, dtype)
    sinks = None if height is None else torch.randn(2 * group).add(height).to(dtype)
    exact = torch.full((2 * group,), -torch.inf) if sinks is None else sinks
    scale = width**-0.5
    if 0 < window < n_past + n_new and n_new > 1 and name not in ISAS:
        with pytest.raises(ExecutionError, match="no such instruction set"):
            INSTALLED.attend(query, key, value, scale, name, sinks=sinks, window=window)
        return
    found = INSTALLED.attend(query, key, value, scale, name, sinks=sinks, window=window)
    expected = plainly(query, key, value, scale, exact, window)
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@needs_avx512
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [5, 70, 300])
def test_a_row_of_many_with_a_window_has_the_same_bits_in_any_chunk(dtype: torch.dtype, isa: str, window: int) -> None:
    assert isinstance(INSTALLED, native.Kernel)
    query, key, value = drawn(301, 240, 2, 64, 64, dtype)
    sinks = torch.randn(4).to(dtype)
    whole = INSTALLED.attend(query, key, value, 0.125, isa, sinks=sinks, window=window)
    for first, last in ((0, 40), (7, 250), (250, 301)):
        some, n_keys = query[:, first:last].contiguous(), 240 + last
        part = INSTALLED.attend(some, key[:, :, :n_keys], value[:, :, :n_keys], 0.125, isa, sinks=sinks, window=window)
        assert torch.equal(part, whole[:, first:last])


@needs_avx512
@pytest.mark.parametrize("isa", ISAS)
def test_what_no_token_of_a_prompt_sees_does_not_matter(isa: str) -> None:
    assert isinstance(INSTALLED, native.Kernel)
    query, key, value = drawn(20, 600, 2, 64, 64, torch.bfloat16)
    expected = INSTALLED.attend(query, key, value, 0.125, isa, window=50)
    key[:, :, :500], value[:, :, :500] = torch.nan, torch.inf
    assert torch.equal(INSTALLED.attend(query, key, value, 0.125, isa, window=50), expected)
