"""A layer of a small step in one native call says what its modules say, and steps aside where it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hwmodels.errors import ExecutionError, KernelError
from runtime import native
from runtime.executor import Executor
from runtime.layer import StepLayer
from runtime.lean import StepModel
from runtime.native import Kernel
from runtime.native.layer import ForwardWords, LayersWords, LayerWords
from runtime.projection import FEW_ROWS
from runtime.session import PlannedModel
from tests.conftest import TinyCheckpoint
from tests.planned import greedy, left_padded, loaded, on_cpu, spec_of
from tests.tiny import DENSE, LATENT, eager, tokens

INSTALLED = native.installed()
pytestmark = pytest.mark.skipif(isinstance(INSTALLED, KernelError), reason=f"no native kernel: {INSTALLED}")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", *LATENT, "gpt_oss")
TOLERANCE = 1e-4
N_LAYERS, N_GEN = 3, 64
N_PROMPT = FEW_ROWS + 1  # a prompt's rows where attention of prompts is the kernel's, else the modules'


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of every layer that the kernel computes whole, alone or with the others."""
    rows: list[int] = []
    compute, compute_all, compute_whole = Kernel.layer, Kernel.layers, Kernel.forward

    def layer(self: Kernel, words: LayerWords) -> None:
        rows.append(words.rows)
        compute(self, words)

    def layers(self: Kernel, words: LayersWords) -> None:
        rows.extend([words.rows] * words.n_layers)
        compute_all(self, words)

    def forward(self: Kernel, words: ForwardWords, n_threads: int) -> bool:
        done = compute_whole(self, words, n_threads)
        rows.extend([words.layers.rows] * words.layers.n_layers * done)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "layer", layer)
        patch.setattr(Kernel, "layers", layers)
        patch.setattr(Kernel, "forward", forward)
        yield rows


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    with counted(monkeypatch) as rows:
        yield rows


@torch.no_grad()
def fed(model: PreTrainedModel, ids: torch.Tensor, n_prompt: int) -> torch.Tensor:
    """Logits [B, T, V] of the tokens after a prompt, fed one by one."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :n_prompt], past_key_values=cache, use_cache=True)
    after = ids[:, n_prompt:].split(1, dim=1)
    steps = [model(token, past_key_values=cache, use_cache=True).logits for token in after]
    return torch.cat(steps, dim=1)


def cpu_plan(folder: Path, dtype: str = "auto") -> Any:
    return on_cpu(spec_of(folder, dtype), n_ctx=128)


def no_whole_steps(patch: pytest.MonkeyPatch) -> None:
    """Embedding and head are the modules'."""
    patch.setattr(Executor, "computes_steps", lambda self, n_tokens: False)


def by_modules(patch: pytest.MonkeyPatch) -> None:
    """No layer is computed whole."""
    no_whole_steps(patch)
    patch.setattr(Executor, "computes_layers", lambda self: False)
    patch.setattr(Executor, "computes_layer", lambda self, layer: False)


