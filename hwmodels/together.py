"""Experts that one call computes together: each takes longer than in a call of its own.

A layer's experts find their rows scattered among those of all tokens, add their results to sums of all of them, and
drive each other's rows and results from the caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

from hwmodels.interpolate import Grid
from hwmodels.profile import Curve

Tokens = tuple[int, ...]
"""How many tokens each of a call's experts has."""


def together(alone: Curve, calls_s: Mapping[Tokens, float]) -> Curve:
    """A curve of experts in calls of their own as what each takes of a call of several.

    calls_s are seconds of such calls, by the tokens of their experts, of the widest that the curve knows. What they
    take over what the curve says of their experts one by one is a factor of their mean number of tokens: of one token,
    where memory alone decides, it is 1, between two calls it runs with the logarithm, and beyond the last it stays.
    Widths have it in common. Counts beyond the curve's are not to be among a call's.

    >>> from hwmodels.profile import Sample
    >>> one, eight = (Sample(n, 1.0, 4.0, 0.0, n * 1e-3, 0.0, 3) for n in (1, 8))
    >>> alone = Curve("CPU", "ffn", "float32", 1, "measured", (one, eight))
    >>> [round(s.median_s, 6) for s in together(alone, {(8, 8): 20e-3}).samples]  # 16 ms one by one
    [0.001, 0.01]
    """
    if not calls_s:
        return alone
    widest = alone.grid.ys[-1]
    factors = {1.0: 1.0}
    for tokens, seconds in calls_s.items():
        factors[fmean(tokens)] = seconds / sum(alone.grid.at(n, widest) for n in tokens if n)
    over = Grid.of([(n, 0.0, factor) for n, factor in factors.items()], ("log", "linear"))
    times = [(s, over.at(s.n_tokens, 0.0)) for s in alone.samples]
    return replace(
        alone, samples=tuple(replace(s, median_s=s.median_s * by, spread_s=s.spread_s * by) for s, by in times)
    )
