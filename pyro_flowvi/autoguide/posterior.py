"""What a guide draws from: the latent of one call, and fixed points for summaries."""

from typing import Any

import torch
from torch import Size, Tensor

from ..distributions.flow import FlowDistribution, Shape

__all__ = ["CallPosterior", "reference_normal", "rows"]

_MAX_SOBOL_DIM = 21201
"""The largest dimension of torch's Sobol sequence."""


class CallPosterior(FlowDistribution):
    """The latent of one guide call: answers from memory for the very tensor that it drew.

    That saves the inverse pass, and serves transforms that have none.
    """

    _drawn: tuple[Tensor, Tensor] | None = None

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        self._drawn = self.rsample_and_log_prob(sample_shape)
        return self._drawn[0]

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is not None and value is self._drawn[0]:
            return self._drawn[1]
        return super().log_prob(value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "CallPosterior":
        return super().expand(batch_shape, self._get_checked_instance(CallPosterior, _instance))


def reference_normal(num_points: int, dim: int) -> Tensor:
    """Standard normal quasi-Monte Carlo points, float64, shape ``(num_points, dim)``.

    The same at every call: summaries are repeatable and leave Pyro's generator alone.
    """
    engine = torch.quasirandom.SobolEngine(min(dim, _MAX_SOBOL_DIM), scramble=True, seed=0)
    uniform = engine.draw(num_points, dtype=torch.float64)
    if dim > _MAX_SOBOL_DIM:
        generator = torch.Generator().manual_seed(0)
        rest = torch.rand((num_points, dim - _MAX_SOBOL_DIM), generator=generator, dtype=torch.float64)
        uniform = torch.cat([uniform, rest], -1)
    points: Tensor = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
    return points


def rows(value: Tensor, batch: tuple[int, ...]) -> Tensor:
    """``value`` of shape ``batch + rest`` as ``batch + (n,)``, also where it has no elements."""
    return value.reshape(batch + (Size(value.shape[len(batch) :]).numel(),))
