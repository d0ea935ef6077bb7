"""Attention by the native kernel is the plain formula's, to the same bits however a prompt is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from hwmodels.errors import KernelError
from runtime import native, prompt
from runtime.attention import attend
from runtime.changes import packed_from
from runtime.projection import FEW_ROWS, computes_prompt, is_kernels

INSTALLED = native.installed()
ISAS = (
    [] if isinstance(INSTALLED, KernelError) else [isa for isa in INSTALLED.isas if isa.startswith(("AVX512", "AMX"))]
)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
needs_kernel = pytest.mark.skipif(isinstance(INSTALLED, KernelError), reason=str(INSTALLED))
needs_avx512 = pytest.mark.skipif(not ISAS, reason="no native kernel with AVX-512")


def drawn(n_new: int, n_past: int, group: int, width: int, value_width: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(n_new + n_past)
    n_keys = n_new + n_past
    shapes = [(2, n_new, 2 * group, width), (2, 2, n_keys + 5, width), (2, 2, n_keys + 5, value_width)]
    query, key, value = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    return [query, key[:, :, :n_keys], value[:, :, :n_keys]]  # as a cache that has room


def plainly(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[B, S, H, D] over [B, K, T, D] in float64, each of the last S tokens up to itself."""
    group = query.shape[2] // key.shape[1]
    key, value = (t.double().repeat_interleave(group, 1) for t in (key, value))
    scores = query.double().transpose(1, 2) @ key.mT * scale
    n_new, n_keys = scores.shape[-2:]
    seen = torch.arange(n_keys) <= torch.arange(n_new)[:, None] + n_keys - n_new
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@needs_avx512
@settings(deadline=None, max_examples=80)
@given(
    n_new=st.integers(1, 130),
    n_past=st.sampled_from([0, 1, 63, 64, 200, 600]),
    group=st.integers(1, 3),
    width=st.integers(1, 140),
    value_width=st.integers(1, 140),
    dtype=st.sampled_from(list(TOLERANCE)),
    isa=st.sampled_from(ISAS or [""]),
)
def test_every_new_token_attends_over_all_before_it_and_itself(
    n_new: int, n_past: int, group: int, width: int, value_width: int, dtype: torch.dtype, isa: str
) -> None:
    assert isinstance(INSTALLED, native.Kernel)
    query, key, value = drawn(n_new, n_past, group, width, value_width, dtype)
    found = INSTALLED.attend(query, key, value, width**-0.5, isa)
    exact = plainly(query, key, value, width**-0.5)
    torch.testing.assert_close(found.double(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def of_tokens(kernel: native.Kernel, drawn: list[Tensor], first: int, last: int, n_threads: int, isa: str) -> Tensor:
    """What new tokens from one to another get that see what comes before them."""
    query, key, value = drawn
    n_keys = key.shape[2] - query.shape[1] + last
    native.set_threads(n_threads)
    try:
        return kernel.attend(query[:, first:last].contiguous(), key[:, :, :n_keys], value[:, :, :n_keys], 0.125, isa)
    finally:
        native.set_threads(0)


@needs_avx512
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_has_the_same_bits_on_any_number_of_threads_and_in_any_chunk(dtype: torch.dtype, isa: str) -> None:
    assert isinstance(INSTALLED, native.Kernel)
    given = drawn(301, 40, 2, 64, 64, dtype)
    whole = INSTALLED.attend(*given, 0.125, isa)
    for first, last, n_threads in ((0, 301, 1), (0, 301, 3), (0, 40, 2), (7, 250, 2), (250, 301, 2)):
        assert torch.equal(of_tokens(INSTALLED, given, first, last, n_threads, isa), whole[:, first:last])


@needs_kernel
@settings(deadline=None, max_examples=60)
@given(
    n_new=st.integers(2, 8),
    n_past=st.sampled_from([0, 1, 15, 249, 254, 255, 256, 257, 509, 700]),
    group=st.integers(1, 4),
    width=st.integers(1, 140),
    value_width=st.integers(1, 140),
    dtype=st.sampled_from(list(TOLERANCE)),
    isa=st.integers(0, 9),
    n_threads=st.integers(1, 3),
)
def test_a_token_among_few_has_the_bits_that_it_has_alone(
    n_new: int, n_past: int, group: int, width: int, value_width: int, dtype: torch.dtype, isa: int, n_threads: int
) -> None:
    assert isinstance(INSTALLED, native.Kernel)
    given, name = drawn(n_new, n_past, group, width, value_width, dtype), INSTALLED.isas[isa % len(INSTALLED.isas)]
    assume(name in ("portable", "AVX2") or n_new * group <= (32 if dtype == torch.float32 else 4))
    together = of_tokens(INSTALLED, given, 0, n_new, n_threads, name)
    for i in range(n_new):
        assert torch.equal(of_tokens(INSTALLED, given, i, i + 1, 1, name), together[:, i : i + 1])


@needs_avx512
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_calibration_knows_from_how_many_tokens_on_keys_are_packed(dtype: torch.dtype, group: int) -> None:
    assert isinstance(INSTALLED, native.Kernel)
    first = packed_from(str(dtype).removeprefix("torch."), group)
    for n_new, is_packed in ((first - 1, False), (first, True)):
        given = drawn(n_new, 300, group, 64, 64, dtype)
        together = of_tokens(INSTALLED, given, 0, n_new, 1, INSTALLED.isa)
        alone = [of_tokens(INSTALLED, given, i, i + 1, 1, INSTALLED.isa) for i in range(n_new)]
        assert torch.equal(together, torch.cat(alone, 1)) is not is_packed


@needs_avx512
@torch.no_grad()
def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    assert isinstance(INSTALLED, native.Kernel)
    query, key, value = (100 * t for t in drawn(300, 0, 1, 64, 64, torch.float32))
    torch.testing.assert_close(
        INSTALLED.attend(query, key, value, 1.0).double(), plainly(query, key, value, 1.0), atol=1e-3, rtol=1e-3
    )


@needs_avx512
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n_new", [7, 70])
def test_what_is_not_a_number_stays_so_and_in_its_row(dtype: torch.dtype, isa: str, n_new: int) -> None:
    assert isinstance(INSTALLED, native.Kernel)
    query, key, value = drawn(n_new, 200, 2, 64, 64, dtype)
    middle = n_new // 2
    query[0, middle + 2, 1] = torch.nan  # one head's
    key[1, 1, 200 + middle] = torch.nan  # of its group all queries that see it
    wrong = INSTALLED.attend(query, key, value, 0.125, isa).isnan().all(-1)
    expected = torch.zeros(2, n_new, 4, dtype=torch.bool)
    expected[0, middle + 2, 1] = expected[1, middle:, 2:] = True
    assert torch.equal(wrong, expected)


@needs_kernel
def test_what_a_later_token_holds_does_not_reach_those_before_it_in_a_step_of_few() -> None:
    assert isinstance(INSTALLED, native.Kernel)
    query, key, value = drawn(5, 20, 2, 64, 64, torch.float32)
    value[0, 1, 22] = torch.inf
    assert INSTALLED.attend(query, key, value, 0.125).isfinite().all(-1)[0, :2].all()


@pytest.mark.parametrize("kernel", ["auto", "torch"])
@torch.no_grad()
def test_without_a_mask_attention_is_aligned_at_the_last_key(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCHEINFER_KERNEL", kernel)
    query, key, value = drawn(9, 20, 3, 16, 16, torch.float32)
    module = nn.Module()
    module.num_key_value_groups = 3
    module.is_causal = True
    found, _ = attend(module, query.transpose(1, 2), key, value, None, scaling=0.25)
    torch.testing.assert_close(found.double(), plainly(query, key, value, 0.25), atol=1e-5, rtol=1e-5)


def masked(**given: Any) -> Tensor | None:
    usual = {"batch_size": 1, "q_length": 3, "kv_length": 5, "q_offset": 2, "kv_offset": 0}
    return prompt.mask(**{**usual, "mask_function": causal_mask_function, **given})


def test_only_what_is_not_plainly_causal_gets_a_mask() -> None:
    assert masked() is None
    assert masked(q_length=5, q_offset=0) is None
    assert masked(attention_mask=torch.ones(1, 5, dtype=torch.bool)) is None
    for own in (
        {"q_offset": 0},  # a cache whose last keys are still empty
        {"attention_mask": torch.tensor([[False, True, True, True, True]])},
        {"mask_function": sliding_window_causal_mask_function(2), "local_size": 2},
        {"allow_is_causal_skip": False},
    ):
        found = masked(**own)
        assert found is not None
        assert found.shape[-2:] == (3, 5)
    assert torch.equal(prompt.lower_right(3, 5, torch.device("cpu")), masked(allow_is_causal_skip=False)[0, 0])


def test_a_plainly_causal_prompt_needs_no_mask_where_transformers_tells_positions_instead_of_lengths() -> None:
    told: dict[str, Any] = {"batch_size": 1, "kv_length": 5, "kv_offset": 0, "mask_function": causal_mask_function}
    assert prompt.mask(**told, cache_position=torch.arange(2, 5)) is None
    assert not prompt._is_plain(3, cache_position=torch.arange(3), **told)  # the last keys are still empty


def test_prompts_are_the_kernels_where_it_attends_but_what_torch_multiplies_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isinstance(INSTALLED, native.Kernel)
    upto = {isa: native.Kernel(INSTALLED.library, native.ISAS[: native.ISAS.index(isa) + 1]) for isa in native.ISAS}
    for isa, has_amx, in_bfloat16, in_float32 in (
        ("AVX2", False, False, False),
        ("AVX512", False, True, True),
        ("AVX512_BF16", False, True, True),
        ("AVX512_BF16", True, False, True),  # torch multiplies bfloat16 by tiles
        ("AMX_BF16", True, True, True),
    ):
        monkeypatch.setattr(native, "kernel", lambda isa=isa: upto[isa])
        monkeypatch.setattr(native, "_has_amx", lambda has_amx=has_amx: has_amx)
        assert computes_prompt(torch.bfloat16, 4096) == in_bfloat16
        assert computes_prompt(torch.float32, 256) == computes_prompt(torch.float16, 256) == in_float32
        assert not computes_prompt(torch.float32, 257)
    monkeypatch.setattr(native, "kernel", lambda: None)
    assert not computes_prompt(torch.bfloat16, 9)


def test_many_rows_are_the_kernels_on_threads_that_are_its_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for n_threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n_threads: n)
        assert is_kernels(FEW_ROWS)
        assert is_kernels(FEW_ROWS + 1) == (n_threads == 1)
