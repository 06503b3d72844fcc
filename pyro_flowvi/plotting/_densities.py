"""Densities from draws, in one and two dimensions, and the boxes in which they are shown."""

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d

__all__ = [
    "Scale",
    "bandwidth",
    "contours",
    "density",
    "is_discrete",
    "limits",
    "mass_level",
    "support",
    "within",
]

Array = NDArray[Any]
Limits = tuple[float, float]
NUM_BINS: Final = 400
GRID: Final = 80
TAILS: Final = (0.002, 0.998)
HEAVY: Final = 10.0
"""Multiple of the median that the 99.5 % quantile of positive draws exceeds, for their log to be shown."""
FEWEST_FOR_MODES: Final = 100
MASSES: Final = (0.5, 0.9)
"""Shares of the draws that contours enclose."""


def limits(values: Iterable[Array]) -> Limits:
    """A box around most of the draws of each set: 99.6 % of them, or where tails are far 98 %.

    Example::

        >>> limits([np.linspace(0.0, 1.0, 1001)])
        (-0.0478, 1.0478)
    """
    lows, highs = [], []
    for each in values:
        finite = each[np.isfinite(each)]
        # What 90 % of them take, on either side once more, but never a mode with a hundredth of them less.
        low, first, early, late, last, high = np.quantile(
            finite, (TAILS[0], 0.01, 0.05, 0.95, 0.99, TAILS[1])
        )
        lows.append(max(low, min(first, early - (late - early))))
        highs.append(min(high, max(last, late + (late - early))))
    low, high = float(min(lows)), float(max(highs))
    margin = 0.05 * (high - low) or 1.0
    return round(low - margin, 12), round(high + margin, 12)


def within(box: Limits, bounds: Limits) -> Limits:
    """A box cut off at the ends of a support.

    Example::

        >>> within((-0.1, 3.0), (0.0, np.inf)), within((-0.1, 0.0), (0.0, np.inf))
        ((0.0, 3.0), (-0.1, 0.0))
    """
    low, high = max(box[0], bounds[0]), min(box[1], bounds[1])
    return (low, high) if low < high else box


def support(values: Iterable[Array]) -> Limits:
    """The support of a scalar, as far as draws tell it: an end at 0 or 1 that none of them passes.

    Example::

        >>> support([np.array([0.5, 3.0]), np.array([0.1, 0.9])])
        (0.0, inf)
    """
    sets = [*values]
    low, high = min(np.nanmin(each) for each in sets), max(np.nanmax(each) for each in sets)
    return (0.0 if low >= 0 else -np.inf), (1.0 if low >= 0 and high <= 1 else np.inf)


class Scale:
    """How a scalar is shown: as it is, or by its log where it is positive with a heavy tail.

    :param values: the sets of its draws.

    Example::

        >>> scale = Scale([np.exp(np.linspace(-4.0, 4.0, 101))])
        >>> scale.log, [round(x, 1) for x in scale.limits]
        (True, [0.0, 80.0])
    """

    def __init__(self, values: Iterable[Array]) -> None:
        sets = [each[np.isfinite(each)] for each in values]
        self.log: bool = all(each.min() > 0 for each in sets) and any(
            np.quantile(each, 0.995) > HEAVY * np.median(each) for each in sets
        )
        self.bounds: Limits = (-np.inf, np.inf) if self.log else support(sets)
        """The support, in the coordinate that is drawn evenly."""
        self.shown: Limits = within(limits([self(each) for each in sets]), self.bounds)
        """The box, in the coordinate that is drawn evenly."""

    @property
    def limits(self) -> Limits:
        """The box, in units of the scalar."""
        low, high = self.inverse(np.array(self.shown))
        return float(low), float(high)

    def __call__(self, values: Array) -> Array:
        """The coordinate that is drawn evenly."""
        return np.asarray(np.log(values)) if self.log else values

    def inverse(self, shown: Array) -> Array:
        """The scalar, of that coordinate."""
        return np.asarray(np.exp(shown)) if self.log else shown


