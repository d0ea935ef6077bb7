"""Names of the families: which tensors are MLP weights, what checkpoints call the others, what is replaced.

                    module           checkpoint (per expert, [out, in])          remarks
llama mistral       layer.mlp        mlp.{gate,up,down}_proj                     -
qwen2 qwen3
mixtral             layer.mlp        block_sparse_moe.experts.E.{w1,w3,w2}       w1 gate, w3 up, w2 down
phimoe              layer.mlp        as mixtral                                  module `router` is stored as `gate`
qwen2_moe qwen3_moe layer.mlp        mlp.experts.E.{gate,up,down}_proj           some layers dense; qwen2_moe shares one
olmoe               layer.mlp        as qwen3_moe                                every layer has experts
deepseek_v2         layer.mlp        as qwen3_moe                                first layers dense, shared experts
deepseek_v3         layer.mlp        as qwen3_moe                                and corrections of the router's scores
gpt_oss             layer.mlp        mlp.experts.gate_up_proj [E, D, 2F]         gate and up in turns; biases; or MXFP4

Any of the MoE families may also be stored as transformers 5 keeps them in memory: all experts of a layer
in `mlp.experts.gate_up_proj` [E, 2F, D] (gate rows first) and `mlp.experts.down_proj` [E, D, F].
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN

from hwmodels.errors import CheckpointError, ModelError
from runtime import mxfp4
from runtime.activation import Activation, ClampedGlu
from runtime.checkpoint import Checkpoint
from sim.model import ModelSpec, from_config

FfnKind = Literal["dense", "experts"]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_MIXTRAL_LIKE = ("mixtral", "phimoe")
_DENSE = ("llama", "mistral", "qwen2", "qwen3")
RUNNABLE = (*_DENSE, *_MIXTRAL_LIKE, "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss")


class FfnKeys(NamedTuple):
    """Checkpoint keys of one dense MLP or one expert."""

    gate: str
    up: str
    down: str


class FfnWeights(NamedTuple):
    """Weights of one dense MLP or one expert, F = intermediate columns, D = model width; gate's biases, then up's."""

    gate_FD: torch.Tensor
    up_FD: torch.Tensor
    down_DF: torch.Tensor
    bias_2F: torch.Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """What a family calls its tensors. Made from a spec, because some families mix dense and MoE layers."""

    spec: ModelSpec

    @staticmethod
    def of(config: Mapping[str, Any], name: str = "model") -> Adapter:
        """Adapter for a config.json; ModelError if the family is unsupported or the weights are quantised."""
        how = config.get("quantization_config")
        method = how.get("quant_method", "an unnamed method") if isinstance(how, Mapping) else how
        own = config.get("model_type") == "gpt_oss" and method == "mxfp4"  # which is read without loss
        if how and not own:
            raise ModelError(f"{name}: the weights are quantised ({method}); use the checkpoint they were made from")
        spec = from_config(config, name)
        if spec.family not in RUNNABLE:
            raise ModelError(
                f"{name}: models of family {spec.family} can be planned and simulated, not run; "
                f"families that run: {', '.join(RUNNABLE)}"
            )
        return Adapter(spec)

    # -- MLP weights ----------------------------------------------------------------------------------

    def kind(self, layer: int) -> FfnKind:
        """Whether a layer has one MLP or routed experts."""
        return "experts" if self.spec.layers[layer].ffn.is_moe else "dense"

    def ffn_tensors(self, layer: int, expert: int) -> FfnKeys:
        """Keys of an expert where each expert is stored apart; a dense MLP is expert 0."""
        if self.kind(layer) == "dense":
            prefix, names = f"model.layers.{layer}.mlp", ("gate_proj", "up_proj", "down_proj")
        elif self.spec.family in _MIXTRAL_LIKE:
            prefix, names = f"model.layers.{layer}.block_sparse_moe.experts.{expert}", ("w1", "w3", "w2")
        else:
            prefix, names = f"model.layers.{layer}.mlp.experts.{expert}", ("gate_proj", "up_proj", "down_proj")
        return FfnKeys(*(f"{prefix}.{name}.weight" for name in names))

    def fused_tensors(self, layer: int) -> tuple[str, str]:
        """Keys of a layer's experts where all are stored together: gate and up, down."""
        prefix = f"model.layers.{layer}.mlp.experts"
        return f"{prefix}.gate_up_proj", f"{prefix}.down_proj"

    def read_ffn(self, checkpoint: Checkpoint, layer: int, expert: int) -> FfnWeights:
        """Weights of one expert as views of the mapped file, in the stored dtype.

        Raises CheckpointError if a tensor is missing or its shape is not the config's.
        """
        gate_up, down = self.fused_tensors(layer)
        if self.spec.family == "gpt_oss":
            return self._read_turned(checkpoint, gate_up, down, layer, expert)
        if self.kind(layer) == "experts" and gate_up in checkpoint:
            return self._read_fused(checkpoint, gate_up, down, layer, expert)
        keys = self.ffn_tensors(layer, expert)
        rows, width = self.spec.layers[layer].ffn.columns, self.spec.d_model
        shapes = ((rows, width), (rows, width), (width, rows))
        return FfnWeights(*(checkpoint.tensor_of(k, s) for k, s in zip(keys, shapes, strict=True)))

    def _read_fused(self, checkpoint: Checkpoint, gate_up: str, down: str, layer: int, expert: int) -> FfnWeights:
        ffn, width = self.spec.layers[layer].ffn, self.spec.d_model
        both = checkpoint.tensor_of(gate_up, (ffn.n_experts, 2 * ffn.columns, width))[expert]
        return FfnWeights(
            both[: ffn.columns],
            both[ffn.columns :],
            checkpoint.tensor_of(down, (ffn.n_experts, width, ffn.columns))[expert],
        )

    def _read_turned(self, checkpoint: Checkpoint, gate_up: str, down: str, layer: int, expert: int) -> FfnWeights:
        """Of experts stored together, the input's width first, or in blocks of MXFP4; gate and up take turns."""
        ffn, width = self.spec.layers[layer].ffn, self.spec.d_model
        n, columns = ffn.n_experts, ffn.columns
        bias = checkpoint.tensor_of(f"{gate_up}_bias", (n, 2 * columns))[expert]
        both = _turned(checkpoint, gate_up, expert, (n, 2 * columns, width))
        down_DF = _turned(checkpoint, down, expert, (n, width, columns))
        return FfnWeights(both[::2], both[1::2], down_DF, torch.cat([bias[::2], bias[1::2]]))

    @cached_property
    def ffn_keys(self) -> frozenset[str]:
        """Every key that may hold weights of a replaced MLP, in either storage."""
        keys: set[str] = set()
        for i, layer in enumerate(self.spec.layers):
            for expert in range(layer.ffn.n_experts):
                keys.update(self.ffn_tensors(i, expert))
            if layer.ffn.is_moe:
                gate_up, down = self.fused_tensors(i)
                keys.update((gate_up, down))
                if self.spec.family == "gpt_oss":
                    keys.update((f"{gate_up}_bias", *(f"{name}_{part}" for name in (gate_up, down) for part in _MXFP4)))
        return frozenset(keys)

    # -- everything else ------------------------------------------------------------------------------

    def checkpoint_keys(self, parameter: str) -> tuple[str, ...]:
        """What a checkpoint may call a parameter of the model, the usual name first."""
        names = [parameter]
        if self.spec.family in _MIXTRAL_LIKE:
            stored = parameter.replace(".mlp.", ".block_sparse_moe.", 1)
            names = [stored.replace(".router.weight", ".gate.weight"), *names]
        if self.spec.tied_embeddings and parameter == EMBEDDING:
            names.append(HEAD)
        return tuple(dict.fromkeys(names))

    def checkpoint_key(self, parameter: str, available: Container[str]) -> str:
        """The key that holds a parameter; CheckpointError if none of its names is there."""
        names = self.checkpoint_keys(parameter)
        for name in names:
            if name in available:
                return name
        raise CheckpointError(
            f"no tensor for {parameter!r}: looked for {' and '.join(map(repr, names))}; "
            f"is this a {self.spec.family} checkpoint with all its files?"
        )

    def is_ignorable(self, key: str) -> bool:
        """Whether a key is known not to be loaded: MLP weights, rotary tables, the second of a tied pair."""
        tied_twin = self.spec.tied_embeddings and key == HEAD
        return key in self.ffn_keys or key.endswith(".rotary_emb.inv_freq") or tied_twin

    # -- modules --------------------------------------------------------------------------------------

    def ffn_owner(self, layer_module: nn.Module, layer: int) -> tuple[nn.Module, str]:
        """The module and the attribute that holds what is replaced: `layer.mlp` or `layer.mlp.experts`."""
        if self.kind(layer) == "dense":
            return layer_module, "mlp"
        return layer_module.get_submodule("mlp"), "experts"


