"""Which modes belong together: those between which a path leads without a dip of the log density."""

import torch
from torch import Tensor

from .gaussians import Gaussian
from .lbfgs import ValueAndGrad

__all__ = ["LEAST_DIP", "connected", "inverse_of_laplace", "straight_dips"]

LEAST_DIP = 1.0
"""Nats by which the density has to fall below the lower of two modes, on every path, for them to be two."""
IMAGES = 9
"""Points of a path, without its ends."""
ROUNDS = 30
RATE, MOST = 0.5, 1.0
"""Of a step of a path's points: its rate, and the length of the gradient at most, in standard deviations."""
NEIGHBOURS = 4
"""Modes nearest to each to which paths are bent; straight ones lead to all."""


def inverse_of_laplace(scale: Tensor) -> Tensor:
    """The inverses of factors of Laplace approximations, whose columns are orthogonal.

    Example::

        >>> inverse_of_laplace(torch.diag(torch.tensor([2.0, 0.5])))
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
    """
    sizes = scale.norm(dim=-2, keepdim=True)
    inverse: Tensor = (scale / sizes / sizes).mT
    return inverse


def _dips(values: Tensor) -> Tensor:
    """How far the density falls on paths, of values ``(N, images)``, below the lower of what it climbs to on
    both sides."""
    values = torch.where(values.isfinite(), values, -torch.inf)
    before = values.cummax(-1).values
    after = values.flip(-1).cummax(-1).values.flip(-1)
    fall: Tensor = (torch.minimum(before, after) - values).nan_to_num(torch.inf, torch.inf, torch.inf)
    return fall.max(-1).values


def _even(path: Tensor) -> Tensor:
    """The same paths, with points at equal distances, ``(N, images + 2, D)``."""
    num, size, dim = path.shape
    steps = (path[:, 1:] - path[:, :-1]).norm(dim=-1)
    along = torch.cat([steps.new_zeros(num, 1), steps.cumsum(-1)], -1)
    wanted = torch.linspace(0.0, 1.0, size).to(path) * along[:, -1:]
    after = torch.searchsorted(along.contiguous(), wanted.contiguous()).clamp(1, size - 1)
    low, high = along.gather(1, after - 1), along.gather(1, after)
    share = ((wanted - low) / (high - low).clamp(min=1e-12)).unsqueeze(-1)
    at = after.unsqueeze(-1).expand(-1, -1, dim)
    return torch.lerp(path.gather(1, at - 1), path.gather(1, at), share)


def straight_dips(value_and_grad: ValueAndGrad, first: Tensor, second: Tensor) -> Tensor:
    """How far the density falls on straight lines and rises again, shape ``(N,)``.

    :param first: shape ``(N, D)``.
    :param second: same shape.

    Example::

        >>> def ripple(z):
        ...     return 3.0 * z.cos().sum(-1), -3.0 * z.sin()
        >>> straight_dips(ripple, torch.zeros(1, 1), torch.full((1, 1), 6.2832)).round()
        tensor([6.])
    """
    share = torch.linspace(0.0, 1.0, IMAGES + 2).to(first).reshape(1, -1, 1)
    points = torch.lerp(first.unsqueeze(1), second.unsqueeze(1), share)
    values = value_and_grad(points.reshape(-1, points.shape[-1]))[0].reshape(points.shape[:2])
    return _dips(values)


def _bent(value_and_grad: ValueAndGrad, peaked: Gaussian, first: Tensor, second: Tensor) -> Tensor:
    """The least dips of paths between modes that climb, away from the straight line.

    A string method (E, Ren and Vanden-Eijnden 2002): points move along the gradient across the path, in the
    standard deviations of the first mode, and are spread evenly again.
    """
    scale = peaked.scale[first]
    ends = peaked.loc[first], peaked.loc[second]
    gap = (inverse_of_laplace(scale) @ (ends[1] - ends[0]).unsqueeze(-1)).squeeze(-1)
    path = torch.linspace(0.0, 1.0, IMAGES + 2).to(gap).reshape(1, -1, 1) * gap.unsqueeze(1)
    heights = value_and_grad(peaked.loc)[0]
    first_height, second_height = heights[first].unsqueeze(-1), heights[second].unsqueeze(-1)
    least = torch.full_like(heights[first], torch.inf)
    for turn in range(ROUNDS):
        z = ends[0].unsqueeze(1) + path[:, 1:-1] @ scale.mT
        values, gradients = value_and_grad(z.reshape(-1, z.shape[-1]))
        heights = torch.cat([first_height, values.reshape(z.shape[:2]), second_height], -1)
        least = torch.minimum(least, _dips(heights))
        slope = gradients.reshape(z.shape) @ scale
        along = torch.nn.functional.normalize(path[:, 2:] - path[:, :-2], dim=-1)
        slope = (slope - (slope * along).sum(-1, keepdim=True) * along).nan_to_num(0.0, 0.0, 0.0)
        slope = slope * (MOST / slope.norm(dim=-1, keepdim=True).clamp(min=MOST))
        path = _even(
            torch.cat([path[:, :1], path[:, 1:-1] + RATE * (1.0 - turn / ROUNDS) * slope, path[:, -1:]], 1)
        )
    return least


def connected(value_and_grad: ValueAndGrad, peaked: Gaussian) -> list[list[int]]:
    """Groups of modes between which paths lead on which the density hardly falls; the first first.

    :param value_and_grad: points ``(P, D)`` to log densities and gradients.
    :param peaked: Laplace approximations at the modes, factors with orthogonal columns.

    Example::

        >>> def ripple(z):
        ...     return (-0.02 * z**2 + 0.2 * (6.0 * z).cos()).sum(-1), -0.04 * z - 1.2 * (6.0 * z).sin()
        >>> at = Gaussian(torch.tensor([[0.0], [1.046]]), torch.full((2, 1, 1), 0.37), ("modes",) * 2)
        >>> connected(ripple, at)
        [[0, 1]]
    """
    size = len(peaked.kinds)
    group = list(range(size))

    def unite(first: Tensor, second: Tensor, dips: Tensor) -> None:
        for i, j, dip in zip(first.tolist(), second.tolist(), dips.tolist(), strict=True):
            if dip < LEAST_DIP and group[i] != group[j]:
                low, high = sorted((group[i], group[j]))
                group[:] = [low if g == high else g for g in group]

    if size > 1:
        first, second = torch.triu_indices(size, size, 1, device="cpu")
        unite(first, second, straight_dips(value_and_grad, peaked.loc[first], peaked.loc[second]))
        gap = (peaked.loc[second] - peaked.loc[first]).unsqueeze(-1)
        apart = (inverse_of_laplace(peaked.scale[first]) @ gap).squeeze(-1).norm(dim=-1)
        near = torch.full((size, size), torch.inf).to(apart)
        near[first, second] = near[second, first] = apart
        rank = near.argsort(-1).argsort(-1)
        close = torch.minimum(rank[first, second], rank[second, first]) < NEIGHBOURS
        ends = zip(first.tolist(), second.tolist(), strict=True)
        left = torch.tensor([group[i] != group[j] for i, j in ends], device="cpu")
        chosen = close.cpu() & left
        if bool(chosen.any()):
            first, second = first[chosen], second[chosen]
            unite(first, second, _bent(value_and_grad, peaked, first, second))
    return [[i for i in range(size) if group[i] == g] for g in dict.fromkeys(group)]
