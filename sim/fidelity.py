"""How far a simulator can be trusted: its errors, and whether it puts plans in their order.

Values are times, so the smaller is the better plan. Groups name what may be compared: plans of one model
and workload compete, a short prompt beside a long one proves nothing.

Sources: M. G. Kendall, The treatment of ties in ranking problems, Biometrika 33 (1945), for tau-b. That small
errors alone do not make good choices, and regret does tell: "Accuracy Can Lie", arXiv 2501.01876.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmodels.errors import FormatError

Floats = NDArray[np.float64]
Groups = Sequence[Hashable]


@dataclass(frozen=True)
class Errors:
    """Absolute relative errors: median, 90th percentile, worst, how many; bias is the median with its sign."""

    median: float
    p90: float
    worst: float
    bias: float
    n: int


def errors(simulated: Sequence[float], measured: Sequence[float]) -> Errors:
    """(simulated - measured) / measured over pairs; pairs that measured nothing do not count.

    Raises FormatError if the lengths differ or if no pair is left.
    """
    s, m = _pair(simulated, measured, least=1)
    kept = m > 0
    if not kept.any():
        raise FormatError("no measured value is above zero; expected at least one")
    signed = s[kept] / m[kept] - 1.0
    size = np.abs(signed)
    return Errors(
        float(np.median(size)),
        float(np.quantile(size, 0.9)),
        float(size.max()),
        float(np.median(signed)),
        int(kept.sum()),
    )


@dataclass(frozen=True)
class Order:
    """How simulated order agrees with measured order, over pairs within a group.

    tau       Kendall's tau-b: 1 the same order, 0 none, -1 the reverse; 0 where one side knows no order
    n_pairs   pairs within a group
    n_clear   pairs whose measured values differ by more than the noise
    agreed    share of these that the simulation puts the same way round, ties do not agree; 1 if there are none
    """

    tau: float
    n_pairs: int
    n_clear: int
    agreed: float


def order(
    simulated: Sequence[float], measured: Sequence[float], noise: float = 0.0, groups: Groups | None = None
) -> Order:
    """Agreement of two orders; noise is the share of the smaller value by which a pair must differ to be clear.

    Raises FormatError if lengths differ, for fewer than two values or a negative noise.
    """
    s, m = _pair(simulated, measured, least=2)
    if noise < 0:
        raise FormatError(f"noise is {noise}; expected a share of at least zero")
    first, second = np.triu_indices(len(s), 1)
    if groups is not None:
        ids = _ids(groups, len(s))
        together = ids[first] == ids[second]
        first, second = first[together], second[together]
    by_s, by_m = np.sign(s[first] - s[second]), np.sign(m[first] - m[second])
    known = math.sqrt(np.count_nonzero(by_s) * np.count_nonzero(by_m))
    tau = float((by_s * by_m).sum() / known) if known else 0.0
    clear = np.abs(m[first] - m[second]) > noise * np.minimum(m[first], m[second])
    agreed = float((by_s == by_m)[clear].mean()) if clear.any() else 1.0
    return Order(max(-1.0, min(1.0, tau)), len(first), int(clear.sum()), agreed)


def regret(simulated: Sequence[float], measured: Sequence[float], n_tried: int = 1) -> float:
    """What trusting the simulator costs: the measured best of its n_tried best plans over the measured best, minus 1.

    With one tried its first choice is taken unseen; with three, three are measured and the best one is kept.
    Of equal simulated values the first counts as better. FormatError if lengths differ or nothing is tried.
    """
    s, m = _pair(simulated, measured, least=1)
    if n_tried < 1:
        raise FormatError(f"n_tried is {n_tried}; expected at least 1")
    tried = np.argsort(s, kind="stable")[:n_tried]
    return float(m[tried].min() / m.min() - 1.0)


def regrets(
    simulated: Sequence[float], measured: Sequence[float], groups: Groups, n_tried: int = 1
) -> dict[Hashable, float]:
    """`regret` of every group that has at least two plans to choose from."""
    s, m = _pair(simulated, measured, least=1)
    ids = _ids(groups, len(s))
    found: dict[Hashable, float] = {}
    for number, name in enumerate(dict.fromkeys(groups)):
        own = ids == number
        if own.sum() > 1:
            found[name] = regret(s[own].tolist(), m[own].tolist(), n_tried)
    return found


def _pair(simulated: Sequence[float], measured: Sequence[float], least: int) -> tuple[Floats, Floats]:
    s, m = np.asarray(simulated, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if s.shape != m.shape or s.ndim != 1:
        raise FormatError(f"{len(s)} simulated values for {len(m)} measured ones; expected a pair per plan")
    if len(s) < least:
        raise FormatError(f"{len(s)} values; expected at least {least}")
    if not (np.isfinite(s).all() and np.isfinite(m).all()):
        raise FormatError("some values are not finite; leave plans out that did not run")
    return s, m


def _ids(groups: Groups, n: int) -> NDArray[np.int64]:
    if len(groups) != n:
        raise FormatError(f"{len(groups)} groups for {n} values; expected one per plan")
    numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    return np.array([numbers[name] for name in groups], dtype=np.int64)
