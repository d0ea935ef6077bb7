"""How good a plan is proven to be, and what would make it better: for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from sim.bounds import Bound
from sim.rows import Row
from sim.search import Certificate
from sim.sensitivity import Gain


class WhatIf(TypedDict):
    """A change of the machine and how many times faster a generation would be."""

    change: str
    speedup: float


def proof_words(certificate: Certificate | None, gains: Sequence[Gain]) -> str:
    """What was searched, what is left of it, and what a better machine would give; plain text."""
    lines = [] if certificate is None else ["Search", *_search_words(certificate)]
    told = ", ".join(f"{gain.change} {gain.speedup:.2f}x" for gain in gains)
    return "\n".join([*lines, "What would help (a whole generation by the same rule)", f"  {told}"])


def _search_words(certificate: Certificate) -> list[str]:
    c = certificate
    counts = f"  {c.n_candidates} candidates: {c.n_pruned} pruned by their bound, {c.n_simulated} simulated"
    if c.n_left == 0:
        return [f"{counts}, 0 left: the plan is proven the best of them"]
    return [f"{counts}, {c.n_left} left; none of these can save more than {c.gap:.2%} of the time"]


def proof_keys(certificate: Certificate | None, limit: Bound, gains: Sequence[Gain]) -> Row:
    """The same as keys of a row, with what the hardware's bound rests on."""
    what_if: list[WhatIf] = [{"change": gain.change, "speedup": gain.speedup} for gain in gains]
    return {
        "search": None
        if certificate is None
        else {
            "candidates": certificate.n_candidates,
            "pruned": certificate.n_pruned,
            "simulated": certificate.n_simulated,
            "left": certificate.n_left,
            "gap": certificate.gap,
        },
        "bound_binds": {"prefill": limit.prefill_binds, "decode": limit.decode_binds},
        "what_if": what_if,
    }
