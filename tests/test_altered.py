"""A model altered after loading computes as altered, in prompts and small steps: what the kernel took is asked anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import DynamicCache, PreTrainedModel

from hwmodels.errors import ExecutionError
from tests.conftest import TinyCheckpoint
from tests.planned import greedy, loaded, on_cpu, spec_of, three_ways
from tests.tiny import eager, tokens

TOLERANCE = 1e-4
N_PROMPT, N_BEFORE = 5, 2


class Adapted(nn.Module):
    """A projection with a low-rank part beside it, which shows the projection's weight as its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features, generator=draw) / 4)
        self.up = nn.Parameter(torch.randn(base.out_features, 4, generator=draw) / 4)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def override(module: nn.Module) -> None:
    whole: Any = module.forward
    module.forward = lambda x: whole(x) / 2  # type: ignore[method-assign]


ALTERATIONS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "an adapter": ("self_attn", lambda m: setattr(m, "q_proj", Adapted(m.q_proj))),
    "another module": ("self_attn", lambda m: setattr(m, "v_proj", nn.Sequential(m.v_proj, nn.Tanh()))),
    "a square weight turned in place": ("self_attn.q_proj", lambda m: setattr(m.weight, "data", m.weight.data.t())),
    "a hook": ("self_attn.k_proj", lambda m: m.register_forward_hook(lambda _, args, out: out / 2)),
    "a hook before": ("self_attn.v_proj", lambda m: m.register_forward_pre_hook(lambda _, args: (args[0] / 2,))),
    "a forward of its own": ("self_attn.v_proj", override),
    "a norm's forward of its own": ("input_layernorm", override),
    "a parametrization": ("self_attn.q_proj", lambda m: parametrize.register_parametrization(m, "weight", Twice())),
    "a bias": ("self_attn.o_proj", lambda m: setattr(m, "bias", nn.Parameter(torch.ones(m.out_features)))),
    "a bias that lies as one number": (
        "self_attn.q_proj",
        lambda m: setattr(m, "bias", nn.Parameter(torch.ones(1).expand(m.out_features))),
    ),
    "no bias": ("self_attn.q_proj", lambda m: setattr(m, "bias", None)),
    "another scale": ("self_attn", lambda m: setattr(m, "scaling", 0.1)),
    "another epsilon": ("post_attention_layernorm", lambda m: setattr(m, "variance_epsilon", 0.5)),
    "a weight": ("self_attn.q_proj", lambda m: m.weight.data.mul_(2)),
    "fewer experts": ("mlp.gate", lambda m: setattr(m, "top_k", 1)),
    "weights of experts as they are": ("mlp.gate", lambda m: setattr(m, "norm_topk_prob", not m.norm_topk_prob)),
    "another activation": ("mlp.shared_expert", lambda m: setattr(m, "act_fn", nn.ReLU())),
}


@torch.no_grad()
def altered(model: PreTrainedModel, part: str, alter: Callable[[Any], object]) -> Tensor:
    """Logits of a prompt, steps, alteration of the first layer, steps, and a prompt from the beginning."""
    cache, ids, found = DynamicCache(), tokens(N_PROMPT + 2 * N_BEFORE, 2), []
    for i, some in enumerate(ids.split([N_PROMPT, *[1] * 2 * N_BEFORE], dim=1)):
        if i == 1 + N_BEFORE:
            alter(model.get_submodule(f"model.layers.0.{part}"))
        found.append(model(some, past_key_values=cache, use_cache=True).logits)
    return torch.cat([*found, model(ids).logits], dim=1)


ALTERED = [("qwen2_moe", what) for what in ALTERATIONS] + [
    ("llama", what)
    for what, (part, _) in ALTERATIONS.items()
    if not part.startswith("mlp")  # a mixture's
]


@pytest.mark.parametrize(("family", "what"), ALTERED)
def test_what_is_altered_after_loading_counts_from_the_next_step(
    family: str, what: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    part, alter = ALTERATIONS[what]
    folder = tiny_checkpoint(family)
    theirs = eager(folder)
    expected = altered(theirs, part, alter)
    with loaded(folder, on_cpu(spec_of(folder))) as model:
        torch.testing.assert_close(altered(model, part, alter), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("part", ["self_attn.k_proj", "self_attn.q_norm"])
def test_a_listener_hears_what_a_part_says_before_it_is_turned(part: str, tiny_checkpoint: TinyCheckpoint) -> None:
    @torch.no_grad()
    def heard(model: PreTrainedModel) -> Tensor:
        cache, said = DynamicCache(), []
        listening = model.get_submodule(f"model.layers.0.{part}").register_forward_hook(lambda *of: said.append(of[2]))
        for some in tokens(N_PROMPT + 2, 2).split([N_PROMPT, 1, 1], dim=1):
            model(some, past_key_values=cache, use_cache=True)
        listening.remove()
        return torch.cat([out.flatten() for out in said])

    folder = tiny_checkpoint("qwen3")
    expected = heard(eager(folder))
    with loaded(folder, on_cpu(spec_of(folder))) as model:
        torch.testing.assert_close(heard(model), expected, atol=TOLERANCE, rtol=0)


def test_a_cache_whose_update_was_put_over_its_own_is_asked(tiny_checkpoint: TinyCheckpoint) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> Tensor:
        cache, ids = DynamicCache(), tokens(N_PROMPT + 1, 2)
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        update: Any = cache.update
        cache.update = lambda keys, *rest, **more: update(keys / 2, *rest, **more)  # type: ignore[method-assign]
        found: Tensor = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits
        return found

    folder = tiny_checkpoint("llama")
    expected = run(eager(folder))
    with loaded(folder, on_cpu(spec_of(folder))) as model:
        torch.testing.assert_close(run(model), expected, atol=TOLERANCE, rtol=0)


def test_layers_in_another_order_are_refused_where_columns_are_sent_ahead(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("llama")
    with loaded(folder, three_ways(spec_of(folder))) as model:
        expected = greedy(model, tokens(5), 3)
        layers: Any = model.get_submodule("model.layers")
        layers[1], layers[2] = layers[2], layers[1]
        with pytest.raises(ExecutionError, match="layer 2 comes where the plan sends columns of layer 1 ahead"):
            model(tokens(5))
        layers[1], layers[2] = layers[2], layers[1]
        assert greedy(model, tokens(5), 3) == expected


def test_masks_by_kind_of_layer_are_taken_as_transformers_takes_them(tiny_checkpoint: TinyCheckpoint) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> Tensor:
        cache, ids, none = DynamicCache(), tokens(N_PROMPT + 1), {"full_attention": None}
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        found: Tensor = model(ids[:, -1:], past_key_values=cache, use_cache=True, attention_mask=none).logits
        return found

    folder = tiny_checkpoint("qwen2")
    expected = run(eager(folder))
    with loaded(folder, on_cpu(spec_of(folder))) as model:
        torch.testing.assert_close(run(model), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_under_autocast_a_prompt_and_its_steps_are_near_float32(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel, enabled: bool) -> Tensor:
        cache, ids = DynamicCache(), tokens(15)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            steps = ids.split([12, 1, 1, 1], dim=1)
            return torch.cat([model(some, past_key_values=cache, use_cache=True).logits for some in steps], dim=1)

    def off(found: Tensor) -> float:
        return float((found.float() - exact).square().mean().sqrt())

    folder = tiny_checkpoint(family)
    theirs = eager(folder)
    exact = run(theirs, False)
    with loaded(folder, on_cpu(spec_of(folder))) as model:
        assert off(run(model, True)) < 2 * off(run(theirs, True))
