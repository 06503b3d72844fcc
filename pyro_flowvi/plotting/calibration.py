"""The picture of simulation-based calibration."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrik

from ..diagnostics import Calibration
from ..diagnostics._uniformity import band, counts_below, points
from ._panels import COLOURS, REFERENCE_COLOUR, panels

__all__ = ["plot_calibration"]

MAX_SCALARS: Final = 4
CHANCE: Final = 0.95
FITS_PER_BAR, MAX_BARS = 10, 20


def plot_calibration(
    calibration: Calibration, *, names: list[str] | None = None, ax: Any = None
) -> NDArray[Any]:
    """How the ranks of a few scalars are distributed, over what uniform ranks would be.

    Above: the empirical distribution function less that of uniform ranks, in grey the band in which 95 % of
    uniform samples stay at all points.  A curve that falls, crosses and comes back up is a guide that is too
    wide, one that rises first a guide that is too narrow, one on one side a bias.  Below: histograms, in grey
    the 95 % interval of each bar by itself.

    :param calibration: what :func:`pyro_flowvi.sbc` returned.
    :param names: the scalars to show, such as ``["tau", "theta[0]"]``; by default the four with the smallest
        p values.
    :param ax: 2 × K matplotlib Axes for K scalars, or a Figure or SubFigure to make them in; None for a new
        figure.
    :return: an array of the Axes, ``(2, K)``.
    :raises ValueError: if a name is unknown, there is no fit, or ``ax`` is not as described.
    :raises ImportError: without matplotlib.

    Example::

        >>> ranks = np.random.default_rng(0).integers(0, 101, (200, 3))
        >>> plot_calibration(Calibration({"x": ranks}, 100, 200)).shape
        (2, 3)
    """
    scalars = calibration.scalars
    if not scalars:
        raise ValueError("calibration: expected ranks of a fit at least, got none")
    shown = list(scalars)[:MAX_SCALARS] if names is None else names
    for name in shown:
        if name not in scalars:
            raise ValueError(f"names: expected scalars that have ranks, {sorted(scalars)}, got {name!r}")
    num_values = calibration.num_samples + 1
    size = (2.6 * len(shown) + 0.8, 4.6)
    with panels(ax, 2, len(shown), size, sharey="row", sharex=True) as axes:
        for (above, below), name in zip(axes.T, shown, strict=True):
            p, ranks = scalars[name]
            num = len(ranks)
            at = points(num, num_values) / num_values
            low, high = (np.array([0.0, *(edge / num - at), 0.0]) for edge in band(num, num_values, CHANCE))
            x = np.array([0.0, *at, 1.0])
            above.fill_between(
                x, low, high, color=REFERENCE_COLOUR, linewidth=0, label=f"{CHANCE:.0%} of uniform"
            )
            above.axhline(0.0, color="0.5", linewidth=0.8)
            difference = np.array([0.0, *(counts_below(ranks, num_values) / num - at), 0.0])
            colour = COLOURS[0] if ((difference < low) | (difference > high)).any() else COLOURS[1]
            above.plot(x, difference, color=colour, linewidth=1.3, label="ranks")
            above.set_title(f"{name}, p {p:.2g}", fontsize=10)
            bars = int(np.clip(num // FITS_PER_BAR, 4, min(MAX_BARS, num_values) if num_values > 4 else 4))
            edges = np.linspace(0.0, 1.0, bars + 1)
            below.hist((ranks + 0.5) / num_values, edges, color=colour, alpha=0.8)
            tail = 0.5 * (1.0 - CHANCE)
            few, many = (np.ceil(bdtrik(q, num, 1.0 / bars)) for q in (tail, 1.0 - tail))
            below.axhspan(few, many, color=REFERENCE_COLOUR, linewidth=0, zorder=0)
            below.axhline(num / bars, color="0.5", linewidth=0.8, zorder=0)
            below.set_xlabel("rank / draws")
            below.set_xlim(0.0, 1.0)
        axes[0][0].set_ylabel("distribution function\nless uniform")
        axes[1][0].set_ylabel("number of fits")
        largest = max(abs(limit) for limit in axes[0][0].get_ylim())
        axes[0][0].set_ylim(-2.0 * largest, 1.1 * largest)  # room for the legend
        axes[0][0].legend(loc="lower left", fontsize=8)
    return axes
