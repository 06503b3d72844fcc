"""What a program reaches beyond its arguments: modules, tensors, and Python values of its own."""

import sys
from collections.abc import Iterator
from types import CellType, CodeType, ModuleType
from typing import Any

import pyro
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from .errors import is_library

__all__ = ["PLAIN", "ReachedState", "kind_of"]

PLAIN = (bool, int, float, complex, str, bytes, type(None))
_MAX_ITEMS = 100
"""Entries of a container that are watched; of what comes after them, only the number."""
_WRAPPED = ("__self__", "__func__", "func", "args", "keywords", "__wrapped__")
"""Attributes by which callables hold others."""
Place = tuple[str, Any, Any]
"""A name for messages; a container; a key into it (None for a cell of a closure)."""


def _is_foreign(kind: type) -> bool:
    """Whether a class belongs to a library: its attributes are its own affair."""
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    return kind.__module__ in ("builtins", "numpy") or (file is not None and is_library(file))


def _names(code: CodeType) -> set[str]:
    """Globals and attributes that a function names, functions inside it included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _function_places(function: Any) -> Iterator[Place]:
    for defaults in (function.__defaults__, function.__kwdefaults__):
        if defaults:
            yield f"defaults of {function.__name__}", [defaults], 0
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    yield from ((name, cell, None) for name, cell in cells)
    space, names = function.__globals__, _names(function.__code__)
    for name in names & space.keys():
        value = space[name]
        if isinstance(value, ModuleType):
            file = str(getattr(value, "__file__", "<"))
            if value.__name__.partition(".")[0] not in sys.stdlib_module_names and not is_library(file):
                own = vars(value)
                yield from ((f"{name}.{key}", own, key) for key in names & own.keys())
        else:
            yield name, space, name


def _places(name: str, value: Any) -> Iterator[Place]:
    """Where a value keeps others."""
    if hasattr(value, "__code__"):
        if not is_library(value.__code__.co_filename):
            yield from _function_places(value)
    elif isinstance(value, (list, tuple)):
        yield from ((f"{name}[{i}]", value, i) for i in range(min(len(value), _MAX_ITEMS)))
    elif isinstance(value, dict):
        yield from ((f"{name}[{key!r}]", value, key) for key in list(value)[:_MAX_ITEMS])
    elif isinstance(value, nn.Module):
        for group in (value._modules, value._parameters, value._buffers):
            yield from ((f"{name}.{key}", group, key) for key in group)
        own = vars(value)
        if not _is_foreign(type(value)) or type(value).__module__.startswith("torch."):
            # An autoguide makes its plates anew at every call.
            made = {"plates"} if isinstance(value, AutoGuide) else set()
            public = [key for key in own if not key.startswith("_") and key not in made]
            yield from ((f"{name}.{key}", own, key) for key in public)
        # An autoguide keeps its model, and a wrapped model its function, as a plain attribute.
        yield from ((f"{name}.{key}", own, key) for key in own if callable(own[key]))
    elif isinstance(value, pyro.infer.ELBO) or not _is_foreign(type(value)):
        own = getattr(value, "__dict__", {})
        yield from ((f"{name}.{key}", own, key) for key in own)
    for kind in type(value).__mro__:
        if not _is_foreign(kind):
            keys = [key for key in vars(kind) if not key.startswith("__") or key == "__call__"]
            yield from ((f"{kind.__name__}.{key}", vars(kind), key) for key in keys)


def _read(container: Any, key: Any) -> Any:
    if isinstance(container, CellType):
        try:
            return container.cell_contents
        except ValueError:  # not filled yet
            return None
    try:
        return container[key]
    except (KeyError, IndexError):
        return None


def _equal(now: Any, before: Any) -> bool:
    return isinstance(before, PLAIN) and type(now) is type(before) and now == before


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
        self._items: list[tuple[Any, Any, Any, str]] = []
        self._cells: list[tuple[CellType, Any, str]] = []
        self._sizes: list[tuple[str, Any, int]] = []
        every: list[Tensor] = []
        seen: set[int] = set()
        pending: list[Place] = [(getattr(p, "__name__", type(p).__name__), [p], 0) for p in programs]
        while pending:
            name, container, key = pending.pop()
            value = _read(container, key)
            if isinstance(container, CellType):
                self._cells.append((container, value, name))
            elif not isinstance(container, tuple) and key != "training":
                self._items.append((container, key, value, name))
            if isinstance(value, (*PLAIN, ModuleType)) or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                every.append(value)
                if not isinstance(value, nn.Parameter):
                    self.tensors.append(value)
                continue
            if isinstance(value, type):
                continue
            if isinstance(value, nn.Module):
                self.modules.append(value)
            if isinstance(value, (list, dict, set)):
                self._sizes.append((name, value, len(value)))
            pending.extend(_places(name, value))
            if callable(value):
                inner = tuple(getattr(value, attribute, None) for attribute in _WRAPPED)
                pending.extend((name, inner, i) for i, item in enumerate(inner) if item is not None)
        self._memory = [(tensor, tensor.data_ptr(), tensor.shape, tensor.requires_grad) for tensor in every]

    def holds(self) -> bool:
        """Whether everything is still the same object, in the same memory, or an equal number or string."""
        try:  # written for speed: every step asks
            for container, key, value, _ in self._items:
                if container[key] is not value and not _equal(container[key], value):
                    return False
            for cell, value, _ in self._cells:
                if cell.cell_contents is not value and not _equal(cell.cell_contents, value):
                    return False
        except (KeyError, IndexError, ValueError):
            return False
        for tensor, address, shape, trained in self._memory:
            if tensor.data_ptr() != address or tensor.shape != shape or tensor.requires_grad != trained:
                return False
        return all(len(value) == size for _, value, size in self._sizes)

    def changes(self) -> list[str]:
        """Names of numbers, strings and tensors that are others now, and of containers of another size."""
        places = [*self._items, *((cell, None, value, name) for cell, value, name in self._cells)]
        changed = [
            name
            for container, key, value, name in places
            if isinstance(value, (*PLAIN, Tensor))
            and (now := _read(container, key)) is not value
            and not _equal(now, value)
        ]
        return changed + [f"len({name})" for name, value, size in self._sizes if len(value) != size]
