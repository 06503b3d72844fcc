"""Which chains have settled, and of how much of the posterior each speaks."""

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._chains import ChainStates, ValueAndGrad, Whitening

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
"""Log odds of a mode that is likelier than the guide's, at most: no chain is ever all there is."""
MOST_CURVED: Final = 64
"""Up to this many latents the width of a mode is that of its second derivatives."""
NUM_CURVED: Final = 16
"""Chains from the guide's draws with which the width of another mode is compared."""
MIN_CHAINS: Final = 8
"""Chains from far starts that speak for the guide's own mode without those from its draws."""
STEP: Final = 0.01
"""Step of their differences, in sd of the guide."""
LEAST_CURVATURE: Final = 1e-3
"""Curvature that a flat direction is taken to have, in the same unit."""


def settled_weights(chains: ChainStates, z: Tensor, outputs: Array) -> Array:
    """Weights of the chains as a sample of the posterior, ``(P,)``: each mode counts by its mass.

    Of chains from far starts the ones whose log density is far below the others' have not settled, and say
    nothing; nor does one that predicts what no other does.  The others are gathered to modes.  How many start
    in the reach of a mode says nothing of its mass: modes count alike, unless log density and width say
    clearly otherwise.

    :param z: draws of the guide, ``(S, D)``.
    :param outputs: mean of the outputs over each chain, in units of their sd, ``(P, N)``.
    """
    flat = chains.states.reshape(-1, z.shape[-1])
    value = chains.density(flat.to(z))[0].double().nan_to_num(-torch.inf)
    log_p = value.reshape(chains.states.shape[:2]).cpu().numpy()
    near = chains.from_guide.cpu().numpy()
    level, at_guide = log_p.mean(0), log_p[:, near]
    usual = float(np.median(level[near]))
    sd = max(float(at_guide[np.isfinite(at_guide)].std()), LEAST_SD)
    settled = ~near & (level > usual - SETTLED_SD * sd)
    settled[settled] = _confirmed(outputs[settled], outputs[near])
    scales = z.double().std(0).clamp_min(1e-12)
    odds = np.zeros(len(near))
    for i in (*np.flatnonzero(settled), *np.flatnonzero(near)[:NUM_CURVED]):
        odds[i] = level[i] - usual + _log_width(chains.density, chains.states[-1, i], scales, z)
    home = float(np.median(odds[np.flatnonzero(near)[:NUM_CURVED]]))
    weights = np.zeros(len(near))
    for members in _modes(Whitening.of(z)(chains.states.mean(0)).cpu().numpy(), near, settled):
        if near[members].any():
            mass = 1.0
        else:
            found = float(odds[members].mean()) - home
            clear = math.copysign(max(abs(found) - NOISE_SD * sd, 0.0), found)
            mass = math.exp(min(clear, MOST_ODDS))
        far = members[settled[members]]
        of_mode = far if len(far) >= MIN_CHAINS else members
        weights[of_mode] += mass / len(of_mode)
    return weights


def _confirmed(outputs: Array, usual: Array) -> NDArray[np.bool_]:
    """Whether another chain predicts as each does, as far as chains from the guide's draws do so."""
    from scipy.spatial.distance import cdist, pdist

    if len(outputs) < 2:
        return np.zeros(len(outputs), dtype=bool)
    distances = cdist(outputs, outputs, "chebyshev")
    np.fill_diagonal(distances, np.inf)
    confirmed: NDArray[np.bool_] = distances.min(0) <= np.quantile(pdist(usual, "chebyshev"), 0.95)
    return confirmed


def _modes(means: Array, near: NDArray[np.bool_], settled: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """The chains from the guide's draws and those that settled among them, and the other modes' chains.

    :param means: of each chain, whitened, ``(P, D)``.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    counted = np.flatnonzero(near | settled)
    labels = fcluster(linkage(means[counted], "average"), 4.0 + means.shape[-1] ** 0.5, "distance")
    # The guide's own chains are one mode, however far they have gone.
    labels[np.isin(labels, labels[near[counted]])] = 0
    return [counted[labels == label] for label in np.unique(labels)]


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
