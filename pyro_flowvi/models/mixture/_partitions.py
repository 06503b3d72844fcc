"""Partitions of the data that a mixture of flows starts from."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["STARTS", "cluster_gaussians", "in_one_unit", "neighbour_graph", "warm_starts"]

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
MAX_ROWS: Final = 20_000
"""Rows that are clustered; the others follow the nearest of these.  What follows neighbours is the better the
more of them there are: ten digits of MNIST, 8,000 rows with 5 labels a class, are .91 right by all rows, .87
by 5,000."""
MAX_SPECTRAL_ROWS: Final = 5000
"""The same of spectral clustering, which in 32 columns takes a minute for twice as many."""
MAX_COLUMNS: Final = 32
"""Of wider data the first principal components are clustered."""
SPREADING: Final = 0.99
"""How much label spreading trusts neighbours; scikit-learn's default, 0.2, leaves closed curves cut."""
SMOOTHING: Final = 0.9
SMOOTHINGS: Final = 3
"""The neighbours' share in the responsibilities of :func:`_neighbours`, and how often they are mixed in."""
MIN_NEIGHBORS: Final = 3
FAR: Final = 2.5
"""Standard deviations from a column's mean beyond which rows are no further: rare values are no parts."""
LEAST_WITHIN: Final = 0.25
"""Of a column's standard deviation, what it is taken to have within two parts at least."""
SAME_ROW: Final = 1e-12
"""Of the variance of all rows, that of rows which are one."""
SAME_AGREEMENT: Final = 0.98
"""Partitions that agree on that share of the rows are one."""


