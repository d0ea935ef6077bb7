"""A model without its MLPs, filled by our reader, computes what transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from runtime.adapter import Adapter, FfnKind
from runtime.checkpoint import Checkpoint
from runtime.skeleton import LoadReport, build_skeleton, load_rest
from tests.conftest import TinyCheckpoint
from tests.tiny import FAMILIES, eager, tokens

CPU = torch.device("cpu")


class PlainFfn(nn.Module):
    """A dense MLP or experts in a few lines of torch; the weights are set later and are no parameters."""

    def __init__(self, layer: int, kind: FfnKind, original: nn.Module) -> None:
        super().__init__()
        self.layer, self.kind, self.act = layer, kind, original.get_submodule("act_fn")
        self.weights: list[tuple[torch.Tensor, ...]] = []

    def forward(
        self, x: torch.Tensor, index: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        if index is None or scale is None:
            return self._expert(0, x)
        out = torch.zeros_like(x)
        for token in range(x.shape[0]):
            for expert, weight in zip(index[token].tolist(), scale[token], strict=True):
                out[token] += weight * self._expert(expert, x[token])
        return out

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = self.weights[expert]
        hidden: torch.Tensor = self.act(x @ gate.T) * (x @ up.T)
        return hidden @ down.T


def load_plain(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, LoadReport]:
    model = build_skeleton(folder, dtype, PlainFfn)
    with Checkpoint.open(folder) as checkpoint:
        adapter = Adapter.of(checkpoint.config)
        report = load_rest(model, checkpoint, adapter, lambda name: CPU, dtype)
        for module in model.modules():
            if isinstance(module, PlainFfn):
                n_experts = adapter.spec.layers[module.layer].ffn.n_experts
                module.weights = [adapter.read_ffn(checkpoint, module.layer, e) for e in range(n_experts)]
    return model, report


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(
    tiny_checkpoint: TinyCheckpoint, family: str, tied: bool, shards: bool
) -> None:
    folder = tiny_checkpoint(family, tie_word_embeddings=tied, shards=shards)
    model, report = load_plain(folder)
    expected = eager(folder)
    for n_tokens in (1, 37):
        ids = tokens(n_tokens, batch=2)
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, atol=1e-5, rtol=1e-5)
    assert report.unused_keys == ()
