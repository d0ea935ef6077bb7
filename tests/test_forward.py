"""A whole small step in one native call has the bits that its modules have, and is left to them if asked for more."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from hwmodels.errors import ExecutionError, KernelError, PlanError
from runtime import native
from runtime.executor import Executor
from runtime.forward import Forward
from runtime.session import PlannedModel, load_planned
from tests.conftest import TinyCheckpoint
from tests.planned import greedy, left_padded, loaded, on_cpu, shares, spec_of
from tests.tiny import DENSE, LATENT, eager, tokens

INSTALLED = native.installed()
pytestmark = pytest.mark.skipif(isinstance(INSTALLED, KernelError), reason=f"no native kernel: {INSTALLED}")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", *LATENT, "gpt_oss")
N_PROMPT = 5


def cpu_plan(folder: Path, dtype: str = "auto", n_ctx: int = 400) -> Any:
    return on_cpu(spec_of(folder, dtype), n_ctx=n_ctx)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step that one call computes."""
    rows: list[int] = []
    step = Forward.step

    def count(self: Forward, *asked: Any) -> Any:
        found = step(self, *asked)
        if found is not None:
            rows.append(found.logits.shape[0])
        return found

    monkeypatch.setattr(Forward, "step", count)
    return rows


@torch.no_grad()
def fed(model: PreTrainedModel, ids: Tensor, **asked: Any) -> Tensor:
    """Logits of the tokens after a prompt, fed one by one, and keys and values at the end."""
    cache, found = DynamicCache(config=model.config), []
    for some in ids.split([N_PROMPT, *[1] * (ids.shape[1] - N_PROMPT)], dim=1):
        found.append(model(some, past_key_values=cache, use_cache=True, **asked).logits[:, -1])
    layers: list[Any] = cache.layers
    return torch.cat([x.flatten() for x in (*found, *(layer.keys for layer in layers), *(la.values for la in layers))])


@pytest.mark.parametrize("family", [*DENSE, *MIXTURES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_in_one_call_has_the_bits_of_embedding_tables_layers_and_head(
    family: str,
    dtype: str,
    tied: bool,
    tiny_checkpoint: TinyCheckpoint,
    whole: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny_checkpoint(family, tie_word_embeddings=tied)
    ids = tokens(N_PROMPT + 12, 3)
    with loaded(folder, cpu_plan(folder, dtype), dtype=dtype) as model:
        found = fed(model, ids)
        assert whole == [3] * 12
        monkeypatch.setattr(Executor, "computes_steps", lambda self, n_tokens: False)
        assert torch.equal(found, fed(model, ids))


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn", "dynamic"])
def test_tables_are_the_models_own_past_where_they_begin_anew_and_lengths_that_change_them_are_left_to_it(
    rope: str, tiny_checkpoint: TinyCheckpoint, whole: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    folder = tiny_checkpoint("llama", rope_parameters=parameters)
    ids = tokens(N_PROMPT + 260, 1)
    with loaded(folder, cpu_plan(folder)) as model:
        found = fed(model, ids)
        assert len(whole) == (0 if rope == "dynamic" else 260)
        monkeypatch.setattr(Executor, "computes_steps", lambda self, n_tokens: False)
        assert torch.equal(found, fed(model, ids))


@pytest.mark.parametrize(("limit", "is_whole"), [(256, True), (200, False)])
def test_phimoes_tables_change_where_it_says(
    limit: int, is_whole: bool, tiny_checkpoint: TinyCheckpoint, whole: list[int]
) -> None:
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 10000.0, "short_mscale": 1.2, "long_mscale": 1.4}
    rope |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.5, 3.0, 4.0]}
    rope["original_max_position_embeddings"] = limit
    folder = tiny_checkpoint("phimoe", rope_parameters=rope, max_position_embeddings=1024)
    agrees(folder, lambda model: fed(model, tokens(N_PROMPT + 260, 2)))
    assert len(whole) == (260 if is_whole else 0)


def test_frequencies_changed_in_place_are_read_anew(tiny_checkpoint: TinyCheckpoint, whole: list[int]) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> Tensor:
        first = fed(model, tokens(8))
        rotary: Any = model.get_submodule("model.rotary_emb")
        rotary.inv_freq.data.mul_(0.5)  # which counts no version
        return torch.cat([first, fed(model, tokens(8))])

    agrees(tiny_checkpoint("llama"), run)
    assert len(whole) == 6


# -- stepping aside -----------------------------------------------------------------------------------


def agrees(folder: Path, run: Callable[[PreTrainedModel], Tensor]) -> None:
    """A run by plan is eager transformers'."""
    with loaded(folder, cpu_plan(folder)) as model:
        torch.testing.assert_close(run(model), run(eager(folder)), atol=1e-4, rtol=0)


ASKED: dict[str, dict[str, Any]] = {
    "hidden states": {"output_hidden_states": True},
    "labels": {"labels": torch.tensor([[3]])},
    "a tuple": {"return_dict": False},
    "no cache": {"use_cache": False},
    "some logits": {"logits_to_keep": torch.tensor([0])},
    "a mask of another form": {"attention_mask": torch.ones(1, 1, 1, N_PROMPT + 1, dtype=torch.bool)},
    "a mask that hides": {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])},
    "positions beyond the tables": {"position_ids": torch.tensor([[300]])},
}


