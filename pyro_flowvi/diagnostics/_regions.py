"""Regions in which chains settle and a guide does not draw, and their share of the mass."""

import copy
import math
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from .._program.batching import in_parts
from ._chains import ValueAndGrad

__all__ = ["Reach", "Regions", "find_regions"]

MARGIN: Final = 1.0
"""Distance beyond the usual one to the nearest draw, in sd of the guide, that makes a point a far one."""
BEYOND_SD: Final = 0.5
"""Distance beyond all draws along one direction, in sd of the guide, that makes a point a far one."""
WIDER_RADIUS: Final = 0.3
"""Squared distance, for each latent, that is left to a guide that is somewhat too narrow everywhere."""
NUM_REFERENCES: Final = 2000
NUM_DIRECTIONS: Final = 3
MOST_SHARE: Final = 0.6
"""Share of far states that makes a chain a far one."""
NUM_POINTS: Final = 512
"""Points by which a region's mass is measured."""
NUM_STATES: Final = 256
"""States by which its slopes are measured."""
MAX_SPREAD_DIM: Final = 20
"""Up to this many latents the states of short chains measure a region's width."""
MIN_CHAINS: Final = 3
"""Chains that must have found a region of more latents than that: a single one says little about its mass."""
UNSETTLED_MASS: Final = 0.05
"""Nats, for each of more latents than that, that chains from afar may lack: better to warn than to miss."""
FEWEST_MOVES: Final = 5
"""States of a chain that differ from those before, fewer of which say nothing about where it is."""
DISAGREE, DISAGREE_EACH = 3.0, 0.1
"""Nats by which chains that settled may differ in a region's mass, and for each latent."""
NUM_USUAL: Final = 5
LEAST_ESS: Final = 8.0
"""Effective draws from which a mass is known."""
ROUNDS, TEMPERED_ESS = 4, 40.0
"""Fits of the normal that they come from, each to as many effective draws of the last."""
MAX_REGIONS: Final = 6


@dataclass(frozen=True)
class Regions:
    """What lies outside the region where a guide draws.

    :param share: of the posterior mass.
    :param distance: of the heaviest region from the guide's mean, in sd of the guide.
    :param left: share of far states of the chains that started at the guide's draws.
    :param settled: chains that ended up among the guide's draws, ``(P,)``.
    :param states: of the chains in each region, whitened, ``(n, D)``.
    :param masses: the share of each.
    """

    share: float
    distance: float
    left: float
    settled: Tensor
    states: list[Tensor] = field(default_factory=list)
    masses: list[float] = field(default_factory=list)


class Reach:
    """Whether points are far from all draws of a guide.

    :param draws: of about unit spread, ``(S, D)``.
    :param states: of chains, ``(T, P, D)``: two modes far apart in many dimensions differ along one direction
        only, that of the chains' means.
    """

    def __init__(self, draws: Tensor, states: Tensor) -> None:
        order = torch.randperm(len(draws))
        self.references = draws[order[:NUM_REFERENCES]]
        distances = torch.cdist(self.references[:500], self.references)
        distances[torch.arange(len(distances)), torch.arange(len(distances))] = torch.inf
        usual = distances.amin(-1).quantile(0.99)
        self.reach = (usual.square() + max(MARGIN**2, WIDER_RADIUS * draws.shape[-1])).sqrt()
        self._draws = draws
        self._look_along(states)

    def _look_along(self, states: Tensor) -> None:
        means = states.mean(0)
        _, _, axes = torch.linalg.svd(means - means.mean(0), full_matrices=False)
        self.directions = axes[:NUM_DIRECTIONS].T
        projected = self._project(self._draws)
        beyond = BEYOND_SD if self._draws.shape[-1] <= MAX_SPREAD_DIM else 3.0 * BEYOND_SD
        self.low = projected.amin(0) - beyond
        self.high = projected.amax(0) + beyond

    def along(self, states: Tensor) -> "Reach":
        """The same along directions of other chains."""
        other = copy.copy(self)
        other._look_along(states)
        return other

    def _project(self, points: Tensor) -> Tensor:
        along = points @ self.directions
        # Of very many latents some are always beyond the draws.
        return torch.cat([points, along], -1) if points.shape[-1] <= MAX_SPREAD_DIM else along

    def far(self, points: Tensor) -> Tensor:
        """Whether each of ``(*, D)`` is far from all draws."""
        flat = points.reshape(-1, points.shape[-1])
        nearest = torch.cat([torch.cdist(part, self.references).amin(-1) for part in flat.split(1024)])
        projected = self._project(flat)
        outside = ((projected < self.low) | (projected > self.high)).any(-1)
        return ((nearest > self.reach) | outside).reshape(points.shape[:-1])

    def lost(self, states: Tensor, log_p: Tensor) -> Tensor:
        """Which chains are mostly far, ``(P,)``."""
        often = self.far(states).double().mean(0)
        return (often >= MOST_SHARE) & log_p.isfinite().all(0)


