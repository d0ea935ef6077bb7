"""What slows work beside its own size: others at work at the same time, and cold caches after a wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from hwmodels.errors import FormatError

Resource = Literal["CPU", "GPU", "H2D", "D2H"]
RESOURCES: tuple[Resource, ...] = ("CPU", "GPU", "H2D", "D2H")
COMPUTERS: tuple[Resource, ...] = ("CPU", "GPU")
"""Resources whose work may compute or read; the others copy."""
Source = Literal["measured", "published", "datasheet", "estimated"]
"""Where a number comes from: measured by calibration on this machine, measured and published by others on one
like it, taken from a specification, or a considered guess."""


@dataclass(frozen=True)
class Repeats:
    """How often a number was measured, and p90 - p10 of what was found, in the number's own unit."""

    spread: float
    count: int

    def __post_init__(self) -> None:
        if self.spread < 0 or self.count < 1:
            raise FormatError(f"spread is {self.spread}, count {self.count}; expected at least 0 and at least 1")


@dataclass(frozen=True)
class Contention:
    """Rates, relative to running alone, of the resources that are active together.

    repeats    says of each rate how it was measured, where it was
    computing  those of CPU and GPU whose work computes (hwmodels.profile.computing_share); the others read
    """

    active: tuple[Resource, ...]
    rate: dict[str, float]
    source: Source
    repeats: dict[str, Repeats] = field(default_factory=dict)
    computing: tuple[Resource, ...] = ()

    def __post_init__(self) -> None:
        if not set(self.computing) <= set(COMPUTERS) & set(self.active):
            found = f"computing names {sorted(self.computing)}, active names {sorted(self.active)}"
            raise FormatError(f"{found}; expected those of {' and '.join(COMPUTERS)} that are active")
        if self.repeats and set(self.repeats) != set(self.active):
            raise FormatError(f"repeats names {sorted(self.repeats)}, active names {sorted(self.active)}; expected all")
        if set(self.rate) != set(self.active):
            raise FormatError(f"rate names {sorted(self.rate)}, active names {sorted(self.active)}; they must agree")
        for name, rate in self.rate.items():
            if not 0 < rate <= 1:
                raise FormatError(f"rate of {name} is {rate}, must be above 0 and at most 1")


@dataclass(frozen=True)
class Cold:
    """By how much longer, cold_s, what is not an MLP takes on the device after its thread waited for so long.

    Calls of torch and Python that were not made for a while find caches, pages and cores taken by others. What they
    lose so is about the same for one token and for 128: seconds, no share of the task (experiments/LOG.md).
    """

    waited_s: float
    cold_s: float
    source: Source
    repeats: Repeats | None = None

    def __post_init__(self) -> None:
        if self.waited_s <= 0:
            raise FormatError(f"waited_s is {self.waited_s}, must be above zero")
        if self.cold_s < 0:
            raise FormatError(f"cold_s is {self.cold_s}, must not be negative")


@dataclass(frozen=True)
class Move:
    """What a step pays beside the copy of its hidden state where the next layer is in another place.

    before_s  from the end of what ran before to the start of the copy
    after_s   from the end of the copy to the start of what runs next
    cold_s    how much longer that takes than where the work before it was in the same place; counts, as waits do, where
              contention is simulated
    """

    to: Literal["CPU", "GPU"]
    before_s: float
    after_s: float
    cold_s: float
    source: Source
    repeats: Repeats | None = None

    def __post_init__(self) -> None:
        for name in ("before_s", "after_s", "cold_s"):
            if getattr(self, name) < 0:
                raise FormatError(f"{name} is {getattr(self, name)}, must not be negative")


def check_slowing(cold: Sequence[Cold], moves: Sequence[Move]) -> None:
    """FormatError unless waits rise and each place is moved to once."""
    waits, places = [entry.waited_s for entry in cold], [move.to for move in moves]
    if waits != sorted(set(waits)):
        raise FormatError(f"cold has waits of {waits} s; expected rising ones")
    if len(set(places)) < len(places):
        raise FormatError(f"moves has entries to {', '.join(places)}; expected one for each place")


def check_age(cold: object, where: str) -> None:
    """FormatError if waits are as earlier versions wrote them: a share of the task that nothing turns into seconds."""
    if any(isinstance(entry, dict) and "factor" in entry for entry in (cold if isinstance(cold, list) else ())):
        raise FormatError(
            f"{where}: an earlier version of this program measured this profile, cold starts as a factor, "
            "not in seconds; run `scheinfer calibrate` anew"
        )
