"""Where the messages of a structured guide start: at the mode of the latents given the roots, with its curvature.

Laplace's approximation nested in one of the roots, as in INLA (Rue, Martino and Chopin 2009), for any program.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._compile.log_density import TracedDensity
from ..init.gaussians import hessians_at, normal_noise
from ..init.lbfgs import ascend
from ..init.sparse_laplace import Elimination, SparseHessian
from ._message_map import MessageMap

__all__ = ["place_messages"]

Array = NDArray[np.float64]

NEWTON_STEPS, RENEWED_STEPS = 12, 4
"""Newton steps from a start that is far, and from one that is near."""
SETTLED = 0.02
"""Newton's method ends where no latent moves by so many of its standard deviations."""
MOST_MOVED, WIDER = 3.0, 3.0
"""Standard deviations that a latent may move in the first step, and how much more after each that was good."""
HALVINGS = 4
ROUNDS = 6
"""Renewals of the messages at the roots that were found with the last ones."""
ARRIVED = 0.05
"""Standard deviations of a root within which a round changes nothing."""
NODES = 8
"""Draws of the noise over which the roots' density is averaged."""
ASCENT = 30
"""Evaluations to find the roots in a round."""
APART = 0.5
"""Standard deviations of a root between the points that tell how messages move with it."""
REACH = 4.0
"""Standard deviations of a root beyond which messages no longer move."""
LEAST_SHARE = 1e-6
"""A message's weight, as a share of the prior's precision, where the data say nothing or push away."""
WIDEST = 3.0
"""Standard deviation of a root at most, where its prior is not known; else it is the prior's.  At its mode
the density of a root may be nearly flat."""
COUPLED = 0.02
"""Correlation of two latents above which it is kept."""
EXACT = 0.02
"""Standard deviation of log weights of latents given the roots, nats, below which these are Gaussian."""


@dataclass
class _Laplace:
    """Messages as a :class:`MessageMap` has them, at one point of the roots."""

    numbers: dict[str, Tensor]
    joint: list[dict[str, Tensor]]


