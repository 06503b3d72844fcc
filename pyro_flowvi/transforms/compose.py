"""Transforms one after another."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Size, Tensor, nn
from torch.distributions import Transform

from .._shapes import broadcast_shapes
from .base import (
    FlowTransform,
    ParametricTransform,
    Raw,
    forward_and_log_det,
    forward_with_score,
    inverse_and_log_det,
)
from .conditional import Conditional

__all__ = ["Compose", "ConditionalCompose", "Inverse"]


def own_dim(transform: Any) -> int | None:
    """The length of a transform's vectors; None for a foreign one, whose ``dim`` may be an axis."""
    return transform.dim if isinstance(transform, FlowTransform | Conditional | ConditionalCompose) else None


def common_dim(found: Iterable[int | None]) -> int:
    """The one dimension that some of the parts tell; ValueError without one."""
    dims = {dim for dim in found if dim is not None}
    if not dims:
        raise ValueError("dim: expected the dimension, which none of the parts tells, got None")
    if len(dims) > 1:
        raise ValueError(f"parts: expected transforms of one dimension, got {sorted(dims)}")
    return dims.pop()


class Chain(FlowTransform):
    """Parts in a row, by position: what compositions have in common.

    :param parts: transforms or modules; those that are modules are registered by their place.
    :param dim: the length of the vectors.
    """

    def __init__(self, parts: Sequence[Any], dim: int) -> None:
        super().__init__(dim)
        self._sequence = tuple(parts)
        self.parts = nn.ModuleDict({str(i): p for i, p in enumerate(parts) if isinstance(p, nn.Module)})
        self.exact_inverse = all(getattr(part, "exact_inverse", True) for part in parts)

    def __len__(self) -> int:
        return len(self._sequence)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected below {len(self)}, got {index}")
        return self._sequence[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._sequence)

    @property
    def batch_shape(self) -> Size:
        return Size(broadcast_shapes(*(getattr(part, "batch_shape", ()) for part in self)))


class Compose(Chain):
    """Transforms applied one after another, the first of ``parts`` first.

    :param parts: transforms of vectors of one dimension; those of torch and Pyro may be among them.
    :param dim: the dimension, needed only where no part tells it.
    :raises ValueError: if ``parts`` is empty, a part is no ``Transform``, or dimensions differ.

    Example::

        >>> from pyro_flowvi.transforms import Permute, Planar
        >>> flow = Compose([Planar(2), Permute([1, 0]), Planar(2)])
        >>> y, log_det = flow.forward_and_log_det(torch.zeros(2))
        >>> y.shape, log_det.shape
        (torch.Size([2]), torch.Size([]))
    """

    def __init__(self, parts: Iterable[Transform], dim: int | None = None) -> None:
        parts = list(parts)
        if not parts:
            raise ValueError("parts: expected at least one transform, got none")
        for part in parts:
            if not isinstance(part, Transform):
                raise ValueError(f"parts: expected a Transform, got {part!r}")
        super().__init__(parts, common_dim(map(own_dim, parts)) if dim is None else dim)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_dets = []
        for part in self._sequence:
            x, log_det = forward_and_log_det(part, x)
            log_dets.append(log_det)
        return x, functools.reduce(torch.add, log_dets)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_dets = []
        for part in self._sequence:
            x, log_det, score = forward_with_score(part, x, score)
            log_dets.append(log_det)
        return x, functools.reduce(torch.add, log_dets), score

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        log_dets = []
        for part in reversed(self._sequence):
            y, log_det = inverse_and_log_det(part, y)
            log_dets.append(log_det)
        return y, functools.reduce(torch.add, log_dets)


class ConditionalCompose(ConditionalTransformModule):
    """Transforms one after another, of which some depend on a context.

    :param parts: transforms, and conditional transforms (with a ``condition`` method).
    :raises ValueError: if ``parts`` is empty or dimensions differ.

    Example::

        >>> from pyro_flowvi.transforms import ConditionalPlanar, Permute
        >>> flow = ConditionalCompose([ConditionalPlanar(2, 3), Permute([1, 0])])
        >>> flow.condition(torch.zeros(3))(torch.zeros(2)).shape
        torch.Size([2])
    """

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        if not self.parts:
            raise ValueError("parts: expected at least one transform, got none")
        self.dim = common_dim(map(own_dim, self.parts))

    def condition(self, context: Tensor) -> Compose:
        """The transform given ``context``, shape ``(*B, context_dim)``."""
        parts: list[Any] = list(self.parts)
        return Compose(part.condition(context) if hasattr(part, "condition") else part for part in parts)


class Inverse(ParametricTransform):
    """The inverse of a transform, as a module that owns its parameters.

    torch's ``transform.inv`` is no module: what is built from it trains nothing.

    :param transform: a transform of this package with an exact inverse.
    :raises ValueError: if it is not.

    Example::

        >>> from pyro_flowvi.transforms import ElementwiseAffine
        >>> Inverse(ElementwiseAffine(1, scale=2.0))(torch.ones(1)).item()
        0.5
    """

    def __init__(self, transform: FlowTransform) -> None:
        if not isinstance(transform, FlowTransform) or not transform.exact_inverse:
            raise ValueError(f"transform: expected a FlowTransform with an exact inverse, got {transform!r}")
        super().__init__(transform.dim)
        self.transform = transform

    @property
    def batch_shape(self) -> Size:
        return self.transform.batch_shape

    def raw_parameters(self) -> dict[str, Tensor]:
        """Those of the transform, if a context can move them."""
        if isinstance(self.transform, ParametricTransform):
            return self.transform.raw_parameters()
        return {}

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.transform, ParametricTransform):
            return self.transform.inverse_given(raw, x)
        return self.transform.inverse_and_log_det(x)

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.transform, ParametricTransform):
            return self.transform.forward_given(raw, y)
        return self.transform.forward_and_log_det(y)
