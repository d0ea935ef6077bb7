"""Measuring many cases in rounds, so that a disturbance touches one repeat of each and not one case whole.

A round is measured slice by slice, and other measurements may take turns between slices. The machine's speed changes
by some per cent within seconds: four rounds of a second and a half each tell the speed of four moments, as many slices
of a third of a second that of a minute. Every round has an order of its own, so that slices have cases in common.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar, cast

from hwmodels.calibrate import Part, is_known
from runtime.resume import KeptRounds, Key, Rounds

Done = TypeVar("Done")
Case = Callable[[], Iterable[tuple[Key, float]]]
"""One visit: runs something once and says how long what of it took."""
InRounds = Generator[float, None, Done]
"""A measurement that says after every slice what share of it is done, 0 to 1, so that others can take turns with it."""
Measuring = InRounds[Part]
_LONG = 4.0  # times what a case takes on average: such a case is visited in every second round
_SIZING = 3  # rounds by which their number is found
_SLICE_S, _LEAST_CASES = 0.35, 8  # of a slice; by fewer points of a curve its slowness is not known
_SURE = 0.75  # of a measurement must be over before it may end early: the machine's speed changes by turns of seconds


@dataclass(frozen=True)
class Effort:
    """How long to go on: at least `least` rounds, then until all is known, `most` rounds or `seconds` have passed.

    counts_rounds: seconds only say, by the first rounds, how many there will be. Between runs of fixed work turns of
    fixed seconds would hold more rounds while the machine is fast, and their mean would be faster than the runs'.
    kept is where rounds are kept, should the calibration be interrupted.
    """

    least: int
    most: int
    seconds: float
    kept: KeptRounds | None = None
    counts_rounds: bool = False


class Progress:
    """How far a measurement has come, by its rounds and by the time that these took: turns of others do not count."""

    def __init__(self, effort: Effort, rounds: int = 0, spent_s: float = 0.0) -> None:
        self.effort, self.spent_s = effort, spent_s
        self.rounds: float = rounds
        self._kept = rounds
        self._began_s = self._counted_s = 0.0
        self._fixed: int | None = None  # rounds in all, once that is known

    def begin(self) -> None:
        """A round, or a slice of one, begins."""
        self._began_s = time.perf_counter()

    def end(self, rounds: float | None = None, counts: bool = True) -> float:
        """So many rounds are over, or one more: share of all that is done. What warms up takes time, but is none."""
        took_s = time.perf_counter() - self._began_s
        self.spent_s += took_s
        if counts:
            self.rounds = self.rounds + 1 if rounds is None else rounds
            self._counted_s += took_s
        n_timed = self.rounds - self._kept  # of rounds that were kept the time is not known without warming up
        if self.effort.counts_rounds and self._fixed is None and n_timed >= _SIZING:
            left_s = max(0.0, self.effort.seconds - self.spent_s)
            self._fixed = max(self.effort.least, int(self.rounds) + round(left_s * n_timed / self._counted_s))
        return self.share

    @property
    def share(self) -> float:
        """Share of the measurement that is done."""
        if self._fixed is not None:
            return min(1.0, self.rounds / min(self._fixed, self.effort.most))
        by_time = max(self.spent_s / self.effort.seconds, self.rounds / self.effort.most)
        return min(1.0, by_time, self.rounds / self.effort.least)


def in_rounds(cases: Sequence[Case[Key]], effort: Effort, n_curves: int = 1) -> InRounds[dict[Key, list[list[float]]]]:
    """Seconds of every repeat, by what took them and by slice. One round before the first warms up and does not count.

    A round visits every case once, so that all see the same minutes of the machine; long cases from the second round on
    in every other one. It ends early where all times are known (hwmodels.calibrate.is_known) and most of the time is
    over, but not where it counts rounds: what it stands beside goes on. Rounds that were kept count as if they had been
    measured now. n_curves says of how many curves the cases are points: a slice has some of each.
    """
    kept = effort.kept.following() if effort.kept is not None else None
    before = cast("Rounds[Key]", kept.load() if kept is not None else Rounds())
    times, progress = before.times, Progress(effort, before.n_rounds, before.spent_s)
    took_s: list[float] = []
    if progress.share < 1.0:
        progress.begin()
        took_s += [_warmed(case) for case in cases]
        yield progress.end(counts=False)
    every = _how_often(took_s)
    for number in count(before.n_rounds):
        if progress.share >= 1.0 or (_may_end(progress) and _all_known(times.values())):
            break
        due = [i for i in range(len(cases)) if number == 0 or (number + i) % every[i] == 0]
        yield from _round(cases, _slices(due, took_s, number, _LEAST_CASES * n_curves), progress, times, kept)
    return times


def _round(
    cases: Sequence[Case[Key]],
    slices: Sequence[Sequence[int]],
    progress: Progress,
    times: dict[Key, list[list[float]]],
    kept: KeptRounds | None,
) -> InRounds[None]:
    """Measure a round, as much of it as there is time for, and add every slice's times; a whole round is kept."""
    number, n_due, n_done = int(progress.rounds), sum(map(len, slices)), 0
    for own in slices:
        if progress.share >= 1.0:
            return
        progress.begin()
        found: dict[Key, list[float]] = defaultdict(list)
        for i in own:
            for key, seconds in cases[i]():
                found[key].append(seconds)
        n_done += len(own)
        share = progress.end(number + n_done / n_due)
        n_before = len(next(iter(times.values()), ()))
        for key in found:
            times.setdefault(key, [[] for _ in range(n_before)])
        for key, rounds in times.items():
            rounds.append(found.get(key, []))
        if kept is not None and n_done == n_due:
            kept.save(Rounds(progress.spent_s, number + 1, times))
        yield share


def _slices(due: list[int], took_s: Sequence[float], number: int, least: int) -> list[list[int]]:
    """The cases of a round in an order of its own, cut into slices of as many, `least` or more if it is cut at all.

    As many, not as long: of a slice that is one long case and two others nothing would tell how slow it was.
    """
    n_slices = max(1, min(round(sum(took_s[i] for i in due) / _SLICE_S), len(due) // least))
    order = random.Random(number).sample(due, len(due)) if n_slices > 1 else due
    return [order[i::n_slices] for i in range(n_slices)]


def _warmed(case: Case[Key]) -> float:
    """Seconds of a visit whose times do not count."""
    began_s = time.perf_counter()
    for _ in case():
        pass
    return time.perf_counter() - began_s


def _how_often(took_s: Sequence[float]) -> list[int]:
    """Of each case: every how many rounds it is visited.

    The machine's speed changes within milliseconds, too: a long case sees more of that in one visit than a short one,
    and a few of them would make rounds so long that there are only three or four. Only the longest: of MLPs of 128
    tokens, two and a half times the average, four visits were 15 % apart in two calibrations.
    """
    average_s = sum(took_s) / max(1, len(took_s))
    return [2 if seconds > _LONG * average_s else 1 for seconds in took_s]


def _may_end(progress: Progress) -> bool:
    return progress.share >= _SURE and not progress.effort.counts_rounds


def flat(rounds: Iterable[Sequence[float]]) -> list[float]:
    """Repeats of all rounds."""
    return [seconds for own in rounds for seconds in own]


def _all_known(times: Iterable[Sequence[Sequence[float]]]) -> bool:
    return all(is_known(flat(rounds)) for rounds in times)


def finish(measuring: InRounds[Done]) -> Done:
    """What a measurement finds that takes turns with no other."""
    while True:
        try:
            next(measuring)
        except StopIteration as end:
            found: Done = end.value
            return found
