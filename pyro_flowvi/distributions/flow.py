"""The distribution of a transformed base variable, sampled and scored in one pass."""

import copy
import math
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform

from .._checks import check_dtype, check_positive_int
from .._shapes import broadcast_shapes
from ..transforms.base import forward_and_log_det, forward_with_score, inverse_and_log_det
from ..transforms.compose import own_dim

__all__ = ["FlowDistribution"]


def standard_normal_log_prob(x: Tensor) -> Tensor:
    """Log density of vectors of independent standard normal coordinates, shape ``(*,)``."""
    return -0.5 * (x.square().sum(-1) + x.shape[-1] * math.log(2 * math.pi))


def log_prob_of(distribution: Distribution, x: Tensor) -> Tensor:
    """Its log density at ``x``, also of an empty batch, which torch cannot check."""
    shape = broadcast_shapes(x.shape[:-1], distribution.batch_shape)
    log_prob: Tensor = distribution.log_prob(x) if shape.numel() else x.sum(-1).expand(shape)
    return log_prob


def _moved(distribution: Distribution, *args: Any, **kwargs: Any) -> Distribution:
    """A copy whose tensors, at any depth, went through ``Tensor.to``."""
    distribution = copy.copy(distribution)
    for key, value in vars(distribution).items():
        if isinstance(value, Distribution):
            vars(distribution)[key] = _moved(value, *args, **kwargs)
        elif isinstance(value, Tensor):
            vars(distribution)[key] = value.to(*args, **kwargs)
    return distribution


Shape = Size | list[int] | tuple[int, ...]


