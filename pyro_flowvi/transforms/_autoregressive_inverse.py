r"""The inverse of an autoregressive layer, by substitution: two operators that a traced graph calls.

:math:`y_i = g(x_i; \theta_i(x_{<i}))` is solved for one coordinate after another.  With the hidden units
sorted by degree each of them is evaluated once, as soon as its inputs are known, so that a solve does the
arithmetic of *one* forward pass, where the textbook loop does D.  The loop is inside the operator: a traced
graph has one node whatever D is.

The gradient is the implicit function theorem's.  With J the triangular Jacobian at the solution,
:math:`dx = J^{-1} (dy - \partial_\theta f d\theta)`, and :math:`J^{-T} g` is a substitution from the last
coordinate to the first, again with the arithmetic of one backward pass.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor

from .._shapes import broadcast_shapes
from ..nn import ACTIVATIONS, masked_degrees
from .univariate import transformer_of

__all__ = ["solve_autoregressive"]


def _bounds(dim: int, width: int) -> list[int]:
    """Place of the first hidden unit of each degree 0 ... D: units of degree m lie in [m], [m + 1)."""
    counts = torch.bincount(masked_degrees(dim, width), minlength=dim)
    return [0, *itertools.accumulate(counts.tolist())]


def _columns(value: Tensor, batch: Size, event_dim: int) -> Tensor:
    """``value`` with its batch flattened and last: of size 1 there if it has none."""
    if value.dim() == event_dim:
        return value.unsqueeze(-1)
    event = value.shape[value.dim() - event_dim :]
    rows = value.expand(*batch, *event).reshape(batch.numel(), *event)
    return rows.movedim(0, -1).contiguous()


def _rows(columns: Tensor, batch: Size) -> Tensor:
    return columns.t().reshape(*batch, columns.shape[0]).contiguous()


@torch.library.custom_op("pyro_flowvi::substitute", mutates_args=())
def _substitute(
    y: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    offset: Tensor,
    kind: str,
    limit: float,
    activation: str,
) -> Tensor:
    """x with f(x) = y; ``weights`` are masked, shapes as in :class:`pyro_flowvi.nn.MaskedMLP`."""
    dim, num_params = y.shape[-1], offset.shape[-2]
    transformer, activate = transformer_of(kind, limit, num_params), ACTIVATIONS[activation]
    batch = _batch_shape(y, biases, offset)
    y = _columns(y.expand(*batch, dim), batch, 1)
    offset = _columns(offset, batch, 2)
    biases = [_columns(bias, batch, 1) for bias in biases]
    last = weights[-1].unflatten(0, (num_params, dim)).transpose(0, 1)
    bounds = [_bounds(dim, weight.shape[0]) for weight in weights[:-1]]
    x = torch.empty_like(y)
    units = [y.new_empty(weight.shape[0], y.shape[-1]) for weight in weights[:-1]]
    for i in range(dim):
        known = x[:i]
        for weight, bias, bound, unit in zip(weights[:-1], biases, bounds, units, strict=True):
            new = slice(bound[i], bound[i + 1])
            if new.stop > new.start:
                unit[new] = activate(torch.addmm(bias[new], weight[new, : len(known)], known))
            known = unit[: new.stop]
        h = last[i, :, : len(known)] @ known
        x[i] = transformer.inverse(y[i], h, offset[:, i])[0]
    return _rows(x, batch)


@torch.library.custom_op("pyro_flowvi::substitute_transposed", mutates_args=())
def _substitute_transposed(
    g: Tensor, slopes: Tensor, effects: Tensor, gates: list[Tensor], weights: list[Tensor]
) -> Tensor:
    """v with Jᵀ v = g, from what the transformer (``slopes``, ``effects``) and the units do at x."""
    dim, num_params = g.shape[-1], effects.shape[-2]
    batch = _batch_shape(g, [slopes, *gates], effects)
    g = _columns(g.expand(*batch, dim), batch, 1)
    slopes = _columns(slopes.expand(*batch, dim), batch, 1)
    gates = [_columns(gate, batch, 1) for gate in gates]
    effects = _columns(effects, batch, 2).transpose(0, 1)
    bounds = [_bounds(dim, weight.shape[0]) for weight in weights[:-1]]
    above = [weight.t() for weight in weights[1:-1]]
    above.append(weights[-1].unflatten(0, (num_params, dim)).transpose(0, 1).flatten(0, 1).t())
    pulls = [torch.empty_like(gate.expand(-1, g.shape[-1])) for gate in gates]
    v, outputs = torch.empty_like(g), g.new_empty(dim, num_params, g.shape[-1])
    for i in reversed(range(dim)):
        later, start = outputs[i + 1 :].flatten(0, 1), (i + 1) * num_params
        for layer in reversed(range(len(gates))):
            new = slice(bounds[layer][i + 1], bounds[layer][i + 2] if i + 2 <= dim else None)
            if i + 1 < dim:
                pulls[layer][new] = gates[layer][new] * (above[layer][new, start:] @ later)
            later, start = pulls[layer][new.start :], new.start
        v[i] = (g[i] - weights[0][start:, i] @ later) / slopes[i]
        outputs[i] = v[i] * effects[i]
    return _rows(v, batch)


def _batch_shape(y: Tensor, biases: list[Tensor], offset: Tensor) -> Size:
    shapes = (y.shape[:-1], *(bias.shape[:-1] for bias in biases), offset.shape[:-2])
    return Size(broadcast_shapes(*shapes))


def _units(x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: str) -> list[Tensor]:
    units = []
    for weight, bias in zip(weights[:-1], biases, strict=True):
        x = ACTIVATIONS[activation](x @ weight.t() + bias)
        units.append(x)
    return units


class _Once(torch.autograd.Function):
    """Its first argument, which cannot be differentiated in any of them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, *_: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("the inverse of an autoregressive layer is differentiable once, got twice")


