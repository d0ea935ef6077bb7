"""Modules of a model that were read once: whether all is as it was read, asked before every step.

A model of 22 layers has 200 such modules and as many weights, and a step of few tokens asks of all of them. Each
question is put to all at once, in loops that the interpreter does not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat
from operator import contains, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks

_address: Callable[[Any], int] = Tensor.data_ptr
_strides: Callable[[Any], tuple[int, ...]] = Tensor.stride
_before, _after = itemgetter("_forward_pre_hooks"), itemgetter("_forward_hooks")
Link = tuple[dict[str, Any], str, nn.Module]
"""Modules of an owner, the name of one, the module."""
Value = tuple[dict[str, Any], str, int]
"""Parameters of a module, the name of one, its address; 0 for none."""
Fact = tuple[object, str, object]
"""Owner, name of an attribute, value; None for none."""


@dataclass(frozen=True)
class Watch:
    """What was read, and in columns what is compared with it."""

    links: tuple[Link, ...]
    values: tuple[Value, ...]
    facts: tuple[Fact, ...]
    _modules: tuple[tuple[dict[str, Any], ...], tuple[str, ...], list[nn.Module]]
    _states: tuple[dict[str, Any], ...]
    _present: tuple[tuple[dict[str, Any], ...], tuple[str, ...], list[int], list[tuple[int, ...]]]
    _absent: tuple[tuple[dict[str, Any], ...], tuple[str, ...]]
    _facts: tuple[tuple[object, ...], tuple[str, ...], list[object]]

    @staticmethod
    def of(links: Iterable[Link], values: Iterable[Value], facts: Iterable[Fact]) -> Watch:
        """Of what was read just now."""
        links, values = tuple(links), tuple(values)
        facts = tuple({(id(owner), name): (owner, name, value) for owner, name, value in facts}.values())
        parents, names, modules = _columns(links, 3)
        present = _columns([value for value in values if value[2]], 3)
        absent = _columns([value for value in values if not value[2]], 3)
        owners, attributes, found = _columns(facts, 3)
        return Watch(
            links,
            values,
            facts,
            (parents, names, list(modules)),
            tuple(module.__dict__ for module in modules),
            (present[0], present[1], list(present[2]), list(map(_strides, map(dict.get, *present[:2])))),
            (absent[0], absent[1]),
            (owners, attributes, list(found)),
        )

    @staticmethod
    def of_all(several: Iterable[Watch]) -> Watch:
        """One that asks what all of them ask."""
        several = tuple(several)
        links = (link for one in several for link in one.links)
        values = (value for one in several for value in one.values)
        return Watch.of(links, values, (fact for one in several for fact in one.facts))

    def holds(self) -> bool:
        """Whether all is as it was read, and nobody listens to a part of it or computes it otherwise."""
        parents, names, modules = self._modules
        if list(map(dict.get, parents, names)) != modules:
            return False
        states = self._states
        if any(map(_before, states)) or any(map(_after, states)) or any(map(contains, states, repeat("forward"))):
            return False
        owners, names, addresses, strides = self._present
        now = list(map(dict.get, owners, names))
        try:  # a weight transposed in place is where it was
            if list(map(_address, now)) != addresses or list(map(_strides, now)) != strides:
                return False
        except TypeError:  # there is none now
            return False
        if any(value is not None for value in map(dict.get, *self._absent)):
            return False
        of, attributes, found = self._facts
        same = list(map(getattr, of, attributes, repeat(None))) == found
        return same and not hooks._has_any_global_hook()  # type: ignore[no-untyped-call]


def _columns(rows: Iterable[tuple[Any, ...]], n: int) -> tuple[Any, ...]:
    return tuple(zip(*rows, strict=True)) or ((),) * n
