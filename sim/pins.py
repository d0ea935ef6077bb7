"""Pins: parts of a plan that a user decides, by unit names and regular expressions.

Units are `layers.7.mlp` (dense), `layers.7.experts.3` and `layers.7.attention` (with norms, router and shared
experts). gpu keeps a unit on the device; cpu keeps it on the host, and the CPU computes it in every step; stream
keeps it on the host and sends it in every step that uses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from hwmodels.errors import FormatError, PlanError
from sim.model import ModelSpec
from sim.plan import Plan, Tier, caches_layer

PinTo = Literal["gpu", "cpu", "stream"]
_PLACES: tuple[PinTo, ...] = get_args(PinTo)
_BETWEEN = re.compile(r"(?<==gpu),|(?<==cpu),|(?<==stream),")


@dataclass(frozen=True)
class Pin:
    """A regular expression that unit names must match as a whole, and where these units go."""

    pattern: str
    to: PinTo


@dataclass(frozen=True)
class Pins:
    """Pins of a model: per layer one of attention, and one of each expert; None is free. Without pins, both empty."""

    rest: tuple[PinTo | None, ...] = ()
    experts: tuple[tuple[PinTo | None, ...], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rest)

    def of_rest(self, layer: int) -> PinTo | None:
        """The pin of a layer's attention."""
        return self.rest[layer] if self else None

    def of_experts(self, layer: int) -> tuple[PinTo | None, ...]:
        """Pins of a layer's experts; none without pins."""
        return self.experts[layer] if self else ()

    def needs_device(self, layer: int) -> bool:
        """Whether a layer must live on the device."""
        return self.of_rest(layer) == "gpu" or bool({"gpu", "stream"} & set(self.of_experts(layer)))

    def sent_ahead(self, spec: ModelSpec) -> tuple[tuple[int, int], ...]:
        """(layer, columns of every expert that are sent ahead), where pins decide that."""
        found = {}
        for layer in range(len(self.rest)):
            if "stream" in self.experts[layer]:
                found[layer] = spec.layers[layer].ffn.columns
            elif "cpu" in self.experts[layer] and self.rest[layer] != "cpu":
                found[layer] = 0
        return tuple(found.items())


NO_PINS = Pins()


def parse_pins(text: str) -> tuple[Pin, ...]:
    r"""Pins from a comma list of `regex=gpu|cpu|stream`; a comma inside a regular expression does not end it.

    >>> parse_pins(r"layers\.\d{1,2}\.attention=gpu,layers.0.mlp=cpu")[1]
    Pin(pattern='layers.0.mlp', to='cpu')
    """
    pins = []
    for item in _BETWEEN.split(text):
        pattern, _, to = item.rpartition("=")
        place = next((p for p in _PLACES if p == to.strip()), None)
        if not pattern or place is None:
            raise FormatError(f"pin {item!r} is not understood; write it as regex=gpu, regex=cpu or regex=stream")
        try:
            re.compile(pattern)
        except re.error as error:
            raise FormatError(f"pin {item!r}: the regular expression is wrong: {error}") from None
        pins.append(Pin(pattern, place))
    return tuple(pins)


def unit_names(spec: ModelSpec, layer: int) -> tuple[str, ...]:
    """Names of a layer's units: attention, then the MLP or every expert."""
    ffn = spec.layers[layer].ffn
    mlps = [f"experts.{e}" for e in range(ffn.n_experts)] if ffn.is_moe else ["mlp"]
    return tuple(f"layers.{layer}.{name}" for name in ("attention", *mlps))


def pins_of(spec: ModelSpec, pins: Sequence[Pin]) -> Pins:
    """The units that pins match; PlanError if one matches none, if two contradict, or if no plan can hold them."""
    if not pins:
        return NO_PINS
    names = [unit_names(spec, layer) for layer in range(spec.n_layers)]
    given: dict[str, Pin] = {}
    for pin in pins:
        matched = [name for layer in names for name in layer if re.fullmatch(pin.pattern, name)]
        if not matched:
            known = ", ".join((*names[0][:2], names[-1][-1]))
            raise PlanError(f"--pin {pin.pattern!r} matches no unit of {spec.name}; there are such as {known}")
        for name in matched:
            other = given.setdefault(name, pin)
            if other.to != pin.to:
                raise PlanError(
                    f"{name} is pinned to {other.to} by {other.pattern!r} and to {pin.to} by {pin.pattern!r}; "
                    f"leave one of them out"
                )
    to = [tuple(given[name].to if name in given else None for name in layer) for layer in names]
    made = Pins(tuple(layer[0] for layer in to), tuple(layer[1:] for layer in to))
    for layer in range(spec.n_layers):
        _check_layer(made, layer)
    return made


def _check_layer(pins: Pins, layer: int) -> None:
    rest, mlps = pins.rest[layer], set(pins.experts[layer])
    if rest == "stream":
        raise PlanError(f"layers.{layer}.attention cannot be sent in every step; pin it to gpu or cpu")
    if rest == "cpu" and {"gpu", "stream"} & mlps:
        raise PlanError(
            f"layers.{layer}: with attention pinned to cpu, the whole layer is computed there; pin its attention to "
            f"gpu, or its MLP to cpu"
        )
    if {"cpu", "stream"} <= mlps:
        raise PlanError(
            f"layers.{layer}: some experts are pinned to cpu, others to stream; a plan sends a layer's host experts "
            f"all alike: pin them to one of both, or some to gpu"
        )


# -- what a plan does with pinned units ---------------------------------------------------------------


def check_pins(pins: Pins, plan: Plan, spec: ModelSpec) -> None:
    """Raise PlanError unless the plan honours every pin."""
    for name, to, held in _held(pins, plan, spec):
        if not held:
            raise PlanError(f"{name} is pinned to {to}, a plan by {plan.policy} has it otherwise; use --policy auto")


def _held(pins: Pins, plan: Plan, spec: ModelSpec) -> Iterator[tuple[str, PinTo, bool]]:
    for layer, rest in enumerate(pins.rest):
        names = unit_names(spec, layer)
        if rest is not None:
            yield names[0], rest, plan.layers[layer].rest == rest.upper()
        for expert, to in enumerate(pins.experts[layer]):
            if to is not None:
                yield names[1 + expert], to, _expert_is(to, plan, spec, layer, expert)


def _expert_is(to: PinTo, plan: Plan, spec: ModelSpec, layer: int, expert: int) -> bool:
    part, columns = plan.layers[layer], spec.layers[layer].ffn.columns
    if to == "gpu":
        return part.gg[expert] == columns
    if part.rest == "CPU":
        return to == "cpu"
    if part.gg[expert] or caches_layer(plan, spec, layer):
        return False
    if to == "cpu":
        return all(tier.stream_min_tokens is None and not tier.ahead[layer] for tier in plan.tiers)
    return all(_sends_all(tier, layer, columns) for tier in plan.tiers)


def _sends_all(tier: Tier, layer: int, columns: int) -> bool:
    routed = tier.stream_min_tokens == 1 and (tier.stream_columns is None or tier.stream_columns >= columns)
    return routed or tier.ahead[layer] == columns
