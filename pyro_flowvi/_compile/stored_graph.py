"""Recorded graphs as plain data, and back: what a file can hold that no program has to be trusted for.

Of each operation there are its name and its arguments, which are numbers, words of a short list and places of
earlier results.  A graph that is read can compute, and nothing else: its operations are those of torch and of
this package on tensors, none of which takes a name of a file.
"""

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

from .._types import Program
from ..nn import ACTIVATIONS
from ..transforms import _autoregressive_inverse  # noqa: F401  its operations are stored by name
from ..transforms.univariate import KINDS
from .errors import CannotCompile
from .run_by_operation import as_function
from .simplify import memory_of, mutated
from .trace import Traced

__all__ = ["as_plain", "from_plain"]

_GETITEM = "getitem"
_NAMESPACES: Final = ("aten", "pyro_flowvi")
_WORDS: Final = frozenset({"trunc", "floor", "none", "tanh", "linear", "ij", "xy", *ACTIVATIONS, *KINDS})
"""Words that operations take as arguments: ways to round and approximate, networks, univariate maps."""
_CHECK: Final = re.compile(r"linalg\.[a-z_]+")
"""What a check of torch says has failed."""
_NAMED: Final = {
    torch.dtype: "dtype",
    torch.layout: "layout",
    torch.memory_format: "memory_format",
}


def as_plain(traced: Traced) -> dict[str, Any]:
    """A graph as numbers, strings, lists and tuples; its constants are kept by whoever calls.

    :raises CannotCompile: if an operation has no name, or changes a constant or an argument.
    """
    places: dict[fx.Node, int] = {}
    steps: list[Any] = []
    outputs: list[Any] = []
    changed = {memory_of(node) for node in mutated(traced.graph.graph)}
    for node in traced.graph.graph.nodes:
        if node.op == "output":
            outputs = [_plain(value, places) for value in node.args[0]]
            continue
        if node.op == "call_function":
            args, kwargs = _plain(list(node.args), places), _plain(dict(node.kwargs), places)
            steps.append((_name_of(node.target), args, kwargs))
        elif node in changed:
            raise CannotCompile(f"{node.name} is changed in place")
        places[node] = len(places)
    return {"inputs": len(places) - len(steps), "steps": steps, "outputs": outputs}


def from_plain(plain: Mapping[str, Any], constants: Sequence[Tensor], device: torch.device) -> Program:
    """The graph as a function of its arguments, which come after the constants.

    :param plain: as :func:`as_plain` gives it, from any source.
    :param device: where what it makes is put.
    :raises ValueError: if it is anything else, or has an operation that is not known here.
    """
    nodes = fx.Graph()
    made: list[fx.Node] = [nodes.placeholder(f"given_{i}") for i in range(plain["inputs"])]
    for name, args, kwargs in plain["steps"]:
        target = _target_of(name)
        found = _from(list(args), made, device), _from(dict(kwargs), made, device)
        made.append(nodes.create_node("call_function", target, tuple(found[0]), found[1], f"n{len(made)}"))
    nodes.output(tuple(_from(list(plain["outputs"]), made, device)))
    return as_function(nodes, constants, [])


def _name_of(target: Any) -> str:
    if target is operator.getitem:
        return _GETITEM
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return f"{target.namespace}.{target._opname}.{target._overloadname}"
    raise CannotCompile(f"{target} is no operation of torch")


def _target_of(name: Any) -> Any:
    if name == _GETITEM:
        return operator.getitem
    space, _, rest = str(name).partition(".")
    packet, _, overload = rest.rpartition(".")
    if space in _NAMESPACES and packet.isidentifier() and overload.isidentifier():
        try:
            found = getattr(getattr(getattr(torch.ops, space), packet), overload)
        except AttributeError:
            found = None
        if isinstance(found, torch._ops.OpOverload) and not _reads_files(found):
            return found
    raise ValueError(f"operation: expected one that torch {torch.__version__} has, got {name!r}")


def _reads_files(target: Any) -> bool:
    return any(argument.name == "filename" for argument in target._schema.arguments)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and (value in _WORDS or _CHECK.fullmatch(value) is not None)


def _plain(value: Any, places: Mapping[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return ("result", places[value])
    if isinstance(value, torch.device):
        return ("device",)
    if type(value) in _NAMED:
        return (_NAMED[type(value)], str(value).removeprefix("torch."))
    if isinstance(value, list | tuple):
        return [_plain(item, places) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item, places) for name, item in value.items()}
    if value is None or type(value) in (bool, int, float) or _is_word(value):
        return value
    raise CannotCompile(f"an operation takes {value!r}, which is no number")


def _from(value: Any, made: Sequence[fx.Node], device: torch.device) -> Any:
    match value:
        case list():
            return [_from(item, made, device) for item in value]
        case dict() if all(isinstance(name, str) and name.isidentifier() for name in value):
            return {name: _from(item, made, device) for name, item in value.items()}
        case ("result", int(place)) if 0 <= place < len(made):
            return made[place]
        case ("device",):
            return device
        case (("dtype" | "layout" | "memory_format") as kind, str(name)):
            found = getattr(torch, name, None)
            if _NAMED.get(type(found)) == kind:
                return found
        case None | bool() | int() | float():
            return value
        case str() if _is_word(value):
            return value
    raise ValueError(f"argument of an operation: expected a number or a tensor, got {value!r}")
