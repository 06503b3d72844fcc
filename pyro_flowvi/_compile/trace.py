"""Tracing a step into a graph."""

import itertools
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import CannotCompile, stack_inside, user_line
from .torch_private import private

__all__ = ["Traced", "trace"]

aten = torch.ops.aten
_RANDOM = torch.Tag.nondeterministic_seeded
_DYNAMIC_SHAPE = torch.Tag.dynamic_output_shape
_MASKS = (torch.bool, torch.uint8)
_VALIDATION = {"_validate_sample", "warn_if_nan", "warn_if_inf"}
"""Functions of torch and Pyro that read values and only complain about them."""


@dataclass
class Traced:
    """A graph of ``(parameters, constants, arguments) -> outputs`` on static shapes.

    :param graph: its placeholders are the parameters, then the constants, then the arguments.
    :param constants: tensors that the program reached otherwise than as an argument, by reference.
    :param pinned: constants and arguments whose *values* the trace holds, with the version they had.
    """

    graph: fx.GraphModule
    constants: list[Tensor]
    pinned: list[tuple[Tensor, int]] = field(default_factory=list)
    pinned_args: list[tuple[int, Tensor, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Number of operations."""
        return sum(node.op == "call_function" for node in self.graph.graph.nodes)


class _Watch(TorchDispatchMode):
    """Refuses what a graph of static shapes cannot hold: values read by Python, shapes that depend on values.

    A value that is a function of constants and arguments alone may be read: the graph then holds for those
    very tensors, as long as they are not changed.  So may what torch's own validation reads.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__()
        self._params = {id(p) for p in params}
        self.read: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = (
            [i for i in args[1] if i is not None and i.dtype in _MASKS] if func is aten.index.Tensor else []
        )
        if func is aten._local_scalar_dense.default:
            self._note_reading(
                args[0], "a value that depends on {} is read by Python (.item(), float(), an if)"
            )
        elif masks:
            for mask in masks:
                self._note_reading(mask, "the shape of a result depends on {} (boolean indexing)")
            with private("_disable_current_modes")():
                places = [
                    i.nonzero(as_tuple=True) if i is not None and i.dtype in _MASKS else (i,) for i in args[1]
                ]
            return func(args[0], list(itertools.chain(*places)))
        elif func is not aten.index.Tensor and (_DYNAMIC_SHAPE in func.tags or func is aten.equal.default):
            for value in args:
                if isinstance(value, Tensor):
                    what = (
                        f"the result of {func.overloadpacket.__name__} depends on {{}}, and on it what runs"
                    )
                    self._note_reading(value, what)
        else:
            in_place = func._schema.name.endswith("_")
            if in_place and _RANDOM in func.tags and not args[0].is_contiguous():
                # Drawn in the order of memory, which a graph without mutation would not keep.
                order = sorted(range(args[0].dim()), key=args[0].stride, reverse=True)
                func(args[0].permute(order), *args[1:], **(kwargs or {}))
                return args[0]
            return func(*args, **(kwargs or {}))
        with private("_disable_current_modes")():
            return func(*args, **(kwargs or {}))

    def _note_reading(self, value: Tensor, cause: str) -> None:
        """Notes the tensors that a value is a function of; refuses parameters and random draws among them."""
        names = {frame.f_code.co_name for frame, _ in itertools.islice(traceback.walk_stack(None), 12)}
        if not names.isdisjoint(_VALIDATION):
            return
        mode: Any = private("get_proxy_mode")()
        slot = private("get_proxy_slot")(value, mode.tracer, None)
        read, culprit = set[Any](), None
        if slot is None:
            culprit = "parameters" if id(value) in self._params else None
            read.add(value)
        pending, seen = [] if slot is None else [slot.proxy.node], set[fx.Node]()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            pending.extend(node.all_input_nodes)
            if node.op == "placeholder":
                read.add(node.name)
            elif node.op == "get_attr":
                tensor = getattr(mode.tracer.root, str(node.target), None)
                culprit = "parameters" if tensor is None or id(tensor) in self._params else culprit
                read.add(tensor)
            elif isinstance(node.target, torch._ops.OpOverload):
                changed = node.args[0] if node.target._schema.is_mutable and node.args else None
                if isinstance(changed, fx.Node) and changed.op in ("get_attr", "placeholder"):
                    culprit = culprit or "what the program changes in place"
                if _RANDOM in node.target.tags:
                    culprit = culprit or "random draws"
        if culprit:
            raise CannotCompile(cause.format(culprit), user_line(stack_inside(trace.__code__)))
        self.read |= read


def trace(function: Callable[..., Any], params: Sequence[Tensor], args: Sequence[Tensor]) -> Traced:
    """Traces a function of tensors that also reaches parameters and other tensors on its own.

    :param function: called once with stand-ins for ``args``; returns a tuple of tensors.
    :param params: leaf tensors that become inputs.
    :param args: example arguments.
    :raises CannotCompile: if the function does what a graph cannot hold.
    """
    make_fx = private("make_fx")
    # Another object over the same memory: what the program reaches by itself must not pass for an argument.
    stand_ins = [arg.detach() for arg in args]
    watch = _Watch(params)

    def watched(*inputs: Tensor) -> Any:
        with watch:
            return function(*inputs)

    try:
        graph = make_fx(watched)(*stand_ins)
    except CannotCompile as error:
        while isinstance(error.__cause__, CannotCompile):  # Pyro's handlers raise copies with shapes appended
            error = error.__cause__
        raise error from None
    except Exception as error:
        stack = traceback.extract_tb(error.__traceback__)
        reason = str(error).strip().splitlines() or [""]
        raise CannotCompile(
            f"tracing failed with {type(error).__name__}: {reason[0]}", user_line(stack)
        ) from error
    return _lift(graph, params, args, watch.read)


def _lift(graph: fx.GraphModule, params: Sequence[Tensor], args: Sequence[Tensor], read: set[Any]) -> Traced:
    """Makes parameters and constants inputs of the graph, ahead of its arguments."""
    nodes, constants = graph.graph, list[Tensor]()
    by_id = {id(p): i for i, p in enumerate(params)}
    by_memory = {(p.data_ptr(), p.shape, p.stride()): i for i, p in enumerate(params) if p.numel()}
    placeholders = [node for node in nodes.nodes if node.op == "placeholder"]
    first = next(node for node in nodes.nodes if node.op != "get_attr")
    with nodes.inserting_before(first):
        inputs = [nodes.placeholder(f"param_{i}") for i in range(len(params))]
    lifted: dict[int, fx.Node] = {}
    for node in [node for node in nodes.nodes if node.op == "get_attr"]:
        value = getattr(graph, node.target)
        index = by_id.get(id(value), by_memory.get((value.data_ptr(), value.shape, value.stride())))
        if index is not None:
            replacement = inputs[index]
        elif id(value) in lifted:
            replacement = lifted[id(value)]
        else:
            with nodes.inserting_before(first):
                replacement = nodes.placeholder(f"constant_{len(constants)}")
            lifted[id(value)] = replacement
            constants.append(value)
        node.replace_all_uses_with(replacement)
        nodes.erase_node(node)
    nodes.eliminate_dead_code()
    nodes.lint()
    names = {node.name: i for i, node in enumerate(placeholders)}
    pinned_args = [
        (names[name], args[names[name]], args[names[name]]._version) for name in read if isinstance(name, str)
    ]
    pinned = [(value, value._version) for value in read if isinstance(value, Tensor)]
    graph = fx.GraphModule(torch.nn.Module(), nodes)
    return Traced(graph, [c.detach() for c in constants], pinned, pinned_args)
