"""Experts of one call: what each takes there, and how calibration finds out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import silu

from hwmodels.profile import Curve, Sample
from hwmodels.together import together
from runtime.devices.emulated import EmulatedDevice
from runtime.microbench import MicroBench
from runtime.native.queues import NativeBody
from runtime.rounds import Effort, finish
from tests.conftest import TinyCheckpoint
from tests.planned import spec_of


def curve(times_s: dict[tuple[int, int], float]) -> Curve:
    """An expert's times by tokens and width."""
    samples = tuple(Sample(n, 1.0, 8.0 * width, 0.0, s, s / 10, 5) for (n, width), s in times_s.items())
    return Curve("CPU", "ffn", "float32", 1, "measured", samples)


def seconds(of: Curve) -> list[float]:
    return [sample.median_s for sample in of.samples]


ALONE = curve({(n, width): float(n * width) for n in (1, 10, 100) for width in (1, 2)})


def test_an_expert_takes_its_share_of_a_call_of_several() -> None:
    # 10 and 10 tokens of width 2 take 20 s each alone, together 50: a quarter longer, at any width
    found = together(ALONE, {(10, 10): 50.0})
    assert seconds(found) == pytest.approx([1.0, 2.0, 12.5, 25.0, 125.0, 250.0])
    assert [s.spread_s for s in found.samples] == pytest.approx([s / 10 for s in seconds(found)])


def test_unequal_experts_are_held_to_what_each_takes_alone() -> None:
    # 4 and 16 tokens: 8 and 32 s alone; the factor of 80 s is that of 10 tokens, their mean
    assert seconds(together(ALONE, {(4, 16): 80.0}))[2:4] == pytest.approx([20.0, 40.0])


def test_between_calls_the_factor_runs_with_the_logarithm_and_then_stays() -> None:
    found = together(ALONE, {(100, 100): 600.0})  # 400 alone
    assert seconds(found) == pytest.approx([1.0, 2.0, 12.5, 25.0, 150.0, 300.0])
    beyond = together(ALONE, {(10, 10): 60.0})
    assert seconds(beyond)[2:] == pytest.approx([15.0, 30.0, 150.0, 300.0])


def test_without_calls_a_curve_stays_as_it_is() -> None:
    assert together(ALONE, {}) is ALONE


def test_calls_are_as_a_router_makes_them(tiny_checkpoint: TinyCheckpoint) -> None:
    spec, device = spec_of(tiny_checkpoint("mixtral")), EmulatedDevice(1 << 30)
    ffn = spec.layers[0].ffn
    try:
        calls = list(MicroBench(spec, device, silu)._calls((1, 4, 8, 12, 16, 64, 256)))
    finally:
        device.close()
    assert [sum(len(rows) for rows in call) // ffn.n_experts for call in calls] == [8, 16, 64]
    for n, call in zip((8, 16, 64), calls, strict=True):
        n_rows = n * ffn.n_experts // ffn.top_k
        assert torch.bincount(torch.cat(call), minlength=n_rows).tolist() == [ffn.top_k] * n_rows
        assert all(before < after for rows in call for before, after in pairwise(rows.tolist()))
        assert len({len(rows) for rows in call}) > 1, "some are chosen more often"


def test_there_are_no_calls_of_a_dense_mlp(tiny_checkpoint: TinyCheckpoint) -> None:
    device = EmulatedDevice(1 << 30)
    try:
        assert not list(MicroBench(spec_of(tiny_checkpoint("llama")), device, silu)._calls((1, 8, 64, 256)))
    finally:
        device.close()


def test_a_call_computes_all_its_experts_and_leaves_the_curve_its_points(tiny_checkpoint: TinyCheckpoint) -> None:
    spec, device = spec_of(tiny_checkpoint("mixtral")), EmulatedDevice(1 << 30)
    try:
        bench = MicroBench(spec, device, silu)
        (call,) = bench._calls((1, 8, 32))
        body = bench._call_bodies("CPU", call, bench.columns)()
        if isinstance(body, NativeBody):
            assert body.words[9] == len(call)
        curves = finish(bench.ffn_curves(("CPU", "GPU"), (1, 8, 32), (bench.columns,), Effort(1, 1, 0.1)))
    finally:
        device.close()
    assert [c.resource for c in curves] == ["CPU", "GPU"]
    assert all([s.n_tokens for s in c.samples] == [1, 8, 32] for c in curves)
