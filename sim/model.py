"""ModelSpec: a transformer's sizes layer by layer, from a Hugging Face config dict.

No weights, no torch: only what decides bytes and FLOPs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hwmodels import work
from hwmodels.errors import ModelError
from hwmodels.schema import digest, read_json
from hwmodels.work import DTYPE_BYTES, Work
from sim.config import Config
from sim.families import head_params, layers_of
from sim.layers import LayerSpec
from sim.mixers import FLOAT32_BYTES


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer."""

    name: str
    family: str
    d_model: int
    vocab: int
    layers: tuple[LayerSpec, ...]
    tied_embeddings: bool
    dtype: str
    max_positions: int
    head_params: int

    @cached_property
    def id(self) -> str:
        """Twelve hex digits of the sizes (not of the name)."""
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        # Without such numbers an id is that of releases which did not know them: their plans and profiles hold.
        for layer in layers:
            for owner, key in ((layer, "float32_params"), (layer["ffn"], "column_biases")):
                if not owner[key]:
                    del owner[key]
        return digest([self.family, self.d_model, self.vocab, layers, self.dtype, self.tied_embeddings])

    @property
    def dtype_bytes(self) -> int:
        """Bytes per weight."""
        return DTYPE_BYTES[self.dtype]

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def is_moe(self) -> bool:
        """Whether any layer routes tokens to experts."""
        return any(layer.ffn.is_moe for layer in self.layers)

    def column_elements(self, layer: int) -> int:
        """Weights and biases of one intermediate column of one expert of a layer."""
        ffn = self.layers[layer].ffn
        return ffn.n_matrices * (ffn.width or self.d_model) + ffn.column_biases

    def column_bytes(self, layer: int) -> int:
        """Their bytes."""
        return self.column_elements(layer) * self.dtype_bytes

    def ffn_bytes(self, layer: int) -> int:
        """Weight bytes of all experts of a layer: what a plan may place."""
        ffn = self.layers[layer].ffn
        return ffn.n_experts * ffn.columns * self.column_bytes(layer)

    def rest_bytes(self, layer: int) -> int:
        """Bytes of a layer that are not its experts: attention, norms, router, shared experts, corrections."""
        spec = self.layers[layer]
        weights = (spec.attention.n_params + spec.other_params) * self.dtype_bytes
        return weights + spec.float32_params * FLOAT32_BYTES

    def kv_bytes(self, layer: int, n_tokens: int) -> int:
        """Bytes that a sequence of `n_tokens` tokens keeps in a layer: KV cache, index, recurrent state."""
        attention = self.layers[layer].attention
        return attention.cached_elements(n_tokens) * self.dtype_bytes + attention.state_bytes

    @property
    def embed_bytes(self) -> int:
        """Bytes of the token embedding."""
        return self.vocab * self.d_model * self.dtype_bytes

    @property
    def head_bytes(self) -> int:
        """Bytes read by the output projection and final norm."""
        return self.head_params * self.dtype_bytes

    @property
    def n_params(self) -> int:
        """All parameters, a tied embedding counted once."""
        layers = sum(
            la.attention.n_params + la.other_params + la.ffn.n_experts * la.ffn.columns * self.column_elements(i)
            for i, la in enumerate(self.layers)
        )
        head = self.head_params - (self.vocab * self.d_model if self.tied_embeddings else 0)
        return layers + self.vocab * self.d_model + head

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return self.n_params * self.dtype_bytes

    # -- work -----------------------------------------------------------------------------------------

    def ffn_work(self, layer: int, n_tokens: int, columns: int) -> Work:
        """Work of `columns` of one expert for `n_tokens` tokens."""
        ffn = self.layers[layer].ffn
        return work.ffn(n_tokens, ffn.width or self.d_model, columns, self.dtype, ffn.n_matrices)

    def attention_work(self, layer: int, n_tokens: int, kv_tokens: int, batch: int = 1) -> Work:
        """Work of everything in a layer but its experts, for `n_tokens` rows that see `kv_tokens` each.

        n_tokens counts rows over the whole batch; kv_tokens is the depth per sequence after this step.
        FLOPs: two per weight and row, and what AttentionSpec.mixing_flops counts. io_bytes is read of what the
        cache held before the step: zero for a fresh prompt without recurrent state.
        """
        spec = self.layers[layer]
        attention = spec.attention
        n_new = n_tokens // batch
        n_past = kv_tokens - n_new
        weights = attention.n_params + spec.other_params
        flops = 2.0 * n_tokens * weights
        flops += attention.mixing_flops(n_tokens, kv_tokens - (n_new - 1) / 2, batch * n_past)
        read = attention.read_elements(n_past, n_new) * self.dtype_bytes + attention.state_bytes
        return Work("attn", self.dtype, n_tokens, flops, float(weights * self.dtype_bytes), float(batch * read))

    def head_work(self, n_rows: int, n_tokens: int = 0) -> Work:
        """Work of final norm and output projection for the rows that need logits, of n_tokens where these are more.

        io_bytes are those of the rows that are normed only.
        """
        flops, weights = 2.0 * n_rows * self.head_params, float(self.head_bytes)
        if n_tokens <= n_rows:
            return Work("head", self.dtype, n_rows, flops, weights)
        normed = (n_tokens - n_rows) * self.d_model * self.dtype_bytes
        return Work("head_prompt", self.dtype, n_tokens, flops, weights, float(normed))

    def small_work(self, op: work.Op, n_tokens: int) -> Work:
        """Work of an operation over activations only (embed, join, sample)."""
        return Work(op, self.dtype, n_tokens, 0.0, 0.0, float(n_tokens * self.d_model * self.dtype_bytes))


# -- from Hugging Face configs ------------------------------------------------------------------------


def from_config(config: Mapping[str, Any], name: str = "model", dtype: str = "auto") -> ModelSpec:
    """ModelSpec of a Hugging Face config.json as a dict.

    Raises ModelError for a family that is not supported or a size that is missing.
    """
    values = Config.of(config, name)
    return ModelSpec(
        name=name,
        family=values.family,
        d_model=values.need("hidden_size"),
        vocab=values.need("vocab_size"),
        layers=layers_of(values),
        tied_embeddings=values.flag("tie_word_embeddings"),
        dtype=_dtype(values.values, dtype, name),
        max_positions=values.need("max_position_embeddings"),
        head_params=head_params(values),
    )


def _dtype(config: Mapping[str, Any], dtype: str, where: str) -> str:
    name = (config.get("dtype") or config.get("torch_dtype")) if dtype == "auto" else dtype
    name = str(name or "float32").removeprefix("torch.")
    name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(name, name)
    if name not in DTYPE_BYTES:
        raise ModelError(f"{where}: dtype {name!r} is not supported; choose {', '.join(DTYPE_BYTES)}")
    return name


def load_model(path: str | Path, dtype: str = "auto") -> ModelSpec:
    """ModelSpec of a checkpoint folder or a config.json file."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{path}: no config.json here; expected a Hugging Face checkpoint folder or a config.json")
    name = path.name if path.is_dir() else path.parent.name
    return from_config(read_json(file, "model config"), name or "model", dtype)
