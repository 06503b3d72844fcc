"""Where programs keep values: what functions, objects, classes and containers hold, and how to read it."""

import argparse
import collections
import contextlib
import dis
import functools
import sys
import types
from abc import ABC
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Generic, NamedTuple

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import nn

from .errors import is_library

__all__ = ["FEW", "PLAIN", "Place", "by_any_name", "is_own_code", "names_in", "places", "read", "write"]

PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
FEW = 8
"""Lists and dicts of at most so many entries are watched entry by entry, longer ones as a whole."""
_INNER = ("__self__", "__func__", "func", "args", "keywords", "__wrapped__", "fget")
"""Attributes by which these hold others:"""
_WRAPPERS = (
    *(types.MethodType, types.BuiltinMethodType, types.MethodWrapperType, functools.partial, property),
    *(staticmethod, classmethod, functools.cached_property, functools.partialmethod),
)
_CONFIGURATIONS = (types.SimpleNamespace, argparse.Namespace, collections.UserList, Mapping)
"""Kinds of libraries that hold what a program puts there, and nothing else."""
_HOLDERS = (
    *(Messenger, torch.distributions.Distribution, torch.distributions.Transform, pyro.infer.ELBO),
    *(torch.distributions.constraints.Constraint, torch.utils.data.Dataset),
)
"""Other kinds of libraries whose attributes matter; those of the rest are their own affair."""
_TRANSPARENT = (object, nn.Module, PyroModule, ABC, Generic)
"""Bases that read no attribute of a class derived from them which they have not set themselves."""
_OF_MODULES = frozenset(vars(PyroModule()))
"""Attributes of all modules: what matters of them is watched otherwise."""
_PACKAGE = __name__.partition(".")[0]
_BY_ANY_NAME = frozenset(
    ("getattr", "vars", "__dict__", "locals", "eval", "exec", "format", "format_map")
    + ("asdict", "astuple", "attrgetter", "methodcaller")
)
"""Names of what reads attributes whose names the code need not show."""


class Place(NamedTuple):
    """Where a value is kept."""

    name: str
    """For messages."""
    holder: Any
    key: Any
    how: str
    """It is ``holder[key]``, an "item", the attribute ``key``, or a "cell"; what cannot change is "fixed"; of
    the holder itself, its "size"."""
    library: bool = False
    """It is kept by an object of a library, which may change it on its own account."""
    if_named: str = ""
    """It is read only by code that names the key, "alone", or "or by any name": see :func:`by_any_name`."""
    owner: Any = None
    """The class whose attribute it is."""


def is_foreign(kind: type) -> bool:
    """Whether a class belongs to a library."""
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if file is None:
        return kind.__module__ in sys.stdlib_module_names and kind.__module__ != "__main__"
    return is_library(file)


def is_own_code(function: Any) -> bool:
    """Whether a function is the user's."""
    filename = function.__code__.co_filename
    if not filename.startswith("<"):
        return not is_library(filename)
    file = getattr(sys.modules.get(function.__module__), "__file__", None)  # a shell, exec, a data class
    return file is None or not is_library(file)