@pytest.mark.parametrize("what", ASKED)
def test_what_is_asked_besides_is_answered_as_transformers_does(
    what: str, tiny_checkpoint: TinyCheckpoint, whole: list[int]
) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> Tensor:
        cache, ids = DynamicCache(config=model.config), tokens(N_PROMPT + 1)
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        given = {"past_key_values": cache, "use_cache": True, **ASKED[what]}
        found = model(ids[:, -1:], **given)
        assert isinstance(found, tuple) == (what == "a tuple")
        parts = found[:1] if isinstance(found, tuple) else (found.logits, *(found.hidden_states or ()))
        return torch.cat([part.flatten() for part in parts])

    agrees(tiny_checkpoint("llama"), run)
    assert not whole


def test_embeddings_in_place_of_ids_are_taken(tiny_checkpoint: TinyCheckpoint, whole: list[int]) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> Tensor:
        cache, ids = DynamicCache(config=model.config), tokens(N_PROMPT + 1)
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        embeds = model.get_input_embeddings()(ids[:, -1:])
        found: Tensor = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).logits
        return found

    agrees(tiny_checkpoint("llama"), run)
    assert not whole


def test_a_token_that_the_model_does_not_have_is_an_index_error(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    with loaded(folder, cpu_plan(folder)) as model, torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(tokens(N_PROMPT), past_key_values=cache, use_cache=True)
        with pytest.raises(IndexError, match="index out of range"):
            model(torch.tensor([[97]]), past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == N_PROMPT


def test_padding_on_the_left_is_the_modules_and_outgrown_plans_are_told(
    tiny_checkpoint: TinyCheckpoint, whole: list[int]
) -> None:
    folder = tiny_checkpoint("llama")
    ids, mask = left_padded(tokens(N_PROMPT, 2), [N_PROMPT, 3])
    expected = greedy(eager(folder), ids, 8, mask)
    with loaded(folder, cpu_plan(folder, n_ctx=16)) as model:
        assert greedy(model, ids, 8, mask) == expected
        assert not whole
        with pytest.raises(PlanError, match="a KV cache of 17 tokens for each of 3 sequences"):
            greedy(model, tokens(N_PROMPT, 3), 20)
        assert whole == [3] * 11


HOOKED = ("", "model", "model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")


@pytest.mark.parametrize("part", HOOKED)
def test_whoever_listens_hears_every_step_and_costs_nothing_once_removed(
    part: str, tiny_checkpoint: TinyCheckpoint, whole: list[int]
) -> None:
    folder, heard = tiny_checkpoint("llama"), []
    with loaded(folder, cpu_plan(folder)) as model:
        listening = model.get_submodule(part).register_forward_hook(lambda *_: heard.append(part))
        greedy(model, tokens(N_PROMPT), 4)
        assert (len(heard), len(whole)) == (4, 0)
        listening.remove()
        greedy(model, tokens(N_PROMPT), 4)
        assert (len(heard), len(whole)) == (4, 3)


def override(module: nn.Module) -> None:
    own: Any = module.forward
    module.forward = lambda *args, **kwargs: own(*args, **kwargs)  # type: ignore[method-assign]


ALTERATIONS: dict[str, Callable[[Any], object]] = {
    "an embedding's weight": lambda m: setattr(m.model.embed_tokens.weight, "data", m.model.embed_tokens.weight * 2),
    "the head": lambda m: setattr(m, "lm_head", nn.Sequential(m.lm_head, nn.Tanh())),
    "the head's weight": lambda m: setattr(m.lm_head.weight, "data", m.lm_head.weight.data * 2),
    "rows of the head": lambda m: setattr(m.lm_head.weight, "data", m.lm_head.weight.data[:50]),
    "a bias of the head": lambda m: setattr(m.lm_head, "bias", nn.Parameter(torch.ones(97))),
    "the tables' scale": lambda m: setattr(m.model.rotary_emb, "attention_scaling", 0.5),
    "the embedding": lambda m: m.set_input_embeddings(nn.Sequential(m.model.embed_tokens, nn.Tanh())),
    "a forward of its own": override,
    "the inner model's": lambda m: override(m.model),
    "a window": lambda m: setattr(m.config, "sliding_window", 4),
}


@pytest.mark.parametrize("what", ALTERATIONS)
def test_what_is_altered_around_the_layers_counts_from_the_next_step(
    what: str, tiny_checkpoint: TinyCheckpoint, whole: list[int]
) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> Tensor:
        cache, ids, found = DynamicCache(), tokens(N_PROMPT + 4, 2), []
        for i, some in enumerate(ids.split([N_PROMPT, *[1] * 4], dim=1)):
            if i == 3:
                ALTERATIONS[what](model)
            found.append(model(some, past_key_values=cache, use_cache=True).logits[:, -1].flatten())
        return torch.cat(found)

    agrees(tiny_checkpoint("llama"), run)
    assert whole == [2]  # a cache begins to grow in place with the first step


def test_autocast_and_a_plan_with_a_device_are_left_to_modules(
    tiny_checkpoint: TinyCheckpoint, whole: list[int]
) -> None:
    folder = tiny_checkpoint("llama")
    with loaded(folder, cpu_plan(folder)) as model, torch.autocast("cpu", dtype=torch.bfloat16):
        greedy(model, tokens(N_PROMPT), 3)
    with loaded(folder, shares(spec_of(folder), gg=0.5)) as model:
        greedy(model, tokens(N_PROMPT), 3)
    assert not whole


def test_a_closed_model_says_so_and_one_that_nobody_holds_is_gone(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    cache = DynamicCache()
    model: PlannedModel | None = load_planned(folder, cpu_plan(folder), device="emulated")
    assert model is not None
    with torch.no_grad():
        model(tokens(N_PROMPT), past_key_values=cache, use_cache=True)
        model(tokens(1), past_key_values=cache, use_cache=True)
        model.close()
        with pytest.raises(ExecutionError, match="is closed and its weights are gone"):
            model(tokens(1), past_key_values=cache, use_cache=True)
    there = weakref.ref(model.get_submodule("model.embed_tokens"))
    gc.collect()
    gc.disable()
    try:
        model = None
        assert there() is None
    finally:
        gc.enable()


def test_sampling_beams_and_streamed_text_are_transformers(tiny_checkpoint: TinyCheckpoint, whole: list[int]) -> None:
    def run(model: PreTrainedModel) -> Tensor:
        torch.manual_seed(0)
        found = []
        for how in ({"do_sample": True}, {"num_beams": 2}, {"repetition_penalty": 1.3}):
            asked = GenerationConfig(max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **how)
            found.append(model.generate(tokens(N_PROMPT, 2), generation_config=asked))
        return torch.cat(found)

    folder = tiny_checkpoint("qwen2")
    expected = run(eager(folder))
    with loaded(folder, cpu_plan(folder)) as model:
        assert torch.equal(run(model), expected)
    assert whole


def test_a_default_device_elsewhere_and_a_model_made_for_inference_alone_change_nothing(
    tiny_checkpoint: TinyCheckpoint, whole: list[int]
) -> None:
    folder, ids = tiny_checkpoint("llama"), tokens(N_PROMPT + 3, 2)

    @torch.no_grad()
    def run(model: PreTrainedModel, device: str = "cpu") -> Tensor:
        cache, found = DynamicCache(config=model.config), []
        model(ids[:, :N_PROMPT], past_key_values=cache, use_cache=True)
        with torch.device(device):
            for some in ids[:, N_PROMPT:].split(1, dim=1):
                found.append(model(some, past_key_values=cache, use_cache=True).logits)
        return torch.cat(found, dim=1)

    expected = run(eager(folder))
    with torch.inference_mode(), loaded(folder, cpu_plan(folder)) as model:
        torch.testing.assert_close(run(model), expected, atol=1e-4, rtol=0)
    with loaded(folder, cpu_plan(folder)) as model:
        torch.testing.assert_close(run(model, "meta"), expected, atol=1e-4, rtol=0)
    assert whole == [2] * 6
