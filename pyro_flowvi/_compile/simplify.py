"""Fewer operations for the same numbers: what a graph computes twice, or for nothing, is left out."""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .trace import leave_out_unused
from .vectorize import vectorize

__all__ = ["VIEWS", "copy", "hold", "let_views_copy", "memory_of", "mutated", "shared_memory", "simplify"]

aten = torch.ops.aten
VIEWS = {
    aten.t.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unbind.int,
    aten.transpose.int,
    aten.permute.default,
    aten.diagonal.default,
    aten.detach.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.alias.default,
    operator.getitem,
}
"""Operations that move no memory."""
_COPIES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.detach.default,
    aten.alias.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
}
"""Operations whose result is their argument where it has the same shape and dtype."""
_FILLED = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
}
"""Operations that look at the shape of their argument alone."""
_TIMES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
_PLUS = {aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar}
_PAIRWISE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
_RANDOM = torch.Tag.nondeterministic_seeded


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def written(node: fx.Node) -> Iterator[fx.Node]:
    """Arguments that an operation changes in place."""
    schema = _schema(node)
    if schema is None or not schema.is_mutable:
        return
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            yield from (item for item in values if isinstance(item, fx.Node))


def mutated(nodes: fx.Graph) -> set[fx.Node]:
    """Nodes that an operation changes in place."""
    return {value for node in nodes.nodes for value in written(node)}


def shared_memory(node: fx.Node) -> list[fx.Node]:
    """Arguments whose memory the result of an operation has."""
    if node.target in VIEWS:
        return node.all_input_nodes[:1]
    schema = _schema(node)
    if schema is None or all(result.alias_info is None for result in schema.returns):
        return list(written(node))
    aliased = {argument.name: i for i, argument in enumerate(schema.arguments) if argument.alias_info}
    values = [node.args[i] if i < len(node.args) else node.kwargs.get(name) for name, i in aliased.items()]
    return [value for value in values if isinstance(value, fx.Node)]


def memory_of(node: fx.Node) -> fx.Node:
    """The node that made the memory which a node's value has."""
    while shared := shared_memory(node):
        node = shared[0]
    return node


def let_views_copy(nodes: fx.Graph) -> None:
    """Has views of memory that nothing writes into copy where they cannot be views.

    Inductor's decompositions lay some results out otherwise than torch does, and a recorded view of such a
    result is none there.
    """

    changed = {memory_of(node) for node in mutated(nodes)}
    for node in nodes.find_nodes(op="call_function", target=aten.view.default):
        if memory_of(node) not in changed:
            node.target = aten.reshape.default


def _unsteady(nodes: fx.Graph, inputs: Sequence[Any]) -> set[fx.Node]:
    """Nodes whose memory changes, or may: changed in place, or sharing it with one that is."""
    parent: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while parent.setdefault(node, node) is not node:
            parent[node] = node = parent[parent[node]]
        return node

    owners: dict[int, fx.Node] = {}
    for node, value in zip(nodes.find_nodes(op="placeholder"), inputs, strict=True):
        if isinstance(value, Tensor) and value.layout is torch.strided and value.numel():
            parent[root(node)] = root(owners.setdefault(value.untyped_storage().data_ptr(), node))
    for node in nodes.nodes:
        # Copies may be left out.
        for value in node.all_input_nodes[:1] if node.target in _COPIES else shared_memory(node):
            parent[root(node)] = root(value)
    changed = {root(node) for node in mutated(nodes)}
    return {node for node in nodes.nodes if root(node) in changed} if changed else set()


class _Values(fx.Interpreter):
    """Runs a graph and keeps what every node gave, as ``meta["value"]``."""

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        node.meta["value"] = value.detach() if isinstance(value, Tensor) else value
        return value


def _value(node: Any) -> Any:
    return node.meta.get("value") if isinstance(node, fx.Node) else node


def _dtype(value: Any) -> torch.dtype | None:
    return value.dtype if isinstance(value, Tensor) else None


def _alike(one: Any, other: Any) -> bool:
    """Whether two nodes have the same shape, strides, dtype and device: a view may depend on strides."""
    a, b = _value(one), _value(other)
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.layout != b.layout:
        return False
    return a.layout is not torch.strided or a.stride() == b.stride()


