"""Bilinear interpolation of time over a rectilinear grid of measured points.

Times of memory- and compute-bound kernels are close to a + b*x + c*y + d*x*y between neighbours
(bandwidth: linear in bytes; arithmetic: linear in tokens x bytes), so time itself is interpolated, not
its logarithm: log-space blending is reported at four to six times the error of linear blending.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from hwmodels.errors import FormatError


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
    """Values on the product of two sorted axes; either axis may have a single node."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]

    @staticmethod
    def of(points: Iterable[tuple[float, float, float]]) -> Grid:
        """Grid of (x, y, value) points; FormatError unless every x meets every y exactly once."""
        table: dict[tuple[float, float], float] = {}
        for x, y, value in points:
            if (x, y) in table:
                raise FormatError(f"two samples at ({x:g}, {y:g}); a curve holds one per point")
            table[x, y] = value
        xs, ys = tuple(sorted({x for x, _ in table})), tuple(sorted({y for _, y in table}))
        if len(table) != len(xs) * len(ys):
            ragged = Grid._ragged(table, xs)
            if ragged is not None:
                return ragged
            raise FormatError(f"samples form no grid: {len(table)} points for {len(xs)} x {len(ys)} nodes")
        return Grid(xs, ys, tuple(tuple(table[x, y] for y in ys) for x in xs))

    @staticmethod
    def _ragged(table: dict[tuple[float, float], float], xs: tuple[float, ...]) -> Grid | None:
        """One point per x (the second axis follows the first): a curve over x alone."""
        if len(table) != len(xs):
            return None
        by_x = {x: value for (x, _), value in table.items()}
        return Grid(xs, (0.0,), tuple((by_x[x],) for x in xs))

    def at(self, x: float, y: float) -> float:
        """Value at a point, clamped to the grid."""
        return self.locate(x, y).value

    def locate(self, x: float, y: float) -> Point:
        """Value at a point, and how it was reached. A single-node axis constrains nothing."""
        i, fx, x_inside = _cell(self.xs, x)
        j, fy, y_inside = _cell(self.ys, y)
        low = _mix(self.values[i], j, fy)
        value = low if fx == 0.0 else low + fx * (_mix(self.values[i + 1], j, fy) - low)
        cx, cy = min(max(x, self.xs[0]), self.xs[-1]), min(max(y, self.ys[0]), self.ys[-1])
        return Point(cx, cy, value, x_inside and y_inside, fx == 0.0 and fy == 0.0)


def _cell(axis: tuple[float, ...], x: float) -> tuple[int, float, bool]:
    """Index of the node at or below x, the fraction towards the next, whether x lies on the axis."""
    if len(axis) == 1:
        return 0, 0.0, True
    if x <= axis[0]:
        return 0, 0.0, x == axis[0]
    if x >= axis[-1]:
        return len(axis) - 1, 0.0, x == axis[-1]
    i = bisect_right(axis, x) - 1
    return i, (x - axis[i]) / (axis[i + 1] - axis[i]), True


def _mix(row: tuple[float, ...], j: int, f: float) -> float:
    return row[j] if f == 0.0 else row[j] + f * (row[j + 1] - row[j])
