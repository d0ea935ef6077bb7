"""What a policy is asked, and the steps that policies share: plans from placements, fitting, the best of some."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from hwmodels.errors import PlanError
from hwmodels.profile import HardwareProfile
from hwmodels.units import format_bytes
from sim.memory import check_memory, memory
from sim.model import ModelSpec
from sim.pins import NO_PINS, Pins, check_pins
from sim.placement import Filling
from sim.plan import LayerPartition, Place, Plan, Prediction, Tier, check_plan
from sim.simulate import forecast
from sim.workload import Workload

_FEW_STEPS, _SHORT, _NEAR = 3, 24, 1.03

Policy = Callable[[ModelSpec, HardwareProfile, int, Workload], Plan]
"""A named rule: propose(spec, profile, vram_budget_bytes, workload) -> Plan; PlanError if none fits."""


@dataclass(frozen=True)
class Tried:
    """A plan with its prediction, seconds of the whole generation, and which of the plans offered it was."""

    plan: Plan
    prediction: Prediction
    total_s: float
    index: int


@dataclass(frozen=True)
class Problem:
    """One model on one machine under one device memory budget, for one workload.

    chunk_tokens    plans feed a prompt in steps of so many tokens of each sequence; None: in one step
    cpu_threads     plans compute host columns with so many threads, and the profile is that of a machine that does
                    (hwmodels.threads); None: as many as the profile was measured with
    """

    spec: ModelSpec
    profile: HardwareProfile
    vram_budget_bytes: int
    workload: Workload
    pins: Pins = NO_PINS
    chunk_tokens: int | None = None
    cpu_threads: int | None = None

    @property
    def prompt_tokens(self) -> int:
        """The most tokens that one step can have: the whole context, or a chunk, of every sequence."""
        return min(self.workload.n_ctx, self.chunk_tokens or self.workload.n_ctx) * self.workload.batch

    @property
    def first_tokens(self) -> int:
        """Tokens of the prompt's first step."""
        return min(self.workload.n_prompt, self.chunk_tokens or self.workload.n_prompt) * self.workload.batch

    def need_gpu(self, policy: str) -> None:
        """Raise PlanError if the machine has no device."""
        if not self.profile.has_gpu:
            raise PlanError(f"{policy} needs a GPU, profile {self.profile.name!r} has none; use --policy cpu-only")

    def tier(
        self,
        name: str,
        max_tokens: int,
        overlap: bool,
        ahead: bool = False,
        stream_min_tokens: int | None = None,
        n_slots: int = 0,
    ) -> Tier:
        """A tier that sends all host columns ahead, or after the router, or nothing."""
        columns = tuple(la.ffn.columns if ahead else 0 for la in self.spec.layers)
        return Tier(name, max_tokens, overlap, columns, stream_min_tokens, n_slots)

    def both(self, like: Tier) -> tuple[Tier, Tier]:
        """Decode and prompt tiers that run alike."""
        decode = replace(like, name="decode", max_tokens=self.workload.batch)
        return decode, replace(like, name="prompt", max_tokens=self.prompt_tokens)

    def plan(
        self, policy: str, layers: Sequence[LayerPartition], tiers: Sequence[Tier], pinned: bool, ends: Place = "GPU"
    ) -> Plan:
        """The plan of these decisions, not yet checked. Slots that nothing passes through are dropped."""
        plan = Plan(
            policy=policy,
            model=self.spec.name,
            model_id=self.spec.id,
            profile_id=self.profile.id,
            dtype=self.spec.dtype,
            vram_budget_bytes=self.vram_budget_bytes,
            n_ctx=self.workload.n_ctx,
            batch=self.workload.batch,
            pinned=pinned,
            ends=ends,
            layers=tuple(layers),
            tiers=tuple(tiers),
            chunk_tokens=self.chunk_tokens,
            cpu_threads=self.cpu_threads,
        )
        return replace(plan, tiers=tuple(_tidy(self.spec, plan, tier) for tier in plan.tiers))

    def fits(self, plan: Plan) -> bool:
        """Whether the plan's device part is within the budget."""
        return memory(self.spec, plan).vram_bytes <= self.vram_budget_bytes

    def checked(self, plan: Plan) -> Plan:
        """The plan, after all checks; PlanError says what does not fit."""
        check_plan(plan, self.spec)
        check_memory(self.spec, plan, self.profile.host_bytes)
        check_pins(self.pins, plan, self.spec)
        return plan

    def none_fits(self, policy: str) -> PlanError:
        """Why no plan with attention on the device fits: what the least of them lacks, in bytes."""
        empty = Filling(self.spec, self.workload, "layers", "even", 0, self.pins).layers(0)
        least = self.plan(policy, empty, self.both(self._least_tier()), pinned=True)
        missing = memory(self.spec, least).vram_bytes - self.vram_budget_bytes
        if self.pins and missing > 0:
            return PlanError(
                f"{policy} needs {format_bytes(self.vram_budget_bytes + missing)} of device memory with these pins, "
                f"the budget is {format_bytes(self.vram_budget_bytes)}: {format_bytes(missing)} are missing. Raise "
                f"--vram-budget, or pin less to gpu and stream"
            )
        try:
            need = check_memory(self.spec, least)
        except PlanError as error:
            return error
        keeps = need.host_bytes - (self.vram_budget_bytes - need.vram_bytes)
        if keeps <= self.profile.host_bytes:
            return PlanError(f"{policy}: what is left beside attention and KV cache is too little for sent columns")
        return PlanError(
            f"{policy} keeps at least {format_bytes(keeps)} in host memory with {format_bytes(self.vram_budget_bytes)} "
            f"of device memory, {format_bytes(self.profile.host_bytes)} can be had; raise --vram-budget or "
            f"--host-budget, or choose a smaller model"
        )

    def _least_tier(self) -> Tier:
        """A tier that sends no more than pins demand."""
        nothing, pinned = self.tier("", 1, overlap=True), dict(self.pins.sent_ahead(self.spec))
        if not any(pinned.values()):
            return nothing
        ahead = tuple(pinned.get(i, 0) for i in range(self.spec.n_layers))
        if not all(pinned.values()):
            return replace(nothing, ahead=ahead, n_slots=2)
        slots = replace(nothing, stream_min_tokens=1, n_slots=2) if self.spec.is_moe else None
        return slots or replace(nothing, ahead=ahead, n_slots=2)

    def fullest(self, filling: Filling, make: Callable[[tuple[LayerPartition, ...]], Plan]) -> Plan:
        """The plan with the most units on the device that fits; PlanError if not even none does.

        Bytes grow with units but for slots, which shrink with every round over all layers: hence all units
        at once first, then a bisection, then one round further.
        """
        n = len(filling.sequence)
        full = make(filling.layers(n))
        if n == 0 or self.fits(full):
            return self.checked(full)
        low, high = 0, n
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(make(filling.layers(middle))) else (low, middle)
        further = range(low, min(low + self.spec.n_layers, n))
        return self.checked(
            make(filling.layers(max(k for k in further if k == low or self.fits(make(filling.layers(k))))))
        )

    def best(self, plans: Iterable[Callable[[], Plan]]) -> Plan:
        """The plan with the shortest simulated generation, the first of equals; PlanError if none fits.

        It carries a prediction only if one was needed to tell it from the next best.
        """
        found = self._tried_roughly(plans, {})
        near = _near(found)
        return near[0].plan if len(near) == 1 else _first([self._again(tried) for tried in near]).plan

    def tried(
        self, plans: Iterable[Callable[[], Plan]], rough: Mapping[Hashable, Prediction] | None = None
    ) -> list[Tried]:
        """Different plans that fit, the shortest simulated generation first; PlanError if none fits.

        All are forecast from few decode steps of a short generation, as if a long one went on so; those that come
        near the best so are forecast as they are. rough holds such predictions that are known, by the decisions.
        """
        found = self._tried_roughly(plans, rough or {})
        near = {tried.index for tried in _near(found)}
        found = [self._again(tried) if tried.index in near else tried for tried in found]
        return sorted(found, key=lambda tried: tried.total_s)

    def _tried_roughly(self, plans: Iterable[Callable[[], Plan]], rough: Mapping[Hashable, Prediction]) -> list[Tried]:
        found: list[Tried] = []
        reasons: list[PlanError] = []
        known: set[Hashable] = set()
        for i, make in enumerate(plans):
            try:
                plan = self.checked(make())
            except PlanError as error:
                reasons.append(error)
                continue
            if plan.decisions not in known:
                known.add(plan.decisions)
                plan = replace(plan, prediction=None) if plan.profile_id != self.profile.id else plan
                prediction = plan.prediction or rough.get(plan.decisions) or self.rough(plan)
                found.append(Tried(plan, prediction, total_s(prediction, self.workload), i))
        if not found:
            raise reasons[0]
        return found

    def rough(self, plan: Plan) -> Prediction:
        """A plan's prediction from few decode steps of a short generation."""
        short = replace(self.workload, n_gen=min(self.workload.n_gen, _SHORT))
        return _rough(_Asked(self.spec.id, self.profile.id, short, plan.decisions, (self.spec, plan, self.profile)))

    def _again(self, tried: Tried) -> Tried:
        """With a prediction for the whole workload."""
        rough, plan = tried.prediction, tried.plan
        if plan.prediction is not None:
            return tried
        prediction = forecast(self.spec, plan, self.profile, self.workload, ttft_s=rough.ttft_s)
        return Tried(plan.with_prediction(prediction), prediction, total_s(prediction, self.workload), tried.index)


