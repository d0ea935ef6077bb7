"""A planned model says what Hugging Face's says, whatever the plan: logits, tokens, and in bfloat16 no less exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from hwmodels.errors import PlanError
from runtime.devices import emulated
from sim.memory import memory
from sim.model import ModelSpec
from sim.plan import Plan, check_plan
from sim.planner import plan as make_plan
from sim.policies import POLICIES
from sim.workload import Workload
from tests.conftest import TinyCheckpoint
from tests.planned import (
    greedy,
    left_padded,
    loaded,
    logits,
    on_cpu,
    plans,
    shares,
    spec_of,
    three_ways,
    whole_experts,
)
from tests.tiny import FAMILIES, LATENT, eager, tokens
from tests.unit_machine import machine, peak

TOLERANCE = 1e-4  # float32 logits of magnitude 5: sums in another order differ by some 1e-6
N_GEN = 5
PROMPTS = tuple(product((1, 2, 37), (1, 3)))
"""Prompt lengths by batch sizes; in a batch the second and third sequence are shorter and padded on the left."""

Reference = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[list[int]]]
"""Prompt, attention mask, logits of the prompt, greedy tokens."""


@cache
def reference(folder: Path) -> dict[tuple[int, int], Reference]:
    """What eager Hugging Face makes of every prompt."""
    model, found = eager(folder), {}
    for n, batch in PROMPTS:
        ids, mask = left_padded(tokens(n, batch), [n, max(1, n // 2), max(1, n - 1)][:batch])
        found[n, batch] = ids, mask, logits(model, ids, mask), greedy(model, ids, N_GEN, mask)
    return found


def agree(folder: Path, plan: Plan, *prompts: tuple[int, int]) -> None:
    """Logits and greedy tokens of a plan are Hugging Face's for some prompts."""
    with loaded(folder, plan) as model:
        for prompt in prompts:
            ids, mask, expected, continued = reference(folder)[prompt]
            torch.testing.assert_close(logits(model, ids, mask), expected, atol=TOLERANCE, rtol=0)
            assert greedy(model, ids, N_GEN, mask) == continued, prompt


