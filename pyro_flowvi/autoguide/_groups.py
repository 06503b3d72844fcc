"""Latents that are independent of each other given the roots: weights of the roots alone, group by group."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._compile.errors import CannotCompile
from .._compile.log_density import traced
from .._compile.log_factors import LogFactors
from .._program.batching import even_sizes
from .._program.log_density import UnconstrainedModel
from ..distributions.flow import standard_normal_log_prob
from ..transforms import Compose
from ..transforms.base import forward_and_log_det
from ._given_roots import GivenRoots
from ._message_map import MessageMap
from ._on_roots import OnRoots
from ._pages import LOG_2_PI

__all__ = ["GroupedDraws", "GroupedLatents", "find_groups", "group_terms", "owners_of", "stratified"]

FEWEST_GROUPS = 8
"""Groups from which on they are integrated one by one."""
NOISE, LITTLE_NOISE = 0.05, 0.01
"""Variance of a log weight, for given roots, that is aimed at, and where that takes no fewer roots."""
NUM_EACH = 2, 4, 8, 16, 32, 64
"""Draws of each group for one of the roots."""
PILOT_ROOTS, PILOTS = 8, 4
"""Roots, and log weights for each, that tell how many are needed."""
MOST_NUMBERS = 12_000_000
"""Latents of all draws, above which there are fewer of each group, and of the roots."""
FEWEST_ROOTS = 1000
"""Draws of the roots at least, where so many are asked for."""
CHUNK = 4_000_000
"""Numbers at once."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How much a term may change, relative to its size, by latents that it does not depend on."""
MIXTURES = 4
"""Random mixtures of two draws by which a partition is checked."""


@dataclass(frozen=True)
class GroupedDraws:
    """Draws of a guide with weights of the roots, the groups being integrated by several draws of each.

    :param z: draws of the guide, ``(S, D)``.
    :param corrected: the same roots, with each group drawn anew from its own draws by their weights.
    :param log_weights: log p(x, u) - log q(u) of the roots, with estimates of p that have no bias, ``(S,)``.
    :param log_ratios: log p(x, z) - log q(z), on average over the draws of the groups, ``(S,)``.
    :param mean: of the latents less a reference point, given each of the roots and by weights of the groups,
        ``(S, D)``.
    :param square: the same of their squares.
    :param raw: mean, less that point, and standard deviation of all draws, ``(D,)`` each.
    :param local_gap: nats that the groups given the roots are from their posterior, all together.
    :param num_each: draws of each group.
    """

    z: Tensor
    corrected: Tensor
    log_weights: Tensor
    log_ratios: Tensor
    mean: Tensor
    square: Tensor
    raw: tuple[Tensor, Tensor]
    local_gap: float
    num_each: int


