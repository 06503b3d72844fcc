"""Shapes, without what torch imports to compare them."""

import torch
from torch import Size

__all__ = ["broadcast_shapes"]


def broadcast_shapes(*shapes: tuple[int, ...]) -> Size:
    """As torch's function, which imports sympy, a second in every process, even where all shapes are equal.

    Example::

        >>> broadcast_shapes((), (3,), (3,))
        torch.Size([3])
    """
    distinct = {tuple(shape) for shape in shapes} - {()}
    if len(distinct) > 1:
        return Size(torch.broadcast_shapes(*distinct))
    return Size(distinct.pop() if distinct else ())
