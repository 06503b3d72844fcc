"""How many modes a log density has: rounds of searches until they bring no new one, and which are one."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ._bent_paths import LEAST_DIP, connected, inverse_of_laplace, straight_dips
from .effort import Effort
from .gaussians import MAX_DENSE_DIM, Gaussian, distinct, find_gaussian, join, peaks
from .lbfgs import ValueAndGrad, ascend
from .modes import LEAST_SHARE, MAX_CANDIDATES, Modes, all_starts, log_densities, refined, weigh

__all__ = ["MAX_COMPONENTS", "find_all_modes"]

MAX_ROUNDS = 32
PATIENCE = {"one": 3, "several": 8}
"""Rounds in succession that bring no new mode with mass, after which a search ends.  Where there are several,
more are likely."""
SCREENED = 8
"""Points for each run of a later round, of which those with the highest density outside known modes start."""
NEAR = 4.0
"""Standard deviations of a normal's squared distance, beyond its mean, up to which a point is near a mode."""
WIDTHS = (3.0, 10.0, 30.0)
"""Standard deviations of a mode at which later rounds start around it."""
MAX_COMPONENTS = 32
"""Modes that get a component, the heaviest."""
LEAST_MASS = 5e-3
"""Mass below which a mode gets none."""
MOST_OVERLAP = 0.1
"""Share of the lighter component's mass that belongs to both, above which two are one."""


class _Known:
    """The modes that a search has met so far, with their Laplace approximations and masses."""

    def __init__(self, dim: int, like: Tensor) -> None:
        empty = like.new_zeros(0, dim)
        self.gaussian = Gaussian(empty, like.new_zeros(0, dim, dim), ())
        self.log_masses, self._inverses = like.new_zeros(0), like.new_zeros(0, dim, dim)

    def distances(self, z: Tensor) -> Tensor:
        """In standard deviations of each mode, over the root of the dimension, ``(P, M)``."""
        gap = (z.unsqueeze(1) - self.gaussian.loc).unsqueeze(-1)
        scaled: Tensor = (self._inverses @ gap).squeeze(-1).square().mean(-1).sqrt()
        return scaled

    def outside(self, z: Tensor, least: float) -> Tensor:
        """Which points are farther than that from all."""
        return (self.distances(z) > least).all(-1)

    def add(self, found: Gaussian, log_masses: Tensor) -> bool:
        """Takes in what is new; whether some of it has mass."""
        best = float(torch.cat([self.log_masses, log_masses]).max())
        gained = False
        for i in log_masses.argsort(descending=True).tolist():
            one = found.select([i])
            if not bool(log_masses[i].isfinite()) or not bool(self.outside(one.loc, 0.5)):
                continue
            self.gaussian = join([self.gaussian, one])
            self.log_masses = torch.cat([self.log_masses, log_masses[i : i + 1]])
            self._inverses = torch.cat([self._inverses, inverse_of_laplace(one.scale)])
            gained = gained or float(log_masses[i]) > best + math.log(LEAST_SHARE)
        return gained

    def heaviest(self) -> Gaussian:
        """Those with mass, the heaviest first."""
        order = self.log_masses.argsort(descending=True)
        kept = order[self.log_masses.softmax(0)[order] > LEAST_SHARE][:MAX_CANDIDATES]
        return self.gaussian.select(kept.tolist())


