"""How a fit went."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._panels import COLOURS, REFERENCE_COLOUR, log_ticks, panels

__all__ = ["plot_trace"]

Array = NDArray[Any]


def _smoothed(values: Array, width: int) -> Array:
    """Running median, of the length of ``values``."""
    half = width // 2
    padded = np.pad(values, half, mode="reflect" if len(values) > half else "edge")
    middle: Array = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), -1)
    return middle


def plot_trace(result: Any, *, ax: Any = None) -> NDArray[Any]:
    """How a fit went: ELBO, learning rate and gradient norm against the step, as far as the result has them.

    :param result: a :class:`pyro_flowvi.FitResult`: ``losses``, nats, of every step, and where there are any
        ``elbos``, as (step, ELBO, standard error), ``rates`` and ``gradient_norms``, of every step.
    :param ax: matplotlib Axes: one, for the ELBO alone; as many as there are curves; or a Figure or SubFigure
        to make them in.  None for a new figure.
    :return: an array of the Axes, from the ELBO down.
    :raises ValueError: if the result has no loss, or ``ax`` is not as described.
    :raises ImportError: without matplotlib.

    Example::

        >>> result = pyro_flowvi.FitResult(None, torch.linspace(9.0, 1.0, 50), 1.0, {}, "completed", 0.5)
        >>> [axis.get_ylabel() for axis in plot_trace(result)]
        ['ELBO (nats)']
    """
    losses = np.asarray(result.losses, dtype=float)
    if losses.size == 0:
        raise ValueError("result: expected the loss of at least one step, got none")
    rows = [
        (label, np.asarray(values, dtype=float))
        for label, name in (("learning rate", "rates"), ("gradient norm", "gradient_norms"))
        if (values := getattr(result, name, None)) is not None and len(values)
    ]
    if ax is not None and hasattr(ax, "get_xlabel"):  # one Axes
        rows = []
    heights = [2.4] + [1.2] * len(rows)
    size = (6.4, sum(heights) + 0.6)
    with panels(ax, len(heights), 1, size, sharex=True, height_ratios=heights) as axes:
        _draw_elbo(axes[0][0], losses, np.asarray(getattr(result, "elbos", None) or [], dtype=float))
        for (label, values), (axis,) in zip(rows, axes[1:], strict=True):
            axis.plot(values, color=COLOURS[1], linewidth=0.8)
            axis.set_ylabel(label)
            if values[np.isfinite(values)].min(initial=np.inf) > 0:
                axis.set_yscale("log")
                log_ticks(axis.yaxis)
        axes[-1][0].set_xlabel("step")
    return axes[:, 0]


def _draw_elbo(axis: Any, losses: Array, elbos: Array) -> None:
    axis.plot(-losses, color=REFERENCE_COLOUR, linewidth=0.5, label="each step")
    middle = -_smoothed(losses, max(3, len(losses) // 40))
    axis.plot(middle, color=COLOURS[1], linewidth=1.5, label="running median")
    if elbos.size:
        error: dict[str, Any] = {"capsize": 2, "linewidth": 1.0, "markersize": 3}
        axis.errorbar(
            *elbos[:, :2].T, yerr=2 * elbos[:, 2], fmt="o", color=COLOURS[0], label="ELBO ± 2 s.e.", **error
        )
    # The first steps are often worse by orders of magnitude and would flatten the rest.
    settled = middle[len(middle) // 4 :]
    low, high = float(settled.min()), float(middle.max())
    noise = float(np.quantile(np.abs(-losses - middle)[len(middle) // 4 :], 0.98))
    margin = max(0.08 * (high - low), noise, 1e-3)
    axis.set_ylim(max(low - 2.0 * margin, -losses.max() - margin), high + margin)
    axis.set_ylabel("ELBO (nats)")
    axis.legend(loc="lower right", fontsize=8)