def any_plan(folder: Path, n_examples: int) -> Callable[[], None]:
    """A property over plans and prompts, for one checkpoint."""
    spec = spec_of(folder)

    @settings(max_examples=n_examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(plans(spec), st.sampled_from(PROMPTS))
    def agrees(plan: Plan, prompt: tuple[int, int]) -> None:
        check_plan(plan, spec)
        agree(folder, plan, prompt)

    return agrees


# -- float32 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_cut_three_ways_agrees_for_every_prompt(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint(family)
    agree(folder, three_ways(spec_of(folder)), *PROMPTS)


@pytest.mark.parametrize("family", FAMILIES)
def test_some_plans_agree(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    any_plan(tiny_checkpoint(family), 5)()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_hundreds_of_plans_agree(family: str, tiny_checkpoint: TinyCheckpoint) -> None:
    any_plan(tiny_checkpoint(family), 40)()


def test_a_tied_embedding_and_a_sharded_checkpoint_agree(tiny_checkpoint: TinyCheckpoint) -> None:
    for family in ("llama", "mixtral"):
        folder = tiny_checkpoint(family, shards=True, tie_word_embeddings=True)
        agree(folder, three_ways(spec_of(folder)), (37, 3))


def test_a_sliding_window_shorter_than_the_prompt_agrees(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("mistral", sliding_window=8)
    agree(folder, three_ways(spec_of(folder)), (37, 1), (2, 3))


def test_two_runs_of_a_plan_give_the_same_bits(tiny_checkpoint: TinyCheckpoint) -> None:
    # three partial sums arrive in an order that timing decides; they are added in the graph's
    folder, ids = tiny_checkpoint("mixtral"), tokens(37)
    with loaded(folder, three_ways(spec_of(folder))) as model:
        first = logits(model, ids)
        assert all(torch.equal(logits(model, ids), first) for _ in range(20))


# -- bfloat16 -----------------------------------------------------------------------------------------


def implementations(folder: Path, spec: ModelSpec) -> Iterator[PreTrainedModel]:
    """The model as Hugging Face computes it in bfloat16: each kind of attention with each kind of experts."""
    for attention in ("eager",) if spec.family == "gpt_oss" else ("eager", "sdpa"):  # it has sinks in eager alone
        for experts in ("eager", "batched_mm", "grouped_mm") if spec.is_moe else ("eager",):
            yield AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, attn_implementation=attention, experts_implementation=experts
            ).train(False)


def float32_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train(False), ids)


def off(difference: torch.Tensor) -> float:
    """What nine of ten tokens stay below: of the few others, rounding chose another expert."""
    return float(difference.square().mean(dim=-1).sqrt().quantile(0.9))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logits_lie_within_the_spread_of_hugging_face_implementations(
    family: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    # grouped_mm wants rows of multiples of 16 bytes
    widths: dict[str, int | None] = {"intermediate_size": 48}
    widths |= {"moe_intermediate_size": 24} if family in ("qwen2_moe", "qwen3_moe", *LATENT) else {}
    folder, ids = tiny_checkpoint(family, **widths), tokens(37, 3)
    spec = spec_of(folder, "bfloat16")
    theirs = [logits(model, ids).float() for model in implementations(folder, spec)]
    spread = max(off(a - b) for a in theirs for b in theirs)
    assert (spread > 0) is (family != "gpt_oss")  # of which all round alike
    exact = float32_logits(folder, ids)
    farthest = max(off(one - exact) for one in theirs) * (1 if spread else 1.25)
    for plan in (on_cpu(spec), whole_experts(spec), three_ways(spec), shares(spec, 0.3, stream_min_tokens=1)):
        with loaded(folder, plan) as model:
            ours = logits(model, ids).float()
        # Where roundings fall elsewhere than in all of theirs, what counts is the distance to float32.
        assert min(off(ours - one) for one in theirs) <= spread or off(ours - exact) <= farthest


# -- the demonstration models -------------------------------------------------------------------------

GB_PER_S = {"CPU": 10, "GPU": 100, "H2D": 5, "D2H": 5}
MACHINE = machine({r: peak(1e12 * rate, 1e9 * rate) for r, rate in GB_PER_S.items()})
PROMPT = torch.arange(100, 132)[None]


def policy_plans(spec: ModelSpec, n_gen: int) -> dict[str, Plan]:
    """A plan per policy for a device that holds half of the MLPs; policies that do not fit there have none."""
    workload = Workload(PROMPT.shape[1], n_gen)
    half = memory(spec, shares(spec, gg=0.5, n_ctx=workload.n_ctx, batch=1)).vram_bytes
    found: dict[str, Plan] = {}
    for policy in POLICIES:
        with suppress(PlanError):
            found[policy] = make_plan(spec, MACHINE, half, workload, policy)
    assert {"cpu-only", "stream", "llama-cpp", "scheinfer", "auto"} <= set(found)
    return found


def scores(model: PreTrainedModel, n_gen: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the logits that each was chosen from."""
    out = model.generate(  # type: ignore[operator]
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=n_gen,
        min_new_tokens=n_gen,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, PROMPT.shape[1] :].tolist(), torch.cat(out.logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-mixtral"])
def test_every_policy_generates_what_hugging_face_generates(
    name: str, demo_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = emulated.Link(pinned_bytes_per_s=1e12, pageable_bytes_per_s=1e12)
    monkeypatch.setattr(emulated, "Link", lambda: fast)  # the arithmetic is asked for, not the time
    folder, n_gen = demo_models[name], 64
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text, expected = scores(model, n_gen)
    del model
    assert len(set(text)) > 8
    plans_by_decision = {
        (p.ends, p.layers, p.tiers): (name, p) for name, p in policy_plans(spec_of(folder), n_gen).items()
    }
    for policy, plan in plans_by_decision.values():
        with loaded(folder, plan) as planned:
            found, ours = scores(planned, n_gen)
        assert found == text, policy
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)