@pytest.mark.parametrize("family", [*DENSE, *MIXTURES])
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_and_logits_are_eager_transformers_and_every_layer_of_every_step_is_one_call(
    family: str, batch: int, tiny_checkpoint: TinyCheckpoint, calls: list[int]
) -> None:
    folder, ids = tiny_checkpoint(family), tokens(N_PROMPT, batch)
    theirs = eager(folder)
    expected = greedy(theirs, ids, N_GEN)
    with loaded(folder, cpu_plan(folder)) as model:
        assert greedy(model, ids, N_GEN) == expected
        assert calls == [batch * N_PROMPT] * N_LAYERS + [batch] * (N_LAYERS * (N_GEN - 1))
        whole = torch.cat([ids, torch.tensor(expected)], dim=1)
        found, exact = fed(model, whole, N_PROMPT), fed(theirs, whole, N_PROMPT)
    torch.testing.assert_close(found, exact, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dense_layer_has_the_bits_that_its_modules_have(
    family: str, dtype: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ids = tiny_checkpoint(family), tokens(20, 2)
    with loaded(folder, cpu_plan(folder, dtype), dtype=dtype) as model:
        whole = fed(model, ids, N_PROMPT)
        by_modules(monkeypatch)
        assert torch.equal(whole, fed(model, ids, N_PROMPT))


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_in_bfloat16_is_as_close_to_float32_as_its_modules_are(
    family: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a few tokens rounding chooses another expert, here or there, which all that follow remember.
    folder, prompts = tiny_checkpoint(family), [tokens(30, 3, seed) for seed in range(4)]
    theirs = eager(folder)
    exact = torch.cat([fed(theirs, ids, N_PROMPT) for ids in prompts])

    def off(model: PreTrainedModel) -> float:
        found = torch.cat([fed(model, ids, N_PROMPT) for ids in prompts])
        return float((found.float() - exact).square().mean(dim=-1).sqrt().quantile(0.5))

    with loaded(folder, cpu_plan(folder, "bfloat16"), dtype="bfloat16") as model:
        whole = off(model)
        by_modules(monkeypatch)
        assert whole < 1.25 * off(model)


def stepped(model: PlannedModel, past: list[torch.Tensor], ids: torch.Tensor, rows: slice) -> torch.Tensor:
    """Logits of one more token of some sequences, whose keys and values of every layer are given."""
    cache = DynamicCache(config=model.config)
    for i, both in enumerate(past):
        key, value = both[:, rows].contiguous()
        cache.update(key, value, i)
    with torch.no_grad():
        found: torch.Tensor = model(ids[rows], past_key_values=cache, use_cache=True).logits
    return found


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "qwen2_moe", "olmoe", "phimoe", "gpt_oss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_whatever_the_others_are_and_whatever_the_threads(
    family: str, dtype: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(family)
    config = eager(folder).config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kind: torch.dtype = getattr(torch, dtype)

    with loaded(folder, cpu_plan(folder, dtype), dtype=dtype) as model:

        @settings(max_examples=10)
        @given(st.integers(1, 8), st.integers(1, 300), st.integers(0, 1000))
        def check(batch: int, n_past: int, seed: int) -> None:
            draw = torch.Generator().manual_seed(seed)
            shape = (2, batch, config.num_key_value_heads, n_past, width)
            past = [torch.randn(shape, generator=draw).to(kind) for _ in range(N_LAYERS)]
            ids = tokens(1, batch, seed)
            monkeypatch.setattr(Executor, "_check_room", lambda *_: None)
            with counted(monkeypatch) as rows:
                together = stepped(model, past, ids, slice(None))
                alone = [stepped(model, past, ids, slice(i, i + 1)) for i in range(batch)]
                assert torch.equal(together, stepped(model, past, ids, slice(None)))
                assert len(rows) == N_LAYERS * (batch + 2)
            assert torch.equal(together, torch.cat(alone))
            monkeypatch.setattr(native.library, "threads", lambda: 1 + seed % 3)
            assert torch.equal(together, stepped(model, past, ids, slice(None)))

        check()


# -- stepping aside -----------------------------------------------------------------------------------


def agrees(folder: Path, run: Callable[[PreTrainedModel], torch.Tensor]) -> None:
    """A run by plan is eager transformers'."""
    with loaded(folder, cpu_plan(folder)) as model:
        torch.testing.assert_close(run(model), run(eager(folder)), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "olmoe", "phimoe", "gpt_oss"])
def test_padding_leaves_layers_to_their_modules(family: str, tiny_checkpoint: TinyCheckpoint, calls: list[int]) -> None:
    folder = tiny_checkpoint(family)
    ids, mask = left_padded(tokens(N_PROMPT, 2), [N_PROMPT, 3])
    expected = greedy(eager(folder), ids, 8, mask)
    with loaded(folder, cpu_plan(folder)) as model:
        assert greedy(model, ids, 8, mask) == expected
    assert not calls


def test_another_cache_leaves_layers_to_their_modules(tiny_checkpoint: TinyCheckpoint, calls: list[int]) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        cache, ids = StaticCache(config=model.config, max_cache_len=16), tokens(6)
        model(ids[:, :5], past_key_values=cache, use_cache=True)
        found: torch.Tensor = model(ids[:, 5:], past_key_values=cache, use_cache=True).logits
        return found

    agrees(tiny_checkpoint("mixtral"), run)
    assert not calls


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_router_logits"])
def test_what_is_asked_of_a_layers_parts_is_answered(asked: str, tiny_checkpoint: TinyCheckpoint) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        cache, ids = DynamicCache(config=model.config), tokens(6)
        model(ids[:, :5], past_key_values=cache, use_cache=True)
        found = model(ids[:, 5:], past_key_values=cache, use_cache=True, **{asked: True})
        parts = found.hidden_states if asked == "output_hidden_states" else found.router_logits
        return torch.cat([part.flatten() for part in parts])

    agrees(tiny_checkpoint("mixtral"), run)


def test_a_hook_on_a_part_is_called_and_one_on_the_layer_costs_nothing(
    tiny_checkpoint: TinyCheckpoint, calls: list[int]
) -> None:
    folder, heard = tiny_checkpoint("mixtral"), []
    with loaded(folder, cpu_plan(folder)) as model:
        layer = model.get_submodule("model.layers.1")
        listening = layer.register_forward_hook(lambda *_: heard.append("layer"))
        greedy(model, tokens(N_PROMPT), 3)
        assert (len(heard), len(calls)) == (3, 3 * N_LAYERS)
        listening.remove()
        layer.get_submodule("mlp.gate").register_forward_hook(lambda *_: heard.append("gate"))
        greedy(model, tokens(N_PROMPT), 3)
        assert (heard.count("gate"), len(calls)) == (3, 3 * N_LAYERS + 3 * (N_LAYERS - 1))


def test_a_weight_that_moves_and_a_part_that_is_replaced_are_noticed(tiny_checkpoint: TinyCheckpoint) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        query: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
        query.weight.data = 2 * query.weight.data
        attention = model.get_submodule("model.layers.1.self_attn")
        attention.o_proj = torch.nn.Sequential(attention.o_proj, torch.nn.Tanh())
        return fed(model, tokens(N_PROMPT + 3), N_PROMPT)

    agrees(tiny_checkpoint("qwen3"), run)


PHIMOES: dict[str, Callable[[Any], object]] = {
    "the router's reach": lambda m: setattr(m.model.layers[1].mlp.router, "router_jitter_noise", 0.3),
    "a norm's bias": lambda m: setattr(m.model.layers[1].input_layernorm.bias, "data", torch.ones(32)),
    "a norm's epsilon": lambda m: setattr(m.model.layers[0].post_attention_layernorm, "eps", 0.5),
    "the last norm's bias": lambda m: setattr(m.model.norm.bias, "data", torch.ones(32)),
    "the last norm's epsilon": lambda m: setattr(m.model.norm, "eps", 0.5),
    "a norm": lambda m: setattr(m.model.layers[2], "input_layernorm", torch.nn.Identity()),
    "the rotary base": lambda m: m.config.rope_parameters.update(rope_theta=500.0),
}


@pytest.mark.parametrize("what", PHIMOES)
def test_what_is_altered_in_phimoe_counts_from_the_next_step(what: str, tiny_checkpoint: TinyCheckpoint) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        cache, ids, found = DynamicCache(config=model.config), tokens(N_PROMPT + 4, 2), []
        for i, some in enumerate(ids.split([N_PROMPT, *[1] * 4], dim=1)):
            if i == 3:
                PHIMOES[what](model)
            found.append(model(some, past_key_values=cache, use_cache=True).logits[:, -1])
        return torch.cat(found)

    agrees(tiny_checkpoint("phimoe"), run)


def test_torch_alone_computes_the_same(tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, ids = tiny_checkpoint("qwen2_moe"), tokens(N_PROMPT + 7)
    with loaded(folder, cpu_plan(folder)) as model, counted(monkeypatch) as rows:
        whole = fed(model, ids, N_PROMPT)
        assert len(rows) == 8 * N_LAYERS
        monkeypatch.setenv("SCHEINFER_KERNEL", "torch")
        torch.testing.assert_close(fed(model, ids, N_PROMPT), whole, atol=TOLERANCE, rtol=0)
        assert len(rows) == 8 * N_LAYERS
    with loaded(folder, cpu_plan(folder)) as model:  # loaded without the kernel
        assert not any(isinstance(module, StepLayer) for module in model.modules())


# -- what is recorded ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_a_run_records_the_tasks_and_the_routing_that_modules_do(
    family: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ids = tiny_checkpoint(family), tokens(N_PROMPT, 2)
    with loaded(folder, cpu_plan(folder)) as model:
        found = []
        for prepare in (lambda: None, partial(by_modules, monkeypatch)):
            prepare()
            greedy(model, ids, 6)
            assert model.last_timeline is not None
            assert model.last_routing is not None
            spans = [(s.task, s.kind, s.resource, s.bytes, s.flops) for s in model.last_timeline.spans]
            found.append((spans, dict(model.last_routing.counts)))
    assert found[0] == found[1]


@pytest.mark.parametrize("together", ["layer", "layers", "forward"])
def test_memory_that_runs_out_is_named_by_the_task_and_the_model_goes_on(
    together: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Kernel.layer

    def fail(self: Kernel, words: LayerWords) -> None:
        if words.n_new > 1:
            return layer(self, words)
        raise ExecutionError("native kernel: no memory")

    def fail_in_the_second(self: Kernel, words: LayersWords) -> None:
        words.n_done = 1
        raise ExecutionError("native kernel: no memory")

    def fail_in_the_head(self: Kernel, words: ForwardWords, n_threads: int) -> bool:
        words.n_parts = 1 + N_LAYERS
        raise ExecutionError("native kernel: no memory")

    folder, ids = tiny_checkpoint("mixtral"), tokens(N_PROMPT)
    with loaded(folder, cpu_plan(folder)) as model:
        expected = greedy(model, ids, 4)
        with monkeypatch.context() as patch:
            if together != "forward":
                no_whole_steps(patch)
            if together == "layer":
                patch.setattr(Executor, "computes_layers", lambda self: False)
            patch.setattr(Kernel, "layer", fail)
            patch.setattr(Kernel, "layers", fail_in_the_second)
            patch.setattr(Kernel, "forward", fail_in_the_head)
            task = {"layer": r"decode1\.L00\.attn", "layers": r"decode1\.L01\.attn", "forward": r"decode1\.head"}[
                together
            ]
            with pytest.raises(ExecutionError, match=f"{task} failed on CPU: native kernel: no memory"):
                greedy(model, ids, 4)
        assert greedy(model, ids, 4) == expected


# -- the model around its layers ----------------------------------------------------------------------


def lean_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step that goes from layer to layer without masks."""
    rows: list[int] = []
    step = StepModel._step

    def count(self: StepModel, ids: torch.Tensor, *rest: Any) -> Any:
        rows.append(ids.shape[0])
        return step(self, ids, *rest)

    monkeypatch.setattr(StepModel, "_step", count)
    no_whole_steps(monkeypatch)
    return rows


@pytest.mark.parametrize("family", ["qwen3", "qwen2_moe"])
def test_layers_in_one_call_have_the_bits_and_the_cache_of_a_call_for_each(
    family: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        cache, found = DynamicCache(config=model.config), []
        for some in tokens(80, 2).split([N_PROMPT, *[1] * (80 - N_PROMPT)], dim=1):  # more than its first buffers hold
            found.append(model(some, past_key_values=cache, use_cache=True).logits[:, -1:])
        layers: list[Any] = cache.layers
        held = [x for layer in layers for x in (layer.keys, layer.values)]
        assert all(x.shape[2] == 80 for x in held)
        return torch.cat([x.flatten() for x in (*found, *held)])

    folder = tiny_checkpoint(family)
    with loaded(folder, cpu_plan(folder)) as model:
        no_whole_steps(monkeypatch)
        whole = run(model)
        monkeypatch.setattr(Executor, "computes_layers", lambda self: False)
        assert torch.equal(whole, run(model))


def test_two_caches_that_take_turns_keep_their_own_keys_and_values(tiny_checkpoint: TinyCheckpoint) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        caches, prompts, found = [DynamicCache(), DynamicCache()], [tokens(12, 1, 1), tokens(12, 1, 2)], []
        for k in range(8):
            for cache, ids in zip(caches, prompts, strict=True):
                fed_now = ids[:, :5] if k == 0 else ids[:, 4 + k : 5 + k]
                listening = model.get_submodule("model.layers.1").register_forward_hook(lambda *_: None)
                if k % 3:
                    listening.remove()  # else a call for each layer
                found.append(model(fed_now, past_key_values=cache, use_cache=True).logits[:, -1])
                listening.remove()
        caches.append(copy.deepcopy(caches[0]))
        found += [model(tokens(1, 1, i), past_key_values=caches[i], use_cache=True).logits[:, -1] for i in (0, 2, 0, 2)]
        return torch.cat(found)

    agrees(tiny_checkpoint("llama"), run)


@pytest.mark.parametrize("family", ["mistral", "qwen2_moe"])
def test_generation_takes_lean_steps_and_padding_does_not(
    family: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = tiny_checkpoint(family), lean_steps(monkeypatch)
    ids, mask = left_padded(tokens(N_PROMPT, 2), [N_PROMPT, 3])
    with loaded(folder, cpu_plan(folder)) as model:
        greedy(model, tokens(N_PROMPT, 2), 8)
        assert rows == [2] * 7
        greedy(model, ids, 8, mask)
        assert rows == [2] * 7


def test_a_lean_step_keeps_to_the_positions_and_the_window_that_it_is_given(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        cache, ids = DynamicCache(), tokens(12)  # of full layers, whatever the config says
        found = [model(ids[:, :5], past_key_values=cache, use_cache=True).logits[:, -1:]]
        for i, token in enumerate(ids[:, 5:].split(1, dim=1)):
            positions = torch.tensor([[i + 9]]) if i < 2 else None
            found.append(model(token, past_key_values=cache, use_cache=True, position_ids=positions).logits)
        return torch.cat(found, dim=1)

    rows = lean_steps(monkeypatch)
    agrees(tiny_checkpoint("mistral", sliding_window=8), run)
    assert len(rows) == 2  # of 6 and 7 tokens
    agrees(tiny_checkpoint("mistral"), run)
    assert len(rows) == 2 + 7
