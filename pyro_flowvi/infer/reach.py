"""What a program reaches beyond its arguments: modules, and Python values of its own."""

from collections.abc import Callable, Iterator
from types import CellType, ModuleType
from typing import Any

from torch import Tensor, nn

from .cause import is_library

__all__ = ["Surroundings"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_MAX_ITEMS = 100
"""Containers beyond this size are told apart by their size alone."""

Place = tuple[str, Any, Any]
"""A name for messages; a container; a key into it (None for a cell of a closure)."""


def _is_foreign(value: Any) -> bool:
    """Whether an object belongs to a library: its plain attributes are its own affair."""
    root = type(value).__module__.partition(".")[0]
    return isinstance(value, (type, ModuleType, Tensor)) or root in ("torch", "pyro", "pyro_flowvi", "numpy")


def _places(name: str, value: Any) -> Iterator[Place]:
    """Where a value keeps others."""
    if isinstance(value, nn.Module):
        for group in (value._modules, value._parameters, value._buffers):
            yield from ((f"{name}.{key}", group, key) for key in group)
        # An autoguide keeps its model, and a wrapped model its function, as a plain attribute.
        own = vars(value)
        yield from (
            (f"{name}.{key}", own, key) for key in own if callable(own[key]) or not _is_foreign(value)
        )
    elif isinstance(value, (list, tuple)):
        yield from ((f"{name}[{i}]", value, i) for i in range(min(len(value), _MAX_ITEMS)))
    elif isinstance(value, dict):
        yield from ((f"{name}[{key!r}]", value, key) for key in list(value)[:_MAX_ITEMS])
    elif hasattr(value, "__code__"):
        if not is_library(value.__code__.co_filename):
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            yield from ((free, cell, None) for free, cell in cells)
            space = value.__globals__
            yield from ((free, space, free) for free in value.__code__.co_names if free in space)
    elif not _is_foreign(value) and hasattr(value, "__dict__"):
        yield from ((f"{name}.{key}", vars(value), key) for key in vars(value))


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


class Surroundings:
    """What a model and guide consist of, are bound to, close over or name as globals, at one moment.

    :param programs: the model and the guide.
    """

    def __init__(self, *programs: Callable[..., Any]) -> None:
        self.modules: list[nn.Module] = []
        self._plain: list[tuple[str, Any, Any, Any]] = []
        self._tensors: list[tuple[Any, Any, Any]] = []
        self._sizes: list[tuple[str, Any, int]] = []
        seen: set[int] = set()
        pending: list[Place] = [(getattr(p, "__name__", type(p).__name__), [p], 0) for p in programs]
        while pending:
            name, container, key = pending.pop()
            value = _read(container, key)
            if isinstance(value, _PLAIN):
                if key != "training" and not (isinstance(container, tuple) or name.endswith("__")):
                    self._plain.append((name, container, key, value))
                continue
            if isinstance(value, Tensor) and not isinstance(container, tuple):
                self._tensors.append((container, key, value))
            if isinstance(value, (Tensor, ModuleType)) or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, nn.Module):
                self.modules.append(value)
            if isinstance(value, (list, dict, set)):
                self._sizes.append((name, value, len(value)))
            pending.extend(_places(name, value))
            if callable(value):
                wrapped = ("__self__", "__func__", "func", "__wrapped__")
                inner = [getattr(value, attribute, None) for attribute in wrapped]
                pending.extend((name, inner, i) for i, item in enumerate(inner) if item is not None)

    def holds(self) -> bool:
        """Whether tensors and plain values are still the same objects or equal."""
        for container, key, value in self._tensors:
            if _read(container, key) is not value:
                return False
        return not self.changes()

    def changes(self) -> list[str]:
        """Names of plain values that are others now, and of containers of another size."""
        changed = [name for name, container, key, value in self._plain if _read(container, key) != value]
        return changed + [f"len({name})" for name, value, size in self._sizes if len(value) != size]
