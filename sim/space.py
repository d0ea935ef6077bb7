"""The candidates of a search: placements x what decode steps send x what prompts send."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sim.layercost import Count, Sending
from sim.memory import memory
from sim.placement import ORDERS, Filling, Order, Unit, granule
from sim.plan import Place, Plan
from sim.policies.problem import Problem

_MANY_EXPERTS = 32
_FINEST_LEVELS, _FINEST_AHEAD = 512, 32
"""Spaces up to these sizes are searched whole, larger ones in steps and then finely around the best."""

Frame = tuple[int, Place]
"""The first layer that lives on the device, and where embedding and head live."""


@dataclass(frozen=True)
class Branch:
    """Candidates that share a frame and a filling; levels are numbers of units on the device."""

    filling: Filling
    ends: Place
    fixed_bytes: int
    levels: Count


@dataclass(frozen=True)
class Space:
    """All candidates: the branches, and the ways of sending for decode steps and for prompts."""

    branches: tuple[Branch, ...]
    decode: tuple[Sending, ...]
    prompt: tuple[Sending, ...]


def paper_space(problem: Problem) -> Space:
    """What the paper cuts: every MLP alike, by columns or by whole experts, attention on the device."""
    return _space(problem, [(unit, "even", 0, "GPU") for unit in _units(problem)])


def further_space(problem: Problem) -> Space:
    """Layers cut unlike each other, layers that live on the CPU, embedding and head on the CPU."""
    kinds: list[_Kind] = [(unit, order, 0, "GPU") for unit in _units(problem) for order in ORDERS[1:]]
    kinds += [(unit, "even", *frame) for unit in _units(problem) for frame in _frames(problem)[1:]]
    return _space(problem, kinds)


def same_space(problem: Problem, part: Branch) -> Space:
    """What one branch holds, for another machine or budget."""
    again = branch(problem, part.filling, part.ends)
    return Space(() if again is None else (again,), decode_sendings(problem), prompt_sendings(problem))


_Kind = tuple[Unit, Order, int, Place]


def _units(problem: Problem) -> tuple[Unit, ...]:
    return ("columns", "experts") if problem.spec.is_moe else ("columns",)


def _space(problem: Problem, kinds: list[_Kind]) -> Space:
    branches = [branch(problem, _filling(problem, first, unit, order), ends) for unit, order, first, ends in kinds]
    return Space(tuple(b for b in branches if b is not None), decode_sendings(problem), prompt_sendings(problem))


def _frames(problem: Problem) -> tuple[Frame, ...]:
    """First layers on the CPU, or not; the paper's frame comes first."""
    n = problem.spec.n_layers
    firsts = sorted({0, *(round(n * i / 8) for i in range(1, 8))} | {_fewest_on_cpu(problem)})
    return tuple(
        (first, ends) for first in firsts if first < n for ends in ("GPU", "CPU") if ends == "GPU" or first == 0
    )


def _fewest_on_cpu(problem: Problem) -> int:
    """How many layers must live on the CPU so that the others' attention fits on the device."""
    n = problem.spec.n_layers
    return next((first for first in range(n) if fixed_bytes(problem, first, "GPU") <= problem.vram_budget_bytes), n)


def _filling(problem: Problem, first: int, unit: Unit = "layers", order: Order = "even") -> Filling:
    return Filling(problem.spec, problem.workload, unit, order, first, problem.pins)


def _bare(problem: Problem, filling: Filling, ends: Place) -> Plan:
    return problem.plan("", filling.layers(0), problem.both(problem.tier("", 1, overlap=True)), pinned=True, ends=ends)


def fixed_bytes(problem: Problem, first: int, ends: Place) -> int:
    """Device bytes of a frame before any MLP column is there but those that are pinned."""
    return memory(problem.spec, _bare(problem, _filling(problem, first), ends)).vram_bytes


def branch(problem: Problem, filling: Filling, ends: Place) -> Branch | None:
    """The levels of a filling that fit in device and host memory; None if there are none, or pins forbid it."""
    if any(problem.pins.needs_device(layer) for layer in range(filling.first_layer)):
        return None
    need = memory(problem.spec, _bare(problem, filling, ends))
    fits = need.vram_bytes + filling.bytes_of <= problem.vram_budget_bytes
    fits &= need.host_bytes - filling.bytes_of <= problem.profile.host_bytes
    levels = np.flatnonzero(fits)
    return Branch(filling, ends, need.vram_bytes, levels) if len(levels) else None


