"""Modes and precisions of many latents at once, by Newton's method on a sparse Hessian."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix, csc_matrix
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import SuperLU, splu
from torch import Tensor

__all__ = ["Elimination", "SparseHessian"]

Array = NDArray[np.float64]
HessianProducts = Callable[[Tensor, Tensor], Tensor]
"""Points and directions, ``(P, D)`` each, to the products of the Hessians there with them."""

MAX_PROBED = 1024
"""Latents of which each column of the Hessian is computed to see where it is zero."""
SMALL_SITE = 200
"""Numbers of a site whose columns are computed one by one where there are more latents in all."""
MOST_COUPLED = 128
"""Earlier latents that one may be coupled with; more would fill the factor."""
LEAST_HUB = 16
"""Couplings of a latent, and groups of columns, below which no column is taken by itself."""
LEAST = 1e-10
"""Size of an entry, relative to its diagonal ones, that counts as zero."""
LEAST_PIVOT = 0.05
"""Of a prior's precision, below which a pivot is taken for one where the density is not concave."""
TRIES = 4
"""Factorizations of a matrix, each with more on its diagonal; in the last it is dominant."""


@dataclass
class Elimination:
    """The factor of a precision matrix from which later latents are eliminated first.

    :param pivots: the precision of each latent given all before it, ``(M,)``.
    :param lower: unit lower factor of the matrix in reversed order; None of a diagonal matrix.

    Example::

        >>> Elimination(np.array([1.0, 4.0]), None, None).solve(np.array([2.0, 2.0])).tolist()
        [2.0, 0.5]
    """

    pivots: Array
    lower: Any
    _factor: SuperLU | None

    def solve(self, gradient: Array) -> Array:
        """The Newton step."""
        if self._factor is None:
            return gradient / self.pivots
        step: Array = self._factor.solve(gradient[::-1].copy())[::-1]
        return step

    def _rows(self, start: int, width: int) -> slice:
        last = len(self.pivots) - start
        return slice(last - width, last)

    def block(self, start: int, width: int) -> Array:
        """The joint precision of neighbouring latents given all before them."""
        pivots = self.pivots[start : start + width]
        if self.lower is None:
            return np.diag(pivots)
        rows = self._rows(start, width)
        lower = self.lower[rows, rows].toarray()
        inner: Array = (lower * pivots[::-1]) @ lower.T
        return inner[::-1, ::-1]

    def blocks(self, starts: NDArray[np.int64], width: int) -> Array:
        """The same of many places, ``(N, K, K)``."""
        pivots: Array = self.pivots[starts[:, None] + np.arange(width)]
        lower: Array = np.zeros((len(starts), width, width))
        if self.lower is None:
            lower[:, range(width), range(width)] = pivots
            return lower
        own = np.full(len(self.pivots), -1)
        own[(starts[:, None] + np.arange(width)).ravel()] = np.repeat(np.arange(len(starts)), width)
        entries = self.lower.tocoo()
        later, earlier = (len(self.pivots) - 1 - each for each in (entries.col, entries.row))
        inside = (own[later] >= 0) & (own[later] == own[earlier])
        later, earlier, values = later[inside], earlier[inside], entries.data[inside]
        place = own[later]
        # Rows are the latents, columns those that are eliminated, later ones first.
        lower[place, earlier - starts[place], later - starts[place]] = values
        joint: Array = (lower * pivots[:, None, :]) @ lower.transpose(0, 2, 1)
        return joint

    def between(self, start: int, width: int, earlier: int, count: int, dense: bool) -> Array:
        """Entries of neighbouring latents with others before them, once all after them are eliminated.

        :param dense: all entries; else those of equal places in both.
        """
        if self.lower is None:
            return np.zeros((width, count) if dense else width)
        rows, others = self._rows(start, width), self._rows(earlier, count)
        pivots = self.pivots[start : start + width][::-1]
        cross = self.lower[others, rows]
        entries: Array
        if not dense:
            entries = cross.diagonal() * pivots
            return entries[::-1]
        entries = (self.lower[rows, rows].toarray() * pivots) @ cross.toarray().T
        return entries[::-1, ::-1]