def find_regions(
    density: ValueAndGrad,
    draws: Tensor,
    reach: Reach,
    states: Tensor,
    log_p: Tensor,
    groups: Tensor,
    log_z: float,
) -> Regions:
    """Clusters the chains that settled away from a guide's draws, and weighs them.

    :param density: of points.
    :param draws: of the guide, ``(S, D)``.
    :param reach: from before the chains that are far went on: along a direction that a chain has chosen
        itself it is always far.
    :param states: of the chains, ``(T, P, D)``.
    :param log_p: their log densities, ``(T, P)``.
    :param groups: 0 of the chains that started at the guide's draws, ``(P,)``.
    :param log_z: log of the mass where the guide draws.
    """
    means, often = states.mean(0), reach.far(states).double().mean(0)
    left = _left(reach, states[:, groups == 0])
    # A chain that hardly anything moves is where the density is beyond what a float can tell.
    moves = (states[1:] != states[:-1]).any(-1).sum(0)
    lost = reach.lost(states, log_p) & (moves >= min(FEWEST_MOVES, len(states) // 2))
    settled = (often < 0.1) & ~lost
    masses: list[tuple[float, float]] = []
    found: list[Tensor] = []
    if bool(lost.any()):
        for members in _clusters(means, lost, log_p):
            region = states[:, members].reshape(-1, states.shape[-1])
            if not _agree(density, states[:, members], log_p[:, members], reach):
                continue
            mass = _log_mass(density, region, log_p[:, members].reshape(-1), reach)
            if math.isnan(mass):
                continue
            if states.shape[-1] > MAX_SPREAD_DIM:
                mass += log_z - _usual_mass(density, states, log_p, groups, len(members), reach)
                mass += UNSETTLED_MASS * states.shape[-1]
            masses.append((mass, float(region.mean(0).norm())))
            found.append(region)
    total = torch.logsumexp(torch.tensor([log_z, *(mass for mass, _ in masses)], dtype=torch.float64), 0)
    shares = [math.exp(mass - float(total)) for mass, _ in masses]
    distance = max(masses)[1] if masses else 0.0
    return Regions(float(sum(shares)), distance, max(left, 0.0), settled, found, shares)


def _agree(density: ValueAndGrad, states: Tensor, log_p: Tensor, reach: Reach) -> bool:
    """Whether two halves of the chains in a region, or of the states of a single one, tell the same mass."""
    size, dim = states.shape[1:]
    if size > 1:
        halves = [slice(0, None, 2), slice(1, None, 2)]
        parts = [(states[:, half], log_p[:, half]) for half in halves]
    else:
        middle = len(states) // 2
        parts = [(states[:middle], log_p[:middle]), (states[middle:], log_p[middle:])]
    one, other = (
        _log_mass(density, part.reshape(-1, dim), value.reshape(-1), reach) for part, value in parts
    )
    return abs(one - other) < DISAGREE + DISAGREE_EACH * dim  # not where one is NaN


def _left(reach: Reach, states: Tensor) -> float:
    """Share of states that are far, more than of the draws, each along directions of other chains."""
    size, parts = states.shape[1], []
    for own in (torch.arange(size) % 2 == 0, torch.arange(size) % 2 == 1):
        seen = reach.along(states[:, ~own.to(states.device)])
        parts.append(seen.far(states[:, own.to(states.device)]).double().mean())
        parts.append(-seen.far(reach.references).double().mean())
    return 0.5 * float(torch.stack(parts).sum())


def _clusters(means: Tensor, lost: Tensor, log_p: Tensor) -> list[Tensor]:
    """The chains of each group of ``lost`` ones within a few sd of one another, the densest first."""
    indices = torch.nonzero(lost).squeeze(-1)
    labels = torch.zeros(1, dtype=torch.long)
    if len(indices) > 1:
        from scipy.cluster.hierarchy import fcluster, linkage

        dim = means.shape[-1]
        links = linkage(means[indices].cpu().numpy(), "average")
        labels = torch.from_numpy(fcluster(links, 4.0 + dim**0.5, "distance")).long()
    groups = [indices[(labels == label).to(indices.device)] for label in labels.unique()]
    if means.shape[-1] > MAX_SPREAD_DIM:
        groups = [group for group in groups if len(group) >= MIN_CHAINS]
    return sorted(groups, key=lambda group: -float(log_p[:, group].mean()))[:MAX_REGIONS]


def _usual_mass(
    density: ValueAndGrad, states: Tensor, log_p: Tensor, groups: Tensor, count: int, reach: Reach
) -> float:
    """What :func:`_log_mass` says of as many chains from the guide's draws: its bias is alike."""
    near = torch.nonzero(groups == 0).squeeze(-1)
    masses = []
    for _ in range(NUM_USUAL):
        some = near[torch.randperm(len(near))[:count]]
        region = states[:, some].reshape(-1, states.shape[-1])
        masses.append(_log_mass(density, region, log_p[:, some].reshape(-1), reach))
    return float(torch.tensor(masses).median())


def _by_entropy(log_p: Tensor, scale: Tensor) -> float:
    """E log p + H: the log mass of a region that is normal with these sds."""
    entropy = scale.log().sum() + 0.5 * len(scale) * (1.0 + math.log(2 * math.pi))
    return float(log_p.mean() + entropy)


def _log_mass(density: ValueAndGrad, region: Tensor, log_p: Tensor, reach: Reach) -> float:
    """log of the integral of p over the far points around chains' states ``(n, D)``.

    By importance sampling from a normal with the states' means and variances, which are fitted again where
    too few of its draws carry weight (population Monte Carlo, Cappe et al. 2004); NaN where that does not
    help.  In many dimensions by the entropy alone, of one width for all latents: that of the states, which
    short chains take for too small, averaged with D / E|grad log p|^2, which is the same for a normal region
    and needs no spread.
    """
    size, dim = region.shape
    loc, scale = region.mean(0), region.std(0, correction=0).clamp_min(1e-3)  # a chain may have one state
    if dim > MAX_SPREAD_DIM:
        some = region[torch.randperm(size)[:NUM_STATES]]
        slopes = in_parts(density, some, NUM_STATES // 2)[1]
        by_slope = 1.0 / slopes.square().mean().clamp_min(0.25)
        return _by_entropy(log_p, (by_slope * scale.square().mean()).pow(0.25).expand(dim))
    for _ in range(ROUNDS):
        points, log_w = _weighed(density, loc, scale, reach)
        top = log_w.max()
        if not bool(top.isfinite()):
            return -math.inf
        weights = (log_w - top).exp()
        if _effective(weights) >= LEAST_ESS:
            return float(top + weights.mean().log())
        loc, scale = _refitted(points, log_w - top, scale)
    return math.nan


def _weighed(density: ValueAndGrad, loc: Tensor, scale: Tensor, reach: Reach) -> tuple[Tensor, Tensor]:
    """Draws of a somewhat wider normal and their log weights, minus infinity where the guide draws."""
    dim = len(loc)
    wider = (1.0 + 0.7 / dim**0.5) ** 0.5 * scale
    noise = torch.randn(NUM_POINTS, dim).to(loc)
    points = loc + wider * noise
    value = in_parts(density, points, NUM_POINTS // 4)[0]
    log_q = -0.5 * noise.square().sum(-1) - wider.log().sum() - 0.5 * dim * math.log(2 * math.pi)
    return points, torch.where(reach.far(points), value - log_q, -torch.inf)


def _effective(weights: Tensor) -> float:
    return float(weights.sum().square() / weights.square().sum())


def _refitted(points: Tensor, log_w: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Moments by weights that are flattened until many draws have some."""
    power = 1.0
    while _effective((power * log_w).exp()) < TEMPERED_ESS and power > 1e-3:
        power *= 0.7
    weights = torch.softmax(power * log_w, 0).unsqueeze(-1)
    loc = (weights * points).sum(0)
    spread = (weights * (points - loc).square()).sum(0).sqrt()
    return loc, torch.maximum(spread, 0.1 * scale)
