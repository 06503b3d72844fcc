"""The registry of named flows, shared by guides, models, tests and benchmarks."""

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, Final

from torch import nn

from .._checks import check_positive_int, check_widths
from .base import Compose, Conditional, ConditionalCompose, ParametricTransform
from .planar import Planar
from .radial import Radial

__all__ = ["FLOWS", "Builder"]

Builder = Callable[..., nn.Module]
"""``builder(dim, *, num_layers=None, hidden=None, context_dim=None)`` -> transform module."""

DEFAULT_NUM_LAYERS: Final = 16
DEFAULT_HIDDEN: Final = (32,)


def _conditional(
    layer: ParametricTransform, context_dim: int | None, hidden: Sequence[int] | None
) -> nn.Module:
    if context_dim is None:
        return layer
    widths = DEFAULT_HIDDEN if hidden is None else check_widths("hidden", hidden)
    return Conditional(layer, context_dim, widths)


def _num_layers(num_layers: int | None) -> int:
    return DEFAULT_NUM_LAYERS if num_layers is None else check_positive_int("num_layers", num_layers)


def planar(
    dim: int,
    *,
    num_layers: int | None = None,
    hidden: Sequence[int] | None = None,
    context_dim: int | None = None,
) -> nn.Module:
    """Planar layers; ``hidden`` matters only with a context.

    Example::

        >>> planar(3, num_layers=4)
        Planar(dim=3, num_layers=4)
    """
    return _conditional(Planar(dim, _num_layers(num_layers)), context_dim, hidden)


def radial(
    dim: int,
    *,
    num_layers: int | None = None,
    hidden: Sequence[int] | None = None,
    context_dim: int | None = None,
) -> nn.Module:
    """Radial layers; ``hidden`` matters only with a context.

    Example::

        >>> radial(3, num_layers=4)
        Radial(dim=3, num_layers=4)
    """
    return _conditional(Radial(dim, _num_layers(num_layers)), context_dim, hidden)


def planar_radial(
    dim: int,
    *,
    num_layers: int | None = None,
    hidden: Sequence[int] | None = None,
    context_dim: int | None = None,
) -> nn.Module:
    """Planar and radial layers in turn, ``num_layers`` in all.

    Example::

        >>> len(planar_radial(3, num_layers=5))
        5
    """
    kinds: tuple[type[Planar] | type[Radial], ...] = (Planar, Radial)
    parts: list[Any] = [
        _conditional(kinds[i % 2](dim), context_dim, hidden) for i in range(_num_layers(num_layers))
    ]
    return Compose(parts) if context_dim is None else ConditionalCompose(parts)


FLOWS: Final = MappingProxyType[str, Builder](
    {"planar": planar, "radial": radial, "planar_radial": planar_radial}
)
"""Builders of the named flows: ``FLOWS[name](dim, *, num_layers, hidden, context_dim)``."""
