"""Coordinates that chains run in: the model's latents, whitened, or the noise of a guide's map."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._compile.pulled_back import pulled_back
from ..transforms.base import forward_and_log_det, inverse_and_log_det
from ._chains import ValueAndGrad, Whitening, guarded

__all__ = ["Space", "noise_space", "whitened_space"]


@dataclass(frozen=True)
class Space:
    """Coordinates u of the latents z, in float64, in which a guide's draws have about unit spread.

    :param density: points ``(P, D)`` to log densities of z with the log-determinant of dz/du, and gradients;
        minus infinity and zero where the model fails.
    :param latents: points ``(*, D)`` to latents.
    :param coordinates: latents ``(P, D)`` to points; rows that have none are not finite.
    :param draws: the guide's own draws as points, ``(S, D)``.
    """

    density: ValueAndGrad
    latents: Callable[[Tensor], Tensor]
    coordinates: Callable[[Tensor], Tensor]
    draws: Tensor


def whitened_space(value_and_grad: ValueAndGrad, z: Tensor) -> Space:
    """The model's latents, by mean and covariance of a guide's draws ``(S, D)``.

    :param value_and_grad: latents ``(P, D)`` to log densities and gradients.
    """
    whitening = Whitening.of(z)
    inner, log_det = guarded(value_and_grad, whitening, z), whitening.log_det

    def density(u: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = inner(u)
        return value + log_det, gradient

    return Space(density, whitening.inverse, whitening, whitening(z))


def noise_space(value_and_grad: ValueAndGrad, z: Tensor, flow: Any) -> Space:
    """The noise of a guide's map, of which its draws are standard normal whatever the latents' shape is.

    Of a guide that is right the density there is the standard normal one, without funnel, ridge or bend.

    :param z: draws of the guide, ``(S, D)``.
    :param flow: the map from noise to latents.
    """

    pulled = pulled_back(flow, value_and_grad, z[0])
    size, dim = z.shape
    as_it_is = Whitening(z.new_zeros(dim).double(), z.new_ones(dim).double())

    @torch.no_grad()
    def latents(x: Tensor) -> Tensor:
        image: Tensor = forward_and_log_det(flow, x.to(z).reshape(-1, dim))[0]
        return image.double().reshape(x.shape)

    @torch.no_grad()
    def coordinates(points: Tensor) -> Tensor:
        return inverse_and_log_det(flow, points.to(z))[0].double()

    draws = torch.randn(size, dim, dtype=torch.float64).to(z.device)
    return Space(guarded(pulled, as_it_is, z), latents, coordinates, draws)
