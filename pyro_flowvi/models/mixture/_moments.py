"""Means and covariances of the components of a mixture of flows, by draws."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ..._noise import own_noise

__all__ = ["Moments", "component_moments"]

Array = NDArray[np.float64]
NUM_DRAWS: Final = 20_000
"""Draws of each component: a mean is known to .7 % of a standard deviation."""
MAX_ELEMENTS: Final = 2**24
"""Of products of columns that are held at once."""


@dataclass(frozen=True)
class Moments:
    """Of each component, with standard errors by the number of draws.

    :param means: shape ``(K, D)``, as their errors.
    :param covariances: shape ``(K, D, D)``, as their errors.
    """

    means: Array
    means_se: Array
    covariances: Array
    covariances_se: Array

    def scaled(self, mean: Array, scale: Array) -> "Moments":
        """Those of ``mean + scale * x``.

        :param mean: shape ``(D,)``, as ``scale``.
        """
        square = scale[:, None] * scale
        return Moments(
            self.means * scale + mean,
            self.means_se * scale,
            self.covariances * square,
            self.covariances_se * square,
        )

    def with_constants(self, varying: NDArray[np.bool_]) -> "Moments":
        """Those of all columns, of which the others are standard normal.

        :param varying: the columns that these are of, shape ``(D,)``.
        """
        (num, _), dim = self.means.shape, len(varying)
        means, means_se = np.zeros((num, dim)), np.zeros((num, dim))
        covariances = np.where(varying, 0.0, np.eye(dim))[None].repeat(num, 0)
        covariances_se = np.zeros((num, dim, dim))
        means[:, varying], means_se[:, varying] = self.means, self.means_se
        places = np.ix_(np.arange(num), np.flatnonzero(varying), np.flatnonzero(varying))
        covariances[places], covariances_se[places] = self.covariances, self.covariances_se
        return Moments(means, means_se, covariances, covariances_se)


@torch.no_grad()
def component_moments(model: Any, seed: int = 0) -> Moments:
    """The moments of a :class:`VMoNF`'s components.

    Example::

        >>> from pyro_flowvi.models import VMoNF
        >>> model = VMoNF(2, 1).place(torch.tensor([[-9.0], [9.0]]), torch.ones(2, 1, 1))
        >>> component_moments(model).means.round(1).tolist()
        [[-9.0], [9.0]]
    """
    mixture = model.mixture()
    num, dim = mixture.num_components, model.dim
    rows = max(1, min(NUM_DRAWS, MAX_ELEMENTS // (num * dim * dim)))
    with own_noise(mixture.logits.device, seed=seed):
        shift = (
            mixture.rsample_components((rows,)).cpu().double().mean(0)
        )  # sums of squares near it do not cancel
        first, drawn = torch.zeros_like(shift), 0
        second = fourth = first.new_zeros(num, dim, dim)
        while drawn < NUM_DRAWS:
            x = mixture.rsample_components((min(rows, NUM_DRAWS - drawn),)).cpu().double()
            gap = (x - shift).movedim(1, 0)
            first = first + gap.sum(1)
            second = second + gap.mT @ gap
            fourth = fourth + gap.square().mT @ gap.square()
            drawn += len(x)
    mean = first / drawn
    moment = second / drawn
    covariance = moment - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    errors = (fourth / drawn - moment.square()).clamp_min(0.0)
    values = (shift + mean, variance / drawn, covariance, errors / drawn)
    means, means_var, covariances, covariances_var = (value.numpy() for value in values)
    return Moments(means, np.sqrt(means_var), covariances, np.sqrt(covariances_var))
