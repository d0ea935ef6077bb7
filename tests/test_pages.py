"""Weights ask for large pages, and take no byte more for it."""

from __future__ import annotations

import mmap

import pytest
import torch

from runtime import pages
from runtime.devices import open_device
from runtime.pages import PAGE_BYTES, large_pages


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda at, n, how: found.append((at.value, n.value, how.value)))
    return found


@pytest.mark.parametrize("n_bytes", [5 * PAGE_BYTES, 5 * PAGE_BYTES + 64, 2 * PAGE_BYTES - 1])
def test_whole_large_pages_inside_a_tensor_are_asked_for(asked, n_bytes):
    values = large_pages(torch.empty(n_bytes, dtype=torch.uint8))
    first, last = values.data_ptr(), values.data_ptr() + n_bytes
    for at, n, how in asked:
        assert (at % PAGE_BYTES, n % PAGE_BYTES, how) == (0, 0, mmap.MADV_HUGEPAGE)
        assert at - first in range(PAGE_BYTES)
        assert last - (at + n) in range(PAGE_BYTES)
    assert len(asked) == 1 or n_bytes < 2 * PAGE_BYTES


@pytest.mark.parametrize("n_bytes", [0, 1, PAGE_BYTES - 1])
def test_what_is_smaller_than_a_large_page_asks_for_none(asked, n_bytes):
    large_pages(torch.empty(n_bytes, dtype=torch.uint8))
    assert asked == []


def test_a_system_without_such_pages_leaves_a_tensor_as_it_is(monkeypatch):
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    values = torch.empty(4 * PAGE_BYTES, dtype=torch.uint8)
    assert large_pages(values) is values


def test_slabs_of_weights_ask_for_large_pages(asked):
    device = open_device("emulated", 64 * PAGE_BYTES, 1)
    try:
        sizes = [4 * PAGE_BYTES, 6 * PAGE_BYTES]
        device.host_slab(sizes[0], torch.uint8, False)
        device.allocate(sizes[1], torch.uint8, "weights")
    finally:
        device.close()
    assert all(n >= size - PAGE_BYTES for (_, n, _), size in zip(asked, sizes, strict=True))
