"""Values that a program keeps, as they were at one moment, and whether they are still the same."""

import array
import collections
import itertools
import zlib
from collections.abc import Callable, Collection, Iterator
from operator import is_
from typing import Any

import numpy as np
from torch import Tensor

from .places import PLAIN, Place, read, write

__all__ = [
    *("BUFFERS", "CONTAINERS", "Comparison", "Watch"),
    *("entries", "equal", "of_buffer", "of_container", "refill", "same_entries"),
]

BUFFERS = (np.ndarray, array.array, bytearray)
"""Memory that is not torch's."""
CONTAINERS = (list, dict, set, collections.deque)
_SMALL = 4096
"""Bytes of an array up to which its contents are compared at every step; larger ones have a check sum, for
audits."""
_SUMMED = 2**26
"""Bytes of an array up to which it has a check sum."""
_NUMBERS = {bool, int, float, complex, str, bytes, type(None)}
Comparison = Callable[[Any, Any], bool]


def equal(now: Any, before: Any) -> bool:
    """Whether two values are one object, or equal numbers or strings of one type."""
    if now is before:
        return True
    if not isinstance(before, PLAIN) or type(now) is not type(before):
        return False
    return bool(now == before or (now != now and before != before))


def entries(value: Any) -> list[Any]:
    """Keys and values of a dict, what any other container has."""
    return [*dict.keys(value), *dict.values(value)] if isinstance(value, dict) else list(value)


def same_entries(now: Any, before: list[Any]) -> bool:
    """Whether a container still has these entries, each the same object or equal."""
    found = entries(now)
    if len(found) != len(before):
        return False
    return all(map(is_, found, before)) or all(map(equal, found, before))


def of_container(value: Any) -> tuple[Any, Comparison, int]:
    """What to compare a container with, how, and about how many nanoseconds that takes."""
    if isinstance(value, set):
        return set(value), set.__eq__, 100 + 10 * len(value)
    found = entries(value)
    if set(map(type, found)) <= _NUMBERS:
        # C compares without calling back; an equal number of another type passes until the next audit.
        if isinstance(value, list):
            return found, list.__eq__, 100 + len(found)
        if isinstance(value, dict):
            return dict(value), dict.__eq__, 100 + 4 * len(found)
    return found, same_entries, 200 + 20 * len(found)


def _contents(value: Any) -> bytes:
    return bytes(value) if isinstance(value, bytearray) else value.tobytes()


def _same_contents(now: Any, before: bytes) -> bool:
    return _contents(now) == before


def _check_sum(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return len(value), zlib.crc32(value)
    memory = value.__array_interface__["data"][0], value.shape, value.strides, value.dtype
    if value.dtype.hasobject or value.nbytes > _SUMMED:
        return memory
    return *memory, zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def _same_check_sum(now: Any, before: Any) -> bool:
    return bool(_check_sum(now) == before)


def of_buffer(value: Any) -> tuple[Any, Comparison, int]:
    """What to compare an array with, how, and nanoseconds: more than any step has for a large one."""
    size = value.nbytes if isinstance(value, np.ndarray) else len(value) * getattr(value, "itemsize", 1)
    if size <= _SMALL:
        return _contents(value), _same_contents, 200
    return _check_sum(value), _same_check_sum, 10**9


def refill(container: Any, before: Any) -> None:
    """Gives a container the entries of an earlier copy, where they are others now."""
    if isinstance(container, dict):
        for key in container.keys() - before.keys():
            del container[key]
        container.update((k, v) for k, v in before.items() if container.get(k, container) is not v)
    elif not same_entries(container, entries(before)):
        if isinstance(container, list):
            container[:] = before
        else:
            container.clear()
            container.update(before) if isinstance(container, set) else container.extend(before)


class Watch:
    """Places and what they held."""

    def __init__(self) -> None:
        self._items: list[tuple[Any, Any, Any, Place]] = []
        self._cells: list[tuple[Any, Any, Place]] = []
        self._attributes: list[tuple[Any, str, Any, Place]] = []
        self._empty: list[Any] = []
        self._filled: list[tuple[Any, int]] = []
        self._sizes: list[tuple[Any, int, Place]] = []
        self._tensors: list[tuple[Tensor, int, Any, bool]] = []
        self._wholes: list[tuple[Any, Any, Comparison, Place]] = []

    def holds(self) -> bool:
        """Whether every place still holds the same object, or an equal number or string."""
        try:  # written for speed: every step asks
            for holder, key, value, _ in self._items:
                if holder[key] is not value and not equal(holder[key], value):
                    return False
            for cell, value, _ in self._cells:
                if cell.cell_contents is not value and not equal(cell.cell_contents, value):
                    return False
            for holder, key, value, _ in self._attributes:
                if getattr(holder, key) is not value and not equal(getattr(holder, key), value):
                    return False
            if any(self._empty):
                return False
            for value, size in self._filled:
                if len(value) != size:
                    return False
            for tensor, address, shape, trained in self._tensors:
                if tensor.data_ptr() != address or tensor.shape != shape or tensor.requires_grad != trained:
                    return False
            for value, before, same, _ in self._wholes:
                if not same(value, before):
                    return False
        except Exception:  # of a key that is gone, or of a program's own len()
            return False
        return True

    def add(self, place: Place, value: Any) -> None:
        """Watches a place, which holds a value now."""
        if place.how == "item":
            self._items.append((place.holder, place.key, value, place))
        elif place.how == "cell":
            self._cells.append((place.holder, value, place))
        elif place.how == "attribute":
            self._attributes.append((place.holder, place.key, value, place))
        elif place.how == "size":
            size = len(place.holder)
            self._sizes.append((place.holder, size, place))
            if size:
                self._filled.append((place.holder, size))
            else:
                self._empty.append(place.holder)

    def add_tensor(self, tensor: Tensor) -> None:
        """Watches where a tensor has its memory, not what is there."""
        self._tensors.append((tensor, tensor.data_ptr(), tensor.shape, tensor.requires_grad))

    def add_whole(self, place: Place, value: Any, before: Any, same: Comparison) -> None:
        """Watches that ``same(value, before)``."""
        self._wholes.append((value, before, same, place))

    def forget_tensors(self, tensors: Collection[Tensor]) -> None:
        """Leaves these to others."""
        left_out = set(map(id, tensors))
        self._tensors = [entry for entry in self._tensors if id(entry[0]) not in left_out]

    def changed(self) -> list[Place]:
        """The places that hold something else now, or, of a container, more or less."""
        places = [place for *_, value, place in self._values() if not equal(read(place), value)]
        places += [place for value, size, place in self._sizes if len(value) != size]
        return places + [place for value, before, same, place in self._wholes if not same(value, before)]

    def forget(self, places: list[Place]) -> None:
        """Watches these places no longer."""
        left_out = set(map(id, places))
        lists: tuple[list[Any], ...] = (self._items, self._cells, self._attributes, self._sizes, self._wholes)
        for watched in lists:
            watched[:] = [entry for entry in watched if id(entry[-1]) not in left_out]
        self._empty = [holder for holder, size, _ in self._sizes if not size]
        self._filled = [(holder, size) for holder, size, _ in self._sizes if size]

    def _values(self) -> Iterator[tuple[Any, ...]]:
        return itertools.chain(self._items, self._cells, self._attributes)

    def put_back(self) -> None:
        """Gives the program's own places what they held."""
        for *_, value, place in self._values():
            if not place.library and not equal(read(place), value):
                write(place, value)
        for value, before, same, place in self._wholes:
            if isinstance(before, bytes) and not place.library and not same(value, before):
                memoryview(value).cast("B")[:] = before
