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
from torch.utils.hooks import RemovableHandle

_address: Callable[[Any], int] = Tensor.data_ptr
_strides: Callable[[Any], tuple[int, ...]] = Tensor.stride
_length: Callable[[Any], int] = len
_before, _after = itemgetter("_forward_pre_hooks"), itemgetter("_forward_hooks")
Link = tuple[dict[str, Any], str, nn.Module]
"""Modules of an owner, the name of one, the module."""
Value = tuple[dict[str, Any], str, int]
"""Parameters of a module, the name of one, its address; 0 for none."""
Fact = tuple[object, str, object]
"""Owner, name of an attribute, value; None for none."""
Own = tuple[dict[str, Any], list[Callable[..., Any]], list[Callable[..., Any]]]
"""Attributes of a module, and what listened to it, before and after, when the model was made."""


@dataclass(frozen=True)
class Watch:
    """What was read, and in columns what is compared with it."""

    links: tuple[Link, ...]
    values: tuple[Value, ...]
    facts: tuple[Fact, ...]
    entered: tuple[Own, ...]
    _modules: tuple[tuple[dict[str, Any], ...], tuple[str, ...], list[nn.Module]]
    _states: tuple[dict[str, Any], ...]
    _present: tuple[tuple[dict[str, Any], ...], tuple[str, ...], list[int], list[tuple[int, ...]], list[int]]
    _absent: tuple[tuple[dict[str, Any], ...], tuple[str, ...]]
    _held: tuple[tuple[dict[str, Any], ...], tuple[str, ...], list[object]]
    _facts: tuple[tuple[object, ...], tuple[str, ...], list[object]]
    _n_heard: list[int]
    """Hooks that had ever been registered, anywhere, when nobody listened here."""

    @staticmethod
    def of(links: Iterable[Link], values: Iterable[Value], facts: Iterable[Fact], entered: Iterable[Own] = ()) -> Watch:
        """Of what was read just now."""
        links, values = tuple(links), tuple(values)
        facts = tuple({(id(owner), name): (owner, name, value) for owner, name, value in facts}.values())
        parents, names, modules = _columns(links, 3)
        present = _columns([value for value in values if value[2]], 3)
        absent = _columns([value for value in values if not value[2]], 3)
        held = _columns([(vars(of), name, value) for of, name, value in facts if name in vars(of)], 3)
        owners, attributes, found = _columns([fact for fact in facts if fact[1] not in vars(fact[0])], 3)
        lying = list(map(dict.get, *present[:2]))
        return Watch(
            links,
            values,
            facts,
            tuple(entered),
            (parents, names, list(modules)),
            tuple(module.__dict__ for module in modules),
            (present[0], present[1], list(present[2]), list(map(_strides, lying)), list(map(_length, lying))),
            (absent[0], absent[1]),
            (held[0], held[1], list(held[2])),
            (owners, attributes, list(found)),
            [-1],
        )

    @staticmethod
    def of_all(several: Iterable[Watch]) -> Watch:
        """One that asks what all of them ask."""
        several = tuple(several)
        links = (link for one in several for link in one.links)
        values = (value for one in several for value in one.values)
        facts = (fact for one in several for fact in one.facts)
        return Watch.of(links, values, facts, (own for one in several for own in one.entered))

    def holds(self) -> bool:
        """Whether all is as it was read, and nobody listens to a part of it or computes it otherwise."""
        parents, names, modules = self._modules
        if list(map(dict.get, parents, names)) != modules or not self._is_unheard():
            return False
        if any(map(contains, self._states, repeat("forward"))) or any("forward" in own[0] for own in self.entered):
            return False
        owners, names, addresses, strides, lengths = self._present
        now = list(map(dict.get, owners, names))
        try:  # a weight transposed in place, or of which rows were cut off, is where it was
            if list(map(_address, now)) != addresses or list(map(_strides, now)) != strides:
                return False
            if list(map(_length, now)) != lengths:
                return False
        except TypeError:  # there is none now
            return False
        if any(value is not None for value in map(dict.get, *self._absent)):
            return False
        states, names, values = self._held
        of, attributes, found = self._facts
        return (
            list(map(dict.get, states, names)) == values and list(map(getattr, of, attributes, repeat(None))) == found
        )

    def _is_unheard(self) -> bool:
        """Whether nobody listens but those that did when the model was made; asked once after any hook was added."""
        n_heard = RemovableHandle.next_id
        if n_heard == self._n_heard[0]:
            return True
        if any(map(_before, self._states)) or any(map(_after, self._states)):
            return False
        for state, before, after in self.entered:
            if list(_before(state).values()) != before or list(_after(state).values()) != after:
                return False
        if hooks._has_any_global_hook():  # type: ignore[no-untyped-call]
            return False
        self._n_heard[0] = n_heard
        return True


def own_listeners(modules: Iterable[nn.Module]) -> list[Own]:
    """Of modules to which somebody may listen now."""
    return [(m.__dict__, list(m._forward_pre_hooks.values()), list(m._forward_hooks.values())) for m in modules]


def _columns(rows: Iterable[tuple[Any, ...]], n: int) -> tuple[Any, ...]:
    return tuple(zip(*rows, strict=True)) or ((),) * n
