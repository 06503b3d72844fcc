"""Shapes, without what torch imports to compare them, and names of the scalars in them."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from numbers import Integral
from typing import Any

import torch
from torch import Size

__all__ = ["broadcast_shapes", "sample_shape", "scalar_name"]


def broadcast_shapes(*shapes: tuple[int, ...]) -> Size:
    """As torch's function, which imports sympy, a second in every process.

    :raises RuntimeError: as that function, if the shapes do not fit.

    Example::

        >>> broadcast_shapes((), (3, 1), (2,))
        torch.Size([3, 2])
    """
    sizes = []
    for column in zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1):
        distinct = set(column) - {1}
        if len(distinct) > 1:
            return Size(torch.broadcast_shapes(*shapes))  # for its message
        sizes.append(distinct.pop() if distinct else 1)
    return Size(reversed(sizes))


def sample_shape(num_samples: int | Sequence[int]) -> Size:
    """The shape of a number of draws, which may be given as a shape.

    Example::

        >>> sample_shape(3), sample_shape((2, 3))
        (torch.Size([3]), torch.Size([2, 3]))
    """
    sizes: Any = [int(num_samples)] if isinstance(num_samples, Integral) else num_samples
    return Size(sizes)


def scalar_name(site: str, index: Iterable[int]) -> str:
    """The name of one number of a site.

    Example::

        >>> scalar_name("theta", (0, 2)), scalar_name("mu", ())
        ('theta[0,2]', 'mu')
    """
    place = ",".join(map(str, index))
    return f"{site}[{place}]" if place else site
