"""Planar flows, with the exact inverse that no other PyTorch library has."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._checks import check_positive_int
from .base import Conditional, ParametricTransform, Raw
from .functional import planar_forward, planar_inverse, planar_params, planar_score

__all__ = ["ConditionalPlanar", "Planar"]


class Planar(ParametricTransform):
    r"""Planar layers, :math:`f(x) = x + \hat u \tanh(w \cdot x + b)`, ``num_layers`` in a row.

    Each layer stretches space across one hyperplane (Rezende and Mohamed, *Variational Inference with
    Normalizing Flows*, 2015, equations 10 to 12).  The inverse is exact: a scalar equation, solved to
    machine precision by a fixed number of Halley steps, differentiable by the implicit function theorem
    (derivation in :mod:`pyro_flowvi.transforms.functional`).  Pyro, zuko and normflows have none for tanh.

    The parameters of all layers are stacked, so that a call has few and large operations.  Starts as the
    identity (u = 0), with w and b random.  The raw u is divided by K: together the layers then move as far
    in an optimizer's step as one would, and do not outrun the affine map of a guide.

    :param dim: the length D of the vectors.
    :param num_layers: the number K of layers.
    :raises ValueError: if a size is not a positive integer.

    Shapes: input ``(*, D)``; ``w`` and ``u`` ``(K, D)``, ``b`` ``(K,)``, any real values.

    Example::

        >>> flow = Planar(5, num_layers=8)
        >>> x = torch.randn(100, 5)
        >>> y, log_det = flow.forward_and_log_det(x)
        >>> torch.allclose(flow.inv(y), x, atol=1e-5)
        True
    """

    def __init__(self, dim: int, num_layers: int = 1) -> None:
        super().__init__(dim)
        self.num_layers = check_positive_int("num_layers", num_layers)
        self.w = nn.Parameter(torch.randn(num_layers, dim) / math.sqrt(dim))
        self.u = nn.Parameter(torch.zeros(num_layers, dim))
        self.b = nn.Parameter(torch.randn(num_layers))

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        u_hat, c = planar_params(raw["w"], raw["u"] / self.num_layers)
        return planar_forward(x, raw["w"], u_hat, c, raw["b"])

    def score_given(self, raw: Raw, x: Tensor, score: Tensor) -> Tensor:
        u_hat, c = planar_params(raw["w"], raw["u"] / self.num_layers)
        return planar_score(x, raw["w"], u_hat, c, raw["b"], score)

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        u_hat, c = planar_params(raw["w"], raw["u"] / self.num_layers)
        return planar_inverse(y, raw["w"], u_hat, c, raw["b"])

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_layers={self.num_layers}"


class ConditionalPlanar(Conditional):
    """:class:`Planar` layers whose parameters depend on a context.

    :param dim: the length of the vectors.
    :param context_dim: the length of the context vectors.
    :param num_layers: the number of layers.
    :param hidden: widths of the network that maps the context to the parameters.
    :raises ValueError: if a size is not a positive integer.

    Example::

        >>> flow = ConditionalPlanar(2, context_dim=3).condition(torch.randn(10, 3))
        >>> flow.batch_shape
        torch.Size([10])
    """

    def __init__(
        self, dim: int, context_dim: int, num_layers: int = 1, hidden: Sequence[int] = (32,)
    ) -> None:
        super().__init__(Planar(dim, num_layers), context_dim, hidden)
