"""Coverage probes: short chains from a guide's draws and from far around them.

Weights see the posterior only where the guide draws.  Chains that leave the guide's draws say whether these
are a fair sample of the posterior; chains that start far around them say what else there is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._program.batching import in_parts
from ..psis import generalized_pareto_shape
from ._chains import Chains, ChainStates, ValueAndGrad, Whitening, guarded, run_chains
from ._regions import Regions, find_regions

__all__ = ["Probes", "probe"]

Array = NDArray[np.float64]
NUM_CHAINS: Final = 128
"""Half of them start at draws of the guide, half far around them."""
FEW_CHAINS: Final = 32
FEW_EVALUATIONS: Final = 100
"""These instead where the model scores one point at a time."""
WARMUP: Final = 12
ANNEALED: Final = 0.35
"""Share of the gradients in which the far chains come to the temperature of the posterior."""
HOTTEST_START: Final = 20.0
"""Temperature at which far chains start."""
COLDEST_START: Final = 0.1
"""Temperature at which a third of the other half starts: to fall into narrow regions of high density."""
EVALUATIONS: Final = 280
"""Gradients for each chain."""
SCALES: Final = (2.0, 3.0, 4.5, 7.0, 11.0, 18.0, 30.0)
"""Multiples of the guide's spread at which far chains start."""
SHRUNK_SCALES: Final = (0.1, 0.3, 0.6, 1.0)
"""Multiples at which cold chains start."""
CANDIDATES: Final = 4
"""Points drawn for each far start, of which the likelier ones are taken."""
LOCATION_UNIT: Final = 0.5 / math.sqrt(math.pi)
"""d E[rank] / d(shift in sd) of a normal: the rank of N(d, 1) in N(0, 1) has mean Phi(d / sqrt 2)."""
SCALE_UNIT: Final = 0.5 / math.pi
"""d E|rank - 1/2| / d(log sd) of a normal at 1: the integral of |x| phi(x)^2."""
LEVEL: Final = 0.005
"""Chance that chains of an exact guide show a significant difference in any latent."""
UNSURE_SE: Final = 0.25
"""Standard error, in the units of a difference, from which on the chains decide nothing."""
MEMORY: Final = 0.95
"""Most of its start that a chain may be taken to remember: beyond, nothing is known of where it goes."""


@dataclass(frozen=True)
class Probes:
    """What the chains of :func:`pyro_flowvi.diagnose` saw, in unconstrained coordinates.

    :param location: worst difference of the centre of a latent, posterior less guide, in sd of the guide.
        It is measured by ranks among the guide's draws, on the scale of a normal: heavy tails do no harm.
    :param location_se: its standard error.
    :param location_name: the latent.
    :param scale: worst log ratio of the spread of a latent, posterior over guide, by ranks as well.
    :param scale_se: its standard error.
    :param scale_name: the latent.
    :param resampled: the worst of both against the resampled draws that is significant; 0 if none is.
    :param differs: whether location or scale differ from the guide's draws, by 0.1 and significantly.
    :param missed: share of the posterior mass in regions that the guide (almost) never visits.
    :param missed_at: the centre of the heaviest of these, in sd of the guide's draws from their mean.
    :param left: share of time that chains from the guide's draws spend outside the region of these.
    :param rhat: worst potential scale reduction between all chains that settled where the guide draws.
    :param tail_index: heaviest tail of a latent that the chains saw: 1/nu of a Student t, 0 of a normal.
    :param conclusive: whether the chains moved enough to decide about 0.2 sd.
    :param num_gradients: gradients of the log density that were computed.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> probes = pyro_flowvi.diagnose(model, model, seed=0).probes
        >>> probes.differs, probes.missed, probes.conclusive
        (False, 0.0, True)
    """

    location: float
    location_se: float
    location_name: str
    scale: float
    scale_se: float
    scale_name: str
    resampled: float
    differs: bool
    missed: float
    missed_at: float
    left: float
    rhat: float
    tail_index: float
    conclusive: bool
    num_gradients: int


