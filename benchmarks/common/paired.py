"""Differences between posteriors that saw the same seeds and the same images."""

import math
from typing import Any

import numpy as np

from benchmarks.common.results import Row

__all__ = ["by_image", "by_seed", "with_error"]

Values = np.ndarray[Any, Any]


def _pairs(rows: list[Row], first: str, second: str) -> list[tuple[Row, Row]]:
    of = [{row["seed"]: row for row in rows if row["posterior"] == kind} for kind in (first, second)]
    return [(of[0][seed], of[1][seed]) for seed in sorted(of[0].keys() & of[1].keys())]


def by_seed(rows: list[Row], first: str, second: str, score: str) -> Values:
    """A score's difference at each seed that both have."""
    return np.array([one[score] - other[score] for one, other in _pairs(rows, first, second)])


def by_image(rows: list[Row], first: str, second: str) -> Values:
    """The difference of log p(x) at each test image, averaged over the seeds that both have."""
    each = [
        np.subtract(one["image_ll"], other["image_ll"])
        for one, other in _pairs(rows, first, second)
        if "image_ll" in one and "image_ll" in other
    ]
    return np.mean(each, axis=0) if each else np.array([])


def with_error(values: Values, digits: int = 4) -> str:
    """The mean with its standard error; a dash without values."""
    if not len(values):
        return "–"
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"
