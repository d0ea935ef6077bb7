"""The hardware's limit for plans of one kind: those that run as a given plan does."""

from __future__ import annotations

from hwmodels.profile import HardwareProfile
from hwmodels.threads import with_threads
from sim.bounds import Bound, bound
from sim.model import ModelSpec
from sim.plan import Plan
from sim.workload import Workload

Kind = tuple[bool, int | None, int | None]


def kind_of(plan: Plan) -> Kind:
    """What a limit depends on beside machine, model and workload: expert cache or not, chunks, CPU threads."""
    return plan.cache is not None, plan.chunk_tokens, plan.cpu_threads


def limit_of(
    spec: ModelSpec, profile: HardwareProfile, vram_budget_bytes: int, workload: Workload, kind: Kind
) -> Bound:
    """What no plan of that kind beats (sim.bounds)."""
    cached, chunk_tokens, cpu_threads = kind
    machine = with_threads(profile, spec.dtype, cpu_threads)
    return bound(spec, machine, vram_budget_bytes, workload, cached, chunk_tokens)
