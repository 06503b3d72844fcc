"""A traced step run operation by operation: no compiler, and as little around the operations as possible."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .._types import Program
from .simplify import VIEWS, hold, mutated, simplify
from .trace import leave_out_unused

__all__ = ["as_function", "by_operation", "without_repetition"]

aten = torch.ops.aten
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
    aten.reshape.default: torch.reshape,
    aten.expand.default: torch.Tensor.expand,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.cat.default: torch.cat,
    aten.stack.default: torch.stack,
    aten.select.int: torch.select,
    aten.squeeze.dim: torch.squeeze,
    aten.transpose.int: torch.transpose,
    aten.split_with_sizes.default: torch.split_with_sizes,
    aten.add.Scalar: torch.add,
    aten.sub.Scalar: torch.sub,
    aten.div.Scalar: torch.div,
    aten.sqrt.default: torch.sqrt,
    aten.rsqrt.default: torch.rsqrt,
    aten.square.default: torch.square,
    aten.reciprocal.default: torch.reciprocal,
    aten.masked_fill.Scalar: torch.masked_fill,
    aten.lt.Scalar: torch.lt,
    aten.logsumexp.default: torch.logsumexp,
    aten.lgamma.default: torch.lgamma,
    aten.digamma.default: torch.digamma,
    aten.mv.default: torch.mv,
    aten.softplus.default: torch._C._nn.softplus,
    aten.sum.dim_IntList: torch.sum,
    aten.sum.default: torch.sum,
    aten.lerp.Tensor: torch.lerp,
    aten.rsub.Scalar: torch.rsub,
    aten.addr.default: torch.addr,
    aten.addcdiv.default: torch.addcdiv,
    aten.linalg_solve_triangular.default: torch.linalg.solve_triangular,
    aten.linalg_vector_norm.default: torch.linalg.vector_norm,
    aten._softmax.default: torch._softmax,
    aten._softmax_backward_data.default: torch._softmax_backward_data,
    aten.cumsum.default: torch.cumsum,
    aten.constant_pad_nd.default: torch.constant_pad_nd,
    aten.tril.default: torch.tril,
    aten.triu.default: torch.triu,
    aten.flip.default: torch.flip,
    aten.ge.Tensor: torch.ge,
    aten.ge.Scalar: torch.ge,
    aten.eq.Tensor: torch.eq,
    aten.permute.default: torch.permute,
    aten.expm1.default: torch.expm1,
    aten.clamp_min.default: torch.clamp_min,
}
"""The same operations by torch's own bindings, which are called in two thirds of the time."""
_SCALED = {aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar}
"""Operations whose third argument, alpha, torch's own bindings take by name only."""


def without_repetition(
    graph: fx.GraphModule, static: Sequence[Tensor], examples: Sequence[Tensor], frozen: int = 0
) -> tuple[fx.Graph, list[Any]]:
    """A simplified graph, in which views of its first inputs are inputs too; the values of all further ones.

    :param graph: as :func:`~pyro_flowvi._compile.trace.trace` makes them.
    :param static: its first inputs, which are these very tensors at every call.
    :param examples: values of the others.
    :param frozen: how many of ``static``, counted from the last, never change their values either.
    """
    last = len(static)
    nodes, further = simplify(graph, [*static, *examples], lambda i: last - frozen <= i < last)
    changed = mutated(nodes)
    known: dict[fx.Node, Any] = dict(zip(nodes.find_nodes(op="placeholder"), static, strict=False))
    given = set(known)
    for node in nodes.nodes:
        inputs = node.all_input_nodes
        if (
            node.op == "call_function"
            and node.target in VIEWS
            and all(value in known for value in inputs)
            and node not in changed
        ):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
    further += hold(nodes, known, given)
    _own_results(nodes, last + len(examples))
    leave_out_unused(nodes)
    return nodes, further


def _own_results(nodes: fx.Graph, num_inputs: int) -> None:
    """Copies results that are held from call to call: a caller may change what it was given."""
    held = set(list(nodes.find_nodes(op="placeholder"))[num_inputs:])
    output = next(iter(nodes.find_nodes(op="output")))
    for node in held.intersection(output.all_input_nodes):
        with nodes.inserting_before(output):
            own = nodes.call_function(aten.clone.default, (node,))
        output.replace_input_with(node, own)


def as_function(nodes: fx.Graph, static: Sequence[Tensor], further: Sequence[Any]) -> Program:
    """The graph as a function of the inputs that come between those."""
    for node in nodes.nodes:
        if node.target not in _SCALED or len(node.args) < 3:
            node.target = _DIRECT.get(node.target, node.target)
    run = fx.GraphModule(torch.nn.Module(), nodes).forward
    return lambda *varying: run(*static, *varying, *further)


def by_operation(
    graph: fx.GraphModule, static: Sequence[Tensor], examples: Sequence[Tensor], frozen: int = 0
) -> Program:
    """The graph as a function of its inputs after the first few; arguments as :func:`without_repetition`."""
    nodes, further = without_repetition(graph, static, examples, frozen)
    return as_function(nodes, static, further)