def _proposals(start: Tensor, prior: Tensor, known: Gaussian, num: int, seed: int) -> Tensor:
    """Points to start from, of many kinds: no single one meets every mode.

    Around the model's start, near and far; as the prior spreads; around a known mode in all directions, and
    from there or from the start in one coordinate alone; and a known mode moved by the difference of two
    others.
    """
    generator = torch.Generator().manual_seed(seed)
    dim, each = len(start), -(-num // 5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(start)

    def index(most: int) -> Tensor:
        return torch.randint(max(1, most), (each,), generator=generator, device="cpu").to(start.device)

    def pick(*values: float) -> Tensor:
        return torch.tensor(values).to(start)[index(len(values))].unsqueeze(-1)

    origin = torch.cat([start.unsqueeze(0), known.loc])
    wide = start + pick(2.0, 8.0, 40.0) * (2.0 * torch.rand(each, dim, generator=generator).to(start) - 1.0)
    if len(prior) > 1:
        drawn = prior.mean(0) + prior.std(0) * pick(1.0, 2.0) * normal(each, dim)
    else:
        drawn = start + pick(1.0, 5.0) * normal(each, dim)
    around = pick(*WIDTHS) * normal(each, dim)
    if len(known.loc):
        places = index(len(known.loc))
        around = known.loc[places] + (known.scale[places] @ around.unsqueeze(-1)).squeeze(-1)
    else:
        around = start + around
    single = origin[index(len(origin))].clone()
    single.scatter_add_(-1, index(dim).unsqueeze(-1), pick(2.0, 6.0, 20.0) * normal(each, 1))
    moved = origin[index(len(origin))] + (origin[index(len(origin))] - origin[index(len(origin))])
    moved = moved + 0.1 * normal(each, dim)
    return torch.cat([wide, drawn, around, single, moved])[:num]


def _starts(
    value_and_grad: ValueAndGrad, start: Tensor, prior: Tensor, known: _Known, num: int, seed: int
) -> Tensor:
    """Where the runs of a later round start: half of them where many points are highest."""
    points = _proposals(start, prior, known.gaussian, SCREENED * num, seed)
    points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))]
    screened = points[num // 2 :]
    values = value_and_grad(screened)[0]
    if len(known.log_masses):
        least = math.sqrt(1.0 + NEAR * math.sqrt(2.0 / len(start)))
        values = torch.where(known.outside(screened, least), values, -torch.inf)
    values = torch.where(values.isfinite(), values, -torch.inf)
    best = values.argsort(descending=True)[: num - num // 2]
    return torch.cat([points[: num // 2], screened[best]])


def _search(value_and_grad: ValueAndGrad, start: Tensor, effort: Effort, prior: Tensor) -> _Known:
    """Rounds of L-BFGS runs until they bring no new mode."""
    known, quiet, num, several = _Known(len(start), start), 0, 2 * effort.starts, False
    for turn in range(MAX_ROUNDS):
        if turn:
            starts = _starts(value_and_grad, start, prior, known, num, turn)
        else:
            starts = all_starts(start, prior, num)
        ends = _ends(value_and_grad, known, starts, effort)
        if len(ends):  # runs that were still under way when most had ended are taken to their ends
            ends = _ends(value_and_grad, known, ends, effort)
        new = bool(len(ends)) and known.add(*peaks(value_and_grad, ends))
        quiet = 0 if new else quiet + 1
        if quiet == PATIENCE["one"]:
            several = len(connected(value_and_grad, known.heaviest())) > 1
        if quiet >= PATIENCE["one"] and (not several or quiet >= PATIENCE["several"]):
            break
    return known


def _ends(value_and_grad: ValueAndGrad, known: _Known, starts: Tensor, effort: Effort) -> Tensor:
    """Where runs end, if not at what is known, nor on a straight way to it on which the density hardly falls.

    A ridge has ends without number.
    """
    found = ascend(value_and_grad, starts, effort.evaluations)
    ends = found.points[distinct(found, MAX_CANDIDATES)]
    ends = ends[known.outside(ends, 0.5)]
    if len(ends) and len(known.log_masses):
        nearest = known.gaussian.loc[known.distances(ends).argmin(-1)]
        ends = ends[straight_dips(value_and_grad, ends, nearest) >= LEAST_DIP]
    return ends


def _without_overlap(
    value_and_grad: ValueAndGrad, gaussian: Gaussian, bounds: Tensor
) -> tuple[Gaussian, Tensor]:
    """Gaussians of which no two share mass and each has some, with their weights."""
    while True:
        weights, z, shares = weigh(value_and_grad, gaussian, bounds)
        size = len(weights)
        if size == 1:
            return gaussian, weights
        responsibilities = (log_densities(gaussian, z) + weights.log()).softmax(-1)
        masses = shares @ responsibilities
        common = (shares.unsqueeze(-1) * responsibilities).mT @ responsibilities
        overlap = common / torch.minimum(masses.unsqueeze(0), masses.unsqueeze(1)).clamp(min=1e-12)
        overlap.fill_diagonal_(0.0)
        kept = list(range(size))
        if bool(weights.min() < LEAST_MASS):
            kept.remove(int(weights.argmin()))
        elif bool(overlap.max() > MOST_OVERLAP):
            pair = divmod(int(overlap.argmax()), size)
            kept.remove(min(pair, key=lambda i: float(bounds[i])))
        else:
            return gaussian, weights
        gaussian, bounds = gaussian.select(kept), bounds[kept]


@torch.no_grad()
def find_all_modes(
    value_and_grad: ValueAndGrad, start: Tensor, effort: Effort | None = None, prior: Tensor | None = None
) -> Modes:
    """Gaussians at all modes of a log density that a search finds, with their weights.

    L-BFGS runs in rounds, each from new points, until three in succession bring no new mode with mass, where
    there are several eight, or 32 are over.  Two modes are one where a path leads from one to the other on
    which the density falls by less than a factor of e below the lower one, or where their Gaussians, refined
    by natural gradients, share a tenth of their mass.  Modes with less than .5 % of the mass are left out,
    and all but the 32 heaviest.  Where one mode is left, it has the Gaussian of :func:`find_gaussian`; so it
    is above 200 dimensions.

    :param value_and_grad: points ``(P, D)`` to log densities and gradients.
    :param start: the model's starting point, shape ``(D,)``.
    :param effort: how much to spend on a round.
    :param prior: further points to start from, shape ``(S, D)``.

    Example::

        >>> def density(z):
        ...     return -0.125 * ((z**2).sum(-1) - 9.0) ** 2, -0.5 * ((z**2).sum(-1, True) - 9.0) * z
        >>> modes = find_all_modes(density, torch.zeros(1))
        >>> modes.found, modes.gaussian.loc.squeeze().sort().values.round(), modes.weights
        (2, tensor([-3.,  3.]), tensor([0.5000, 0.5000]))
    """
    effort = Effort() if effort is None else effort
    prior = start.new_zeros(0, len(start)) if prior is None else prior
    if len(start) <= MAX_DENSE_DIM:
        peaked = _search(value_and_grad, start, effort, prior).heaviest()
        groups = connected(value_and_grad, peaked)
        peaked = peaked.select([group[0] for group in groups])
        if len(groups) > 1:
            gaussian, bounds = refined(value_and_grad, peaked, effort)
            gaussian, weights = _without_overlap(value_and_grad, gaussian, bounds)
            if len(weights) > 1:
                order = weights.argsort(descending=True)[:MAX_COMPONENTS]
                gaussian = gaussian.select(order.tolist())
                weights = weights[order] / weights[order].sum()
                return Modes(replace(gaussian, scale=gaussian.scale_tril()), weights, len(order))
    best = find_gaussian(value_and_grad, start, effort)
    return Modes(best, best.loc.new_ones(1), 1)