_MXFP4 = ("blocks", "scales")


def _turned(checkpoint: Checkpoint, key: str, expert: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """An expert's matrix [rows, width] of those stored together as [experts, width, rows], or in blocks; a copy."""
    n, rows, width = shape
    blocks, scales = (f"{key}_{part}" for part in _MXFP4)
    if blocks not in checkpoint:
        return checkpoint.tensor_of(key, (n, width, rows))[expert].t().contiguous()
    stored = checkpoint.tensor_of(blocks, (n, *mxfp4.blocks_shape(rows, width)))
    if width % mxfp4.BLOCK:
        raise CheckpointError(f"{blocks!r} holds blocks of {mxfp4.BLOCK}, config.json makes rows of {width}")
    return mxfp4.widened(stored[expert], checkpoint.tensor_of(scales, tuple(stored.shape[:3]))[expert])


def activation_of(config: Mapping[str, Any]) -> Activation:
    """What a config says that MLPs make of gate and up."""
    if config.get("model_type") == "gpt_oss":  # published before configs had these
        return ClampedGlu(
            **{name: config[f"swiglu_{name}"] for name in ("alpha", "limit") if f"swiglu_{name}" in config}
        )
    act: Activation = ACT2FN[str(config.get("hidden_act", "silu"))]
    return act