def coarse(problem: Problem, space: Space, part: Branch) -> Branch:
    """A branch with at most a few hundred levels: evenly spaced, and the fullest for every way of sending."""
    if len(part.levels) <= _FINEST_LEVELS:
        return part
    step = -(-len(part.filling.sequence) // (_FINEST_LEVELS // 2))
    chosen = set(range(0, int(part.levels[-1]) + 1, step)) & set(part.levels.tolist())
    for sending in (*space.decode, *space.prompt):
        need = part.fixed_bytes + part.filling.bytes_of[part.levels]
        need = need + slot_bytes(problem, part.filling, part.levels, (sending,))[:, 0]
        fits = part.levels[need <= problem.vram_budget_bytes]
        chosen |= {int(fits[-1])} if len(fits) else set()
    return replace(part, levels=np.array(sorted(chosen), dtype=np.int64))


def around(part: Branch, level: int) -> Branch:
    """The levels near one level that `coarse` left out."""
    reach = -(-len(part.filling.sequence) // (_FINEST_LEVELS // 2))
    return replace(part, levels=part.levels[np.abs(part.levels - level) <= reach])


def slot_bytes(problem: Problem, filling: Filling, levels: Count, sendings: tuple[Sending, ...]) -> Count:
    """Bytes of all slots, [level, sending]; the sum of sim.memory.slot_bytes for every candidate."""
    spec, units = problem.spec, filling.per_layer(levels)
    largest = np.zeros((len(levels), len(sendings)), dtype=np.int64)
    tables: dict[object, Count] = {}
    for layer in filling.device_layers:
        kind, ahead = spec.layers[layer].ffn, tuple(s.ahead_of(layer) for s in sendings)
        key = (kind, ahead, filling.pins.of_experts(layer))
        if key not in tables:  # how many columns are sent does not depend on whose they are
            columns = kind.columns
            host = columns - filling.gg(layer)
            sent = [
                np.minimum(host, most).sum(axis=1) if s.sends_ahead else _routed_unit(host, s, columns)
                for s, most in zip(sendings, ahead, strict=True)
            ]
            tables[key] = np.stack(sent, axis=1) * spec.column_bytes(layer)
        largest = np.maximum(largest, tables[key][units[:, layer]])
    return np.asarray(largest * np.array([s.n_slots for s in sendings]))


def _routed_unit(host: Count, sending: Sending, columns: int) -> Count:
    if sending.min_tokens is None:
        return np.zeros(len(host), dtype=np.int64)
    return np.asarray(np.minimum(host, columns if sending.columns is None else sending.columns).max(axis=1))


# -- ways of sending -----------------------------------------------------------------------------------------


def _widest(problem: Problem) -> int:
    return max(la.ffn.columns for la in problem.spec.layers)


def _cuts(problem: Problem, most: int) -> list[int]:
    """At most `most` column counts above zero up to all columns, whole granules."""
    columns = _widest(problem)
    step = granule(columns)
    n = -(-columns // step)
    return sorted({min(step * -(-n * i // most), columns) for i in range(1, most + 1)})


def decode_sendings(problem: Problem) -> tuple[Sending, ...]:
    """Nothing; columns ahead; for experts also columns of routed experts, and all of those with enough tokens."""
    return _allowed(problem, _sendings(problem, problem.workload.batch))


def prompt_sendings(problem: Problem) -> tuple[Sending, ...]:
    """The same for a prompt; nothing where no step is one."""
    if problem.workload.n_prompt == 1:
        return _allowed(problem, (Sending(),))
    return _allowed(problem, _sendings(problem, problem.first_tokens))


def _allowed(problem: Problem, sendings: tuple[Sending, ...]) -> tuple[Sending, ...]:
    """Ways of sending that pins allow, or that they become: what pins say of a layer is sent ahead.

    Beside a unit that the CPU always computes nothing is sent after the router, which sends any layer's experts.
    """
    fixed = problem.pins.sent_ahead(problem.spec)
    if not fixed:
        return sendings
    streams, keeps = any(columns for _, columns in fixed), any(columns == 0 for _, columns in fixed)
    found = []
    for sending in sendings:
        if sending.min_tokens is not None:
            all_sent = sending.min_tokens == 1 and sending.columns is None
            found += [sending] if not keeps and (all_sent or not streams) else []
        elif sending.ahead or streams:
            found.append(replace(sending, n_slots=2, fixed=fixed))
        else:
            found.append(sending)
    return tuple(dict.fromkeys(found))


def _sendings(problem: Problem, n_tokens: int) -> tuple[Sending, ...]:
    kinds = [la.ffn for la in problem.spec.layers]
    routed = max(kinds, key=lambda ffn: ffn.n_experts)
    every_expert = n_tokens * routed.top_k >= routed.n_experts  # else most of what is sent ahead is not used
    found = [Sending()]
    most = _FINEST_AHEAD if not routed.is_moe else 8 if every_expert else 2
    found += [Sending(ahead=columns, n_slots=2) for columns in _cuts(problem, most)]
    if routed.is_moe:
        thresholds = sorted({1, *(2**i for i in range(1, 14) if 2**i <= n_tokens)})
        # Tables grow with experts: of many, other numbers of slots are tried around the best only (`finer`).
        slots = (2,) if n_tokens == problem.workload.batch or routed.n_experts > _MANY_EXPERTS else (2, 4)
        found += [Sending(min_tokens=t, n_slots=s) for t in thresholds for s in slots]
        parts = [c for c in _cuts(problem, 12) if c < _widest(problem)]
        found += [Sending(min_tokens=1, columns=c, n_slots=s) for c in parts for s in slots]
    return tuple(found)


def finer(problem: Problem, sending: Sending) -> tuple[Sending, ...]:
    """Ways of sending that differ in few columns or tokens from one."""
    return _allowed(problem, _finer(problem, sending))


def _finer(problem: Problem, sending: Sending) -> tuple[Sending, ...]:
    columns = _widest(problem)
    step = granule(columns)
    reach = range(-4, 5)
    if sending.ahead:
        near = {min(max(sending.ahead + k * step, step), columns) for k in reach}
        return tuple(replace(sending, ahead=a) for a in sorted(near))
    slots = sorted({sending.n_slots, 2, 4})
    if sending.columns is not None:
        near = {min(max(sending.columns + k * step, step), columns) for k in reach}
        return tuple(replace(sending, columns=c, n_slots=n) for c in sorted(near) for n in slots)
    if sending.min_tokens is not None:
        least = {max(1, round(sending.min_tokens * 2 ** (k / 4))) for k in reach}
        return tuple(replace(sending, min_tokens=t, n_slots=n) for t in sorted(least) for n in slots)
    return (sending,)
