"""Which chains have settled where a guide does not draw, and of how much of the posterior they speak."""

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._chains import ChainStates, ValueAndGrad, Whitening

__all__ = ["Elsewhere", "elsewhere", "settled"]

Array = NDArray[np.float64]
SETTLED_LEVEL: Final = 0.05
"""Share of the chains from the guide's draws whose mean log density is below that of any settled chain."""
LEAST_SD: Final = 0.5
"""Of the log density, nats: what it is with half of a latent."""
NOISE_SD: Final = 2.0
"""How much likelier than the guide's a mode may seem, in sd of the log density, by noise of short chains."""
MOST_ODDS: Final = 2.0
"""Log odds of a mode that is likelier than the guide's, at most: no chain is ever all there is."""
MOST_CURVED: Final = 64
"""Up to this many latents the width of a mode is that of its second derivatives."""
NUM_CURVED: Final = 16
"""Chains from the guide's draws with which the width of another mode is compared."""
NUM_REFERENCES: Final = 2000
"""Draws of the guide to which distances are taken."""
NUM_STATES: Final = 5
"""States of each chain that are."""
WIDER_RADIUS: Final = 0.3
"""Squared distance, for each latent, that is left to a guide that is somewhat too narrow everywhere."""
MOST_SHARE: Final = 0.6
"""Share of distant states that makes a chain one of another mode."""
STEP: Final = 0.01
"""Step of their differences, in sd of the guide."""
LEAST_CURVATURE: Final = 1e-3
"""Curvature that a flat direction is taken to have, in the same unit."""


@dataclass(frozen=True)
class Elsewhere:
    """Chains that settled where the guide does not draw.

    :param weights: of each chain as a sample of what is there, ``(P,)``, summing to one; 0 of all others.
    :param share: of the posterior mass, as far as short chains can tell.
    """

    weights: Array
    share: float

    @property
    def num(self) -> int:
        """How many there are."""
        return int((self.weights > 0.0).sum())

    @property
    def effective(self) -> float:
        """How many equally weighted chains say as much."""
        return float(1.0 / (self.weights @ self.weights)) if self.num else 0.0


def settled(chains: ChainStates, z: Tensor) -> ChainStates:
    """The chains from the guide's draws, and of those from far starts the ones that settled elsewhere.

    A chain whose log density is far below the others', or that does not move, has not settled.

    :param z: draws of the guide, ``(S, D)``.
    """
    near = chains.from_guide.cpu().numpy()
    level = _log_p(chains, z).mean(0)
    whitening = Whitening.of(z)
    away = _beyond(whitening(z), whitening(chains.states))
    moving = (chains.states != chains.states[0]).any(-1).any(0).cpu().numpy()
    kept = near | (moving & away & (level > np.quantile(level[near], SETTLED_LEVEL)))
    rows = torch.from_numpy(kept).to(chains.from_guide.device)
    return replace(
        chains, start=chains.start[rows], states=chains.states[:, rows], from_guide=chains.from_guide[rows]
    )


def elsewhere(chains: ChainStates, z: Tensor, outputs: Array) -> Elsewhere:
    """The chains in other modes than the guide's, each mode with its mass.

    A chain that predicts what no other does says nothing.  How many start in the reach of a mode says nothing
    of its mass: that is of log density and width.

    :param chains: that settled.
    :param z: draws of the guide, ``(S, D)``.
    :param outputs: mean of the outputs over each chain, in units of their sd, ``(P, N)``.
    """
    near = chains.from_guide.cpu().numpy()
    weights, other = np.zeros(len(near)), ~near
    other[other] = _confirmed(outputs[other], outputs[near])
    if not other.any():
        return Elsewhere(weights, 0.0)
    log_p = _log_p(chains, z)
    home, scales = np.flatnonzero(near)[:NUM_CURVED], z.double().std(0).clamp_min(1e-12)
    odds = log_p.mean(0)
    for i in (*home, *np.flatnonzero(other)):
        odds[i] += _log_width(chains.density, chains.states[-1, i], scales, z)
    at_guide = log_p[:, near]
    noise = NOISE_SD * max(float(at_guide[np.isfinite(at_guide)].std()), LEAST_SD)
    for members in _modes(Whitening.of(z)(chains.states.mean(0)).cpu().numpy(), other):
        found = float(odds[members].mean() - np.median(odds[home]))
        weights[members] = math.exp(min(found, max(found - noise, 0.0), MOST_ODDS)) / len(members)
    total = float(weights.sum())
    return Elsewhere(weights / total, total / (1.0 + total))


def _log_p(chains: ChainStates, z: Tensor) -> Array:
    """Log density of each state, ``(T, P)``."""
    value = chains.density(chains.states.reshape(-1, z.shape[-1]).to(z))[0].double().nan_to_num(-torch.inf)
    log_p: Array = value.reshape(chains.states.shape[:2]).cpu().numpy()
    return log_p


def _beyond(draws: Tensor, states: Tensor) -> NDArray[np.bool_]:
    """Whether a chain is mostly farther from all draws than these are from one another.

    :param draws: whitened, ``(S, D)``.
    :param states: whitened, ``(T, P, D)``.
    """
    references = draws[torch.randperm(len(draws))[:NUM_REFERENCES]]
    distances = torch.cdist(references[:500], references)
    distances.fill_diagonal_(torch.inf)
    usual = distances.amin(-1).quantile(0.99)
    reach = (usual.square() + max(1.0, WIDER_RADIUS * draws.shape[-1])).sqrt()
    some = states[:: -(-len(states) // NUM_STATES)]
    nearest = torch.stack([torch.cdist(state, references).amin(-1) for state in some])
    beyond: NDArray[np.bool_] = ((nearest > reach).double().mean(0) >= MOST_SHARE).cpu().numpy()
    return beyond


def _confirmed(outputs: Array, usual: Array) -> NDArray[np.bool_]:
    """Whether another chain predicts as each does, as far as chains from the guide's draws do so."""
    from scipy.spatial.distance import cdist, pdist

    if len(outputs) < 2:
        return np.zeros(len(outputs), dtype=bool)
    distances = cdist(outputs, outputs, "chebyshev")
    np.fill_diagonal(distances, np.inf)
    confirmed: NDArray[np.bool_] = distances.min(0) <= np.quantile(pdist(usual, "chebyshev"), 0.95)
    return confirmed


def _modes(means: Array, other: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """The chains of each mode.

    :param means: of each chain, whitened, ``(P, D)``.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    counted = np.flatnonzero(other)
    labels = fcluster(linkage(means[counted], "average"), 4.0 + means.shape[-1] ** 0.5, "distance")
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
