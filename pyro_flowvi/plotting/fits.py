"""Pictures of fits: losses, pairs of latents, k-hat, images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..diagnostics import Diagnosis
from ..psis import psis

__all__ = ["pair_panels", "plot_images", "plot_khat", "plot_pairs", "plot_trace"]

Array = NDArray[Any]
REFERENCE_COLOUR = "0.75"
COLOURS = ("#c44e52", "#4c72b0", "#55a868", "#8172b2", "#ccb974", "#64b5cd")
MAX_POINTS = 2000
MAX_PAIRS = 5
"""Scalars in a grid of pairs, unless they are named."""


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


def _smoothed(values: Array, width: int) -> Array:
    """Running median, of the length of ``values``."""
    half = width // 2
    padded = np.pad(values, half, mode="reflect" if len(values) > half else "edge")
    middle: Array = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), -1)
    return middle


def plot_trace(result: Any) -> Any:
    """How a fit went: ELBO, learning rate and gradient norm against the step, as far as the result has them.

    :param result: a :class:`pyro_flowvi.FitResult`: ``losses``, nats, of every step, and where there are any
        ``elbos``, as (step, ELBO, standard error), ``rates`` and ``gradient_norms``, of every step.
    :return: a matplotlib figure.
    :raises ValueError: if the result has no loss.
    :raises ImportError: without matplotlib.

    Example::

        >>> result = pyro_flowvi.FitResult(None, torch.linspace(9.0, 1.0, 50), 1.0, {}, "completed", 0.5)
        >>> [axis.get_ylabel() for axis in plot_trace(result).axes]
        ['ELBO (nats)']
    """
    pyplot = _import_pyplot()
    losses = np.asarray(result.losses, dtype=float)
    if losses.size == 0:
        raise ValueError("result: expected the loss of at least one step, got none")
    rows = [
        (label, np.asarray(values, dtype=float))
        for label, name in (("learning rate", "rates"), ("gradient norm", "gradient_norms"))
        if (values := getattr(result, name, None)) is not None and len(values)
    ]
    heights = [2.4] + [1.2] * len(rows)
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(6.4, sum(heights) + 0.6), sharex=True, squeeze=False, height_ratios=heights
    )
    axis = axes[0][0]
    axis.plot(-losses, color=REFERENCE_COLOUR, linewidth=0.5, label="each step")
    middle = -_smoothed(losses, max(3, len(losses) // 40))
    axis.plot(middle, color=COLOURS[1], linewidth=1.5, label="running median")
    elbos = np.asarray(getattr(result, "elbos", None) or [], dtype=float)
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
    for (label, values), (axis,) in zip(rows, axes[1:], strict=True):
        axis.plot(values, color=COLOURS[1], linewidth=0.8)
        axis.set_ylabel(label)
        if values[np.isfinite(values)].min(initial=np.inf) > 0:
            axis.set_yscale("log")
    axes[-1][0].set_xlabel("step")
    figure.tight_layout()
    return figure


def _columns(draws: Any, names: list[str] | None) -> dict[str, Array]:
    """Draws by scalar name, of a mapping of arrays or tensors ``(S, ...)`` or of an array ``(S, D)``."""
    if isinstance(draws, Mapping):
        columns = {}
        for name, value in draws.items():
            array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, dtype=float)
            for index in np.ndindex(array.shape[1:]):
                suffix = f"[{','.join(map(str, index))}]" if index else ""
                columns[name + suffix] = array[(slice(None), *index)]
        return columns
    array = np.asarray(draws.detach().cpu() if hasattr(draws, "detach") else draws, dtype=float)
    if array.ndim != 2:
        raise ValueError(f"draws: expected a mapping or an array of shape (S, D), got shape {array.shape}")
    return {name: array[:, i] for i, name in enumerate(names or [f"x[{i}]" for i in range(array.shape[1])])}


def plot_pairs(
    draws: Any,
    reference: Any = None,
    *,
    names: list[str] | None = None,
    labels: tuple[str, str] = ("guide", "reference"),
) -> Any:
    """A grid of the pairs of a few scalars, guide over reference, with their histograms on the diagonal.

    :param draws: of a guide: site name -> ``(S, ...)``, as ``sample_posterior`` gives, or an array
        ``(S, D)``.
    :param reference: other draws of the same scalars, such as resampled or NUTS ones; grey, behind.
    :param names: the scalars to show, such as ``["tau", "theta[0]"]``; by default the first five.
    :param labels: of the draws and of the reference.
    :return: a matplotlib figure.
    :raises ValueError: if a name is unknown, or the arrays are not of the described shape.
    :raises ImportError: without matplotlib.

    Example::

        >>> figure = plot_pairs(torch.randn(500, 3), 1.2 * torch.randn(500, 3), names=["a", "b", "c"])
        >>> len(figure.axes)
        6
    """
    pyplot = _import_pyplot()
    columns = _columns(draws, names)
    behind = {} if reference is None else _columns(reference, names)
    shown = list(columns)[:MAX_PAIRS] if names is None else names
    for name in shown:
        for which, found in (("draws", columns), ("reference", behind)):
            if name not in found and (which == "draws" or behind):
                raise ValueError(f"names: expected scalars of the {which}, {sorted(found)}, got {name!r}")
    size = len(shown)
    figure, axes = pyplot.subplots(size, size, figsize=(1.9 * size + 0.6, 1.9 * size + 0.4), squeeze=False)
    sets = [(behind, REFERENCE_COLOUR, labels[1])] if behind else []
    sets.append((columns, COLOURS[1], labels[0]))
    limits = {name: _limits([found[name] for found, _, _ in sets]) for name in shown}
    for i, j in np.ndindex(size, size):
        axis, (down, across) = axes[i][j], (shown[i], shown[j])
        if j > i:
            axis.remove()
            continue
        for found, colour, label in sets:
            if i == j:
                style = "stepfilled" if colour == REFERENCE_COLOUR else "step"
                bins = np.linspace(*limits[across], 41)
                axis.hist(found[across], bins, density=True, color=colour, histtype=style, label=label)
            else:
                points = (found[across][:MAX_POINTS], found[down][:MAX_POINTS])
                axis.scatter(*points, s=3, linewidths=0, color=colour, alpha=0.5, rasterized=True)
        axis.set_xlim(*limits[across])
        if i != j:
            axis.set_ylim(*limits[down])
        if i == j:
            axis.set_yticks([])
        elif j:
            axis.set_yticklabels([])
        axis.set_xlabel(across) if i == size - 1 else axis.set_xticklabels([])
        if j == 0 and i:
            axis.set_ylabel(down)
    handles, texts = axes[0][0].get_legend_handles_labels()
    if size > 1:
        figure.legend(handles, texts, loc="upper right", fontsize=9)
    else:
        axes[0][0].legend(fontsize=8)
    figure.align_ylabels()
    figure.tight_layout()
    return figure


def plot_khat(diagnosis: Diagnosis) -> Any:
    """The largest importance weights, the Pareto tail fitted to them, and k-hat against its thresholds.

    Left: the tail of the weights by rank, relative to their mean.  A straight line of slope -k in these axes
    is a Pareto tail of shape k.  Right: k-hat on the scale of the verdict.

    :param diagnosis: what :func:`pyro_flowvi.diagnose` returned.
    :return: a matplotlib figure.
    :raises ValueError: if the diagnosis has no weights.
    :raises ImportError: without matplotlib.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> def narrow():
        ...     pyro.sample("x", dist.Normal(0.0, 0.7))
        >>> len(plot_khat(pyro_flowvi.diagnose(model, narrow, seed=0)).axes)
        2
    """
    pyplot = _import_pyplot()
    if diagnosis.log_weights is None or not np.isfinite(diagnosis.log_weights).any():
        raise ValueError("diagnosis: expected log weights, got a diagnosis without")
    log_weights = diagnosis.log_weights[np.isfinite(diagnosis.log_weights)]
    smoothed, _ = psis(log_weights)
    count = len(log_weights)
    order = np.argsort(-log_weights)
    tail = order[: int(min(count / 5, 3 * np.sqrt(count)))]
    raw = log_weights - _log_mean(log_weights)
    fitted = smoothed + np.log(count)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.0, 3.2), width_ratios=(3, 1.3))
    shown = order[: 4 * len(tail)]
    rank = np.arange(1, len(shown) + 1)
    left.plot(rank, np.exp(raw[shown]), "o", color=REFERENCE_COLOUR, markersize=3, label="weights")
    line = np.sort(fitted[tail])[::-1]
    left.plot(rank[: len(tail)], np.exp(line), color=COLOURS[0], linewidth=1.5, label="Pareto tail")
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel(f"rank of the weight, of {count}")
    left.set_ylabel("weight / mean weight")
    left.legend(loc="lower left", fontsize=8)
    threshold = diagnosis.khat_threshold
    low, high = -0.2, 1.3
    for bottom, top, colour, text in (
        (low, 0.5, COLOURS[2], "resampled and raw"),
        (0.5, threshold, COLOURS[4], "resampled"),
        (threshold, high, COLOURS[0], "neither"),
    ):
        right.axhspan(bottom, top, color=colour, alpha=0.25, linewidth=0)
        right.text(0.03, (bottom + top) / 2, text, fontsize=8, va="center")
    khat = float(np.clip(diagnosis.khat, low + 0.03, high - 0.03))
    right.plot([0.8], [khat], "o", color="black")
    text = f"{diagnosis.khat:.2f}" if np.isfinite(diagnosis.khat) else "no tail"
    right.annotate(
        text, (0.8, khat), (0, 6 if khat < 1.1 else -14), textcoords="offset points", ha="center", fontsize=9
    )
    right.set_xlim(0, 1)
    right.set_ylim(low, high)
    right.set_xticks([])
    right.set_ylabel("k-hat")
    right.set_title(f"verdict: {diagnosis.verdict}", fontsize=10)
    figure.tight_layout()
    return figure


def _log_mean(log_values: Array) -> float:
    top = float(log_values.max())
    return top + float(np.log(np.exp(log_values - top).mean()))


def plot_images(images: Any, columns: int = 10, labels: Sequence[str] = ()) -> Any:
    """Grey images in rows, white at 0 and black at 1.

    :param images: shape ``(N, C, H, W)`` with one channel, or ``(N, H, W)``.
    :param columns: images in a row.
    :param labels: of the rows, the first ones first.
    :return: a matplotlib figure.
    :raises ValueError: if the images are not of the described shape, or there are none.
    :raises ImportError: without matplotlib.

    Example::

        >>> len(plot_images(torch.rand(7, 1, 8, 8), columns=4).axes)
        1
    """
    pyplot = _import_pyplot()
    array = np.asarray(images.detach().cpu() if hasattr(images, "detach") else images, dtype=float)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 3 or not array.size:
        raise ValueError(f"images: expected shape (N, 1, H, W) or (N, H, W), got {array.shape}")
    count, height, width = array.shape
    rows = -(-count // columns)
    # One picture with a frame of one pixel around each image: far faster than a panel for each.
    page = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1), np.nan)
    for i, image in enumerate(array):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        page[top : top + height, left : left + width] = image
    figure, axis = pyplot.subplots(figsize=(0.6 * columns + 0.6, 0.6 * rows * height / width + 0.2))
    colours = pyplot.get_cmap("Greys").with_extremes(bad="#dbe4f0")
    axis.imshow(page, cmap=colours, vmin=0.0, vmax=1.0, interpolation="nearest")
    axis.set_xticks([])
    places = [(i + 0.5) * (height + 1) for i in range(min(rows, len(labels)))]
    axis.set_yticks(places, labels[: len(places)])
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    figure.tight_layout()
    return figure
