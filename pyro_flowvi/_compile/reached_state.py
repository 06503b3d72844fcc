"""What a program reaches beyond its arguments: modules, tensors, and Python values of its own."""

import collections
import copy
import types
from typing import Any

from torch import Tensor, nn

from .places import FEW, PLAIN, Place, by_any_name, is_own_code, names_in, places, read
from .watch import (
    BUFFERS,
    CONTAINERS,
    Comparison,
    Watch,
    entries,
    of_buffer,
    of_container,
    refill,
    same_entries,
)

__all__ = ["ReachedState", "kind_of"]

_BUDGET = 100_000
"""Nanoseconds, about, that a step has for comparisons; what is further away waits for an audit."""
_MAX_PLACES = 100_000
"""Places that are looked at, from the nearest."""
_MAX_COPIED = 10_000
"""Entries of containers up to which what a comparison changes is put back."""
_TENSOR, _PLACE = 300, 50


def kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """The memory of a tensor and how it is read."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad


class ReachedState:
    """What programs consist of, are bound to, close over or name as globals, at one moment.

    :param programs: the model, the guide, the loss, arguments that are objects.
    """

    def __init__(self, *programs: Any) -> None:
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []
        """Those that are not parameters."""
        self._each_step, self._at_audits = Watch(), Watch()
        self._spent = 0
        self._copies: list[tuple[Any, Any]] = []
        self._keys: list[tuple[dict[str, Any], set[str]]] = []
        """Of objects' own dictionaries, of which not all entries are watched."""
        self._names: set[str] = set()
        self._seen: dict[int, Any] = {}
        first = (Place(getattr(p, "__name__", type(p).__name__), [p], 0, "fixed") for p in programs)
        pending, waiting, visited = collections.deque(first), list[Place](), 0
        while pending and visited < _MAX_PLACES:
            place = pending.popleft()
            if self._is_read(place):
                visited += 1
                pending.extend(self._visit(place))
            else:
                waiting.append(place)
            if not pending:
                pending.extend(place for place in waiting if self._is_read(place))
                waiting = [place for place in waiting if not self._is_read(place)]
        self._seen.clear()

    def _is_read(self, place: Place) -> bool:
        if not place.if_named or place.key in self._names:
            return True
        return place.if_named == "or by any name" and by_any_name(self._names)

    def _watch(self, nanoseconds: int) -> Watch:
        if self._spent + nanoseconds > _BUDGET:
            return self._at_audits
        self._spent += nanoseconds
        return self._each_step

    def _visit(self, place: Place) -> list[Place]:
        """Has a place watched, and what is there, if it was not met before; the places inside."""
        value = read(place)
        if place.how != "fixed":
            self._watch(_PLACE).add(place, value)
        if place.how == "size" and isinstance(place.holder, dict):
            self._keys.append((place.holder, set(place.holder)))
        if isinstance(value, PLAIN) or id(value) in self._seen:
            return []
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._watch(_TENSOR).add_tensor(value)
            if not isinstance(value, nn.Parameter):
                self.tensors.append(value)
            return []
        if isinstance(value, types.FunctionType) and is_own_code(value):
            self._names |= names_in(value.__code__, strings=True)
        if isinstance(value, nn.Module):
            self.modules.append(value)
        if isinstance(value, CONTAINERS):
            self._add_container(place, value)
        elif isinstance(value, BUFFERS):
            self._add_whole(place, value, *of_buffer(value))
        try:
            return list(places(place.name, value, place.library))
        except Exception:  # an object that does not answer as others do is watched by its identity
            return []

    def _add_container(self, place: Place, value: Any) -> None:
        if not place.library and len(value) <= _MAX_COPIED:
            self._copies.append((value, copy.copy(value)))
        if isinstance(value, (list, dict)) and len(value) <= FEW:
            self._watch(_PLACE).add(place._replace(name=f"len({place.name})", holder=value, how="size"), None)
        else:
            before, same, nanoseconds = of_container(value)
            self._add_whole(place, value, before, same, nanoseconds)
            if same is not same_entries:
                self._at_audits.add_whole(place, value, entries(value), same_entries)

    def _add_whole(self, place: Place, value: Any, before: Any, same: Comparison, nanoseconds: int) -> None:
        watch = self._watch(nanoseconds)
        watch.add_whole(place, value, before, same)
        if watch is self._at_audits and isinstance(value, CONTAINERS):
            size = place._replace(name=f"len({place.name})", holder=value, how="size")
            self._each_step.add(size, None)

    def holds(self, audit: bool = False) -> bool:
        """Whether everything is still the same object, in the same memory, or an equal number or string.

        :param audit: looks also at what there is no time for at each step.
        """
        return self._each_step.holds() and not (audit and not self._at_audits.holds())

    def changes(self) -> list[str]:
        """Names of what is no longer the same."""
        return [place.name for place in (*self._each_step.changed(), *self._at_audits.changed())]

    def settle(self) -> list[str]:
        """After a step of eager Pyro: names of the program's own values that it has changed.

        What objects of libraries have changed of themselves is not watched from now on.
        """
        changed = [*self._each_step.changed(), *self._at_audits.changed()]
        for watch in (self._each_step, self._at_audits):
            watch.forget([place for place in changed if place.library])
        return [place.name for place in changed if not place.library]

    def leave(self, params: list[Tensor]) -> None:
        """Leaves the memory of parameters to those who step them."""
        self._each_step.forget_tensors(params)

    def put_back(self) -> None:
        """Gives the program's own places and containers what they held when all was the same."""
        for watch in (self._each_step, self._at_audits):
            watch.put_back()
        for container, before in self._copies:
            refill(container, before)
        for attributes, names in self._keys:
            for name in attributes.keys() - names:
                del attributes[name]
