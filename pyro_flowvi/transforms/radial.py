"""Radial flows and powers of the radius, with their inverses in closed form."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._checks import check_positive_int
from .base import Conditional, ParametricTransform, Raw
from .functional import radial_forward, radial_inverse, radial_params, radial_power, radial_score

__all__ = ["ConditionalRadial", "Radial", "RadialPower"]

_GAIN = 5.0
"""How many times faster a power moves than its parameter: rings narrow by orders of magnitude."""


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


def _log_power(a: Tensor) -> Tensor:
    """Without a bound below and, so that points inside the shell do not underflow at once, slow above 0."""
    return torch.where(a > 0, torch.log1p(_GAIN * a.clamp_min(0.0)), _GAIN * a)


class RadialPower(ParametricTransform):
    r"""A power of the distance from the origin, :math:`f(x) = x |x|^{p - 1}`, p > 0.

    Over a base whose mass lies around the unit sphere, such as
    :class:`~pyro_flowvi.distributions.PolarNormal`, it makes the shell as thin or as thick as the data want:
    the standard deviation of the log radius is multiplied by p.  Starts as the identity.  Away from the
    origin it is smooth; at the origin, which stays where it is, the derivative is 0 or infinite.

    :param dim: the length D of the vectors.
    :raises ValueError: if ``dim`` is not a positive integer.

    Shapes: input ``(*, D)``; the parameter ``a`` is a number, any real value, with p = 1 + elu(5 a).

    Example::

        >>> flow = RadialPower(2)
        >>> _ = torch.nn.init.constant_(flow.a, 0.2)
        >>> flow(torch.tensor([3.0, 4.0]))
        tensor([15.0000, 20.0000], grad_fn=<MulBackward0>)
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.a = nn.Parameter(torch.zeros(()))

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        return radial_power(x, _log_power(raw["a"]))

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        return radial_power(y, -_log_power(raw["a"]))
