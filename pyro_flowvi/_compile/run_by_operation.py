"""A traced step run operation by operation: no compiler, and as little around the operations as possible."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .._types import Program

__all__ = ["by_operation"]

aten = torch.ops.aten
_VIEWS = {
    aten.t.default,
    aten.view.default,
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
"""Operations that move no memory: of parameters and constants, which stay where they are, done once."""
_DIRECT = {
    aten.t.default: torch.t,
    aten.mm.default: torch.mm,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.mul.Scalar: torch.mul,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.unbind.int: torch.unbind,
    aten.clamp.default: torch.clamp,
    aten.index_select.default: torch.index_select,
    aten.lift_fresh_copy.default: torch.clone,
    aten.div.Tensor: torch.div,
    aten.neg.default: torch.neg,
    aten.exp.default: torch.exp,
    aten.log.default: torch.log,
    aten.log1p.default: torch.log1p,
    aten.tanh.default: torch.tanh,
    aten.tanh_.default: torch.tanh_,
    aten.sigmoid.default: torch.sigmoid,
    aten.addcmul.default: torch.addcmul,
    aten.where.self: torch.where,
    aten.view.default: torch.Tensor.view,
    aten.expand.default: torch.Tensor.expand,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.cat.default: torch.cat,
    aten.stack.default: torch.stack,
    aten.sum.dim_IntList: torch.sum,
    aten.sum.default: torch.sum,
}
"""The same operations by torch's own bindings, which are called in two thirds of the time."""


def _mutated(nodes: fx.Graph) -> set[fx.Node]:
    """Nodes that an operation changes in place."""
    changed: set[fx.Node] = set()
    for node in nodes.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            for argument, value in zip(schema.arguments, node.args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    changed.add(value)
    return changed


def _without_detours(graph: fx.GraphModule) -> fx.Graph:
    """The graph without copies of references, and without transpositions of transpositions."""
    nodes = fx.Graph()
    output = nodes.graph_copy(graph.graph, {})
    nodes.output(output)
    for node in list(nodes.nodes):
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.t.default and getattr(node.args[0], "target", None) is aten.t.default:
            node.replace_all_uses_with(node.args[0].args[0])
        elif node.target is aten.mul.Scalar and node.args[1] == 1:
            node.replace_all_uses_with(node.args[0])
        else:
            continue
        nodes.erase_node(node)
    nodes.eliminate_dead_code()
    return nodes


def by_operation(graph: fx.GraphModule, static: Sequence[Tensor]) -> Program:
    """The graph as a function of its inputs after the first few, which are these very tensors at every call.

    :param graph: as :func:`~pyro_flowvi._compile.trace.trace` makes them.
    :param static: the values of its first inputs.
    """
    nodes = _without_detours(graph)
    changed = _mutated(nodes)
    known: dict[fx.Node, Any] = {}
    placeholders = list(nodes.find_nodes(op="placeholder"))
    known.update(zip(placeholders, static, strict=False))
    for node in nodes.nodes:
        inputs = node.all_input_nodes
        if (
            node.op == "call_function"
            and node.target in _VIEWS
            and all(value in known for value in inputs)
            and node not in changed
        ):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
    root = torch.nn.Module()
    held: list[Any] = []
    needed = [
        node for node in known if any(user not in known for user in node.users) and node.op != "placeholder"
    ]
    first = next(node for node in nodes.nodes if node.op != "placeholder")
    for node in needed:
        with nodes.inserting_before(first):
            inlet = nodes.placeholder(f"held_{len(held)}")
        held.append(known[node])
        for user in [user for user in node.users if user not in known]:
            user.replace_input_with(node, inlet)
    for node in nodes.nodes:
        node.target = _DIRECT.get(node.target, node.target)
    nodes.eliminate_dead_code()
    run = fx.GraphModule(root, nodes).forward
    return lambda *varying: run(*static, *varying, *held)
