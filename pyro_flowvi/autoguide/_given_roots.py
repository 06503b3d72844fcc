"""The mode of the latents given the roots of a structured guide, and the messages that are there."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._compile.log_density import TracedDensity
from ..init.gaussians import normal_noise
from ..init.sparse_laplace import Elimination, SparseHessian
from ._message_map import MessageMap
from ._message_plan import PlacedPrior, taken

__all__ = ["GivenRoots", "LaplaceMessages"]

Array = NDArray[np.float64]

SETTLED = 0.02
"""Newton's method ends where no latent moves by so many of its standard deviations."""
MOST_MOVED, WIDER = 3.0, 3.0
"""Standard deviations that a latent may move in the first step, and how much more after each good one."""
HALVINGS = 4
LEAST_SHARE = 1e-6
"""A message's weight, as a share of the prior's precision, where the data say nothing or push away."""
COUPLED = 0.02
"""Correlation of two latents above which it is kept."""


@dataclass
class LaplaceMessages:
    """Messages as a :class:`MessageMap` has them, at one point of the roots."""

    numbers: dict[str, Tensor]
    joint: list[dict[str, Tensor]]


class GivenRoots:
    """Laplace's approximation of all latents but the roots, for given values of these.

    :param layer: the map for which messages are looked for.
    :param density: the model's graph.
    """

    def __init__(self, layer: MessageMap, density: TracedDensity) -> None:
        self.layer, self.density, self.plan = layer, density, layer.plan
        start = density.density.start
        sites = [site for piece in self.plan.pieces for site in piece.sites]
        order = self.plan.places_of(sites)
        self.inner = order[order >= 0]
        """The latents but roots, each after those that its prior depends on."""
        self._flat, self._joint_places = self.plan.block_places(), self.plan.joint_places()
        places = self.plan.places()
        sizes = {site: int((places[site] >= 0).sum()) for site in sites}
        self._spans: dict[int, tuple[int, int]] = {}
        """Where each block begins among these, and how many it has."""
        begin = 0
        for piece in self.plan.pieces:
            count = sum(sizes[site] for site in piece.sites)
            if piece.place is not None:
                self._spans[piece.place] = begin, count
            begin += count
        self._twice = True
        """Whether torch has the second derivatives; of ``logit`` it has not."""
        self._mixing: set[int] = set()
        """Blocks whose numbers are coupled with each other."""
        self._rank = torch.zeros(density.density.dim, dtype=torch.long, device="cpu")
        self._rank[self.inner.cpu()] = torch.arange(len(self.inner), device="cpu")
        near = normal_noise(1, density.density.dim, start, seed=5)[0]
        rows = None if layer.rows is None else layer.rows.row_of_numbers(sites).cpu().numpy()
        self._hessian = SparseHessian(
            self._products, start + 0.1 * near, self.inner, list(sizes.values()), rows
        )

    @property
    def usable(self) -> bool:
        """Whether the Hessian has a pattern that can be used."""
        return self._hessian.usable

    def components(self) -> Tensor:
        """Which of them are coupled with each other, directly or through others: a number for each group."""
        return torch.from_numpy(self._hessian.components()).long().to(self.inner.device)

    # -- the model -----------------------------------------------------------------------------

    def _products(self, points: Tensor, directions: Tensor) -> Tensor:
        """Hessians of the log density, times directions."""
        width, found = self.density.width, [points[:0]]
        for z, v in zip(points.split(width), directions.split(width), strict=True):
            count = len(z)
            if not count:
                continue
            if count < width:
                z, v = (torch.cat([x, x[:1].expand(width - count, -1)]) for x in (z, v))
            found.append(self._products_of_width(z, v)[:count])
        return torch.cat(found)

    def _products_of_width(self, z: Tensor, v: Tensor) -> Tensor:
        if self._twice:
            try:
                with torch.enable_grad():
                    at = z.detach().clone().requires_grad_()
                    exact: Tensor = torch.autograd.grad((self.density.exactly(at)[1] * v).sum(), at)[0]
                return exact
            except RuntimeError as error:
                if "is not implemented" not in str(error):
                    raise
                self._twice = False
        step = torch.finfo(z.dtype).eps ** (1 / 3)
        above, below = (self.density.exactly(z + way * v)[1].detach() for way in (step, -step))
        product: Tensor = (above - below) / (2.0 * step)
        return product

    def _prior_precisions(self, z: Tensor) -> Array:
        """Of every latent but roots, each given those before it, ``(P, M)``; zero without a known prior."""
        found = torch.zeros_like(z)
        for prior in self.plan.priors_at(z):
            if prior.joint:
                prior.put(torch.cholesky_inverse(prior.scale).diagonal(dim1=-2, dim2=-1), found)
            else:
                prior.put(prior.scale**-2, found)
        result: Array = found[:, self.inner].double().cpu().numpy()
        return result

    def _prior_slopes(self, z: Tensor, directions: Tensor) -> Tensor:
        """How the locations of priors move with the latents, along directions."""
        step = torch.finfo(z.dtype).eps ** (1 / 3)
        around = torch.cat([z + step * directions.to(z), z - step * directions.to(z)])
        loc = torch.zeros_like(around)
        for prior in self.plan.priors_at(around):
            prior.put(prior.loc, loc)
        high, low = loc.chunk(2)
        slopes: Tensor = (high - low) / (2.0 * step)
        return slopes

    # -- the mode ------------------------------------------------------------------------------

    def newton(self, z: Tensor, steps: int) -> tuple[Tensor, list[Elimination | None]]:
        """Modes of the latents given the roots of points ``(P, D)``, and the factors there."""
        value, gradient = self.density(z)
        settled = torch.zeros(len(z), dtype=torch.bool, device="cpu")
        reach = np.full(len(z), MOST_MOVED)
        while True:
            prior = np.maximum(self._prior_precisions(z), 1e-8)
            matrices = self._hessian.at(z)
            factors = [self._hessian.eliminate(m, p) for m, p in zip(matrices, prior, strict=True)]
            if steps == 0 or bool(settled.all()):
                return z, factors
            steps -= 1
            slopes = gradient[:, self.inner].double().cpu().numpy()
            moves = torch.zeros_like(z)
            for i, factor in enumerate(factors):
                if factor is None or settled[i]:
                    continue
                limit = reach[i] / np.sqrt(factor.pivots)
                move = np.clip(factor.solve(slopes[i]), -limit, limit)
                settled[i] = bool((np.abs(move) * np.sqrt(factor.pivots)).max(initial=0.0) < SETTLED)
                moves[i, self.inner] = torch.from_numpy(move).to(z)
            z, value, gradient, whole = self._climb(z, moves, value, gradient)
            reach *= np.where(whole.cpu().numpy(), WIDER, 1.0)

    def _climb(
        self, z: Tensor, moves: Tensor, value: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points after moves, shorter ones where these lead down.

        :return: the points; value and gradient there; which moves were whole.
        """
        length = torch.ones(len(z), 1).to(z)
        for _ in range(HALVINGS):
            moved = z + length * moves
            new_value, new_gradient = self.density(moved)
            worse = ~(new_value >= value - 1e-6 * value.abs().clamp(min=1.0))
            if not bool(worse.any()):
                break
            length = torch.where(worse.unsqueeze(-1), 0.25 * length, length)
        stays = worse.unsqueeze(-1)
        return (
            torch.where(stays, z, moved),
            torch.where(worse, value, new_value),
            torch.where(stays, gradient, new_gradient),
            length[:, 0] >= 1.0,
        )

    # -- messages ------------------------------------------------------------------------------

    def read_messages(self, z: Tensor, factor: Elimination) -> LaplaceMessages:
        """What the data, and the latents after each, add to its prior, at a mode."""
        own = factor.pivots.copy()
        for place in self._mixing:
            start, count = self._spans[place]
            own[start : start + count] = 1.0 / np.diag(np.linalg.inv(factor.block(start, count)))
        pivots = torch.zeros_like(z)
        pivots[self.inner] = torch.from_numpy(own).to(z)
        priors = self.plan.priors_at(z.unsqueeze(0))
        locs, precisions = torch.zeros_like(z).unsqueeze(0), torch.zeros_like(z).unsqueeze(0)
        for prior in priors:
            if not prior.joint:
                prior.put(prior.loc, locs)
                prior.put(prior.scale**-2, precisions)
        loc, precision = locs[0], precisions[0]
        weight = torch.maximum(pivots - precision, LEAST_SHARE * precision).clamp(min=1e-12)
        weight = torch.where(precision > 0, weight, pivots)
        numbers = {
            "centre": taken(z, self._flat),
            "slope": taken(precision * (z - loc), self._flat),
            "log_weight": taken(weight.log(), self._flat),
            "unit": taken((precision + weight).sqrt(), self._flat, 1.0),
        }
        joint = [prior for prior in priors if prior.joint]
        return LaplaceMessages(
            numbers,
            [self._joint(z, factor, *each) for each in zip(self._joint_places, joint, strict=True)],
        )

    def _joint(self, z: Tensor, factor: Elimination, places: Tensor, given: PlacedPrior) -> dict[str, Tensor]:
        """The same for a site with a joint prior; its numbers are at ``places``, ``(N, K)``."""
        num, width = places.shape
        loc, scale = given.loc[0].reshape(num, width), given.scale[0].reshape(num, width, width)
        prior = torch.cholesky_inverse(scale)
        blocks = factor.blocks(self._rank[places[:, 0].clamp(min=0).cpu()].numpy(), width)
        added = torch.from_numpy(blocks).to(z) - prior
        values, vectors = torch.linalg.eigh(0.5 * (added + added.mT))
        least = LEAST_SHARE * prior.diagonal(dim1=-2, dim2=-1).amin(-1, keepdim=True)
        values = torch.maximum(values, least)
        weight = vectors @ (values.unsqueeze(-1) * vectors.mT)
        centre = z[places.clamp(min=0)]
        return {
            "centre": centre,
            "slope": (prior @ (centre - loc).unsqueeze(-1)).squeeze(-1),
            "factor": torch.linalg.cholesky(weight),
            "weight": weight,
            "unit": torch.linalg.cholesky(prior + weight),
        }

    # -- couplings -----------------------------------------------------------------------------

    def read_couplings(self, z: Tensor, factor: Elimination) -> list[dict[str, Tensor]]:
        """How blocks are coupled beside their priors, at a mode; nothing for those that are not.

        Given the blocks before it, a block has the precision Q and the mean a - Q⁻¹ B (z' - a') with B its
        entries with those.  What of this its prior does not do, its message has to.
        """
        self._mixing = set()
        couplings = self.layer.all_couplings()
        if not couplings or self._hessian.diagonal or self.inner.numel() != sum(self.plan.block_sizes):
            return [{} for _ in couplings]
        prior = np.maximum(self._prior_precisions(z.unsqueeze(0))[0], 0.0)
        by_prior = self._hessian.by_columns(partial(self._prior_slopes, z))
        units: dict[int, Array] = {}
        found = []
        for place, coupling in enumerate(couplings):
            start, size = self._spans[place]
            rows = slice(start, start + size)
            scale: Array = 1.0 / factor.pivots[rows]
            covariance = mix = None
            if coupling.mixes:
                block = np.linalg.inv(factor.block(start, size))
                sds = np.sqrt(np.diag(block))
                correlation = block / np.outer(sds, sds)
                if np.abs(np.tril(correlation, -1)).max() > COUPLED:
                    self._mixing.add(place)
                    covariance, scale, mix = block, sds**2, np.linalg.cholesky(correlation)
            units[place] = scale**-0.5
            numbers: dict[str, Array] = {}
            linked = False
            for j in coupling.links:
                first, count = self._spans[j]
                dense = coupling.is_dense(j)
                entries = factor.between(start, size, first, count, dense)
                known = by_prior[rows, first : first + count]
                if dense:
                    own = covariance @ entries if covariance is not None else scale[:, None] * entries
                    link = -own / scale[:, None] - prior[rows, None] * known.toarray()
                    correlations = np.abs(link) / np.outer(units[place], units[j])
                else:
                    link = -entries - prior[rows] * known.diagonal()
                    correlations = np.abs(link) / (units[place] * units[j])
                matters = bool(correlations.max() > COUPLED)
                numbers[f"link_{j}"] = link if matters else 0.0 * link
                numbers[f"unit_{j}"] = units[j]
                linked |= matters
            if linked or mix is not None:
                numbers["unit"] = units[place]
                if coupling.mixes:
                    numbers["mix"] = np.eye(size) if mix is None else mix
            else:
                numbers = {}
            found.append(
                {name: torch.from_numpy(np.ascontiguousarray(v)).to(z) for name, v in numbers.items()}
            )
        return found
