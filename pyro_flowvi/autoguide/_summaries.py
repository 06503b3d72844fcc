"""Medians and quantiles of a guide, at points that are the same at every call."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..transforms.compose import Chain

__all__ = ["marginal_quantiles", "reference_normal", "sample_quantiles"]

QUANTILE_DRAWS = 8192
QUANTILE_ELEMENTS = 2**20
_MAX_SOBOL_DIM = 21201
"""The largest dimension of torch's Sobol sequence."""


def reference_normal(num_points: int, dim: int) -> Tensor:
    """Standard normal quasi-Monte Carlo points, float64, shape ``(num_points, dim)``.

    The same at every call: summaries are repeatable and leave Pyro's generator alone.
    """
    engine = torch.quasirandom.SobolEngine(min(dim, _MAX_SOBOL_DIM), scramble=True, seed=0)
    uniform = engine.draw(num_points, dtype=torch.float64)
    if dim > _MAX_SOBOL_DIM:
        generator = torch.Generator().manual_seed(0)
        rest = torch.rand(
            (num_points, dim - _MAX_SOBOL_DIM), generator=generator, dtype=torch.float64, device="cpu"
        )
        uniform = torch.cat([uniform, rest], -1)
    points: Tensor = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
    return points


def marginal_quantiles(
    flow: Chain,
    probs: Tensor,
    split: Callable[[Tensor], dict[str, Tensor]],
    bijection_of: Callable[[str], Any],
) -> dict[str, Tensor]:
    """Marginal quantiles of each site, ``probs.shape + site shape``, by quasi-Monte Carlo.

    :param flow: the transform of a standard normal vector.
    :param split: from packed latents to unconstrained values by site.
    :param bijection_of: from the name of a site to the map onto its support.
    """
    like = next(flow.parameters(), torch.zeros(()))
    # In parts: a spline has 23 parameters for each latent of each point.
    parts = reference_normal(QUANTILE_DRAWS, flow.dim).to(like).split(max(1, QUANTILE_ELEMENTS // flow.dim))
    return sample_quantiles(split(torch.cat([flow(part) for part in parts])), probs.to(like), bijection_of)


def sample_quantiles(
    points: Mapping[str, Tensor], probs: Tensor, bijection_of: Callable[[str], Any]
) -> dict[str, Tensor]:
    """Quantiles of each site, ``probs.shape + site shape``, over points of the unconstrained space.

    :param points: unconstrained values by site, the points first.
    """
    result = {}
    for name, free in points.items():
        bijection = bijection_of(name)
        if free.numel() == 0:
            result[name] = bijection(free[0].expand(probs.shape + free.shape[1:]))
        elif bijection.domain.event_dim == 0:  # elementwise: exact for decreasing maps as well
            result[name] = torch.quantile(bijection(free), probs, dim=0)
        else:
            result[name] = bijection(torch.quantile(free, probs, dim=0))
    return result