class SparseHessian:
    """The negative Hessian of a density in some of its coordinates, of which it is known where it is zero.

    The pattern is found by products with directions.  Of up to a thousand latents every column is computed.
    Of more, those of small sites are, and a large site is taken for one whose numbers are not coupled with
    each other, and with at most one number of any other large site, such as their parent; which one it is
    shows from two products with directions of ones and of random numbers.  Columns that share no row are
    computed together from then on: one product for a site of independent groups, three for a chain.

    :param products: Hessian-vector products.
    :param point: where the pattern is looked for, ``(D,)``.
    :param places: the M coordinates, in the order in which later ones are eliminated first.
    :param sizes: of the sites that they belong to.
    :param rows: where each belongs to one of many independent rows of equal lengths, to which; one product
        for each number of a row then gives all entries.

    Example::

        >>> def products(points, directions):  # of -(z0² + (z1 - z0)²) / 2
        ...     return directions @ torch.tensor([[-2.0, 1.0], [1.0, -1.0]])
        >>> hessian = SparseHessian(products, torch.zeros(2), torch.arange(2), [1, 1])
        >>> (matrix,) = hessian.at(torch.zeros(1, 2))
        >>> hessian.eliminate(matrix, np.ones(2)).pivots.tolist()
        [1.0, 1.0]
    """

    def __init__(
        self,
        products: HessianProducts,
        point: Tensor,
        places: Tensor,
        sizes: Sequence[int],
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self._products, self.places = products, places
        self.size, self._dim = len(places), len(point)
        self.usable = True
        """Whether the pattern is one that can be used."""
        if rows is not None:
            self._by_row(point, rows)
        elif self.size <= MAX_PROBED:
            columns = self._columns(point, [np.array([i]) for i in range(self.size)])
            size = np.sqrt(np.abs(np.diag(columns)) + 1e-300)
            pattern = np.abs(columns) > LEAST * np.outer(size, size)
            self._group(pattern | pattern.T)
        else:
            self._by_site(point, list(sizes))
        if self.usable:
            self._list_entries()

    def _columns(self, point: Tensor, groups: Sequence[NDArray[np.int64]], weights: Any = None) -> Array:
        """Sums of columns, ``(M, G)``; with ``weights``, ``(M,)``, weighted."""
        directions = torch.zeros(len(groups), len(point), dtype=point.dtype, device=point.device)
        for row, members in enumerate(groups):
            at = self.places[torch.from_numpy(np.ascontiguousarray(members))]
            directions[row, at] = 1.0 if weights is None else torch.from_numpy(weights[members]).to(point)
        found = self._products(point.expand(len(groups), -1), directions)[:, self.places]
        return -found.T.double().cpu().numpy()

    def _group(self, pattern: NDArray[np.bool_]) -> None:
        """Groups of columns no two of which share a row, and which column each row sees of a group.

        Where some latents are coupled with most others, as the items of a test with all persons, their
        columns are taken one by one: by symmetry these tell their rows too, which others may then share.
        """
        np.fill_diagonal(pattern, True)
        groups, hubs = _colour(pattern), np.zeros(self.size, dtype=bool)
        if len(groups) > LEAST_HUB:
            degree = pattern.sum(0)
            crowded = degree > max(LEAST_HUB, 3 * np.median(degree))
            others = np.flatnonzero(~crowded)
            inner = [others[group] for group in _colour(pattern[np.ix_(others, others)])]
            if crowded.sum() + len(inner) < len(groups):
                hubs = crowded
                groups = [*(np.array([i]) for i in np.flatnonzero(hubs)), *inner]
        self.groups = groups
        self._owner = np.full((self.size, len(groups)), -1)
        for place, group in enumerate(groups):
            for column in group:
                rows = pattern[:, column] if hubs[column] else pattern[:, column] & ~hubs
                self._owner[rows, place] = column

    def _by_row(self, point: Tensor, rows: NDArray[np.int64]) -> None:
        """The same of rows that are independent of each other."""
        order = np.argsort(rows, kind="stable")
        numbers = order.reshape(rows.max(initial=0) + 1, -1)  # of each row, in order
        self.groups = list(numbers.T)
        if len(self.groups) > MAX_PROBED:
            self.usable = False
            return
        columns = self._columns(point, self.groups)
        within = np.empty_like(rows)
        within[order] = np.tile(np.arange(numbers.shape[1]), len(numbers))
        size = np.sqrt(np.abs(columns[np.arange(self.size), within]) + 1e-300)
        sizes = np.stack([size[numbers[rows, w]] for w in range(numbers.shape[1])], 1)
        coupled = np.abs(columns) > LEAST * size[:, None] * sizes
        pattern = np.stack([coupled[members].any(0) for members in self.groups])
        pattern |= pattern.T | np.eye(len(pattern), dtype=bool)
        self._owner = np.where(pattern[within], numbers[rows], -1)

    def _by_site(self, point: Tensor, sizes: list[int]) -> None:
        """The same with every large site as a group, and every number of a small one.

        Of a column that a row sees in a large site two weighted sums tell which it is, if it is one.
        """
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        sites = [np.arange(a, b) for a, b in pairwise(bounds)]
        small = [site for site in sites if len(site) <= SMALL_SITE]
        large = [site for site in sites if len(site) > SMALL_SITE]
        single = np.concatenate(small) if small else np.zeros(0, dtype=int)
        if len(single) > MAX_PROBED:
            self.usable = False
            return
        self.groups = [*large, *(np.array([i]) for i in single)]
        rng = np.random.default_rng(0)
        first, second = rng.uniform(1.0, 2.0, (2, self.size))
        sums = self._columns(point, self.groups)
        one, two = (self._columns(point, large, weights) for weights in (first, second))
        diagonal = np.zeros(self.size)
        for i, group in enumerate(self.groups):
            diagonal[group] = sums[group, i]
        size = np.sqrt(np.abs(diagonal) + 1e-300)
        self._owner = np.full((self.size, len(self.groups)), -1)
        for i, site in enumerate(large):
            total, seen = sums[:, i], one[:, i]
            coupled = np.abs(total) > LEAST * size * np.median(size[site])
            order = site[np.argsort(first[site])]
            ratio = seen / np.where(coupled, total, 1.0)
            at = np.clip(np.searchsorted(first[order], ratio), 1, len(order) - 1)
            nearer = np.abs(first[order[at - 1]] - ratio) < np.abs(first[order[at]] - ratio)
            found = order[np.where(nearer, at - 1, at)]
            found[site] = site
            right = np.abs(seen - first[found] * total) + np.abs(two[:, i] - second[found] * total)
            wrong = coupled & (right > 1e-4 * np.abs(total))
            if wrong[site].any():
                self.usable = False  # numbers of one site depend on each other
                return
            self._owner[:, i] = np.where(coupled & ~wrong, found, -1)
            self._owner[site, i] = site
        for i, column in enumerate(single, start=len(large)):
            coupled = np.abs(sums[:, i]) > LEAST * size * size[column]
            self._owner[coupled, i] = column
            self._owner[column, i] = column

    def _list_entries(self) -> None:
        """Which product tells which entry.  Where both of a pair are told, each is their mean."""
        rows, groups = np.nonzero(self._owner >= 0)
        columns = self._owner[rows, groups]
        later, earlier = np.maximum(rows, columns), np.minimum(rows, columns)
        pairs, place = np.unique(later * self.size + earlier, return_inverse=True)
        coupled = np.bincount(
            (pairs // self.size)[pairs // self.size != pairs % self.size], minlength=self.size
        )
        # Latents with many couplings to earlier ones would fill the factor.
        kept = (later == earlier) | (
            coupled[later] <= max(MOST_COUPLED, MAX_PROBED * (self.size <= MAX_PROBED))
        )
        weight = 1.0 / np.bincount(place)[place]
        self._entries = rows[kept], columns[kept], groups[kept], weight[kept]
        self.diagonal = bool((later[kept] == earlier[kept]).all())

    def components(self) -> NDArray[np.int64]:
        """A number for each group of latents that are coupled, directly or through others, ``(M,)``."""
        rows, columns, *_ = self._entries
        pattern = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(self.size, self.size))
        labels: NDArray[np.int64] = connected_components(pattern, directed=False)[1].astype(np.int64)
        return labels

    def _directions(self) -> Tensor:
        """The sum of each group's coordinates, ``(G, D)``."""
        directions = torch.zeros(len(self.groups), self._dim, dtype=torch.float64)
        for row, members in enumerate(self.groups):
            directions[row, self.places[torch.from_numpy(members)]] = 1.0
        return directions

    def at(self, points: Tensor) -> list[Any]:
        """The matrices at points ``(P, D)``, sparse, in the order of the coordinates."""
        num, count = len(points), len(self.groups)
        directions = self._directions().to(points)
        repeated = points.repeat_interleave(count, 0)
        found = self._products(repeated, directions.repeat(num, 1))[:, self.places]
        values = -found.double().cpu().numpy().reshape(num, count, self.size)
        rows, columns, groups, weight = self._entries
        apart = rows != columns
        both = np.concatenate([rows, columns[apart]]), np.concatenate([columns, rows[apart]])
        matrices = []
        for one in values:
            entries = weight * one[groups, rows]
            data = np.concatenate([entries, entries[apart]])
            matrices.append(coo_matrix((data, both), shape=(self.size, self.size)).tocsr())
        return matrices

    def by_columns(self, derivative: Callable[[Tensor], Tensor]) -> Any:
        """A matrix that is zero where this one is, of its products with directions; sparse.

        :param derivative: directions ``(G, D)`` to products ``(G, D)``.
        """
        found = derivative(self._directions())[:, self.places].double().cpu().numpy()
        rows, columns, groups, _ = self._entries
        shape = self.size, self.size
        return coo_matrix((found[groups, rows], (rows, columns)), shape=shape).tocsr()

    def eliminate(self, matrix: Any, prior: Array) -> Elimination | None:
        """The factor of a matrix, with more on its diagonal where it is not positive.

        :param prior: precision of each latent's prior.
        :return: None if that does not help.
        """
        diagonal = matrix.diagonal()
        raised = np.maximum(np.abs(diagonal), 2.0 * LEAST_PIVOT * prior) - diagonal
        if self.diagonal:
            return Elimination(diagonal + raised, None, None)
        for attempt in range(TRIES):
            if attempt == TRIES - 1:  # a dominant diagonal is positive definite
                raised = (
                    np.asarray(abs(matrix).sum(1)).ravel()
                    - np.abs(diagonal)
                    - diagonal
                    + np.maximum(prior, 1e-8)
                )
                raised = np.maximum(raised, 0.0)
            reverse = (matrix + coo_matrix((raised, (range(self.size),) * 2)).tocsr())[::-1, ::-1]
            try:
                factor = splu(
                    csc_matrix(reverse),
                    permc_spec="NATURAL",
                    diag_pivot_thresh=0.0,
                    options={"SymmetricMode": True},
                )
            except RuntimeError:  # a pivot of exactly zero
                raised = raised + prior
                continue
            pivots = factor.U.diagonal()[::-1]
            bad = ~(pivots > LEAST_PIVOT * prior)
            if not bad.any() and (factor.perm_r == np.arange(self.size)).all():
                return Elimination(pivots, factor.L.tocsr(), factor)
            raised = raised + np.where(bad, prior + np.abs(pivots), 0.1 * prior)
        return None


def _colour(pattern: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Groups of columns of which no two share a row: each joins the first group that it fits into."""
    members: list[list[int]] = []
    covered = np.zeros((0, len(pattern)), dtype=bool)
    for column in range(len(pattern)):
        rows = pattern[:, column]
        free = np.flatnonzero(~covered[:, rows].any(1))
        if len(free):
            members[free[0]].append(column)
            covered[free[0]] |= rows
        else:
            members.append([column])
            covered = np.concatenate([covered, rows[None]])
    return [np.array(group) for group in members]
