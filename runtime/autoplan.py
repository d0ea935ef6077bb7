"""A plan without being told how: this machine's profile, a default budget, the planner's choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hwmodels.catalog import hardware
from hwmodels.machine import differences, fingerprint
from hwmodels.profile import HardwareProfile
from hwmodels.units import format_bytes
from runtime import native
from runtime.budget import default_vram_budget
from runtime.cache import cached_profile, kept_profile, profile_path
from runtime.devices import device_name
from sim import planner
from sim.model import ModelSpec
from sim.pins import Pin
from sim.plan import Plan
from sim.workload import Workload

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Request:
    """What is known of a run to plan; None leaves a choice to `choose_plan`.

    hardware  name or file of a profile, None for this machine's own
    """

    folder: Path
    spec: ModelSpec
    workload: Workload
    policy: str = "auto"
    device: str = "auto"
    vram_budget_bytes: int | None = None
    host_budget_bytes: int | None = None
    hardware: str | None = None
    cpu_threads: int | None = None
    pins: tuple[Pin, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A plan, and what it was made for."""

    plan: Plan
    profile: HardwareProfile
    vram_budget_bytes: int


def choose_plan(request: Request, progress: bool, tell: Tell) -> Choice:
    """Profile, budget and plan of a request; `tell` hears what was chosen, a line each.

    Measures this machine quickly if no profile of it is cached. Raises PlanError if nothing fits.
    """
    profile = choose_profile(request, progress, tell)
    budget = choose_budget(request, tell)
    plan = planner.plan(request.spec, profile, budget, request.workload, request.policy, request.pins)
    tell(f"plan: {plan.policy} {plan.id}, for {format_bytes(budget)} on the {profile.device} device")
    return Choice(plan, profile, budget)


def choose_budget(request: Request, tell: Tell) -> int:
    """Bytes of device memory: as asked, or a default that `tell` hears of."""
    if request.vram_budget_bytes is not None:
        return request.vram_budget_bytes
    budget = default_vram_budget(request.spec, request.workload, request.device)
    tell(f"device memory: {format_bytes(budget)} (--vram-budget was not given)")
    return budget


def choose_profile(request: Request, progress: bool, tell: Tell) -> HardwareProfile:
    """The profile that was named, or this machine's; a profile of another machine is not used in silence."""
    if request.hardware is None:
        profile = _own_profile(request, progress)
    else:
        profile = hardware(request.hardware)
        for warning in mismatches(profile, request.device):
            tell(f"warning: profile {profile.name} is not of this machine: {warning}")
    if request.host_budget_bytes is not None:
        profile = profile.with_(host_bytes=request.host_budget_bytes)
    return profile


def _own_profile(request: Request, progress: bool) -> HardwareProfile:
    """The thorough calibration if a usable one is cached, else the quick one, measured now if need be."""
    folder, device, threads, dtype = request.folder, request.device, request.cpu_threads, request.spec.dtype
    thorough = kept_profile(profile_path(folder, device, False, threads, dtype))
    return thorough or cached_profile(folder, device, True, threads, progress, dtype=dtype)


def mismatches(profile: HardwareProfile, device: str) -> list[str]:
    """What tells a profile's machine and device from those that will run."""
    kind = device_name(device).partition(":")[0]
    found = differences(profile.fingerprint, {**fingerprint(), "kernels": native.describe()})
    if profile.device != kind:
        found.append(f"device: {profile.device} there, {kind} here")
    return found
