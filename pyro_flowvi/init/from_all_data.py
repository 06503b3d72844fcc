"""A Gaussian for data that are read a part at a time: found on one part, then moved to all."""

from dataclasses import replace

import torch
from torch import Tensor

from .effort import Effort
from .gaussians import Gaussian, find_gaussian
from .lbfgs import ValueAndGrad

__all__ = ["effort_of", "find_in_frame"]

MANY, FEW = 3e7, 3e8
"""Numbers in all data above which a search reads them for fewer points."""


def effort_of(elements: float) -> Effort:
    """How many points the search on all data may look at.

    :param elements: numbers that one pass reads.

    Example::

        >>> effort_of(1e6).draws > effort_of(1e9).draws
        True
    """
    full = Effort(1, 60, 1, 0, 64, 1, (0, 16))
    if elements <= MANY:
        return full
    return replace(full, draws=32, refinements=(0, 8) if elements <= FEW else (0, 0))


def find_in_frame(value_and_grad: ValueAndGrad, rough: Gaussian, effort: Effort) -> Gaussian:
    """The best Gaussian near another one, in whose units the search goes on.

    In them a part's Gaussian is off by the square root of the number of parts at most, and its curvature
    nearly right: few evaluations are enough.

    :param value_and_grad: points ``(P, D)`` to log densities and gradients, of all data.
    :param rough: a batch of one.
    :param effort: how much to spend.

    Example::

        >>> def normal(z):
        ...     return -50.0 * ((z - 3.0) ** 2).sum(-1), 100.0 * (3.0 - z)
        >>> rough = Gaussian(torch.full((1, 2), 2.5), 0.2 * torch.eye(2).unsqueeze(0), ("laplace",))
        >>> best = find_in_frame(normal, rough, effort_of(1))
        >>> best.loc.round(decimals=2), best.scale.round(decimals=2)
        (tensor([[3., 3.]]), tensor([[[0.1000, 0.0000],
                 [0.0000, 0.1000]]]))
    """

    def in_frame(u: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = value_and_grad(rough.draw(u).squeeze(0))
        return value, rough.pull_back(gradient.unsqueeze(0)).squeeze(0)

    found = find_gaussian(in_frame, torch.zeros_like(rough.loc[0]), effort)
    loc = rough.draw(found.loc)[0]
    scale = rough.scale @ found.scale if rough.dense else rough.scale * found.scale
    best = Gaussian(loc, scale, found.kinds)
    return replace(best, kinds=rough.kinds if found.kinds[0] == "prior" else found.kinds)
