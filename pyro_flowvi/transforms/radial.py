r"""Radial flows and powers of the radius, with their inverses in closed form.

The functions take ``x`` of shape ``(*, D)`` and parameters whose leading dimensions broadcast with ``*``,
and return the image and the log-determinant of its Jacobian, shape ``(*,)``; inverses that *of the inverse*.
:func:`radial_params` makes valid parameters of any real numbers.  The inverse is derived here because no
paper has it.

The layer is :math:`y = x_0 + (x - x_0)(1 + \beta / (\alpha + r))`, :math:`r = |x - x_0|`.  Distances map as
:math:`r' = r (1 + \beta / (\alpha + r))`, that is :math:`r^2 + (\alpha + \beta - r') r - \alpha r' = 0`,
whose one non-negative root is :math:`r = (D - B) / 2 = 2 \alpha r' / (B + D)`,
:math:`B = \alpha + \beta - r', D = \sqrt{B^2 + 4 \alpha r'}`: of the two forms, the one that adds
numbers of one sign.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_positive_int
from ..numerics import safe_norm
from .base import ParametricTransform, Raw
from .conditional import Conditional

__all__ = [
    "ConditionalRadial",
    "Radial",
    "RadialPower",
    "radial_forward",
    "radial_inverse",
    "radial_params",
    "radial_power",
    "radial_score",
]

_GAIN = 5.0
"""How many times faster a power moves than its parameter: rings narrow by orders of magnitude."""
RADIAL_FLOOR = 1e-3
"""The reference distance α of a radial layer is never smaller."""


def _log_power(a: Tensor) -> Tensor:
    """Slow above 0, so that points inside the shell do not underflow; as low as 1 / p is a number."""
    low = -0.3 * math.log(torch.finfo(a.dtype).max) / _GAIN
    return torch.where(a > 0, torch.log1p(_GAIN * a.clamp_min(0.0)), _GAIN * a.clamp_min(low))


def radial_params(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """α = softplus(a) + 1e-3 and β = softplus(a + b) - softplus(a) > -α of a radial flow.

    The identity at b = 0.  The floor keeps the slope at the centre, 1 + β/α, finite for any a.

    :param a: any shape.
    :param b: shape of ``a``.
    :return: ``(alpha, beta)``.

    Example::

        >>> alpha, beta = radial_params(torch.zeros(1), torch.zeros(1))
        >>> bool(alpha > 0), beta.item()
        (True, 0.0)
    """
    alpha = F.softplus(a)
    return alpha + RADIAL_FLOOR, F.softplus(a + b) - alpha


def _radial_log_det(heights: list[Tensor], alpha: Tensor, beta: Tensor, dim: int) -> Tensor:
    """The sum over layers, of which each gives h = 1 / (α + r)."""
    h = torch.stack(heights, -1)
    stretch = beta * h
    return torch.add(torch.log1p(alpha * h * stretch), torch.log1p(stretch), alpha=dim - 1).sum(-1)


def radial_forward(x: Tensor, centre: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Radial layers, one after another (Rezende and Mohamed 2015, equations 13 and 14).

    :param x: shape ``(*, D)``.
    :param centre: shape ``(*, K, D)``, one row a layer.
    :param alpha: shape ``(*, K)``, positive, from :func:`radial_params`.
    :param beta: shape ``(*, K)``, larger than ``-alpha``.
    :return: y of shape ``(*, D)`` and the log-determinant, shape ``(*,)``.

    Example::

        >>> centre, size = torch.zeros(1, 2), radial_params(torch.zeros(1), torch.zeros(1))
        >>> radial_forward(torch.ones(3, 2), centre, *size)[1].tolist()
        [0.0, 0.0, 0.0]
    """
    heights = []
    layers = zip(centre.unbind(-2), alpha.unbind(-1), beta.unbind(-1), strict=True)
    for centre_k, alpha_k, beta_k in layers:
        delta = x - centre_k
        h = (alpha_k + safe_norm(delta)).reciprocal()
        x = torch.addcmul(x, delta, (beta_k * h).unsqueeze(-1))
        heights.append(h)
    return x, _radial_log_det(heights, alpha, beta, x.shape[-1])


