"""Comparing the states of chains with a guide's draws by their ranks among these."""

import math
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..psis import generalized_pareto_shape

__all__ = ["LOCATION_UNIT", "SCALE_UNIT", "gap_of", "ranks", "rhat", "tail_index"]

Array = NDArray[np.float64]
LOCATION_UNIT: Final = 0.5 / math.sqrt(math.pi)
"""d E[rank] / d(shift in sd) of a normal: the rank of N(d, 1) in N(0, 1) has mean Phi(d / sqrt 2)."""
SCALE_UNIT: Final = 0.5 / math.pi
"""d E|rank - 1/2| / d(log sd) of a normal at 1: the integral of |x| phi(x)^2."""
MEMORY: Final = 0.95
"""Most of its start that a chain may be taken to remember: beyond, nothing is known of where it goes."""

FEWEST_CHAINS: Final = 4
"""Chains of a mode whose agreement is looked at."""
MODE_GAP: Final = 3.0
"""Distance in sd of single chains between the nearest ones of two modes, and half a unit for each latent."""
ROAMING: Final = 3.0
"""How many times as far as the usual chain one moves that is taken for one that goes between modes."""


def ranks(z: Tensor, sorted_draws: Tensor) -> Tensor:
    """Mid-ranks of ``(*, D)`` among the draws, ``(S, D)`` sorted, between 0 and 1."""
    columns = sorted_draws.T.contiguous()
    values = z.reshape(-1, z.shape[-1]).T.contiguous()
    below = torch.searchsorted(columns, values) + torch.searchsorted(columns, values, right=True)
    return (0.5 * below.double() / len(sorted_draws)).T.reshape(z.shape)


def gap_of(start: Array, mean: Array, expected: Array) -> tuple[Array, Array]:
    """E_p f - E_q f of each column and its standard error, from independent chains that start from q.

    Where chains remember a share b of their start, E[mean - b start] = (1 - b) E_p f; the start also serves
    as a control variate, its expectation being known.

    :param start: f at the starts, ``(P, D)``.
    :param mean: f averaged over each chain, ``(P, D)``.
    :param expected: E_q f, ``(D,)``.
    """
    centred = start - start.mean(0)
    memory = (centred * mean).mean(0) / np.maximum((centred**2).mean(0), 1e-300)
    memory = np.clip(memory, 0.0, MEMORY)
    residual = mean - expected - memory * (start - expected)
    scale = 1.0 - memory
    return residual.mean(0) / scale, residual.std(0, ddof=1) / math.sqrt(len(start)) / scale


def rhat(values: Array, states: Array) -> float:
    """Worst rank-normalised potential scale reduction of chains (Vehtari et al. 2021).

    Of chains in modes far apart, which no short chain leaves, that within each mode.

    :param values: ranks, ``(T, P, D)``.
    :param states: the same states in coordinates that tell modes apart.
    """
    from scipy.special import ndtri

    if (
        len(values) < 2 or not values.shape[1]
    ):  # of a model that runs for one point at a time, with short steps
        return math.nan
    normal = ndtri(np.clip(values, 1e-3, 1.0 - 1e-3))
    labels = _modes(states)
    sizes = np.bincount(labels)
    modes = [mode for mode in range(1, len(sizes)) if sizes[mode] >= FEWEST_CHAINS]
    found = [_reduction(normal[:, labels == mode]) for mode in modes]
    return max(found, default=_reduction(normal))


def _reduction(normal: Array) -> float:
    within = normal.var(0, ddof=1).mean(0)
    between = normal.mean(0).var(0, ddof=1) if normal.shape[1] > 1 else np.zeros_like(within)
    length = len(normal)
    ratio = ((length - 1) / length * within + between) / np.maximum(within, 1e-6)
    return float(np.sqrt(ratio).max())


def _modes(states: Array) -> NDArray[np.int64]:
    """Which mode each chain is in, 0 for one that goes between them.

    A gap of many standard deviations of single chains parts two modes.
    """
    num, dim = states.shape[1:]
    labels = np.ones(num, dtype=np.int64)
    if num < 2 * FEWEST_CHAINS:
        return labels
    from scipy.cluster.hierarchy import fcluster, linkage

    own = states.std(0)
    usual = np.maximum(np.median(own, 0), 1e-12)
    stays = (own < ROAMING * usual).all(1)
    if stays.sum() > 1:
        links = linkage(states.mean(0)[stays] / usual, "single")
        labels[stays] = fcluster(links, MODE_GAP + 0.5 * dim**0.5, "distance")
    if labels.max() > 1:
        labels[~stays] = 0
    return labels


def tail_index(states: Tensor) -> float:
    """The largest generalised Pareto shape of |z - median| over all latents, of states ``(T, P, D)``."""
    flat = states.reshape(-1, states.shape[-1])
    distance: Any = (flat - flat.median(0).values).abs().cpu().numpy()
    return max(generalized_pareto_shape(column) for column in distance.T)
