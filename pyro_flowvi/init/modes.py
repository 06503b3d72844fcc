"""Where a mixture starts: the modes of a log density, a Gaussian at each, and their masses."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._mode_search import LEAST_SHARE, search
from .effort import Effort
from .gaussians import (
    MAX_DENSE_DIM,
    Gaussian,
    elbos,
    find_gaussian,
    normal_noise,
    refine,
)
from .lbfgs import ValueAndGrad

__all__ = ["PRIOR_DRAWS", "Modes", "find_modes"]

PRIOR_DRAWS = 32
"""Draws of the prior from which runs may start."""
DRAWS = 256
"""Draws of each Gaussian by which their weights are found."""
LEAST_ESS_SHARE = 0.02
"""Effective sample size, as a fraction of the draws, from which these are trusted."""
ROUNDS = 100
SPARE_WEIGHT = 0.1
"""Weight, as a fraction of that of its mode, of a component that is left over."""
SPARE_SCALES = (1.5, 0.7, 2.5)
"""Scales of components that are left over, as multiples of that of their mode."""


@dataclass(frozen=True)
class Modes:
    """K Gaussians and weights, the heaviest first.

    :param gaussian: the batch of K; factors are lower triangular, or diagonals in many dimensions.
    :param weights: shape ``(K,)``.
    :param found: how many modes they are at.

    Example::

        >>> pair = Gaussian(torch.zeros(2, 1), torch.ones(2, 1, 1), ("modes",) * 2)
        >>> Modes(pair, torch.tensor([0.8, 0.2]), 2).found
        2
    """

    gaussian: Gaussian
    weights: Tensor
    found: int


def log_densities(gaussian: Gaussian, z: Tensor) -> Tensor:
    """Of each Gaussian at each point, shape ``(S, M)``, of points ``(S, D)``."""
    gap = z.unsqueeze(1) - gaussian.loc
    if gaussian.dense:
        gap = torch.linalg.solve(gaussian.scale, gap.unsqueeze(-1)).squeeze(-1)
        log_det = torch.linalg.slogdet(gaussian.scale)[1]
    else:
        gap = gap / gaussian.scale
        log_det = gaussian.scale.abs().log().sum(-1)
    quadratic: Tensor = gap.square().sum(-1) + z.shape[-1] * math.log(2.0 * math.pi)
    log_density: Tensor = -0.5 * quadratic - log_det
    return log_density


def weigh(value_and_grad: ValueAndGrad, gaussian: Gaussian, bounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights with which the Gaussians are closest to the target, by expectation maximisation.

    On draws of all of them, weighted by importance (Cappé, Douc, Guillin, Marin and Robert, *Adaptive
    importance sampling in general mixture classes*, 2008); where too few of these count, by their ELBOs.

    :return: the weights, the draws and the shares of these in the target.
    """
    dim = gaussian.loc.shape[-1]
    z = gaussian.draw(normal_noise(DRAWS, dim, gaussian.loc, seed=5)).reshape(-1, dim)
    values = value_and_grad(z)[0]
    components = log_densities(gaussian, z)
    ratios = values - components.logsumexp(-1)
    ratios = torch.where(ratios.isfinite(), ratios, -torch.inf)
    shares = ratios.softmax(0)
    by_bounds = bounds.softmax(0)
    if not bool(shares.isfinite().all()) or float(shares.square().sum()) * LEAST_ESS_SHARE * len(z) > 1.0:
        by_draw = by_bounds.unsqueeze(-1).expand(-1, DRAWS).reshape(-1) / DRAWS
        return by_bounds, z, by_draw
    weights = torch.full_like(by_bounds, 1.0 / len(by_bounds))
    for _ in range(ROUNDS):
        weights = shares @ (components + weights.log()).softmax(-1)
    return weights, z, shares


