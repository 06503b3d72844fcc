"""The pass of Sylvester layers."""

from typing import Any

import torch
from torch import Tensor

from ..planar import _planar_log_det
from ..sylvester import Sylvester, _diagonal_product
from ._pass import Gradients, Pass, form_of, trained
from .planar import score_moves

__all__ = ["pass_sylvester"]


@form_of(Sylvester)
def pass_sylvester(layer: Any, x: Tensor, score: Tensor) -> Pass:
    """The pass of y = x + Rᵀ-rows of tanh: that of planar layers side by side, R̃ R between them."""
    raw = layer.raw_parameters()
    with torch.enable_grad():  # of the parameters alone, and small
        leaves = {name: param.detach().requires_grad_() for name, param in raw.items()}
        frame, outer, inner, _ = layer._params(leaves)
        into, out = inner @ frame, outer.mT @ frame
    w, u_hat = into.detach(), out.detach()
    outer, inner = outer.detach(), inner.detach()
    act = torch.tanh(torch.addmm(layer.b, x, w.t()))
    slope, c = 1.0 - act.square(), _diagonal_product(outer, inner)
    moves = score_moves(score, act, slope, c, u_hat, (inner @ outer).t())

    def pull(v: Tensor) -> tuple[Tensor, Gradients]:
        steps = slope * (v @ u_hat.t())
        shapes = [name for name in raw if name != "b"]
        found = torch.autograd.grad(
            (into, out),
            [leaves[name] for name in shapes],
            (steps.t() @ x, act.t() @ v),
            retain_graph=True,
        )
        grads = dict(zip((raw[name] for name in shapes), found, strict=True))
        return torch.addmm(v, steps, w), trained({**grads, layer.b: steps.sum(0)})

    return Pass(
        torch.addmm(x, act, u_hat),
        _planar_log_det(act, c).sum(-1),
        torch.addmm(score, moves, w),
        pull,
    )
