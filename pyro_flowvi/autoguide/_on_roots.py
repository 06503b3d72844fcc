"""A transform of some coordinates, which leaves the others."""

from typing import Any

import torch
from torch import Tensor

from ..transforms import FlowTransform
from ..transforms._fused import Pass, form_of, pass_through
from ..transforms.base import forward_and_log_det, forward_with_score, inverse_and_log_det

__all__ = ["OnRoots"]


class OnRoots(FlowTransform):
    """A transform of some coordinates of a vector, which leaves the others.

    Unlike :class:`pyro_flowvi.transforms.Partial` it takes any transform, a user's composition as well, and
    carries its score and its pass for training.

    :param inner: a transform of as many coordinates as there are ``places``.
    :param places: which coordinates, in increasing order.
    :param dim: the length of the vectors.

    Example::

        >>> from pyro_flowvi.transforms import ElementwiseAffine
        >>> OnRoots(ElementwiseAffine(1, scale=2.0), torch.tensor([1]), 3)(torch.ones(3)).tolist()
        [1.0, 2.0, 1.0]
    """

    def __init__(self, inner: Any, places: Tensor, dim: int) -> None:
        super().__init__(dim)
        self.inner = inner
        self.exact_inverse = getattr(inner, "exact_inverse", True)
        inside = torch.zeros(dim, dtype=torch.bool, device=places.device)
        inside[places] = True
        rest = (~inside).nonzero().squeeze(-1)
        self._count, self._leading = len(places), bool(inside[: len(places)].all())
        self.register_buffer("_order", torch.cat([places, rest]), persistent=False)
        self.register_buffer("_back", torch.cat([places, rest]).argsort(), persistent=False)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        order: Any = self._order
        ordered = x if self._leading else x.index_select(-1, order)
        return ordered[..., : self._count], ordered[..., self._count :]

    def _join(self, inside: Tensor, rest: Tensor) -> Tensor:
        back: Any = self._back
        ordered = torch.cat([inside, rest], -1)
        return ordered if self._leading else ordered.index_select(-1, back)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside, rest = self._split(x)
        moved, log_det = forward_and_log_det(self.inner, inside)
        return self._join(moved, rest), log_det

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inside, rest = self._split(x)
        own, others = self._split(score)
        moved, log_det, pushed = forward_with_score(self.inner, inside, own)
        return self._join(moved, rest), log_det, self._join(pushed, others)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        inside, rest = self._split(y)
        moved, log_det = inverse_and_log_det(self.inner, inside)
        return self._join(moved, rest), log_det


@form_of(OnRoots)
def _pass_on_roots(layer: Any, x: Tensor, score: Tensor) -> Pass:
    """That of the inner transform."""
    inside, rest = layer._split(x)
    own, others = layer._split(score)
    found = pass_through(layer.inner, inside.contiguous(), own.contiguous())

    def pull(v: Tensor) -> Any:
        moved, left = layer._split(v)
        back, grads = found.pull(moved.contiguous())
        return layer._join(back, left), grads

    return Pass(layer._join(found.image, rest), found.log_det, layer._join(found.score, others), pull)
