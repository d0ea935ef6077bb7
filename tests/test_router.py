"""Routers of the native kernel choose the experts that transformers' own modules choose, with their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GptOssConfig, PreTrainedConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from hwmodels.errors import KernelError
from runtime import native
from runtime.native.layer import LayerWords
from runtime.reader import Reader, UnfitError
from runtime.router import read_router
from tests.tiny import tiny_config

INSTALLED = native.installed()
pytestmark = pytest.mark.skipif(isinstance(INSTALLED, KernelError), reason=f"no native kernel: {INSTALLED}")
N_EXPERTS, WIDTH = 12, 72
GROUPS: dict[str, Any] = {"n_routed_experts": N_EXPERTS, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}


def deepseek(family: str, **changes: Any) -> PreTrainedConfig:
    return tiny_config(family, hidden_size=WIDTH, routed_scaling_factor=1.7, **{**GROUPS, **changes})


def mixture(family: str, n_experts: str, top_k: int, **changes: Any) -> PreTrainedConfig:
    sizes = {n_experts: N_EXPERTS, "num_experts_per_tok": top_k}
    return tiny_config(family, **{"hidden_size": WIDTH, **sizes, **changes})


OSS = GptOssConfig(hidden_size=WIDTH, num_local_experts=N_EXPERTS, num_experts_per_tok=4)
ROUTERS: dict[str, tuple[type[torch.nn.Module], PreTrainedConfig]] = {
    "Mixtral": (MixtralTopKRouter, mixture("mixtral", "num_local_experts", 2)),
    "Qwen3-MoE": (Qwen3MoeTopKRouter, mixture("qwen3_moe", "num_experts", 4)),
    "OLMoE": (OlmoeTopKRouter, mixture("olmoe", "num_experts", 5)),
    "PhiMoE": (PhimoeTopKRouter, mixture("phimoe", "num_local_experts", 2)),
    "PhiMoE that reaches far": (PhimoeTopKRouter, mixture("phimoe", "num_local_experts", 2, router_jitter_noise=0.2)),
    "DeepSeek-V2": (DeepseekV2TopkRouter, deepseek("deepseek_v2", topk_method="group_limited_greedy")),
    "DeepSeek-V2, greedy": (DeepseekV2TopkRouter, deepseek("deepseek_v2", topk_method="greedy")),
    "DeepSeek-V3": (DeepseekV3TopkRouter, deepseek("deepseek_v3", norm_topk_prob=True)),
    "DeepSeek-V3, not normalised": (DeepseekV3TopkRouter, deepseek("deepseek_v3", norm_topk_prob=False)),
    "gpt-oss": (GptOssTopKRouter, OSS),
}
WIDE = ("DeepSeek-V2", "DeepSeek-V3")
isas = st.sampled_from([0] if isinstance(INSTALLED, KernelError) else range(len(INSTALLED.isas)))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def made(name: str, dtype: torch.dtype, draw: torch.Generator, width: int = WIDTH) -> Any:
    """A router whose logits are its rows where it is as wide as it has experts, else random."""
    kind, config = ROUTERS[name]
    router: Any = kind(config).to(dtype).train(False)
    own = torch.eye(N_EXPERTS) if width == N_EXPERTS else torch.randn(N_EXPERTS, width, generator=draw)
    router.weight.data = own.to(dtype)
    router.hidden_dim = width
    if "bias" in router._parameters and router.bias is not None:
        router.bias.data = torch.randn(N_EXPERTS, generator=draw).to(dtype)
    if "e_score_correction_bias" in router._buffers:
        router.e_score_correction_bias = torch.randn(N_EXPERTS, generator=draw) / 4
    return router


def words_of(router: Any, dtype: torch.dtype, isa: int) -> LayerWords:
    code = native.dtype_code(dtype)
    assert code is not None
    words = LayerWords(dtype=code, isa=native.ISAS.index(INSTALLED.isas[isa]), width=router.weight.shape[1])
    read_router(words, Reader(dtype), router)
    return words


@torch.no_grad()
def both(router: Any, x: Tensor, isa: int) -> tuple[Tensor, Tensor]:
    """Weights of all experts [S, E], 0 for those not chosen: the kernel's, transformers'."""
    assert isinstance(INSTALLED, native.Kernel)
    _, weights, chosen = router(x.clone())
    found = INSTALLED.route(words_of(router, x.dtype, isa), x)
    ours, theirs = (torch.zeros(x.shape[0], N_EXPERTS) for _ in range(2))
    return ours.scatter(1, *found), theirs.scatter(1, chosen, weights.float())


@pytest.mark.parametrize("name", ROUTERS)
def test_of_any_logits_a_router_makes_what_transformers_does(name: str) -> None:
    @settings(max_examples=60)
    @given(dtypes, isas, st.integers(1, 20), st.sampled_from([0.05, 1.0, 6.0]), st.integers(0, 10**6))
    def check(dtype: torch.dtype, isa: int, n_rows: int, scale: float, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        # No two logits of a row are equal, but all may be close.
        steps = torch.rand(n_rows, N_EXPERTS, generator=draw).argsort(dim=1) - N_EXPERTS / 2
        away = torch.randn(n_rows, 1, generator=draw) if scale > 1 else torch.zeros(n_rows, 1)
        x = (scale / 6 * (steps + away + torch.rand(n_rows, N_EXPERTS, generator=draw) / 2)).to(dtype)
        ours, theirs = both(made(name, dtype, draw, N_EXPERTS), x, isa)
        off = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
        off = 2e-6 if name.startswith(WIDE) or name == "Mixtral" else off  # their weights stay float32
        torch.testing.assert_close(ours, theirs, atol=off, rtol=off)
        assert ours.gt(0).sum(dim=1).eq(theirs.gt(0).sum(dim=1)).all()

    check()


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("n_rows", [1, 8, 9, 100, 300])
def test_of_any_rows_a_router_makes_what_transformers_does(name: str, n_rows: int) -> None:
    # DeepSeek's logits are float32 sums of what rows and weights are, in any dtype.
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if name.startswith(WIDE) else (torch.float32,):
        for isa in range(len(INSTALLED.isas)):  # type: ignore[union-attr]
            draw = torch.Generator().manual_seed(n_rows)
            router = made(name, dtype, draw)
            x = (torch.randn(n_rows, WIDTH, generator=draw) / 4).to(dtype)
            ours, theirs = both(router, x, isa)
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.0, torch.nan])
def test_of_equally_good_experts_and_of_no_numbers_those_that_come_first_are_chosen(name: str, value: float) -> None:
    assert isinstance(INSTALLED, native.Kernel)
    router = made(name, torch.float32, torch.Generator(), N_EXPERTS)
    if router._parameters.get("bias") is not None:
        router.bias.data.zero_()
    if "e_score_correction_bias" in router._buffers:
        router.e_score_correction_bias.zero_()
    chosen, weights = INSTALLED.route(words_of(router, torch.float32, 0), torch.full((3, N_EXPERTS), value))
    assert chosen.tolist() == [list(range(router.top_k))] * 3
    assert weights.isnan().all() == (value != value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparsemixer_leaves_out_what_is_just_out_of_reach_in_its_own_dtype(dtype: torch.dtype) -> None:
    # Logits around 4 of which some are 2 % less, which bfloat16 tells only in steps of 0.4 %.
    draw = torch.Generator().manual_seed(0)
    router = made("PhiMoE", dtype, draw, N_EXPERTS)
    x = 4 - torch.randint(0, 12, (4000, N_EXPERTS), generator=draw) / 64
    for sign in (1, -1):  # equal ones among them: both choose the first
        ours, theirs = both(router, (sign * x).to(dtype), 0)
        torch.testing.assert_close(ours, theirs, atol=1e-6 if dtype == torch.float32 else 4e-3, rtol=0)


def test_scores_that_are_almost_nothing_are_not_divided_by_nothing() -> None:
    ours, theirs = both(made("DeepSeek-V3", torch.float32, torch.Generator(), N_EXPERTS), torch.full((1, 12), -50.0), 0)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-5)
    assert 0 < ours.sum() < 1.7


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        ("PhiMoE", "top_k", 3),
        ("PhiMoE", "training", True),
        ("OLMoE", "top_k", N_EXPERTS + 1),
        ("DeepSeek-V2", "topk_method", "noaux_tc"),
        ("DeepSeek-V2", "num_group", 5),
        ("DeepSeek-V3", "topk_group", 0),
        ("DeepSeek-V3", "top_k", 7),
    ],
)
def test_a_router_that_the_kernel_does_not_know_is_left_alone(name: str, attribute: str, value: object) -> None:
    router = made(name, torch.float32, torch.Generator())
    setattr(router, attribute, value)
    with pytest.raises(UnfitError):
        words_of(router, torch.float32, 0)
