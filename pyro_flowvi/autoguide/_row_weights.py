"""Weights of the latents outside of a subsampled plate, its rows integrated one by one in passes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._compile.errors import CannotCompile
from .._compile.log_factors import LogFactors
from ._groups import NUM_EACH, group_terms, owners_of, stratified
from ._pages import View
from ._sweep import Sweep

__all__ = ["RootWeights", "weigh_roots"]

MOST_NUMBERS = 40_000_000
"""Latents of all draws, above which there are fewer draws of the roots."""
FEWEST_ROOTS = 200
"""Draws of the roots at least, where so many are asked for."""
PAGE_NUMBERS = 2_000_000
"""Latents at once."""


class RootWeights(NamedTuple):
    """Draws of the latents outside of a plate with their weights, the rows being integrated.

    ``log_weights`` are log p(x, u) - log q(u) with estimates of p that have no bias, ``log_ratios`` the
    means of log p(x, z) - log q(z) over the draws of the rows, both ``(S,)``; ``local_gap`` is how many nats
    all rows together are from their posterior given the roots.
    """

    roots: Tensor
    log_weights: Tensor
    log_ratios: Tensor
    local_gap: float
    num_each: int


@torch.no_grad()
def weigh_roots(sweep: Sweep, num: int, width: int) -> RootWeights | None:
    """Draws of the roots, weighed by a pass over all rows.

    :param num: draws of the roots; fewer where the rows are so many that it would take long.
    :param width: points that the model scores at once, for what the roots have of their own.
    :return: None where the terms of the density cannot be told apart by rows.
    """
    each = NUM_EACH[1]
    num = min(num, max(FEWEST_ROOTS, MOST_NUMBERS // (each * sweep.num_latents)))
    u, log_q = sweep.guide.draw_roots_and_log_prob(num)
    view = sweep.nothing()
    still = view.with_roots(u, u.new_zeros(num, view.packing.dim))
    outside = view.graph(width)(view.layer.forward_and_log_det(still)[0])[0] - log_q
    log_weights, log_ratios = outside.double(), outside.double()
    parts: dict[int, _Rows] = {}
    for view, _, fresh in sweep.pages(weighted=False):
        if id(view) not in parts:
            try:
                parts[id(view)] = _Rows.of(view)
            except CannotCompile:
                return None
        counts = sweep.weight * fresh.double()
        own, mean = parts[id(view)].score(view, u, each)
        log_weights = log_weights + own @ counts
        log_ratios = log_ratios + mean @ counts
    gap = float((log_weights - log_ratios).mean())
    return RootWeights(u, log_weights, log_ratios, gap, each)


class _Rows(NamedTuple):
    """The terms of a page's density, and the row that each belongs to."""

    factors: LogFactors
    owners: Tensor
    labels: Tensor

    @classmethod
    def of(cls, view: View) -> "_Rows":
        assert view.density is not None
        rows = view.layer.rows
        assert rows is not None
        labels = torch.full((view.packing.dim,), -1, device="cpu")
        places = view.layer.places()
        for site, row_of in rows.row_of.items():
            labels[places[site].flatten()] = row_of.flatten()
        factors = LogFactors(view.density)
        owners = owners_of(view.layer, factors, labels, view.density.start)
        if owners is None:
            raise CannotCompile("a term of the model's density depends on several rows")
        return cls(factors, owners, labels)

    def score(self, view: View, u: Tensor, each: int) -> tuple[Tensor, Tensor]:
        """Log of the mean of each row's weights, and mean of their logs, ``(S, B)``, for roots ``(S, R)``."""
        logs, means = [], []
        for part in u.split(max(1, PAGE_NUMBERS // (each * len(self.labels)))):
            x = stratified(len(part), each, len(self.labels)).to(u).flatten(0, 1)
            x = view.with_roots(part.repeat_interleave(each, 0), x)
            z, log_dets = view.layer.run_by_site(x)
            terms = group_terms(view.layer, self.factors(z), self.owners, x, log_dets, self.labels)
            ratios = terms[:, :-1].reshape(len(part), each, -1)
            logs.append(ratios.logsumexp(1) - math.log(each))
            means.append(ratios.mean(1))
        return torch.cat(logs), torch.cat(means)
