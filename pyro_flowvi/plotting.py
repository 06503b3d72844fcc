"""Pictures.  matplotlib, the extra ``plot``, is imported when one is drawn."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["pair_panels"]

Array = NDArray[Any]

REFERENCE_COLOUR = "0.75"
COLOURS = ("#c44e52", "#4c72b0", "#55a868", "#8172b2", "#ccb974", "#64b5cd")
MAX_POINTS = 2000


def _import_pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: install pyro-flowvi with the extra 'plot'") from error
    return pyplot


def _limits(values: list[Array]) -> tuple[float, float]:
    low = min(float(np.quantile(v, 0.002)) for v in values)
    high = max(float(np.quantile(v, 0.998)) for v in values)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def pair_panels(
    draws: Mapping[str, tuple[Array, Array]],
    labels: tuple[str, str],
    reference: tuple[Array, Array] | None = None,
    reference_label: str = "reference",
) -> Any:
    """One panel for each set of draws: its points, on top of those of the reference.

    :param draws: title -> horizontal and vertical coordinates, each of shape ``(S,)``.
    :param labels: axis labels.
    :param reference: coordinates drawn in grey behind every panel.
    :param reference_label: what the grey points are.
    :return: a matplotlib figure.
    :raises ImportError: without matplotlib.

    Example::

        >>> x = np.random.default_rng(0).standard_normal((2, 500))
        >>> figure = pair_panels({"noise": (x[0], x[1])}, ("x", "y"))
        >>> len(figure.axes)
        1
    """
    pyplot = _import_pyplot()
    sets = [*draws.values(), *([reference] if reference is not None else [])]
    figure, axes = pyplot.subplots(
        1, len(draws), figsize=(3.2 * len(draws), 3.4), sharex=True, sharey=True, squeeze=False
    )
    style = {"s": 4, "linewidths": 0, "rasterized": True}
    for axis, colour, (title, (x, y)) in zip(
        axes[0], (COLOURS * len(draws))[: len(draws)], draws.items(), strict=True
    ):
        if reference is not None:
            points = (reference[0][:MAX_POINTS], reference[1][:MAX_POINTS])
            axis.scatter(*points, color=REFERENCE_COLOUR, label=reference_label, **style)
        axis.scatter(x[:MAX_POINTS], y[:MAX_POINTS], color=colour, alpha=0.6, label=title, **style)
        axis.set_title(title)
        axis.set_xlabel(labels[0])
        axis.legend(loc="lower right", markerscale=3, fontsize=8, framealpha=0.9)
    axes[0][0].set_ylabel(labels[1])
    axes[0][0].set_xlim(*_limits([x for x, _ in sets]))
    axes[0][0].set_ylim(*_limits([y for _, y in sets]))
    figure.tight_layout()
    return figure