class _Starter:
    """The search, for one map and density.

    :param layer: the map, whose fixed numbers are set.
    :param density: the model's graph.
    """

    def __init__(self, layer: MessageMap, density: TracedDensity) -> None:
        self.layer, self.density = layer, density
        self.start = density.density.start
        places = layer.places()
        none = torch.zeros(0, dtype=torch.long)
        self.roots = torch.cat([none, *(places[site].flatten() for site in layer.structure.roots)])
        inner = [site for piece in layer.pieces for site in piece.sites]
        order = torch.cat([places[site].flatten() for site in inner]).long()
        self.inner = order[order >= 0]
        self.flat = layer.flat_places()
        self.joint = layer.joint_places()
        sizes = [int((places[site] >= 0).sum()) for site in inner]
        counts = [sum(int((places[site] >= 0).sum()) for site in piece.sites) for piece in layer.pieces]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        self.spans = {
            piece.place: (start, count)
            for piece, start, count in zip(layer.pieces, starts, counts, strict=True)
            if piece.place is not None
        }
        """Where each block is among the latents that are eliminated."""
        self.mixing: set[int] = set()
        """Blocks whose numbers are coupled with each other."""
        self.rank = torch.zeros(density.density.dim, dtype=torch.long)
        self.rank[self.inner] = torch.arange(len(self.inner))
        self.bound = self.widest()
        near = normal_noise(1, density.density.dim, self.start, seed=5)[0]
        self.hessian = SparseHessian(self.products, self.start + 0.1 * near, self.inner, sizes)

    # -- the model -----------------------------------------------------------------------------

    def products(self, points: Tensor, directions: Tensor) -> Tensor:
        """Hessians of the log density, times directions."""
        width, found = self.density.width, [points[:0]]
        for z, v in zip(points.split(width), directions.split(width), strict=True):
            count = len(z)
            if not count:
                continue
            if count < width:
                z, v = (torch.cat([x, x[:1].expand(width - count, -1)]) for x in (z, v))
            with torch.enable_grad():
                at = z.detach().clone().requires_grad_()
                gradient = self.density.exactly(at)[1]
                (product,) = torch.autograd.grad((gradient * v).sum(), at)
            found.append(product[:count])
        return torch.cat(found)

    def widest(self) -> Tensor:
        """Standard deviation that each root has at most."""
        known = self.layer.root_scales(self.start)
        return torch.where(known.isfinite(), known, WIDEST)[self.roots]

    def prior_precisions(self, z: Tensor) -> Array:
        """Of every latent but roots, each given those before it, ``(P, M)``; zero without a known prior."""
        found = z.new_zeros(z.shape)
        for (_, scale), places, joint in self.layer.priors_at(z):
            inverse = torch.cholesky_inverse(scale).diagonal(dim1=-2, dim2=-1) if joint else scale**-2
            flat = places.flatten()
            kept = flat >= 0
            found[:, flat[kept]] = inverse.reshape(len(inverse), -1)[:, kept].expand(len(z), -1)
        result: Array = found[:, self.inner].double().cpu().numpy()
        return result

    # -- latents given the roots ---------------------------------------------------------------

    def newton(self, z: Tensor, steps: int) -> tuple[Tensor, list[Elimination | None]]:
        """Modes of the latents given the roots of points ``(P, D)``, and the factors there."""
        value, gradient = self.density(z)
        settled = torch.zeros(len(z), dtype=torch.bool)
        reach = np.full(len(z), MOST_MOVED)
        for step in range(steps + 1):
            prior = np.maximum(self.prior_precisions(z), 1e-8)
            matrices = self.hessian.at(z)
            factors = [self.hessian.eliminate(m, p) for m, p in zip(matrices, prior, strict=True)]
            if step == steps or bool(settled.all()):
                return z, factors
            slopes = gradient[:, self.inner].double().cpu().numpy()
            moves = torch.zeros_like(z)
            for i, factor in enumerate(factors):
                if factor is None or settled[i]:
                    continue
                limit = reach[i] / np.sqrt(factor.pivots)
                move = np.clip(factor.solve(slopes[i]), -limit, limit)
                settled[i] = bool((np.abs(move) * np.sqrt(factor.pivots)).max(initial=0.0) < SETTLED)
                moves[i, self.inner] = torch.from_numpy(move).to(z)
            length = torch.ones(len(z), 1).to(z)
            for _ in range(HALVINGS):
                moved = z + length * moves
                new_value, new_gradient = self.density(moved)
                worse = ~(new_value >= value - 1e-6 * value.abs().clamp(min=1.0))
                if not bool(worse.any()):
                    break
                length = torch.where(worse.unsqueeze(-1), 0.25 * length, length)
            ok = ~worse
            reach *= np.where((length[:, 0] >= 1.0).cpu().numpy(), WIDER, 1.0)
            z = torch.where(ok.unsqueeze(-1), moved, z)
            value = torch.where(ok, new_value, value)
            gradient = torch.where(ok.unsqueeze(-1), new_gradient, gradient)
        raise AssertionError

    def read_messages(self, z: Tensor, factor: Elimination) -> _Laplace:
        """What the data, and the latents after each, add to its prior, at a mode."""
        own = factor.pivots.copy()
        for place in self.mixing:
            start, count = self.spans[place]
            own[start : start + count] = 1.0 / np.diag(np.linalg.inv(factor.block(start, count)))
        pivots = torch.zeros_like(z)
        pivots[self.inner] = torch.from_numpy(own).to(z)
        loc, precision = torch.zeros_like(z), torch.zeros_like(z)
        joint = {}
        for (mean, scale), places, is_joint in self.layer.priors_at(z.unsqueeze(0)):
            if is_joint:
                joint[len(joint)] = mean[0], scale[0]
                continue
            flat = places.flatten()
            kept = flat >= 0
            loc[flat[kept]] = mean.flatten()[kept]
            precision[flat[kept]] = scale.flatten()[kept] ** -2
        weight = torch.maximum(pivots - precision, LEAST_SHARE * precision).clamp(min=1e-12)
        weight = torch.where(precision > 0, weight, pivots)
        numbers = {
            "centre": z,
            "slope": precision * (z - loc),
            "log_weight": weight.log(),
            "unit": (precision + weight).sqrt(),
        }
        kept = self.flat >= 0
        flat = {
            name: torch.where(kept, value[self.flat.clamp(min=0)], 1.0 if name == "unit" else 0.0)
            for name, value in numbers.items()
        }
        return _Laplace(flat, [self._joint(z, factor, p, *joint[i]) for i, p in enumerate(self.joint)])

    def _joint(
        self, z: Tensor, factor: Elimination, places: Tensor, loc: Tensor, scale: Tensor
    ) -> dict[str, Tensor]:
        num, width = places.shape
        loc, scale = loc.reshape(num, width), scale.reshape(num, width, width)
        prior = torch.cholesky_inverse(scale)
        starts = self.rank[places[:, 0].clamp(min=0)]
        blocks = np.stack([factor.block(int(start), width) for start in starts])
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

    # -- messages that move with the roots -----------------------------------------------------

    def put(self, z: Tensor, factor: Elimination, scale: Tensor | None) -> None:
        """Gives the map the messages at a mode; with ``scale`` of the roots also how these move with them."""
        couplings = self._couple(z, factor)
        own = self.read_messages(z, factor)
        self._set(z, own)
        for coupling, numbers in zip(self.layer.couplings, couplings, strict=True):
            coupling.set_fixed(numbers)
            coupling.active = bool(numbers)
        if scale is not None and self.layer.follows_roots:
            first, *others = self._movements(z, own, scale)
            first = {**first, "root_loc": z[self.roots], "log_root_width": (REACH * scale).log()}
            self._set(z, own, [first, *others])

    def _couple(self, z: Tensor, factor: Elimination) -> list[dict[str, Tensor]]:
        """How blocks are coupled beside their priors; nothing for those that are not.

        Given the blocks before it, a block has the precision Q and the mean a - Q⁻¹ B (z' - a') with B its
        entries with those.  What of this its prior does not do, its message has to.
        """
        layer = self.layer
        self.mixing = set()
        if self.hessian.diagonal or not len(layer.couplings) or self.inner.numel() != sum(layer.block_sizes):
            return [{} for _ in layer.couplings]
        prior = np.maximum(self.prior_precisions(z.unsqueeze(0))[0], 0.0)
        by_prior = self.hessian.by_columns(partial(self._prior_slopes, z))
        units, found = {}, []
        for place, coupling in enumerate(layer.couplings):
            start, size = self.spans[place]
            rows = slice(start, start + size)
            scale = 1.0 / factor.pivots[rows]
            covariance = None
            numbers: dict[str, Array] = {}
            if coupling.mixes:
                covariance = np.linalg.inv(factor.block(start, size))
                sds = np.sqrt(np.diag(covariance))
                correlation = covariance / np.outer(sds, sds)
                if np.abs(np.tril(correlation, -1)).max() > COUPLED:
                    self.mixing.add(place)
                    scale = sds**2
                    numbers["mix"] = np.linalg.cholesky(correlation)
                else:
                    covariance = None
            units[place] = scale**-0.5
            linked = False
            for j in coupling.links:
                first, count = self.spans[j]
                dense = getattr(coupling, f"link_{j}").dim() == 2
                entries = factor.between(start, size, first, count, dense)
                block = by_prior[rows, first : first + count]
                known = block.toarray() if dense else block.diagonal()
                if dense:
                    own = covariance @ entries if covariance is not None else scale[:, None] * entries
                    link = -own / scale[:, None] - prior[rows, None] * known
                    size_of = np.abs(link) / np.outer(units[place], units[j])
                else:
                    link = -entries - prior[rows] * known
                    size_of = np.abs(link) / (units[place] * units[j])
                numbers[f"link_{j}"] = link if size_of.max() > COUPLED else 0.0 * link
                numbers[f"unit_{j}"] = units[j]
                linked |= bool(size_of.max() > COUPLED)
            if not linked and "mix" not in numbers:
                found.append({})
                continue
            numbers["unit"] = units[place]
            if coupling.mixes:
                numbers.setdefault("mix", np.eye(size))
            found.append(
                {name: torch.from_numpy(np.ascontiguousarray(v)).to(z) for name, v in numbers.items()}
            )
        return found

    def _prior_slopes(self, z: Tensor, directions: Tensor) -> Tensor:
        """How the locations of priors move with the latents, along directions."""
        step = torch.finfo(z.dtype).eps ** (1 / 3)
        around = torch.cat([z + step * directions.to(z), z - step * directions.to(z)])
        loc = torch.zeros_like(around)
        for (mean, _), places, _ in self.layer.priors_at(around):
            flat = places.flatten()
            kept = flat >= 0
            loc[:, flat[kept]] = mean.reshape(len(mean), -1)[:, kept].expand(len(around), -1)
        high, low = loc.chunk(2)
        return (high - low) / (2.0 * step)

    def _set(self, z: Tensor, own: _Laplace, moves: list[dict[str, Tensor]] | None = None) -> None:
        """Gives the map messages, which stay where they are without ``moves``."""
        first, *others = moves or [{} for _ in range(1 + len(own.joint))]
        numbers = {**self._still(), **own.numbers, **first}
        if self.layer.follows_roots and "root_loc" not in first:
            numbers |= {"root_loc": z[self.roots], "log_root_width": z.new_zeros(len(self.roots))}
        self.layer.set_fixed({name: value for name, value in numbers.items() if value.numel()})
        for module, joint, movement in zip(self.layer.joint, own.joint, others, strict=True):
            still = {name: torch.zeros_like(p) for name, p in module.named_parameters() if "by_root" in name}
            module.set_fixed({**still, **joint, **movement})

    def follow(self, u: Tensor) -> Tensor:
        """Latents in the middle of prior and message for roots ``(P, R)``."""
        x = u.new_zeros(len(u), self.density.density.dim)
        x[:, self.roots] = u
        return self.layer.forward_and_log_det(x)[0]

    def _still(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p) for name, p in self.layer.named_parameters() if "by_root" in name}

    def _movements(self, z: Tensor, own: _Laplace, scale: Tensor) -> list[dict[str, Tensor]]:
        num = len(self.roots)
        shifts = torch.diag(APART * scale)
        roots = z[self.roots] + torch.cat([shifts, -shifts])
        around, factors = self.newton(self.follow(roots), RENEWED_STEPS)
        sides = [
            None if f is None else self.read_messages(at, f) for at, f in zip(around, factors, strict=True)
        ]
        slopes, weights = [], []
        joint: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in own.joint]
        for i in range(num):
            pair, width = (sides[i], sides[num + i]), 2.0 * APART * scale[i]
            high, low = pair
            if high is None or low is None:
                high = low = own
            change = _slope_at(own.numbers, high.numbers) - _slope_at(own.numbers, low.numbers)
            slopes.append((change - self._by_links(high.numbers["centre"] - low.numbers["centre"])) / width)
            weights.append((high.numbers["log_weight"] - low.numbers["log_weight"]) / width)
            for place, here in enumerate(own.joint):
                one, other = high.joint[place], low.joint[place]
                joint[place][0].append(
                    ((_joint_slope(here, one) - _joint_slope(here, other)) / width).flatten()
                )
                dets = [
                    torch.linalg.slogdet(side["weight"])[1] / side["weight"].shape[-1]
                    for side in (one, other)
                ]
                joint[place][1].append((dets[0] - dets[1]) / width)
        first = {"slope_by_root": torch.stack(slopes), "log_weight_by_root": torch.stack(weights)}
        return [
            first,
            *({"slope_by_root": torch.stack(s), "log_weight_by_root": torch.stack(w)} for s, w in joint),
        ]

    def _by_links(self, moves: Tensor) -> Tensor:
        """What links already do to slopes where the latents move."""
        if not len(moves):
            return moves
        parts = moves.split(self.layer.block_sizes)
        pulled = [torch.zeros_like(part) for part in parts]
        for place, coupling in enumerate(self.layer.couplings):
            if coupling.active and coupling.links:
                pulled[place] = coupling.pull({j: parts[j].unsqueeze(0) for j in coupling.links})[0]
        return torch.cat(pulled)

    # -- the roots -----------------------------------------------------------------------------

    def roots_density(self, nodes: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The roots' log density by the mean over draws of noise of log p(roots, z, data) - log q(z | roots).

        That is a lower bound on the marginal, and the marginal itself where messages are exact.

        :param nodes: noise, ``(K, D)``.
        """

        def value_and_grad(u: Tensor) -> tuple[Tensor, Tensor]:
            x = nodes.repeat(len(u), 1)
            x[:, self.roots] = u.repeat_interleave(len(nodes), 0)
            value, gradient = self.pulled_back(x)
            value, gradient = value.reshape(len(u), -1), gradient[:, self.roots]
            return value.mean(1), gradient.reshape(len(u), len(nodes), -1).mean(1)

        return value_and_grad

    def pulled_back(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The model's log density of noise, and its gradient."""
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            z, log_det = self.layer.forward_and_log_det(at)
            value, slope = self.density(z.detach())
            (gradient,) = torch.autograd.grad((z * slope).sum() + log_det.sum(), at)
        return value + log_det.detach(), gradient

    def locate(self, u: Tensor, scale: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor, float]:
        """The mode of the roots from u in units of ``scale``, their covariance's factor, how far they moved."""
        density = self.roots_density(nodes)

        def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = density(u + x @ scale.mT)
            return value, gradient @ scale

        found = ascend(scaled, u.new_zeros(1, len(u)), ASCENT)
        at = found.points[:1]
        hessian = hessians_at(scaled, at)[0].nan_to_num(0.0, 0.0, 0.0)
        values, vectors = torch.linalg.eigh(hessian)
        spread = vectors * values.clamp(min=0.05).rsqrt()
        covariance = scale @ spread @ spread.mT @ scale.mT
        widest = (covariance.diagonal().sqrt() / self.bound).clamp(min=1.0)
        covariance = covariance / widest.unsqueeze(-1) / widest
        moved = float((at[0].abs() / spread.norm(dim=-1)).max()) if len(u) else 0.0
        return u + scale @ at[0], torch.linalg.cholesky(covariance), moved

    def is_gaussian(self, z: Tensor, nodes: Tensor) -> bool:
        """Whether the latents given the roots are what the messages say, as where prior and data are conjugate."""
        x = nodes.clone()
        x[:, self.roots] = z[self.roots]
        value = self.pulled_back(x)[0] + 0.5 * x.square().sum(-1)
        return bool(value.std() < EXACT)


def _slope_at(here: dict[str, Tensor], there: dict[str, Tensor]) -> Tensor:
    """The slope of a message at another centre."""
    return there["slope"] - there["log_weight"].exp() * (here["centre"] - there["centre"])


def _joint_slope(here: dict[str, Tensor], there: dict[str, Tensor]) -> Tensor:
    offset = (here["centre"] - there["centre"]).unsqueeze(-1)
    return there["slope"] - (there["weight"] @ offset).squeeze(-1)


@torch.no_grad()
def place_messages(layer: MessageMap, density: TracedDensity) -> tuple[Tensor, Tensor] | None:
    """Gives a map the messages to start with, and says where its roots are.

    :param layer: the map; it is in a frame afterwards.
    :param density: the model's graph.
    :return: location of the roots, ``(R,)``, and lower factor of their covariance; None where the latents'
        Hessian has no pattern that can be used, or is singular.
    """
    starter = _Starter(layer, density)
    if not starter.hessian.usable:
        return None
    z = starter.start.clone()
    scale = torch.diag(starter.bound)
    nodes = normal_noise(NODES, density.density.dim, z, seed=1)
    sds = None
    for step in range(ROUNDS if len(starter.roots) else 0):
        modes, factors = starter.newton(z.unsqueeze(0), RENEWED_STEPS if step else NEWTON_STEPS)
        if factors[0] is None:
            return None
        z = modes[0]
        starter.put(z, factors[0], sds)
        u, scale, moved = starter.locate(z[starter.roots], scale, nodes if step else 0.0 * nodes[:1])
        sds = scale.norm(dim=-1)
        z = starter.follow(u.unsqueeze(0))[0]
        if step and moved < ARRIVED:
            break
    modes, factors = starter.newton(z.unsqueeze(0), RENEWED_STEPS if len(starter.roots) else NEWTON_STEPS)
    if factors[0] is None:
        return None
    starter.put(modes[0], factors[0], sds)
    if starter.is_gaussian(modes[0], nodes):
        layer.leave_shapes_out()
    return z[starter.roots], scale
