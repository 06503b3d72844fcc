"""Unnormalised densities of two variables with known normalising constants."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..numerics import safe_norm

__all__ = ["ENERGIES", "ENERGY_BOX", "Energy"]

ENERGY_BOX: Final = (-4.0, 4.0)
"""The interval to which z1 is confined under the :data:`ENERGIES`: three of them are improper without."""


def _bell(x: Tensor, scale: float) -> Tensor:
    """The logarithm of a Gaussian bell of height 1."""
    return -0.5 * (x / scale).square()


def _wave(z: Tensor) -> Tensor:
    """z2 - w1, the height above the wave w1 = sin(2 pi z1 / 4)."""
    return z[..., 1] - torch.sin(0.5 * math.pi * z[..., 0])


def _ring(z: Tensor) -> Tensor:
    two_spots = torch.logaddexp(_bell(z[..., 0] - 2.0, 0.6), _bell(z[..., 0] + 2.0, 0.6))
    return -_bell(safe_norm(z) - 2.0, 0.4) - two_spots


def _one_wave(z: Tensor) -> Tensor:
    return -_bell(_wave(z), 0.4)


def _split_wave(z: Tensor) -> Tensor:
    w2 = 3.0 * _bell(z[..., 0] - 1.0, 0.6).exp()
    return -torch.logaddexp(_bell(_wave(z), 0.35), _bell(_wave(z) + w2, 0.35))


def _forked_wave(z: Tensor) -> Tensor:
    w3 = 3.0 * torch.sigmoid((z[..., 0] - 1.0) / 0.3)
    return -torch.logaddexp(_bell(_wave(z), 0.4), _bell(_wave(z) + w3, 0.35))


@dataclass(frozen=True)
class Energy:
    r"""An unnormalised density of two variables, :math:`p(z) = e^{-U(z)} / Z` for z1 in ENERGY_BOX.

    For a guide q of :meth:`model`, KL(q || p) = E[log q(z) + U(z)] + log Z = -ELBO + log Z, exactly.

    :param name: of the energy.
    :param function: U, from z of shape ``(*, 2)`` to ``(*,)``.
    :param log_normalizer: log Z.

    Example::

        >>> energy = Energy("bowl", lambda z: 0.5 * z.square().sum(-1), 1.837814)
        >>> energy(torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
        tensor([0.0000, 2.5000])
    """

    name: str
    function: Callable[[Tensor], Tensor]
    log_normalizer: float

    def __call__(self, z: Tensor) -> Tensor:
        """U(z), shape ``(*,)``, of z of shape ``(*, 2)``."""
        return self.function(z)

    def model(self, weight: float | Tensor = 1.0) -> None:
        """A Pyro model of the sites "z1", in ENERGY_BOX, and "z2", real, of log density -``weight`` U.

        :param weight: 1 for the target; less, to begin with a flatter one (annealing).
        """
        z1 = pyro.sample("z1", dist.ImproperUniform(constraints.interval(*ENERGY_BOX), (), ()))
        z2 = pyro.sample("z2", dist.ImproperUniform(constraints.real, (), ()))
        pyro.factor("minus_energy", -weight * self(torch.stack([z1, z2], -1)))


ENERGIES: Final[Mapping[str, Energy]] = MappingProxyType(
    {
        "U1": Energy("U1", _ring, 1.877502),
        "U2": Energy("U2", _one_wave, 2.082089),
        "U3": Energy("U3", _split_wave, 2.641705),
        "U4": Energy("U4", _forked_wave, 2.710698),
    }
)
"""The four test energies of Rezende and Mohamed, *Variational Inference with Normalizing Flows*, 2015,
table 1: a ring with two spots, a wave, a wave that splits and joins, a wave that forks::

    >>> ENERGIES["U2"](torch.tensor([1.0, 1.0]))
    tensor(0.)
    >>> guide = pyro_flowvi.AutoPlanar(ENERGIES["U2"].model).materialize()
    >>> sorted(guide.sample_posterior(3))
    ['z1', 'z2']
"""