class _Simplifier:
    """One pass from the first operation of a graph to the last.

    :param nodes: the graph, whose nodes have values.
    :param known: values of placeholders that are the same at every call.
    :param unsteady: nodes whose memory may change.
    """

    def __init__(self, nodes: fx.Graph, known: dict[fx.Node, Any], unsteady: set[fx.Node]) -> None:
        self.nodes, self.known, self.unsteady = nodes, known, unsteady
        self._met: dict[Any, fx.Node] = {}

    def run(self) -> None:
        for node in list(self.nodes.nodes):
            if node.op != "call_function" or node in self.unsteady:
                continue
            if _RANDOM in getattr(node.target, "tags", ()) or not self.unsteady.isdisjoint(
                node.all_input_nodes
            ):
                continue
            if all(value in self.known for value in node.all_input_nodes) or node.target in _FILLED:
                schema = _schema(node)
                if schema is not None and not schema.returns:
                    self.nodes.erase_node(node)  # a check, which constants have passed
                else:
                    self.known[node] = _value(node)
                continue
            self._rewrite(node)
            other = self._same_as(node)
            if other is not None:
                node.replace_all_uses_with(other)
                self.nodes.erase_node(node)

    def _is_all(self, node: Any, number: float) -> bool:
        if isinstance(node, fx.Node):
            value = self.known.get(node)
            return isinstance(value, Tensor) and bool((value == number).all())
        return isinstance(node, int | float) and node == number

    def _rewrite(self, node: fx.Node) -> None:
        """Replaces an operation by a cheaper one of the same result."""
        args, value = node.args, _value(node)
        same_dtype = _dtype(value) == _dtype(_value(args[0] if args else None))
        if node.target is aten.pow.Tensor_Scalar and args[1] == 2 and same_dtype:
            node.target, node.args = aten.square.default, args[:1]
        elif node.target is aten.sum.dim_IntList and args[1] and same_dtype:
            source = _value(args[0])
            if source.numel() == value.numel() and source.is_contiguous():
                node.target, node.args, node.kwargs = aten.view.default, (args[0], list(value.shape)), {}
        elif node.target is aten.expand.default:
            self._spare_expansion(node)
        if node.target is aten.view.default:
            before = node.args[0]
            if isinstance(before, fx.Node) and before.target is aten.view.default:
                source = before.args[0]
                if _value(source).is_contiguous():
                    node.args = (source, list(value.shape))

    def _spare_expansion(self, node: fx.Node) -> None:
        """Has elementwise operations broadcast by themselves."""
        for user in list(node.users):
            if user.target not in _PAIRWISE:
                continue
            one, other = user.args[:2]
            if one is other:
                continue
            rest = other if one is node else one
            if not isinstance(rest, fx.Node) or _value(rest).shape != _value(user).shape:
                continue
            # A number's dtype does not count beside that of an array.
            if _value(node.args[0]).dim() or _value(node).dtype == _value(rest).dtype:
                user.replace_input_with(node, node.args[0])  # type: ignore[arg-type]

    def _same_as(self, node: fx.Node) -> fx.Node | None:
        """An earlier node of the same value."""
        args, target = node.args, node.target
        if target in _COPIES and _alike(node, args[0]):
            return args[0]  # type: ignore[return-value]
        if target is aten.t.default and getattr(args[0], "target", None) is aten.t.default:
            return args[0].args[0]  # type: ignore[union-attr, return-value]
        if target in _TIMES and self._is_all(args[1], 1) and _alike(node, args[0]):
            return args[0]  # type: ignore[return-value]
        if target is aten.mul.Tensor and self._is_all(args[0], 1) and _alike(node, args[1]):
            return args[1]  # type: ignore[return-value]
        if target in _PLUS and self._is_all(args[1], 0) and _alike(node, args[0]):
            return args[0]  # type: ignore[return-value]
        plain_sum = target is aten.add.Tensor and not node.kwargs
        if plain_sum and self._is_all(args[0], 0) and _alike(node, args[1]):
            return args[1]  # type: ignore[return-value]
        if target is aten.pow.Tensor_Scalar and args[1] == 1 and _alike(node, args[0]):
            return args[0]  # type: ignore[return-value]
        key = (target, _key(args), _key(node.kwargs))
        first = self._met.setdefault(key, node)
        return None if first is node else first


