r"""Monotone rational-quadratic splines: pure mathematics, accurate in float32.

Durkan, Bekasov, Murray and Papamakarios, *Neural Spline Flows*, 2019, section 3.1.  In the bin with width w,
height h, slope s = h/w and end derivatives d0, d1, with :math:`\xi = (x - x_k) / w`,

.. math:: y = y_k + h \, \frac{s \xi^2 + d_0 \xi (1-\xi)}{s (\xi^2 + (1-\xi)^2) + (d_0 + d_1) \xi (1-\xi)} .

The denominator is written, other than in the paper, as a sum of positive terms.  So is the inverse, which is
derived here because the published form cancels (its discriminant becomes negative in float32): with
:math:`\eta = (y - y_k) / h, \; D = d_0 (1-\eta) - d_1 \eta` the discriminant of the quadratic equation is
:math:`\Delta = D^2 + 4 s^2 \eta (1-\eta) > 0`, and with :math:`r = \sqrt\Delta + |D|`

.. math:: \xi = \frac{2 s \eta}{2 s \eta + r} \;\; (D \ge 0), \quad
    \xi = \frac{r}{r + 2 s (1-\eta)} \; (D < 0).

Outside the box the spline is the identity; its end derivatives are exactly 1, so that it is once
continuously differentiable everywhere.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._shapes import broadcast_shapes

__all__ = ["num_bins_of", "spline_forward", "spline_inverse", "spline_size"]

MIN_BIN = 1e-3
"""The least width and height of a bin, relative to the box."""
MIN_DERIVATIVE = 1e-3


def spline_size(num_bins: int) -> int:
    """How many raw parameters a coordinate has: K widths, K heights, K - 1 inner derivatives.

    Example::

        >>> spline_size(8)
        23
    """
    return 3 * num_bins - 1


def num_bins_of(size: int) -> int:
    """The inverse of :func:`spline_size`.

    Example::

        >>> num_bins_of(23)
        8
    """
    return (size + 1) // 3


def _knots(raw: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Inner knots of both axes, shape ``(*, 2, K - 1, N)``, and derivatives, ``(*, K - 1, N)``."""
    num_bins = num_bins_of(raw.shape[-2])
    sizes = raw[..., : 2 * num_bins, :].unflatten(-2, (2, num_bins)).softmax(-2)
    steps = torch.arange(1, num_bins, dtype=raw.dtype, device=raw.device).unsqueeze(-1)
    share = sizes[..., :-1, :].cumsum(-2)
    knots = (2.0 * bound * (1.0 - MIN_BIN * num_bins)) * share + (2.0 * bound * MIN_BIN * steps - bound)
    shift = math.log(math.expm1(1.0 - MIN_DERIVATIVE))  # softplus of it is the derivative 1
    derivatives = F.softplus(raw[..., 2 * num_bins :, :] + shift) + MIN_DERIVATIVE
    return knots, derivatives


def _bin(value: Tensor, own: Tensor, knots: Tensor, derivatives: Tensor, bound: float) -> tuple[Tensor, ...]:
    """Left ends, sizes and end derivatives of the bin of ``value`` among the knots ``own``."""
    index = (value.unsqueeze(-2) >= own).sum(-2, keepdim=True)
    both = F.pad(F.pad(knots, (0, 0, 0, 1), value=bound), (0, 0, 1, 0), value=-bound)
    slopes = F.pad(derivatives, (0, 0, 1, 1), value=1.0)
    table = torch.cat([both.flatten(-3, -2), slopes], -2)
    num = slopes.shape[-2]
    offsets = torch.tensor([0, 1, num, num + 1, 2 * num, 2 * num + 1], device=value.device).unsqueeze(-1)
    index = index + offsets
    shape = broadcast_shapes(table.shape[:-2], index.shape[:-2])
    table, index = table.expand(*shape, *table.shape[-2:]), index.expand(*shape, *index.shape[-2:])
    x0, x1, y0, y1, d0, d1 = table.gather(-2, index).unbind(-2)
    return x0, x1 - x0, y0, y1 - y0, d0, d1


def _log_slope(xi: Tensor, rest: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    cross = xi * rest
    denominator = s * (1.0 - 2.0 * cross) + (d0 + d1) * cross
    numerator = d1 * xi.square() + 2.0 * s * cross + d0 * rest.square()
    return denominator, (s.square() * numerator / denominator.square()).log()


def spline_forward(x: Tensor, raw: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Elementwise rational-quadratic spline on [-bound, bound], the identity outside and at ``raw = 0``.

    :param x: shape ``(*, N)``.
    :param raw: any real values, shape ``(*, 3 K - 1, N)``: widths, heights, inner derivatives of K bins.
    :param bound: half the side of the box.
    :return: y and log dy/dx, each of shape ``(*, N)``.

    Example::

        >>> y, log_slope = spline_forward(torch.tensor([0.5, 9.0]), torch.zeros(spline_size(8), 2), bound=5.0)
        >>> y.tolist(), bool(log_slope.abs().max() < 1e-6)
        ([0.5, 9.0], True)
    """
    knots, derivatives = _knots(raw, bound)
    inside = (x >= -bound) & (x <= bound)
    clamped = x.clamp(-bound, bound)
    x0, w, y0, h, d0, d1 = _bin(clamped, knots[..., 0, :, :], knots, derivatives, bound)
    s = h / w
    xi = (clamped - x0) / w
    rest = 1.0 - xi
    denominator, log_slope = _log_slope(xi, rest, s, d0, d1)
    y = y0 + h * (xi * (s * xi + d0 * rest)) / denominator
    return torch.where(inside, y, x), torch.where(inside, log_slope, 0.0)


def spline_inverse(y: Tensor, raw: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`spline_forward`, with the log-derivative of the inverse.

    Example::

        >>> raw = torch.randn(spline_size(8), 1)
        >>> y, _ = spline_forward(torch.tensor([0.5]), raw, bound=5.0)
        >>> bool((spline_inverse(y, raw, bound=5.0)[0] - 0.5).abs() < 1e-5)
        True
    """
    knots, derivatives = _knots(raw, bound)
    inside = (y >= -bound) & (y <= bound)
    clamped = y.clamp(-bound, bound)
    x0, w, y0, h, d0, d1 = _bin(clamped, knots[..., 1, :, :], knots, derivatives, bound)
    s = h / w
    eta = (clamped - y0) / h
    rest = 1.0 - eta
    lead, trail = 2.0 * s * eta, 2.0 * s * rest
    gap = d0 * rest - d1 * eta
    falling = gap >= 0
    r = (gap.square() + lead * trail).sqrt() + torch.where(falling, gap, -gap)
    size = r + torch.where(falling, lead, trail)
    xi = torch.where(falling, lead, r) / size
    xi_rest = torch.where(falling, r, trail) / size
    _, log_slope = _log_slope(xi, xi_rest, s, d0, d1)
    return torch.where(inside, x0 + w * xi, y), torch.where(inside, -log_slope, 0.0)
