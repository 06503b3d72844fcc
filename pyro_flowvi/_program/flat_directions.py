"""Directions in which improper priors leave a posterior flat: no guide can be right there."""

import torch
from torch import Tensor

from .batching import in_parts
from .log_density import UnconstrainedModel

__all__ = ["flat_sites"]

MAX_DIM = 500
"""Coordinates with an improper prior up to which the directions are looked for."""
CHUNK = 64
"""Points at which the model is scored at once."""
_SPREAD = 0.5
"""Standard deviation of the points around the start."""
_ROUNDING = 100.0
"""Multiples of eps by which gradients may fail to cancel along a direction."""
_ENDS = (1.0, 10.0, 1000.0)
"""How far along a direction the density is looked at, in unconstrained units."""


def flat_sites(density: UnconstrainedModel) -> list[str]:
    """The latents with improper priors along which the data say nothing; in the model's order.

    Along such a direction the gradient of the log density, without the Jacobian of the supports, is zero at
    every point: the directions are the null space of the gradients at many points, each coordinate in units
    of its largest gradient.  Where a support is bounded the Jacobian makes the posterior proper after all.

    :param density: the model.

    Example::

        >>> def model(y):
        ...     b = pyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), (2,)))
        ...     pyro.sample("y", dist.Normal(b.sum(-1), 1.0), obs=y)
        >>> flat_sites(UnconstrainedModel(model, (torch.tensor(1.0),)))
        ['b']
    """
    places = density.improper.nonzero().squeeze(-1)
    if not 0 < len(places) <= MAX_DIM:
        return []
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(places) + 8, density.dim, generator=generator, device="cpu").to(density.start)
    points = density.start + _SPREAD * noise
    gradients = in_parts(density.value_and_grad, points, CHUNK)[1] - density.log_det_gradient(points)
    gradients = gradients[:, places].double()
    if not bool(gradients.isfinite().all()):
        return []
    unit = gradients.abs().amax(0)
    scaled = gradients / torch.where(unit == 0.0, 1.0, unit)
    _, sizes, directions = torch.linalg.svd(scaled, full_matrices=True)
    allowed = _ROUNDING * torch.finfo(density.start.dtype).eps * sizes[0].clamp(min=1.0)
    flat: list[Tensor] = []
    for direction in directions[sizes <= allowed]:
        step = direction / torch.where(unit == 0.0, 1.0, unit)
        move = torch.zeros_like(density.start)
        move[places] = (step / step.abs().max()).to(move)
        if _stays(density, move):
            moves = torch.zeros_like(density.improper)
            moves[places] = direction.abs() > 1e-3
            flat.append(moves)
    if not flat:
        return []
    moved = density.packing.split(torch.stack(flat).any(0))
    return [name for name, part in moved.items() if bool(part.any())]


def _stays(density: UnconstrainedModel, move: Tensor) -> bool:
    """Whether the density does not fall along a direction, at one of its ends, overflow aside.

    Predictors that are nearly collinear leave the gradients to rounding, but not the density far out.
    """
    here = density.log_density(density.start).detach()
    allowed = 0.1 + 1e4 * torch.finfo(here.dtype).eps * here.abs()
    for sign in (1.0, -1.0):
        ends = torch.stack([density.start + sign * distance * move for distance in _ENDS])
        there = density.log_density(ends).detach()
        if bool((there.isnan() | (there >= here - allowed)).all()):
            return True
    return False
