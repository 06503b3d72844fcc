"""Sylvester flows, with the inverse that the published ones lack."""

import math

import torch
from torch import Tensor, nn

from .._checks import check_positive_int
from .base import ParametricTransform, Raw
from .functional import orthonormal_frame, sylvester_forward, sylvester_inverse

__all__ = ["Sylvester"]

DIAGONAL_LIMIT = math.sqrt(1.0 - 1e-3)
"""The product of two diagonal entries stays above -1 + 1e-3, and with it the slope above 0."""
MAX_UNITS = 8


class Sylvester(ParametricTransform):
    r"""A planar layer with M units, :math:`f(x) = x + Q R \tanh(\tilde R Q^T x + b)`.

    van den Berg, Hasenclever, Tomczak and Welling, *Sylvester Normalizing Flows for Variational Inference*,
    2018, equation 13, with Q a product of Householder reflections (their section 3.2).  The inverse, which
    they do not have, is exact: M scalar equations one after another, each of the kind of
    :class:`~pyro_flowvi.transforms.Planar` (derivation in :mod:`pyro_flowvi.transforms.functional`).
    Starts as the identity (R = 0).

    :param dim: the length D of the vectors.
    :param num_units: the number M of units, at most D; by default the lesser of D and 8.
    :raises ValueError: if a size is not a positive integer, or ``num_units`` above ``dim``.

    Shapes: input ``(*, D)``; ``frame`` ``(M, D)`` (absent if D = 1), ``outer`` and ``inner`` ``(M, M)``, of
    which the upper triangles are used, ``b`` ``(M,)``; any real values.

    Example::

        >>> flow = Sylvester(5, num_units=3)
        >>> flow.inv(flow(torch.ones(5))).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, dim: int, num_units: int | None = None) -> None:
        super().__init__(dim)
        num_units = min(dim, MAX_UNITS) if num_units is None else check_positive_int("num_units", num_units)
        if num_units > dim:
            raise ValueError(f"num_units: expected at most dim = {dim}, got {num_units}")
        self.num_units = num_units
        if dim > 1:
            self.frame = nn.Parameter(torch.randn(num_units, dim))
        self.outer = nn.Parameter(torch.zeros(num_units, num_units))
        self.inner = nn.Parameter(torch.randn(num_units, num_units) / math.sqrt(num_units))
        self.b = nn.Parameter(torch.randn(num_units))

    def _params(self, raw: Raw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outer, inner = (
            raw[name].triu(1) + torch.diag_embed(DIAGONAL_LIMIT * raw[name].diagonal(dim1=-2, dim2=-1).tanh())
            for name in ("outer", "inner")
        )
        frame = orthonormal_frame(raw["frame"]) if self.dim > 1 else torch.ones_like(self.outer)
        return frame, outer, inner, raw["b"]

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        return sylvester_forward(x, *self._params(raw))

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        return sylvester_inverse(y, *self._params(raw))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_units={self.num_units}"
