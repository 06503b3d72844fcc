"""The passes of autoregressive layers, affine or by splines, and of their inverses."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...nn import MaskedMLP
from ...numerics import finite_scale
from ..autoregressive import (
    MAX_DENSE_JACOBIAN,
    AffineAutoregressive,
    Autoregressive,
    SplineAutoregressive,
)
from ..compose import Inverse
from ..univariate import Affine, RationalQuadratic
from ._pass import Gradients, Pass, form_of, trained
from .affine import log_scale_gradient
from .coupling import Network
from .spline import SplinePass

__all__ = ["AffinePass", "pass_autoregressive", "pass_inverse"]

aten = torch.ops.aten


class AffinePass:
    """Affine maps of a batch of numbers, what :class:`SplinePass` is of splines.

    :param x: shape ``(P, N)``.
    :param h: what the network says, shape ``(P, 2, N)``.
    :param offset: shape ``(2, N)``.
    """

    bend: Tensor | None = None

    def __init__(self, x: Tensor, h: Tensor, offset: Tensor, limit: float) -> None:
        self._offset, free = offset, finite_scale(offset[0])[1]
        self._squashed = torch.sigmoid(h[:, 0] * (2.0 / limit))
        self.log_slope = torch.add(free - limit, self._squashed, alpha=2.0 * limit)
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
        by_free = log_scale_gradient((v * self._scaled).sum(0), self._offset[0])
        return torch.stack((by_free, v.sum(0)))


class _MaskedNetwork(Network):
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


class _AtPoints:
    """A layer at points in its order: products with its transposed Jacobian and the parameters' gradients."""

    def __init__(self, layer: Any, x: Tensor) -> None:
        self.offset = layer.offset
        self._network = _MaskedNetwork(layer.conditioner, x)
        self._first = self._network.layers[0].weight
        h, transformer = self._network.output.unflatten(-1, self.offset.shape), layer.transformer
        self.move: Any = (
            AffinePass(x, h, self.offset, transformer.limit)
            if type(transformer) is Affine
            else SplinePass(x, self.offset + h, transformer)
        )
        self.log_det = self.move.log_slope.sum(-1)

    def log_det_gradient(self, v: Tensor | None = None) -> Tensor:
        """∇ log |det J|, and Jᵀ v."""
        at_raw = self.move.log_slope_to_raw()
        if v is not None:
            at_raw = at_raw + self.move.to_raw(v)
        found = self._network.pull(at_raw.flatten(1))[-1] @ self._first
        if self.move.bend is not None:
            found = torch.add(found, self.move.bend, alpha=2.0)
        return found if v is None else torch.addcmul(found, self.move.slope, v)

    def solve(self, v: Tensor) -> Tensor:
        """J⁻ᵀ v."""
        # J = diag(slope) + (by the network): with u = slope z, Jᵀ z = v has ones on the diagonal.
        inverse, last = self.move.slope.reciprocal(), self._network.layers[-1].weight
        by_hidden = torch.bmm(
            self.move.to_raw(inverse).permute(2, 0, 1), last.unflatten(0, self.offset.shape).transpose(0, 1)
        )
        matrix = torch.bmm(self._network.jacobian_of_hidden(), by_hidden.permute(1, 2, 0))
        solved = torch.linalg.solve_triangular(matrix, v.unsqueeze(-1), upper=True, unitriangular=True)
        found: Tensor = solved.squeeze(-1) * inverse
        return found

    def pull(self, v: Tensor) -> tuple[Tensor, Gradients]:
        """Jᵀ v, and what ``v`` at the image is at the parameters."""
        at_raw = self.move.to_raw(v)
        pulled = self._network.pull(at_raw.flatten(1))
        grads = {self.offset: self.move.offset_gradient(v, at_raw), **self._network.gradients(pulled)}
        return torch.addmm(v * self.move.slope, pulled[-1], self._first), trained(grads)


def _is_served(layer: Any) -> bool:
    return (
        type(layer) in (Autoregressive, AffineAutoregressive, SplineAutoregressive)
        and type(layer.conditioner) is MaskedMLP
        and type(layer.transformer) in (Affine, RationalQuadratic)
        and layer.dim <= MAX_DENSE_JACOBIAN
    )


@form_of(Autoregressive, AffineAutoregressive, SplineAutoregressive)
def pass_autoregressive(layer: Any, x: Tensor, score: Tensor) -> Pass | None:
    """The pass of an autoregressive layer: the score by whole Jacobians, in dimensions that allow it."""
    if not _is_served(layer):
        return None
    at = _AtPoints(layer, layer._ordered(x))
    new_score = at.solve(layer._ordered(score) - at.log_det_gradient())

    def pull(v: Tensor) -> tuple[Tensor, Gradients]:
        back, grads = at.pull(layer._ordered(v))
        return layer._ordered(back), grads

    return Pass(layer._ordered(at.move.image), at.log_det, layer._ordered(new_score), pull)


@form_of(Inverse)
def pass_inverse(layer: Any, x: Tensor, score: Tensor) -> Pass | None:
    """The pass of an autoregressive layer turned around: the Jacobian of the way there is at the image."""
    layer = layer.transform
    if not _is_served(layer):
        return None
    image = layer.inverse_and_log_det(x)[0]
    at = _AtPoints(layer, layer._ordered(image))
    new_score = at.log_det_gradient(layer._ordered(score))

    def pull(v: Tensor) -> tuple[Tensor, Gradients]:
        back = at.solve(layer._ordered(v))
        return layer._ordered(back), at.pull(-back)[1]

    return Pass(image, -at.log_det, layer._ordered(new_score), pull)
