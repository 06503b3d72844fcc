"""Data that are no tensors: which arguments of a model they are in, and what to do about them."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Number
from types import SimpleNamespace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from .._types import Program, Trace
from .feasible import is_refusal

__all__ = ["check_data", "naming_arrays"]

_FAILURES = (TypeError, AttributeError, ValueError, RuntimeError)
"""What operations on tensors raise that are given something else."""
_TOLD = re.compile(r"numpy|ndarray|tensor|array|must be|unsupported operand|has no attribute", re.IGNORECASE)
"""Words of such an error."""
_MAX_DEPTH = 4


class NotTensors(TypeError, ValueError):
    """Data of another kind: Python's kind of error for it, and the kind of all others here."""


@contextmanager
def naming_arrays(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """A run of the model: an error that arrays in place of tensors may have caused names these.

    :raises NotTensors: in its place.
    """
    try:
        yield
    except NotTensors:
        raise
    except _FAILURES as error:
        arrays = [(path, leaf) for path, leaf in _untensored(model, args, kwargs) if _is_data(leaf)]
        if not arrays or not _TOLD.search(str(error)) or is_refusal(error):
            raise
        told = (str(error).strip().splitlines() or [""])[0]
        raise NotTensors(
            f"argument {_list(path for path, _ in arrays)}: expected a tensor, got "
            f"{_list(_kind(leaf) for _, leaf in arrays)}, with which the model raised "
            f"{type(error).__name__}: {told}; pass {_list(_remedy(*found) for found in arrays)}"
        ) from error


def check_data(
    trace: Trace,
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    before_run: Callable[[], None] = lambda: None,
) -> None:
    """Refuses data that are no tensors, unless the model makes tensors of them.

    :param trace: a run of the model.
    :param before_run: called before a further run, to drop what a run may have cached.
    :raises NotTensors: naming the site, the argument and the remedy.
    """
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and site["is_observed"] and not isinstance(site["value"], Tensor):
            _check_observed(name, site, list(_untensored(model, args, kwargs)))
    if any(_is_data(leaf) for _, leaf in _untensored(model, args, kwargs)):
        # An array times a latent is an array, of which only a latent with a gradient complains.
        drawn = {name: site["value"] for name, site in trace.nodes.items() if _is_drawn(site)}
        before_run()
        with torch.enable_grad(), naming_arrays(model, args, kwargs):
            given = {name: value.detach().clone().requires_grad_() for name, value in drawn.items()}
            poutine.trace(poutine.condition(model, data=given)).get_trace(*args, **kwargs)


def _is_drawn(site: Any) -> bool:
    value = site.get("value")
    latent = site["type"] == "sample" and not site["is_observed"]
    return latent and isinstance(value, Tensor) and value.is_floating_point()


def _check_observed(name: str, site: Any, found: list[tuple[str, Any]]) -> None:
    value = site["value"]
    try:
        if isinstance(site["fn"].log_prob(value), Tensor):
            return
        cause: Exception | None = None
    except _FAILURES as error:
        cause = error
    same = [path for path, leaf in found if leaf is value]
    if same:
        message = (
            f"argument {_list(same)}: expected a tensor, since the model observes it at site {name!r}, got "
            f"{_kind(value)}; pass {_remedy(same[0], value)}"
        )
    else:
        made = [(path, leaf) for path, leaf in found if _is_data(leaf)]
        of = f", which the model makes of its argument {_list(path for path, _ in made)}" if made else ""
        instead = f"pass {_list(_remedy(*leaf) for leaf in made)}, or " if made else ""
        message = (
            f"site {name!r}: expected a tensor as observed data, got {_kind(value)}{of}; {instead}write "
            "obs=torch.as_tensor(...)"
        )
    raise NotTensors(message) from cause


def _untensored(
    model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """What in a model's arguments is neither a tensor nor a container, as text by which it is reached."""
    for path, value in _named(model, args, kwargs).items():
        yield from _leaves(path, value, _MAX_DEPTH)


def _named(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by the names of the model's parameters, or else by their place."""
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {**{f"args[{i}]": value for i, value in enumerate(args)}, **kwargs}
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({f"{name}[{i}]": item for i, item in enumerate(value)})
        else:
            named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return named


def _leaves(path: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor | nn.Module) or depth == 0:
        return
    parts: dict[str, Any] = {}
    if _is_array(value) or _is_numbers(value):
        yield path, value
    elif isinstance(value, Mapping):
        parts = {f"{path}[{key!r}]": item for key, item in value.items()}
    elif dataclasses.is_dataclass(value) or isinstance(value, SimpleNamespace):
        parts = {f"{path}.{key}": item for key, item in vars(value).items()}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = {f"{path}.{key}": getattr(value, key) for key in value._fields}
    elif isinstance(value, list | tuple):
        parts = {f"{path}[{i}]": item for i, item in enumerate(value)}
    elif isinstance(value, Number):
        yield path, value
    for inner, item in parts.items():
        yield from _leaves(inner, item, depth - 1)


def _is_array(value: Any) -> bool:
    """Whether it is an array of numpy, or what turns into one: of pandas, say."""
    return not isinstance(value, Tensor | Number) and hasattr(value, "__array__")


def _is_numbers(value: Any, kind: type = Number) -> bool:
    """Whether it is a nest of lists of numbers."""
    if not (isinstance(value, list | tuple) and value):
        return False
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return isinstance(value, kind)


def _is_data(value: Any) -> bool:
    """Whether it may be meant for a tensor: an array, or a list of floats, since integers may be sizes."""
    return _is_array(value) or _is_numbers(value, float)


def _kind(value: Any) -> str:
    """The kind of a value as text: ``numpy.ndarray of shape (20,)``."""
    kind = type(value)
    name = kind.__qualname__
    if kind.__module__ != "builtins":
        name = f"{kind.__module__.partition('.')[0]}.{name}"
    shape = getattr(value, "shape", None)
    if shape:
        return f"{name} of shape {tuple(shape)}"
    return f"{name} of length {len(value)}" if isinstance(value, list | tuple) else f"a {name}"


def _remedy(path: str, value: Any) -> str:
    """How to make a tensor of it."""
    source = f"{path}.to_numpy()" if hasattr(value, "to_numpy") else path
    dtype = str(getattr(value, "dtype", ""))
    default = torch.get_default_dtype()
    # Numpy's numbers are in double precision, which a model of float32 parameters mostly refuses.
    cast = f", dtype={default}" if dtype.startswith("float") and dtype != str(default)[6:] else ""
    return f"torch.as_tensor({source}{cast})"


def _list(texts: Any) -> str:
    return ", ".join(dict.fromkeys(texts))