def _key(value: Any) -> Any:
    """Arguments as something that can be looked up: 1, 1.0 and True are three."""
    if isinstance(value, Mapping):
        return tuple((name, _key(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return value if isinstance(value, fx.Node) else (type(value), str(value))


def hold(nodes: fx.Graph, known: Mapping[fx.Node, Any], given: Iterable[fx.Node]) -> list[Any]:
    """Makes what is known inputs of the graph, after the others; their values."""
    placeholders = list(nodes.find_nodes(op="placeholder"))
    last, held, given = placeholders[-1], list[Any](), set(given)
    for node in [n for n in known if n not in given and any(user not in known for user in n.users)]:
        with nodes.inserting_after(last):
            last = nodes.placeholder(f"held_{len(placeholders) + len(held)}")
        last.meta["value"] = known[node]
        held.append(known[node])
        for user in [user for user in node.users if user not in known]:
            user.replace_input_with(node, last)
    return held


def copy(nodes: fx.Graph) -> fx.Graph:
    """A graph of the same nodes."""
    new = fx.Graph()
    new.output(new.graph_copy(nodes, {}))
    return new


def _own_memory(inputs: Sequence[Any], nodes: Iterable[fx.Node], changed: set[fx.Node]) -> list[Any]:
    """The inputs, copied where the graph changes them: what shared memory shares that of the copies."""
    storages: dict[int, torch.UntypedStorage] = {}
    given = []
    for node, value in zip(nodes, inputs, strict=True):
        if node in changed and isinstance(value, Tensor) and value.layout is torch.strided:
            memory = value.untyped_storage()
            own = storages.setdefault(memory.data_ptr(), memory.clone())
            place = value.storage_offset(), value.shape, value.stride()
            value = torch.empty(0, dtype=value.dtype, device=value.device).set_(own, *place)
        given.append(value)
    return given


def _run(nodes: fx.Graph, inputs: Sequence[Any]) -> Any:
    """What a graph gives, from the present state of torch's generator, which stays where it is."""
    given = _own_memory(inputs, nodes.find_nodes(op="placeholder"), _unsteady(nodes, inputs))
    with torch.no_grad(), torch.random.fork_rng():
        return _Values(fx.GraphModule(torch.nn.Module(), nodes)).run(*given)


def _equal(one: Any, other: Any) -> bool:
    """Whether results agree, but for the order in which terms are added."""
    for a, b in zip(one, other, strict=True):
        tolerance = 1e-9 if b.dtype == torch.float64 else 1e-4 if b.is_floating_point() else 0.0
        size = float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()) if tolerance and b.numel() else 0.0
        if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True):
            return False
    return True


def simplify(
    graph: fx.GraphModule, inputs: Sequence[Any], frozen: Callable[[int], bool]
) -> tuple[fx.Graph, list[Any]]:
    """A graph of the same values with fewer operations: constants folded, repetitions and no-ops left out.

    Only what is exact is done, but for the order of long sums and the sign of zeros; operations that change
    memory in place or draw at random stay as they are, with all that they touch.

    :param graph: a recorded graph.
    :param inputs: example values of all its inputs; the graph is run at them.
    :param frozen: whether the input of some index has the same value at every call.
    :return: the graph, and the values of its further inputs, which come after the others.
    """
    nodes = copy(graph.graph)
    expected = _run(nodes, inputs)
    placeholders = list(nodes.find_nodes(op="placeholder"))
    unsteady = _unsteady(nodes, inputs)
    known = {node: inputs[i] for i, node in enumerate(placeholders) if frozen(i) and node not in unsteady}
    given = set(known)
    _Simplifier(nodes, known, unsteady).run()
    held = hold(nodes, known, given)
    leave_out_unused(nodes)
    if not _same(nodes, [*inputs, *held], expected):
        return copy(graph.graph), []
    placeholders = list(nodes.find_nodes(op="placeholder"))
    values = [*inputs, *held]
    unsteady = _unsteady(nodes, values)
    constant = {
        node: values[i]
        for i, node in enumerate(placeholders)
        if node not in unsteady and (i >= len(inputs) or frozen(i))
    }
    before = copy(nodes)
    joined = vectorize(nodes, constant, unsteady)
    if joined is not None and _same(joined[0], [*values, *joined[1]], expected):
        return joined[0], [*held, *joined[1]]
    return before, held


def _same(nodes: fx.Graph, inputs: Sequence[Any], expected: Any) -> bool:
    """Whether a graph gives what is expected."""
    try:
        return _equal(_run(nodes, inputs), expected)
    except RuntimeError:  # a view that the strides of a cheaper operation's result do not allow
        return False