def probe(
    value_and_grad: ValueAndGrad,
    z: Tensor,
    log_weights: Array,
    weights: Array,
    names: list[str],
    batched: bool = True,
    watch: Callable[[ChainStates], None] | None = None,
) -> Probes:
    """Runs the chains and compares them with the guide's draws.

    :param value_and_grad: unconstrained points ``(P, D)`` to log densities and gradients.
    :param z: draws of the guide, ``(S, D)``.
    :param log_weights: their log weights, ``(S,)``.
    :param weights: their smoothed weights, which sum to one, ``(S,)``.
    :param names: of the coordinates.
    :param batched: whether many points cost about as much as one: otherwise fewer and shorter chains.
    :param watch: is shown the states.

    Example::

        >>> def standard_normal(z):
        ...     return -0.5 * z.square().sum(-1), -z
        >>> equal = np.full(1000, 1e-3)
        >>> found = probe(standard_normal, 1.0 + torch.randn(1000, 1), np.log(equal), equal, ["x"])
        >>> found.differs, found.location_name, abs(found.location + 1.0) < 0.3
        (True, 'x', True)
    """
    whitening = Whitening.of(z)
    draws = whitening(z)
    density = guarded(value_and_grad, whitening, z)
    count, evaluations = (NUM_CHAINS, EVALUATIONS) if batched else (FEW_CHAINS, FEW_EVALUATIONS)
    half = count // 2
    near = draws[torch.randperm(len(draws))[:half]]
    far = _far_starts(density, draws, whitening, count - len(near))
    groups = (torch.arange(len(near) + len(far)) >= len(near)).long().to(z.device)
    cold = _cold(len(far)).to(z.device)
    first = torch.cat(
        [torch.ones(len(near)).to(draws), torch.where(cold, COLDEST_START, HOTTEST_START).to(draws)]
    )

    def temperature(used: float) -> Tensor:
        left = max(0.0, 1.0 - used / ANNEALED)
        return first**left

    chains = run_chains(density, torch.cat([near, far]), groups, temperature, WARMUP, evaluations)
    last = chains.states[len(chains.states) // 2 :]
    if watch is not None:
        start = whitening.inverse(torch.cat([near, far]))
        watch(ChainStates(start, whitening.inverse(last), groups == 0, value_and_grad))
    log_z = float(torch.logsumexp(torch.from_numpy(log_weights), 0)) - math.log(len(log_weights))
    regions = find_regions(
        density, draws, last, chains.log_p[-len(last) :], groups, log_z - whitening.log_det
    )
    return _compare(z, whitening, near, last, groups, weights, names, regions, chains)


def _cold(count: int) -> Tensor:
    """Which of the far chains start cold."""
    return torch.arange(count) % 3 == 2


def _far_starts(density: ValueAndGrad, draws: Tensor, whitening: Whitening, count: int) -> Tensor:
    """Points far around the guide's draws, near the origin of the model's space, and near the mean."""
    dim, total = draws.shape[-1], CANDIDATES * count
    group = torch.arange(total) // CANDIDATES
    turn = group // 3
    scale = torch.where(
        _cold(count)[group],
        torch.tensor(SHRUNK_SCALES)[turn % len(SHRUNK_SCALES)],
        torch.tensor(SCALES)[turn % len(SCALES)],
    )
    points = scale.to(draws).unsqueeze(-1) * draws[torch.randint(len(draws), (total,))]
    box = whitening(4.0 * torch.rand(total, dim).to(draws) - 2.0)
    from_box = (group % 3 == 1) & (turn % 2 == 1)
    points = torch.where(from_box.unsqueeze(-1).to(draws.device), box, points)
    # Of each few candidates the likeliest: the others of a sharp likelihood are beyond what a float holds.
    log_p = in_parts(density, points, NUM_CHAINS)[0].reshape(count, CANDIDATES)
    chosen = points.reshape(count, CANDIDATES, dim)[torch.arange(count), log_p.argmax(-1)]
    finite = log_p.amax(-1).isfinite().unsqueeze(-1)
    return torch.where(finite, chosen, draws[torch.randint(len(draws), (count,))])


def _ranks(z: Tensor, sorted_draws: Tensor) -> Tensor:
    """Mid-ranks of ``(*, D)`` among the draws, ``(S, D)`` sorted, between 0 and 1."""
    columns = sorted_draws.T.contiguous()
    values = z.reshape(-1, z.shape[-1]).T.contiguous()
    below = torch.searchsorted(columns, values) + torch.searchsorted(columns, values, right=True)
    return (0.5 * below.double() / len(sorted_draws)).T.reshape(z.shape)


def _gap(start: Array, mean: Array, expected: Array) -> tuple[Array, Array]:
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


def _compare(
    z: Tensor,
    whitening: Whitening,
    near: Tensor,
    last: Tensor,
    groups: Tensor,
    weights: Array,
    names: list[str],
    regions: Regions,
    chains: Chains,
) -> Probes:
    columns = z.double().sort(0).values
    guide = _ranks(z.double(), columns).cpu().numpy()
    start = _ranks(whitening.inverse(near), columns).cpu().numpy()
    visited = _ranks(whitening.inverse(last), columns).cpu().numpy()
    from_guide = (groups == 0).cpu().numpy()
    chance = LEVEL / (4 * z.shape[-1])
    from scipy.special import stdtrit

    bar = float(stdtrit(len(near) - 1, 1.0 - chance))
    results: list[tuple[float, float, str]] = []
    differs, resampled, conclusive = False, 0.0, True
    for unit, fold in ((LOCATION_UNIT, False), (SCALE_UNIT, True)):

        def f(rank: Array, fold: bool = fold) -> Array:
            return np.abs(rank - 0.5) if fold else rank

        expected = f(guide).mean(0)
        gap, se = _gap(f(start), f(visited[:, from_guide]).mean(0), expected)
        gap, se = gap / unit, np.maximum(se / unit, 1e-12)
        weighted = gap - (weights @ f(guide) - expected) / unit
        worst = int(np.argmax(np.abs(gap) - 2.0 * se))
        results.append((float(gap[worst]), float(se[worst]), names[worst]))
        differs = differs or bool(((np.abs(gap) > 0.1) & (np.abs(gap) > bar * se)).any())
        significant = np.where(np.abs(weighted) > bar * se, weighted, 0.0)
        resampled = max(resampled, float(np.abs(significant).max()))
        conclusive = conclusive and bool((se < UNSURE_SE).all())
    (location, location_se, location_name), (scale, scale_se, scale_name) = results
    settled = torch.from_numpy(from_guide) | regions.settled.cpu()
    return Probes(
        location,
        location_se,
        location_name,
        scale,
        scale_se,
        scale_name,
        resampled,
        differs,
        regions.share,
        regions.distance,
        regions.left,
        _rhat(visited[:, settled.numpy()]),
        _tail_index(whitening.inverse(last[:, groups == 0])),
        conclusive,
        chains.num_gradients,
    )


def _rhat(values: Array) -> float:
    """Worst rank-normalised potential scale reduction of chains, ``(T, P, D)`` (Vehtari et al. 2021)."""
    from scipy.special import ndtri

    if len(values) < 2:  # of a model that runs for one point at a time, with short steps
        return math.nan
    normal = ndtri(np.clip(values, 1e-3, 1.0 - 1e-3))
    within = normal.var(0, ddof=1).mean(0)
    between = normal.mean(0).var(0, ddof=1)
    length = len(values)
    ratio = ((length - 1) / length * within + between) / np.maximum(within, 1e-6)
    return float(np.sqrt(ratio).max())


def _tail_index(states: Tensor) -> float:
    """The largest generalised Pareto shape of |z - median| over all latents, of states ``(T, P, D)``."""
    flat = states.reshape(-1, states.shape[-1])
    distance: Any = (flat - flat.median(0).values).abs().cpu().numpy()
    return max(generalized_pareto_shape(column) for column in distance.T)