def refined(value_and_grad: ValueAndGrad, modes: Gaussian, effort: Effort) -> tuple[Gaussian, Tensor]:
    """Gaussians moved by natural gradients, those of which that raises the ELBO; and their ELBOs."""
    like = modes.loc[0]
    count = max(16, effort.draws // 4)
    moved = refine(value_and_grad, modes, max(10, effort.refinements[0]), count, seed=1)
    noise = normal_noise(2 * effort.draws, len(like), like, seed=2)
    before, after = elbos(value_and_grad, modes, noise), elbos(value_and_grad, moved, noise)
    better = after > before
    gaussian = Gaussian(
        torch.where(better.unsqueeze(-1), moved.loc, modes.loc),
        torch.where(better.reshape(-1, 1, 1), moved.scale, modes.scale),
        modes.kinds,
    )
    return gaussian, torch.maximum(before, after)


def _with_spares(gaussian: Gaussian, weights: Tensor, num: int) -> tuple[Gaussian, Tensor]:
    """As many as wanted: those left over are at the modes again, with other scales and small weights."""
    places, scales, shares = list(range(len(weights))), [1.0] * len(weights), weights.tolist()
    for i in range(num - len(weights)):
        parent = i % len(weights)
        scales.append(SPARE_SCALES[i // len(weights) % len(SPARE_SCALES)])
        places.append(parent)
        shares.append(SPARE_WEIGHT * float(weights[parent]))
    chosen = gaussian.select(places)
    factor = torch.tensor(scales).to(weights).reshape(-1, *[1] * (chosen.scale.dim() - 1))
    total = torch.tensor(shares, dtype=weights.dtype, device=weights.device)
    return Gaussian(chosen.loc, chosen.scale_tril() * factor, chosen.kinds), total / total.sum()


@torch.no_grad()
def find_modes(
    value_and_grad: ValueAndGrad,
    start: Tensor,
    num: int,
    effort: Effort | None = None,
    prior: Tensor | None = None,
) -> Modes:
    """Gaussians at the modes of a log density, with their weights: where a mixture of ``num`` starts.

    L-BFGS in rounds from many points, near the start, far from it and of the prior, until three in succession
    bring no new mode, or eight where some are found, but fewer than ``num``; Laplace approximations at the
    distinct ends, the heaviest ``num`` of them; each refined by natural gradients if that raises its ELBO.
    The weights are those with which the mixture is closest to the target.  Where there is one mode at most,
    the Gaussian of :func:`find_gaussian`.  Components that are left over double the modes' own.

    :param value_and_grad: points ``(P, D)`` to log densities and gradients.
    :param start: the model's starting point, shape ``(D,)``.
    :param num: the number K of components.
    :param effort: how much to spend.
    :param prior: further points to start from, shape ``(S, D)``.

    Example::

        >>> def density(z):
        ...     return -0.125 * ((z**2).sum(-1) - 9.0) ** 2, -0.5 * ((z**2).sum(-1, True) - 9.0) * z
        >>> modes = find_modes(density, torch.zeros(1), 2)
        >>> modes.found, modes.gaussian.loc.squeeze().sort().values.round(), modes.weights
        (2, tensor([-3.,  3.]), tensor([0.5000, 0.5000]))
    """
    effort = Effort() if effort is None else effort
    prior = start.new_zeros(0, len(start)) if prior is None else prior
    modes = None
    if num > 1 and len(start) <= MAX_DENSE_DIM:
        peaked = search(value_and_grad, start, effort, prior, num)
        modes = peaked.select(range(min(num, len(peaked.kinds))))
    if modes is None or len(modes.kinds) < 2:
        best = find_gaussian(value_and_grad, start, effort)
        gaussian, weights = _with_spares(best, best.loc.new_ones(1), num)
        return Modes(gaussian, weights, 1)
    gaussian, bounds = refined(value_and_grad, modes, effort)
    weights = weigh(value_and_grad, gaussian, bounds)[0].clamp(min=LEAST_SHARE)
    order = weights.argsort(descending=True)
    gaussian, weights = _with_spares(gaussian.select(order.tolist()), weights[order], num)
    return Modes(gaussian, weights, len(order))
