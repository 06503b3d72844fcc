"""The passes of affine maps and permutations."""

import math
from typing import Any

import torch
from torch import Tensor

from ...numerics import finite_scale
from ..base import vector_jacobian
from ..linear import ActNorm, ElementwiseAffine, LowerAffine, LowRankAffine, Permute
from ._pass import Gradients, Pass, form_of, trained

__all__ = ["log_scale_gradient", "pass_affine", "pass_low_rank", "pass_permutation"]


def log_scale_gradient(grad: Tensor, raw: Tensor) -> Tensor:
    """Back through the clamp of ``finite_scale``."""
    bound = 0.3 * math.log(torch.finfo(raw.dtype).max)
    found: Tensor = torch.ops.aten.hardtanh_backward(grad, raw, -bound, bound)
    return found


@form_of(ElementwiseAffine, ActNorm, LowerAffine)
def pass_affine(layer: Any, x: Tensor, score: Tensor) -> Pass:
    """The pass of y = loc + scale (x + L x), L strictly lower triangular, or zero."""
    scale, log_scale = finite_scale(layer.log_scale)
    inner, lower, raw = x, None, getattr(layer, "lower", None)
    if raw is not None:
        lower = raw.tril(-1)
        inner = torch.addmm(x, x, lower.t())
        score = torch.linalg.solve_triangular(raw, score, upper=False, left=False, unitriangular=True)

    def pull(v: Tensor) -> tuple[Tensor, Gradients]:
        back = v * scale
        grads: dict[Tensor, Tensor] = {
            layer.loc: v.sum(0),
            layer.log_scale: log_scale_gradient((back * inner).sum(0), layer.log_scale),
        }
        if raw is not None and lower is not None:
            grads[raw] = (back.t() @ x).tril(-1)
            back = torch.addmm(back, back, lower)
        return back, trained(grads)

    return Pass(torch.addcmul(layer.loc, scale, inner), log_scale.sum(-1), score / scale, pull)


@form_of(LowRankAffine)
def pass_low_rank(layer: Any, x: Tensor, score: Tensor) -> Pass:
    """The pass of y = loc + (diag(s) + W Wᵀ) x, whose matrix is symmetric."""
    raw = layer.raw_parameters()
    shape = [raw["log_scale"], raw["factor"]]
    with torch.enable_grad():  # the bounds of W depend on s: of the parameters alone, and small
        leaves = {name: param.detach().requires_grad_() for name, param in raw.items()}
        scale_graph = finite_scale(leaves["log_scale"])[0]
        factor_graph = layer._factor(leaves, scale_graph)
    scale, factor, cholesky, log_det = layer._parts(raw)
    projected = x @ factor

    def times(v: Tensor, projected: Tensor) -> Tensor:
        return torch.addmm(v * scale, projected, factor.t())

    def pull(v: Tensor) -> tuple[Tensor, Gradients]:
        onto = v @ factor
        by_factor = torch.addmm(v.t() @ projected, x.t(), onto)
        weights = (v * x).sum(0), by_factor
        inputs = leaves["log_scale"], leaves["factor"]
        found = vector_jacobian((scale_graph, factor_graph), weights, inputs, keep=True)
        grads = {layer.loc: v.sum(0), **dict(zip(shape, found, strict=True))}
        return times(v, onto), trained(grads)

    image = times(x, projected) + layer.loc
    return Pass(image, log_det, layer._solve(score, scale, factor, cholesky), pull)


@form_of(Permute)
def pass_permutation(layer: Any, x: Tensor, score: Tensor) -> Pass:
    """The pass of a permutation of the coordinates."""
    order, inverse = layer.permutation, layer.inverse_permutation

    def pull(v: Tensor) -> tuple[Tensor, Gradients]:
        return v.index_select(-1, inverse), {}

    return Pass(x.index_select(-1, order), x.new_zeros(()), score.index_select(-1, order), pull)
