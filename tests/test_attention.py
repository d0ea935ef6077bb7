"""Attention of one new token on the CPU is sdpa's."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from runtime.attention import attend_one


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 70), st.sampled_from([8, 64]))
def test_one_query_attends_as_sdpa_does(batch: int, n_kv: int, group: int, n_past: int, width: int) -> None:
    query = torch.randn(batch, n_kv * group, 1, width)
    key, value = torch.randn(2, batch, n_kv, n_past, width)
    expected = scaled_dot_product_attention(query, key, value, enable_gqa=True, scale=0.3)
    torch.testing.assert_close(attend_one(query, key, value, 0.3), expected, atol=1e-5, rtol=1e-5)


def test_it_rounds_once_so_that_it_is_as_exact_as_sdpa_in_bfloat16() -> None:
    query = torch.randn(1, 8, 1, 64).bfloat16()
    key, value = torch.randn(2, 1, 2, 300, 64).bfloat16()
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), enable_gqa=True)
    torch.testing.assert_close(attend_one(query, key, value, None).double(), exact, atol=2e-3, rtol=8e-3)
