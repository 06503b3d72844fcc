"""Shapes whose dimensions are known by the factors that they merge."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import fx

__all__ = ["Cannot", "Dims", "Factored", "grouped", "refined"]

Dims = tuple[tuple[int, ...], ...]


class Factored(NamedTuple):
    """A tensor of the old graph as the new one has it.

    :param node: in the new graph, with one dimension for each factor, of size 1 where nothing varies.
    :param dims: of each dimension of the old tensor the factors of its size, none if that is 1.  A dimension
        that merges others, of which some do not vary, has several.
    """

    node: fx.Node
    dims: Dims

    @property
    def sizes(self) -> list[int]:
        """The node's shape, were it expanded."""
        return list(itertools.chain(*self.dims))

    @property
    def shape(self) -> list[int]:
        """The shape in the old graph."""
        return [math.prod(factors) for factors in self.dims]

    def places(self, dim: int) -> range:
        """The node's dimensions that belong to one of the old tensor's."""
        start = sum(map(len, self.dims[: dim % len(self.dims)]))
        return range(start, start + len(self.dims[dim]))


class Cannot(Exception):
    """A rule does not apply; the operation then takes its inputs as they were."""


def refined(one: Sequence[int], two: Sequence[int]) -> tuple[int, ...]:
    """Factors of a number of which those in either list are products.

    :raises Cannot: if there are none.
    """
    if not one or not two:
        return (*one, *two)
    one, two, found = list(one), list(two), []
    while one and two:
        small, large = (one, two) if one[0] <= two[0] else (two, one)
        factor = small.pop(0)
        if large[0] % factor:
            raise Cannot
        found.append(factor)
        large[0] //= factor
        if large[0] == 1:
            large.pop(0)
    if one or two:
        raise Cannot
    return tuple(found)


def grouped(factors: Sequence[int], shape: Sequence[int]) -> Dims:
    """Factors put together to a shape, split where necessary.

    :raises Cannot: if the shape's boundaries are none of theirs.
    """
    rest = list(factors)
    dims: list[tuple[int, ...]] = []
    for size in shape:
        own: list[int] = []
        while size > 1:
            if not rest:
                raise Cannot
            factor = math.gcd(size, rest[0])
            if factor not in (size, rest[0]):
                raise Cannot
            own.append(factor)
            size //= factor
            rest[0] //= factor
            if rest[0] == 1:
                rest.pop(0)
        dims.append(tuple(own))
    return tuple(dims)
