"""Which chains from far starts have settled, and of how much of the posterior each speaks."""

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._chains import ChainStates, ValueAndGrad

__all__ = ["settled_weights"]

Array = NDArray[np.float64]
SETTLED_SD: Final = 4.0
"""How far the mean log density of a settled chain may lie below that of the chains from the guide's draws, in
sd of the log density."""
LEAST_SD: Final = 0.5
"""Of the log density, nats: what it is with half of a latent."""
NOISE_SD: Final = 2.0
"""Difference in log mass, in the same sd, that is noise of a short chain."""
MOST_ODDS: Final = 2.0
"""Log odds of a mode that is likelier than the guide's, at most: one chain is never all there is."""
MOST_CURVED: Final = 64
"""Up to this many latents the width of a mode is that of its second derivatives."""
NUM_CURVED: Final = 16
"""Chains from the guide's draws with which the width of another mode is compared."""
STEP: Final = 0.01
"""Step of their differences, in sd of the guide."""
LEAST_CURVATURE: Final = 1e-3
"""Curvature that a flat direction is taken to have, in the same unit."""


def settled_weights(chains: ChainStates, z: Tensor) -> Array:
    """Weights of the chains from far starts, ``(P,)``; 0 of the others, and of those that have not settled.

    How many far starts end in a mode says how much of the mass it has; where its log density and its width
    say clearly otherwise, they correct it.  A chain whose log density is far below the others' has not
    settled, and says nothing.

    :param z: draws of the guide, ``(S, D)``.
    """
    flat = chains.states.reshape(-1, z.shape[-1])
    value = chains.density(flat.to(z))[0].double().nan_to_num(-torch.inf)
    log_p = value.reshape(chains.states.shape[:2]).cpu().numpy()
    near = chains.from_guide.cpu().numpy()
    level, at_guide = log_p.mean(0), log_p[:, near]
    usual = float(np.median(level[near]))
    sd = max(float(at_guide[np.isfinite(at_guide)].std()), LEAST_SD)
    weights = np.zeros(len(near))
    scales = z.double().std(0).clamp_min(1e-12)
    last, home = chains.states[-1], np.flatnonzero(near)[:NUM_CURVED]
    width = float(np.median([_log_width(chains.density, last[i], scales, z) for i in home]))
    for i in np.flatnonzero(~near & (level > usual - SETTLED_SD * sd)):
        odds = level[i] - usual + _log_width(chains.density, last[i], scales, z) - width
        clear = math.copysign(max(abs(odds) - NOISE_SD * sd, 0.0), odds)
        weights[i] = math.exp(min(clear, MOST_ODDS))
    return weights


def _log_width(density: ValueAndGrad, point: Tensor, scales: Tensor, like: Tensor) -> float:
    """log of the volume of a mode, in sd of the guide and up to a constant, by the curvature at a point.

    With many latents by the slope, whose square is the curvature on average where a mode is normal.
    """
    dim = len(point)
    if dim > MOST_CURVED:
        slope = density(point.unsqueeze(0).to(like))[1].double() * scales
        return -0.5 * dim * math.log(max(float(slope.square().mean()), LEAST_CURVATURE))
    steps = STEP * torch.diag(scales)
    points = torch.cat([point + steps, point - steps]).to(like)
    forward, backward = (density(points)[1].double() * scales).chunk(2)
    curvature = (backward - forward) / (2.0 * STEP)
    values = torch.linalg.eigvalsh((0.5 * (curvature + curvature.T)).nan_to_num(0.0, 0.0, 0.0))
    return -0.5 * float(values.abs().clamp_min(LEAST_CURVATURE).log().sum())
