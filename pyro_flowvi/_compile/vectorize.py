"""What a loop of the program does again and again, done at once.

Given its latents, the density of a state-space model is a sum of terms of one form, and a graph of it has
the same few operations for each step.  Operations of one form, whose arguments are of one form, make one
operation on stacked arguments: superword-level parallelism (Larsen and Amarasinghe 2000) of any width.
"""

import heapq
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .long_sums import sum_at_once
from .trace import leave_out_unused

__all__ = ["vectorize"]

aten = torch.ops.aten
LEAST = 4
"""Operations of one form from which they are done at once."""
_ELEMENTWISE = {
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.add.Scalar, aten.sub.Scalar),
    *(aten.mul.Scalar, aten.div.Scalar, aten.neg.default, aten.exp.default, aten.log.default),
    *(aten.log1p.default, aten.expm1.default, aten.square.default, aten.pow.Tensor_Scalar, aten.abs.default),
    *(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.sigmoid.default),
    *(aten.tanh.default, aten.softplus.default, aten.log_sigmoid_forward.default, aten.erf.default),
    *(aten.lgamma.default, aten.digamma.default, aten.sin.default, aten.cos.default, aten.sgn.default),
    *(aten.where.self, aten.clamp.default, aten.addcmul.default, aten.masked_fill.Scalar),
    *(aten.sigmoid_backward.default, aten.tanh_backward.default, aten.softplus_backward.default),
    *(aten.ge.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.lt.Scalar, aten.eq.Scalar, aten.ne.Scalar),
    *(aten.ge.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.lt.Tensor, aten.logical_and.default),
    *(aten.logical_or.default, aten.logical_not.default, aten.maximum.default, aten.minimum.default),
}
_RESHAPES = {
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
}
"""Operations of one tensor whose result has its elements in the same order, but for repetitions."""


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("value")
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None


def _promotes_plainly(node: fx.Node) -> bool:
    """Whether the dtype of a result stays when arguments are stacked: that of a number counts less than an
    array's, and stacked numbers are an array."""
    shapes = [shape for shape in map(_shape, node.all_input_nodes) if shape and shape[1] != torch.bool]
    return len({dtype for _, dtype in shapes}) <= 1 or all(size for size, _ in shapes)


class _Forms:
    """A number for the form of every node: nodes of one form differ in constants and parts of one tensor.

    Of nodes of one form none depends on another, since a form tells of all that stands before it.
    """

    def __init__(self, constants: set[fx.Node], unsteady: set[fx.Node]) -> None:
        self._constants, self._unsteady = constants, unsteady
        self._numbers: dict[Any, int] = {}
        self._of: dict[fx.Node, int] = {}

    def of(self, node: fx.Node) -> int:
        return self._of[node]

    def note(self, node: fx.Node) -> bool:
        """Finds the form of a node whose arguments have theirs; whether nodes of that form can be joined."""
        shape, target, joins = _shape(node), node.target, False
        key: Any = node
        if shape is None or node in self._unsteady or not self._unsteady.isdisjoint(node.all_input_nodes):
            pass
        elif node in self._constants:
            key = ("constant", shape)
        elif target is operator.getitem:
            key = ("part", node.args[0], shape)
        elif target is aten.select.int:
            key = ("part", *node.args[:2], shape)
        elif target in _RESHAPES:
            key, joins = ("reshape", shape, self.of(node.all_input_nodes[0])), True
        elif target in _ELEMENTWISE and _promotes_plainly(node):
            values = [*node.args, *node.kwargs.values()]
            known = [self.of(v) if isinstance(v, fx.Node) else (type(v), str(v)) for v in values]
            key, joins = (target, tuple(node.kwargs), shape, *known), True
        self._of[node] = self._numbers.setdefault(key, len(self._numbers))
        return joins and bool(node.all_input_nodes)


