"""A prompt's layer in one native call says what its modules say, however it is cut, and steps aside elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hwmodels.errors import ExecutionError, KernelError
from runtime import native
from runtime.native import Kernel
from runtime.native.layer import LayerWords
from runtime.projection import computes_prompt
from runtime.session import PlannedModel
from tests.conftest import TinyCheckpoint
from tests.planned import greedy, left_padded, loaded, on_cpu, spec_of
from tests.test_failures import mixed
from tests.test_layer import MIXTURES, N_LAYERS, TOLERANCE, by_modules, calls, counted  # noqa: F401 - a fixture
from tests.tiny import DENSE, eager, tokens

INSTALLED = native.installed()
HAS_PROMPTS = not isinstance(INSTALLED, KernelError) and INSTALLED.attends_prompts
HAS_BFLOAT16 = HAS_PROMPTS and computes_prompt(torch.bfloat16, 300)
pytestmark = pytest.mark.skipif(not HAS_PROMPTS, reason=f"no native kernel of prompts: {INSTALLED}")
needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="prompts in bfloat16 are torch's here")
SIZES = [(batch, n) for batch in (1, 3) for n in (2, 8, 9, 37, 300)]
CHUNKS = ([2, 300], [37, 9, 8, 1, 2], [300, 1, 1, 37])


def plan(folder: Path, dtype: str = "auto") -> Any:
    return on_cpu(spec_of(folder, dtype), n_ctx=400)


def in_bfloat16(folder: Path) -> AbstractContextManager[PlannedModel]:
    return loaded(folder, plan(folder, "bfloat16"), dtype="bfloat16")


@torch.no_grad()
def read(model: PreTrainedModel, chunks: list[torch.Tensor], cache: DynamicCache | None = None) -> torch.Tensor:
    """Logits [B, T, V] of a prompt's chunks, one after the other."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    return torch.cat([model(some, past_key_values=cache, use_cache=True).logits for some in chunks], dim=1)


def cut(sizes: list[int], batch: int = 1, seed: int = 0) -> list[torch.Tensor]:
    """Random tokens [B, n] of each size."""
    return list(tokens(sum(sizes), batch, seed).split(sizes, dim=1))


