"""Increasing maps of one variable, given parameters: what couplings and autoregressions apply.

A transformer takes x of shape ``(*, N)``, what a conditioner said of it, ``h`` of shape ``(*, P, N)`` or
None, and the layer's own ``offset``, ``(*, P, N)``, and returns y and log dy/dx, each ``(*, N)``.  At
h = offset = 0 it is the identity.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol, TypeGuard, get_args

import torch
from torch import Tensor

from .._checks import check_positive
from .splines import num_bins_of, spline_forward, spline_inverse, spline_size

__all__ = [
    "Additive",
    "Affine",
    "Multiplicative",
    "RationalQuadratic",
    "Transformer",
    "is_known",
    "transformer_of",
]


class Transformer(Protocol):
    """An increasing map of one variable: what a transformer of your own has to offer.

    Example::

        >>> transformer: Transformer = Affine(limit=2.0)
        >>> transformer.num_params
        2
    """

    bends: ClassVar[bool]
    """Whether the log-derivative depends on x itself."""

    @property
    def num_params(self) -> int:
        """The number P of parameters of a variable."""

    def forward(self, x: Tensor, h: Tensor | None, offset: Tensor) -> tuple[Tensor, Tensor]:
        """The image and the log-derivative."""

    def inverse(self, y: Tensor, h: Tensor | None, offset: Tensor) -> tuple[Tensor, Tensor]:
        """The preimage and the log-derivative of the inverse."""


def _sum(h: Tensor | None, offset: Tensor) -> Tensor:
    return offset if h is None else offset + h


def _log_scale(h: Tensor | None, offset: Tensor, limit: float) -> Tensor:
    """b + k tanh(h / k): the offset b is free, what depends on the input is bounded."""
    largest = 0.3 * math.log(torch.finfo(offset.dtype).max)
    free = offset.clamp(-largest, largest)  # finite for any raw value, and so are products of two
    if h is None:
        return free
    # tanh(z) = 2 sigmoid(2 z) - 1: of the same absolute accuracy, and on a CPU several times as fast.
    return torch.add(free, torch.sigmoid(h * (2.0 / limit)) - 0.5, alpha=2.0 * limit)


@dataclass(frozen=True)
class Additive:
    """y = x + t.

    Example::

        >>> Additive().forward(torch.ones(3), None, torch.full((1, 3), 2.0))[0].tolist()
        [3.0, 3.0, 3.0]
    """

    limit: float = 0.0
    kind: ClassVar[str] = "additive"
    bends: ClassVar[bool] = False
    num_params: ClassVar[int] = 1

    def forward(self, x: Tensor, h: Tensor | None, offset: Tensor) -> tuple[Tensor, Tensor]:
        y = x + _sum(h, offset).squeeze(-2)
        return y, torch.zeros_like(y)

    def inverse(self, y: Tensor, h: Tensor | None, offset: Tensor) -> tuple[Tensor, Tensor]:
        x = y - _sum(h, offset).squeeze(-2)
        return x, torch.zeros_like(x)


@dataclass(frozen=True)
class Multiplicative:
    """y = exp(s) x, with s = b + k tanh(h / k).

    Example::

        >>> Multiplicative(limit=2.0).forward(torch.ones(3), None, torch.zeros(1, 3))[0].tolist()
        [1.0, 1.0, 1.0]
    """

    limit: float
    kind: ClassVar[str] = "multiplicative"
    bends: ClassVar[bool] = False
    num_params: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_positive("limit", self.limit)

    def forward(self, x: Tensor, h: Tensor | None, offset: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = _log_scale(h, offset, self.limit).squeeze(-2)
        y = x * log_scale.exp()
        return y, log_scale.expand(y.shape)

    def inverse(self, y: Tensor, h: Tensor | None, offset: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = _log_scale(h, offset, self.limit).squeeze(-2)
        x = y * (-log_scale).exp()
        return x, -log_scale.expand(x.shape)


@dataclass(frozen=True)
class Affine:
    """y = exp(s) x + t, with s = b + k tanh(h / k); first s, then t in the parameters.

    Example::

        >>> Affine(limit=2.0).forward(torch.ones(3), None, torch.zeros(2, 3))[0].tolist()
        [1.0, 1.0, 1.0]
    """

    limit: float
    kind: ClassVar[str] = "affine"
    bends: ClassVar[bool] = False
    num_params: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_positive("limit", self.limit)

    def _parts(self, h: Tensor | None, offset: Tensor) -> tuple[Tensor, Tensor]:
        b, shift = offset.unbind(-2)
        if h is None:
            return _log_scale(None, b, self.limit), shift
        raw, move = h.unbind(-2)
        return _log_scale(raw, b, self.limit), shift + move

    def forward(self, x: Tensor, h: Tensor | None, offset: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._parts(h, offset)
        y = x * log_scale.exp() + shift
        return y, log_scale if log_scale.shape == y.shape else log_scale.expand(y.shape)

    def inverse(self, y: Tensor, h: Tensor | None, offset: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._parts(h, offset)
        x = (y - shift) * (-log_scale).exp()
        return x, -log_scale.expand(x.shape)


@dataclass(frozen=True)
class RationalQuadratic:
    """A rational-quadratic spline on [-limit, limit], the identity outside.

    Example::

        >>> RationalQuadratic(limit=5.0, num_bins=8).num_params
        23
    """

    limit: float
    num_bins: int
    kind: ClassVar[str] = "spline"
    bends: ClassVar[bool] = True

    @property
    def num_params(self) -> int:
        return spline_size(self.num_bins)

    def forward(self, x: Tensor, h: Tensor | None, offset: Tensor) -> tuple[Tensor, Tensor]:
        return spline_forward(x, _sum(h, offset), self.limit)

    def inverse(self, y: Tensor, h: Tensor | None, offset: Tensor) -> tuple[Tensor, Tensor]:
        return spline_inverse(y, _sum(h, offset), self.limit)


Known = Additive | Multiplicative | Affine | RationalQuadratic
KINDS: Final = tuple(known.kind for known in get_args(Known))
"""What :func:`transformer_of` finds."""


def is_known(transformer: Transformer) -> TypeGuard[Known]:
    """Whether :func:`transformer_of` finds it by its ``kind``, ``limit`` and number of parameters.

    Example::

        >>> is_known(Affine(limit=2.0))
        True
    """
    return type(transformer) in get_args(Known)


def transformer_of(kind: str, limit: float, num_params: int) -> Known:
    """The transformer of a kind, from what an operator can be given: text and numbers.

    Example::

        >>> transformer_of("affine", 2.0, 2)
        Affine(limit=2.0)
    """
    if kind == RationalQuadratic.kind:
        return RationalQuadratic(limit, num_bins_of(num_params))
    plain: dict[str, Callable[[float], Known]]
    plain = {"additive": Additive, "multiplicative": Multiplicative, "affine": Affine}
    if kind not in plain:
        raise ValueError(
            f"transformer: expected a kind among {[*plain, RationalQuadratic.kind]}, got {kind!r}"
        )
    return plain[kind](limit)
