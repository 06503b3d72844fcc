"""Radial flows, with their inverse in closed form."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._checks import check_positive_int
from .base import Conditional, ParametricTransform, Raw
from .functional import radial_forward, radial_inverse, radial_params, radial_score

__all__ = ["ConditionalRadial", "Radial"]


class Radial(ParametricTransform):
    r"""Radial layers, :math:`f(x) = x + \beta (x - x_0) / (\alpha + |x - x_0|)`, ``num_layers`` in a row.

    Each layer contracts or expands space around one point (Rezende and Mohamed, *Variational Inference
    with Normalizing Flows*, 2015, equations 13 and 14).  The inverse is the closed form derived in
    :mod:`pyro_flowvi.transforms.functional`; Pyro, zuko and normflows have none.

    The parameters of all layers are stacked.  Starts as the identity (b = 0) around random centres.  The
    raw b is divided by K, as u is in :class:`~pyro_flowvi.transforms.Planar`.

    :param dim: the length D of the vectors.
    :param num_layers: the number K of layers.
    :raises ValueError: if a size is not a positive integer.

    Shapes: input ``(*, D)``; ``centre`` ``(K, D)``, ``a`` and ``b`` ``(K,)``, any real values, with
    α = softplus(a) + 1e-3 and β = softplus(a + b / K) - softplus(a).

    Example::

        >>> flow = Radial(5, num_layers=8)
        >>> x = torch.randn(100, 5)
        >>> y, log_det = flow.forward_and_log_det(x)
        >>> torch.allclose(flow.inv(y), x, atol=1e-5)
        True
    """

    def __init__(self, dim: int, num_layers: int = 1) -> None:
        super().__init__(dim)
        self.num_layers = check_positive_int("num_layers", num_layers)
        # A radius of typical size: distances between standard normal vectors grow as sqrt(dim).
        start = math.log(math.expm1(math.sqrt(dim)))
        self.centre = nn.Parameter(torch.randn(num_layers, dim))
        self.a = nn.Parameter(torch.full((num_layers,), start))
        self.b = nn.Parameter(torch.zeros(num_layers))

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        return radial_forward(x, raw["centre"], *radial_params(raw["a"], raw["b"] / self.num_layers))

    def score_given(self, raw: Raw, x: Tensor, score: Tensor) -> Tensor:
        alpha, beta = radial_params(raw["a"], raw["b"] / self.num_layers)
        return radial_score(x, raw["centre"], alpha, beta, score)

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        return radial_inverse(y, raw["centre"], *radial_params(raw["a"], raw["b"] / self.num_layers))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_layers={self.num_layers}"


class ConditionalRadial(Conditional):
    """:class:`Radial` layers whose parameters depend on a context.

    :param dim: the length of the vectors.
    :param context_dim: the length of the context vectors.
    :param num_layers: the number of layers.
    :param hidden: widths of the network that maps the context to the parameters.
    :raises ValueError: if a size is not a positive integer.

    Example::

        >>> flow = ConditionalRadial(2, context_dim=3).condition(torch.randn(10, 3))
        >>> flow.batch_shape
        torch.Size([10])
    """

    def __init__(
        self, dim: int, context_dim: int, num_layers: int = 1, hidden: Sequence[int] = (32,)
    ) -> None:
        super().__init__(Radial(dim, num_layers), context_dim, hidden)
