"""What a better machine would give: plan anew with one figure of it changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hwmodels.profile import Curve, HardwareProfile, Resource, Sample
from sim.model import ModelSpec
from sim.plan import Plan
from sim.planner import plan
from sim.policies.problem import total_s
from sim.workload import Workload

_GIB = 2**30


@dataclass(frozen=True)
class Gain:
    """One change of a machine, the plan for it, and how many times faster a whole generation is."""

    change: str
    plan: Plan
    total_s: float
    speedup: float


def sensitivity(
    spec: ModelSpec, profile: HardwareProfile, vram_budget_bytes: int, workload: Workload, policy: str = "auto"
) -> tuple[Gain, ...]:
    """Gains of one more GiB of device memory, of a link and of CPU memory twice as fast; the best first.

    Raises PlanError if the machine as it is has no plan.
    """
    now_s = _total_s(plan(spec, profile, vram_budget_bytes, workload, policy), workload)
    larger = profile.with_(vram_bytes=max(profile.vram_bytes, vram_budget_bytes + _GIB))
    machines = {"CPU memory twice as fast": (faster_memory(profile, ("CPU",), 2.0), vram_budget_bytes)}
    if profile.has_gpu:
        machines["one more GiB of device memory"] = (larger, vram_budget_bytes + _GIB)
        machines["a link twice as fast"] = (faster_memory(profile, ("H2D", "D2H"), 2.0), vram_budget_bytes)
    gains = []
    for change, (machine, budget) in machines.items():
        made = plan(spec, machine, budget, workload, policy)
        then_s = _total_s(made, workload)
        gains.append(Gain(change, made, then_s, now_s / then_s))
    return tuple(sorted(gains, key=lambda gain: -gain.speedup))


def _total_s(made: Plan, workload: Workload) -> float:
    assert made.prediction is not None, "the planner predicts"
    return total_s(made.prediction, workload)


def faster_memory(profile: HardwareProfile, resources: tuple[Resource, ...], factor: float) -> HardwareProfile:
    """The machine with memory or a link `factor` times as fast, and arithmetic as it is.

    Measured times shrink by the factor, but not below what arithmetic at peak takes: curves keep their
    shape, so that before and after can be compared.
    """
    peaks = dict(profile.peaks)
    for name in resources:
        peaks[name] = replace(profile.peak(name), bytes_per_s=profile.peak(name).bytes_per_s * factor)
    curves = tuple(
        replace(curve, samples=tuple(map(_shrink(profile, curve, factor), curve.samples)))
        if curve.resource in resources
        else curve
        for curve in profile.curves
    )
    return profile.with_(peaks=peaks, curves=curves)


def _shrink(profile: HardwareProfile, curve: Curve, factor: float) -> Callable[[Sample], Sample]:
    peak = profile.peak(curve.resource)

    def shrink(sample: Sample) -> Sample:
        arithmetic_s = peak.roofline_s(curve.dtype, sample.flops, 0.0)
        return replace(sample, median_s=max(sample.median_s / factor, min(sample.median_s, arithmetic_s)))

    return shrink
