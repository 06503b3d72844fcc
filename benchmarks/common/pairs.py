"""Differences between methods that saw the same seeds, with their standard errors."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common.results import Row

Array = NDArray[np.float64]


def by_seed(rows: Iterable[Row], score: str) -> dict[int, Any]:
    """A score of every seed that has it.

    :raises ValueError: if a seed has several, as where rows of two settings are mixed.
    """
    scored = [row for row in rows if row.get(score) is not None]
    found = {row["seed"]: row[score] for row in scored}
    if len(found) < len(scored):
        raise ValueError(f"rows: expected one of each seed, got seeds {[row['seed'] for row in scored]}")
    return found


def differences(rows: Iterable[Row], others: Iterable[Row], score: str) -> Array:
    """A score less that of the others, for each seed that both have, in the order of the seeds."""
    first, second = by_seed(rows, score), by_seed(others, score)
    shared = sorted(first.keys() & second.keys())
    return np.array([np.subtract(first[seed], second[seed]) for seed in shared])


def over_images(rows: Iterable[Row], others: Iterable[Row], scores: str) -> Array:
    """The differences of scores at each image, or group of images, averaged over the seeds that both have."""
    found = differences(rows, others, scores)
    return found.mean(0) if len(found) else found


def standard_error(values: Array) -> float:
    """Of the mean; NaN for a single value."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def with_error(values: Array, digits: int = 2, sign: str = "-") -> str:
    """Mean ± standard error.

    :param sign: "+" for one at every mean.
    """
    if len(values) == 0:
        return "–"
    error = standard_error(values)
    return f"{values.mean():{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")
