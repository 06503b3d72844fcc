"""The picture of a guide's importance weights."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..diagnostics import Diagnosis
from ..psis import psis
from ._panels import COLOURS, REFERENCE_COLOUR, ink, log_ticks, panels

__all__ = ["plot_khat"]

Array = NDArray[Any]
GOOD_KHAT = 0.5
LOW, HIGH = -0.3, 1.3
"""The range of k-hat that is shown; a value beyond stands at its end."""


def plot_khat(diagnosis: Diagnosis, *, ax: Any = None) -> NDArray[Any]:
    """The largest importance weights, the Pareto tail fitted to them, and k-hat against its thresholds.

    Left: the tail of the weights by rank, relative to their mean.  A straight line of slope -k in these axes
    is a Pareto tail of shape k.  Right: k-hat in its zone.  Up to 0.5, *good*, averages over the draws can be
    trusted, weighted or not; up to the threshold min(1 - 1 / log10(S), 0.7) of S draws, *usable*, resampled
    draws can; above, *poor*, the weights are ruled by a few draws and correct nothing.  The verdict above
    weighs more than k-hat, and need not be the zone's: see its reasons.

    Vehtari, Simpson, Gelman, Yao and Gabry, *Pareto smoothed importance sampling*, 2024.

    :param diagnosis: what :func:`pyro_flowvi.diagnose` returned.
    :param ax: two matplotlib Axes, or a Figure or SubFigure to make them in; None for a new figure.
    :return: an array of the two Axes.
    :raises ValueError: if the diagnosis has no weights, or ``ax`` is not as described.
    :raises ImportError: without matplotlib.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> def narrow():
        ...     pyro.sample("x", dist.Normal(0.0, 0.7))
        >>> axes = plot_khat(pyro_flowvi.diagnose(model, narrow, seed=0))
        >>> [text.get_text().partition(":")[0] for text in axes[1].texts[:3]]
        ['good', 'usable', 'poor']
    """
    if diagnosis.log_weights is None or not np.isfinite(diagnosis.log_weights).any():
        raise ValueError("diagnosis: expected log weights, got a diagnosis without")
    with panels(ax, 1, 2, (8.6, 3.6), width_ratios=(1.5, 1)) as axes:
        left, right = axes[0]
        _draw_tail(left, diagnosis.log_weights[np.isfinite(diagnosis.log_weights)])
        _draw_zones(right, diagnosis.khat, diagnosis.khat_threshold)
        right.set_title(f"verdict of all checks: {diagnosis.verdict}", fontsize=10)
    drawn: NDArray[Any] = axes[0]
    return drawn


def _draw_tail(axis: Any, log_weights: Array) -> None:
    smoothed, _ = psis(log_weights)
    count = len(log_weights)
    order = np.argsort(-log_weights)
    tail = order[: int(min(count / 5, 3 * np.sqrt(count)))]
    raw = log_weights - _log_mean(log_weights)
    fitted = smoothed + np.log(count)
    shown = order[: 4 * len(tail)]
    rank = np.arange(1, len(shown) + 1)
    axis.plot(rank, np.exp(raw[shown]), "o", color=REFERENCE_COLOUR, markersize=3, label="weights")
    line = np.sort(fitted[tail])[::-1]
    axis.plot(rank[: len(tail)], np.exp(line), color=COLOURS[0], linewidth=1.5, label="Pareto tail")
    axis.set_xscale("log")
    axis.set_yscale("log")
    log_ticks(axis.yaxis)
    axis.set_xlabel(f"rank of the weight, of {count}")
    axis.set_ylabel("weight / mean weight")
    axis.legend(loc="lower left", fontsize=8)


def _draw_zones(axis: Any, khat: float, threshold: float) -> None:
    for bottom, top, colour, hatch, text in (
        (LOW, GOOD_KHAT, COLOURS[2], "", "good: draws can be\naveraged as they are"),
        (GOOD_KHAT, threshold, COLOURS[4], "..", "usable: resample"),
        (threshold, HIGH, COLOURS[0], "//", "poor: the weights\ncorrect nothing"),
    ):
        # Colour, hatching and words: none of them alone has to be seen.
        axis.axhspan(bottom, top, facecolor=colour, alpha=0.3, linewidth=0)
        axis.axhspan(bottom, top, facecolor="none", edgecolor=colour, alpha=0.35, linewidth=0, hatch=hatch)
        axis.text(0.04, 0.5 * (bottom + top), text, fontsize=8, va="center", color=ink(axis))
    for value in (GOOD_KHAT, threshold):
        axis.axhline(value, color=ink(axis), linewidth=0.8, linestyle="--")
    ticks = [0.0, GOOD_KHAT, threshold, 1.0]
    axis.set_yticks(ticks, [f"{tick:.2f}" for tick in ticks])
    at = float(np.clip(khat, LOW + 0.05, HIGH - 0.05))
    axis.plot([0.9], [at], "o", color=ink(axis))
    text = f"{khat:.2f}" if np.isfinite(khat) else "no tail"
    place: dict[str, Any] = {"xytext": (-7, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
    axis.annotate(text, (0.9, at), fontsize=9, **place)
    axis.set_xlim(0, 1)
    axis.set_ylim(LOW, HIGH)
    axis.set_xticks([])
    axis.set_ylabel("k-hat (Pareto shape of the weights)")


def _log_mean(log_values: Array) -> float:
    top = float(log_values.max())
    return top + float(np.log(np.exp(log_values - top).mean()))
