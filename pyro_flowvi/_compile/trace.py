"""Recording a function of tensors as a graph, by a dispatch mode of our own.

``make_fx`` would do, but it imports torch._dynamo and sympy, over a second in every process.
"""

import itertools
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import CannotCompile, stack_inside, user_line

__all__ = ["Traced", "leave_out_unused", "trace"]

aten = torch.ops.aten
_RANDOM = torch.Tag.nondeterministic_seeded
_DYNAMIC_SHAPE = torch.Tag.dynamic_output_shape
_MASKS = (torch.bool, torch.uint8)
_READERS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
_VALIDATION = {"_validate_sample", "warn_if_nan", "warn_if_inf"}
"""Functions of torch and Pyro that read values and only complain about them."""


def leave_out_unused(nodes: fx.Graph) -> None:
    """Erases operations that no result needs, but for those that are there to raise."""

    def stays(node: fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        return node.is_impure() or (schema is not None and not schema.returns)

    nodes.eliminate_dead_code(stays)


@dataclass
class Traced:
    """A graph of ``(parameters, constants, arguments) -> outputs`` on static shapes.

    :param graph: its placeholders are the parameters, then the constants, then the arguments.
    :param constants: tensors that the program reached otherwise than as an argument, by reference.
    :param pinned: constants and arguments whose *values* the trace holds, with the version they had.
    :param read_at: the user's line where the value of an argument was read, the last one.
    """

    graph: fx.GraphModule
    constants: list[Tensor]
    pinned: list[tuple[Tensor, int]] = field(default_factory=list)
    pinned_args: list[tuple[int, Tensor, int]] = field(default_factory=list)
    read_at: str | None = None

    @property
    def size(self) -> int:
        """Number of operations."""
        return sum(node.op == "call_function" for node in self.graph.graph.nodes)


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Arguments that an operation changes in place."""
    if not func._schema.is_mutable:
        return
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (item for item in pytree.tree_leaves(value) if isinstance(item, Tensor))


class _Recorder(TorchDispatchMode):
    """Writes every operation into a graph, and refuses what a graph of static shapes cannot hold.

    That are values read by Python, and shapes that depend on values.  A value that is a function of
    constants and arguments alone may be read: the graph then holds for those very tensors, as long as they
    are not changed.  So may what torch's own validation reads.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # wrapping the mode against torch._dynamo would import it

    def __init__(self, params: Sequence[Tensor], args: Sequence[Tensor], lines: bool) -> None:
        super().__init__()
        self.nodes, self._lines = fx.Graph(), lines
        self.constants: list[Tensor] = []
        self.pinned: dict[int, Tensor] = {}
        self.pinned_args: set[int] = set()
        self._read_at: str | None = None
        self._known: dict[int, fx.Node] = {}
        self._memory_of: dict[fx.Node, int] = {}
        self._writes: dict[int, set[fx.Node]] = {}
        """By piece of memory, the operations that changed it."""
        self._outer: set[int] = set()
        """Pieces of memory that the program did not make itself."""
        self._alive: list[Tensor] = []
        """Tensors in the order of the graph, kept so that none has the identity of an earlier one."""
        inputs = [self.nodes.placeholder(f"param_{i}") for i in range(len(params))]
        self._memory = {
            (p.data_ptr(), p.shape, p.stride()): node
            for p, node in zip(params, inputs, strict=True)
            if p.numel()
        }
        self._sources: dict[fx.Node, Tensor] = {}
        """The constants by their nodes, which stand before this one."""
        self._anchor = self.nodes.placeholder("anchor")
        self._args = [self.nodes.placeholder(f"arg_{i}") for i in range(len(args))]
        for value, node in zip((*params, *args), (*inputs, *self._args), strict=True):
            self._bind(value, node)

    def _bind(self, value: Tensor, node: fx.Node) -> None:
        self._known[id(value)] = node
        self._alive.append(value)
        if value.layout is torch.strided and value.numel():
            memory = self._memory_of[node] = value.untyped_storage().data_ptr()
            if node.op == "placeholder":
                self._outer.add(memory)

    def node_of(self, value: Tensor) -> fx.Node:
        """The node of a tensor; one that the graph does not know becomes a constant."""
        node = self._known.get(id(value))
        if node is None:
            dense = value.layout is torch.strided and value.numel()
            node = self._memory.get((value.data_ptr(), value.shape, value.stride())) if dense else None
        if node is None:
            with self.nodes.inserting_before(self._anchor):
                node = self.nodes.placeholder(f"constant_{len(self.constants)}")
            self.constants.append(value)
            self._sources[node] = value
        self._bind(value, node)
        return node

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation and writes it down."""
        out = func(*args, **kwargs)
        inputs, keywords = pytree.tree_map_only(Tensor, self.node_of, (tuple(args), dict(kwargs)))
        node = self.nodes.call_function(func, inputs, keywords)
        if self._lines:
            node.meta["line"] = user_line(stack_inside(trace.__code__))
        for value in _written(func, args, kwargs):
            if value.layout is torch.strided and value.numel():
                self._writes.setdefault(value.untyped_storage().data_ptr(), set()).add(node)
        if isinstance(out, Tensor):
            self._bind(out, node)
        elif isinstance(out, (tuple, list)):
            for i, part in enumerate(out):
                if isinstance(part, Tensor):
                    self._bind(part, self.nodes.call_function(operator.getitem, (node, i)))
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masks = (
            [i for i in args[1] if i is not None and i.dtype in _MASKS] if func is aten.index.Tensor else []
        )
        if func is aten._local_scalar_dense.default:
            self.note_reading(
                args[0], "a value that depends on {} is read by Python (.item(), float(), an if)"
            )
            return func(*args, **kwargs)
        if masks:
            for mask in masks:
                self.note_reading(mask, "the shape of a result depends on {} (boolean indexing)")
            places = [
                i.nonzero(as_tuple=True) if i is not None and i.dtype in _MASKS else (i,) for i in args[1]
            ]
            return self._call(func, (args[0], list(itertools.chain(*places))), kwargs)
        if func is not aten.index.Tensor and (_DYNAMIC_SHAPE in func.tags or func is aten.equal.default):
            what = f"the result of {func.overloadpacket.__name__} depends on {{}}, and on it what runs"
            for value in args:
                if isinstance(value, Tensor):
                    self.note_reading(value, what)
            return func(*args, **kwargs)
        in_place = func._schema.name.endswith("_")
        if in_place and _RANDOM in func.tags and not args[0].is_contiguous():
            # Drawn in the order of memory, which a graph without mutation would not keep.
            order = sorted(range(args[0].dim()), key=args[0].stride, reverse=True)
            drawn = self._call(aten.permute.default, (args[0], order), {})
            self._call(func, (drawn, *args[1:]), kwargs)
            return args[0]
        return self._call(func, args, kwargs)

    def note_reading(self, value: Tensor, cause: str) -> None:
        """Notes the tensors that a value is a function of; refuses parameters and random draws among them."""
        names = {frame.f_code.co_name for frame, _ in itertools.islice(traceback.walk_stack(None), 12)}
        if not names.isdisjoint(_VALIDATION):
            return
        culprit = None
        pending, seen = [self.node_of(value)], set[fx.Node]()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            pending.extend(node.all_input_nodes)
            pending.extend(self._writes.get(self._memory_of.get(node, 0), ()))
            if node.op == "placeholder":
                if node in self._sources:
                    self.pinned[id(self._sources[node])] = self._sources[node]
                elif node in self._args:
                    self.pinned_args.add(self._args.index(node))
                    self._read_at = user_line(stack_inside(trace.__code__))
                else:
                    culprit = "parameters"
            elif isinstance(node.target, torch._ops.OpOverload):
                if any(node in self._writes.get(memory, ()) for memory in self._outer & self._writes.keys()):
                    culprit = culprit or "what the program changes in place"
                if _RANDOM in node.target.tags:
                    culprit = culprit or "random draws"
        if culprit:
            raise CannotCompile(cause.format(culprit), user_line(stack_inside(trace.__code__)))

    def finish(self, outputs: Sequence[Tensor], args: Sequence[Tensor]) -> Traced:
        """The graph with these outputs; what has no part in them is left out."""
        self.nodes.output(tuple(self.node_of(value) for value in outputs))
        self.nodes.erase_node(self._anchor)
        leave_out_unused(self.nodes)
        self.nodes.lint()
        pinned = [(value, value._version) for value in self.pinned.values()]
        pinned_args = [(i, args[i], args[i]._version) for i in sorted(self.pinned_args)]
        constants = [value.detach() for value in self.constants]
        graph = fx.GraphModule(torch.nn.Module(), self.nodes)
        return Traced(graph, constants, pinned, pinned_args, self._read_at)


class _Readers(TorchFunctionMode):
    """Notes readings of values that are no operations: they go to the memory itself."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READERS:
            what = f"a value that depends on {{}} is read by Python (.{func.__name__}())"
            self._recorder.note_reading(args[0], what)
        return func(*args, **(kwargs or {}))


def trace(
    function: Callable[..., Any], params: Sequence[Tensor], args: Sequence[Tensor], lines: bool = False
) -> Traced:
    """Traces a function of tensors that also reaches parameters and other tensors on its own.

    :param function: called once with stand-ins for ``args``; returns a tuple of tensors.
    :param params: leaf tensors that become inputs.
    :param args: example arguments.
    :param lines: notes the user's line of every operation, as its node's ``meta["line"]``.
    :raises CannotCompile: if the function does what a graph cannot hold.
    """
    # Another object over the same memory: what the program reaches by itself must not pass for an argument.
    stand_ins = [arg.detach() for arg in args]
    recorder = _Recorder(params, stand_ins, lines)
    try:
        with recorder, _Readers(recorder):
            outputs = function(*stand_ins)
        return recorder.finish(outputs, args)
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