class _Rebuilder:
    """Writes the graph anew, with every group of nodes as one.

    :param groups: nodes of one form each.
    :param constants: values of inputs that are the same at every call.
    :param unsteady: nodes whose memory may change.
    """

    def __init__(
        self, groups: Sequence[list[fx.Node]], constants: dict[fx.Node, Any], unsteady: set[fx.Node]
    ) -> None:
        self.graph = fx.Graph()
        self.held: list[Tensor] = []
        self._constants, self._unsteady = constants, unsteady
        self._place = {node: (group[0], i) for group in groups for i, node in enumerate(group)}
        self._groups = {group[0]: group for group in groups}
        self._new: dict[fx.Node, fx.Node] = {}
        self._parts: dict[fx.Node, fx.Node] = {}
        self._anchor: fx.Node | None = None

    def unit_of(self, node: fx.Node) -> fx.Node:
        """The first node of the group that a node is in; itself without one."""
        return self._place[node][0] if node in self._place else node

    def members(self, unit: fx.Node) -> list[fx.Node]:
        return self._groups.get(unit, [unit])

    def write(self, unit: fx.Node) -> None:
        """Writes a node, or a group."""
        group = self._groups.get(unit)
        if group is not None:
            self._new[unit] = self._join(group)
        elif unit.target in (aten.cat.default, aten.stack.default) and unit not in self._unsteady:
            self._new[unit] = self._concatenate(unit)
        else:
            self._new[unit] = self.graph.node_copy(unit, self._single)
            if unit.target is aten.view.default and unit not in self._unsteady:
                # What was joined may have other strides.
                self._new[unit].target = aten.reshape.default
        if unit.op == "placeholder":
            self._anchor = self._new[unit]

    def _single(self, node: fx.Node) -> fx.Node:
        """One node of the old graph in the new one."""
        if node not in self._place:
            return self._new[node]
        unit, index = self._place[node]
        if unit not in self._parts:
            self._parts[unit] = self.graph.call_function(aten.unbind.int, (self._new[unit], 0))
        return self.graph.call_function(operator.getitem, (self._parts[unit], index))

    def _hold(self, value: Tensor) -> fx.Node:
        place = (
            self.graph.inserting_after(self._anchor) if self._anchor else self.graph.inserting_before(None)
        )
        with place:
            self._anchor = self.graph.placeholder(f"stacked_{len(self.held)}")
        self.held.append(value)
        return self._anchor

    def _stacked(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """Nodes of one shape, along a new first dimension."""
        places = [self._place.get(node) for node in nodes]
        first = places[0]
        if first is not None and all(place is not None and place[0] is first[0] for place in places):
            index = [place[1] for place in places if place is not None]
            joined, size = self._new[first[0]], len(self._groups[first[0]])
            if index == list(range(size)):
                return joined
            if index == list(range(index[0], index[0] + len(index))):
                return self.graph.call_function(aten.slice.Tensor, (joined, 0, index[0], index[-1] + 1))
            order = self._hold(torch.tensor(index, device=self._value(nodes[0]).device))
            return self.graph.call_function(aten.index_select.default, (joined, 0, order))
        if all(node in self._constants for node in nodes):
            return self._hold(torch.stack([self._constants[node] for node in nodes]))
        return self._slices(nodes) or self.graph.call_function(
            aten.stack.default, ([self._single(node) for node in nodes],)
        )

    def _slices(self, nodes: Sequence[fx.Node]) -> fx.Node | None:
        """Neighbouring parts of a tensor that was split evenly, as a view of it."""
        if all(node.target is aten.select.int and node.args[:2] == nodes[0].args[:2] for node in nodes):
            source, axis = nodes[0].args[:2]
            return self._selected(source, axis, [node.args[2] for node in nodes])
        splits, index = (
            {node.args[0] for node in nodes},
            [node.args[1] for node in nodes if len(node.args) == 2],
        )
        if any(node.target is not operator.getitem for node in nodes) or len(splits) > 1:
            return None
        split: Any = splits.pop()
        if split.target is aten.unbind.int:
            return self._selected(split.args[0], split.args[1] if len(split.args) > 1 else 0, index)
        if split.target is not aten.split_with_sizes.default or len(set(split.args[1])) > 1:
            return None
        if index != list(range(index[0], index[0] + len(index))):  # type: ignore[operator, arg-type]
            return None
        source, sizes, *dim = split.args
        shape = list(self._value(source).shape)
        axis, size = (dim[0] if dim else 0) % len(shape), sizes[0]
        ends = index[0] * size, (index[-1] + 1) * size  # type: ignore[operator]
        part = self.graph.call_function(aten.slice.Tensor, (self._single(source), axis, *ends))
        parts = [*shape[:axis], len(nodes), size, *shape[axis + 1 :]]
        cut = self.graph.call_function(aten.reshape.default, (part, parts))
        order = [axis, *range(axis), *range(axis + 1, len(parts))]
        return self.graph.call_function(aten.permute.default, (cut, order))

    def _selected(self, source: Any, dim: Any, places: Sequence[Any]) -> fx.Node | None:
        shape = self._value(source).shape
        axis: int = dim % len(shape)
        index = [place % shape[axis] for place in places]
        if index != list(range(index[0], index[0] + len(index))):
            return None
        args = self._single(source), axis, index[0], index[-1] + 1
        order = [axis, *(i for i in range(len(shape)) if i != axis)]
        part = self.graph.call_function(aten.slice.Tensor, args)
        return self.graph.call_function(aten.permute.default, (part, order))

    @staticmethod
    def _value(node: fx.Node) -> Tensor:
        value: Tensor = node.meta["value"]
        return value

    def _join(self, group: list[fx.Node]) -> fx.Node:
        lead, size = group[0], len(group)
        shape = list(self._value(lead).shape)
        if lead.target in _RESHAPES:
            source = self._aligned([node.all_input_nodes[0] for node in group], len(shape))
            if lead.target is aten.expand.default:
                return self.graph.call_function(aten.expand.default, (source, [size, *shape]))
            return self.graph.call_function(aten.reshape.default, (source, [size, *shape]))

        def column(values: list[Any]) -> Any:
            return self._aligned(values, len(shape)) if isinstance(values[0], fx.Node) else values[0]

        args = tuple(column(list(values)) for values in zip(*(node.args for node in group), strict=True))
        kwargs = {name: column([node.kwargs[name] for node in group]) for name in lead.kwargs}
        target: Any = lead.target
        return self.graph.call_function(target, args, kwargs)

    def _aligned(self, nodes: list[fx.Node], rank: int) -> fx.Node:
        """One node that all share as it is; others stacked, with so many dimensions after the first."""
        if all(node is nodes[0] for node in nodes):
            return self._single(nodes[0])
        stacked, shape = self._stacked(nodes), list(self._value(nodes[0]).shape)
        if len(shape) >= rank:
            return stacked
        wide = [len(nodes), *[1] * (rank - len(shape)), *shape]
        return self.graph.call_function(aten.reshape.default, (stacked, wide))

    def _order(self, node: fx.Node) -> tuple[str, int]:
        unit, index = self._place.get(node, (node, 0))
        return unit.name, index

    def _concatenate(self, node: fx.Node) -> fx.Node:
        """A list of tensors put together: runs of one group are pieces."""
        tensors: Any = node.args[0]
        dim = int(node.args[1]) if len(node.args) > 1 else int(node.kwargs.get("dim", 0))  # type: ignore[arg-type]
        if all(user.target is aten.sum.dim_IntList and user.args[1] == [dim] for user in node.users):
            # Whatever their order, they are added up.
            tensors = sorted(tensors, key=lambda t: self._order(t))
        runs: list[list[fx.Node]] = []
        for tensor in tensors:
            place, before = self._place.get(tensor), self._place.get(runs[-1][-1]) if runs else None
            if place and before and place[0] is before[0]:
                runs[-1].append(tensor)
            else:
                runs.append([tensor])
        if all(len(run) < LEAST for run in runs):
            return self.graph.node_copy(node, self._single)
        stacks = node.target is aten.stack.default
        rank = self._value(node).dim() - stacks
        dim %= rank + 1 if stacks else rank
        pieces = []
        for run in runs:
            if len(run) < LEAST:
                singles = map(self._single, run)
                for single in singles:
                    if stacks:
                        single = self.graph.call_function(aten.unsqueeze.default, (single, dim))
                    pieces.append(single)
                continue
            piece, shape = self._stacked(run), list(self._value(run[0]).shape)
            if dim:
                order = [*range(1, dim + 1), 0, *range(dim + 1, rank + 1)]
                piece = self.graph.call_function(aten.permute.default, (piece, order))
            if not stacks:
                shape[dim] *= len(run)
                piece = self.graph.call_function(aten.reshape.default, (piece, shape))
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else self.graph.call_function(aten.cat.default, (pieces, dim))


def vectorize(
    nodes: fx.Graph, constants: dict[fx.Node, Any], unsteady: set[fx.Node]
) -> tuple[fx.Graph, list[Tensor]] | None:
    """A graph with operations of one form done at once; None where there is nothing to join.

    :param nodes: a graph whose nodes have their values as ``meta["value"]``.
    :param constants: inputs that are the same at every call, with their values.
    :param unsteady: nodes whose memory may change.
    :return: the graph, and the values of its further inputs, which come after the others.
    """
    sum_at_once(nodes, unsteady)
    forms, found = _Forms(set(constants), unsteady), dict[int, list[fx.Node]]()
    for node in nodes.nodes:
        if forms.note(node):
            found.setdefault(forms.of(node), []).append(node)
    groups = [group for group in found.values() if len(group) >= LEAST]
    if not groups:
        return None
    new = _Rebuilder(groups, constants, unsteady)
    order = {node: i for i, node in enumerate(nodes.nodes)}
    waits: dict[fx.Node, set[fx.Node]] = {}
    leads: dict[fx.Node, list[fx.Node]] = {}
    for unit in {new.unit_of(node) for node in order}:
        needs = {new.unit_of(value) for node in new.members(unit) for value in node.all_input_nodes}
        waits[unit] = needs
        for need in needs:
            leads.setdefault(need, []).append(unit)
    ready = [(order[unit], unit) for unit, needs in waits.items() if not needs]
    heapq.heapify(ready)
    written = 0
    while ready:
        _, unit = heapq.heappop(ready)
        new.write(unit)
        written += 1
        for follower in leads.get(unit, ()):
            waits[follower].discard(unit)
            if not waits[follower]:
                heapq.heappush(ready, (order[follower], follower))
    if written < len(waits):
        return None  # groups that wait for one another
    leave_out_unused(new.graph)
    return new.graph, new.held
