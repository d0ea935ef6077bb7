"""fiddler: popular experts on the GPU; others go to the CPU with few tokens, are copied over with many.

Source: Fiddler, arXiv 2402.07033 (ICLR 2025), efeslab/fiddler src/fiddler/mixtral.py at 227715b.
Placement: all but the experts on the device; experts in order of offline popularity until it is full; static.
Bytes over PCIe: a host expert's weights where it has at least n* tokens, activations where it has fewer.
Compute site: device experts and copied experts on the GPU, the others on the CPU.
Dispatch rule: per expert, the cheaper of CPU time and copy + GPU time. The source minimises the sum over
    experts, which is the same as one decision each.
Overlap: none: GPU experts, then copied experts, then CPU experts; copies are blocking, from pageable memory.
Cache and prefetch: one placeholder on the device, refilled for each copied expert; nothing is kept.
Derived by us: the source hard-codes 7 ms per token on the CPU and 70 ms per copy, so n* = 10; here n* is the
    smallest token count at which this machine's profile makes the copy cheaper. It gets the whole budget,
    not 95 % of it. A dense MLP counts as one expert.
"""

from __future__ import annotations

from functools import partial

from hwmodels.profile import HardwareProfile
from hwmodels.work import copy
from sim.model import ModelSpec
from sim.placement import Filling
from sim.plan import Plan
from sim.policies.problem import Problem
from sim.workload import Workload

NAME = "fiddler"


def propose(spec: ModelSpec, profile: HardwareProfile, vram_budget_bytes: int, workload: Workload) -> Plan:
    """Static popularity placement and the measured crossover; PlanError if the placeholder does not fit."""
    problem = Problem(spec, profile, vram_budget_bytes, workload)
    problem.need_gpu(NAME)
    threshold = crossover_tokens(spec, profile, problem.prompt_tokens)
    sends = problem.tier("", 1, overlap=False, stream_min_tokens=threshold, n_slots=1 if threshold else 0)
    filling = Filling(spec, workload, "experts", "even")
    tiers = problem.both(sends)
    return problem.fullest(filling, partial(problem.plan, NAME, tiers=tiers, pinned=False))


def crossover_tokens(spec: ModelSpec, profile: HardwareProfile, most_tokens: int) -> int | None:
    """Fewest tokens at which copying an expert and computing it on the GPU beats the CPU; None if none do.

    Found by bisection: CPU time grows with tokens faster than GPU time where it matters.
    """
    layer = max(range(spec.n_layers), key=lambda i: spec.layers[i].ffn.n_experts)
    columns = spec.layers[layer].ffn.columns
    copy_s = profile.time_s("H2D", copy(columns * spec.column_bytes(layer), spec.dtype, pinned=False)).seconds

    def copying_wins(n_tokens: int) -> bool:
        demand = spec.ffn_work(layer, n_tokens, columns)
        return copy_s + profile.time_s("GPU", demand).seconds < profile.time_s("CPU", demand).seconds

    if not copying_wins(most_tokens):
        return None
    low, high = 0, most_tokens
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if copying_wins(middle) else (middle, high)
    return high
