"""The latent of one guide call."""

from typing import Any

import torch
from torch import Tensor

from .._program.scoring import is_scoring
from ..distributions.flow import FlowDistribution, Shape

__all__ = ["CallPosterior"]


class CallPosterior(FlowDistribution):
    """The latent of one guide call: answers from memory for the very tensor that it drew.

    That saves the inverse pass, and serves transforms that have none.
    """

    dtype: torch.dtype | None = None
    """Of draws and densities, if not that of the transform."""
    _drawn: tuple[Tensor, ...] | None = None

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        draw = self.rsample_with_score if is_scoring() else self.rsample_and_log_prob
        self._drawn = tuple(drawn.to(dtype=self.dtype) for drawn in draw(sample_shape))
        return self._drawn[0]

    def drawn_score(self, value: Tensor) -> Tensor | None:
        """∇ log q at the very tensor that was drawn within :class:`Scoring`; None for any other."""
        if self._drawn is None or value is not self._drawn[0] or len(self._drawn) < 3:
            return None
        return self._drawn[2]

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is not None and value is self._drawn[0]:
            return self._drawn[1]
        if self.dtype is None:
            return super().log_prob(value)
        return super().log_prob(value.to(self._like()[0])).to(dtype=self.dtype)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "CallPosterior":
        new = self._get_checked_instance(CallPosterior, _instance)
        new.dtype = self.dtype
        super().expand(batch_shape, new)
        return new  # type: ignore[no-any-return]
