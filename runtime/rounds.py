"""Measuring many cases in rounds, so that a disturbance touches one repeat of each and not one case whole."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hwmodels.calibrate import is_known

Key = TypeVar("Key", bound=Hashable)
Case = Callable[[], Iterable[tuple[Key, float]]]
"""One visit: runs something once and says how long what of it took."""
Tick = Callable[[float], object]
"""Hears the share of a part that is done, 0 to 1."""
_VISIT_S, _MOST_VISITS = 0.03, 4


@dataclass(frozen=True)
class Effort:
    """How long to go on: at least `least` rounds, then until all is known, `most` rounds or `seconds` have passed."""

    least: int
    most: int
    seconds: float


def in_rounds(cases: Sequence[Case[Key]], effort: Effort, tick: Tick) -> dict[Key, list[float]]:
    """Seconds of every repeat, by what took them. One round before the first warms up and does not count.

    A round visits short cases several times. After the least number of rounds, a case whose times are all known
    (hwmodels.calibrate.is_known) is passed over.
    """
    times: dict[Key, list[float]] = defaultdict(list)
    keys: list[set[Key]] = [set() for _ in cases]
    began_s = time.perf_counter()
    for number in range(-1, effort.most):
        needed = number < effort.least
        for case, own in zip(cases, keys, strict=True):
            share = (time.perf_counter() - began_s) / effort.seconds
            if not needed and (share >= 1 or all(is_known(times[key]) for key in own)):
                continue
            found = list(_visits(case) if number >= 0 else case())
            if number >= 0:
                own.update(key for key, _ in found)
                for key, seconds in found:
                    times[key].append(seconds)
            tick(min(1.0, share))
    tick(1.0)
    return dict(times)


def _visits(case: Case[Key]) -> Iterator[tuple[Key, float]]:
    began_s = time.perf_counter()
    for _ in range(_MOST_VISITS):
        yield from case()
        if time.perf_counter() - began_s > _VISIT_S:
            return
