"""Plan: where every column of every MLP lives, and who computes it, as data.

partition   which columns of which expert live on the device (GG); the rest lives in host memory.
cache       slots on the device for the experts' host parts that the last steps used.
tiers       by tokens in a step: which host columns are sent and computed by the device (CG), which are
            computed by the CPU (CC), in which order, with how many slots.
chunk       how many tokens of each sequence's prompt one step feeds.

A policy makes a Plan; only a Plan passes from the simulator to the runtime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hwmodels.errors import FormatError, PlanError
from hwmodels.schema import check_header, digest, from_json, read_json, to_json, write_json
from sim.model import ModelSpec

SCHEMA = "scheinfer.plan"
VERSION = 1

Place = Literal["CPU", "GPU"]
CacheScope = Literal["layer", "model"]
CacheRule = Literal["lru", "score"]


@dataclass(frozen=True)
class LayerPartition:
    """Placement of one layer.

    rest      where attention, norms, router and shared experts live and run, with the KV cache
    gg        per expert (a dense MLP is one expert): its first gg columns live on the device
    """

    rest: Place
    gg: tuple[int, ...]


@dataclass(frozen=True)
class Balance:
    """Seconds by which a tier splits a layer's experts between CPU and GPU.

    One expert on the GPU, one sent, and on the CPU once per layer and per token.
    """

    gpu_s: float
    send_s: float
    cpu_s: float
    cpu_token_s: float


@dataclass(frozen=True)
class ExpertCache:
    """Slots on the device that hold experts' host parts from step to step; their copies on the host stay.

    scope       layer: every layer has n_slots of its own; model: all layers share n_slots
    rule        who leaves: lru, the expert used longest ago; score, the one with the least running share of tokens
    n_spare     slots more, in which an expert arrives while the one that left is still copied back
    writeback   an expert that leaves is copied to the host, as if that had no copy; scope layer only
    first       (layer, expert) of experts that it begins with; within a pool the first to leave first
    """

    scope: CacheScope
    rule: CacheRule
    n_slots: int
    first: tuple[tuple[int, int], ...]
    n_spare: int = 0
    writeback: bool = False

    def total_slots(self, n_layers: int) -> int:
        """Slots in all, where so many layers go through the cache."""
        return self.n_slots * (n_layers if self.scope == "layer" else 1) + self.n_spare


@dataclass(frozen=True)
class Tier:
    """How steps of at most `max_tokens` tokens run.

    overlap             False: one task after the other, as llama.cpp, Fiddler and accelerate run
    ahead               per layer: host columns of every expert that are sent whatever the router says
                        (CG chosen by the plan); with overlap, one layer ahead
    stream_min_tokens   after the router: an expert with at least so many tokens has its host columns sent
                        (CG chosen by the step); None sends none. Not together with ahead
    n_slots             buffers on the device that sent columns pass through; 0 if nothing is sent
    stream_columns      how many of the host columns stream_min_tokens sends, the rest is CC; None: all
    fetch_share         with an expert cache: the share of a layer's misses that is sent into it; the others,
                        and those that find no room, are treated as if there were no cache
    balance             with an expert cache, instead: who takes which expert, by two clocks (sim.caching)
    offload             MLPs of layers that live on the CPU are sent and computed by the device, too, as ahead or
                        stream_min_tokens say of all their columns; their attention stays. Only without overlap
    """

    name: str
    max_tokens: int
    overlap: bool
    ahead: tuple[int, ...]
    stream_min_tokens: int | None
    n_slots: int
    stream_columns: int | None = None
    fetch_share: float = 0.0
    balance: Balance | None = None
    offload: bool = False

    @property
    def fetches(self) -> bool:
        """Whether misses of an expert cache are sent into it."""
        return self.fetch_share > 0 or self.balance is not None


@dataclass(frozen=True)
class Prediction:
    """What the simulator says of a plan."""

    ttft_s: float
    tpot_s: float
    prefill_tok_s: float
    decode_tok_s: float


@dataclass(frozen=True)
class Plan:
    """All decisions for one model on one machine under one budget.

    chunk_tokens    a prompt is fed in steps of so many tokens of each sequence; None: in one step
    cpu_threads     threads that compute host columns; None: as many as the machine was measured with
    """

    policy: str
    model: str
    model_id: str
    profile_id: str
    dtype: str
    vram_budget_bytes: int
    n_ctx: int
    batch: int
    pinned: bool
    ends: Place
    layers: tuple[LayerPartition, ...]
    tiers: tuple[Tier, ...]
    prediction: Prediction | None = None
    cache: ExpertCache | None = None
    chunk_tokens: int | None = None
    cpu_threads: int | None = None

    @cached_property
    def id(self) -> str:
        """Twelve hex digits of the decisions; the prediction does not count."""
        decided = to_json(replace(self, prediction=None, profile_id=""))
        # plans from before these fields existed keep their ids
        later = [(decided, "chunk_tokens"), (decided, "cpu_threads"), *((tier, "offload") for tier in decided["tiers"])]
        for where, name in later:
            if not where[name]:
                del where[name]
        return digest(decided)

    @property
    def decisions(self) -> Hashable:
        """What tells apart plans that are made for one problem; much cheaper than `id`."""
        return self.layers, self.tiers, self.ends, self.pinned, self.cache, self.chunk_tokens, self.cpu_threads

    @property
    def step_tokens(self) -> int:
        """The most tokens of one sequence that one step may have."""
        return self.n_ctx if self.chunk_tokens is None else min(self.chunk_tokens, self.n_ctx)

    def tier(self, n_tokens: int) -> Tier:
        """The tier of a step of n_tokens: the smallest that covers it, else the largest."""
        for tier in self.tiers:
            if n_tokens <= tier.max_tokens:
                return tier
        return self.tiers[-1]

    @property
    def uses_gpu(self) -> bool:
        """Whether any weight lives on, or is sent to, the device."""
        return self.ends == "GPU" or any(la.rest == "GPU" or any(la.gg) for la in self.layers) or self.sends_weights

    @property
    def sends_weights(self) -> bool:
        """Whether any tier sends host columns to the device."""
        return any(t.stream_min_tokens is not None or any(t.ahead) or t.fetches for t in self.tiers)

    def with_prediction(self, prediction: Prediction) -> Plan:
        """A copy that carries a prediction."""
        return replace(self, prediction=prediction)

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_json(path, {"schema": SCHEMA, "version": VERSION, **to_json(self)})


def load_plan(path: str | Path) -> Plan:
    """Read a plan; FormatError names the field that is wrong."""
    fields: dict[str, Any] = check_header(read_json(path, "plan"), SCHEMA, VERSION, str(path))
    plan = from_json(Plan, fields, str(path))
    _check_alone(plan, str(path))
    return plan


def _check_alone(plan: Plan, where: str) -> None:
    if not plan.tiers:
        raise FormatError(f"{where}.tiers: a plan needs at least one tier")
    limits = [t.max_tokens for t in plan.tiers]
    if limits != sorted(set(limits)) or limits[0] < 1:
        raise FormatError(f"{where}.tiers: max_tokens are {limits}; they must rise from 1 or more")
    for i, tier in enumerate(plan.tiers):
        if len(tier.ahead) != len(plan.layers):
            raise FormatError(f"{where}.tiers[{i}].ahead: {len(tier.ahead)} entries for {len(plan.layers)} layers")
        sends = tier.stream_min_tokens is not None or any(tier.ahead)
        if sends and tier.n_slots < 1:
            raise FormatError(f"{where}.tiers[{i}].n_slots: is {tier.n_slots}; sending columns needs at least one slot")
        if tier.stream_columns is not None and (tier.stream_min_tokens is None or tier.stream_columns < 1):
            raise FormatError(f"{where}.tiers[{i}].stream_columns: needs stream_min_tokens and at least one column")
        if tier.stream_min_tokens is not None and any(tier.ahead):
            raise FormatError(f"{where}.tiers[{i}]: sets both ahead and stream_min_tokens; a tier sends one way")
        if tier.overlap and any(tier.ahead) and tier.n_slots < 2:
            raise FormatError(f"{where}.tiers[{i}].n_slots: is {tier.n_slots}; sending a layer ahead needs two slots")
        _check_fetching(plan, tier, f"{where}.tiers[{i}]")
    if plan.chunk_tokens is not None and plan.chunk_tokens < 1:
        raise FormatError(f"{where}.chunk_tokens: is {plan.chunk_tokens}; expected at least 1, or null for no chunks")
    if plan.cpu_threads is not None and plan.cpu_threads < 1:
        raise FormatError(f"{where}.cpu_threads: is {plan.cpu_threads}; expected at least 1, or null for the machine's")
    if plan.cache is not None:
        _check_cache(plan.cache, f"{where}.cache")


def _check_fetching(plan: Plan, tier: Tier, where: str) -> None:
    if not 0 <= tier.fetch_share <= 1:
        raise FormatError(f"{where}.fetch_share: is {tier.fetch_share}; expected a share from 0 to 1")
    if tier.fetches and plan.cache is None:
        raise FormatError(f"{where}: sends misses into an expert cache, the plan has none; expected cache to be set")
    if tier.fetches and any(tier.ahead):
        raise FormatError(f"{where}: sends ahead and into the cache; a tier does one of both")
    if tier.offload and (tier.overlap or not (any(tier.ahead) or tier.stream_min_tokens == 1)):
        raise FormatError(f"{where}.offload: needs overlap false, and ahead or stream_min_tokens 1")
    if tier.offload and tier.stream_columns is not None:
        raise FormatError(f"{where}.offload: sends whole experts; expected stream_columns to be null")
    if tier.balance is not None and (tier.fetch_share > 0 or tier.stream_min_tokens is not None):
        raise FormatError(f"{where}.balance: not together with fetch_share or stream_min_tokens")
    if tier.balance is not None and min(vars(tier.balance).values()) < 0:
        raise FormatError(f"{where}.balance: found {tier.balance}; expected seconds of zero or more")


def _check_cache(cache: ExpertCache, where: str) -> None:
    if cache.n_slots < 1 or cache.n_spare < 0:
        raise FormatError(f"{where}: has {cache.n_slots} slots and {cache.n_spare} spare; expected at least 1 and 0")
    if cache.writeback and cache.scope != "layer":
        raise FormatError(f"{where}.writeback: needs scope layer, found {cache.scope}")
    pools = Counter(layer if cache.scope == "layer" else 0 for layer, _ in cache.first)
    if len(set(cache.first)) < len(cache.first) or any(n > cache.n_slots for n in pools.values()):
        raise FormatError(f"{where}.first: expected different experts, at most {cache.n_slots} per pool")


def check_plan(plan: Plan, spec: ModelSpec) -> None:
    """Raise PlanError unless the plan was made for a model of these sizes."""
    if plan.model_id != spec.id:
        raise PlanError(
            f"the plan is for {plan.model} ({plan.model_id}, {plan.dtype}), the model is {spec.name} "
            f"({spec.id}, {spec.dtype}); plan again for this model and dtype"
        )
    if len(plan.layers) != spec.n_layers:
        raise PlanError(f"the plan has {len(plan.layers)} layers, the model {spec.n_layers}; plan again")
    for i, (part, layer) in enumerate(zip(plan.layers, spec.layers, strict=True)):
        ffn = layer.ffn
        if len(part.gg) != ffn.n_experts or any(not 0 <= g <= ffn.columns for g in part.gg):
            raise PlanError(
                f"layer {i}: gg needs {ffn.n_experts} numbers from 0 to {ffn.columns}, the plan has {part.gg}"
            )
        if part.rest == "CPU" and any(part.gg):
            raise PlanError(
                f"layer {i}: attention on the CPU with columns on the device is not supported; set rest to GPU"
            )
        for tier in plan.tiers:
            if not 0 <= tier.ahead[i] <= ffn.columns:
                raise PlanError(f"tier {tier.name}, layer {i}: ahead is {tier.ahead[i]}, expected 0 to {ffn.columns}")
            if part.rest == "CPU" and tier.offload and any(tier.ahead) and tier.ahead[i] < ffn.columns:
                raise PlanError(f"tier {tier.name}, layer {i}: offload sends all of {ffn.columns} columns of an MLP")
    for at, expert in plan.cache.first if plan.cache is not None else ():
        known = 0 <= at < spec.n_layers and 0 <= expert < spec.layers[at].ffn.n_experts
        if not known or not caches_layer(plan, spec, at) or plan.layers[at].gg[expert] == spec.layers[at].ffn.columns:
            raise PlanError(
                f"cache.first: layer {at}, expert {expert} has no host part that the device could compute; expected "
                f"experts of MoE layers whose attention is on the device"
            )


def caches_layer(plan: Plan, spec: ModelSpec, layer: int) -> bool:
    """Whether a layer's experts go through the plan's cache: an MoE layer that lives on the device."""
    return plan.cache is not None and spec.layers[layer].ffn.is_moe and plan.layers[layer].rest == "GPU"
