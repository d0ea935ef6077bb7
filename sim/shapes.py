"""Sizes of well-known models by name, so that nothing need be downloaded to plan for them.

The configs are in figures/*.json, reduced to what decides sizes, each with its source.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from hwmodels.errors import ModelError
from hwmodels.schema import from_json, read_json
from sim.model import ModelSpec, from_config

_FOLDER = Path(__file__).parent / "figures"
_NEAREST = 3

SOURCES = {
    "config": "the published config.json, as copied in aiconfigurator's source",
    "maxtext": "the model's description in MaxText",
    "copy": "a copy of the published config.json in public tests or notes",
    "recall": "memory, not checked against the publication",
}


@dataclass(frozen=True)
class Shape:
    """A model's sizes: its config, reduced; where they come from; the published billions of parameters."""

    billions: float | None
    source: Literal["config", "maxtext", "copy", "recall"]
    config: dict[str, Any]
    note: str = ""


@cache
def shapes() -> dict[str, Shape]:
    """All built-in shapes by name: models with experts first, then dense ones."""
    return {
        name: from_json(Shape, value, f"{table}.json: {name}")
        for table in ("moe", "dense")
        for name, value in read_json(_FOLDER / f"{table}.json", "table of model shapes").items()
    }


def names() -> list[str]:
    """Names that `shape` knows."""
    return list(shapes())


def shape(name: str, dtype: str = "bfloat16") -> ModelSpec:
    """Sizes of a built-in model; dtype "auto" is bfloat16.

    >>> f"{shape('mixtral-8x7b').n_params / 1e9:.1f} billion parameters"
    '46.7 billion parameters'

    Raises ModelError for an unknown name, listing the nearest and all.
    """
    if name not in shapes():
        raise ModelError(unknown(name))
    return from_config(shapes()[name].config, name, "bfloat16" if dtype == "auto" else dtype)


def unknown(name: str) -> str:
    """What to say of a name that is no built-in shape: the nearest ones, and all."""
    near = difflib.get_close_matches(name.lower(), names(), n=_NEAREST, cutoff=0.5)
    nearest = f"nearest are {', '.join(near)}; " if near else ""
    return f"no built-in model {name!r}; {nearest}all are {', '.join(names())}"
