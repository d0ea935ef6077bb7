"""gpt-oss: clamped gates with biases, a softmax with sinks, experts stored in turns or as MXFP4."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, eager_attention_forward

from hwmodels.errors import CheckpointError
from runtime import attention, mxfp4, native, sinks
from runtime.activation import ClampedGlu, gated
from runtime.checkpoint import SINGLE_NAME, read_config
from runtime.native import ISAS, Piece
from runtime.ops import piece_views, torch_gated_mlp
from sim.model import from_config
from tests.conftest import TinyCheckpoint
from tests.planned import greedy, loaded, logits, on_cpu, plans, spec_of, three_ways
from tests.test_adapter import reconfigure
from tests.test_exactness import TOLERANCE
from tests.test_native import DTYPES, assert_near, doubled, random_x
from tests.tiny import eager, tiny_config, tokens

CODE = native.activation_code(ClampedGlu())


def biased_piece(d_model: int, columns: int, dtype: torch.dtype, seed: int) -> Piece:
    """Large enough that many gates and ups are clamped."""
    values = torch.randn((3 * d_model + 2) * columns, generator=torch.Generator().manual_seed(seed))
    values[: 2 * d_model * columns] *= 4 / d_model**0.5
    values[2 * d_model * columns : 3 * d_model * columns] /= columns**0.5
    return piece_views(values.to(dtype), d_model, columns)


# -- experts ------------------------------------------------------------------------------------------


def test_gates_are_clamped_as_transformers_clamps_them() -> None:
    experts = GptOssExperts(tiny_config("gpt_oss"))
    gate, up = 6 * random_x(7, 50, torch.float32, 1), 6 * random_x(7, 50, torch.float32, 2)
    assert (gate > 7).any()
    assert (up.abs() > 7).any()
    theirs = experts._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))
    torch.testing.assert_close(gated(ClampedGlu(), gate, up), theirs)


@settings(max_examples=80)
@given(
    isa=st.sampled_from(ISAS),
    dtype=st.sampled_from(DTYPES),
    n_rows=st.sampled_from((1, 2, 5, 8, 9, 16, 17, 33, 64, 121, 250)),
    d_model=st.integers(1, 150),
    columns=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_clamped_and_biased_columns_are_as_near_to_float64_as_torch(
    isa: str, dtype: torch.dtype, n_rows: int, d_model: int, columns: list[int], biased: bool, seed: int
) -> None:
    kernel = native.kernel()
    if kernel is None or isa not in kernel.isas:
        return
    x = random_x(n_rows, d_model, dtype, seed)
    pieces = [biased_piece(d_model, c, dtype, seed + i) for i, c in enumerate(columns)]
    if not biased:
        pieces = [piece._replace(bias=None) for piece in pieces]
    for act, code in ((ClampedGlu(), CODE), (nn.functional.silu, 0)):
        assert code is not None
        exact = torch_gated_mlp(x.double(), doubled(pieces), act)
        y = kernel.mlp(x, [(None, None, pieces)], code, isa)
        assert_near(y, torch_gated_mlp(x, pieces, act), exact)


def test_what_is_not_a_number_stays_so() -> None:
    kernel = native.kernel()
    if kernel is None:
        pytest.skip("no native kernel")
    assert CODE is not None
    x, piece = random_x(20, 40, torch.bfloat16), biased_piece(40, 33, torch.bfloat16, 1)
    x[3, 0] = torch.nan
    for isa in kernel.isas:
        y = kernel.mlp(x, [(None, None, [piece])], CODE, isa)
        assert y.isnan().any(dim=1).tolist() == [row == 3 for row in range(20)]


def test_another_clamp_than_the_kernels_is_torchs() -> None:
    assert native.activation_code(ClampedGlu(limit=5.0)) is None
    assert native.activation_code(ClampedGlu(alpha=1.0)) is None


def test_another_clamp_of_a_config_is_obeyed(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("gpt_oss", swiglu_limit=0.5, swiglu_alpha=1.1)
    ids = tokens(7)
    with loaded(folder, three_ways(spec_of(folder))) as model:
        torch.testing.assert_close(logits(model, ids), logits(eager(folder), ids), atol=TOLERANCE, rtol=0)


def test_biases_of_gate_and_up_are_the_columns_and_downs_the_layers() -> None:
    config = tiny_config("gpt_oss").to_dict()
    spec = from_config(config)
    width, columns, n_experts = spec.d_model, spec.layers[0].ffn.columns, spec.layers[0].ffn.n_experts
    assert spec.column_elements(0) == 3 * width + 2
    assert spec.ffn_bytes(0) == n_experts * columns * (3 * width + 2) * spec.dtype_bytes
    other = from_config({**config, "num_local_experts": n_experts + 1})
    # of one more expert the router's row and bias, and what is added to its down
    assert other.layers[0].other_params - spec.layers[0].other_params == 2 * width + 1


# -- attention ----------------------------------------------------------------------------------------


class _Attention(nn.Module):
    is_causal = True

    def __init__(self, n_heads: int, n_kv: int) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(n_heads), requires_grad=False)
        self.num_key_value_groups = n_heads // n_kv


@settings(max_examples=60)
@given(
    batch=st.integers(1, 3),
    n_kv=st.integers(1, 3),
    group=st.integers(1, 4),
    n_new=st.integers(1, 20),
    n_past=st.integers(0, 20),
    window=st.one_of(st.none(), st.integers(1, 12)),
    scores=st.sampled_from((1, 200, 1 << 23)),
)
def test_a_softmax_with_sinks_is_that_of_transformers(
    batch: int, n_kv: int, group: int, n_new: int, n_past: int, window: int | None, scores: int
) -> None:
    torch.manual_seed(n_new)
    n_keys, module = n_past + n_new, _Attention(n_kv * group, n_kv)
    query = torch.randn(batch, n_kv * group, n_new, 8)
    key, value = torch.randn(2, batch, n_kv, n_keys, 8)
    sees = torch.ones(n_new, n_keys, dtype=torch.bool).tril(n_past)
    if window is not None:
        sees = sees.triu(n_past - window + 1)
    hidden = torch.zeros(n_new, n_keys).masked_fill(~sees, -torch.inf)[None, None]
    theirs, _ = eager_attention_forward(module, query, key, value, hidden, 0.3)
    masks: list[Tensor | None] = [sees[None, None].expand(batch, -1, -1, -1), None]
    given = {"s_aux": module.sinks, "scaling": 0.3, "sliding_window": window}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinks, "_SCORES", scores)
        for mask in masks:
            for kernel in ("auto", "torch"):
                patch.setenv("SCHEINFER_KERNEL", kernel)
                with torch.no_grad():
                    ours, _ = attention.attend(module, query, key, value, mask, **given)
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_windows_shorter_than_prompt_and_answer_agree(batch: int, tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("gpt_oss")
    ids, reference = tokens(13, batch), eager(folder)
    expected = greedy(reference, ids, 48)
    for plan in (on_cpu(spec_of(folder)), three_ways(spec_of(folder))):
        with loaded(folder, plan) as model:
            assert greedy(model, ids, 48) == expected


# -- checkpoints --------------------------------------------------------------------------------------


def packed(weights: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Random blocks and scales of the shape of weights [..., rows, width]: as many numbers, of about their size."""
    draw = torch.Generator().manual_seed(seed)
    shape = (*weights.shape[:-1], weights.shape[-1] // 32)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=draw)
    return blocks, torch.randint(120, 125, shape, dtype=torch.uint8, generator=draw)


@given(st.integers(0, 99), st.integers(0, 254))
def test_every_number_of_mxfp4_is_read_as_transformers_reads_it(seed: int, scale: int) -> None:
    blocks, _ = packed(torch.empty(1, 5, 96), seed)
    scales = torch.full(blocks.shape[:-1], scale, dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales)  # [E, width, rows]
    assert torch.equal(mxfp4.widened(blocks[0], scales[0]), theirs[0].T)


def test_a_checkpoint_of_mxfp4_says_what_its_numbers_stand_for(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    plain = tiny_checkpoint("gpt_oss", hidden_size=64, intermediate_size=96)
    of_blocks, of_numbers = (Path(shutil.copytree(plain, tmp_path / name)) for name in ("blocks", "numbers"))
    blocks, numbers = {}, {}
    for i, (key, value) in enumerate(load_file(plain / SINGLE_NAME).items()):
        if not key.endswith(("gate_up_proj", "down_proj")):
            blocks[key] = numbers[key] = value
            continue
        blocks[f"{key}_blocks"], blocks[f"{key}_scales"] = packed(value.mT, i)
        numbers[key] = convert_moe_packed_tensors(blocks[f"{key}_blocks"], blocks[f"{key}_scales"]).float().contiguous()
    save_file(blocks, of_blocks / SINGLE_NAME, {"format": "pt"})
    save_file(numbers, of_numbers / SINGLE_NAME, {"format": "pt"})
    reconfigure(of_blocks, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    ids = tokens(9)
    with loaded(of_blocks, three_ways(spec_of(of_blocks))) as model:
        torch.testing.assert_close(logits(model, ids), logits(eager(of_numbers), ids), atol=TOLERANCE, rtol=0)
        assert "quantization_config" not in model.config.to_dict()


def test_rows_that_no_blocks_fill_are_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    plain = tiny_checkpoint("gpt_oss")
    folder = Path(shutil.copytree(plain, tmp_path / "uneven"))
    stored = load_file(plain / SINGLE_NAME)
    key = "model.layers.0.mlp.experts.down_proj"
    blocks, scales = packed(stored.pop(key).mT[..., :32], 0)
    save_file(stored | {f"{key}_blocks": blocks, f"{key}_scales": scales}, folder / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(CheckpointError, match="holds blocks of 32, config.json makes rows of 44"):
        loaded(folder, on_cpu(spec_of(folder))).__enter__()


def test_a_mask_that_is_added_hides_what_one_of_truths_does(tiny_checkpoint: TinyCheckpoint) -> None:
    folder, ids = tiny_checkpoint("gpt_oss"), tokens(20, 2)
    seen = torch.ones(20, 20, dtype=torch.bool).tril().triu(-8)[None, None].expand(2, 1, 20, 20)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with loaded(folder, three_ways(spec_of(folder))) as model, torch.no_grad():
        theirs = eager(folder)(ids, attention_mask=added).logits
        for own in (seen, added):
            torch.testing.assert_close(model(ids, attention_mask=own).logits, theirs, atol=TOLERANCE, rtol=0)


def test_blocks_of_another_size_are_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    plain = tiny_checkpoint("gpt_oss")
    folder = Path(shutil.copytree(plain, tmp_path / "other"))
    stored = load_file(plain / SINGLE_NAME)
    key = "model.layers.1.mlp.experts.down_proj"
    blocks, scales = packed(torch.empty(5, 32, 64), 0)
    stored |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    save_file(stored, folder / SINGLE_NAME, {"format": "pt"})
    assert "quantization_config" not in read_config(folder)
    spec = spec_of(folder)
    with pytest.raises(CheckpointError, match=r"down_proj_blocks.* has shape \(5, 32, 2, 16\)"):
        loaded(folder, on_cpu(spec)).__enter__()


@pytest.mark.slow
def test_plans_of_a_model_with_biases_are_audited_to_the_byte(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint("gpt_oss")
    spec, ids = spec_of(folder), tokens(11)
    expected = logits(eager(folder), ids)

    @settings(max_examples=25, deadline=None)
    @given(plans(spec))
    def agree(plan) -> None:  # type: ignore[no-untyped-def]
        with loaded(folder, plan) as model:
            torch.testing.assert_close(logits(model, ids), expected, atol=TOLERANCE, rtol=0)

    agree()
