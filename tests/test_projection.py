"""Dense projections by the native kernel: what they compute, when, and on how many threads."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from runtime import native
from runtime.devices.emulated import EmulatedDevice
from runtime.projection import FEW_ROWS, Projection, computes_step, project

KERNEL = native.kernel()
needs_kernel = pytest.mark.skipif(KERNEL is None, reason="no native kernel")
DTYPES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def projection(n_in: int, n_out: int, dtype: torch.dtype, bias: bool = True) -> Projection:
    layer = nn.Linear(n_in, n_out, bias=bias, dtype=dtype).requires_grad_(False)
    layer.__class__ = Projection
    assert isinstance(layer, Projection)
    return layer


@needs_kernel
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 300),
    n_in=st.integers(1, 200),
    n_out=st.integers(1, 300),
    dtype=st.sampled_from(list(DTYPES)),
    bias=st.booleans(),
    n_threads=st.integers(1, 3),
)
def test_a_projection_is_a_sum_in_float32_rounded_once(
    rows: int, n_in: int, n_out: int, dtype: torch.dtype, bias: bool, n_threads: int
) -> None:
    assert KERNEL is not None
    x, layer = torch.randn(rows, n_in).to(dtype), projection(n_in, n_out, dtype, bias)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    native.set_threads(n_threads)
    try:
        for isa in KERNEL.isas:
            torch.testing.assert_close(
                KERNEL.linear(x, layer.weight, layer.bias, isa).double(), exact, atol=DTYPES[dtype], rtol=DTYPES[dtype]
            )
    finally:
        native.set_threads(0)


@needs_kernel
def test_projections_in_one_call_are_those_of_each_and_a_listener_still_hears() -> None:
    x, layers = torch.randn(1, FEW_ROWS, 96).bfloat16(), [projection(96, n, torch.bfloat16) for n in (70, 4, 36)]
    heard: list[nn.Module] = []
    apart = [layer(x) for layer in layers]
    assert all(map(torch.equal, project(layers, x), apart))
    layers[1].register_forward_hook(lambda module, *_: heard.append(module))
    assert all(map(torch.equal, project(layers, x), apart))
    assert heard == [layers[1]]


@needs_kernel
def test_a_row_is_projected_to_the_same_bits_alone_and_among_others() -> None:
    x, layer = torch.randn(1, FEW_ROWS, 96).bfloat16(), projection(96, 70, torch.bfloat16)
    together = layer(x)
    assert together.shape == (1, FEW_ROWS, 70)
    for i in range(FEW_ROWS):
        assert torch.equal(layer(x[:, i : i + 1]), together[:, i : i + 1])


def test_torch_projects_prompts_and_what_needs_gradients() -> None:
    layer = projection(64, 64, torch.float32)
    x = torch.randn(FEW_ROWS + 1, 64)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.requires_grad_(True)
    assert layer(x[:1].requires_grad_()).requires_grad


@torch.no_grad()
def test_torch_projects_what_lies_with_gaps_or_elsewhere() -> None:
    layer, x = projection(64, 64, torch.float32), torch.randn(1, 64)
    layer.bias = nn.Parameter(torch.ones(1).expand(64))
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.weight.data, layer.bias = layer.weight.data.t(), None
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))
    assert layer.to("meta")(x.to("meta")).shape == (1, 64)


def test_without_the_kernel_torch_projects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCHEINFER_KERNEL", "torch")
    layer, x = projection(64, 64, torch.bfloat16), torch.randn(1, 64).bfloat16()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not computes_step(1)


@needs_kernel
def test_in_small_steps_on_the_cpu_the_kernel_alone_takes_the_threads() -> None:
    n_before, n_cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    device = EmulatedDevice(1 << 20, cpu_threads=n_cores)
    try:
        with device.driving():
            device.work_at("CPU", by_kernel=computes_step(1))
            assert (torch.get_num_threads(), native.threads()) == (1, n_cores)
            device.work_at("CPU", by_kernel=computes_step(FEW_ROWS + 1))
            assert (torch.get_num_threads(), native.threads()) == (n_cores, n_cores)
            device.work_at("GPU", by_kernel=False)
            assert (torch.get_num_threads(), native.threads()) == (1, 1)
        assert (torch.get_num_threads(), native.threads()) == (n_before, n_before)
    finally:
        device.close()
