"""What all pictures share: a figure that needs no display and no global state, and one look."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

BLACK, GREY, LIGHT = "#222222", "#999999", "#DDDDDD"
SIMULATED, MEASURED = "#56B4E9", "#0072B2"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", BLACK, GREY)
MARKERS = "osD^vP*Xh<>"
_STYLE: dict[str, str | float | bool] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": BLACK,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "xtick.color": BLACK,
    "ytick.color": BLACK,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "lines.linewidth": 1.4,
}


class Chart(Figure):
    """A matplotlib Figure that belongs to no pyplot and that notebooks show as the value of a cell."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw with this project's look, whatever the caller's matplotlib settings are."""

    @wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        with style.context(["default", _STYLE]):
            return draw(*args, **kwargs)

    return inner


def chart(width_inches: float, height_inches: float) -> tuple[Chart, Axes]:
    """An empty chart with one pair of axes."""
    figure = Chart(figsize=(width_inches, height_inches), dpi=160, layout="constrained")
    return figure, figure.add_subplot()
