"""Rows of images."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._checks import check_positive_int
from ._draws import as_array
from ._panels import import_pyplot, panels

__all__ = ["plot_images"]


def plot_images(images: Any, columns: int = 10, labels: Sequence[str] = (), *, ax: Any = None) -> Any:
    """Grey images in rows, white at 0 and black at 1.

    :param images: shape ``(N, C, H, W)`` with one channel, or ``(N, H, W)``.
    :param columns: images in a row.
    :param labels: of the rows, the first ones first.
    :param ax: the matplotlib Axes to draw on, or a Figure or SubFigure to make one in; None for a new figure.
    :return: the Axes.
    :raises ValueError: if the images are not of the described shape, or there are none.
    :raises ImportError: without matplotlib.

    Example::

        >>> axis = plot_images(torch.rand(7, 1, 8, 8), columns=4)
        >>> axis.images[0].get_array().shape
        (19, 37)
    """
    array = as_array(images)
    columns = check_positive_int("columns", columns)
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
    colours = import_pyplot().get_cmap("Greys").with_extremes(bad="#dbe4f0")
    with panels(ax, 1, 1, (0.6 * columns + 0.6, 0.6 * rows * height / width + 0.2)) as ((axis,),):
        axis.imshow(page, cmap=colours, vmin=0.0, vmax=1.0, interpolation="nearest")
        axis.set_xticks([])
        places = [(i + 0.5) * (height + 1) for i in range(min(rows, len(labels)))]
        axis.set_yticks(places, labels[: len(places)])
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    return axis
