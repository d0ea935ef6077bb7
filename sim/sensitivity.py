"""What a better machine would give: decide anew with one figure of it changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from hwmodels.profile import Curve, HardwareProfile, Resource, Sample
from sim.plan import Plan
from sim.policies.decision import Decision
from sim.policies.problem import Problem

_GIB = 2**30


@dataclass(frozen=True)
class Gain:
    """One change of a machine, the plan for it, and how many times faster a whole generation is."""

    change: str
    plan: Plan
    total_s: float
    speedup: float


def sensitivity(problem: Problem, decision: Decision) -> tuple[Gain, ...]:
    """Gains of one more GiB of device memory, of a link and of CPU memory twice as fast; the best first.

    On each machine the rule that made the plan decides anew, and the plan as it is stays a choice. What other
    rules would make of the machine is not asked: it may be more.
    """
    profile, budget = problem.profile, problem.vram_budget_bytes
    now_s = problem.tried([lambda: decision.plan])[0].total_s
    larger = profile.with_(vram_bytes=max(profile.vram_bytes, budget + _GIB))
    machines = {"CPU memory twice as fast": (faster_memory(profile, ("CPU",), 2.0), budget)}
    if profile.has_gpu:
        machines["one more GiB of device memory"] = (larger, budget + _GIB)
        machines["a link twice as fast"] = (faster_memory(profile, ("H2D", "D2H"), 2.0), budget)
    gains = []
    for change, (machine, n_bytes) in machines.items():
        then = replace(problem, profile=machine, vram_budget_bytes=n_bytes)
        best = then.tried([partial(_same, decision.plan, n_bytes), partial(decision.again, then)])[0]
        gains.append(Gain(change, best.plan, best.total_s, now_s / best.total_s))
    return tuple(sorted(gains, key=lambda gain: -gain.speedup))


def _same(plan: Plan, vram_budget_bytes: int) -> Plan:
    return replace(plan, vram_budget_bytes=vram_budget_bytes)


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
