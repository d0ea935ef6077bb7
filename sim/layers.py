"""One decoder layer as numbers: what its token mixer and its MLP weigh, cache and compute.

Mixers differ in kind (grouped or latent attention, sliding, sparse, linear); here each is a few generic numbers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sparse:
    """Cache entries that a row chooses from: one for every `stride` tokens.

    top_k           entries that a row attends to; None: all
    index_elements  elements of the index per entry; a step reads those of all entries
    index_flops     FLOPs of scoring one entry for one row
    """

    stride: int = 1
    top_k: int | None = None
    index_elements: int = 0
    index_flops: int = 0


@dataclass(frozen=True)
class AttentionSpec:
    """What mixes tokens in a layer: attention of any kind, or a recurrence.

    n_params               its weights, read once per step
    kv_elements_per_token  what one cached token (or entry of `sparse`) holds; with latent attention the latent and
                           the rotary part
    pair_flops             FLOPs of one row attending to one cached token
    window                 the last tokens, which alone stay visible and cached; None: all. Beside `sparse`: the last
                           tokens, seen in full; None there: none
    absorbed_pair_flops    latent attention over the latent itself; None elsewhere
    expand_flops           or, to use pair_flops, making keys and values of one token of the cache
    state_bytes            recurrent state of a sequence, whatever its length; float32
    row_flops              FLOPs per row beyond two per weight: the recurrence, one token after the other
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_params: int
    kv_elements_per_token: int
    pair_flops: int
    window: int | None = None
    absorbed_pair_flops: int | None = None
    expand_flops: int = 0
    sparse: Sparse | None = None
    state_bytes: int = 0
    row_flops: int = 0

    def cached_elements(self, n_tokens: int) -> int:
        """Elements that the cache of n_tokens tokens holds."""
        near, far = self._entries(n_tokens)
        index = self.sparse.index_elements if self.sparse is not None else 0
        return int(near) * self.kv_elements_per_token + int(far) * (self.kv_elements_per_token + index)

    def read_elements(self, n_tokens: int, n_rows: int) -> int:
        """Elements of the cache of n_tokens tokens that a step of n_rows rows reads; rows choose differently."""
        near, far = self._entries(n_tokens)
        if self.sparse is None:
            return int(near) * self.kv_elements_per_token
        chosen = far if self.sparse.top_k is None else min(far, self.sparse.top_k * n_rows)
        return int(near + chosen) * self.kv_elements_per_token + int(far) * self.sparse.index_elements

    def mixing_flops(self, n_rows: int, n_visible: float, n_cached: int) -> float:
        """FLOPs of n_rows rows that have n_visible tokens before and at them on average, n_cached of these cached.

        Latent attention takes the cheaper of its two forms: absorbed (over the latent, for few rows), or plain
        (keys and values made of the whole cache first, for many).
        """
        near, far = self._entries(n_visible)
        chosen = far if self.sparse is None or self.sparse.top_k is None else min(far, self.sparse.top_k)
        pairs, index = n_rows * (near + chosen), self.sparse.index_flops * far if self.sparse is not None else 0
        plain = pairs * self.pair_flops + n_cached * self.expand_flops
        if self.absorbed_pair_flops is not None:
            plain = min(plain, pairs * self.absorbed_pair_flops)
        return plain + n_rows * (self.row_flops + index)

    def _entries(self, n_tokens: float) -> tuple[float, float]:
        """Tokens seen in full, and entries to choose from, among n_tokens tokens."""
        if self.sparse is None:
            return (n_tokens if self.window is None else min(n_tokens, self.window)), 0
        return min(n_tokens, self.window or 0), n_tokens // self.sparse.stride


@dataclass(frozen=True)
class FfnSpec:
    """The MLP of a layer: `n_experts` parallel MLPs of `columns` intermediate columns each.

    A dense MLP is one expert that every token uses. Shared experts and a dense MLP beside the routed ones
    (`shared_columns`) run for every token and stay with the attention part of the layer: they are neither cut
    nor routed. n_matrices is 3, or 2 without a gate; width is that of the experts' input where it is not the
    model's; column_biases are numbers that belong to a column beside its weights, and move with them.
    """

    n_experts: int
    top_k: int
    columns: int
    n_matrices: int = 3
    shared_columns: int = 0
    width: int | None = None
    column_biases: int = 0

    @property
    def is_moe(self) -> bool:
        """Whether a router chooses among experts."""
        return self.n_experts > 1


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer.

    other_params    norms, router, shared experts, and biases of experts
    float32_params  numbers that stay float32 whatever the weights' type, not counted as parameters: corrections of
                    a router's scores
    """

    attention: AttentionSpec
    ffn: FfnSpec
    other_params: int
    float32_params: int = 0
