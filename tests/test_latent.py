"""Latent attention by the native kernel, in calls of whole layers and by itself, is eager transformers'."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hwmodels.errors import KernelError
from runtime import native
from runtime.kv import GrowingLayer
from runtime.latent import LatentAttention
from runtime.native import Kernel
from runtime.native.layer import LayerWords
from runtime.projection import computes_prompt
from tests.conftest import TinyCheckpoint
from tests.planned import greedy, left_padded, loaded, on_cpu, shares, spec_of
from tests.test_layer import N_LAYERS, TOLERANCE, by_modules, calls, counted, fed  # noqa: F401 - a fixture
from tests.test_prompt_layer import cut, read
from tests.tiny import LATENT, eager, tokens

INSTALLED = native.installed()
HAS_PROMPTS = not isinstance(INSTALLED, KernelError) and INSTALLED.attends_prompts
HAS_BFLOAT16 = HAS_PROMPTS and computes_prompt(torch.bfloat16, 300)
pytestmark = pytest.mark.skipif(not HAS_PROMPTS, reason=f"no native kernel of prompts: {INSTALLED}")
N_PROMPT, N_GEN = 9, 24
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.9}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("deepseek_v2", {}),
    "v2, queries by a latent, biases": ("deepseek_v2", {"q_lora_rank": 22, "attention_bias": True}),
    "v2, yarn": ("deepseek_v2", YARN),
    "v3": ("deepseek_v3", {}),
    "v3, queries at once": ("deepseek_v3", {"q_lora_rank": None}),
    "v3, halves": ("deepseek_v3", {"rope_interleave": False}),
    "v3, yarn, biases": ("deepseek_v3", {"attention_bias": True, **YARN}),
    "v3, eight heads": ("deepseek_v3", {"num_attention_heads": 8, "num_key_value_heads": 8}),
}


def plan(folder: Path, dtype: str = "auto") -> Any:
    return on_cpu(spec_of(folder, dtype), n_ctx=400)


def checkpoint(case: str, tiny_checkpoint: TinyCheckpoint) -> Path:
    family, changes = CASES[case]
    return tiny_checkpoint(family, **changes)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of attention by itself."""
    rows: list[int] = []
    attend = Kernel.latent

    def count(self: Kernel, words: LayerWords, out: Tensor) -> None:
        rows.append(words.rows)
        attend(self, words, out)

    monkeypatch.setattr(Kernel, "latent", count)
    return rows


# -- the same as transformers -------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_and_logits_are_eager_transformers_and_every_layer_is_one_call(
    case: str,
    batch: int,
    tiny_checkpoint: TinyCheckpoint,
    calls: list[int],  # noqa: F811
) -> None:
    folder, ids = checkpoint(case, tiny_checkpoint), tokens(N_PROMPT, batch)
    theirs = eager(folder)
    expected = greedy(theirs, ids, N_GEN)
    with loaded(folder, plan(folder)) as model:
        assert greedy(model, ids, N_GEN) == expected
        assert calls == [batch * N_PROMPT] * N_LAYERS + [batch] * (N_LAYERS * (N_GEN - 1))
        whole = torch.cat([ids, torch.tensor(expected)], dim=1)
        found, exact = fed(model, whole, N_PROMPT), fed(theirs, whole, N_PROMPT)
    torch.testing.assert_close(found, exact, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("batch", "sizes"), [(1, [2, 1, 37, 12, 1]), (3, [37, 1, 2, 40]), (1, [200, 13, 1, 33])])
def test_prompts_and_second_turns_on_a_kept_cache_are_eager_transformers(
    case: str, batch: int, sizes: list[int], tiny_checkpoint: TinyCheckpoint
) -> None:
    # Up to 12 new tokens attend to latents as they lie, more to what is made of them (32 where there are no tiles).
    folder, chunks = checkpoint(case, tiny_checkpoint), cut(sizes, batch)
    with loaded(folder, plan(folder)) as model:
        found = read(model, chunks)
    torch.testing.assert_close(found, read(eager(folder), chunks), atol=TOLERANCE, rtol=0)


def test_long_prompts_expand_some_heads_at_once(tiny_checkpoint: TinyCheckpoint) -> None:
    # 32 MiB: 16 heads of 128 + 64 and 128 + 128 numbers, of up to 1170 tokens in float32.
    widths = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "first_k_dense_replace": N_LAYERS}
    folder, chunks = tiny_checkpoint("deepseek_v3", **widths, **heads), cut([*[250] * 5, 40])
    with loaded(folder, on_cpu(spec_of(folder), n_ctx=1300)) as model:
        found = read(model, chunks)
    torch.testing.assert_close(found, read(eager(folder), chunks), atol=TOLERANCE, rtol=0)


def off(model: PreTrainedModel, exact: Tensor, run: Callable[[PreTrainedModel], Tensor]) -> float:
    """Half of all tokens' logits are no further from what is exact, in the root mean square."""
    return float((run(model).float() - exact).square().mean(dim=-1).sqrt().quantile(0.5))


