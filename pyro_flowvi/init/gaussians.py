"""Gaussian starting points for a guide: found at modes and on the way to them, ranked by their ELBO."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .effort import Effort
from .lbfgs import Ascent, ValueAndGrad, ascend

__all__ = ["MAX_DENSE_DIM", "Gaussian", "find_gaussian"]

MAX_DENSE_DIM = 200
"""Up to this many dimensions Gaussians, and the affine maps of guides, have full Cholesky factors."""
MIN_EIGENVALUES = (1e-3, 1e-8)
"""Bounds on the curvature of a candidate in units of the start, tried both at the ends of runs."""
MAX_EIGENVALUE = 1e12
SCALES = (0.1, 1.0)
NARROW_SCALES = tuple(0.1 * 2.0**-k for k in range(10))
SHARES = (0.03, 0.1, 0.2, 0.4, 0.7)
"""Scales, and shares of the way back from the ends of runs, where a hard edge cuts every other candidate."""
MAX_MODES = 32
LEAST_MASS = 1e-3
"""Share of the Laplace masses below which a mode is left out."""
SETTLED_DECREMENT = 1e-2
"""Squared length of the Newton step, in standard deviations, below which a run has ended at a mode."""
MAX_MOVE = 2.0
"""How far, in standard deviations, one step of a refinement moves a mean."""


@dataclass(frozen=True)
class Gaussian:
    """A batch of normal distributions, as candidates for a starting point.

    :param loc: shape ``(M, D)``.
    :param scale: factors C of the covariances C Cᵀ, shape ``(M, D, D)``; for diagonal ones ``(M, D)``.
    :param kinds: where each came from: "prior", "laplace", "path", "mean-field", "modes".

    Example::

        >>> Gaussian(torch.zeros(1, 2), torch.ones(1, 2), ("prior",)).draw(torch.ones(3, 2)).shape
        torch.Size([1, 3, 2])
    """

    loc: Tensor
    scale: Tensor
    kinds: tuple[str, ...]

    @property
    def dense(self) -> bool:
        """Whether the covariances are full."""
        return self.scale.dim() == 3

    def draw(self, noise: Tensor) -> Tensor:
        """Points, shape ``(M, K, D)``, of standard normal ``noise`` ``(K, D)``."""
        return self.loc.unsqueeze(1) + self.spread(noise.expand(len(self.loc), *noise.shape))

    def spread(self, x: Tensor) -> Tensor:
        """C x for every row of ``x``, shape ``(M, K, D)``."""
        return x @ self.scale.mT if self.dense else x * self.scale.unsqueeze(1)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Cᵀ g for every row: gradients in units of the standard deviations, shape ``(M, K, D)``."""
        return gradient @ self.scale if self.dense else gradient * self.scale.unsqueeze(1)

    def entropy(self) -> Tensor:
        """Entropies, nats, shape ``(M,)``."""
        log_det: Tensor
        log_det = torch.linalg.slogdet(self.scale)[1] if self.dense else self.scale.abs().log().sum(-1)
        return log_det + 0.5 * self.loc.shape[-1] * (1.0 + math.log(2 * math.pi))

    def select(self, index: Sequence[int]) -> "Gaussian":
        """Some of the batch."""
        at = list(index)
        return Gaussian(self.loc[at], self.scale[at], tuple(self.kinds[i] for i in at))

    def scale_tril(self) -> Tensor:
        """Lower factors with positive diagonals, shape ``(M, D, D)``; a diagonal stays as it is."""
        if not self.dense:
            return self.scale
        upper = torch.linalg.qr(self.scale.mT)[1]
        signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper)
        lower: Tensor = (signs.unsqueeze(-1) * upper).mT.contiguous()
        return lower


def join(parts: Sequence[Gaussian]) -> Gaussian:
    """Batches of Gaussians as one."""
    return Gaussian(
        torch.cat([part.loc for part in parts]),
        torch.cat([part.scale for part in parts]),
        tuple(kind for part in parts for kind in part.kinds),
    )


