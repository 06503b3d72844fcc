"""Whether ranks are uniform: an exact test by the empirical distribution function, and its simultaneous band.

Säilynoja, Bürkner and Vehtari, *Graphical Test for Discrete Uniformity and Its Applications in
Goodness-of-Fit Evaluation and Multiple Sample Comparison*, 2022.  The count of ranks below a point is
binomial.  Its two-sided tail probability, at the point where that is smallest, is the statistic; the chance
of one as small is exact, by a recursion over the points (their section 2.2).
"""

from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["band", "counts_below", "points", "uniform_p_value"]

Array = NDArray[np.float64]
MOST_POINTS: Final = 200
"""Points at which a distribution function is looked at."""


def points(num: int, num_values: int) -> NDArray[np.int64]:
    """Ranks below which the ranks are counted, of ``num`` ranks between 0 and ``num_values - 1``.

    Example::

        >>> points(100, 5)
        array([1, 2, 3, 4])
    """
    parts = min(num, num_values, MOST_POINTS)
    return np.unique(np.arange(1, parts) * num_values // max(parts, 1))


def counts_below(ranks: NDArray[np.int64], num_values: int) -> NDArray[np.int64]:
    """How many ranks are below each of the points.

    Example::

        >>> counts_below(np.array([0, 0, 3]), 4)
        array([2, 2])
    """
    return np.searchsorted(np.sort(ranks), points(len(ranks), num_values))


@lru_cache(maxsize=32)
def _tails(num: int, num_values: int) -> Array:
    """Two-sided tail probability of each count at each point, ``(points, num + 1)``."""
    from scipy.special import bdtr, bdtrc

    count, below = np.arange(num + 1.0), points(num, num_values)[:, None] / num_values
    upper = np.where(count > 0, bdtrc(np.maximum(count - 1, 0), num, below), 1.0)
    tails: Array = np.minimum(1.0, 2.0 * np.minimum(bdtr(count, num, below), upper))
    return tails


@lru_cache(maxsize=4096)
def _chance_within(num: int, num_values: int, level: float) -> float:
    """Chance that the tail probabilities of uniform ranks are above a level at all points."""
    from scipy.special import gammaln

    inside = _tails(num, num_values) > level * (1.0 + 1e-9)  # of what is equal by symmetry neither
    log_factorial = gammaln(np.arange(num + 1) + 1.0)
    counts, mass, before = np.zeros(1, dtype=int), np.ones(1), 0.0
    for allowed, below in zip(inside, points(num, num_values) / num_values, strict=True):
        # Of those that are not yet below, each is in the next piece with the chance q.
        q = (below - before) / (1.0 - before)
        after = np.flatnonzero(allowed)
        if not len(after):
            return 0.0
        step = after[None, :] - counts[:, None]
        left = num - counts[:, None]
        log_p = (
            log_factorial[left]
            - log_factorial[np.maximum(step, 0)]
            - log_factorial[num - after][None, :]
            + step * np.log(q)
            + (num - after)[None, :] * np.log1p(-q)
        )
        mass = mass @ np.exp(np.where(step >= 0, log_p, -np.inf))
        counts, before = after, below
    return float(mass.sum())


def uniform_p_value(ranks: NDArray[Any], num_values: int) -> float:
    """The chance that uniform ranks between 0 and ``num_values - 1`` deviate as much as these, or more.

    Example::

        >>> uniform_p_value(np.arange(50), 50), uniform_p_value(np.zeros(50, dtype=int), 50) < 1e-6
        (1.0, True)
    """
    num = len(ranks)
    if num < 2 or num_values < 2:
        return 1.0
    tails = _tails(num, num_values)
    below = counts_below(ranks, num_values)
    smallest = float(tails[np.arange(len(below)), below].min())
    return min(1.0, max(0.0, 1.0 - _chance_within(num, num_values, smallest)))


@lru_cache(maxsize=32)
def band(num: int, num_values: int, chance: float = 0.95) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lowest and highest counts at the points between which all those of uniform ranks are with a chance.

    Example::

        >>> low, high = band(100, 1000)
        >>> int(low[49]), int(high[49])
        (36, 64)
    """
    tails = _tails(num, num_values)
    few, many = 0.0, 1.0 - chance  # levels at which the chance is large enough, and is not
    for _ in range(40):
        middle = 0.5 * (few + many)
        if _chance_within.__wrapped__(num, num_values, middle) >= chance:
            few = middle
        else:
            many = middle
    inside = tails > few
    return inside.argmax(1), num - inside[:, ::-1].argmax(1)
