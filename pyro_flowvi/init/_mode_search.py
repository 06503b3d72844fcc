"""A search for the modes of a log density: runs of L-BFGS in rounds, until these bring no new one."""

import math

import torch
from torch import Tensor

from ._bent_paths import LEAST_DIP, connected, inverse_of_laplace, straight_dips
from .effort import Effort
from .gaussians import Gaussian, distinct, join, peaks, spread_starts
from .lbfgs import ValueAndGrad, ascend

__all__ = ["LEAST_SHARE", "search"]

MAX_CANDIDATES = 64
"""Ends of runs that are looked at as modes."""
LEAST_SHARE = 1e-3
"""Share of the masses below which a mode is left out."""
WIDE_SCALES = (4.0, 20.0)
"""Multiples of the spread of the usual starts from which runs start too, to come from all sides."""
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
        return torch.tensor(values, device="cpu").to(start)[index(len(values))].unsqueeze(-1)

    origin = torch.cat([start.unsqueeze(0), known.loc])
    wide = start + pick(2.0, 8.0, 40.0) * (
        2.0 * torch.rand(each, dim, generator=generator, device="cpu").to(start) - 1.0
    )
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
    points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed), device="cpu")]
    screened = points[num // 2 :]
    values = value_and_grad(screened)[0]
    if len(known.log_masses):
        least = math.sqrt(1.0 + NEAR * math.sqrt(2.0 / len(start)))
        values = torch.where(known.outside(screened, least), values, -torch.inf)
    values = torch.where(values.isfinite(), values, -torch.inf)
    best = values.argsort(descending=True)[: num - num // 2]
    return torch.cat([points[: num // 2], screened[best]])


def search(
    value_and_grad: ValueAndGrad, start: Tensor, effort: Effort, prior: Tensor, wanted: int | None = None
) -> Gaussian:
    """Laplace approximations at the modes that are found, the heaviest first.

    :param wanted: how many will do; None for all, as long as some are apart.
    """
    known, quiet, num, several = _Known(len(start), start), 0, 2 * effort.starts, False
    for turn in range(MAX_ROUNDS):
        if turn:
            starts = _starts(value_and_grad, start, prior, known, num, turn)
        else:
            starts = _all_starts(start, prior, num)
        ends = _ends(value_and_grad, known, starts, effort)
        if len(ends):  # runs that were still under way when most had ended are taken to their ends
            ends = _ends(value_and_grad, known, ends, effort)
        new = bool(len(ends)) and known.add(*peaks(value_and_grad, ends))
        quiet = 0 if new else quiet + 1
        if quiet == PATIENCE["one"]:
            found = known.heaviest()
            count = len(found.kinds) if wanted else len(connected(value_and_grad, found))
            several = 1 < count < (wanted or math.inf)
        if quiet >= PATIENCE["one"] and (not several or quiet >= PATIENCE["several"]):
            break
    return known.heaviest()


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


def _all_starts(start: Tensor, prior: Tensor, num: int) -> Tensor:
    """Half around the model's start, a quarter of draws of the prior, the others from further out."""
    near = spread_starts(start, max(2, num // 2))
    drawn = prior[: num // 4]
    generator = torch.Generator().manual_seed(1)
    left = max(0, num - len(near) - len(drawn))
    spread = torch.rand(left, len(start), generator=generator, dtype=torch.float64, device="cpu") * 4.0 - 2.0
    widths = [WIDE_SCALES[i % len(WIDE_SCALES)] for i in range(left)]
    scale = torch.tensor(widths, dtype=torch.float64, device="cpu")
    return torch.cat([near, drawn, start + (scale.unsqueeze(-1) * spread).to(start)])