class _Implicit(torch.autograd.Function):
    """Zero, with the gradient of J⁻¹ residual: what carries gradients to the solution."""

    generate_vmap_rule = True

    @staticmethod
    def forward(residual: Tensor, *_: Any) -> Tensor:
        return torch.zeros_like(residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        residual, x, offset, ctx.kind, ctx.limit, ctx.activation, *weights_and_biases = inputs
        ctx.save_for_backward(residual, x, offset, *weights_and_biases)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        residual, *saved = ctx.saved_tensors
        x, offset, *rest = (value.detach() for value in saved)
        num_weights = (len(rest) + 1) // 2
        weights, biases = rest[:num_weights], rest[num_weights:]
        transformer = transformer_of(ctx.kind, ctx.limit, offset.shape[-2])
        units = _units(x, weights, biases, ctx.activation)
        h = (units[-1] @ weights[-1].t()).unflatten(-1, offset.shape[-2:])
        pulled: Any = torch.func.vjp(lambda x, h: transformer.forward(x, h, offset)[0], x, h)
        y, pull = pulled
        slopes, effects = pull(torch.ones_like(y))
        gates = [1.0 - u.square() if ctx.activation == "tanh" else (u > 0).to(u.dtype) for u in units]
        v = _substitute_transposed(g.detach(), slopes, effects, gates, weights)
        return _Once.apply(v, g, residual), *(None,) * (5 + len(rest))


_substitute.register_fake(
    lambda y, weights, biases, offset, *_: y.new_empty(*_batch_shape(y, biases, offset), y.shape[-1])
)


_substitute_transposed.register_fake(
    lambda g, slopes, effects, gates, weights: g.new_empty(
        *_batch_shape(g, [slopes, *gates], effects), g.shape[-1]
    )
)


def _aligned(value: Any, place: int | None, event_dim: int, num_batch: int) -> Any:
    """``value`` with its vmapped dimension first and ``num_batch`` dimensions between it and the event."""
    if place is None:
        return value
    value = value.movedim(place, 0)
    missing = num_batch - (value.dim() - 1 - event_dim)
    return value.reshape(value.shape[0], *(1,) * missing, *value.shape[1:])


def _register_vmap(operator: Any, vectors: tuple[int, ...], matrices: tuple[int, ...]) -> None:
    """vmap for an operator whose arguments have 1 or 2 event dimensions; weights are mapped one by one."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        places = dict(enumerate(in_dims))
        shared = all(
            place is None for i in places if i not in vectors + matrices for place in _flat(places[i])
        )
        if not shared:
            rows = [
                operator(*(_select(arg, place, k) for arg, place in zip(args, in_dims, strict=True)))
                for k in range(info.batch_size)
            ]
            return torch.stack(rows), 0
        event_dims = {**dict.fromkeys(vectors, 1), **dict.fromkeys(matrices, 2)}
        num_batch = max(
            value.dim() - event_dims[i] - (place is not None)
            for i in event_dims
            for value, place in zip(_flat(args[i]), _flat(in_dims[i], args[i]), strict=True)
        )
        moved = list(args)
        for i, event_dim in event_dims.items():
            values = [
                _aligned(value, place, event_dim, num_batch)
                for value, place in zip(_flat(args[i]), _flat(in_dims[i], args[i]), strict=True)
            ]
            moved[i] = values if isinstance(args[i], list) else values[0]
        first = moved[0]
        if in_dims[0] is None:  # the result needs the mapped dimension
            moved[0] = first.expand(info.batch_size, *(1,) * (num_batch + 1 - first.dim()), *first.shape)
        return operator(*moved), 0

    operator.register_vmap(rule)


def _flat(value: Any, like: Any = None) -> list[Any]:
    if value is None and isinstance(like, list):
        return [None] * len(like)
    return list(value) if isinstance(value, list | tuple) else [value]


def _select(arg: Any, place: Any, k: int) -> Any:
    if isinstance(arg, list):
        places = _flat(place, arg)
        return [_select(value, where, k) for value, where in zip(arg, places, strict=True)]
    return arg.select(place, k) if place is not None else arg


_register_vmap(_substitute, vectors=(0, 2), matrices=(3,))


_register_vmap(_substitute_transposed, vectors=(0, 1, 3), matrices=(2,))


def solve_autoregressive(
    forward: Callable[[Tensor], Tensor],
    y: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    offset: Tensor,
    kind: str,
    limit: float,
    activation: str,
) -> Tensor:
    """The x with ``forward(x) = y``, differentiable in y and in what ``forward`` depends on.

    :param forward: the layer, from ``(*, D)`` to ``(*, D)``.
    :param y: shape ``(*, D)``.
    :param weights: masked weights of the layer's network, as ``MaskedMLP.masked_weights`` gives them.
    :param biases: biases of its hidden layers, each ``(H,)`` or ``(*, H)``.
    :param offset: shape ``(P, D)`` or ``(*, P, D)``.
    :param kind: kind of the univariate transformer, and its ``limit``.
    :param activation: of the network.
    """
    weights, biases = [weight.detach() for weight in weights], [bias.detach() for bias in biases]
    setting = (weights, biases, offset.detach(), kind, limit, activation)
    x: Tensor = _substitute(y.detach(), *setting)
    if torch.is_grad_enabled():
        x = x + _Implicit.apply(y - forward(x), x, *setting[2:], *weights, *biases)
    return x
