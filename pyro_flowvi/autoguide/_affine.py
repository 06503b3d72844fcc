"""A fixed affine map behind a guide's flow while it is trained, in which the posterior has unit scale."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from ..init.gaussians import MAX_DENSE_DIM
from ..transforms import ElementwiseAffine, FlowTransform, LowerAffine, LowRankAffine, Stacked

__all__ = [
    "AFFINES",
    "Frame",
    "affine_layer",
    "enter_frame",
    "frame_of",
    "has_frame",
    "leave_frame",
    "set_affine",
]


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


def has_frame(guide: Any) -> bool:
    """Whether the guide is in a frame, or each of its components."""
    last = guide._flow[-1]
    return isinstance(last.each if isinstance(last, Stacked) else last, Frame)


def frame_of(guide: Any) -> tuple[Tensor, Tensor] | None:
    """Location and scale of the guide's frame, or of those of its components; None without one."""
    if not has_frame(guide):
        return None
    last = guide._flow[-1]
    if not isinstance(last, Stacked):
        return last.loc.clone(), last.scale.clone()
    parts = [last.part(index) for index in range(last.num)]
    return torch.stack([part.loc for part in parts]), torch.stack([part.scale for part in parts])


def _times(scale: Tensor, x: Tensor, dense: bool) -> Tensor:
    """C x for one vector, or one for each of K matrices or diagonals C."""
    return (scale @ x.unsqueeze(-1)).squeeze(-1) if dense else scale * x


def _matrix(affine: FlowTransform) -> Tensor:
    """The matrix of a triangular or diagonal affine map, of the latter its diagonal, or of K of them."""
    scale: Tensor = affine.log_scale.exp()  # type: ignore[operator]
    if isinstance(affine, ElementwiseAffine):
        return scale
    lower: Tensor = getattr(affine, "lower", scale.new_zeros(affine.dim, affine.dim)).tril(-1)
    return scale.unsqueeze(-1) * (lower + torch.eye(affine.dim).to(lower))


@torch.no_grad()
def _set_matrix(affine: FlowTransform, loc: Tensor, matrix: Tensor) -> None:
    affine.loc.copy_(loc)  # type: ignore[operator]
    dense = isinstance(affine, LowerAffine)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1) if dense else matrix
    affine.log_scale.copy_(diagonal.log())  # type: ignore[operator]
    if hasattr(affine, "lower"):
        affine.lower.copy_((matrix / diagonal.unsqueeze(-1)).tril(-1))  # type: ignore[operator]


def _as_taken(affine: FlowTransform, scale: Tensor, dense: bool) -> Tensor:
    """A lower factor, or a diagonal, as that which an affine map has."""
    if isinstance(affine, ElementwiseAffine) and dense:
        # The normal with independent coordinates that is closest to this one.
        eye = torch.eye(scale.shape[-1]).to(scale)
        inverse = torch.linalg.solve_triangular(scale, eye.expand_as(scale), upper=False)
        closest: Tensor = inverse.square().sum(-2).rsqrt()
        return closest
    if isinstance(affine, LowerAffine) and not dense:
        return torch.diag_embed(scale)
    return scale


@torch.no_grad()
def set_affine(affine: Any, loc: Tensor, scale: Tensor) -> None:
    """Gives an affine map, or K stacked ones, a location and a lower factor or a diagonal."""
    dense = scale.dim() > loc.dim()
    if isinstance(affine, LowerAffine | ElementwiseAffine):
        _set_matrix(affine, loc, _as_taken(affine, scale, dense))
    else:
        affine.loc.copy_(loc)
        affine.log_scale.copy_((scale.norm(dim=-1) if dense else scale).log())


@torch.no_grad()
def enter_frame(guide: Any, loc: Tensor | None = None, scale: Tensor | None = None) -> bool:
    """Gives the guide's affine map the role of a correction to a fixed one, from which it starts as identity.

    A guide with K components has one of each for each of them: arguments then have K as first dimension.

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
    loc, scale = loc.to(affine.loc), scale.to(affine.loc)
    scale = _as_taken(affine, scale, scale.dim() > loc.dim())
    one = torch.ones_like(loc)
    _set_matrix(affine, torch.zeros_like(loc), torch.diag_embed(one) if scale.dim() > loc.dim() else one)
    frame: FlowTransform
    if loc.dim() == 1:
        frame = Frame(loc, scale)
    else:
        frame = Stacked([Frame(*each) for each in zip(loc, scale, strict=True)])
    guide._modules["flow"] = guide._compose([*guide._flow, frame])
    return True


@torch.no_grad()
def leave_frame(guide: Any) -> None:
    """Makes one affine map of the guide's and the fixed one: the posterior stays what it is."""
    frame = frame_of(guide)
    if frame is None:
        return
    loc, scale = frame
    guide._modules["flow"] = guide._compose(list(guide._flow)[:-1])
    affine = guide.affine
    own, dense = _matrix(affine), isinstance(affine, LowerAffine)
    _set_matrix(affine, loc + _times(scale, affine.loc, dense), scale @ own if dense else scale * own)


AFFINES: Final[dict[str, Callable[..., FlowTransform]]] = {
    "lower": LowerAffine,
    "low_rank": LowRankAffine,
    "elementwise": ElementwiseAffine,
}


def affine_layer(kind: str, dim: int, scale: float) -> FlowTransform:
    """The affine map of a guide: of a kind, or with "auto" of the kind for the dimension."""
    if kind == "auto":
        kind = "lower" if dim <= MAX_DENSE_DIM else "low_rank"
    return AFFINES[kind](dim, scale=scale)
