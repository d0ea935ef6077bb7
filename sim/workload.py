"""Workload: how many tokens come in and go out, and where a router sends them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hwmodels.errors import FormatError
from sim.model import ModelSpec

Routing = tuple[int, ...]
"""Tokens sent to each expert of one layer in one step; a dense layer is one expert with all tokens."""

_CACHED = "cached"
_MOST_DRAWN = 8192  # tokens of a step that are drawn: a longer prompt takes experts in the proportions of these
_KEYS_AT_ONCE = 1 << 22  # bounds the memory of sampling a long prompt


@dataclass(frozen=True)
class Workload:
    """One generation: prompt, generated tokens, sequences at once, tokens already in the cache.

    skew is the Zipf exponent of expert popularity that routing is sampled with (0 is uniform): one for all
    layers, or several that layers take in turn.
    """

    n_prompt: int
    n_gen: int
    batch: int = 1
    n_depth: int = 0
    seed: int = 0
    skew: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        for name, least in (("n_prompt", 1), ("n_gen", 1), ("batch", 1), ("n_depth", 0)):
            if getattr(self, name) < least:
                raise FormatError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if not self.skews or not all(0.0 <= skew < 10.0 for skew in self.skews):
            raise FormatError(f"skew is {self.skew}; expected a Zipf exponent from 0 to 10, or several for the layers")

    @property
    def skews(self) -> tuple[float, ...]:
        """Zipf exponents that layers take in turn."""
        return self.skew if isinstance(self.skew, tuple) else (self.skew,)

    def skew_of(self, layer: int) -> float:
        """Zipf exponent of a layer's expert popularity."""
        return self.skews[layer % len(self.skews)]

    @property
    def n_ctx(self) -> int:
        """Tokens per sequence that the KV cache must hold."""
        return self.n_depth + self.n_prompt + self.n_gen

    def steps(self, chunk_tokens: int | None = None) -> tuple[Step, ...]:
        """The prompt, then one decode step for every generated token but the first.

        The prompt is one step, or one for every chunk_tokens tokens of each sequence: prefill, prefill1, ...
        """
        first = self.n_depth + self.n_prompt
        decode = (Step(f"decode{i}", self.batch, first + i, self.batch) for i in range(1, self.n_gen))
        return (*self.prompt_steps(chunk_tokens), *decode)

    def prompt_steps(self, chunk_tokens: int | None = None) -> tuple[Step, ...]:
        """The steps that feed the prompt, each as deep as the ones before it left the cache."""
        size = chunk_tokens or self.n_prompt
        ends = (*range(size, self.n_prompt, size), self.n_prompt)
        return tuple(
            Step(f"prefill{i or ''}", (end - i * size) * self.batch, self.n_depth + end, self.batch)
            for i, end in enumerate(ends)
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: n_tokens rows in all, kv_tokens of depth per sequence after it."""

    name: str
    n_tokens: int
    kv_tokens: int
    batch: int = 1


RoutingOf = Callable[[Step, int], Routing]
"""Where a layer's tokens go in a step."""


def check_context(spec: ModelSpec, workload: Workload) -> None:
    """FormatError if a sequence of the workload outgrows the positions that the model knows."""
    if workload.n_ctx > spec.max_positions:
        raise FormatError(
            f"{workload.n_depth} tokens of depth, {workload.n_prompt} of prompt and {workload.n_gen} to generate pass "
            f"the {spec.max_positions} positions of {spec.name}; shorten one of them"
        )


@dataclass(frozen=True)
class RoutingTrace:
    """Tokens per expert, by step name and layer: recorded from a run, or sampled.

    cached are the (layer, expert) that an expert cache held when the run began, the first to leave first;
    None where nothing is known of one.
    """

    counts: dict[tuple[str, int], Routing]
    cached: tuple[tuple[int, int], ...] | None = None

    def at(self, step: str, layer: int) -> Routing | None:
        """Routing of one layer in one step, None if it was not recorded."""
        return self.counts.get((step, layer))

    def save(self, path: str | Path) -> None:
        """Write as Parquet, a row as in `rows`."""
        pd.DataFrame(self.rows(), columns=["step", "layer", "expert", "n_tokens"]).to_parquet(path, index=False)

    def rows(self) -> list[tuple[str, int, int, int]]:
        """Step, layer, expert, n_tokens; of the step "cached" the last one is a place in the expert cache."""
        rows = [(s, la, e, n) for (s, la), counts in self.counts.items() for e, n in enumerate(counts)]
        return rows + [(_CACHED, la, e, n) for n, (la, e) in enumerate(self.cached or ())]

    @staticmethod
    def load(path: str | Path) -> RoutingTrace:
        """Read what `save` wrote; FormatError if it is something else."""
        try:
            frame = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise FormatError(f"cannot read routing trace {str(path)!r}: {error}") from error
        missing = {"step", "layer", "expert", "n_tokens"} - set(frame.columns)
        if missing:
            raise FormatError(f"{path}: no column {sorted(missing)[0]!r}; expected a routing trace")
        try:
            frame = frame.astype({"step": str, "layer": int, "expert": int, "n_tokens": int})
        except (TypeError, ValueError) as error:
            raise FormatError(f"{path}: layer, expert and n_tokens are not all whole numbers: {error}") from error
        return RoutingTrace.of(frame, str(path))

    @staticmethod
    def of(frame: pd.DataFrame, where: str) -> RoutingTrace:
        """The trace of a table with the columns of `rows`; where names it for messages."""
        counts: dict[tuple[str, int], list[int]] = {}
        held = frame[frame["step"] == _CACHED].sort_values("n_tokens")
        frame = frame[frame["step"] != _CACHED]
        columns = (frame[name].tolist() for name in ("step", "layer", "expert", "n_tokens"))
        for step, layer, expert, n_tokens in sorted(zip(*columns, strict=True)):
            row = counts.setdefault((step, layer), [])
            if expert != len(row) or n_tokens < 0:
                raise FormatError(
                    f"{where}: step {step}, layer {layer}: found {n_tokens} tokens for expert {expert} after "
                    f"{len(row)} experts; expected every expert once, with no less than zero tokens"
                )
            row.append(n_tokens)
        cached = tuple(zip(held["layer"].tolist(), held["expert"].tolist(), strict=True))
        return RoutingTrace({key: tuple(row) for key, row in counts.items()}, cached or None)


@lru_cache(maxsize=1024)
def popularity(n_experts: int, skew: float, seed: int, layer: int) -> tuple[float, ...]:
    """Share of tokens that each expert of a layer attracts: Zipf weights in a seeded order per layer."""
    weights = [1.0 / (rank + 1) ** skew for rank in range(n_experts)]
    random.Random(f"{seed}/{layer}").shuffle(weights)
    total = sum(weights)
    return tuple(w / total for w in weights)


def sample_routing(spec: ModelSpec, layer: int, step: Step, workload: Workload) -> Routing:
    """Tokens per expert: each token draws top_k different experts by popularity; seeded, repeatable."""
    ffn = spec.layers[layer].ffn
    if not ffn.is_moe:
        return (step.n_tokens,)
    return _sample_step(ffn.n_experts, ffn.top_k, spec.n_layers, step, workload.seed, workload.skews)[layer]


@lru_cache(maxsize=256)
def _sample_step(
    n_experts: int, top_k: int, n_layers: int, step: Step, seed: int, skews: tuple[float, ...]
) -> tuple[Routing, ...]:
    # All layers at once: setting up a generator costs more than a decode step's draws.
    popular = [popularity(n_experts, skews[layer % len(skews)], seed, layer) for layer in range(n_layers)]
    shares = np.array(popular, dtype=np.float32)
    draw = np.random.default_rng(int.from_bytes(sha256(f"{seed}/{step.name}".encode()).digest()[:8]))
    n_drawn = min(step.n_tokens, _MOST_DRAWN)
    n_rows = n_layers * n_drawn
    block = max(1, _KEYS_AT_ONCE // n_experts)
    counts = np.zeros(n_layers * n_experts, dtype=np.int64)
    for first in range(0, n_rows, block):
        layer = np.arange(first, min(first + block, n_rows)) // n_drawn
        # Efraimidis-Spirakis: the k smallest Exp(1) / w are a weighted sample without replacement.
        keys = draw.standard_exponential((len(layer), n_experts), dtype=np.float32) / shares[layer]
        chosen = np.argpartition(keys, top_k - 1, axis=1)[:, :top_k]
        counts += np.bincount((layer[:, None] * n_experts + chosen).ravel(), minlength=len(counts))
    drawn = counts.reshape(n_layers, n_experts)
    return tuple(tuple(row) for row in _scaled(drawn, n_drawn, step.n_tokens).tolist())


def _scaled(counts: NDArray[np.int64], n_drawn: int, n_tokens: int) -> NDArray[np.int64]:
    """Counts of n_drawn tokens as those of n_tokens; rows keep their sums in proportion, no expert gets more than all.

    Exact where all were drawn. Sums are kept by rounding the running total and not each count.
    """
    if n_drawn == n_tokens:
        return counts
    totals = np.cumsum(counts, axis=1) * n_tokens // n_drawn
    return np.diff(totals, axis=1, prepend=0)
