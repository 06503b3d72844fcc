r"""Heavy tails: what no composition of Lipschitz layers gives a Gaussian.

:math:`y = x \, e^{h x^2 / 2}` with :math:`h \ge 0` (Tukey's h transform; Goerg, *The Lambert Way to
Gaussianize Heavy-Tailed Data with the Inverse of Tukey's h Transformation as a Special Case*, 2015).  For
standard normal x the tail of y falls as :math:`|y|^{-1/h}`, up to a logarithm: that of a Student t with 1/h
degrees of freedom.  With :math:`w = h x^2` the equation is :math:`w e^w = h y^2`, so
:math:`x = y \, e^{-W(h y^2) / 2}` with Lambert's W.
"""

import torch
from torch import Tensor, nn

from ..numerics import newton_root
from .base import ParametricTransform, Raw

__all__ = ["HeavyTails"]

START = 0.01
"""h to start from: nearly the identity."""
REACH = 8.0
"""Beyond this many standard deviations the map goes on along its tangent, so that nothing overflows."""


def tail_index(raw: Tensor) -> Tensor:
    """h between 0 and 1 for any real ``raw``, START at 0, of slope 1/2 there.

    A sigmoid that starts as low would hardly move: the gradient of a tail is weak enough.
    """
    rising = raw >= 0
    size = torch.hypot(raw, torch.full_like(raw, 2.0 * START)) + torch.where(rising, raw, -raw)
    odds = torch.where(rising, 0.5 * size, 2.0 * START**2 / size)
    return odds / (1.0 + odds)


def _log_residual(w: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    return w + w.log() - log_q, 1.0 + 1.0 / w


def _lambert_w(q: Tensor) -> Tensor:
    """W(q) for q > 0: Newton on w + log w = log q (Iacono and Boyd 2017, equation 13)."""
    log1p = torch.log1p(q.detach())
    start = log1p * (1.0 - torch.log1p(log1p) / (2.0 + log1p))
    return newton_root(_log_residual, start, q.log(), num_steps=3)


class HeavyTails(ParametricTransform):
    r"""A trainable tail index for each side of each coordinate, :math:`f(x) = x \, e^{h x^2 / 2}`.

    The last layer of a flow for heavy-tailed targets: a Gaussian base through Lipschitz layers has Gaussian
    tails, which importance weights cannot mend.  h is between 0 (Gaussian) and 1 (tails as heavy as a
    Cauchy's), one for x < 0 and one for x > 0.

    :param dim: the length D of the vectors.
    :raises ValueError: if ``dim`` is not a positive integer.

    Shapes: input ``(*, D)``; ``tails`` ``(2, D)``, left and right, any real values.

    Example::

        >>> flow = HeavyTails(1)
        >>> with torch.no_grad():
        ...     _ = flow.tails.fill_(10.0)
        >>> [round(y, 1) for y in flow(torch.tensor([[0.1], [3.0]])).flatten().tolist()]
        [0.1, 179.4]
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.tails = nn.Parameter(torch.zeros(2, dim))

    def _index(self, raw: Raw, side: Tensor) -> Tensor:
        left, right = tail_index(raw["tails"]).unbind(-2)
        return torch.where(side < 0, left, right)

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self._index(raw, x)
        near = x.clamp(-REACH, REACH)
        w = h * near.square()
        stretch = (0.5 * w).exp()
        # Beyond the reach along the tangent, so that the density has no jump.
        y = near * stretch + (x - near) * stretch * (1.0 + w)
        return y, (0.5 * w + torch.log1p(w)).sum(-1)

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        h = self._index(raw, y)
        last = REACH * (0.5 * h * REACH**2).exp()
        near = torch.maximum(torch.minimum(y, last), -last)
        least = torch.finfo(y.dtype).eps ** 2  # of no influence on x, and 1 / w² is still finite
        w = _lambert_w((h * near.square()).clamp(min=least))
        shrink = (-0.5 * w).exp()
        x = near * shrink + (y - near) * shrink / (1.0 + w)
        return x, -(0.5 * w + torch.log1p(w)).sum(-1)
