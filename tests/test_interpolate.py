"""Interpolation over a grid: exact on nodes, bilinear between, clamped beyond."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import FormatError
from hwmodels.interpolate import LAWS, Grid

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


@st.composite
def rising_grids(draw: st.DrawFn) -> Grid:
    """Times that never fall from node to node, a law per axis."""
    nodes = st.lists(st.integers(1, 1000).map(float), min_size=1, max_size=4, unique=True).map(sorted)
    xs, ys = draw(nodes), draw(nodes)
    steps = st.lists(st.floats(0, 10), min_size=len(ys), max_size=len(ys))
    rise = np.array([draw(steps) for _ in xs]).cumsum(axis=0).cumsum(axis=1) + draw(st.floats(1e-6, 1))
    laws = draw(st.sampled_from(LAWS)), draw(st.sampled_from(LAWS))
    return Grid(tuple(xs), tuple(ys), tuple(map(tuple, rise.tolist())), laws)


@given(rising_grids(), st.lists(st.floats(1, 1100), min_size=4, max_size=4))
def test_where_nodes_never_fall_more_tokens_or_bytes_never_take_less_time(grid, at):
    (x, more_x), (y, more_y) = sorted(at[:2]), sorted(at[2:])
    assert grid.at(x, y) <= grid.at(more_x, more_y) * (1 + 1e-9)


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


# -- laws ---------------------------------------------------------------------------------------------

laws = st.tuples(st.sampled_from(LAWS), st.sampled_from(LAWS))
positive_axes = st.lists(st.integers(1, 4096).map(float), min_size=1, max_size=5, unique=True)


@given(positive_axes, positive_axes, laws, st.data())
def test_every_law_gives_a_node_its_own_value_and_stays_between_its_neighbours(xs, ys, own, data):
    nodes = list(product(xs, ys))
    values = data.draw(st.lists(st.floats(1e-6, 1e3), min_size=len(nodes), max_size=len(nodes)))
    grid = Grid.of([(x, y, value) for (x, y), value in zip(nodes, values, strict=True)], own)
    assert [grid.at(x, y) for x, y in nodes] == pytest.approx(values)
    x, y = data.draw(st.floats(1, 4096)), data.draw(st.floats(1, 4096))
    assert min(values) * (1 - 1e-9) <= grid.at(x, y) <= max(values) * (1 + 1e-9)


@pytest.mark.parametrize(("law", "between"), [("linear", 2.5), ("log", 3.0), ("power", 2.0)])
def test_a_law_says_how_time_runs_from_one_node_to_the_next(law, between):
    # 1 s at 1 and 4 or 5 s at 16; asked at 4: a fifth of the way, half of the doublings, the geometric mean
    far = {"linear": 8.5, "log": 5.0, "power": 4.0}[law]
    assert Grid.of([(1, 0, 1.0), (16, 0, far)], (law, "linear")).at(4, 0) == pytest.approx(between)


@given(
    st.lists(st.integers(1, 4096).map(float), min_size=2, max_size=5, unique=True),
    st.tuples(st.floats(0, 10), st.floats(1e-3, 10), st.floats(1e-3, 10)),
    st.lists(st.floats(1, 5), min_size=5, max_size=5),
    st.sampled_from(LAWS),
    share,
)
def test_time_over_roofline_is_at_least_the_smaller_of_the_neighbours(xs, roof, ratios, law, u):
    # lower bounds of time rest on this: a roofline is the larger of a straight line and another one
    fixed, slow, fast = roof

    def roof_s(x: float) -> float:
        return max(fixed + slow * x, fast * x)

    xs = sorted(xs)
    grid = Grid.of([(x, 0, ratio * roof_s(x)) for x, ratio in zip(xs, ratios, strict=False)], (law, "linear"))
    x = xs[0] + u * (xs[-1] - xs[0])
    low, high = max(i for i, n in enumerate(xs) if n <= x), min(i for i, n in enumerate(xs) if n >= x)
    assert grid.at(x, 0) >= min(ratios[low], ratios[high]) * roof_s(x) * (1 - 1e-9)


@pytest.mark.parametrize("law", ["log", "power"])
def test_a_logarithm_needs_an_axis_above_zero(law):
    with pytest.raises(FormatError, match=f"the law '{law}' needs an axis above zero, found a node at 0"):
        Grid.of([(0, 0, 1.0), (1, 0, 2.0)], (law, "linear"))
