"""Exponential tails for the roots of a hierarchy."""

import torch
from torch import Tensor, nn

from ..transforms import ParametricTransform
from ..transforms.base import Raw
from ..transforms.heavy_tails import tail_index

__all__ = ["RootTails"]

STEP = 4.0
"""Units of the raw parameters: a tail, which few draws see, is learned as fast as what they all do."""


class RootTails(ParametricTransform):
    r"""A trainable exponential tail for each side of each coordinate, :math:`f(x) = x \sqrt{1 + c x^2}`.

    The logarithm of a scale has such a tail: near zero its prior alone holds it, and falls like a power of
    the scale.  For standard normal x, f(x) grows like x², so that the tail falls like
    :math:`\exp(-|y| / 2 \sqrt c)`, and never slower: unlike with a power law a few draws cannot carry the
    moments.  With c = 0 it is the identity.

    :param dim: the length D of the vectors.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.tails = nn.Parameter(torch.zeros(2, dim))

    def _index(self, raw: Raw, side: Tensor) -> Tensor:
        left, right = tail_index(STEP * raw["tails"]).unbind(-2)
        return torch.where(side < 0, left, right)

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        bend = self._index(raw, x) * x.square()
        return x * (1.0 + bend).sqrt(), (torch.log1p(2.0 * bend) - 0.5 * torch.log1p(bend)).sum(-1)

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        index = self._index(raw, y)
        # x² (1 + c x²) = y², solved without a difference.
        x = y * (2.0 / (1.0 + (1.0 + 4.0 * index * y.square()).sqrt())).sqrt()
        bend = index * x.square()
        return x, (0.5 * torch.log1p(bend) - torch.log1p(2.0 * bend)).sum(-1)

    @torch.no_grad()
    def longest(self) -> float:
        """The largest c."""
        return float(tail_index(STEP * self.tails).max())
