"""A fixed affine map behind a guide's flow while it is trained, in which the posterior has unit scale."""

from typing import Any

import torch
from torch import Tensor

from ..transforms import ElementwiseAffine, FlowTransform, LowerAffine
from .base import AutoFlow

__all__ = ["Frame", "enter_frame", "has_frame", "leave_frame"]


class Frame(FlowTransform):
    """y = loc + C x with fixed numbers, C lower triangular with a positive diagonal, or diagonal.

    With it in place an optimizer's steps are in units of the posterior's scale, whatever the units and
    correlations of the latents.
    """

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(len(loc))
        self.loc: Tensor
        self.scale: Tensor
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale", scale.detach().clone())
        diagonal = scale if scale.dim() == 1 else scale.diagonal()
        self.log_det: Tensor
        self.register_buffer("log_det", diagonal.log().sum())

    def _spread(self, x: Tensor) -> Tensor:
        return x * self.scale if self.scale.dim() == 1 else x @ self.scale.mT

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc + self._spread(x), self.log_det.expand(x.shape[:-1])

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.scale.dim() == 1:
            score = score / self.scale
        else:
            score = torch.linalg.solve_triangular(self.scale, score, upper=False, left=False)
        return *self.forward_and_log_det(x), score

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = y - self.loc
        if self.scale.dim() == 1:
            x = x / self.scale
        else:
            shape = x.shape
            x = x.reshape(-1, self.dim)
            x = torch.linalg.solve_triangular(self.scale.mT, x, upper=True, left=False).reshape(shape)
        return x, -self.log_det.expand(y.shape[:-1])


def has_frame(guide: AutoFlow) -> bool:
    """Whether the guide is in a frame."""
    return isinstance(guide._flow[-1], Frame)


def _matrix(affine: FlowTransform) -> Tensor:
    """The matrix of a triangular or diagonal affine map; of the latter its diagonal."""
    scale: Tensor = affine.log_scale.exp()  # type: ignore[operator]
    if isinstance(affine, ElementwiseAffine):
        return scale
    lower: Tensor = getattr(affine, "lower", scale.new_zeros(affine.dim, affine.dim)).tril(-1)
    return scale.unsqueeze(-1) * (lower + torch.eye(affine.dim).to(lower))


@torch.no_grad()
def _set_matrix(affine: FlowTransform, loc: Tensor, matrix: Tensor) -> None:
    affine.loc.copy_(loc)  # type: ignore[operator]
    diagonal = matrix if matrix.dim() == 1 else matrix.diagonal()
    affine.log_scale.copy_(diagonal.log())  # type: ignore[operator]
    if hasattr(affine, "lower"):
        affine.lower.copy_((matrix / diagonal.unsqueeze(-1)).tril(-1))  # type: ignore[operator]


@torch.no_grad()
def enter_frame(guide: AutoFlow, loc: Tensor | None = None, scale: Tensor | None = None) -> bool:
    """Gives the guide's affine map the role of a correction to a fixed one, from which it starts as identity.

    :param guide: a guide with a triangular or diagonal affine map.
    :param loc: where the fixed map has its origin, shape ``(D,)``; by default it takes over the guide's own
        location and scale, so that its posterior stays what it is.
    :param scale: a lower factor ``(D, D)``, or a diagonal ``(D,)``.
    :return: False, and nothing is done, for a guide with any other affine map, or with one that is frozen.
    """
    affine = guide.affine
    if not isinstance(affine, LowerAffine | ElementwiseAffine) or has_frame(guide):
        return False
    if not all(param.requires_grad for param in affine.parameters()):
        return False
    if loc is None or scale is None:
        loc, scale = affine.loc.detach().clone(), _matrix(affine).detach()
    if isinstance(affine, ElementwiseAffine) and scale.dim() == 2:
        # The normal with independent coordinates that is closest to this one.
        inverse = torch.linalg.solve_triangular(scale, torch.eye(len(loc)).to(scale), upper=False)
        scale = inverse.square().sum(0).rsqrt()
    elif isinstance(affine, LowerAffine) and scale.dim() == 1:
        scale = torch.diag_embed(scale)
    one = torch.ones_like(loc)
    _set_matrix(affine, torch.zeros_like(loc), one if scale.dim() == 1 else torch.diag_embed(one))
    guide._modules["flow"] = guide._compose([*guide._flow, Frame(loc, scale)])
    return True


@torch.no_grad()
def leave_frame(guide: AutoFlow) -> None:
    """Makes one affine map of the guide's and the fixed one: the posterior stays what it is."""
    if not has_frame(guide):
        return
    parts: list[Any] = list(guide._flow)
    frame = parts.pop()
    guide._modules["flow"] = guide._compose(parts)
    affine, own = parts[-1], _matrix(parts[-1])
    loc = frame.loc + frame._spread(affine.loc)
    _set_matrix(affine, loc, frame.scale * own if own.dim() == 1 else frame.scale @ own)