def _is_own_module(module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return (
        file is not None
        and module.__name__.partition(".")[0] not in sys.stdlib_module_names
        and not is_library(file)
    )


def names_in(code: types.CodeType, strings: bool = False) -> set[str]:
    """Globals and attributes that a function names, functions inside it included.

    :param strings: adds strings, by which ``getattr`` and patterns of ``match`` name attributes.
    """
    names = set(code.co_names)
    if code.co_name == "__init__":  # what it sets is another object's, or set before
        names &= {line.argval for line in dis.get_instructions(code) if not line.opname.startswith("STORE")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= names_in(constant, strings)
        elif strings and isinstance(constant, (str, tuple)):
            parts = (constant,) if isinstance(constant, str) else constant
            names.update(part for part in parts if isinstance(part, str))
    return names


def by_any_name(names: Collection[str]) -> bool:
    """Whether code with these names may read attributes that it does not name."""
    return not _BY_ANY_NAME.isdisjoint(names)


def read(place: Place) -> Any:
    """The value at a place; None where there is none."""
    holder, key, how = place.holder, place.key, place.how
    if how == "size":
        return None
    try:
        if how == "cell":
            return holder.cell_contents
        return getattr(holder, key) if how == "attribute" else holder[key]
    except (KeyError, IndexError, ValueError, AttributeError):
        return None


def write(place: Place, value: Any) -> None:
    """Puts a value at a place, as far as that can be done."""
    with contextlib.suppress(Exception):
        if place.how == "cell":
            place.holder.cell_contents = value
        elif place.how == "attribute":
            setattr(place.holder, place.key, value)
        elif place.owner is not None:
            setattr(place.owner, place.key, value)
        else:
            place.holder[place.key] = value


def _fixed(name: str, values: Iterable[Any], library: bool = False) -> Iterator[Place]:
    kept = [value for value in values if type(value) not in PLAIN]
    yield from (Place(name, kept, i, "fixed", library) for i in range(len(kept)))


def _attributes(
    name: str, space: Any, keys: Iterable[str], if_named: str = "", library: bool = False
) -> Iterator[Place]:
    yield from (Place(f"{name}.{key}", space, key, "item", library, if_named) for key in keys)


def _function_places(function: Any) -> Iterator[Place]:
    name, own = function.__name__, is_own_code(function)
    for attribute in ("__defaults__", "__kwdefaults__"):
        if own and getattr(function, attribute):
            yield Place(f"{name}.{attribute}", function, attribute, "attribute")
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    yield from (Place(key, cell, None, "cell", not own) for key, cell in cells)
    if own:
        yield from _attributes(name, vars(function), list(vars(function)))
        space = function.__globals__
        for key in sorted(names_in(function.__code__) & space.keys()):
            if isinstance(space[key], types.ModuleType):
                yield from _fixed(key, [space[key]])
            else:
                yield Place(key, space, key, "item")
    elif "__wrapped__" in vars(function):
        yield from _fixed(name, [function.__wrapped__], True)


def _is_transparent(kind: type) -> bool:
    return all(not is_foreign(base) or base in _TRANSPARENT for base in kind.__mro__)


def _class_places(kind: type) -> Iterator[Place]:
    """Attributes and methods of a class and its bases, those of the user's."""
    if_named = "or by any name" if _is_transparent(kind) else ""
    for base in kind.__mro__:
        if not is_foreign(base):
            own = vars(base)
            yield Place(f"len(vars({base.__name__}))", own, None, "size")
            for key, value in own.items():
                special = (key.startswith("__") and key.endswith("__")) or key == "forward"
                if not special or isinstance(value, (types.FunctionType, *_WRAPPERS)):
                    named = "" if special else if_named
                    yield Place(f"{base.__name__}.{key}", own, key, "item", False, named, base)


def _module_places(name: str, module: nn.Module) -> Iterator[Place]:
    groups: list[Any] = [module._modules, module._parameters, module._buffers]
    if isinstance(module, PyroModule):
        groups.append(module._pyro_samples)
    for group in groups:
        yield from _attributes(name, group, [*group])
    hooks = module._forward_hooks, module._forward_pre_hooks
    sized: list[Any] = [module._modules, *hooks]
    for group in sized:
        yield Place(f"hooks or submodules of {name}", group, None, "size")
        if group:
            yield from _fixed(name, group.values())


def _object_places(name: str, value: Any) -> Iterator[Place]:
    """Attributes of an object: in its dictionary, or in slots."""
    kind = type(value)
    foreign = is_foreign(kind)
    own: dict[str, Any] = getattr(value, "__dict__", {})
    keys = list(own)
    if_named = "or by any name" if _is_transparent(kind) else ""
    if isinstance(value, nn.Module):
        yield from _module_places(name, value)
        keys = [key for key in keys if key not in _OF_MODULES]
        if isinstance(value, AutoGuide) or kind.__module__.startswith(_PACKAGE):
            # It keeps its model, and what it makes anew at every call.
            keys = [
                key
                for key in keys
                if callable(vars(value)[key]) or not (foreign or key[0] == "_" or key == "plates")
            ]
    elif foreign and not isinstance(value, (*_CONFIGURATIONS, *_HOLDERS)):
        return
    library = foreign and not isinstance(value, _CONFIGURATIONS)
    if keys:
        yield from _attributes(name, vars(value), keys, if_named, library)
    if not foreign and hasattr(value, "__dict__"):
        yield Place(f"len(vars({name}))", vars(value), None, "size")
    for base in kind.__mro__:
        for key, slot in [*vars(base).items()] if "__slots__" in vars(base) else ():
            if isinstance(slot, types.MemberDescriptorType) and hasattr(value, key):
                yield Place(f"{name}.{key}", value, key, "attribute", foreign, if_named)


def places(name: str, value: Any, library: bool = False) -> Iterator[Place]:
    """Where a value keeps others.

    :param library: the value is kept by an object of a library.
    """
    few = isinstance(value, (list, dict)) and len(value) <= FEW
    if isinstance(value, types.FunctionType):
        yield from _function_places(value)
    elif isinstance(value, types.ModuleType):
        if _is_own_module(value):
            yield from _attributes(name, vars(value), list(vars(value)), "alone")
    elif isinstance(value, type):
        yield from _class_places(value)
    elif isinstance(value, dict) and few:
        yield from (Place(f"{name}[{key!r}]", value, key, "item", library) for key in dict.keys(value))
    elif isinstance(value, list) and few:
        yield from (Place(f"{name}[{i}]", value, i, "item", library) for i in range(len(value)))
    elif isinstance(value, dict):
        yield from _fixed(name, dict.values(value), library)
    elif isinstance(value, (tuple, list, set, frozenset, collections.deque)):
        yield from _fixed(name, value, library)
    elif isinstance(value, np.ndarray) and value.dtype == object:
        yield from _fixed(name, value.ravel().tolist(), library)
    elif isinstance(value, _WRAPPERS):
        yield from _fixed(name, (getattr(value, attribute, None) for attribute in _INNER), library)
    if not isinstance(value, (types.FunctionType, types.ModuleType, type)):
        yield from _object_places(name, value)
        yield from _fixed(name, [type(value)])
        yield from _fixed(name, [getattr(value, "__dict__", {}).get("__wrapped__")], library)
