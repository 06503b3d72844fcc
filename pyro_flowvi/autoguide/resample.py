"""Draws of a guide, corrected by importance weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._compile.log_density import log_densities
from .._program.batching import in_parts
from .._program.log_density import UnconstrainedModel
from ..psis import psis, resample
from ._groups import find_groups

__all__ = ["importance_resample"]

POOL = 4
"""Draws of the guide for each one that is kept."""
MIN_POOL = 4000
CHUNK = 4096
"""Points at which the model is scored at once."""


@torch.no_grad()
def importance_resample(
    draw: Callable[[int], tuple[Tensor, Tensor]],
    density: UnconstrainedModel,
    num_samples: int,
    flow: Any = None,
) -> Tensor:
    """Draws of the posterior: a larger pool of the guide's, resampled by Pareto-smoothed weights.

    Sampling importance resampling with the weights of Vehtari et al. (2024).  It follows Pyro's seed.

    :param draw: from a number S to unconstrained draws ``(S, D)`` and their log densities ``(S,)``.
    :param density: the model.
    :param num_samples: how many draws are wanted.
    :param flow: the guide's map from noise; where it draws groups of latents that are independent given the
        roots, each of these is resampled by itself, and the roots by weights of their own.
    :return: shape ``(num_samples, D)``; some occur more than once.
    :raises ValueError: if fewer than 100 draws have a finite density.

    Example::

        >>> density = UnconstrainedModel(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
        >>> wide = dist.Normal(torch.zeros(1), 2.0).to_event(1)
        >>> draw = lambda size: (z := wide.sample((size,)), wide.log_prob(z))
        >>> abs(importance_resample(draw, density, 4000).std() - 1.0) < 0.1
        tensor(True)
    """
    size = max(MIN_POOL, POOL * num_samples)
    groups = find_groups(flow, density)
    if groups is not None:
        drawn = groups.draw(size, density.start)
        z, found = drawn.corrected, drawn.log_weights
    else:
        z, log_q = draw(size)
        found = in_parts(partial(log_densities, density), z, CHUNK) - log_q
    ratios = found.double().cpu().numpy()
    finite = np.isfinite(ratios)
    if finite.sum() < 100:
        raise ValueError(f"resample: expected draws with a finite density, got {finite.sum()} of {len(z)}")
    log_weights, _ = psis(ratios[finite])
    chosen = resample(log_weights, num_samples, seed=int(torch.randint(2**31, ())))
    kept: Tensor = z[torch.from_numpy(np.flatnonzero(finite)[chosen]).to(z.device)]
    return kept
