"""The affine map of a guide, and the fixed one behind it in which the posterior has unit scale."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..init.gaussians import MAX_DENSE_DIM
from ..transforms import ElementwiseAffine, FlowTransform, LowerAffine, LowRankAffine, ParametricTransform
from ..transforms._fused import Pass, form_of
from ..transforms._fused.affine import pass_affine
from ..transforms.base import Raw

__all__ = [
    "AFFINES",
    "FramedAffine",
    "FramedElementwise",
    "FramedLower",
    "affine_layer",
    "affine_matrix",
    "enter_frame",
    "frame_of",
    "has_frame",
    "leave_frame",
    "set_affine",
]

_FIXED = ("fixed_loc", "fixed_scale", "fixed_log_det")


class FramedAffine(ParametricTransform):
    """A guide's trainable affine map f, and after it a fixed one, y = loc + C f(x): the guide's frame.

    C is lower triangular with a positive diagonal, or diagonal.  In a frame an optimizer's steps are in units
    of the posterior's scale, whatever the units and correlations of the latents.  The fixed numbers are
    buffers of the layer, so that entering a frame and leaving it changes values alone; they are None for the
    identity, which costs a step nothing.
    """

    fixed_loc: Any
    fixed_scale: Any
    fixed_log_det: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in _FIXED:
            self.register_buffer(name, None)

    def set_frame(self, loc: Tensor | None, scale: Tensor | None) -> None:
        """Sets the fixed map alone, to the identity with None; K of them for K stacked layers."""
        self.fixed_loc, self.fixed_scale, self.fixed_log_det = loc, scale, None
        if loc is not None and scale is not None:
            diagonal = scale if scale.dim() == loc.dim() else scale.diagonal(dim1=-2, dim2=-1)
            self.fixed_log_det = diagonal.log().sum(-1)

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward_given(raw, x)
        if self.fixed_loc is None:
            return y, log_det
        if self.fixed_scale.dim() == 1:
            return torch.addcmul(self.fixed_loc, self.fixed_scale, y), log_det + self.fixed_log_det
        return F.linear(y, self.fixed_scale, self.fixed_loc), log_det + self.fixed_log_det

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, log_det, score = super().forward_with_score(x, score)
        if self.fixed_loc is not None:
            score = _solve_rows(self.fixed_scale, score)
        return y, log_det, score

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.fixed_loc is None:
            return super().inverse_given(raw, y)
        y = _solve_rows(self.fixed_scale, y - self.fixed_loc, transposed=True)
        x, log_det = super().inverse_given(raw, y)
        return x, log_det - self.fixed_log_det

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if f"{prefix}loc" in state_dict:  # the frame of the saved layer, or none
            own: Any = self.loc
            for name in _FIXED:
                saved = state_dict.get(prefix + name)
                self._buffers[name] = None if saved is None else own.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class FramedLower(FramedAffine, LowerAffine):
    """:class:`~pyro_flowvi.transforms.LowerAffine` in a frame."""


class FramedElementwise(FramedAffine, ElementwiseAffine):
    """:class:`~pyro_flowvi.transforms.ElementwiseAffine` in a frame."""


@form_of(FramedLower, FramedElementwise)
def _pass_framed(layer: Any, x: Tensor, score: Tensor) -> Pass:
    """The pass of training, written out: that of the trainable map, and the fixed one."""
    own = pass_affine(layer, x, score)
    if layer.fixed_loc is None:
        return own
    loc, scale = layer.fixed_loc, layer.fixed_scale
    dense = scale.dim() > 1
    image = torch.addmm(loc, own.image, scale.t()) if dense else torch.addcmul(loc, scale, own.image)
    return Pass(
        image,
        own.log_det + layer.fixed_log_det,
        _solve_rows(scale, own.score),
        lambda v: own.pull(v @ scale if dense else v * scale),
    )


def _solve_rows(scale: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """x C⁻¹, or x C⁻ᵀ, for row vectors x and a lower triangular matrix, or the diagonal, C."""
    if scale.dim() == 1:
        return x / scale
    matrix, rows = scale.mT if transposed else scale, x.reshape(-1, x.shape[-1])
    solved: Tensor = torch.linalg.solve_triangular(matrix, rows, upper=transposed, left=False)
    return solved.reshape(x.shape)


def has_frame(affine: Any) -> bool:
    """Whether a guide's affine map, or each of K stacked ones, is in a frame."""
    return isinstance(affine, FramedAffine) and affine.fixed_loc is not None


def frame_of(affine: Any) -> tuple[Tensor, Tensor] | None:
    """Location and scale of the frame, or of those of K stacked layers; None without one."""
    return (affine.fixed_loc.clone(), affine.fixed_scale.clone()) if has_frame(affine) else None


def _times(scale: Tensor, x: Tensor, dense: bool) -> Tensor:
    """C x for one vector, or one for each of K matrices or diagonals C."""
    return (scale @ x.unsqueeze(-1)).squeeze(-1) if dense else scale * x


def affine_matrix(affine: FlowTransform) -> Tensor:
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
def enter_frame(affine: Any, loc: Tensor | None = None, scale: Tensor | None = None) -> bool:
    """Gives a guide's affine map the role of a correction to a fixed one, from which it starts as identity.

    K stacked maps have a fixed one each: arguments then have K as first dimension.

    :param affine: the map.
    :param loc: where the fixed map has its origin, shape ``(D,)``; by default location and scale of the
        map itself, so that the guide's posterior stays what it is.
    :param scale: a lower factor ``(D, D)``, or a diagonal ``(D,)``.
    :return: False, and nothing is done, for a map that has no frame, or is frozen.
    """
    if not isinstance(affine, FramedAffine) or not all(param.requires_grad for param in affine.parameters()):
        return False
    leave_frame(affine)
    own: Any = affine
    if loc is None or scale is None:
        loc, scale = own.loc.detach().clone(), affine_matrix(affine).detach()
    loc, scale = loc.to(own.loc), scale.to(own.loc)
    scale = _as_taken(affine, scale, scale.dim() > loc.dim())
    one = torch.ones_like(loc)
    _set_matrix(affine, torch.zeros_like(loc), torch.diag_embed(one) if scale.dim() > loc.dim() else one)
    affine.set_frame(loc.detach().clone(), scale.detach().clone())
    return True


@torch.no_grad()
def leave_frame(affine: Any) -> None:
    """Makes one map of the trainable and the fixed one: the posterior stays what it is."""
    frame = frame_of(affine)
    if frame is None:
        return
    loc, scale = frame
    own, dense = affine_matrix(affine), isinstance(affine, LowerAffine)
    _set_matrix(affine, loc + _times(scale, affine.loc, dense), scale @ own if dense else scale * own)
    affine.set_frame(None, None)


AFFINES: Final[dict[str, Callable[..., FlowTransform]]] = {
    "lower": FramedLower,
    "low_rank": LowRankAffine,
    "elementwise": FramedElementwise,
}


def affine_layer(kind: str, dim: int, scale: float) -> FlowTransform:
    """The affine map of a guide: of a kind, or with "auto" of the kind for the dimension."""
    if kind == "auto":
        kind = "lower" if dim <= MAX_DENSE_DIM else "low_rank"
    return AFFINES[kind](dim, scale=scale)