class GroupedLatents:
    """The latents of a message map that fall into independent groups given the roots.

    :param flow: the guide's map: of the roots, and a message map in the end.
    :param labels: the group of each latent, -1 of a root, ``(D,)``.
    :param factors: the terms of the model's log density.
    :param owners: the group that each term depends on beside the roots; ``num`` if on none, ``(E,)``.
    """

    def __init__(self, flow: Any, labels: Tensor, factors: LogFactors, owners: Tensor) -> None:
        self._flow, self._factors, self._owners = flow, factors, owners
        self._layer: MessageMap = flow[-1]
        self.labels, self.num = labels, int(labels.max()) + 1
        self.roots = self._layer.plan.root_places().to(labels.device)

    def _roots(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Draws of the roots and their log densities."""
        x = torch.zeros(count, len(self.labels)).to(like)
        x[:, self.roots] = torch.randn(count, len(self.roots)).to(like)
        u, log_q = x, standard_normal_log_prob(x[:, self.roots])
        for part in list(self._flow)[:-1]:
            u, log_det = forward_and_log_det(part, u)
            log_q = log_q - log_det
        return u[:, self.roots], log_q

    def _score(self, u: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draws of the groups for each of the roots.

        :return: latents, ``(P, K, D)``; terms of the roots alone, ``(P,)``; log p - log q of the groups,
            ``(P, K, G)``.
        """
        x = stratified(len(u), num, len(self.labels)).to(u).flatten(0, 1)
        x[:, self.roots] = u.repeat_interleave(num, 0)
        z, log_dets = self._layer.run_by_site(x)
        ratios = group_terms(self._layer, self._factors(z), self._owners, x, log_dets, self.labels)
        outside = ratios[:, self.num]
        shape = len(u), num, -1
        return z.reshape(shape), outside.reshape(len(u), num)[:, 0], ratios[:, : self.num].reshape(shape)

    def _sizes(self, num_samples: int, like: Tensor) -> tuple[int, int]:
        """How many draws of the roots, and of the groups for each: as many as these need, and time allows."""
        u = self._roots(PILOT_ROOTS, like)[0].repeat_interleave(PILOTS, 0)
        room = MOST_NUMBERS // len(self.labels)
        fewest = min(num_samples, FEWEST_ROOTS)
        for each in NUM_EACH:
            log_mean = self._score(u, each)[2].logsumexp(1).sum(-1).reshape(PILOT_ROOTS, PILOTS)
            noise = float(log_mean.var(1).median())
            dear = num_samples * 2 * each > room // 4
            if noise < LITTLE_NOISE or (dear and noise < NOISE) or fewest * 2 * each > room:
                break
        return min(num_samples, max(fewest, room // each)), each

    @torch.no_grad()
    def draw(self, num_samples: int, like: Tensor) -> GroupedDraws:
        """Draws with weights of the roots.

        :param num_samples: draws of the roots; fewer where there are so many latents that it would take long.
        :param like: a tensor of the guide's dtype and device.
        """
        count, num = self._sizes(num_samples, like)
        most = max(1, CHUNK // (num * (len(self.labels) + len(self._owners))))
        member = self.labels.clamp(min=0)
        is_root = self.labels < 0
        parts: list[list[Tensor]] = []
        total = squares = torch.zeros(len(self.labels), dtype=torch.float64).to(like.device)
        gap = 0.0
        origin: Tensor | None = None
        for size in even_sizes(count, most):
            u, log_q = self._roots(size, like)
            z, outside, ratios = self._score(u, num)
            own, log_mean = ratios.mean(1), ratios.logsumexp(1) - math.log(num)
            gap += float((log_mean - own).sum(-1).nan_to_num(0.0, 0.0, 0.0).sum())
            chosen = (ratios + _gumbel(ratios)).argmax(1)
            picked = z.gather(1, torch.where(is_root, 0, chosen[:, member]).unsqueeze(1))[:, 0]
            share = torch.softmax(ratios, 1)[..., member].to(z)
            share = torch.where(is_root, 1.0 / num, share)
            origin = z[0, 0].clone() if origin is None else origin
            centred = (z - origin).double()
            total = total + centred.sum((0, 1))
            squares = squares + centred.square().sum((0, 1))
            base = outside - log_q.double()
            parts.append(
                [
                    z[:, 0],
                    picked,
                    base + log_mean.sum(-1),
                    base + own.sum(-1),
                    (share * centred).sum(1),
                    (share * centred.square()).sum(1),
                ]
            )
        z, corrected, log_weights, log_ratios, means, seconds = (
            torch.cat(column) for column in zip(*parts, strict=True)
        )
        mean = total / (count * num)
        sd = (squares / (count * num) - mean.square()).clamp(min=0.0).sqrt()
        return GroupedDraws(
            z, corrected, log_weights, log_ratios, means, seconds, (mean, sd), gap / count, num
        )


def group_terms(
    layer: MessageMap,
    terms: Tensor,
    owners: Tensor,
    x: Tensor,
    log_dets: Mapping[str, Tensor],
    labels: Tensor,
) -> Tensor:
    """log p - log q of each group, and last the terms of log p that are of none, ``(P, G + 1)``.

    :param terms: of log p, ``(P, E)``.
    :param owners: the group of each, G if of none, ``(E,)``.
    :param x: the noise of the groups, ``(P, D)``.
    :param log_dets: of the map from it, by site.
    :param labels: the group of each latent, -1 of a root, ``(D,)``.
    """
    num, joint = int(labels.max()) + 1, set(layer.plan.joint_sites)
    totals = torch.zeros(len(x), num + 1, dtype=torch.float64).to(x.device)
    totals.index_add_(1, owners, terms.double())
    inner = torch.nonzero(labels >= 0).squeeze(-1)
    normal = 0.5 * (x[:, inner].double().square() + LOG_2_PI)
    totals.index_add_(1, labels[inner], normal)
    for site, where in layer.places().items():
        if site not in log_dets:
            continue
        first = where[..., 0] if site in joint else where
        kept = torch.nonzero(first.flatten() >= 0).squeeze(-1)
        group = labels[first.flatten()[kept]]
        totals.index_add_(1, group, log_dets[site].reshape(len(x), -1)[:, kept].double())
    return totals


def stratified(size: int, num: int, dim: int) -> Tensor:
    """Standard normal noise ``(size, num, dim)``, of which each coordinate has one draw in each stratum.

    Latin hypercube sampling (McKay, Beckman and Conover 1979): each draw is fair, and their mean varies less.
    """
    strata = torch.rand(size, num, dim, dtype=torch.float64).argsort(1)
    uniform = (strata + torch.rand(size, num, dim, dtype=torch.float64)) / num
    noise: Tensor = torch.special.ndtri(uniform.clamp(1e-15, 1.0 - 1e-15))
    return noise


def _gumbel(like: Tensor) -> Tensor:
    return -(-torch.rand_like(like).clamp(min=1e-300).log()).log()


def find_groups(flow: Any, density: UnconstrainedModel) -> GroupedLatents | None:
    """The groups of a guide's latents; None where these are few, or the guide or the model has none.

    :param flow: the map from noise to latents.
    :param density: the model.
    """
    if not isinstance(flow, Compose) or not len(flow) or not isinstance(flow[-1], MessageMap):
        return None
    layer = flow[-1]
    on_roots = all(isinstance(part, OnRoots) for part in list(flow)[:-1])
    graph = traced(density)
    if not on_roots or not graph.holds or not len(layer.plan.root_places()):
        return None
    try:
        labels = _labels(GivenRoots(layer, graph), density.dim)
        if labels is None or int(labels.max()) + 1 < FEWEST_GROUPS:
            return None
        factors = LogFactors(density)
        owners = owners_of(flow, factors, labels, density.start)
    except (CannotCompile, ValueError):
        return None
    return None if owners is None else GroupedLatents(flow, labels, factors, owners)


def _labels(given: GivenRoots, dim: int) -> Tensor | None:
    """The group of each latent by the Hessian given the roots; -1 of a root."""
    if not given.usable:
        return None
    labels = torch.full((dim,), -1, device=given.inner.device)
    labels[given.inner] = given.components()
    return labels


def owners_of(flow: Any, factors: LogFactors, labels: Tensor, like: Tensor) -> Tensor | None:
    """The group that each term depends on; None if there is a term of two.

    A term is known by the groups that it follows, one half of all at a time, from one draw to another.
    """
    num = int(labels.max()) + 1
    bits = max(1, (num - 1).bit_length())
    codes = (torch.arange(num).unsqueeze(0) >> torch.arange(bits).unsqueeze(-1)) & 1 > 0
    halves = torch.cat([codes, ~codes, torch.rand(MIXTURES, num) < 0.5]).to(labels.device)
    moved = halves[:, labels.clamp(min=0)] & (labels >= 0)
    follows, swapped = [], []
    for _ in range(2):  # of one pair of draws a term may happen to be the same
        x = torch.randn(2, len(labels)).to(like)
        x[:, labels < 0] = 0.0
        with torch.no_grad():
            one, other = forward_and_log_det(flow, x)[0]
            points = torch.cat([one.unsqueeze(0), other.unsqueeze(0), torch.where(moved, other, one)])
            first, second, *mixed = factors(points)
        near = TOLERANCE.get(first.dtype, 1e-3) * (1.0 + first.abs() + second.abs())
        rows = torch.stack(mixed)
        follows.append((rows - first).abs() > near)
        swapped.append((first, second, rows[2 * bits :], near))
    by_bit, by_other = (follows[0] | follows[1]).split([bits, bits, MIXTURES])[:2]
    alone = ~(by_bit | by_other).any(0)
    single = (by_bit ^ by_other).all(0)
    found = (by_bit.long() << torch.arange(bits).unsqueeze(-1).to(labels.device)).sum(0)
    if not bool((alone | single).all()) or bool((found[single] >= num).any()):
        return None
    owners = torch.where(alone, num, found)
    last = torch.cat([halves[2 * bits :], torch.zeros_like(halves[2 * bits :, :1])], 1)[:, owners]
    agrees = [
        ((rows - torch.where(last, second, first)).abs() <= near).all()
        for first, second, rows, near in swapped
    ]
    return owners if bool(torch.stack(agrees).all()) else None
