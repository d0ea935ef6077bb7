"""A KV cache's sliding layers in place hold what transformers' would, whatever is done to them in between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from runtime import native
from runtime.native import Kernel
from runtime.window import GrowingWindow, slide_in_place
from tests.conftest import TinyCheckpoint
from tests.planned import loaded, on_cpu, spec_of
from tests.test_exactness import TOLERANCE
from tests.test_prompt import needs_avx512, needs_kernel
from tests.tiny import eager, tokens

WINDOW = 9
SIZES = (2, 1, 4, 4, torch.float32)


def write(layer: GrowingWindow, key: Tensor, value: Tensor) -> bool:
    """Append as the kernel does, where there is room; whether there is."""
    held = layer.room(SIZES, key.shape[2])
    if held is None:
        return False
    n_held, buffers = held.n_written - held.n_dropped, layer._buffers
    assert buffers is not None
    at = layer._first + n_held
    assert held.words[0] == buffers.keys[:, :, layer._first :].data_ptr()
    for buffer, new in ((buffers.keys, key), (buffers.values, value)):
        buffer[:, :, at : at + key.shape[2]] = new
    layer.written(key.shape[2])
    return True


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["write", "update", "copy", "select", "crop"]), st.integers(1, 60)), max_size=40)
)
@torch.no_grad()
def test_a_window_holds_what_transformers_layer_holds(steps: list[tuple[str, int]]) -> None:
    cache, own = DynamicCache(), DynamicSlidingWindowLayer(WINDOW)  # type: ignore[no-untyped-call]
    cache.layers = [own]
    slide_in_place(cache)
    theirs = DynamicSlidingWindowLayer(WINDOW)  # type: ignore[no-untyped-call]
    layer = cache.layers[0]
    assert isinstance(layer, GrowingWindow)
    others: list[tuple[GrowingWindow, Tensor]] = []
    draw = torch.Generator().manual_seed(len(steps))
    for what, n in steps:
        n_new = n if n > 50 else 1 + n % 3
        if what == "copy" and layer.is_initialized:
            others.append((layer, layer.keys.clone()))
            layer = copy.deepcopy(layer) if n % 2 else copy.copy(layer)
        elif what == "select" and layer.is_initialized:
            order = torch.tensor([1, 0])
            layer.batch_select_indices(order)
            theirs.batch_select_indices(order)
        elif what == "crop" and 1 < layer.cumulative_length < WINDOW:
            layer.crop(-1)
            theirs.crop(-1)
        elif what in ("write", "update"):
            key, value = torch.randn(2, 2, 1, n_new, 4, generator=draw)
            theirs.update(key, value)
            if what == "update" or not write(layer, key, value):
                layer.update(key, value)
        if theirs.is_initialized:
            assert torch.equal(layer.keys, theirs.keys)
            assert torch.equal(layer.values, theirs.values)
            assert layer.get_seq_length() == theirs.get_seq_length()
    for other, keys in others:  # what was copied is as it was
        assert torch.equal(other.keys, keys)


def test_a_long_prompt_keeps_no_more_than_some_windows() -> None:
    layer = GrowingWindow(WINDOW)  # type: ignore[no-untyped-call]
    long = torch.randn(2, 2, 1, 500, 4)
    assert write(layer, long[0], long[1])
    assert layer.keys.untyped_storage().nbytes() == 2 * (WINDOW - 1) * 4 * 4
    assert torch.equal(layer.values, long[1][:, :, -WINDOW + 1 :])
    assert write(layer, long[0, :, :, :1], long[1, :, :, :1])
    assert layer.keys.untyped_storage().nbytes() < long[0].nbytes / 5


def test_a_layer_that_keeps_all_tokens_is_left_to_transformers() -> None:
    layer = GrowingWindow(WINDOW)  # type: ignore[no-untyped-call]
    layer.update(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4))
    assert layer.room(SIZES) is not None
    layer.activate_past_recording()
    assert layer.room(SIZES) is None


def test_versions_of_transformers_whose_layers_never_keep_all_tokens_give_room() -> None:
    layer = GrowingWindow(WINDOW)  # type: ignore[no-untyped-call]
    vars(layer).pop("record_past", None)
    assert layer.room(SIZES, 3) is not None


# -- in a model ---------------------------------------------------------------------------------------


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernel's calls that compute whole layers or steps."""
    names: list[str] = []

    def noting(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def noted(self: Kernel, *args: object) -> object:
            names.append(name)
            return call(self, *args)

        return noted

    with monkeypatch.context() as patch:
        for name in ("layer", "layers", "forward"):
            patch.setattr(Kernel, name, noting(name, getattr(Kernel, name)))
        yield names


@torch.no_grad()
def continued(model: PreTrainedModel, cache: DynamicCache, ids: Tensor, n_first: int) -> Tensor:
    """Logits of all tokens, the first n_first of them at once, then one by one."""
    found = [model(ids[:, :n_first], past_key_values=cache).logits]
    for i in range(n_first, ids.shape[1]):
        found.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
    return torch.cat(found, 1)


@needs_avx512
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("n_first", [1, 5, 30])
@pytest.mark.parametrize("slides", [True, False])
def test_tokens_beyond_the_window_are_whole_native_steps(
    batch: int, n_first: int, slides: bool, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ids = tiny_checkpoint("gpt_oss"), tokens(45, batch)
    reference = eager(folder)
    expected = continued(reference, DynamicCache(config=reference.config), ids, n_first)
    with loaded(folder, on_cpu(spec_of(folder))) as model, counted(monkeypatch) as names:
        cache = DynamicCache(config=model.config) if slides else DynamicCache()
        torch.testing.assert_close(continued(model, cache, ids, n_first), expected, atol=TOLERANCE, rtol=0)
    # A cache that is told of no config has no layers to go on in before its first tokens.
    begin = ["layer"] * 3 * (n_first > 1) if slides else ["layers"]
    assert names == begin + ["forward"] * (45 - n_first - (not slides))


@needs_kernel
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}])
def test_beams_and_several_answers_are_those_of_transformers(
    how: dict[str, object], tiny_checkpoint: TinyCheckpoint
) -> None:
    folder, ids = tiny_checkpoint("gpt_oss"), tokens(6)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False, **how}
    expected = eager(folder).generate(ids, **given)  # type: ignore[operator]
    with loaded(folder, on_cpu(spec_of(folder), batch=3)) as model:
        assert torch.equal(model.generate(ids, **given), expected)


@needs_kernel
def test_padding_on_the_left_is_not_seen(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("gpt_oss")
    ids, mask = tokens(16, 2), torch.ones(2, 16, dtype=torch.int64)
    mask[1, :11] = 0
    how = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = eager(folder).generate(ids, **how)  # type: ignore[operator]
    with loaded(folder, on_cpu(spec_of(folder))) as model:
        assert torch.equal(model.generate(ids, **how), expected)


def test_without_the_kernel_windows_are_torchs(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCHEINFER_KERNEL", "torch")
    assert native.kernel() is None
    folder, ids = tiny_checkpoint("gpt_oss"), tokens(30)
    reference = eager(folder)
    expected = continued(reference, DynamicCache(config=reference.config), ids, 20)
    with loaded(folder, on_cpu(spec_of(folder))) as model:
        found = continued(model, DynamicCache(config=model.config), ids, 20)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