def _near(found: list[Tried]) -> list[Tried]:
    """Those that a whole forecast may find to be the best."""
    near_s = _first(found).total_s * _NEAR
    return [tried for tried in found if tried.total_s <= near_s]


def _first(found: list[Tried]) -> Tried:
    return min(found, key=lambda tried: tried.total_s)


@dataclass(frozen=True)
class _Asked:
    """What a rough prediction depends on, and the same in full."""

    spec_id: str
    profile_id: str
    workload: Workload
    decisions: Hashable
    whole: tuple[ModelSpec, Plan, HardwareProfile] = field(compare=False)


@lru_cache(maxsize=256)
def _rough(asked: _Asked) -> Prediction:
    spec, plan, profile = asked.whole
    return forecast(spec, plan, profile, asked.workload, n_decode=_FEW_STEPS)


def _tidy(spec: ModelSpec, plan: Plan, tier: Tier) -> Tier:
    sends = any(
        (part.rest == "GPU" or tier.offload)
        and min(part.gg) < la.ffn.columns
        and (tier.ahead[i] or tier.stream_min_tokens is not None)
        for i, (part, la) in enumerate(zip(plan.layers, spec.layers, strict=True))
    )
    if sends:
        return tier
    return replace(
        tier, ahead=(0,) * spec.n_layers, stream_min_tokens=None, n_slots=0, stream_columns=None, offload=False
    )


def total_s(prediction: Prediction, workload: Workload) -> float:
    """Seconds of a whole generation: the first token, then one step for every other."""
    return prediction.ttft_s + (workload.n_gen - 1) * prediction.tpot_s
