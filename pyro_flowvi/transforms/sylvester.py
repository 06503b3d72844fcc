r"""Sylvester flows, with the inverse that the published ones lack.

The functions take ``x`` of shape ``(*, D)`` and parameters whose leading dimensions broadcast with ``*``,
and return the image and the log-determinant of its Jacobian, shape ``(*,)``; inverses that *of the inverse*,
which is derived here because no paper has it.

The layer is :math:`y = x + Q R \tanh(\tilde R Q^T x + b)`, Q with orthonormal columns, R and
:math:`\tilde R` upper triangular.  Multiplied by :math:`Q^T`, with :math:`v = Q^T x, w = Q^T y`, it is
:math:`w = v + R \tanh(\tilde R v + b)`, whose row i has the unknowns i ... M alone: from the last row up,
with :math:`s_i = (\tilde R v + b)_i` and :math:`\tilde R_{ii}` times the row,

.. math:: s_i + R_{ii} \tilde R_{ii} \tanh s_i = \tilde R_{ii} (w_i - \sum_{j>i} R_{ij} \tanh s_j)
    + \sum_{j>i} \tilde R_{ij} v_j + b_i ,

the scalar equation of the planar flow (:mod:`~pyro_flowvi.transforms.planar`).
"""

import math

import torch
from torch import Tensor, nn

from .._checks import check_positive_int
from .base import ParametricTransform, Raw
from .linear import reflect, times
from .planar import _planar_log_det, _solve_planar

__all__ = ["Sylvester", "orthonormal_frame", "sylvester_forward", "sylvester_inverse"]

DIAGONAL_LIMIT = math.sqrt(1.0 - 1e-3)
"""The product of two diagonal entries stays above -1 + 1e-3, and with it the slope above 0."""
MAX_UNITS = 8


def orthonormal_frame(vectors: Tensor) -> Tensor:
    """M orthonormal rows: the first M unit vectors after M Householder reflections.

    :param vectors: shape ``(*, M, D)``, M at most D.
    :return: shape ``(*, M, D)``.

    Example::

        >>> frame = orthonormal_frame(torch.randn(2, 3))
        >>> torch.allclose(frame @ frame.mT, torch.eye(2), atol=1e-6)
        True
    """
    num, dim = vectors.shape[-2:]
    rows = torch.eye(num, dim, dtype=vectors.dtype, device=vectors.device)
    return reflect(rows, vectors.unsqueeze(-3))


def sylvester_forward(
    x: Tensor, frame: Tensor, outer: Tensor, inner: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """A Sylvester layer (van den Berg et al. 2018, equations 13 and 14).

    :param x: shape ``(*, D)``.
    :param frame: the transposed Q, shape ``(*, M, D)``, from :func:`orthonormal_frame`.
    :param outer: R, upper triangular, shape ``(*, M, M)``.
    :param inner: the other triangular matrix; products of the two diagonals are above -1.
    :param b: shape ``(*, M)``.
    :return: y of shape ``(*, D)`` and the log-determinant, shape ``(*,)``.

    Example::

        >>> frame, none = torch.eye(2, 3), torch.zeros(2, 2)
        >>> sylvester_forward(torch.ones(4, 3), frame, none, none, torch.zeros(2))[1].tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    act = torch.tanh(times(times(x, frame.mT), inner.mT) + b)
    y = x + times(times(act, outer.mT), frame)
    return y, _planar_log_det(act, _diagonal_product(outer, inner)).sum(-1)


def _diagonal_product(outer: Tensor, inner: Tensor) -> Tensor:
    return outer.diagonal(dim1=-2, dim2=-1) * inner.diagonal(dim1=-2, dim2=-1)


def sylvester_inverse(
    y: Tensor, frame: Tensor, outer: Tensor, inner: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`sylvester_forward`, with the log-determinant of the inverse.

    Example::

        >>> frame, r = torch.eye(2, 3), torch.eye(2)
        >>> y, _ = sylvester_forward(torch.ones(4, 3), frame, r, r, torch.zeros(2))
        >>> torch.allclose(sylvester_inverse(y, frame, r, r, torch.zeros(2))[0], torch.ones(4, 3))
        True
    """
    w = times(y, frame.mT)
    c = _diagonal_product(outer, inner)
    acts: list[Tensor] = []
    inputs: list[Tensor] = []
    for i in reversed(range(w.shape[-1])):
        known = w[..., i]
        drive = b[..., i]
        if acts:
            known = known - (outer[..., i, i + 1 :] * torch.stack(acts, -1)).sum(-1)
            drive = drive + (inner[..., i, i + 1 :] * torch.stack(inputs, -1)).sum(-1)
        act = torch.tanh(_solve_planar(inner[..., i, i] * known + drive, c[..., i]))
        acts.insert(0, act)
        inputs.insert(0, known - outer[..., i, i] * act)
    act = torch.stack(acts, -1)
    return y - times(times(act, outer.mT), frame), -_planar_log_det(act, c).sum(-1)


class Sylvester(ParametricTransform):
    r"""A planar layer with M units, :math:`f(x) = x + Q R \tanh(\tilde R Q^T x + b)`.

    van den Berg, Hasenclever, Tomczak and Welling, *Sylvester Normalizing Flows for Variational Inference*,
    2018, equation 13, with Q a product of Householder reflections (their section 3.2).  The inverse, which
    they do not have, is exact: M scalar equations one after another, each of the kind of
    :class:`~pyro_flowvi.transforms.Planar` (derivation at the head of this module).
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