def modules_alone(monkeypatch: pytest.MonkeyPatch, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What a run gives without a layer in one call."""
    with monkeypatch.context() as patch:
        by_modules(patch)
        return run()


# -- the same as modules ------------------------------------------------------------------------------


@needs_bfloat16
@pytest.mark.parametrize("family", DENSE)
def test_a_dense_prompt_in_bfloat16_has_the_bits_that_its_modules_have(
    family: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_bfloat16(tiny_checkpoint(family)) as model, counted(monkeypatch) as rows:
        for batch, n_prompt in SIZES:
            chunks = cut([n_prompt], batch)
            rows.clear()
            whole = read(model, chunks)
            assert rows == [batch * n_prompt] * N_LAYERS
            assert torch.equal(whole, modules_alone(monkeypatch, lambda c=chunks: read(model, c)))
            assert len(rows) == N_LAYERS


@needs_bfloat16
@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixtures_prompt_in_bfloat16_is_as_close_to_float32_as_its_modules_are(
    family: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a few tokens rounding chooses another expert, here or there: not the farthest of all logits, but half of them.
    folder = tiny_checkpoint(family)
    theirs = eager(folder)

    def off(found: torch.Tensor, exact: torch.Tensor) -> float:
        return float((found.float() - exact).square().mean(dim=-1).sqrt().quantile(0.5))

    with in_bfloat16(folder) as model, counted(monkeypatch) as rows:
        for batch, n_prompt in SIZES:
            prompts = [cut([n_prompt], batch, seed) for seed in range(max(1, 40 // (batch * n_prompt)))]
            exact = torch.cat([read(theirs, some).flatten(0, 1) for some in prompts])
            rows.clear()
            whole = torch.cat([read(model, some).flatten(0, 1) for some in prompts])
            assert rows == [batch * n_prompt] * N_LAYERS * len(prompts)
            alone = modules_alone(
                monkeypatch, lambda p=prompts: torch.cat([read(model, some).flatten(0, 1) for some in p])
            )
            assert off(whole, exact) < 1.25 * off(alone, exact)


@pytest.mark.parametrize("family", [*DENSE, *MIXTURES])
@pytest.mark.parametrize(("batch", "n_prompt"), [(1, 2), (1, 8), (3, 2), (4, 2), (1, 9), (3, 24), (1, 100)])
def test_rows_of_a_float32_prompt_are_one_call_for_each_layer_and_eager_transformers(
    family: str,
    batch: int,
    n_prompt: int,
    tiny_checkpoint: TinyCheckpoint,
    calls: list[int],  # noqa: F811
) -> None:
    folder, chunks = tiny_checkpoint(family), cut([n_prompt, n_prompt, 1, n_prompt], batch)
    with loaded(folder, on_cpu(spec_of(folder), n_ctx=400, batch=4)) as model:
        found = read(model, chunks)
    assert calls == [some.numel() for some in chunks for _ in range(N_LAYERS)]
    torch.testing.assert_close(found, read(eager(folder), chunks), atol=TOLERANCE, rtol=0)


def test_rows_that_torch_multiplies_faster_are_the_modules(tiny_checkpoint: TinyCheckpoint, calls: list[int]) -> None:  # noqa: F811
    folder = tiny_checkpoint("mixtral")
    with loaded(folder, plan(folder)) as model:
        read(model, cut([257]))
        read(model, cut([129], 2))
    assert not calls


@needs_bfloat16
def test_steps_of_more_sequences_than_few_are_calls_too(
    tiny_checkpoint: TinyCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[int],  # noqa: F811
) -> None:
    folder, chunks = tiny_checkpoint("qwen3"), cut([3, 1, 1, 4], 12)
    with loaded(folder, on_cpu(spec_of(folder, "bfloat16"), batch=12), dtype="bfloat16") as model:
        found = read(model, chunks)
        assert calls == [12 * n for n in (3, 1, 1, 4) for _ in range(N_LAYERS)]
        assert torch.equal(found, modules_alone(monkeypatch, lambda: read(model, chunks)))


# -- routers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_of_equally_likely_experts_prompts_and_steps_choose_the_first(
    family: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    # torch's topk chooses any of them.
    folder, n_prompt = tiny_checkpoint(family), 300 if HAS_BFLOAT16 else 8
    dtype = "bfloat16" if HAS_BFLOAT16 else "float32"
    with loaded(folder, plan(folder, dtype), dtype=dtype) as model:
        gates: list[Any] = [m for name, m in model.named_modules() if name.endswith(("mlp.gate", "mlp.router"))]
        n_experts, top_k = gates[0].weight.shape[0], gates[0].top_k

        def chosen() -> list[tuple[int, ...]]:
            greedy(model, *cut([n_prompt]), 4)
            assert model.last_routing is not None
            return [counts for counts in model.last_routing.counts.values() if len(counts) == n_experts]

        for gate in gates:
            gate.weight.data[2:] = gate.weight.data[2]
            if family == "deepseek_v3":
                gate.e_score_correction_bias.zero_()
            if family == "gpt_oss":
                gate.bias.data.zero_()
        assert all(list(counts[2:]) == sorted(counts[2:], reverse=True) for counts in chosen())
        for gate in gates:
            gate.weight.data.zero_()
        n_tokens = [n_prompt] * len(gates) + [1] * 3 * len(gates)
        assert chosen() == [(n,) * top_k + (0,) * (n_experts - top_k) for n in n_tokens]


@pytest.mark.parametrize("family", ["llama", *MIXTURES])
def test_what_is_not_a_number_stays_in_its_sequence_and_has_experts_too(
    family: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    folder, (n_prompt, at) = tiny_checkpoint(family), (300, 200) if HAS_BFLOAT16 else (4, 2)
    dtype = "bfloat16" if HAS_BFLOAT16 else "float32"
    ids = torch.full((2, n_prompt), 7)
    ids[1, at:] = 9
    with loaded(folder, plan(folder, dtype), dtype=dtype) as model:
        before = read(model, [ids])
        embedding: Any = model.get_submodule("model.embed_tokens")
        embedding.weight.data[9] = torch.nan
        found = read(model, [ids])
    assert torch.equal(found[0], before[0])
    assert found[1, at:].isnan().all()


# -- what is in the cache -----------------------------------------------------------------------------


@needs_bfloat16
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_prompt_in_chunks_goes_on_in_the_same_buffers_and_is_the_modules(
    family: str, batch: int, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_bfloat16(tiny_checkpoint(family)) as model, counted(monkeypatch) as rows:
        for sizes in CHUNKS:
            chunks = cut(sizes, batch)
            rows.clear()
            whole, cache = read(model, chunks), DynamicCache(config=model.config)
            assert rows == [batch * n for n in sizes for _ in range(N_LAYERS)]
            if family in DENSE:  # rounding chooses another expert, here or there
                assert torch.equal(whole, modules_alone(monkeypatch, lambda c=chunks: read(model, c)))
            read(model, chunks[:1], cache)
            assert [layer.keys.shape[2] for layer in cache.layers] == [sizes[0]] * N_LAYERS  # asked for, and gone on
            assert torch.equal(read(model, chunks[1:], cache), whole[:, sizes[0] :])


@needs_bfloat16
def test_a_row_has_the_same_bits_in_any_chunk_and_whatever_the_other_sequences_are(
    tiny_checkpoint: TinyCheckpoint,
) -> None:
    # 9 and more rows are products by tiles where the CPU has them, whatever their number.
    ids = tokens(120, 3)
    with in_bfloat16(tiny_checkpoint("qwen2_moe")) as model:
        whole = read(model, [ids])
        for sizes in ([9, 111], [60, 51, 9], [17, 16, 15, 72]):
            assert torch.equal(read(model, list(ids.split(sizes, dim=1))), whole)
        alone = [read(model, list(ids[i : i + 1].split([40, 80], dim=1))) for i in range(3)]
        assert torch.equal(torch.cat(alone), whole)


@pytest.fixture(params=["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
def agrees(
    request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[int]]:
    """Runs by plan what is given, in two dtypes, and compares logits with eager transformers' or the modules'."""
    dtype: str = request.param

    def compare(run: Callable[[PreTrainedModel], torch.Tensor], family: str = "llama", **changes: Any) -> list[int]:
        folder = tiny_checkpoint(family, **changes)
        with loaded(folder, plan(folder, dtype), dtype=dtype) as model, counted(monkeypatch) as rows:
            found = run(model)
            n_rows = list(rows)
            alone = modules_alone(monkeypatch, lambda: run(model))
            assert len(rows) == len(n_rows)
        torch.testing.assert_close(found, alone, atol=TOLERANCE, rtol=0)
        if dtype == "float32":
            torch.testing.assert_close(found, run(eager(folder)), atol=TOLERANCE, rtol=0)
        return n_rows

    return compare


def test_a_prompt_behind_a_prompt_of_another_cache_does_not_see_it(agrees: Callable[..., list[int]]) -> None:
    def run(model: PreTrainedModel) -> torch.Tensor:
        first, second = (DynamicCache(config=model.config) for _ in range(2))
        chunks = [(cut([4, 1, 3], seed=s), cache) for s, cache in ((0, first), (1, second))]
        return torch.cat([read(model, some[i : i + 1], cache) for i in range(3) for some, cache in chunks], dim=1)

    assert agrees(run) == [4] * 6 + [1] * 6 + [3] * 6


def test_what_is_put_in_a_cache_is_gone_on_from(agrees: Callable[..., list[int]]) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        cache, found = DynamicCache(config=model.config), []
        found.append(read(model, cut([3], 2), cache))
        cache.reorder_cache(torch.tensor([1, 1]))
        found.append(read(model, cut([4], 2, seed=1), cache))
        cache.batch_select_indices(torch.tensor([1]))
        found.append(read(model, cut([5], seed=2), cache).expand(2, -1, -1))
        cache.crop(-3)
        found.append(read(model, cut([6], seed=3), cache).expand(2, -1, -1))
        cache.batch_repeat_interleave(2)
        found.append(read(model, cut([2], 2, seed=4), cache))
        return torch.cat(found, dim=1)

    assert agrees(run) == [n for n in (6, 8, 5, 6, 4) for _ in range(N_LAYERS)]


def test_a_cache_that_was_reset_begins_anew_with_any_number_of_sequences(agrees: Callable[..., list[int]]) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        cache, found = DynamicCache(config=model.config), []
        for batch, clear in ((1, cache.reset), (2, lambda: cache.crop(-4)), (2, cache.reset), (4, lambda: None)):
            found.append(read(model, cut([2], batch, seed=batch), cache).flatten(0, 1))
            found.append(read(model, cut([2], batch, seed=9), cache).flatten(0, 1))
            clear()
        return torch.cat(found)

    assert agrees(run) == [2 * n for n in (1, 1, 2, 2, 2, 2, 4, 4) for _ in range(N_LAYERS)]


def test_a_cache_that_was_filled_elsewhere_and_copies_of_one_are_gone_on_from(agrees: Callable[..., list[int]]) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        draw = torch.Generator().manual_seed(5)
        for i in range(N_LAYERS):
            keys, values = torch.randn((2, 1, 2, 7, 8), generator=draw).to(model.dtype)
            cache.update(keys, values, i)
        found = [read(model, cut([3]), cache)]
        other = copy.deepcopy(cache)
        shared = copy.copy(cache)  # of the same buffers
        shared.layers = [copy.copy(layer) for layer in cache.layers]
        found += [read(model, cut([2, 1, 2], seed=s), c) for s, c in enumerate((shared, cache, other, shared, cache))]
        return torch.cat(found, dim=1)

    assert agrees(run) == [3] * 3 + ([2] * 3 + [1] * 3 + [2] * 3) * 5


@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_a_cache_that_began_in_one_mode_goes_on_in_the_other(modes: Any, agrees: Callable[..., list[int]]) -> None:
    def run(model: PreTrainedModel) -> torch.Tensor:
        cache, found = DynamicCache(config=model.config), []
        for i, mode in enumerate(modes + modes):
            with mode():
                found.append(read(model, cut([3, 1, 2], seed=i), cache).clone())
        return torch.cat([one.clone() for one in found], dim=1)

    assert agrees(run) == [n for n in (3, 1, 2) for _ in range(N_LAYERS)] * 4


# -- stepping aside -----------------------------------------------------------------------------------


def test_padding_is_the_modules_in_one_sequence_and_in_several(agrees: Callable[..., list[int]]) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        found = []
        for n_real in ([7, 3], [5, 7], [6]):
            ids, mask = left_padded(tokens(7, len(n_real)), n_real)
            out = model(ids, attention_mask=mask, past_key_values=DynamicCache(config=model.config)).logits
            found.append((out * mask[..., None]).flatten(0, 1))
        return torch.cat(found)

    assert agrees(run) == []
    assert agrees(run, "mixtral") == []


def test_beyond_a_window_layers_are_the_modules_and_before_it_calls_if_the_cache_has_no_window(
    agrees: Callable[..., list[int]],
) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        of_window = DynamicCache(config=model.config)
        of_none = DynamicCache()
        of_none.layers = DynamicCache(config=eager_config(model)).layers
        return torch.cat([read(model, cut([5, 4, 3]), cache) for cache in (of_window, of_none)])

    assert agrees(run, "mistral", sliding_window=8) == [5] * N_LAYERS


def eager_config(model: PreTrainedModel) -> Any:
    """The model's config without a window."""
    config = copy.deepcopy(model.config)
    config.sliding_window = None
    return config


def test_without_a_cache_or_with_one_of_the_models_own_making_layers_are_the_modules(
    agrees: Callable[..., list[int]],
) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        found = [model(*cut([6]), use_cache=False).logits, model(*cut([6]), use_cache=True).logits]
        cache = StaticCache(config=model.config, max_cache_len=16)
        found.append(model(*cut([6]), past_key_values=cache, use_cache=True).logits)
        return torch.cat(found)

    assert agrees(run) == []


def test_what_not_all_tokens_see_alike_is_the_modules(agrees: Callable[..., list[int]]) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        ids, found = tokens(4, 2), []
        unseen = torch.full((2, 1, 4, 4), -1e4, dtype=model.dtype).triu(1)
        unseen[1, :, 1:, 0] = -1e4
        for own in (
            {"attention_mask": unseen},
            {"position_ids": torch.tensor([[3], [5]])},  # one for all of a sequence
            {"position_ids": torch.tensor([[3, 4, 4, 4], [0, 1, 2, 9]])},  # of its own each: one call
        ):
            found.append(model(ids, past_key_values=DynamicCache(config=model.config), **own).logits[:, 1:])
        return torch.cat(found)

    assert agrees(run) == [8] * N_LAYERS


def test_tokens_that_see_those_after_them_are_not_the_kernels(
    tiny_checkpoint: TinyCheckpoint,
    calls: list[int],  # noqa: F811
) -> None:
    @torch.no_grad()
    def run(model: PreTrainedModel, **how: Any) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        found: torch.Tensor = model(tokens(5), past_key_values=cache, use_cache=True, **how).logits
        return found

    folder = tiny_checkpoint("qwen3")
    with loaded(folder, plan(folder)) as model:
        plain, both_ways = run(model), run(model, is_causal=False)
        assert len(calls) == N_LAYERS
        assert not torch.allclose(plain, both_ways)
        for layer in model.get_submodule("model.layers").children():
            layer.self_attn.is_causal = False
        torch.testing.assert_close(run(model), both_ways, atol=TOLERANCE, rtol=0)
        assert len(calls) == N_LAYERS


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_router_logits", "output_attentions"])
def test_what_is_asked_of_a_prompts_layers_is_answered(asked: str, agrees: Callable[..., list[int]]) -> None:
    name = {"output_hidden_states": "hidden_states", "output_attentions": "attentions"}.get(asked, "router_logits")

    @torch.no_grad()
    def run(model: PreTrainedModel) -> torch.Tensor:
        model.set_attn_implementation("eager" if name == "attentions" else model.config._attn_implementation)
        cache = DynamicCache(config=model.config)
        found = model(tokens(6), past_key_values=cache, use_cache=True, **{asked: True})
        return torch.cat([part.flatten() for part in getattr(found, name)])

    assert agrees(run, "mixtral") == []  # transformers listens to parts of layers, whatever is asked


def test_a_hook_on_a_part_of_a_prompts_layer_is_called_and_one_on_the_layer_costs_nothing(
    agrees: Callable[..., list[int]],
) -> None:
    def run(model: PreTrainedModel) -> torch.Tensor:
        heard: list[torch.Tensor] = []
        parts: list[str] = []
        for part in ("", ".mlp.gate", ".self_attn", ".self_attn.k_proj", ".post_attention_layernorm"):
            listening = model.get_submodule(f"model.layers.1{part}").register_forward_hook(
                lambda _module, _args, out: heard.append((out[0] if isinstance(out, tuple) else out).flatten())
            )
            read(model, cut([6]))
            listening.remove()
            parts.append(part)
            assert len(heard) == len(parts), part
        return torch.cat([read(model, cut([6])).flatten(), *heard])

    assert agrees(run, "mixtral") == [6] * (2 * N_LAYERS + 4 * (N_LAYERS - 1))


# -- what fails ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_past", [0, 4])
def test_memory_that_runs_out_in_a_prompt_is_named_and_its_cache_and_the_model_go_on(
    n_past: int, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, n_calls = Kernel.layer, 0

    def fail_in_the_second(self: Kernel, words: LayerWords) -> None:
        nonlocal n_calls
        n_calls += 1
        compute(self, words)
        if n_calls == 2:  # what it wrote into the cache is not held
            raise ExecutionError("native kernel: no memory")

    folder, before, after = tiny_checkpoint("mixtral"), cut([4], seed=1), cut([5], seed=2)
    with loaded(folder, plan(folder)) as model:
        cache = DynamicCache(config=model.config)
        expected = read(model, [*before[: n_past // 4], *after])[:, n_past:]
        if n_past:
            read(model, before, cache)
        with monkeypatch.context() as patch:
            patch.setattr(Kernel, "layer", fail_in_the_second)
            name = r"^task \w+\.L01\.attn failed on CPU: native kernel: no memory"
            with pytest.raises(ExecutionError, match=name):
                read(model, after, cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [n_past + 5, n_past, n_past]
        cache.layers[0].crop(-5)
        assert torch.equal(read(model, after, cache), expected)


def test_a_prompt_records_the_tasks_and_the_routing_that_its_modules_do(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recorded(model: PlannedModel) -> tuple[list[Any], dict[Any, Any]]:
        greedy(model, tokens(8), 3)
        assert model.last_timeline is not None
        assert model.last_routing is not None
        spans = [(s.task, s.kind, s.resource, s.bytes, s.flops) for s in model.last_timeline.spans]
        assert all(span.start_s <= span.end_s for span in model.last_timeline.spans)
        return spans, dict(model.last_routing.counts)

    folder = tiny_checkpoint("qwen3_moe")
    with loaded(folder, plan(folder)) as model, counted(monkeypatch) as rows:
        whole = recorded(model)
        assert rows[:N_LAYERS] == [8] * N_LAYERS
        by_modules(monkeypatch)
        assert recorded(model) == whole


def test_two_models_read_prompts_in_two_threads_at_once(tiny_checkpoint: TinyCheckpoint) -> None:
    dtype = "bfloat16" if HAS_BFLOAT16 else "float32"
    sizes = [[300, 37, 9, 1] if HAS_BFLOAT16 else [8, 7, 6, 1]] * 10

    def run(model: PlannedModel) -> list[torch.Tensor]:
        return [read(model, cut(some, seed=i)) for i, some in enumerate(sizes)]

    folders = [tiny_checkpoint(family) for family in ("qwen2_moe", "llama")]
    with ExitStack() as stack:
        models = [stack.enter_context(loaded(f, plan(f, dtype), dtype=dtype)) for f in folders]
        alone = [run(model) for model in models]
        with ThreadPoolExecutor(2) as threads:
            together = list(threads.map(run, models))
    assert all(torch.equal(*both) for pair in zip(alone, together, strict=True) for both in zip(*pair, strict=True))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_layer_on_the_cpu_between_two_on_the_device_is_a_call(
    family: str, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, chunks = tiny_checkpoint(family), cut([8, 1, 6])
    with loaded(folder, mixed(spec_of(folder))) as model, counted(monkeypatch) as rows:
        found = read(model, chunks)
        assert rows == [8, 1, 6]
    torch.testing.assert_close(found, read(eager(folder), chunks), atol=TOLERANCE, rtol=0)
