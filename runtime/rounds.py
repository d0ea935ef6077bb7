"""Measuring many cases in rounds, so that a disturbance touches one repeat of each and not one case whole."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from hwmodels.calibrate import Part, is_known
from runtime.resume import KeptRounds, Key, Rounds

Done = TypeVar("Done")
Case = Callable[[], Iterable[tuple[Key, float]]]
"""One visit: runs something once and says how long what of it took."""
InRounds = Generator[float, None, Done]
"""A measurement that says after every round what share of it is done, 0 to 1, so that others can take turns with it."""
Measuring = InRounds[Part]
_LONG = 2.0  # times what a case takes on average: such a case is visited in every second round
_SIZING = 3  # rounds by which their number is found
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
        self.effort, self.rounds, self.spent_s = effort, rounds, spent_s
        self._began_s = self._counted_s = 0.0
        self._fixed: int | None = None  # rounds in all, once that is known

    def begin(self) -> None:
        """A round begins."""
        self._began_s = time.perf_counter()

    def end(self, counts: bool = True) -> float:
        """The round is over: share of all that is done now. One that warms up takes time, but is none."""
        took_s = time.perf_counter() - self._began_s
        self.spent_s += took_s
        self.rounds += counts
        self._counted_s += took_s * counts
        if self.effort.counts_rounds and self._fixed is None and self.rounds >= _SIZING:
            left_s = max(0.0, self.effort.seconds - self.spent_s)
            self._fixed = max(self.effort.least, self.rounds + round(left_s * self.rounds / self._counted_s))
        return self.share

    @property
    def share(self) -> float:
        """Share of the measurement that is done."""
        if self._fixed is not None:
            return min(1.0, self.rounds / min(self._fixed, self.effort.most))
        by_time = max(self.spent_s / self.effort.seconds, self.rounds / self.effort.most)
        return min(1.0, by_time, self.rounds / self.effort.least)


def in_rounds(cases: Sequence[Case[Key]], effort: Effort) -> InRounds[dict[Key, list[list[float]]]]:
    """Seconds of every repeat, by what took them and by round. One round before the first warms up and does not count.

    A round visits every case once, so that all see the same minutes of the machine; long cases from the second round on
    in every other one. It ends early where all times are known (hwmodels.calibrate.is_known) and most of the time is
    over, but not where it counts rounds: what it stands beside goes on. Rounds that were kept count as if they had been
    measured now.
    """
    kept = effort.kept.following() if effort.kept is not None else None
    before = cast("Rounds[Key]", kept.load() if kept is not None else Rounds())
    times, progress = before.times, Progress(effort, before.n_rounds, before.spent_s)
    every: list[int] | None = None  # a case is visited in every such round, once that is known
    while progress.share < 1.0 and not (_may_end(progress) and _all_known(times.values())):
        progress.begin()
        if every is None:
            every = _how_often([_warmed(case) for case in cases])
            yield progress.end(counts=False)
            continue
        found: dict[Key, list[float]] = defaultdict(list)
        for i, case in enumerate(cases):
            if progress.rounds == 0 or (progress.rounds + i) % every[i] == 0:
                for key, seconds in case():
                    found[key].append(seconds)
        share = progress.end()
        for key in found:
            times.setdefault(key, [[] for _ in range(progress.rounds - 1)])
        for key, rounds in times.items():
            rounds.append(found.get(key, []))
        if kept is not None:
            kept.save(Rounds(progress.spent_s, progress.rounds, times))
        yield share
    return times


def _warmed(case: Case[Key]) -> float:
    """Seconds of a visit whose times do not count."""
    began_s = time.perf_counter()
    for _ in case():
        pass
    return time.perf_counter() - began_s


def _how_often(took_s: Sequence[float]) -> list[int]:
    """Of each case: every how many rounds it is visited.

    The machine's speed changes within milliseconds, too: a long case sees more of that in one visit than a short one,
    and a few of them would make rounds so long that there are only three or four.
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
