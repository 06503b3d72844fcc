"""The columns of data in one unit, and rows that count more than once."""

from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["Columns", "Rows", "counts_of"]

Array = NDArray[np.float64]
CONSTANT_SCALE: Final = 1e-3
"""Standard deviation that the density gives to a column that does not vary."""
ROUNDING: Final = 64 * float(np.finfo(np.float64).eps)
"""A column whose standard deviation is less than so much of its mean is taken to be constant."""


@dataclass(frozen=True)
class Columns:
    """Location and scale of each column, and which of them vary.

    :param mean: shape ``(D,)``.
    :param scale: standard deviations, shape ``(D,)``; of a constant column :data:`CONSTANT_SCALE`.
    :param varying: shape ``(D,)``.

    Example::

        >>> columns = Columns.of(np.array([[1.0, 7.0], [3.0, 7.0]]), np.ones(2))
        >>> columns.mean.tolist(), columns.scale.tolist(), columns.varying.tolist()
        ([2.0, 7.0], [1.0, 0.001], [True, False])
        >>> columns.standardised(np.array([[5.0, 7.0]])).tolist()
        [[3.0]]
    """

    mean: Array
    scale: Array
    varying: NDArray[np.bool_]

    @classmethod
    def of(cls, x: Array, counts: Array) -> Self:
        """Those of the rows, each as often as it counts.

        :raises ValueError: if no column varies.
        """
        # From the middle and in parts of the range, whose squares neither overflow nor vanish.
        low, high = x.min(0), x.max(0)
        middle, half = 0.5 * low + 0.5 * high, 0.5 * high - 0.5 * low
        u = (x - middle) / np.where(half > 0, half, 1.0)
        share = counts / counts.sum()
        center = share @ u
        mean, scale = middle + half * center, half * np.sqrt(share @ (u - center) ** 2)
        varying = scale > ROUNDING * np.abs(mean)
        if not varying.any():
            raise ValueError("X: expected a column that varies, got constant ones alone")
        return cls(mean, np.where(varying, scale, CONSTANT_SCALE), varying)

    def standardised(self, x: Array) -> Array:
        """The columns that vary, in standard deviations."""
        z: Array = ((x - self.mean) / self.scale)[:, self.varying]
        return z

    @property
    def log_scale(self) -> float:
        """What a log density of standardised columns has more than one of the columns."""
        return float(np.log(self.scale[self.varying]).sum())

    def constant_log_prob(self, x: Array) -> Array:
        """Log density of the columns that are constant."""
        z = ((x - self.mean) / self.scale)[:, ~self.varying]
        constant = np.log(CONSTANT_SCALE * np.sqrt(2.0 * np.pi))
        return np.asarray(-0.5 * (z**2).sum(1) - z.shape[1] * constant)


def counts_of(sample_weight: Any, x: Array) -> Array:
    """How often each row counts: weights that are integers as they are, others with a mean of one.

    :param sample_weight: shape ``(N,)``; None is one for each row.
    :raises ValueError: if a weight is negative, or none is positive.

    Example::

        >>> counts_of([2, 0, 1], np.zeros((3, 1))), counts_of([0.5, 1.5], np.zeros((2, 1)))
        (array([2., 0., 1.]), array([0.5, 1.5]))
    """
    from sklearn.utils.validation import _check_sample_weight

    if sample_weight is None:
        return np.ones(len(x))
    counts: Array = _check_sample_weight(sample_weight, x, dtype=np.float64)
    if (counts < 0).any():
        raise ValueError(f"sample_weight: expected weights of at least 0, got {counts.min()!r}")
    if not counts.any():
        raise ValueError("sample_weight: expected a positive weight, got none")
    return counts if (counts == counts.round()).all() else counts * (len(x) / counts.sum())


@dataclass(frozen=True)
class Rows:
    """Rows that count, in an order that does not depend on that in which they came.

    :param z: the standardised columns that vary, shape ``(N, D)``.
    :param codes: the component of each row, or -1, shape ``(N,)``.
    :param counts: how often each counts, shape ``(N,)``.
    :param place: the index of each among the rows that came, shape ``(N,)``.

    Example::

        >>> x, counts = np.array([[3.0], [1.0], [2.0]]), np.array([1.0, 1.0, 0.0])
        >>> rows = Rows.of(x, np.array([1, 0, -1]), counts, Columns.of(x, counts))
        >>> sorted(rows.place.tolist())
        [0, 1]
    """

    z: Array
    codes: NDArray[np.int64]
    counts: Array
    place: NDArray[np.int64]

    @classmethod
    def of(cls, x: Array, codes: NDArray[np.int64], counts: Array, columns: Columns) -> Self:
        """Of data in their own units."""
        place = np.flatnonzero(counts)
        z = columns.standardised(x[place])
        direction = np.random.default_rng(0).standard_normal(z.shape[1])
        place_in_order = np.lexsort((codes[place], (z * direction).sum(1)))
        place = place[place_in_order]
        return cls(z[place_in_order], codes[place], counts[place], place)
