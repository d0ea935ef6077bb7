"""Norms, rotations and attention of small steps by the native kernel are torch's; a cache grows in place."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from hwmodels.errors import KernelError
from runtime import native, routing
from runtime.kv import GrowingLayer, grow_in_place
from runtime.routing import Routed

INSTALLED = native.installed()
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
needs_kernel = pytest.mark.skipif(isinstance(INSTALLED, KernelError), reason=f"no native kernel: {INSTALLED}")
cases = given(
    st.sampled_from(list(TOLERANCE)),
    st.sampled_from([0] if isinstance(INSTALLED, KernelError) else range(len(INSTALLED.isas))),
    st.integers(1, 3),
    st.integers(1, 4),
)


@needs_kernel
@settings(deadline=None, max_examples=40)
@cases
@torch.no_grad()
def test_a_sum_of_rows_has_torchs_bits(dtype: torch.dtype, isa: int, n_rows: int, eighths: int) -> None:
    assert isinstance(INSTALLED, native.Kernel)
    x, y = (torch.randn(100 * n_rows, 201 * eighths).to(dtype) for _ in range(2))
    assert torch.equal(INSTALLED.add(x, y, INSTALLED.isas[isa]), x + y)


@needs_kernel
@settings(deadline=None, max_examples=40)
@cases
@torch.no_grad()
def test_a_norm_is_the_models_own(dtype: torch.dtype, isa: int, n_rows: int, eighths: int) -> None:
    assert isinstance(INSTALLED, native.Kernel)
    module = LlamaRMSNorm(20 * eighths).to(dtype)
    module.weight.copy_(torch.randn(20 * eighths))
    x = torch.randn(n_rows, 20 * eighths).to(dtype)
    found = INSTALLED.norm(x, module.weight, module.variance_epsilon, INSTALLED.isas[isa])
    torch.testing.assert_close(found, module(x), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@needs_kernel
@settings(deadline=None, max_examples=40)
@cases
@torch.no_grad()
def test_a_layer_norm_is_torchs(dtype: torch.dtype, isa: int, n_rows: int, eighths: int) -> None:
    assert isinstance(INSTALLED, native.Kernel)
    weight, bias = torch.randn(2, 20 * eighths).to(dtype)
    x = (torch.randn(n_rows, 20 * eighths) + 3).to(dtype)
    found = INSTALLED.layer_norm(x, weight, bias, 1e-5, INSTALLED.isas[isa])
    expected = layer_norm(x, (20 * eighths,), weight, bias, 1e-5)
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@needs_kernel
@settings(deadline=None, max_examples=40)
@cases
def test_a_rotation_is_the_models_own(dtype: torch.dtype, isa: int, n_rows: int, n_heads: int) -> None:
    assert isinstance(INSTALLED, native.Kernel)
    x, angles = torch.randn(n_rows, n_heads, 24), torch.randn(n_rows, 12).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected, _ = apply_rotary_pos_emb(x.to(dtype), x.to(dtype), cos, sin)
    found = x.to(dtype)
    INSTALLED.turn(found, cos, sin, INSTALLED.isas[isa])
    off = 1e-6 if dtype == torch.float32 else 0
    torch.testing.assert_close(found, expected, atol=off, rtol=off)


@needs_kernel
@settings(deadline=None, max_examples=40)
@cases
def test_a_query_attends_over_a_past_of_several_chunks_that_lies_in_a_larger_buffer(
    dtype: torch.dtype, isa: int, batch: int, group: int
) -> None:
    assert isinstance(INSTALLED, native.Kernel)
    query = torch.randn(batch, 2 * group, 20).to(dtype)
    key, value = torch.randn(batch, 2, 700, 20).to(dtype), torch.randn(batch, 2, 700, 36).to(dtype)
    key, value = key[:, :, :600], value[:, :, :600]
    exact = scaled_dot_product_attention(
        query.double()[:, :, None], key.double(), value.double(), enable_gqa=True, scale=0.3
    )
    found = INSTALLED.attend(query[:, None], key, value, 0.3, INSTALLED.isas[isa])
    torch.testing.assert_close(found.double()[:, 0], exact[:, :, 0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@torch.no_grad()
def test_a_cache_that_grows_in_place_holds_what_one_that_copies_does_whatever_happens_to_it() -> None:
    plain, grown = DynamicCache(), DynamicCache()

    def feed(n_tokens: int) -> None:
        key, value = torch.randn(2, 3, 2, n_tokens, 8)
        for cache in (plain, grown):
            cache.update(key, value, 0)
            grow_in_place(cache)
        torch.testing.assert_close(grown.layers[0].keys, plain.layers[0].keys, atol=0, rtol=0)
        torch.testing.assert_close(grown.layers[0].values, plain.layers[0].values, atol=0, rtol=0)

    for n_tokens in (5, 1, 1, 90, 1):
        feed(n_tokens)
    assert isinstance(grown.layers[0], GrowingLayer)
    for cache in (plain, grown):
        cache.crop(-3)
    feed(1)
    for cache in (plain, grown):
        cache.reorder_cache(torch.tensor([2, 2, 0]))
    feed(1)
    plain, grown = copy.deepcopy(plain), copy.deepcopy(grown)
    feed(2)


def growing(n_tokens: int, batch: int = 1) -> DynamicCache:
    """A cache of one layer that has grown in place."""
    cache = DynamicCache()
    for n in (n_tokens - 1, 1):
        cache.update(*torch.randn(2, batch, 2, n, 8), 0)
        grow_in_place(cache)
    return cache


@torch.no_grad()
def test_copies_of_a_caches_layers_do_not_write_into_each_other() -> None:
    cache = growing(5)
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    cache.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8), 0)
    other.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    assert cache.layers[0].keys[:, :, -1].eq(1).all()
    assert other.layers[0].keys[:, :, -1].eq(0).all()
    assert torch.equal(other.layers[0].keys[:, :, :-1], cache.layers[0].keys[:, :, :-1])


@torch.no_grad()
def test_a_cache_that_began_in_inference_mode_goes_on_outside_it() -> None:
    with torch.inference_mode():
        cache = growing(5)
    for n_tokens in (6, 7):
        keys, _ = cache.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8), 0)
        assert keys.shape == (1, 2, n_tokens, 8)


@torch.no_grad()
@pytest.mark.parametrize(("held", "new"), [(1, 3), (3, 1)])
def test_tokens_of_another_number_of_sequences_are_refused(held: int, new: int) -> None:
    cache = growing(5, held)
    with pytest.raises(RuntimeError, match="must match"):
        cache.update(*torch.randn(2, new, 2, 1, 8), 0)
    assert cache.get_seq_length() == 5


@torch.no_grad()
def test_a_token_appended_moves_no_other() -> None:
    cache = DynamicCache()
    for n_tokens in (4, 1):
        cache.update(*torch.randn(2, 1, 2, n_tokens, 8), 0)
        grow_in_place(cache)
    cache.update(*torch.randn(2, 1, 2, 1, 8), 0)
    place = cache.layers[0].keys.data_ptr()
    cache.update(*torch.randn(2, 1, 2, 1, 8), 0)
    assert cache.layers[0].keys.data_ptr() == place


@torch.no_grad()
def test_a_deep_copy_copies_what_is_held_not_the_room_behind_it() -> None:
    cache = DynamicCache()
    for n_tokens in (1000, 1):
        cache.update(*torch.randn(2, 1, 2, n_tokens, 8), 0)
        grow_in_place(cache, 4000)
    before, room = cache.layers[0].keys.clone(), cache.layers[0]._room
    room.keys[:, :, 1001:] = 7
    copied = copy.deepcopy(cache)
    assert not copied.layers[0]._room.keys[:, :, 1001:].eq(7).all()
    copied.update(*torch.ones(2, 1, 2, 1, 8), 0)
    assert torch.equal(copied.layers[0].keys[:, :, :1001], before)
    assert torch.equal(cache.layers[0].keys, before)
    assert copy.deepcopy(GrowingLayer()).get_seq_length() == 0


@torch.no_grad()
def test_a_cache_moves_its_tokens_twice_at_most_on_the_way_to_what_is_planned_and_asks_for_no_more() -> None:
    cache = DynamicCache()
    cache.update(*torch.randn(2, 1, 2, 100, 8), 0)
    grow_in_place(cache, 700)
    places, n_room = [], []
    for n_tokens in (50,) * 12:
        cache.update(*torch.randn(2, 1, 2, n_tokens, 8), 0)
        places.append(cache.layers[0].keys.data_ptr())
        n_room.append(cache.layers[0].keys.untyped_storage().nbytes() // (2 * 8 * 4))
    assert len(set(places)) <= 3
    assert max(n_room) <= 700 + 64


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
def test_few_choices_are_grouped_as_many_are(n_rows: int, top_k: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    index, weights = torch.randint(0, 7, (n_rows, top_k), generator=draw), torch.rand(n_rows, top_k, generator=draw)
    few = Routed.of(index, weights, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "_FEW", 0)
        many = Routed.of(index, weights, 6)
    assert (few.counts, few.first) == (many.counts, many.first)
    assert torch.equal(few.rows, many.rows)
    assert torch.equal(few.weights, many.weights)