def bandwidth(values: Array) -> float:
    """The normal reference rule, by the least of three measures of spread: one sees a single mode of several.

    Silverman, *Density Estimation for Statistics and Data Analysis*, 1986, 3.4.2; 0 where all draws are one.

    Example::

        >>> two = np.concatenate([np.linspace(-11.0, -9.0, 500), np.linspace(9.0, 11.0, 500)])
        >>> round(bandwidth(two), 2), round(1.06 * float(two.std()) * 1000 ** -0.2, 2)
        (0.42, 2.67)
    """
    x = np.sort(values[np.isfinite(values)])
    spreads = [float(x.std()), float(np.subtract(*np.quantile(x, (0.75, 0.25)))) / 1.349]
    if len(x) >= FEWEST_FOR_MODES:
        quarter = len(x) // 4
        spreads.append(float((x[quarter:] - x[:-quarter]).min()) / 0.637)  # the shortest with 25 % of them
    least = min((s for s in spreads if s > 0), default=0.0)
    return float(1.06 * least * len(x) ** -0.2)


def is_discrete(values: Array) -> bool:
    """Whether all of them are integers."""
    finite = values[np.isfinite(values)]
    return bool(len(finite) and (finite == np.round(finite)).all())


def density(values: Array, box: Limits, bounds: Limits = (-np.inf, np.inf)) -> tuple[Array, Array]:
    """A kernel estimate at points of a box, reflected at the ends of the support.

    :param values: draws, shape ``(S,)``.
    :param box: where it is wanted.
    :param bounds: of the support.
    :return: points and heights; a share of the draws outside of the box is not part of the integral.

    Example::

        >>> x, height = density(np.random.default_rng(0).exponential(size=20_000), (-0.5, 4.0), (0.0, np.inf))
        >>> round(x[0].item(), 2), round(height[0].item(), 1)
        (0.01, 0.9)
    """
    values = values[np.isfinite(values)]
    width = bandwidth(values) or 1e-3 * (box[1] - box[0])
    low, high = max(box[0] - 4.0 * width, bounds[0]), min(box[1] + 4.0 * width, bounds[1])
    counts, edges = np.histogram(values, NUM_BINS, (low, high))
    step = float(edges[1] - edges[0])
    sigma = width / step
    pad = min(NUM_BINS, int(4.0 * sigma) + 1)
    parts = [counts[:pad][::-1] if low == bounds[0] else np.zeros(pad), counts]
    parts.append(counts[-pad:][::-1] if high == bounds[1] else np.zeros(pad))
    smooth = gaussian_filter1d(np.concatenate(parts).astype(float), sigma, mode="constant")[pad:-pad]
    middle = 0.5 * (edges[1:] + edges[:-1])
    inside = (middle >= box[0]) & (middle <= box[1])
    return middle[inside], smooth[inside] / (len(values) * step)


def mass_level(heights: Array, mass: float) -> float:
    """The height above which a density on a grid has that share of its mass there."""
    ordered = np.sort(heights, axis=None)[::-1]
    above = ordered.cumsum()
    return float(ordered[np.searchsorted(above, mass * above[-1])])


def contours(x: Array, y: Array, boxes: tuple[Limits, Limits]) -> tuple[Array, Array, Array, list[float]]:
    """A smoothed histogram of draws in the plane, and the levels that enclose 50 % and 90 % of them.

    :return: centres of the cells in both directions, heights with the rows along ``y``, and levels.
    """
    kept = np.isfinite(x) & np.isfinite(y)
    x, y = x[kept], y[kept]
    counts, across, up = np.histogram2d(x, y, GRID, [list(boxes[0]), list(boxes[1])])
    # In two dimensions the rule has S^(-1/6).
    steps = (across[1] - across[0], up[1] - up[0])
    wider = len(x) ** (1 / 5 - 1 / 6)
    sigma = [
        float(np.clip(wider * bandwidth(v) / step, 0.8, 8.0)) for v, step in zip((x, y), steps, strict=True)
    ]
    heights = gaussian_filter(counts, sigma, mode="reflect").T
    levels = sorted({mass_level(heights, mass) for mass in MASSES}) if heights.max() > 0 else []
    return 0.5 * (across[1:] + across[:-1]), 0.5 * (up[1:] + up[:-1]), heights, levels
