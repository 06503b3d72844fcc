"""A pass over graphs: what does not vary along a dimension is computed once, not for every entry of it.

Pyro expands before it computes: ``Categorical`` has particles × rows × categories probabilities of which each
row's are equal, and takes the logarithm of them all.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .factored import Cannot, Dims, Factored, grouped, refined
from .trace import _RANDOM, aten

__all__ = ["compute_before_expand"]

SMALL_MATRIX = 64
"""Batched products of matrices with fewer multiplications in each are written as sums."""

_EXTREMES: dict[Any, Any] = {aten.max.dim: aten.amax.default, aten.min.dim: aten.amin.default}
"""What gives the first of the results."""


def _is_value(x: Any) -> bool:
    return isinstance(x, Factored)


def _shape(node: fx.Node) -> list[int]:
    return list(node.meta["val"].shape)


class _Rewriter:
    """Builds the new graph in the order of the old one."""

    def __init__(self, old: fx.Graph) -> None:
        self.nodes = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self._whole: dict[Factored, fx.Node] = {}
        self._known: dict[Any, fx.Node] = {}
        self._old = old
        self._rules: dict[Any, Callable[..., Any]] = {
            aten.alias.default: lambda x: x,
            aten.detach.default: lambda x: x,
            aten.clone.default: self._clone,
            aten.expand.default: self._expand,
            aten.view.default: self._view,
            aten.reshape.default: self._view,
            aten._unsafe_view.default: self._view,
            aten.permute.default: self._permute,
            aten.unsqueeze.default: self._unsqueeze,
            aten.squeeze.default: lambda x: self._squeeze(x, range(len(x.dims))),
            aten.squeeze.dim: lambda x, dim: self._squeeze(x, [dim]),
            aten.squeeze.dims: self._squeeze,
            aten.select.int: self._select,
            aten.slice.Tensor: self._slice,
            aten.full.default: self._full,
            aten.sum.default: self._sum,
            aten.sum.dim_IntList: self._sum,
            aten.amax.default: self._extreme(aten.amax.default),
            aten.amin.default: self._extreme(aten.amin.default),
            aten.bmm.default: self._bmm,
        }

    # Values and nodes.

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """An operation of the new graph, once."""
        pure = not target._schema.is_mutable and _RANDOM not in target.tags
        key = (target, repr(args), repr(kwargs)) if pure else None
        if key in self._known:
            return self._known[key]
        node = self.nodes.call_function(target, args, kwargs)
        meta = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], (args, kwargs))
        node.meta["val"] = target(*meta[0], **meta[1])
        if key is not None:
            self._known[key] = node
        return node

    def wrap(self, node: fx.Node) -> Any:
        """The value of a node that has the shape of the old graph."""
        if not isinstance(node.meta.get("val"), Tensor):
            return node
        shape = _shape(node)
        if 0 in shape:
            return node
        dims = tuple((size,) if size > 1 else () for size in shape)
        value = Factored(self._reshaped(node, [size for size in shape if size > 1]), dims)
        self._whole.setdefault(value, node)
        return value

    def whole(self, value: Any) -> Any:
        """The node of a value in the shape of the old graph."""
        if not isinstance(value, Factored):
            return value
        if value not in self._whole:
            self._whole[value] = self._reshaped(self._expanded(value.node, value.sizes), value.shape)
        return self._whole[value]

    def _reshaped(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        return node if _shape(node) == list(shape) else self._emit(aten.reshape.default, node, list(shape))

    def _expanded(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        return node if _shape(node) == list(shape) else self._emit(aten.expand.default, node, list(shape))

    def _solid(self, value: Factored, dim: int) -> Factored:
        """The same value with one factor of a dimension, along which it may vary."""
        places = value.places(dim)
        sizes = _shape(value.node)
        full = sizes[: places.start] + list(value.dims[dim]) + sizes[places.stop :]
        flat = [math.prod(value.dims[dim])] if places else []
        node = self._expanded(value.node, full)
        node = self._reshaped(node, full[: places.start] + flat + full[places.stop :])
        dims = list(value.dims)
        dims[dim] = tuple(flat)
        return Factored(node, tuple(dims))

    def _split(self, value: Factored, dims: Dims, first: int = 0) -> fx.Node:
        """The node of a value with a dimension for each of finer factors, or to broadcast along.

        :param first: the first of those dimensions that the value has.
        """
        shape: list[int] = []
        for dim, wanted in enumerate(dims[first:]):
            own = value.dims[dim]
            if not own:
                shape += [1] * len(wanted)
                continue
            rest = list(wanted)
            for place, factor in zip(value.places(dim), own, strict=True):
                varies = _shape(value.node)[place] != 1
                while factor > 1:
                    part = rest.pop(0)
                    factor //= part
                    shape.append(part if varies else 1)
        return self._reshaped(value.node, shape)

    # Operations that move entries.

    def _clone(self, x: Factored, memory_format: Any = None) -> Factored:
        if x.node.op == "placeholder":  # which may be changed at the end
            raise Cannot
        return x

    def _expand(self, x: Factored, shape: Sequence[int], implicit: bool = False) -> Factored:
        new = len(shape) - len(x.dims)
        old: list[tuple[int, ...]] = [*[()] * new, *x.dims]
        dims = tuple(own or ((size,) if size > 1 else ()) for own, size in zip(old, shape, strict=True))
        node_shape: list[int] = []
        sizes = iter(_shape(x.node))
        for own, wanted in zip(old, dims, strict=True):
            node_shape += [next(sizes) for _ in own] if own else [1] * len(wanted)
        return Factored(self._reshaped(x.node, node_shape), dims)

    def _view(self, x: Factored, shape: Sequence[int]) -> Factored:
        known = -math.prod(shape)
        total = math.prod(x.shape)
        dims = grouped(x.sizes, [total // known if size == -1 else size for size in shape])
        flat: Dims = tuple((size,) for size in x.sizes)
        parts = grouped(list(itertools.chain(*dims)), x.sizes)
        return Factored(self._split(Factored(x.node, flat), parts), dims)

    def _permute(self, x: Factored, order: Sequence[int]) -> Factored:
        order = [dim % len(x.dims) for dim in order]
        places = list(itertools.chain(*(x.places(dim) for dim in order)))
        node = x.node
        if places != sorted(places):
            node = self._emit(aten.permute.default, node, places)
        return Factored(node, tuple(x.dims[dim] for dim in order))

    def _unsqueeze(self, x: Factored, dim: int) -> Factored:
        dim %= len(x.dims) + 1
        return Factored(x.node, (*x.dims[:dim], (), *x.dims[dim:]))

    def _squeeze(self, x: Factored, dims: Iterable[int]) -> Factored:
        gone = {dim % len(x.dims) for dim in dims} if x.dims else set()
        return Factored(x.node, tuple(own for i, own in enumerate(x.dims) if own or i not in gone))

    def _select(self, x: Factored, dim: int, index: int) -> Factored:
        dim %= len(x.dims)
        if not x.dims[dim]:
            return Factored(x.node, (*x.dims[:dim], *x.dims[dim + 1 :]))
        if any(_shape(x.node)[place] != 1 for place in x.places(dim)):
            x = self._solid(x, dim)
        else:
            index = 0
        node = x.node
        for _ in x.dims[dim]:  # one, or several along which nothing varies
            node = self._emit(aten.select.int, node, x.places(dim).start, index)
        return Factored(node, (*x.dims[:dim], *x.dims[dim + 1 :]))

    def _slice(
        self, x: Factored, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
    ) -> Factored:
        dim %= len(x.dims)
        size = math.prod(x.dims[dim])
        count = len(range(size)[slice(start, end, step)])
        if count == size:
            return x
        if count == 0:
            raise Cannot
        if count == 1:
            return self._unsqueeze(self._select(x, dim, range(size)[slice(start, end, step)][0]), dim)
        dims = (*x.dims[:dim], (count,), *x.dims[dim + 1 :])
        if all(_shape(x.node)[place] == 1 for place in x.places(dim)):
            places, shape = x.places(dim), _shape(x.node)
            return Factored(self._reshaped(x.node, shape[: places.start] + [1] + shape[places.stop :]), dims)
        x = self._solid(x, dim)
        return Factored(self._emit(aten.slice.Tensor, x.node, x.places(dim).start, start, end, step), dims)

    def _full(self, shape: Sequence[int], fill: Any, **kwargs: Any) -> Factored:
        dims = tuple((size,) if size > 1 else () for size in shape)
        if 0 in shape:
            raise Cannot
        return Factored(self._emit(aten.full.default, [1] * sum(map(len, dims)), fill, **kwargs), dims)

    # Arithmetic.

    def _elementwise(self, target: Any, args: Any, kwargs: Any) -> Factored:
        values = [v for v in pytree.tree_leaves((args, kwargs), _is_value) if isinstance(v, Factored)]
        rank = max(len(v.dims) for v in values)
        dims: list[tuple[int, ...]] = [()] * rank
        for v in values:
            for i, own in enumerate(v.dims, rank - len(v.dims)):
                dims[i] = refined(dims[i], own)
        sizes = tuple(dims)

        def align(v: Any) -> Any:
            return self._split(v, sizes, rank - len(v.dims)) if isinstance(v, Factored) else v

        args, kwargs = pytree.tree_map(align, (args, kwargs), is_leaf=_is_value)
        return Factored(self._emit(target, *args, **kwargs), sizes)

    def _reduced(self, x: Factored, dims: Any, keepdim: bool) -> tuple[list[int], Dims]:
        """The node's dimensions that a reduction is over, and the dimensions of its result."""
        every = range(len(x.dims))
        gone = (
            {dim % len(x.dims) for dim in ([dims] if isinstance(dims, int) else dims or every)}
            if x.dims
            else set()
        )
        places = list(itertools.chain(*(x.places(dim) for dim in sorted(gone))))
        return places, tuple(() if i in gone else x.dims[i] for i in every if keepdim or i not in gone)

    def _sum(self, x: Factored, dims: Any = None, keepdim: bool = False, **kwargs: Any) -> Factored:
        places, left = self._reduced(x, dims, keepdim)
        if not places:
            if kwargs or not x.node.meta["val"].is_floating_point():
                raise Cannot
            return Factored(x.node, left)
        count = math.prod(x.sizes[i] for i in places if _shape(x.node)[i] == 1)
        node = self._emit(aten.sum.dim_IntList, x.node, places, **kwargs)
        return Factored(node if count == 1 else self._emit(aten.mul.Tensor, node, count), left)

    def _extreme(self, target: Any) -> Callable[..., Factored]:
        def rule(x: Factored, dims: Any = (), keepdim: bool = False) -> Factored:
            places, left = self._reduced(x, dims, keepdim)
            return Factored(self._emit(target, x.node, places) if places else x.node, left)

        return rule

    def _bmm(self, left: Factored, right: Factored) -> Factored:
        if math.prod([*left.shape[1:], right.shape[2]]) > SMALL_MATRIX:
            raise Cannot
        terms = self._unsqueeze(left, 3), self._unsqueeze(right, 1)
        return self._sum(self._elementwise(aten.mul.Tensor, terms, {}), [2])

    # The graph.

    def _rewritten(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The value of an operation on values.

        :raises Cannot: if there is no rule for it.
        """
        given = pytree.tree_leaves((args, kwargs), _is_value)
        if node.target is not operator.getitem and any(isinstance(x, fx.Node) for x in given):
            raise Cannot
        rule = self._rules.get(node.target)
        if rule is not None:
            return rule(*args, **kwargs)
        if node.target is operator.getitem and node.args[1] == 0:
            source = node.args[0]
            target = _EXTREMES.get(getattr(source, "target", None))
            if target is not None and isinstance(source, fx.Node):
                of, *rest = fx.node.map_arg(source.args, self.values.__getitem__)
                return self._extreme(target)(of, *rest)
        tags = getattr(node.target, "tags", ())
        if torch.Tag.pointwise not in tags or not any(map(_is_value, given)):
            raise Cannot
        return self._elementwise(node.target, args, kwargs)

    def add(self, node: fx.Node) -> None:
        """Takes over one node of the old graph."""

        if node.op != "call_function":
            self.values[node] = self._copied(node)
            return
        expected = node.meta.get("val")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)
        try:
            value = self._rewritten(node, args, kwargs)
        except Cannot:
            value = None
        if not isinstance(value, Factored) or not isinstance(expected, Tensor):
            value = self._copied(node)
        elif value.shape != list(expected.shape) or value.node.meta["val"].dtype != expected.dtype:
            # As where a number and a tensor of one element give other dtypes.
            value = self._copied(node)
        self.values[node] = value

    def _copied(self, node: fx.Node) -> Any:
        """The operation on inputs as they were in the old graph."""
        new = self.nodes.node_copy(node, lambda old: self._as_it_was(old, node))
        if new.target is aten.view.default:  # of another layout than it was
            new.target = aten.reshape.default
        return self.wrap(new)

    def _as_it_was(self, old: fx.Node, user: fx.Node) -> fx.Node:
        node: fx.Node = self.whole(self.values[old])
        before = old.meta.get("val")
        if not isinstance(before, Tensor) or before.stride() == node.meta["val"].stride():
            return node
        in_memory = _RANDOM in getattr(user.target, "tags", ()) or user.target is aten.as_strided.default
        # Operations that Inductor only calls write their inputs into memory of these strides.
        if in_memory or (0 in node.meta["val"].stride() and 0 not in before.stride()):
            order = sorted(range(before.dim()), key=before.stride, reverse=True)
            back = [order.index(dim) for dim in range(before.dim())]
            node = self._emit(aten.permute.default, node, order)
            node = self._emit(aten.clone.default, node, memory_format=torch.contiguous_format)
            node = self._emit(aten.permute.default, node, back)
        return node

    def run(self) -> fx.Graph:
        """The new graph."""
        changes = False
        for node in self._old.nodes:
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable and not changes:
                changes = True  # what is read later is read before
                for value in list(self.values.values()):
                    self.whole(value)
            self.add(node)
        self.nodes.eliminate_dead_code()
        self.nodes.lint()
        return self.nodes


def compute_before_expand(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph of the same function, up to rounding, that computes on tensors before they are expanded.

    :param graph: of ``aten`` operations on static shapes, each with a fake tensor in ``meta["val"]``; its
        inputs are changed, if at all, at the end.
    """
    return fx.GraphModule(graph, _Rewriter(graph.graph).run())
