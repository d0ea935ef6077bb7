"""Sizes and durations as people write and read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.errors import FormatError
from hwmodels.units import format_bytes, format_number, format_seconds, parse_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("8GiB", 8 * 2**30), ("8000MiB", 8000 * 2**20), ("500MB", 500 * 10**6), ("1.5 GiB", 3 * 2**29), ("64", 64)],
)
def test_a_size_is_read_with_its_unit(text, n_bytes):
    assert parse_size(text) == n_bytes


def test_units_are_read_in_any_case():
    assert parse_size("2gib") == parse_size("2GIB") == parse_size("2GiB")


def test_a_plain_number_is_bytes():
    assert parse_size(1e9) == parse_size(10**9) == 10**9


@pytest.mark.parametrize("text", ["", "GiB", "eight GiB", "8 Gibibyte", "8GiB/s", "-1GiB", "0x10", None, True])
def test_what_is_no_size_is_refused_and_quoted(text):
    with pytest.raises(FormatError, match=r"vram budget: .*write it like 8GiB") as error:
        parse_size(text, "vram budget")
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("value", [-1, -0.5, math.nan, math.inf, "1e999"])
def test_a_size_is_finite_and_not_negative(value):
    with pytest.raises(FormatError, match="finite number of bytes, zero or more"):
        parse_size(value)


@given(st.integers(0, 2**50))
def test_a_printed_size_reads_back_to_three_digits(n_bytes):
    assert parse_size(format_bytes(n_bytes)) == pytest.approx(n_bytes, rel=0.006, abs=0.5)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (2**30 - 1, "1024 MiB"),
        (2**30, "1.00 GiB"),
        (2**41, "2.00 TiB"),
    ],
)
def test_sizes_are_printed_in_binary_units(n_bytes, text):
    assert format_bytes(n_bytes) == text


@given(st.floats(1e-3, 1e12))
def test_a_printed_number_has_three_digits_and_no_exponent(value):
    text = format_number(value)
    assert "e" not in text
    assert float(text) == pytest.approx(value, rel=0.0051)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.3e-6, "12.3 µs"), (0.0123, "12.3 ms"), (0.9996, "1000 ms"), (1.5, "1.50 s"), (3600, "3600 s"), (0, "0.00 µs")],
)
def test_durations_are_printed_in_the_unit_that_fits(seconds, text):
    assert format_seconds(seconds) == text