def warm_starts(
    names: Sequence[str],
    x: Array,
    labels: Labels,
    num: int,
    random_state: Any,
    *,
    num_neighbors: int = 10,
    counts: Array | None = None,
) -> dict[str, Labels]:
    """Partitions of the rows into ``num`` parts by several methods, needs scikit-learn.

    They do not depend on the units of the columns: distances are those of standardised columns, of which
    those that tell parts apart count for more.  Rows with a label are in the part of their label.  A method
    that cannot be applied, such as label spreading without labels, is left out, and so is one whose partition
    an earlier one has found.

    :param names: keys of :data:`STARTS`.
    :param x: finite values, shape ``(N, D)``.
    :param labels: parts that are known, from 0, and -1, shape ``(N,)``.
    :param num: the number K of parts.
    :param random_state: a ``numpy.random.RandomState``.
    :param num_neighbors: of the graphs of neighbours.
    :param counts: how often each row counts, shape ``(N,)``, for the methods that are no graphs.
    :return: by name, the parts, shape ``(N,)``.
    :raises ValueError: if no method can be applied.

    Example::

        >>> x = np.concatenate([np.random.randn(50, 2) - 5, np.random.randn(50, 2) + 5])
        >>> found = warm_starts(["kmeans", "gmm"], x, np.full(100, -1), 2, np.random.RandomState(0))
        >>> list(found), sorted(np.bincount(found["kmeans"]).tolist())
        (['kmeans'], [50, 50])
    """
    if (labels >= 0).all() and labels.max() + 1 == num:
        return {"labels": labels.copy()}
    rows, counts = np.arange(len(x)), np.ones(len(x)) if counts is None else counts
    if len(x) > MAX_ROWS:
        known = np.flatnonzero(labels >= 0)[:MAX_ROWS]
        rest = random_state.permutation(np.setdiff1d(rows, known))
        rows = np.sort(np.concatenate([known, rest[: max(MAX_ROWS - len(known), MAX_ROWS // 2)]]))
    y, c, x = labels[rows], counts[rows], in_one_unit(x, rows, counts[rows], num, random_state)
    z = x[rows]
    if x.shape[1] > MAX_COLUMNS:
        from sklearn.decomposition import PCA

        z = PCA(min(MAX_COLUMNS, len(z)), random_state=0).fit_transform(z)
    # More neighbours than a fraction of a part's rows would join parts.
    num_neighbors = min(num_neighbors, max(MIN_NEIGHBORS, len(z) // (4 * num)))
    found: dict[str, Labels] = {}
    for name in names:
        part = STARTS[name](z, y, c, num, random_state, num_neighbors)
        if part is None:
            continue
        part = _with_labels(np.asarray(part, dtype=np.int64), y, num)
        if all(_agreement(part, other, num) < SAME_AGREEMENT for other in found.values()):
            found[name] = part
    if not found:
        raise ValueError(f"init: expected a start that the data allow, got {list(names)}, which need labels")
    return {name: _extended(x, labels, rows, part) for name, part in found.items()}


def in_one_unit(x: Array, rows: Labels, counts: Array, num: int, random_state: Any) -> Array:
    """The columns, each divided by the standard deviation that it has within the parts of its own k-means.

    In standard deviations of the whole column, one that tells parts apart would count for less than noise.
    Each column has a partition of its own, so that data alike in all directions stay so: a curve that is
    stretched loses its neighbours.

    :param x: shape ``(N, D)``.
    :param rows: those by which that is found, with ``counts``.
    :param num: the number of parts.

    Example::

        >>> x, rows = np.random.randn(50, 2) * [1.0, 9.0], np.arange(50)
        >>> in_one_unit(x, rows, np.ones(50), 1, np.random.RandomState(0)).std(0).round(1).tolist()
        [1.0, 1.0]
    """
    share = counts / counts.sum()
    center = share @ x[rows]
    spread = np.sqrt(share @ (x[rows] - center) ** 2)
    z: Array = ((x - center) / np.where(spread > 0, spread, np.inf)).clip(-FAR, FAR)
    for column in z.T[:, :, None]:
        some = column[rows]
        if not some.any():
            continue
        part = _clusters(some, counts, num, random_state, 1)
        size = np.maximum(np.bincount(part, share, num), np.finfo(float).tiny)
        within = some[:, 0] - (np.bincount(part, share * some[:, 0], num) / size)[part]
        ratio = np.sqrt(share @ within**2 / (share @ (some[:, 0] - share @ some[:, 0]) ** 2))
        column /= max(ratio, LEAST_WITHIN * 2.0 / max(num, 2))
    return z


def _extended(x: Array, labels: Labels, rows: Labels, part: Labels) -> Labels:
    if len(rows) == len(x):
        return part
    from sklearn.neighbors import KNeighborsClassifier

    result: Labels = KNeighborsClassifier(1).fit(x[rows], part).predict(x)
    return np.where(labels >= 0, labels, result)


def _with_labels(part: Labels, labels: Labels, num: int) -> Labels:
    """The partition renumbered to meet as many labels as it can, and then with the labels themselves."""
    seen = labels >= 0
    if not seen.any():
        return part
    counts = np.zeros((num, num))
    np.add.at(counts, (part[seen], labels[seen]), 1.0)
    own, theirs = _assignment(-counts)
    order = np.empty(num, dtype=np.int64)
    order[own] = theirs
    return np.where(seen, labels, order[part])


def _assignment(costs: Array) -> tuple[Array, Array]:
    """The one-to-one assignment of rows to columns that costs least."""
    from scipy.optimize import linear_sum_assignment

    found: tuple[Array, Array] = linear_sum_assignment(costs)
    return found


def _agreement(part: Labels, other: Labels, num: int) -> float:
    counts = np.zeros((num, num))
    np.add.at(counts, (part, other), 1.0)
    return float(counts[_assignment(-counts)].sum() / len(part))


# -- methods -----------------------------------------------------------------------------------------
def _clusters(x: Array, counts: Array, num: int, random_state: Any, n_init: int) -> Labels:
    from sklearn.cluster import KMeans

    with warnings.catch_warnings(action="ignore"):  # with fewer distinct rows than parts, some are empty
        method = KMeans(num, n_init=n_init, random_state=random_state)
        result: Labels = method.fit_predict(x, sample_weight=counts)
    return result


def _kmeans(
    x: Array, labels: Labels, counts: Array, num: int, random_state: Any, num_neighbors: int
) -> Labels:
    return _clusters(x, counts, num, random_state, 10)


def _gmm(x: Array, labels: Labels, counts: Array, num: int, random_state: Any, num_neighbors: int) -> Labels:
    """From k-means, with covariances that stay away from singular."""
    return _em(x, _kmeans(x, labels, counts, num, random_state, num_neighbors), labels, counts, num, None)


def neighbour_graph(x: Array, num_neighbors: int) -> Any:
    """Who is among the nearest of whom, either way, as a sparse matrix.

    Example::

        >>> neighbour_graph(np.array([[0.0], [1.0], [5.0]]), 1).toarray().tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    from sklearn.neighbors import kneighbors_graph

    near = kneighbors_graph(x, min(num_neighbors, len(x) - 1))
    return near.maximum(near.T).tocsr()


def _spectral(
    x: Array, labels: Labels, counts: Array, num: int, random_state: Any, num_neighbors: int
) -> Labels | None:
    if len(x) <= num + 1 or num == 1:
        return None
    if len(x) > MAX_SPECTRAL_ROWS:
        rows = np.sort(random_state.permutation(len(x))[:MAX_SPECTRAL_ROWS])
        part = _spectral(x[rows], labels[rows], counts[rows], num, random_state, num_neighbors)
        return None if part is None else _extended(x, np.full(len(x), -1), rows, part)
    from scipy.sparse.csgraph import connected_components
    from scipy.sparse.linalg import ArpackNoConvergence
    from sklearn.cluster import SpectralClustering

    near = neighbour_graph(x, num_neighbors)
    count, parts = connected_components(near, directed=False)
    if count == num:  # the eigenvectors of equal eigenvalues would be any mixture of the parts
        return np.asarray(parts, dtype=np.int64)
    while count > 1:  # parts that are each other's nearest remain apart from the rest at first
        near = _connected(x, near, count, parts)
        count, parts = connected_components(near, directed=False)
    method = SpectralClustering(
        num, affinity="precomputed", assign_labels="kmeans", random_state=random_state
    )
    try:
        result: Labels = method.fit_predict(near)
    except ArpackNoConvergence:
        return None
    return result


def _connected(x: Array, near: Any, count: int, parts: Labels) -> Any:
    """The graph with weak edges between the rows that are nearest across its parts."""
    from sklearn.neighbors import NearestNeighbors

    near = near.tolil()
    for part in range(count):
        inside, outside = np.flatnonzero(parts == part), np.flatnonzero(parts != part)
        distance, other = NearestNeighbors(n_neighbors=1).fit(x[outside]).kneighbors(x[inside])
        nearest = int(distance[:, 0].argmin())
        i, j = inside[nearest], outside[other[nearest, 0]]
        near[i, j] = near[j, i] = 0.1
    return near.tocsr()


def _neighbours(
    x: Array, labels: Labels, counts: Array, num: int, random_state: Any, num_neighbors: int
) -> Labels:
    """Gaussians whose responsibilities are averaged over neighbours in every step of EM.

    Liu, Cai and He, *Gaussian Mixture Model with Local Consistency*, 2010: on data along manifolds, such as
    images, it finds other and better parts than EM from the same start.
    """
    start = _label_spreading(x, labels, counts, num, random_state, num_neighbors)
    if start is None:
        start = _kmeans(x, labels, counts, num, random_state, num_neighbors)
    near = neighbour_graph(x, num_neighbors)
    scale = 1.0 / np.maximum(np.asarray(near.sum(1)).ravel(), 1.0)
    return _em(x, start, labels, counts, num, near.multiply(scale[:, None]).tocsr())


def _label_spreading(
    x: Array, labels: Labels, counts: Array, num: int, random_state: Any, num_neighbors: int
) -> Labels | None:
    if labels.max() + 1 != num:
        return None
    from sklearn.semi_supervised import LabelSpreading

    with warnings.catch_warnings(action="ignore"):
        # Rows that no label reaches have no distribution, and take the first part.
        method = LabelSpreading(
            kernel="knn", n_neighbors=min(num_neighbors, len(x) - 1), alpha=SPREADING, max_iter=1000
        )
        result: Labels = method.fit(x, labels).transduction_
    return result


def _random(
    x: Array, labels: Labels, counts: Array, num: int, random_state: Any, num_neighbors: int
) -> Labels:
    """Rows go to the nearest of as many rows drawn at random."""
    centers = x[random_state.permutation(len(x))[:num]]
    return np.asarray(((x[:, None] - centers) ** 2).sum(-1).argmin(1), dtype=np.int64)


STARTS: Final[dict[str, Callable[[Array, Labels, Array, int, Any, int], Labels | None]]] = {
    "label_spreading": _label_spreading,
    "kmeans": _kmeans,
    "gmm": _gmm,
    "spectral": _spectral,
    "neighbours": _neighbours,
    "random": _random,
}
"""Methods by name: ``(x, labels, counts, num, random_state, num_neighbors)`` -> parts, or None."""


def _moments(x: Array, r: Array) -> tuple[Array, Array]:
    share = r / r.sum()
    loc = share @ x
    return loc, ((x - loc) * share[:, None]).T @ (x - loc)


# -- Gaussians ---------------------------------------------------------------------------------------
def cluster_gaussians(x: Array, responsibilities: Array) -> tuple[Array, Array, Array]:
    """Locations, Cholesky factors of covariances, and weights of soft parts; of an empty one, those of all.

    The covariances are shrunk, the more the fewer rows there are for a column, so that none is singular.

    :param x: shape ``(N, D)``.
    :param responsibilities: shape ``(N, K)``, not negative.
    :return: shapes ``(K, D)``, ``(K, D, D)``, ``(K,)``.

    Example::

        >>> loc, scale_tril, weights = cluster_gaussians(np.random.randn(100, 2), np.ones((100, 1)))
        >>> loc.shape, scale_tril.shape, weights
        ((1, 2), (1, 2, 2), array([1.]))
    """
    dim, total = x.shape[1], responsibilities.sum(1)
    whole = _moments(x, total)
    spread = float(np.trace(whole[1])) / dim or 1.0
    locs, factors, weights = [], [], []
    for r in responsibilities.T:
        mass = float(r.sum())
        loc, covariance = _moments(x, r) if mass >= 2.0 else whole
        if np.trace(covariance) <= SAME_ROW * spread:
            loc, covariance = whole
        rows = mass if mass >= 2.0 else total.sum()
        mean = float(np.trace(covariance)) / dim
        shrunk = covariance + (max(1e-3, 0.1 * dim / rows) * mean + 1e-6 * spread) * np.eye(dim)
        locs.append(loc)
        factors.append(np.linalg.cholesky(shrunk))
        weights.append(max(mass, 0.1))
    return np.array(locs), np.array(factors), np.array(weights) / sum(weights)


def _em(
    x: Array, start: Labels, labels: Labels, counts: Array, num: int, smoother: Any, max_iter: int = 60
) -> Labels:
    """EM for Gaussians from a partition; with ``smoother``, rows of weights that sum to one, LCGMM."""
    identity = np.eye(num)
    seen = labels >= 0
    r = identity[start]
    before = start
    for iteration in range(max_iter):
        if smoother is not None:
            r = _smooth(r, seen, identity[labels[seen]], smoother)
        r[seen] = identity[labels[seen]]
        loc, factors, weights = cluster_gaussians(x, r * counts[:, None])
        log_prob = np.empty((len(x), num))
        for k in range(num):
            u = np.linalg.solve(factors[k], (x - loc[k]).T)
            log_prob[:, k] = np.log(weights[k] / np.diag(factors[k]).prod()) - 0.5 * (u**2).sum(0)
        r = np.exp(log_prob - log_prob.max(1, keepdims=True))
        r /= r.sum(1, keepdims=True)
        part = r.argmax(1)
        if iteration > 10 and (part == before).all():
            break
        before = part
    if smoother is not None:
        r = _smooth(r, seen, identity[labels[seen]], smoother)
    return np.asarray(r.argmax(1), dtype=np.int64)


def _smooth(r: Array, seen: NDArray[np.bool_], known: Array, smoother: Any) -> Array:
    for _ in range(SMOOTHINGS):
        r[seen] = known
        r = (1.0 - SMOOTHING) * r + SMOOTHING * (smoother @ r)
    return r
