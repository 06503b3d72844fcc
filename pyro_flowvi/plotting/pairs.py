"""Pairs of scalars: a grid of a few of them, or one pair for several sets of draws."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._densities import Scale, contours, limits
from ._draws import Draws, as_array
from ._panels import COLOURS, REFERENCE_COLOUR, ink, panels, show_scale

__all__ = ["pair_panels", "plot_pairs"]

Array = NDArray[Any]
MAX_POINTS = 2000
MAX_PAIRS = 5
"""Scalars in a grid of pairs, unless they are named."""
FEWEST_FOR_CONTOURS = 200
NUM_BARS = 40


def pair_panels(
    draws: Mapping[str, tuple[Array, Array]],
    labels: tuple[str, str],
    reference: tuple[Array, Array] | None = None,
    reference_label: str = "reference",
    *,
    ax: Any = None,
) -> NDArray[Any]:
    """One panel for each set of draws: its points, on top of those of the reference.

    :param draws: title -> horizontal and vertical coordinates, each of shape ``(S,)``.
    :param labels: axis labels.
    :param reference: coordinates drawn in grey behind every panel.
    :param reference_label: what the grey points are.
    :param ax: as many matplotlib Axes as there are sets, or a Figure or SubFigure to make them in; None for a
        new figure.
    :return: an array of the Axes, in the order of the sets.
    :raises ValueError: if there is no set, or ``ax`` is not as described.
    :raises ImportError: without matplotlib.

    Example::

        >>> x = np.random.default_rng(0).standard_normal((2, 500))
        >>> axes = pair_panels({"noise": (x[0], x[1])}, ("x", "y"))
        >>> axes.shape, axes[0].get_xlabel()
        ((1,), 'x')
    """
    if not draws:
        raise ValueError("draws: expected at least one set, got none")
    pairs = {title: (as_array(x), as_array(y)) for title, (x, y) in draws.items()}
    sets = [*pairs.values(), *([reference] if reference is not None else [])]
    style = {"s": 4, "linewidths": 0, "rasterized": True}
    size = (3.2 * len(pairs), 3.4)
    with panels(ax, 1, len(pairs), size, sharex=True, sharey=True) as axes:
        for i, (axis, (title, (x, y))) in enumerate(zip(axes[0], pairs.items(), strict=True)):
            if reference is not None:
                points = (reference[0][:MAX_POINTS], reference[1][:MAX_POINTS])
                axis.scatter(*points, color=REFERENCE_COLOUR, label=reference_label, **style)
            colour = COLOURS[i % len(COLOURS)]
            axis.scatter(x[:MAX_POINTS], y[:MAX_POINTS], color=colour, alpha=0.6, label=title, **style)
            axis.set_title(title)
            axis.set_xlabel(labels[0])
            if reference is not None:  # without one the title says it all
                axis.legend(loc="lower right", markerscale=3, fontsize=8, framealpha=0.9)
            axis.set_xlim(*limits([as_array(x) for x, _ in sets]))
            axis.set_ylim(*limits([as_array(y) for _, y in sets]))
        axes[0][0].set_ylabel(labels[1])
    drawn: NDArray[Any] = axes[0]
    return drawn


def plot_pairs(
    draws: Any,
    reference: Any = None,
    *,
    names: Sequence[str] | None = None,
    labels: tuple[str, str] = ("guide", "reference"),
    num_samples: int = 2000,
    ax: Any = None,
) -> NDArray[Any]:
    """A grid of the pairs of a few scalars, the reference over the guide, with histograms on the diagonal.

    The guide's draws are points and filled histograms; the reference is contours, which enclose half and 90 %
    of its draws within the picture, and outlines (of fewer than 200 draws, hollow points).  Positive scalars
    with a heavy tail have a log axis.  By default the first five scalars are shown, and the picture says of
    how many: "5 of 12 scalars".

    :param draws: a fitted guide, of this package or of Pyro, which is drawn from; site name -> ``(S, ...)``,
        as ``sample_posterior`` gives; an array ``(S, D)``; Pyro's MCMC after its run; or ArviZ's data, of
        which the posterior is taken.
    :param reference: other draws of the same scalars, such as resampled or NUTS ones, of the same kinds.
    :param names: the scalars or sites to show, such as ``["tau", "theta[0]"]``, or ``["theta"]`` for all
        scalars of the site; of an array the names of its columns.
    :param labels: of the draws and of the reference.
    :param num_samples: draws of a guide.
    :param ax: K × K matplotlib Axes for K scalars, or a Figure or SubFigure to make them in; None for a new
        figure.
    :return: an array of the Axes, ``(K, K)``; those above the diagonal are empty, but for the legend.
    :raises ValueError: if a name is unknown, the draws are of no such kind, or ``ax`` is not as described.
    :raises ImportError: without matplotlib.

    Example::

        >>> axes = plot_pairs(torch.randn(500, 3), 1.2 * torch.randn(500, 3), names=["a", "b", "c"])
        >>> axes.shape, axes[2, 0].get_xlabel(), axes[2, 0].get_ylabel()
        ((3, 3), 'a', 'c')
    """
    found = Draws(draws, "draws", names, num_samples)
    other = None if reference is None else Draws(reference, "reference", names, num_samples)
    shown = found.first(MAX_PAIRS) if names is None else found.named(names)
    columns = found.take(shown)
    over: Any = None if other is None else other.take(shown)
    scales = {name: Scale([columns[name], *([over[name]] if over is not None else [])]) for name in shown}
    size = len(shown)
    with panels(ax, size, size, (1.9 * size + 0.8, 1.9 * size + 0.4)) as axes:
        for i, j in np.ndindex(size, size):
            axis: Any = axes[i][j]
            down, across = shown[i], shown[j]
            if j > i:
                axis.set_axis_off()
                continue
            if i == j:
                _draw_histograms(axis, columns[across], over and over[across], scales[across], labels)
            else:
                pair = (scales[across], scales[down])
                _draw_points(axis, columns[across], columns[down])
                if over is not None:
                    _draw_reference(axis, (over[across], over[down]), *pair)
            show_scale(axis.xaxis, scales[across])
            if i != j:
                show_scale(axis.yaxis, scales[down])
            if i < size - 1:
                axis.tick_params(labelbottom=False, which="both")
            else:
                axis.set_xlabel(across)
            if i != j and j:
                axis.tick_params(labelleft=False, which="both")
            elif i != j:
                axis.set_ylabel(down)
        axes[0][0].set_ylabel("share of draws", fontsize=8)
        _explain(axes, found.note(shown) if names is None else "")
    return axes


def _draw_histograms(
    axis: Any, values: Array, over: Array | None, scale: Scale, labels: tuple[str, str]
) -> None:
    edges = scale.inverse(np.linspace(*scale.shown, NUM_BARS + 1))
    sets: list[tuple[Array, str, dict[str, Any]]] = [
        (values, labels[0], {"color": COLOURS[1], "alpha": 0.5, "histtype": "stepfilled"})
    ]
    if over is not None:
        sets.append((over, labels[1], {"color": COLOURS[0], "linewidth": 1.4, "histtype": "step"}))
    for each, label, style in sets:
        each = each[np.isfinite(each)]
        # Shares, not densities: of equal bars of the log, too.
        axis.hist(each, edges, weights=np.full(len(each), 1.0 / len(each)), label=label, **style)
    axis.set_yticks([])


def _draw_points(axis: Any, x: Array, y: Array) -> None:
    axis.scatter(
        x[:MAX_POINTS], y[:MAX_POINTS], s=4, linewidths=0, color=COLOURS[1], alpha=0.4, rasterized=True
    )


def _draw_reference(axis: Any, values: tuple[Array, Array], across: Scale, down: Scale) -> None:
    x, y = values
    if len(x) >= FEWEST_FOR_CONTOURS:
        at_x, at_y, heights, levels = contours(across(x), down(y), (across.shown, down.shown))
        if levels and levels[0] < heights.max():
            place = (across.inverse(at_x), down.inverse(at_y))
            axis.contour(*place, heights, levels, colors=[COLOURS[0]], linewidths=1.2)
            return
    axis.scatter(x, y, s=9, linewidths=0.8, facecolors="none", edgecolors=COLOURS[0])


def _explain(axes: Array, note: str) -> None:
    """The legend and what is left out, in the corner above the diagonal, or on the only panel."""
    handles, texts = axes[0][0].get_legend_handles_labels()
    corner = axes[0][-1]
    if len(axes) == 1:
        corner.legend(handles, texts, fontsize=8)
        corner.set_title(note, fontsize=8, loc="right")
        return
    legend = corner.legend(handles, texts, loc="upper right", fontsize=9)
    below: dict[str, Any] = {"xycoords": legend, "xytext": (0, -3), "textcoords": "offset points"}
    corner.annotate(note, (1.0, 0.0), **below, ha="right", va="top", fontsize=9, color=ink(corner))
