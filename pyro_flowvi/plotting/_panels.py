"""Where pictures are drawn: the caller's axes, panels in the caller's figure, or a figure of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "COLOURS",
    "REFERENCE_COLOUR",
    "import_pyplot",
    "ink",
    "log_ticks",
    "own_figure",
    "panels",
    "show_scale",
]

Array = NDArray[Any]
REFERENCE_COLOUR = "0.75"
COLOURS = ("#c44e52", "#4c72b0", "#55a868", "#8172b2", "#ccb974", "#64b5cd")
"""The colours of guides in pictures, in order; reference draws are grey."""
PAPER, INK = "white", "#262626"
LIGHT: Final[dict[str, Any]] = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), PAPER),
    **dict.fromkeys(("figure.edgecolor",), PAPER),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "xtick.labelcolor", "ytick.color", "ytick.labelcolor"), INK),
    **{"legend.labelcolor": INK, "legend.edgecolor": "0.8", "axes.grid": False},
}
"""Of figures of their own: legible on dark pages too, whatever the style that the caller has set."""


def import_pyplot() -> Any:
    """matplotlib's pyplot, or ImportError that names the extra."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: install pyro-flowvi with the extra 'plot'") from error
    return pyplot


def ink(axis: Any) -> Any:
    """The colour of an axis's text: dark on a light page, light on a dark one."""
    return axis.xaxis.label.get_color()


def show_scale(axis: Any, scale: Any, box: tuple[float, float] | None = None) -> None:
    """A direction of a panel as a scalar is shown, even or by its log.

    :param axis: of the direction, such as ``ax.xaxis``.
    :param scale: a :class:`~pyro_flowvi.plotting._densities.Scale`.
    :param box: the range, in the coordinate that is drawn evenly; that of the scale if None.
    """
    ends = scale.limits if box is None else scale.inverse(np.array(box))
    axis.axes.set(**{f"{axis.axis_name}lim": ends})
    if scale.log:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        log_ticks(axis)


def log_ticks(axis: Any) -> None:
    """A log scale, with its limits set, whose labels neither lie on one another nor are missing.

    :param axis: of one direction, such as ``ax.xaxis``.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, StrMethodFormatter

    low, high = axis.get_view_interval()
    decades = float(np.log10(high / low))
    axis.set_minor_formatter(NullFormatter())
    if decades < 2.0:
        axis.set_major_locator(MaxNLocator(4) if decades < 0.7 else LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if decades < 0.7:
        axis.set_minor_locator(NullLocator())


@contextmanager
def own_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> Iterator[Array]:
    """A new figure's panels, ``(rows, columns)``, on an opaque white ground; laid out in the end."""
    pyplot = import_pyplot()
    from matplotlib.patches import Rectangle

    with pyplot.rc_context(LIGHT):
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, **options)
        # savefig.facecolor and savefig.transparent are read when a picture is saved: what they take away from
        # the figure's own ground lies here once more, and past its edges, where bbox_inches="tight" pads.
        look: dict[str, Any] = {"transform": figure.transFigure, "facecolor": PAPER, "linewidth": 0}
        ground = figure.add_artist(Rectangle((-1.0, -1.0), 3.0, 3.0, zorder=-10, **look))
        ground.set_in_layout(False)
        for axis in axes.flat:  # ticks are made when they are drawn, by the settings of that moment
            axis.tick_params(which="both", color=INK, labelcolor=INK)
        try:
            yield axes
        except BaseException:
            pyplot.close(figure)
            raise
        figure.align_ylabels()
        figure.tight_layout()


@contextmanager
def panels(ax: Any, rows: int, columns: int, size: tuple[float, float], **options: Any) -> Iterator[Array]:
    """Panels to draw on, shape ``(rows, columns)``.

    :param ax: None for a new figure, an Axes where one panel is wanted, as many Axes as there are panels, row
        by row, or a Figure or SubFigure in which they are made.
    :param size: of a new figure, inches.
    :param options: of ``subplots``.
    :raises ValueError: if ``ax`` is none of these.
    """
    import_pyplot()
    if ax is None:
        with own_figure(rows, columns, size, **options) as axes:
            yield axes
    elif hasattr(ax, "subplots"):
        yield ax.subplots(rows, columns, squeeze=False, **options)
    else:
        yield _on_panels(ax, rows, columns)


def _on_panels(ax: Any, rows: int, columns: int) -> Array:
    """The caller's Axes as an array ``(rows, columns)``."""
    from matplotlib.axes import Axes

    given = np.array([ax] if isinstance(ax, Axes) else ax, dtype=object).ravel()
    if len(given) != rows * columns or not all(isinstance(axis, Axes) for axis in given):
        wanted = "an Axes" if rows * columns == 1 else f"an array of {rows} × {columns} Axes"
        got = f"{len(given)} Axes" if all(isinstance(axis, Axes) for axis in given) else f"{ax!r}"
        raise ValueError(f"ax: expected {wanted}, or a Figure or SubFigure to make them in, got {got}")
    return given.reshape(rows, columns)
