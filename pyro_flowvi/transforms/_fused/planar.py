r"""The pass of planar layers in a row.

Everything is in few numbers of each point.  With :math:`s_k = w_k \cdot x_{k-1} + b_k`, what layer j adds,
:math:`\hat u_j \tanh s_j`, moves all later s_k by :math:`G_{jk} \tanh s_j, G = \hat U W^T`: this alone goes
layer by layer.  The score gains a multiple of w_k in each layer, and so does a vector on its way back: the
multiples of all layers solve one triangular system for each point, with the entries of G.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ...numerics import safe_norm, shifted_softplus
from ..planar import PLANAR_FLOOR, Planar, _planar_log_det
from ._pass import Gradients, Pass, form_of, trained

__all__ = ["pass_planar", "score_moves", "solve_layers"]

_FLOOR = PLANAR_FLOOR - 1.0
_SHIFT = math.log(-math.expm1(_FLOOR)) - _FLOOR
"""The slope of the shifted softplus is a sigmoid, moved by this."""


def solve_layers(matrix: Tensor, right: Tensor, upper: bool) -> Tensor:
    """Triangular systems of the layers, unknowns ``(P, K)``; the diagonal is taken for ones."""
    if right.shape[-1] == 1:
        return right
    solved: Tensor = torch.linalg.solve_triangular(
        matrix, right.unsqueeze(-1), upper=upper, unitriangular=True
    )
    return solved.squeeze(-1)


def score_moves(
    score: Tensor, act: Tensor, slope: Tensor, c: Tensor, u_hat: Tensor, mixing: Tensor
) -> Tensor:
    """The multiples of the w that the layers add to the score; tanh and its slope are ``(P, K)``."""
    stretch = torch.addcmul(torch.ones_like(c), c, slope)
    pressed = slope / stretch
    # In each layer score += m w, with m (1 + c slope) = slope (2 c tanh / (1 + c slope) - score · û).
    right = pressed * (2.0 * (c * act) / stretch - score @ u_hat.t())
    return solve_layers(pressed.unsqueeze(-1) * mixing, right, upper=False)


class _Directions:
    """û and c of all layers, and the way back from û to the raw parameters."""

    def __init__(self, layer: Planar) -> None:
        self._layer, self._u = layer, layer.u / layer.num_layers
        self._inner = (layer.w * self._u).sum(-1)
        self.c, excess = shifted_softplus(self._inner, _FLOOR)
        self._length = safe_norm(layer.w).unsqueeze(-1)
        self._unit = layer.w / self._length
        self._along = excess.unsqueeze(-1) / self._length
        self.u_hat = torch.addcmul(self._u, self._along, self._unit)

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Of w and of the raw u."""
        # û = u + e n / |w| with n = w / |w|, and e' = -sigmoid(-(t + shift)), t = w·u.
        onto = (grad * self._unit).sum(-1, keepdim=True)
        decay = torch.sigmoid(-_SHIFT - self._inner).unsqueeze(-1) * onto
        by_u = torch.addcmul(grad, decay, self._unit, value=-1.0) / self._layer.num_layers
        turned = torch.addcmul(grad, onto, self._unit, value=-2.0)
        by_w = torch.addcmul(self._along * turned, decay, self._u, value=-1.0) / self._length
        return by_w, by_u


@form_of(Planar)
def pass_planar(layer: Any, x: Tensor, score: Tensor) -> Pass:
    """The pass of all the layers of a :class:`~pyro_flowvi.transforms.Planar`."""
    w, directions = layer.w, _Directions(layer)
    u_hat, c = directions.u_hat, directions.c
    mixing = u_hat @ w.t()
    inputs, acts = torch.addmm(layer.b.unsqueeze(-1), w, x.t()), []
    for k, row in enumerate(mixing.unbind(0)):
        acts.append(torch.tanh(inputs[k]))
        if k + 1 < layer.num_layers:
            inputs = torch.addr(inputs, row, acts[-1])
    act = torch.stack(acts, -1)
    slope = 1.0 - act.square()
    moves = score_moves(score, act, slope, c, u_hat, mixing)

    def pull(v: Tensor) -> tuple[Tensor, Gradients]:
        onto = slope * (v @ u_hat.t())
        steps = solve_layers(slope.unsqueeze(-1) * -mixing, onto, upper=True)
        by_u_hat, later = act.t() @ v, None
        if layer.num_layers > 1:
            later = (act.t() @ steps).triu(1)
            by_u_hat = torch.addmm(by_u_hat, later, w)
        by_w, by_u = directions.gradients(by_u_hat)
        by_w = torch.addmm(by_w, steps.t(), x)
        if later is not None:
            by_w = torch.addmm(by_w, later.t(), u_hat)
        grads = {w: by_w, layer.u: by_u, layer.b: steps.sum(0)}
        return torch.addmm(v, steps, w), trained(grads)

    return Pass(
        torch.addmm(x, act, u_hat),
        _planar_log_det(act, c).sum(-1),
        torch.addmm(score, moves, w),
        pull,
    )