def normal_noise(num: int, dim: int, like: Tensor, seed: int = 0) -> Tensor:
    """Antithetic standard normal noise, shape ``(num, dim)``: the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(-(-num // 2), dim, generator=generator, dtype=torch.float64, device="cpu")
    return torch.cat([half, -half])[:num].to(like)


@torch.no_grad()
def elbos(value_and_grad: ValueAndGrad, gaussian: Gaussian, noise: Tensor) -> Tensor:
    """Evidence lower bounds of a batch of Gaussians, shape ``(M,)``; -inf if any draw has no density."""
    z = gaussian.draw(noise)
    values = value_and_grad(z.reshape(-1, z.shape[-1]))[0].reshape(z.shape[:2])
    # With log q at the draws in place of its mean there is no noise where q = p.
    surprise = 0.5 * (noise.square().sum(-1) - noise.shape[-1])
    bound = (values + surprise).mean(-1) + gaussian.entropy()
    return torch.where(values.isfinite().all(-1) & bound.isfinite(), bound, -torch.inf)


def hessians_at(value_and_grad: ValueAndGrad, points: Tensor) -> Tensor:
    """Second derivatives of minus the log density by central differences of gradients, ``(M, D, D)``.

    Twice: the second time with steps of a thousandth of the standard deviations that the first found.
    """
    num, dim = points.shape
    root = torch.finfo(points.dtype).eps ** (1 / 3)
    eye = torch.eye(dim, dtype=points.dtype, device=points.device)
    widths = root * points.abs().clamp(min=1.0)
    hessian = points.new_zeros(num, dim, dim)
    for again in range(2):
        shifts = widths.unsqueeze(-1) * eye
        around = torch.cat([points.unsqueeze(1) + shifts, points.unsqueeze(1) - shifts], 1)
        gradients = value_and_grad(around.reshape(-1, dim))[1].reshape(num, 2, dim, dim)
        # The distance that the points have after rounding, not the one that was asked for.
        apart = (around[:, :dim] - around[:, dim:]).diagonal(dim1=-2, dim2=-1)
        hessian = (gradients[:, 1] - gradients[:, 0]) / apart.unsqueeze(-1)
        hessian = 0.5 * (hessian + hessian.mT)
        if not again:
            curvature = hessian.diagonal(dim1=-2, dim2=-1).abs().clamp(min=1e-12)
            better = 100.0 * root * curvature.rsqrt()
            widths = torch.where(better.isfinite(), better.clamp(max=1.0), widths)
            widths = torch.maximum(widths, 4.0 * root**1.5 * points.abs())
    return hessian


def _from_curvature(points: Tensor, gradients: Tensor, hessians: Tensor, kind: str) -> Gaussian:
    """Normals with the inverse curvature as covariance, at the points and a Newton step further."""
    good = hessians.isfinite().all(-1).all(-1)
    points, gradients, hessians = points[good], gradients[good], hessians[good]
    if not len(points):
        return Gaussian(points, hessians, ())
    values, vectors = torch.linalg.eigh(hessians)
    parts = []
    for lowest in MIN_EIGENVALUES:
        size = values.abs().clamp(lowest, MAX_EIGENVALUE)
        scale = vectors * size.rsqrt().unsqueeze(-2)
        newton = (vectors * (1.0 / size).unsqueeze(-2)) @ (vectors.mT @ gradients.unsqueeze(-1))
        parts.append(Gaussian(points, scale, (kind,) * len(points)))
        parts.append(Gaussian(points + newton.squeeze(-1), scale, (kind,) * len(points)))
    # Of all normals with independent coordinates, the one closest to a Gaussian target has its means and
    # these variances (Bishop 2006, eq. 10.13): the fixed point of coordinate ascent.
    curvature = hessians.diagonal(dim1=-2, dim2=-1).clamp(MIN_EIGENVALUES[0], MAX_EIGENVALUE)
    parts.append(Gaussian(points, torch.diag_embed(curvature.rsqrt()), ("mean-field",) * len(points)))
    return join(parts)


def _diagonal(value_and_grad: ValueAndGrad, points: Tensor, gradients: Tensor) -> Gaussian:
    """Normals with diagonal covariances from differences along a few random directions (Hutchinson)."""
    num, dim = points.shape
    width = torch.finfo(points.dtype).eps ** (1 / 3)
    probes = 16
    signs = normal_noise(probes, dim, points, seed=1).sign()
    around = points.unsqueeze(1) + width * torch.cat([signs, -signs])
    high, low = value_and_grad(around.reshape(-1, dim))[1].reshape(num, 2, probes, dim).unbind(1)
    curvature = ((low - high) / (2 * width) * signs).mean(1)
    curvature = torch.where(curvature.isfinite() & (curvature > 0), curvature, 1.0)
    scale = curvature.clamp(MIN_EIGENVALUES[0], MAX_EIGENVALUE).rsqrt()
    return Gaussian(points, scale, ("mean-field",) * num)


def distinct(found: Ascent, most: int) -> list[int]:
    """The best ends of runs that are not one another's, up to rounding of the search."""
    kept: list[int] = []
    for i in range(len(found.points)):
        if not bool(found.values[i].isfinite()):
            break
        gaps = [float((found.points[i] - found.points[j]).abs().max()) for j in kept]
        if all(gap > 1e-2 * (1.0 + float(found.points[i].abs().max())) for gap in gaps):
            kept.append(i)
        if len(kept) == most:
            break
    return kept


