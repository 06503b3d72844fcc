"""From integer images to the real line and back to bits: dequantisation, the logit, bits per dimension.

Let an image x of D integers from 0 to K - 1 have the probability P(x), and p be a density on the unit cube.
The cell of x has the volume K^-D, so that with u uniform on the unit cube

.. math:: P(x) = \\int_{cell} p(y) dy = K^{-D} E_u[p((x + u) / K)]

is a probability of images, and by Jensen's inequality
:math:`E_u[\\log p((x + u) / K)] - D \\log K \\le \\log P(x)`, with equality where p is constant on the cells
(Theis, van den Oord and Bethge, *A note on the evaluation of generative models*, 2016, section 3.1).
"""

import math
from collections.abc import Sequence

import torch
from pyro.distributions import constraints
from torch import Tensor

from .._checks import check_positive_int, check_widths
from .base import FlowTransform

__all__ = ["Logit", "bits_per_dim", "dequantize"]


class Logit(FlowTransform):
    r"""The data end of an image flow, from real vectors to intensities, :math:`(\sigma(x) - a) / (1 - 2 a)`.

    Its inverse is the model of Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, 2017,
    section 4.1, :math:`\mathrm{logit}(a + (1 - 2 a) y)`, in the symmetric form of Papamakarios, Pavlakou and
    Murray, *Masked Autoregressive Flow*, 2017, section 4.3.  The intensities 0 and 1 are inside: the
    codomain is the interval from -a / (1 - 2 a) to 1 + a / (1 - 2 a).  A value beyond is taken as its end.

    :param dim: the length D of the vectors.
    :param alpha: the constant a, at least 0 and below 1/2.
    :raises ValueError: if ``dim`` is not a positive integer or ``alpha`` not in the range.

    Shapes: input ``(*, D)``.

    Example::

        >>> Logit(2)(torch.zeros(2))
        tensor([0.5000, 0.5000])
        >>> Logit(1, alpha=0.05).inv(torch.tensor([0.0])).exp()  # 0.05 / 0.95
        tensor([0.0526])
    """

    def __init__(self, dim: int, alpha: float = 0.05) -> None:
        super().__init__(dim)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha < 0.5:
            raise ValueError(f"alpha: expected a number from 0 to below 0.5, got {alpha!r}")
        self.alpha = float(alpha)
        margin = self.alpha / (1 - 2 * self.alpha)
        self.codomain = constraints.independent(constraints.interval(-margin, 1 + margin), 1)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        width = 1 - 2 * self.alpha
        # log σ(x) σ(-x) = -|x| - 2 log(1 + e^-|x|): no term cancels another.
        log_slope = -x.abs() - 2 * torch.log1p(torch.exp(-x.abs())) - math.log(width)
        return (torch.sigmoid(x) - self.alpha) / width, log_slope.sum(-1)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        width, tiny = 1 - 2 * self.alpha, torch.finfo(y.dtype).tiny
        # Each from its own end, so that none is the small difference of large numbers.
        log_p = (self.alpha + width * y).clamp(min=tiny).log()
        log_q = (self.alpha + width * (1 - y)).clamp(min=tiny).log()
        return log_p - log_q, (math.log(width) - log_p - log_q).sum(-1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, alpha={self.alpha}"


def dequantize(images: Tensor, num_levels: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniform noise that spreads each level over its cell, :math:`y = (x + u) / K` in [0, 1).

    Uria, Murray and Larochelle, *RNADE*, 2013, section 5; new noise at each call.

    :param images: integers from 0 to K - 1, any shape and integer dtype.
    :param num_levels: the number K of levels.
    :param generator: of the noise; torch's own if None.
    :return: the same shape, of torch's default dtype.
    :raises ValueError: if ``images`` are not integers, or out of the range.

    Example::

        >>> y = dequantize(torch.tensor([0, 16]), num_levels=17)
        >>> (17 * y).floor()
        tensor([ 0., 16.])
    """
    check_positive_int("num_levels", num_levels)
    if images.is_floating_point() or images.is_complex() or images.dtype == torch.bool:
        raise ValueError(f"images: expected integers, got {images.dtype}")
    if images.numel() and (images.min() < 0 or images.max() >= num_levels):
        found = f"{int(images.min())} to {int(images.max())}"
        raise ValueError(f"images: expected values from 0 to {num_levels - 1}, got {found}")
    noise = torch.rand(images.shape, generator=generator, device=images.device)
    # The sum rounds, to the next level at worst.
    return ((images + noise) / num_levels).clamp(max=1 - torch.finfo(noise.dtype).eps)


def bits_per_dim(log_prob: Tensor, shape: int | Sequence[int], num_levels: int) -> Tensor:
    r"""Bits for each dimension of the integers, :math:`\log_2 K - \log p(y) / (D \log 2)`.

    An upper bound, in expectation over the noise, on what the flow's own probability of the integers is in
    bits (Theis, van den Oord and Bethge 2016, section 3.1).

    :param log_prob: log densities of dequantised images in the unit cube, in nats, any shape.
    :param shape: that of an image, or the number D of its dimensions.
    :param num_levels: the number K of levels.
    :raises ValueError: if a size is not a positive integer.

    Example::

        >>> bits_per_dim(torch.tensor(0.0), shape=(1, 8, 8), num_levels=16)  # the uniform density
        tensor(4.)
    """
    sizes = (shape,) if isinstance(shape, int) else shape
    dim = math.prod(check_widths("shape", sizes))
    return math.log2(check_positive_int("num_levels", num_levels)) - log_prob / (dim * math.log(2))
