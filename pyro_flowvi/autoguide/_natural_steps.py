"""Natural-gradient steps of the affine map of a guide, behind a flow that stays as it is."""

from typing import Any

import torch
from torch import Tensor

from .._compile.log_density import TracedDensity
from .._compile.pulled_back import pulled_back_at
from ..init.gaussians import MAX_MOVE, normal_noise
from ..transforms import ElementwiseAffine, LowerAffine
from ..transforms.base import forward_with_score
from ._affine import affine_matrix, set_affine
from ._message_map import MessageMap
from ._on_roots import OnRoots

__all__ = ["climb"]

STEPS = 8
"""Steps at most."""
FEWEST, MOST, MOST_EACH, ELEMENTS = 32, 128, 2, 64_000
"""Draws a step at least and at most, for each coordinate if there are many, and numbers of all draws."""
SETTLED = 0.02
"""Standard deviations, and logarithms of scales, by which a step that changes nothing moves at most."""
FACTOR = 4.0
"""How much a step widens or narrows a variance at most."""


@torch.no_grad()
def climb(flow: Any, affine: Any, places: Tensor | None, density: TracedDensity) -> None:
    """Moves a flow's affine map towards the best ELBO by natural gradients, with the flow as it is.

    As of a Gaussian (Khan and Rue 2023, equation 11), with the flow's score as control variate: there is no
    noise where the guide is the posterior.  A triangular factor stays one.

    :param places: the coordinates that the map sees; None for all.
    """
    dim = density.density.dim
    num = max(FEWEST, min(max(MOST, MOST_EACH * affine.dim), ELEMENTS // dim))
    before, layer = _before(flow, affine), flow[-1] if isinstance(flow[-1], MessageMap) else None
    inside = slice(None) if places is None else places
    for step in range(STEPS):
        w = normal_noise(num, dim, density.density.start, seed=100 + step)
        score = -w
        for part in before:
            w, _, score = forward_with_score(part, w, score)
        y = w.clone()
        y[:, inside] = affine(w[:, inside])
        value, gradient = density(y) if layer is None else pulled_back_at(layer, density, y)
        rate = 1.0 / (1.0 + 0.5 * step)
        if _step(affine, w[:, inside], score[:, inside], value, gradient[:, inside], rate) < SETTLED:
            break


def _before(flow: Any, affine: Any) -> list[Any]:
    """The parts before the affine map."""
    found = []
    for part in flow:
        if part is affine or (isinstance(part, OnRoots) and part.inner is affine):
            break
        found.append(part)
    return found


def _step(affine: Any, w: Tensor, score: Tensor, value: Tensor, gradient: Tensor, rate: float) -> float:
    """One step, and how many standard deviations, or by which logarithm of a scale, it moves at most.

    :param w: draws before the affine map, with their ``score``.
    :param value: the target's log density after it, with its ``gradient``.
    """
    good = value.isfinite() & gradient.isfinite().all(-1)
    if int(good.sum()) < 2:
        return 0.0
    w, score, gradient = w[good], score[good], gradient[good]
    if isinstance(affine, LowerAffine):
        return _dense_step(affine, w, gradient @ affine_matrix(affine) - score, rate)
    if isinstance(affine, ElementwiseAffine):
        return _diagonal_step(affine, w, gradient * affine_matrix(affine) - score, rate)
    move = _clipped(rate * (_slopes_before(affine, gradient) - score).mean(0))
    affine.loc.copy_(affine(move))
    return float(move.abs().max())


def _dense_step(affine: Any, w: Tensor, slope: Tensor, rate: float) -> float:
    matrix, centre, width = affine_matrix(affine), w.mean(0), _factor_of(w)
    v = torch.linalg.solve_triangular(width, (w - centre).mT, upper=False).mT
    slope = slope @ width
    change = slope.mT @ v / len(v)
    precision = torch.eye(len(centre)).to(v) - 0.5 * rate * (change + change.mT)
    values, vectors = torch.linalg.eigh(precision)
    values = values.clamp(1.0 / FACTOR, FACTOR)
    covariance = (vectors / values) @ vectors.mT
    move = _clipped(rate * covariance @ slope.mean(0))
    base = matrix @ width
    scale = torch.linalg.solve_triangular(
        width, base @ torch.linalg.cholesky(covariance), upper=False, left=False
    )
    set_affine(affine, affine.loc + matrix @ centre + base @ move - scale @ centre, scale)
    return max(float(move.abs().max()), float(0.5 * values.log().abs().max()))


def _diagonal_step(affine: Any, w: Tensor, slope: Tensor, rate: float) -> float:
    matrix, centre, width = affine_matrix(affine), w.mean(0), w.std(0)
    slope = slope * width
    precision = (1.0 - rate * (slope * (w - centre) / width).mean(0)).clamp(1.0 / FACTOR, FACTOR)
    move, scale = _clipped(rate * slope.mean(0) / precision), matrix * precision.rsqrt()
    set_affine(affine, affine.loc + matrix * (centre + width * move) - scale * centre, scale)
    return max(float(move.abs().max()), float(0.5 * precision.log().abs().max()))


def _clipped(move: Tensor) -> Tensor:
    clipped: Tensor = move * (MAX_MOVE / move.norm().clamp(min=MAX_MOVE))
    return clipped


def _factor_of(w: Tensor) -> Tensor:
    """A lower factor of the covariance of rows, towards a diagonal one where these are few."""
    covariance = torch.cov(w.mT).reshape(w.shape[-1], w.shape[-1])
    share = min(0.9, w.shape[-1] / len(w))
    shrunk = (1.0 - share) * covariance + share * torch.diag(covariance.diagonal())
    factor: Tensor = torch.linalg.cholesky(shrunk)
    return factor


def _slopes_before(affine: Any, gradient: Tensor) -> Tensor:
    """Gradients in the coordinates before an affine map."""
    with torch.enable_grad():
        x = torch.zeros_like(gradient).requires_grad_()
        (slopes,) = torch.autograd.grad((affine(x) * gradient).sum(), x)
    result: Tensor = slopes
    return result