@pytest.mark.skipif(not HAS_BFLOAT16, reason="prompts in bfloat16 are torch's here")
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_close_to_float32_as_transformers_is(case: str, tiny_checkpoint: TinyCheckpoint) -> None:
    # Of a few tokens rounding chooses another expert, here or there: not the farthest of all logits, but half of them.
    folder = checkpoint(case, tiny_checkpoint)
    how = {"dtype": torch.bfloat16, "attn_implementation": "eager", "experts_implementation": "eager"}
    theirs = AutoModelForCausalLM.from_pretrained(folder, **how)

    def run(model: PreTrainedModel) -> Tensor:
        prompts = [read(model, cut([100, 12, 1, 60], 3, seed)).flatten(0, 1) for seed in range(2)]
        return torch.cat([*prompts, *(fed(model, tokens(40, 3, seed), N_PROMPT).flatten(0, 1) for seed in range(2))])

    exact = run(eager(folder))
    with loaded(folder, plan(folder, "bfloat16"), dtype="bfloat16") as model:
        assert off(model, exact, run) < 1.25 * off(theirs, exact, run)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", LATENT)
def test_attention_by_itself_is_the_same_on_every_instruction_set(
    family: str, dtype: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch, alone: list[int]
) -> None:
    assert isinstance(INSTALLED, Kernel)
    by_modules(monkeypatch)
    folder, chunks = tiny_checkpoint(family, first_k_dense_replace=N_LAYERS), cut([6, 2, 1, 40], 2)
    exact = read(eager(folder), chunks)
    with loaded(folder, plan(folder, dtype), dtype=dtype) as model:
        parts = [m for m in model.modules() if isinstance(m, LatentAttention)]
        for isa in range(len(INSTALLED.isas)):
            for part in parts:
                part.latent.words.isa = isa
            found = read(model, chunks)
            assert len(alone) >= 3 * N_LAYERS  # the last chunk is torch's where the kernel computes no such prompt
            alone.clear()
            tolerance = {"float32": TOLERANCE, "float16": 0.03, "bfloat16": 0.3}[dtype]
            torch.testing.assert_close(found.float(), exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", LATENT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_whatever_the_others_are_and_whatever_the_threads(
    family: str, dtype: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, chunks = tiny_checkpoint(family), cut([3, 1, 1, 1], 4)
    with loaded(folder, on_cpu(spec_of(folder, dtype), batch=4), dtype=dtype) as model:
        together = read(model, chunks)
        assert torch.equal(together, torch.cat([read(model, [c[i : i + 1] for c in chunks]) for i in range(4)]))
        monkeypatch.setattr(native.library, "threads", lambda: 3)
        assert torch.equal(together, read(model, chunks))


# -- what is in the cache -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", LATENT)
def test_a_cache_holds_what_transformers_does_side_by_side(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    folder, chunks = tiny_checkpoint(family), cut([9, 1, 70, 1, 1], 2)
    own, theirs = DynamicCache(), DynamicCache()
    with loaded(folder, plan(folder)) as model:
        read(model, chunks, own)
    read(eager(folder), chunks, theirs)
    for layer, expected in zip(own.layers, theirs.layers, strict=True):
        assert isinstance(layer, GrowingLayer)
        keys, values = layer.keys, layer.values
        assert keys is not None
        assert values is not None
        assert values.data_ptr() == keys.data_ptr() + 18 * 4
        assert keys.stride() == values.stride()
        torch.testing.assert_close(keys, expected.keys, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(values, expected.values, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", LATENT)
def test_what_is_put_in_a_cache_and_copies_of_one_are_gone_on_from(
    family: str,
    tiny_checkpoint: TinyCheckpoint,
    calls: list[int],  # noqa: F811
) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> Tensor:
        cache, found = DynamicCache(config=model.config), []
        found.append(read(model, cut([3], 2), cache))
        cache.reorder_cache(torch.tensor([1, 1]))
        found.append(read(model, cut([4, 1], 2, seed=1), cache))
        other, stored = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
        cache.crop(-3)
        cache.batch_select_indices(torch.tensor([1]))
        found.append(read(model, cut([6, 1], seed=2), cache).expand(2, -1, -1))
        cache.batch_repeat_interleave(2)
        found += [read(model, cut([2, 1], 2, seed=3), c) for c in (cache, other, stored, cache, other)]
        return torch.cat(found, dim=1)

    folder = tiny_checkpoint(family)
    with loaded(folder, plan(folder)) as model:
        found = run(model)
    assert calls == [n for n in (6, 8, 2, 6, 1, *[4, 2] * 5) for _ in range(N_LAYERS)]
    torch.testing.assert_close(found, run(eager(folder)), atol=TOLERANCE, rtol=0)


# -- stepping aside -----------------------------------------------------------------------------------


def agrees(folder: Path, run: Callable[[PreTrainedModel], Tensor]) -> None:
    """A run by plan is eager transformers'."""
    with loaded(folder, plan(folder)) as model:
        torch.testing.assert_close(run(model), run(eager(folder)), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ["v2", "v3", "v3, halves"])
def test_padding_on_the_left_is_left_to_modules(
    case: str,
    tiny_checkpoint: TinyCheckpoint,
    calls: list[int],  # noqa: F811
    alone: list[int],
) -> None:
    folder = checkpoint(case, tiny_checkpoint)
    ids, mask = left_padded(tokens(N_PROMPT, 3), [N_PROMPT, 3, 5])
    expected = greedy(eager(folder), ids, 8, mask)
    with loaded(folder, plan(folder)) as model:
        assert greedy(model, ids, 8, mask) == expected
    assert not calls
    assert not alone


@pytest.mark.parametrize("width", [8, 4128])
@pytest.mark.parametrize("family", LATENT)
def test_latents_as_wide_as_what_is_rotated_or_wider_than_any_models_are_left_to_modules(
    family: str,
    width: int,
    tiny_checkpoint: TinyCheckpoint,
    calls: list[int],  # noqa: F811
    alone: list[int],
) -> None:
    chunks = cut([4, 1, 12, 1], 2)
    agrees(tiny_checkpoint(family, kv_lora_rank=width), lambda model: read(model, chunks))
    assert not calls
    assert not alone


@pytest.mark.parametrize("family", LATENT)
def test_a_plan_with_a_device_attends_by_the_kernel_too(
    family: str,
    tiny_checkpoint: TinyCheckpoint,
    calls: list[int],  # noqa: F811
    alone: list[int],
) -> None:
    folder, ids = tiny_checkpoint(family), tokens(7)
    expected = greedy(eager(folder), ids, 8)
    with loaded(folder, shares(spec_of(folder), gg=0.5)) as model:
        assert greedy(model, ids, 8) == expected
    assert not calls
    assert alone == [7] * N_LAYERS + [1] * N_LAYERS * 7


@pytest.mark.parametrize("part", ["kv_a_layernorm", "kv_b_proj", "q_b_proj", "o_proj"])
def test_whoever_listens_to_a_part_hears_every_step_and_costs_nothing_once_removed(
    part: str,
    tiny_checkpoint: TinyCheckpoint,
    calls: list[int],  # noqa: F811
    alone: list[int],
) -> None:
    folder, heard = tiny_checkpoint("deepseek_v3"), []
    with loaded(folder, plan(folder)) as model:
        attention = model.get_submodule("model.layers.1.self_attn")
        listening = attention.get_submodule(part).register_forward_hook(lambda *_: heard.append(part))
        greedy(model, tokens(7), 4)
        assert len(heard) == 4
        assert len(calls) == 4 * (N_LAYERS - 1)
        assert not alone
        listening.remove()
        greedy(model, tokens(7), 4)
        assert len(heard) == 4
        assert len(calls) == 4 * (2 * N_LAYERS - 1)


ALTERATIONS: dict[str, Callable[[Any], object]] = {
    "a weight": lambda a: setattr(a.kv_b_proj.weight, "data", 2 * a.kv_b_proj.weight.data),
    "a weight in place": lambda a: a.kv_b_proj.weight.data.mul_(1.5),
    "a part": lambda a: setattr(a, "q_b_proj", torch.nn.Sequential(a.q_b_proj, torch.nn.Tanh())),
    "the scale": lambda a: setattr(a, "scaling", 0.5),
    "how pairs lie": lambda a: setattr(a.config, "rope_interleave", False),
}


@pytest.mark.parametrize("what", ALTERATIONS)
def test_what_is_altered_counts_from_the_next_step(what: str, tiny_checkpoint: TinyCheckpoint) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> Tensor:
        cache, found = DynamicCache(config=model.config), []
        for i, some in enumerate(cut([5, 1, 1, 1, 4], 2)):
            if i == 2:
                ALTERATIONS[what](model.get_submodule("model.layers.1.self_attn"))
            found.append(model(some, past_key_values=cache, use_cache=True).logits)
        return torch.cat(found, dim=1)

    agrees(tiny_checkpoint("deepseek_v3"), run)


@pytest.mark.parametrize("family", LATENT)
def test_torch_alone_computes_the_same(
    family: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, chunks = tiny_checkpoint(family), cut([7, 1, 1])
    with loaded(folder, plan(folder)) as model, counted(monkeypatch) as rows:
        whole = read(model, chunks)
        assert len(rows) == 3 * N_LAYERS
        monkeypatch.setenv("SCHEINFER_KERNEL", "torch")
        torch.testing.assert_close(read(model, chunks), whole, atol=TOLERANCE, rtol=0)
    with loaded(folder, plan(folder)) as model:  # loaded without the kernel
        assert not any(isinstance(module, LatentAttention) for module in model.modules())
