"""A calibration that takes turns with something else, so that both see the same minutes of the machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from hwmodels.calibrate import Part
from hwmodels.load import LoadMeter
from hwmodels.profile import HardwareProfile
from runtime.rounds import Measuring
from runtime.turns import Turn


class Alongside:
    """Measures a round or so at every turn, always of the part that is furthest behind."""

    def __init__(
        self, parts: Mapping[str, Turn], n_turns: int, profile_of: Callable[[Mapping[str, Part]], HardwareProfile]
    ) -> None:
        self._parts, self._n_turns, self._profile_of = parts, n_turns, profile_of
        self._n_taken = 0
        self._runs: dict[str, Measuring] = {}
        self._shares = dict.fromkeys(parts, 0.0)
        self._found: dict[str, Part] = {}

    def turn(self) -> None:
        """Measure until as much of the time is spent as turns have been taken."""
        self._n_taken += 1
        self._advance_to(min(1.0, self._n_taken / self._n_turns))

    def profile(self) -> HardwareProfile:
        """What was found; what turns have left over is measured now."""
        self._advance_to(math.inf)
        loads = {name: max(part.loads, default=None) for name, part in self._parts.items()}
        found = {name: replace(self._found[name], others_load=loads[name]) for name in self._parts}
        return self._profile_of(found)

    def _is_finished(self) -> bool:
        return len(self._found) == len(self._parts)

    def _share(self) -> float:
        whole = sum(part.share for part in self._parts.values())
        return sum(part.share * self._shares[name] for name, part in self._parts.items()) / whole

    def _advance_to(self, goal: float) -> None:
        """Measure until so much is done. What others took is asked once, of all that was measured: rounds are short."""
        meter, names = LoadMeter.start(), set[str]()
        while self._share() < goal and not self._is_finished():
            names.add(self._advance())
        load = meter.others()
        for name in names:
            self._parts[name].loads += [] if load is None else [load]

    def _advance(self) -> str:
        name = min((name for name in self._parts if name not in self._found), key=self._shares.__getitem__)
        if name not in self._runs:
            self._runs[name] = self._parts[name].begin()
        try:
            self._shares[name] = next(self._runs[name])
        except StopIteration as end:
            self._shares[name], self._found[name] = 1.0, end.value
        return name
