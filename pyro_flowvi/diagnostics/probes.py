"""Coverage probes: short chains from a guide's draws and from far around them.

Weights see the posterior only where the guide draws.  Chains that leave the guide's draws say whether these
are a fair sample of the posterior; chains that start far around them say what else there is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._program.packing import Packing
from ._chains import LEAPS_ALONE, ChainStates, ValueAndGrad, run_chains
from ._ranks import LOCATION_UNIT, SCALE_UNIT, gap_of, ranks, rhat, tail_index
from ._regions import Reach, Regions, find_regions
from ._spaces import Space, noise_space, whitened_space
from ._starts import Starts, far_starts, wide_starts
from ._symmetries import Symmetry, find_symmetry

__all__ = ["Probes", "probe"]

Array = NDArray[np.float64]
MOST_KNOWN: Final = 0.95
"""Share of the latents that must be known so well."""
MANY, VERY_MANY = 150, 3000
"""Latents above which fewer and shorter chains run over the noise."""
FEWEST_STATES: Final = 500
"""States of chains from which a tail can be read."""
MORE_STATES: Final = 16
"""States at most of a chain that goes on."""
LEVEL: Final = 0.005
"""Chance that chains of an exact guide show a significant difference in any latent."""
UNSURE_SE: Final = 0.25
"""Standard error, in the units of a difference, from which on the chains decide nothing."""


@dataclass(frozen=True)
class Effort:
    """How many chains are run, half of them from draws of the guide, and how many gradients each takes.

    Example::

        >>> Effort.of(10, batched=False, in_noise=False)
        Effort(num_chains=32, evaluations=100, warmup=12)
    """

    num_chains: int = 128
    evaluations: int = 280
    warmup: int = 12

    @classmethod
    def of(cls, dim: int, batched: bool, in_noise: bool) -> "Effort":
        """By the number of latents, which are many where chains run over the noise, in which few steps do.

        :param batched: whether many points cost about as much as one: otherwise fewer and shorter chains.
        """
        if not batched:
            return cls(32, 100)
        if not in_noise:
            return cls()
        if dim <= MANY:
            return cls(128, 180)
        return cls(64, 160, 6) if dim <= VERY_MANY else cls(32, 120, 4)


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
    :param rhat: worst potential scale reduction between all chains that settled where the guide draws, of
        modes far apart within each.
    :param tail_index: heaviest tail of a latent that the chains saw: 1/nu of a Student t, 0 of a normal.
    :param conclusive: whether the chains moved enough to decide about 0.2 sd.
    :param num_gradients: gradients of the log density that were computed.
    :param symmetry: under which the missed regions are mirror images of where the guide draws; None if they
        are not.

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
    symmetry: Symmetry | None = None


def probe(
    value_and_grad: ValueAndGrad,
    z: Tensor,
    log_weights: Array,
    weights: Array,
    names: list[str],
    effort: Effort,
    flow: Any = None,
    corrected: Tensor | None = None,
    watched: Tensor | None = None,
    packing: Packing | None = None,
    watch: Callable[[ChainStates], None] | None = None,
) -> Probes:
    """Runs the chains and compares them with the guide's draws.

    :param value_and_grad: unconstrained points ``(P, D)`` to log densities and gradients.
    :param z: draws of the guide, ``(S, D)``.
    :param log_weights: their log weights, ``(S,)``.
    :param weights: their smoothed weights, which sum to one, ``(S,)``.
    :param names: of the coordinates.
    :param effort: how many chains, and how long.
    :param flow: the guide's map from standard normal noise, in which the chains then run; None without one.
    :param watched: coordinates of which all must be known well, and most of the others; None for all.
    :param corrected: the draws as the weights hold for them, if that are others, ``(S, D)``.
    :param packing: what the points are made of, in which symmetries are looked for.
    :param watch: is shown the states.

    Example::

        >>> def standard_normal(z):
        ...     return -0.5 * z.square().sum(-1), -z
        >>> equal = np.full(1000, 1e-3)
        >>> z = 1.0 + torch.randn(1000, 1)
        >>> found = probe(standard_normal, z, np.log(equal), equal, ["x"], Effort())
        >>> found.differs, found.location_name, abs(found.location + 1.0) < 0.3
        (True, 'x', True)
    """
    whitened = whitened_space(value_and_grad, z)
    count, evaluations = effort.num_chains, effort.evaluations
    if flow is None:
        space, far = whitened, wide_starts(whitened, count // 2)
    else:
        space = noise_space(value_and_grad, z, flow)
        far = far_starts(space, whitened, count // 4, effort.warmup, evaluations)
    near = Starts.tempered(space.draws[torch.randperm(len(space.draws))[: count // 2]])
    start = Starts.joined([near, far])
    groups = (torch.arange(len(start.points)) >= len(near.points)).long().to(z.device)
    chains = run_chains(space.density, start.points, groups, start.temperature, effort.warmup, evaluations)
    half = len(chains.states) // 2
    last, log_p = chains.states[half:].clone(), chains.log_p[half:].clone()
    reach = Reach(space.draws, last[:, groups == 1])
    num_more = _continue(space, reach, last, log_p, effort.warmup)
    if watch is not None:
        watch(ChainStates(space.latents(start.points), space.latents(last), groups == 0, value_and_grad))
    log_z = float(torch.logsumexp(torch.from_numpy(log_weights), 0)) - math.log(len(log_weights))
    regions = find_regions(space.density, space.draws, reach, last, log_p, groups, log_z)
    found = _compare(
        z,
        z if corrected is None else corrected,
        space,
        near.points,
        last,
        groups,
        weights,
        names,
        regions,
        watched,
        chains.num_gradients + num_more,
    )
    if packing is None or not regions.states:
        return found
    missed = [space.latents(states) for states in regions.states]
    symmetry = find_symmetry(value_and_grad, packing, z, missed, regions.masses)
    if symmetry is None:
        return found
    return replace(found, missed=symmetry.missed(regions.share), symmetry=symmetry)


def _continue(space: Space, reach: Reach, states: Tensor, log_p: Tensor, warmup: int) -> int:
    """Lets chains that are where the guide does not draw go on, in place: one that is on its way arrives.

    :return: gradients that were computed.
    """
    lost = torch.nonzero(reach.lost(states, log_p)).squeeze(-1)
    if not len(lost):
        return 0
    start = Starts.tempered(states[-1, lost])
    alone = torch.ones_like(lost)
    evaluations = LEAPS_ALONE * (min(len(states), MORE_STATES) + warmup) + 1
    more = run_chains(space.density, start.points, alone, start.temperature, warmup, evaluations)
    again = torch.linspace(0, len(more.states) - 1, len(states)).round().long().to(states.device)
    states[:, lost], log_p[:, lost] = more.states[again], more.log_p[again]
    return more.num_gradients


def _compare(
    z: Tensor,
    corrected: Tensor,
    space: Space,
    near: Tensor,
    last: Tensor,
    groups: Tensor,
    weights: Array,
    names: list[str],
    regions: Regions,
    watched: Tensor | None,
    num_gradients: int,
) -> Probes:
    columns = z.double().sort(0).values
    guide, moved = (ranks(draws.double(), columns).cpu().numpy() for draws in (z, corrected))
    start = ranks(space.latents(near), columns).cpu().numpy()
    visited = ranks(space.latents(last), columns).cpu().numpy()
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
        gap, se = gap_of(f(start), f(visited[:, from_guide]).mean(0), expected)
        noise = f(guide).std(0) / math.sqrt(len(z))  # of the draws that the ranks are among
        gap, se = gap / unit, np.maximum(np.hypot(se, noise) / unit, 1e-12)
        weighted = gap - (weights @ f(moved) - expected) / unit
        worst = int(np.argmax(np.abs(gap) - 2.0 * se))
        results.append((float(gap[worst]), float(se[worst]), names[worst]))
        differs = differs or bool(((np.abs(gap) > 0.1) & (np.abs(gap) > bar * se)).any())
        significant = np.where(np.abs(weighted) > bar * se, weighted, 0.0)
        resampled = max(resampled, float(np.abs(significant).max()))
        conclusive = conclusive and _is_sure(se, watched)
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
        rhat(visited[:, settled.numpy()], last.cpu().numpy()[:, settled.numpy()]),
        _tails(space.latents(last[:, groups == 0])),
        conclusive,
        num_gradients,
    )


def _tails(states: Tensor) -> float:
    """The heaviest tail of a latent, where the states ``(T, P, D)`` are enough to tell."""
    return tail_index(states) if states.shape[:2].numel() >= FEWEST_STATES else math.nan


def _is_sure(se: Array, watched: Tensor | None) -> bool:
    """Whether standard errors are small enough, of very many but for some, which are themselves uncertain."""
    if watched is None:
        return bool((se < UNSURE_SE).all())
    return bool((se[watched.cpu().numpy()] < UNSURE_SE).all() and np.quantile(se, MOST_KNOWN) < UNSURE_SE)
