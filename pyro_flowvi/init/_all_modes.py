"""How many modes a log density has: rounds of searches until they bring no new one, and which are one."""

from dataclasses import replace

import torch
from torch import Tensor

from ._bent_paths import connected
from ._mode_search import search
from .effort import Effort
from .gaussians import MAX_DENSE_DIM, Gaussian, find_gaussian
from .lbfgs import ValueAndGrad
from .modes import Modes, log_densities, refined, weigh

__all__ = ["MAX_COMPONENTS", "find_all_modes"]

MAX_COMPONENTS = 32
"""Modes that get a component, the heaviest."""
LEAST_MASS = 5e-3
"""Mass below which a mode gets none."""
MOST_OVERLAP = 0.1
"""Share of the lighter component's mass that belongs to both, above which two are one."""


def shared_mass(shares: Tensor, responsibilities: Tensor) -> Tensor:
    """Of the lighter one of each two components, the share of its mass that belongs to both, ``(K, K)``.

    :param shares: of weighted draws, shape ``(S,)``.
    :param responsibilities: of the components for them, ``(S, K)``.
    """
    masses = shares @ responsibilities
    common = (shares.unsqueeze(-1) * responsibilities).mT @ responsibilities
    return common / torch.minimum(masses.unsqueeze(0), masses.unsqueeze(1)).clamp(min=1e-12)


def _without_overlap(
    value_and_grad: ValueAndGrad, gaussian: Gaussian, bounds: Tensor
) -> tuple[Gaussian, Tensor]:
    """Gaussians of which no two share mass and each has some, with their weights."""
    while True:
        weights, z, shares = weigh(value_and_grad, gaussian, bounds)
        size = len(weights)
        if size == 1:
            return gaussian, weights
        overlap = shared_mass(shares, (log_densities(gaussian, z) + weights.log()).softmax(-1))
        overlap.fill_diagonal_(0.0)
        kept = list(range(size))
        if bool(weights.min() < LEAST_MASS):
            kept.remove(int(weights.argmin()))
        elif bool(overlap.max() > MOST_OVERLAP):
            pair = divmod(int(overlap.argmax()), size)
            kept.remove(min(pair, key=lambda i: float(bounds[i])))
        else:
            return gaussian, weights
        gaussian, bounds = gaussian.select(kept), bounds[kept]


@torch.no_grad()
def find_all_modes(
    value_and_grad: ValueAndGrad, start: Tensor, effort: Effort | None = None, prior: Tensor | None = None
) -> Modes:
    """Gaussians at all modes of a log density that a search finds, with their weights.

    L-BFGS runs in rounds, each from new points, until three in succession bring no new mode with mass, where
    there are several eight, or 32 are over.  Two modes are one where a path leads from one to the other on
    which the density falls by less than a factor of e below the lower one, or where their Gaussians, refined
    by natural gradients, share a tenth of their mass.  Modes with less than .5 % of the mass are left out,
    and all but the 32 heaviest.  Where one mode is left, it has the Gaussian of :func:`find_gaussian`; so it
    is above 200 dimensions.

    :param value_and_grad: points ``(P, D)`` to log densities and gradients.
    :param start: the model's starting point, shape ``(D,)``.
    :param effort: how much to spend on a round.
    :param prior: further points to start from, shape ``(S, D)``.

    Example::

        >>> def density(z):
        ...     return -0.125 * ((z**2).sum(-1) - 9.0) ** 2, -0.5 * ((z**2).sum(-1, True) - 9.0) * z
        >>> modes = find_all_modes(density, torch.zeros(1))
        >>> modes.found, modes.gaussian.loc.squeeze().sort().values.round(), modes.weights
        (2, tensor([-3.,  3.]), tensor([0.5000, 0.5000]))
    """
    effort = Effort() if effort is None else effort
    prior = start.new_zeros(0, len(start)) if prior is None else prior
    if len(start) <= MAX_DENSE_DIM:
        peaked = search(value_and_grad, start, effort, prior)
        groups = connected(value_and_grad, peaked)
        peaked = peaked.select([group[0] for group in groups])
        if len(groups) > 1:
            gaussian, bounds = refined(value_and_grad, peaked, effort)
            gaussian, weights = _without_overlap(value_and_grad, gaussian, bounds)
            if len(weights) > 1:
                order = weights.argsort(descending=True)[:MAX_COMPONENTS]
                gaussian = gaussian.select(order.tolist())
                weights = weights[order] / weights[order].sum()
                return Modes(replace(gaussian, scale=gaussian.scale_tril()), weights, len(order))
    best = find_gaussian(value_and_grad, start, effort)
    return Modes(best, best.loc.new_ones(1), 1)