def radial_score(x: Tensor, centre: Tensor, alpha: Tensor, beta: Tensor, score: Tensor) -> Tensor:
    """The score at the image of ``x`` of a density whose score at ``x`` is given, layer by layer.

    J is (1 + β h) I less a multiple of δ δᵀ with δ = x - x₀ and ``h = 1 / (α + |δ|)``.

    Example::

        >>> x, centre = torch.ones(3, 2), torch.zeros(1, 2)
        >>> radial_score(x, centre, *radial_params(torch.zeros(1), torch.zeros(1)), score=-x)[0].tolist()
        [-1.0, -1.0]
    """
    last = x.shape[-1] - 1
    for centre_k, alpha_k, beta_k in zip(centre.unbind(-2), alpha.unbind(-1), beta.unbind(-1), strict=True):
        delta = x - centre_k
        radius = safe_norm(delta)
        h = (alpha_k + radius).reciprocal()
        across, along = 1.0 + beta_k * h, 1.0 + alpha_k * beta_k * h.square()
        bend = -beta_k * h.square() * (last / across + 2.0 * alpha_k * h / along)
        unit = delta / radius.unsqueeze(-1)
        score = score - bend.unsqueeze(-1) * unit
        onto = (score * unit).sum(-1)
        score = score / across.unsqueeze(-1)
        score = score + (onto * (1.0 / along - 1.0 / across)).unsqueeze(-1) * unit
        x = torch.addcmul(x, delta, (beta_k * h).unsqueeze(-1))
    return score


def radial_inverse(y: Tensor, centre: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`radial_forward` in closed form, with the log-determinant of the inverse.

    Example::

        >>> centre, size = torch.zeros(1, 2), radial_params(torch.zeros(1), torch.ones(1))
        >>> y, _ = radial_forward(torch.ones(3, 2), centre, *size)
        >>> torch.allclose(radial_inverse(y, centre, *size)[0], torch.ones(3, 2))
        True
    """
    heights = []
    layers = zip(centre.unbind(-2), alpha.unbind(-1), beta.unbind(-1), strict=True)
    for centre_k, alpha_k, beta_k in reversed(list(layers)):
        delta = y - centre_k
        r_out = safe_norm(delta)
        b = (alpha_k - r_out) + beta_k
        root = (b.square() + 4.0 * alpha_k * r_out).sqrt()
        size = b.abs() + root
        r = torch.where(b <= 0, 0.5 * size, 2.0 * alpha_k * r_out / size)
        h = (alpha_k + r).reciprocal()
        y = centre_k + delta / (1.0 + beta_k * h).unsqueeze(-1)
        heights.append(h)
    return y, -_radial_log_det(heights[::-1], alpha, beta, y.shape[-1])


def radial_power(x: Tensor, log_power: Tensor) -> tuple[Tensor, Tensor]:
    """``x |x|^(p - 1)``, whose inverse is that of the power 1 / p.

    J is ``|x|^(p - 1) (I + (p - 1) u uᵀ)`` with ``u = x / |x|``, so its determinant ``p |x|^(D (p - 1))``.

    :param x: shape ``(*, D)``.
    :param log_power: log p, shape ``(*,)``.
    :return: y of shape ``(*, D)`` and the log-determinant, shape ``(*,)``.

    Example::

        >>> y, log_det = radial_power(torch.tensor([3.0, 4.0]), torch.tensor(2.0).log())
        >>> bool((y - torch.tensor([15.0, 20.0])).abs().max() < 1e-4)
        True
    """
    # Squares of what comes out have to be finite too: farther out the scale is constant, in both directions.
    highest = 0.45 * math.log(torch.finfo(x.dtype).max)
    wanted = log_power.expm1() * safe_norm(x).log()
    log_scale = wanted.clamp(-highest, highest)
    log_slope = torch.where(wanted.abs() <= highest, log_power, 0.0)
    return x * log_scale.exp().unsqueeze(-1), x.shape[-1] * log_scale + log_slope


class Radial(ParametricTransform):
    r"""Radial layers, :math:`f(x) = x + \beta (x - x_0) / (\alpha + |x - x_0|)`, ``num_layers`` in a row.

    Each layer contracts or expands space around one point (Rezende and Mohamed, *Variational Inference
    with Normalizing Flows*, 2015, equations 13 and 14).  The inverse is the closed form derived in
    the head of this module; Pyro, zuko and normflows have none.

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
