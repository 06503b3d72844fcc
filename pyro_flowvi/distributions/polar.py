"""A base whose mass lies around the unit sphere, for flows that are to become rings."""

import math
from typing import ClassVar, Self

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

from .._checks import check_dtype, check_positive, check_positive_int
from ..numerics import safe_norm
from .flow import Shape

__all__ = ["PolarNormal"]


class PolarNormal(TorchDistribution):
    r"""Vectors of uniform direction whose log length is normal: a sphere with noise.

    With :math:`r = |x|`, s the scale and S the surface of the unit sphere in D dimensions,

    .. math:: \log p(x) = \log N(\log r; 0, s^2) - D \log r - \log S.

    A flow is continuous, so what it makes of a normal distribution has no hole, but of this one it has: as a
    base of :class:`~pyro_flowvi.distributions.FlowDistribution` or
    :class:`~pyro_flowvi.distributions.MixtureOfFlows` it lets each component be a ring.  In one dimension the
    sphere is the two points -1 and 1.

    The density is 0 at the origin; there ``log_prob`` is the lowest that it is anywhere, finite, and its
    gradient 0.

    :param dim: the length D of the vectors.
    :param scale: the standard deviation s of the log length, a positive number or a tensor of shape ``(*,)``
        of them.
    :param validate_args: as in torch.
    :raises ValueError: if an argument is not of the described kind.

    Shapes: ``batch_shape`` is that of ``scale``, ``event_shape`` is ``(D,)``.

    Example::

        >>> base = PolarNormal(2, 0.1)
        >>> x = base.sample((1000,))
        >>> 0.5 < x.norm(dim=-1).min() < x.norm(dim=-1).max() < 1.6
        tensor(True)
        >>> from pyro_flowvi import FLOWS
        >>> ring = pyro_flowvi.distributions.FlowDistribution(base, FLOWS["realnvp"](2))
        >>> ring.log_prob(x).shape
        torch.Size([1000])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"scale": constraints.positive}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, dim: int, scale: float | Tensor = 0.2, *, validate_args: bool | None = None) -> None:
        if not isinstance(scale, Tensor):
            scale = torch.tensor(check_positive("scale", scale))
        check_dtype("scale", scale.dtype)
        self.scale = scale
        super().__init__(scale.shape, Size((check_positive_int("dim", dim),)), validate_args=validate_args)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws that carry gradients to the scale, shape ``S + batch_shape + (D,)``."""
        shape = self._extended_shape(Size(sample_shape))
        noise = torch.randn(shape, dtype=self.scale.dtype, device=self.scale.device)
        length = torch.randn(shape[:-1], dtype=noise.dtype, device=noise.device)
        direction = noise / safe_norm(noise).unsqueeze(-1)
        return direction * (self.scale * length).exp().unsqueeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, shape ``(*,)``, at ``value`` of shape ``(*, D)``."""
        if self._validate_args and value.numel():  # torch cannot check an empty batch
            self._validate_sample(value)
        dim = self.event_shape[0]
        log_length = safe_norm(value).log()
        surface = math.log(2.0) + 0.5 * dim * math.log(math.pi) - math.lgamma(0.5 * dim)
        log_normal = -0.5 * (log_length / self.scale).square() - self.scale.log()
        log_prob: Tensor = log_normal - dim * log_length - (surface + 0.5 * math.log(2.0 * math.pi))
        return log_prob

    def expand(self, batch_shape: Shape, _instance: Self | None = None) -> Self:
        """The same law with a larger batch shape."""
        new: Self = self._get_checked_instance(PolarNormal, _instance)
        new.scale = self.scale.expand(Size(batch_shape))
        super(PolarNormal, new).__init__(Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new
