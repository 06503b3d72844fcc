"""The pass of autoregressive layers, affine or by splines."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...nn import MaskedMLP
from ..autoregressive import (
    MAX_DENSE_JACOBIAN,
    AffineAutoregressive,
    Autoregressive,
    SplineAutoregressive,
)
from ..univariate import Affine, RationalQuadratic
from ._pass import Gradients, Pass, form_of, trained
from .coupling import _Network
from .spline import SplinePass

__all__ = ["AffinePass", "pass_autoregressive"]

aten = torch.ops.aten


class AffinePass:
    """Affine maps of a batch of numbers, what :class:`SplinePass` is of splines.

    :param x: shape ``(P, N)``.
    :param h: what the network says, shape ``(P, 2, N)``.
    :param offset: shape ``(2, N)``.
    """

    bend: Tensor | None = None

    def __init__(self, x: Tensor, h: Tensor, offset: Tensor, limit: float) -> None:
        self._largest = 0.3 * math.log(torch.finfo(offset.dtype).max)
        self._offset, self._free = offset, offset[0].clamp(-self._largest, self._largest)
        self._squashed = torch.sigmoid(h[:, 0] * (2.0 / limit))
        self.log_slope = torch.add(self._free - limit, self._squashed, alpha=2.0 * limit)
        self.slope = self.log_slope.exp()
        self._scaled = x * self.slope
        self.image = self._scaled + (offset[1] + h[:, 1])

    def to_raw(self, v: Tensor) -> Tensor:
        """What ``v`` at the image is at the network's output, ``(P, 2, N)``."""
        return torch.stack((4.0 * aten.sigmoid_backward(v * self._scaled, self._squashed), v), 1)

    def log_slope_to_raw(self) -> Tensor:
        """What ones at the log-slope are there."""
        one = torch.ones_like(self._squashed)
        return torch.stack((4.0 * aten.sigmoid_backward(one, self._squashed), torch.zeros_like(one)), 1)

    def offset_gradient(self, v: Tensor, at_raw: Tensor) -> Tensor:
        """From ``v`` at the image."""
        by_free = aten.hardtanh_backward(
            (v * self._scaled).sum(0), self._offset[0], -self._largest, self._largest
        )
        return torch.stack((by_free, v.sum(0)))


class _MaskedNetwork(_Network):
    """A masked network at a batch of points."""

    def __init__(self, mlp: MaskedMLP, x: Tensor) -> None:
        self._own = [*mlp.hidden, mlp.last]
        masked: list[Any] = [
            SimpleNamespace(weight=weight, bias=layer.bias)
            for layer, weight in zip(self._own, mlp.masked_weights(), strict=True)
        ]
        seen: Any = SimpleNamespace(hidden=masked[:-1], last=masked[-1], activation=mlp.activation)
        super().__init__(seen, x)

    def gradients(self, pulled: list[Tensor]) -> dict[Tensor, Tensor]:
        found = super().gradients(pulled)
        grads: dict[Tensor, Any] = {}
        for layer, own in zip(self.layers, self._own, strict=True):
            grads[own.weight] = found.pop(layer.weight) * own.mask
        return grads | found

    def _activated(self, v: Tensor, h: Tensor) -> Tensor:
        found: Tensor = (
            aten.tanh_backward(v, h) if self.mlp.activation == "tanh" else aten.threshold_backward(v, h, 0)
        )
        return found

    def jacobian_of_hidden(self) -> Tensor:
        """Of the last hidden layer by the input, shape ``(P, in, H)``."""
        num, size = self.inputs[0].shape
        # In memory as it is used: products of many small matrices would copy it.
        total: Tensor = self.layers[0].weight.t().contiguous()
        for i, h in enumerate(self.inputs[1:]):
            if i:
                total = (total.view(num * size, -1) @ self.layers[i].weight.t()).view(num, size, -1)
            total = self._activated(total, h.unsqueeze(1))
        return total


@form_of(Autoregressive, AffineAutoregressive, SplineAutoregressive)
def pass_autoregressive(layer: Any, x: Tensor, score: Tensor) -> Pass | None:
    """The pass of an autoregressive layer: the score by whole Jacobians, in dimensions that allow it."""
    mlp, transformer, offset = layer.conditioner, layer.transformer, layer.offset
    if type(mlp) is not MaskedMLP or layer.dim > MAX_DENSE_JACOBIAN:
        return None
    if type(transformer) not in (Affine, RationalQuadratic):
        return None
    x, score = layer._ordered(x), layer._ordered(score)
    network = _MaskedNetwork(mlp, x)
    h = network.output.unflatten(-1, offset.shape)
    move: Any = (
        AffinePass(x, h, offset, transformer.limit)
        if type(transformer) is Affine
        else SplinePass(x, offset + h, transformer)
    )
    first, last = network.layers[0].weight, network.layers[-1].weight
    at_first = network.pull(move.log_slope_to_raw().flatten(1))[-1]
    score = torch.addmm(score, at_first, first, alpha=-1)
    if move.bend is not None:
        score = torch.sub(score, move.bend, alpha=2.0)
    # J = diag(slope) + (by the network): with u = slope z, Jᵀ z = score has ones on the diagonal.
    inverse = move.slope.reciprocal()
    by_hidden = torch.bmm(
        move.to_raw(inverse).permute(2, 0, 1), last.unflatten(0, offset.shape).transpose(0, 1)
    )
    matrix = torch.bmm(network.jacobian_of_hidden(), by_hidden.permute(1, 2, 0))
    solved = torch.linalg.solve_triangular(matrix, score.unsqueeze(-1), upper=True, unitriangular=True)
    score = solved.squeeze(-1) * inverse

    def pull(v: Tensor) -> tuple[Tensor, Gradients]:
        v = layer._ordered(v)
        at_raw = move.to_raw(v)
        pulled = network.pull(at_raw.flatten(1))
        grads = {offset: move.offset_gradient(v, at_raw), **network.gradients(pulled)}
        back = torch.addmm(v * move.slope, pulled[-1], first)
        return layer._ordered(back), trained(grads)

    return Pass(layer._ordered(move.image), move.log_slope.sum(-1), layer._ordered(score), pull)
