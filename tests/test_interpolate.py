"""Interpolation over a grid: exact on nodes, bilinear between, clamped beyond."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import FormatError
from hwmodels.interpolate import Grid

numbers = st.integers(0, 1000).map(float)
axes = st.lists(numbers, min_size=1, max_size=5, unique=True)
share = st.floats(0, 1)


@st.composite
def grids(draw: st.DrawFn) -> dict[tuple[float, float], float]:
    nodes = list(product(draw(axes), draw(axes)))
    values = draw(st.lists(st.floats(1e-6, 1e3), min_size=len(nodes), max_size=len(nodes)))
    return dict(zip(nodes, values, strict=True))


def grid_of(table: dict[tuple[float, float], float]) -> Grid:
    return Grid.of([(x, y, value) for (x, y), value in table.items()])


@given(grids())
def test_a_node_gives_its_own_value(table):
    grid = grid_of(table)
    for (x, y), value in table.items():
        point = grid.locate(x, y)
        assert (point.value, point.inside, point.exact) == (value, True, True)


@given(axes, axes, st.tuples(numbers, numbers, numbers, numbers), share, share)
def test_a_bilinear_surface_is_met_everywhere_inside(xs, ys, abcd, u, v):
    # a + bx + cy + dxy: what bandwidth- and arithmetic-bound times look like between neighbours
    a, b, c, d = abcd

    def surface(x: float, y: float) -> float:
        return a + b * x + c * y + d * x * y

    grid = Grid.of([(x, y, surface(x, y)) for x, y in product(xs, ys)])
    x, y = min(xs) + u * (max(xs) - min(xs)), min(ys) + v * (max(ys) - min(ys))
    assert grid.at(x, y) == pytest.approx(surface(x, y), rel=1e-9, abs=1e-9)
    assert grid.locate(x, y).inside


@given(grids(), st.floats(-100, 1100), st.floats(-100, 1100))
def test_no_value_lies_beyond_the_largest_and_the_smallest_node(table, x, y):
    value = grid_of(table).at(x, y)
    assert min(table.values()) * (1 - 1e-9) <= value <= max(table.values()) * (1 + 1e-9)


@given(grids(), st.floats(1, 1e6))
def test_beyond_the_grid_the_border_holds(table, far):
    grid = grid_of(table)
    x, y = max(x for x, _ in table), max(y for _, y in table)
    point = grid.locate(x + far, y + far)
    assert (point.x, point.y, point.value) == (x, y, table[x, y])
    assert point.inside == (len(grid.xs) == 1 and len(grid.ys) == 1)  # an axis of one node constrains nothing


def test_halfway_between_four_nodes_is_their_mean():
    assert grid_of({(0, 0): 1.0, (0, 2): 2.0, (2, 0): 3.0, (2, 2): 6.0}).at(1, 1) == 3.0


def test_points_along_a_diagonal_are_a_curve_over_their_first_axis():
    diagonal = grid_of({(1, 10): 1.0, (2, 20): 2.0, (4, 40): 4.0})
    assert diagonal.at(3, 30) == 3.0


def test_the_same_point_twice_is_refused():
    with pytest.raises(FormatError, match=r"two samples at \(1, 2\)"):
        Grid.of([(1, 2, 0.5), (1, 2, 0.6)])


def test_points_that_form_no_grid_are_refused():
    with pytest.raises(FormatError, match="samples form no grid: 3 points for 2 x 2 nodes"):
        Grid.of([(1, 1, 1.0), (1, 2, 1.0), (2, 1, 1.0)])
