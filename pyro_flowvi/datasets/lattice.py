"""Equal normals at the points of a lattice: islands, of which a single flow finds some."""

import itertools
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._checks import check_positive_int

__all__ = ["NINE_MODES", "NormalLattice", "nine_modes"]


@dataclass(frozen=True)
class NormalLattice:
    """The mixture of equal normals at all points whose coordinates are of ``places``.

    :param places: the coordinates.
    :param dim: the dimension D; there are K = ``len(places) ** dim`` normals.
    :param sd: standard deviation of each, in every direction.

    Example::

        >>> lattice = NormalLattice((-1.0, 1.0), dim=3)
        >>> lattice.locs.shape, lattice.log_prob(torch.zeros(5, 3)).shape
        (torch.Size([8, 3]), torch.Size([5]))
    """

    places: tuple[float, ...]
    dim: int = 2
    sd: float = 0.25

    @property
    def locs(self) -> Tensor:
        """The means, shape ``(K, D)``."""
        return torch.tensor(list(itertools.product(self.places, repeat=self.dim)))

    @property
    def reach(self) -> float:
        """Half the side of a box around the origin that holds nearly all mass."""
        return max(map(abs, self.places)) + 4.0 * self.sd

    def component_log_prob(self, x: Tensor) -> Tensor:
        """The log density of each normal, shape ``(*, K)``, at ``x`` of shape ``(*, D)``."""
        distance = (x.unsqueeze(-2) - self.locs.to(x)).square().sum(-1)
        return -0.5 * distance / self.sd**2 - self.dim * math.log(self.sd * math.sqrt(2.0 * math.pi))

    def log_prob(self, x: Tensor) -> Tensor:
        """The log density, shape ``(*,)``, at ``x`` of shape ``(*, D)``."""
        return self.component_log_prob(x).logsumexp(-1) - self.dim * math.log(len(self.places))

    def masses(self, x: Tensor) -> Tensor:
        """The share of draws ``x``, shape ``(S, D)``, near each normal, shape ``(K,)``.

        Near: within 3 standard deviations in the plane, as many times :math:`\\sqrt{D / 2}` in D dimensions.
        """
        distance, nearest = torch.cdist(x, self.locs.to(x)).min(-1)
        near = nearest[distance < 3.0 * self.sd * math.sqrt(self.dim / 2.0)]
        return torch.bincount(near, minlength=len(self.locs)) / len(x)

    def draw(self, num_per_class: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """As many points of each normal, shape ``(N, D)``, normal after normal, and which, shape ``(N,)``.

        :raises ValueError: if ``num_per_class`` is not a positive integer.
        """
        locs = np.array(list(itertools.product(self.places, repeat=self.dim)))
        labels = np.repeat(np.arange(len(locs)), check_positive_int("num_per_class", num_per_class))
        noise = np.random.default_rng(seed).standard_normal((len(labels), self.dim))
        return locs[labels] + self.sd * noise, labels


NINE_MODES: Final = NormalLattice((-2.0, 0.0, 2.0))
"""The nine modes of Caterini, Cornish, Sejdinovic and Doucet, *Variational Inference with
Continuously-Indexed Normalizing Flows*, 2020: standard deviation .25, 8 of them apart."""


def nine_modes(num_per_class: int = 100, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Points of :data:`NINE_MODES`.

    :param num_per_class: the number of points of each mode.
    :param seed: of the noise.
    :return: points, shape ``(N, 2)``, mode after mode, and the modes, shape ``(N,)``.
    :raises ValueError: if ``num_per_class`` is not a positive integer.

    Example::

        >>> points, labels = nine_modes(10)
        >>> points.shape, NINE_MODES.log_prob(torch.as_tensor(points)).shape
        ((90, 2), torch.Size([90]))
    """
    return NINE_MODES.draw(num_per_class, seed)
