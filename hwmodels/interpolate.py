"""Interpolation of time over a rectilinear grid of measured points, a law per axis.

linear  time is a + b*x: bandwidth is linear in bytes, arithmetic in tokens. Log-space blending of such
        times is reported at four to six times the error, so this is the default.
log     time is a + b*log(x): what grows by a step with every doubling.
power   time is a*x^b: between a fixed cost and a rate, where few points cover decades.

Calibration takes the law that predicts left-out points best (hwmodels.calibrate.with_best_laws). With each of
them, time over roofline between two nodes is at least the smaller of the nodes' two ratios: the roofline rises,
is convex over x, and so is its logarithm over log(x). Lower bounds of time rest on this.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from math import log
from typing import Literal

from hwmodels.errors import FormatError

Law = Literal["linear", "log", "power"]
Laws = tuple[Law, Law]
LAWS: tuple[Law, ...] = ("linear", "log", "power")
LINEAR: Laws = ("linear", "linear")


@dataclass(frozen=True, slots=True)
class Point:
    """A value read from a grid: where (clamped to the grid), whether inside, whether on a node."""

    x: float
    y: float
    value: float
    inside: bool
    exact: bool


@dataclass(frozen=True)
class Grid:
    """Values on the product of two sorted axes; either axis may have a single node.

    Laws other than linear need axes above zero, power also values above zero.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    laws: Laws = LINEAR

    def __post_init__(self) -> None:
        for axis, law in zip((self.xs, self.ys), self.laws, strict=True):
            if law != "linear" and len(axis) > 1 and axis[0] <= 0:
                raise FormatError(f"the law {law!r} needs an axis above zero, found a node at {axis[0]:g}")

    @staticmethod
    def of(points: Iterable[tuple[float, float, float]], laws: Laws = LINEAR) -> Grid:
        """Grid of (x, y, value) points; FormatError unless every x meets every y exactly once."""
        table: dict[tuple[float, float], float] = {}
        for x, y, value in points:
            if (x, y) in table:
                raise FormatError(f"two samples at ({x:g}, {y:g}); a curve holds one per point")
            table[x, y] = value
        xs, ys = tuple(sorted({x for x, _ in table})), tuple(sorted({y for _, y in table}))
        if len(table) != len(xs) * len(ys):
            ragged = Grid._ragged(table, xs, laws)
            if ragged is not None:
                return ragged
            raise FormatError(f"samples form no grid: {len(table)} points for {len(xs)} x {len(ys)} nodes")
        return Grid(xs, ys, tuple(tuple(table[x, y] for y in ys) for x in xs), laws)

    @staticmethod
    def _ragged(table: dict[tuple[float, float], float], xs: tuple[float, ...], laws: Laws) -> Grid | None:
        """One point per x (the second axis follows the first): a curve over x alone."""
        if len(table) != len(xs):
            return None
        by_x = {x: value for (x, _), value in table.items()}
        return Grid(xs, (0.0,), tuple((by_x[x],) for x in xs), laws)

    def at(self, x: float, y: float) -> float:
        """Value at a point, clamped to the grid."""
        return self.locate(x, y).value

    def locate(self, x: float, y: float) -> Point:
        """Value at a point, and how it was reached. A single-node axis constrains nothing."""
        (x_law, y_law), values = self.laws, self.values
        i, fx, x_inside = _cell(self.xs, x, x_law)
        j, fy, y_inside = _cell(self.ys, y, y_law)
        value = _along(values[i], j, fy, y_law)
        if fx:
            value = _between(value, _along(values[i + 1], j, fy, y_law), fx, x_law)
        cx, cy = min(max(x, self.xs[0]), self.xs[-1]), min(max(y, self.ys[0]), self.ys[-1])
        return Point(cx, cy, value, x_inside and y_inside, fx == 0.0 and fy == 0.0)


def _cell(axis: tuple[float, ...], x: float, law: Law) -> tuple[int, float, bool]:
    """Index of the node at or below x, the fraction towards the next, whether x lies on the axis."""
    if len(axis) == 1:
        return 0, 0.0, True
    if x <= axis[0]:
        return 0, 0.0, x == axis[0]
    if x >= axis[-1]:
        return len(axis) - 1, 0.0, x == axis[-1]
    i = bisect_right(axis, x) - 1
    low, high = axis[i], axis[i + 1]
    fraction = (x - low) / (high - low) if law == "linear" else log(x / low) / log(high / low)
    return i, fraction, True


def _along(row: tuple[float, ...], j: int, fraction: float, law: Law) -> float:
    return row[j] if fraction == 0.0 else _between(row[j], row[j + 1], fraction, law)


def _between(low: float, high: float, fraction: float, law: Law) -> float:
    return float(low * (high / low) ** fraction) if law == "power" else low + fraction * (high - low)