@torch.no_grad()
def refine(
    value_and_grad: ValueAndGrad, gaussian: Gaussian, steps: int, num_draws: int, seed: int
) -> Gaussian:
    """Moves Gaussians towards their best ELBO by natural gradients.

    The precision becomes (1 - η) times itself plus η times the expected curvature, by Stein's identity the
    covariance of the score and the draw; the mean takes the Newton step that goes with it (Khan and Rue
    2023, eq. 11).  Both estimates use the score of the Gaussian as a control variate, so that they are free
    of noise where the target is Gaussian.  Eigenvalues change by at most a factor of two a step.

    :param value_and_grad: points to log densities and gradients.
    :param gaussian: a batch of M.
    :param steps: how many.
    :param num_draws: draws a step for each of them.
    :param seed: of the noise.
    """
    dim = gaussian.loc.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rate = 0.5 / (1.0 + 8.0 * step / steps)
        half = torch.randn(num_draws // 2, dim, generator=generator, dtype=torch.float64, device="cpu").to(
            gaussian.loc
        )
        x = torch.cat([half, -half])
        z = gaussian.draw(x)
        values, gradients = value_and_grad(z.reshape(-1, dim))
        slope = gaussian.pull_back(gradients.reshape(z.shape)) + x
        good = values.reshape(z.shape[:2]).isfinite() & slope.isfinite().all(-1)
        slope = torch.where(good.unsqueeze(-1), slope, 0.0)
        count = good.sum(-1).clamp(min=1).to(slope)
        mean = slope.sum(1) / count.unsqueeze(-1)
        if gaussian.dense:
            change = slope.mT @ x / count.reshape(-1, 1, 1)
            precision = torch.eye(dim).to(x) - 0.5 * rate * (change + change.mT)
            usable = precision.isfinite().all(-1).all(-1).reshape(-1, 1, 1)
            values, vectors = torch.linalg.eigh(torch.where(usable, precision, torch.eye(dim).to(x)))
            values = values.clamp(0.5, 2.0)
            move = (vectors / values.unsqueeze(-2)) @ (vectors.mT @ mean.unsqueeze(-1))
            scale = gaussian.scale @ ((vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT)
            move = move.squeeze(-1)
        else:
            precision = (1.0 - rate * (slope * x).sum(1) / count.unsqueeze(-1)).clamp(0.5, 2.0)
            move, scale = mean / precision, gaussian.scale * precision.rsqrt()
        move = move * (MAX_MOVE / move.norm(dim=-1, keepdim=True).clamp(min=MAX_MOVE))
        loc = gaussian.loc + rate * gaussian.spread(move.unsqueeze(1)).squeeze(1)
        gaussian = replace(gaussian, loc=loc, scale=scale)
    return gaussian


def spread_starts(start: Tensor, num: int) -> Tensor:
    """The model's own start, points near it, and points spread over (-2, 2) as Stan has them."""
    generator = torch.Generator().manual_seed(0)
    spread = (
        torch.rand(num - 1, len(start), generator=generator, dtype=torch.float64, device="cpu") * 4.0 - 2.0
    )
    centres = torch.stack([torch.zeros_like(start), start])[torch.arange(num - 1) % 2]
    return torch.cat([start.unsqueeze(0), centres + spread.to(start)])


def peaks(value_and_grad: ValueAndGrad, points: Tensor) -> tuple[Gaussian, Tensor]:
    """Laplace approximations at points, and the logarithms of their masses; -inf where there is no mode."""
    values, gradients = value_and_grad(points)
    hessians = hessians_at(value_and_grad, points)
    known = values.isfinite() & hessians.isfinite().all(-1).all(-1)
    curvatures, vectors = torch.linalg.eigh(torch.where(known.reshape(-1, 1, 1), hessians, 0.0))
    slopes = (vectors.mT @ gradients.unsqueeze(-1)).squeeze(-1)
    # A mode, and not the end of a run that was cut short or went along a ridge.
    peaked = known & (curvatures > 0).all(-1)
    positive = curvatures.clamp(min=1e-30)
    peaked &= (slopes.square() / positive).sum(-1) < SETTLED_DECREMENT
    laplace = Gaussian(points, vectors * positive.rsqrt().unsqueeze(-2), ("modes",) * len(points))
    masses = values - 0.5 * positive.log().sum(-1) + 0.5 * points.shape[-1] * math.log(2.0 * math.pi)
    return laplace, torch.where(peaked, masses, -torch.inf)


def _cover(value_and_grad: ValueAndGrad, found: Ascent) -> Gaussian | None:
    """The normal with mean and covariance of all modes by their Laplace masses; None with one mode only."""
    points = found.points[distinct(found, MAX_MODES)]
    if not len(points):
        return None
    candidates, log_masses = peaks(value_and_grad, points)
    masses = log_masses.softmax(0)
    kept = [i for i in apart(candidates, masses.log(), MAX_MODES) if bool(masses[i] > LEAST_MASS)]
    if len(kept) < 2 or bool(masses[kept].max() > (1.0 - LEAST_MASS) * masses[kept].sum()):
        return None
    shares = (masses[kept] / masses[kept].sum()).unsqueeze(-1)
    chosen = candidates.select(kept)
    loc = (shares * chosen.loc).sum(0)
    offsets = shares.sqrt() * (chosen.loc - loc)
    within = (shares.sqrt().unsqueeze(-1) * chosen.scale.mT).flatten(0, 1)
    # The rows' products are the covariance; its factor from the rows themselves, which rounding cannot spoil.
    wide = Gaussian(
        loc.unsqueeze(0), torch.linalg.qr(torch.cat([within, offsets]))[1].mT.unsqueeze(0), ("modes",)
    )
    return replace(wide, scale=wide.scale_tril()) if bool(wide.scale.isfinite().all()) else None


@torch.no_grad()
def find_gaussian(
    value_and_grad: ValueAndGrad, start: Tensor, effort: Effort | None = None, *, cover: bool = False
) -> Gaussian:
    """The Gaussian with the best ELBO among many candidates, refined.

    Candidates: the start; Laplace approximations and mean-field normals at the ends of L-BFGS runs, and on
    the way there, as in Pathfinder (Zhang, Carpenter, Gelman and Vehtari 2022), since an unbounded density,
    such as a centred funnel, has no mode.  One is accepted only for its ELBO: Laplace is often worse than
    where it started.

    :param value_and_grad: points ``(P, D)`` to log densities and gradients.
    :param start: the model's starting point, shape ``(D,)``.
    :param effort: how much to spend.
    :param cover: if several modes are found, take the normal with the mean and covariance of all of them, of
        the kind "modes", whatever its ELBO: a start for what can tear it apart.
    :return: the Gaussian, a batch of one with a lower-triangular factor.

    Example::

        >>> def normal(z):
        ...     return -0.5 * ((z - 30.0) ** 2).sum(-1), 30.0 - z
        >>> best = find_gaussian(normal, torch.zeros(2), Effort.small())
        >>> best.loc.round(), best.scale.round()
        (tensor([[30., 30.]]), tensor([[[1., 0.],
                 [0., 1.]]]))
    """
    effort = Effort() if effort is None else effort
    dim = len(start)
    dense = dim <= MAX_DENSE_DIM
    found = ascend(value_and_grad, spread_starts(start, effort.starts), effort.evaluations)
    if cover and dense and (wide := _cover(value_and_grad, found)) is not None:
        return wide
    ends = found.points[distinct(found, effort.ends)]
    passed = [
        path[torch.linspace(0, len(path) - 1, min(effort.points_on_path, len(path))).round().long()]
        for path in found.paths
    ]
    prior = torch.stack([start] * len(SCALES))
    scale = torch.stack([torch.full_like(start, size) for size in SCALES])
    pool = [Gaussian(prior, torch.diag_embed(scale) if dense else scale, ("prior",) * len(SCALES))]
    for points, kind in ((ends, "laplace"), (torch.cat([start.new_zeros(0, dim), *passed]), "path")):
        if not len(points):
            continue
        gradients = value_and_grad(points)[1]
        if dense:
            pool.append(_from_curvature(points, gradients, hessians_at(value_and_grad, points), kind))
        else:
            pool.append(_diagonal(value_and_grad, points, gradients))
    candidates = join(pool)
    sorting = normal_noise(effort.draws // 4, dim, start)
    bounds = elbos(value_and_grad, candidates, sorting)
    if not bool(bounds.isfinite().any()):  # each is cut by an edge of the support, where runs end
        candidates = _narrow(start, ends, dense)
        bounds = elbos(value_and_grad, candidates, sorting)
    candidates = candidates.select(bounds.argsort(descending=True)[: 8 * effort.finalists].tolist())
    bounds = elbos(value_and_grad, candidates, normal_noise(effort.draws, dim, start))
    finalists = candidates.select(apart(candidates, bounds, effort.finalists))
    first_steps, last_steps = effort.refinements
    moved = refine(value_and_grad, finalists, first_steps, max(16, effort.draws // 4), seed=1)
    both = join([finalists, moved])
    fresh = normal_noise(2 * effort.draws, dim, start, seed=2)
    best = both.select([int(elbos(value_and_grad, both, fresh).argmax())])
    both = join([best, refine(value_and_grad, best, last_steps, effort.draws, seed=3)])
    winner = both.select([int(elbos(value_and_grad, both, fresh).argmax())])
    return replace(winner, scale=winner.scale_tril())


def _narrow(start: Tensor, ends: Tensor, dense: bool) -> Gaussian:
    """Narrow normals on the way from the start to the ends of runs, which may be at an edge."""
    places = torch.cat([start + (1.0 - share) * (ends - start) for share in SHARES] + [start.unsqueeze(0)])
    loc = places.repeat_interleave(len(NARROW_SCALES), 0)
    scale = torch.tensor(NARROW_SCALES).to(start).repeat(len(places)).unsqueeze(-1).expand_as(loc)
    return Gaussian(loc, torch.diag_embed(scale) if dense else scale, ("prior",) * len(loc))


def apart(candidates: Gaussian, bounds: Tensor, most: int) -> list[int]:
    """The best candidates, no two of them closer than half a standard deviation."""
    kept: list[int] = []
    for i in bounds.argsort(descending=True).tolist():
        if kept and not bool(bounds[i].isfinite()):
            break
        near = False
        for j in kept:
            gap = (candidates.loc[i] - candidates.loc[j]).unsqueeze(-1)
            scale = candidates.scale[j]
            scaled = torch.linalg.solve(scale, gap) if candidates.dense else gap / scale.unsqueeze(-1)
            near = near or bool(scaled.norm() < 0.5 * math.sqrt(len(scaled)))
        if not near:
            kept.append(i)
        if len(kept) == most:
            break
    return kept