class FlowDistribution(TorchDistribution):
    """The law of ``transform(x)``, x from ``base``: a normalizing flow as a Pyro distribution.

    Unlike torch's ``TransformedDistribution`` it draws and scores in one pass and caches nothing: any
    value is scored through the inverse, at the parameters of the moment.

    :param base: a distribution over vectors; the standard normal if None.
    :param transform: a bijection of vectors, of this package, of torch or of Pyro.  A conditional one is
        conditioned first, and the context's batch shape becomes part of ``batch_shape``.
    :param dim: the length of the vectors, needed only if neither transform nor base tells it.
    :param validate_args: as in torch.
    :raises ValueError: if ``transform`` is no transform, or ``base`` is not over vectors of its length.

    Shapes: ``batch_shape`` is that of base and context, ``event_shape`` is ``(D,)``.

    Example::

        >>> from pyro_flowvi.transforms import Planar
        >>> q = FlowDistribution(None, Planar(3, num_layers=4))
        >>> z, log_q = q.rsample_and_log_prob((1000,))
        >>> z.shape, torch.allclose(log_q, q.log_prob(z), atol=1e-4)
        (torch.Size([1000, 3]), True)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    lower_bound: ClassVar[bool] = False
    """Whether :meth:`log_prob` is an estimate from below: it is exact."""

    def __init__(
        self,
        base: Distribution | None,
        transform: Transform,
        *,
        dim: int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not (base is None or isinstance(base, Distribution)):
            raise ValueError(f"base: expected a distribution or None, ahead of the transform, got {base!r}")
        if not isinstance(transform, Transform):
            hint = ": condition it on a context first" if hasattr(transform, "condition") else ""
            raise ValueError(f"transform: expected a Transform, got {type(transform).__name__}{hint}")
        if dim is None:
            dim = own_dim(transform)
        if dim is None and base is not None and len(base.event_shape) == 1:
            dim = base.event_shape[0]
        if base is not None and base.event_shape != (dim,):
            raise ValueError(f"base: expected event_shape ({dim},), got {tuple(base.event_shape)}")
        self.transform = transform
        self.base = base
        batch_shape = broadcast_shapes(
            getattr(transform, "batch_shape", ()), () if base is None else base.batch_shape
        )
        super().__init__(batch_shape, Size((check_positive_int("dim", dim),)), validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry gradients: always, unless the base's do not."""
        return self.base is None or self.base.has_rsample

    def _like(self) -> tuple[torch.dtype, torch.device]:
        """Dtype and device of the transform, so of the base noise."""
        if isinstance(self.transform, nn.Module):
            for tensor in (*self.transform.parameters(), *self.transform.buffers()):
                if tensor.is_floating_point():
                    return tensor.dtype, tensor.device
        return torch.get_default_dtype(), torch.get_default_device()

    def _base_sample_and_log_prob(self, sample_shape: Size) -> tuple[Tensor, Tensor]:
        if self.base is None:
            dtype, device = self._like()
            shape = sample_shape + self.batch_shape + self.event_shape
            x = torch.randn(shape, dtype=dtype, device=device)
            return x, standard_normal_log_prob(x)
        base = self.base.expand(self.batch_shape)
        x = base.rsample(sample_shape) if base.has_rsample else base.sample(sample_shape)
        return x, log_prob_of(base, x)

    def rsample_and_log_prob(self, sample_shape: Shape = ()) -> tuple[Tensor, Tensor]:
        """Draws with their log densities, from one forward pass.

        :param sample_shape: the shape S of independent draws.
        :return: draws, shape ``S + batch_shape + (D,)``, and log densities, shape ``S + batch_shape``.
        """
        x, log_prob = self._base_sample_and_log_prob(Size(sample_shape))
        z, log_det = forward_and_log_det(self.transform, x)
        return z, log_prob - log_det

    def _rows(self, x: Tensor) -> Tensor:
        """As a matrix, where no context tells rows apart: what linear layers take without reshaping."""
        own_batch = getattr(self.transform, "batch_shape", Size())
        return x if own_batch else x.reshape(-1, x.shape[-1])

    def rsample_with_score(self, sample_shape: Shape = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Draws and log densities as :meth:`rsample_and_log_prob`, and ∇ log q(z) at the draws, no graph.

        For a standard normal base.
        """
        with torch.enable_grad():
            x, log_prob = self._base_sample_and_log_prob(Size(sample_shape))
            rows = self._rows(x).requires_grad_()  # the layers differentiate at what they are given
            z, log_det, score = forward_with_score(self.transform, rows, -rows.detach())
        return z.reshape(x.shape), log_prob - log_det.reshape(x.shape[:-1]), score.reshape(x.shape)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws that carry gradients, shape ``S + batch_shape + (D,)``."""
        return self.rsample_and_log_prob(sample_shape)[0]

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Draws without gradients, shape ``S + batch_shape + (D,)``."""
        with torch.no_grad():
            return self.rsample_and_log_prob(sample_shape)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of any value.

        :param value: shape ``(*, D)``, broadcastable with the batch shape.
        :return: shape ``(*,)``.
        :raises ValueError: with validation on, if ``value`` is not a real vector of length D.
        """
        if self._validate_args and value.numel():  # torch cannot check an empty batch
            self._validate_sample(value)
        x, log_det = inverse_and_log_det(self.transform, value)
        base_log_prob = standard_normal_log_prob(x) if self.base is None else log_prob_of(self.base, x)
        log_prob: Tensor = base_log_prob + log_det
        return log_prob.expand(broadcast_shapes(log_prob.shape, self.batch_shape))

    def expand(self, batch_shape: Shape, _instance: Self | None = None) -> Self:
        """The same law with a larger batch shape."""
        new: Self = self._get_checked_instance(FlowDistribution, _instance)
        new.transform = self.transform
        new.base = self.base
        super(FlowDistribution, new).__init__(Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves the transform's parameters and the base, as ``nn.Module.to``; returns self."""
        if isinstance(self.transform, nn.Module):
            self.transform.to(*args, **kwargs)
        check_dtype("dtype", self._like()[0])
        if self.base is not None:
            self.base = _moved(self.base, *args, **kwargs)
        return self
