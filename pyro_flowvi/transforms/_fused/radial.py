r"""The pass of radial layers in a row.

With :math:`\delta_k = x_{k-1} - c_k` layer k has the Jacobian :math:`J_k = A_k I - f_k \delta_k \delta_k^T`,
so that the score and a vector on its way back are, up to factors, what they were plus multiples of the δ.
With :math:`e^{L_k} = A_1 \cdots A_k` the multiples of all layers solve one triangular system for each point,
of the matrix :math:`E_{kj} = e^{L_j - L_k} \delta_k \cdot \delta_j`: below its diagonal for the score, above
it for the way back.
"""

from typing import Any

import torch
from torch import Tensor

from ...numerics import norm_floor
from ..radial import Radial, radial_params
from ._pass import Gradients, Pass, form_of, trained
from .planar import solve_layers

__all__ = ["pass_radial"]

aten = torch.ops.aten


def _combine(weights: Tensor, deltas: Tensor) -> Tensor:
    """Of each point a sum of its K vectors."""
    return torch.bmm(weights.unsqueeze(1), deltas).squeeze(1)


def _onto(deltas: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(deltas, v.unsqueeze(-1)).squeeze(-1)


@form_of(Radial)
def pass_radial(layer: Any, x: Tensor, score: Tensor) -> Pass:
    """The pass of all the layers of a :class:`~pyro_flowvi.transforms.Radial`."""
    moved = torch.add(layer.a, layer.b / layer.num_layers)
    alpha, beta = radial_params(layer.a, layer.b / layer.num_layers)
    found, radii = [], []
    rows = zip(layer.centre.unbind(0), alpha.unbind(0), beta.unbind(0), strict=True)
    for centre_k, alpha_k, beta_k in rows:
        found.append(x - centre_k)
        radii.append(torch.linalg.vector_norm(found[-1], dim=-1, keepdim=True))
        x = torch.addcmul(x, found[-1], beta_k / (alpha_k + radii[-1]))
    deltas, radius = torch.stack(found, 1), torch.cat(radii, -1).clamp_min(norm_floor(x.dtype) ** 0.5)
    height = (alpha + radius).reciprocal()
    stretch = beta * height
    curved = stretch * height
    tilt = alpha * height
    across, along = 1.0 + stretch, torch.addcmul(torch.ones_like(tilt), tilt, stretch)
    log_across = torch.log1p(stretch)
    log_det = torch.add(torch.log1p(tilt * stretch), log_across, alpha=layer.dim - 1).sum(-1)
    grown = across
    between = None  # the layers, of which one has none
    if layer.num_layers > 1:
        total = log_across.cumsum(-1)
        grown, to_last = total.exp(), (total - total[:, -1:]).exp()
        ratio = (total.unsqueeze(-2) - total.unsqueeze(-1)).exp()  # k, j: what is between the two
        between = to_last, ratio, ratio * torch.bmm(deltas, deltas.mT)
    whole = grown[:, -1:]
    # In each layer score = score / A + m δ, with m = e ((D - 1) / A + 2 α h / (1 + α β h²) + score · δ / A).
    rate = curved / (along * radius)
    right = (layer.dim - 1) / across + 2.0 * tilt / along
    moves = rate * torch.addcdiv(right, _onto(deltas, score), grown)
    if between is not None:
        to_last, _, mixed = between
        moves = solve_layers(rate.unsqueeze(-1) * -mixed, moves, upper=False) * to_last
    new_score = torch.addcdiv(_combine(moves, deltas), score, whole)

    def pull(v: Tensor) -> tuple[Tensor, Gradients]:
        # In each layer v = A v - f (δ · v) δ.
        force = curved / (radius * across)
        onto = _onto(deltas, v)
        if between is not None:
            to_last, ratio, mixed = between
            onto = solve_layers(mixed * force.unsqueeze(-2), onto / to_last, upper=True)
        steps = force * onto
        back = torch.addcmul(-_combine(steps * grown, deltas), v, whole)
        by_height = height * onto
        by_beta, by_alpha = by_height.sum(0), -(stretch * by_height).sum(0)
        outer = aten.softplus_backward(by_beta, moved, 1.0, 20.0)
        inner = aten.softplus_backward(by_alpha - by_beta, layer.a, 1.0, 20.0)
        # By the centre (I - J) v = f (δ · v) δ - stretch v, v being between the layers.
        own = steps * across
        if between is None:
            by_centre, left = own.t() @ deltas[:, 0], stretch
        else:
            later = (stretch.unsqueeze(-1) * ratio).triu(1)
            weights = torch.addcmul(torch.diag_embed(own), later, steps.unsqueeze(-2))
            by_centre, left = weights.transpose(0, 1).flatten(1) @ deltas.flatten(0, 1), stretch / to_last
        by_centre = torch.addmm(by_centre, left.t(), v, alpha=-1)
        grads = {layer.centre: by_centre, layer.a: outer + inner, layer.b: outer / layer.num_layers}
        return back, trained(grads)

    return Pass(x, log_det, new_score, pull)
