"""Parts of a calibration taking turns, so that all see the same minutes of the machine; told on a progress bar."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from hwmodels.calibrate import Part
from hwmodels.load import BUSY_SHARE, LoadMeter
from runtime.resume import KeptParts
from runtime.rounds import Measuring

TURNS = 8
"""In how many goes a part is measured: of a minute, less than a second each, more than five apart."""
_GLANCE_S = 0.3
_BAR = "{l_bar}{bar}| {elapsed}{postfix}"


@dataclass
class Turn:
    """A part: its share of a pass, how to begin it, and what others took of all cores in each of its turns."""

    share: float
    begin: Callable[[], Measuring]
    loads: list[float] = field(default_factory=list)


def take_turns(
    parts: Mapping[str, Turn], found: dict[str, Part], kept: KeptParts, bar: tqdm[Any], percent: float
) -> None:
    """Measure every part that is not found yet, keep and add it; the first and the last are measured in one go.

    percent is how much of the bar all parts together are. Interrupted, it ends those that have begun.
    """
    first, *others, last = parts
    with ExitStack() as stack:
        for names, turns in (([first], 1), (others, TURNS), ([last], 1)):
            runs: dict[str, Measuring] = {}
            for turn in range(1, turns + 1):
                for name in names:
                    part = parts[name]
                    if name not in found:
                        bar.set_postfix_str(name.rpartition(" ")[0])
                        if name not in runs:
                            runs[name] = part.begin()
                            stack.callback(runs[name].close)
                        done = _go_on(runs[name], part.loads, turn / turns if turn < turns else math.inf)
                        if done is not None:
                            found[name] = replace(done, others_load=max(part.loads, default=None))
                            kept.save(name, found[name])
                    bar.update(percent * part.share / turns)


def _go_on(run: Measuring, loads: list[float], until: float) -> Part | None:
    """Measure until so much of a part is done; the part if it is finished."""
    meter = LoadMeter.start()
    try:
        while next(run) < until:
            pass
    except StopIteration as end:
        part: Part = end.value
        return part
    finally:
        load = meter.others()
        loads += [] if load is None else [load]
    return None


def progress_bar(title: str, shown: bool) -> tqdm[Any]:
    """A bar of 100 %."""
    return tqdm(total=100, desc=title, bar_format=_BAR, disable=not shown, leave=False)


def one_more(bar: tqdm[Any], passes: int) -> None:
    """Another pass, beyond so many that the bar was made for."""
    bar.total = (bar.total or 0) + 100 / passes
    bar.refresh()


def tell(bar: tqdm[Any], text: str) -> None:
    """A line above the bar, if it is shown."""
    if not bar.disable:
        bar.write(text, file=sys.stderr)


def glance(bar: tqdm[Any]) -> None:
    """Tell whether others are busy on this machine now."""
    meter = LoadMeter.start()
    time.sleep(_GLANCE_S)
    load = meter.others()
    if load is not None and load >= BUSY_SHARE:
        tell(bar, f"other programs keep {load:.0%} of all cores busy: times may come out too long, and will be marked")
