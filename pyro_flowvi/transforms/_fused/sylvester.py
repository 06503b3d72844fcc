"""The pass of Sylvester layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...numerics import safe_norm
from ..planar import _planar_log_det
from ..sylvester import DIAGONAL_LIMIT, Sylvester, _diagonal_product
from ._pass import Gradients, Pass, form_of, trained
from .planar import score_moves

__all__ = ["pass_sylvester"]


class _Frame:
    """Orthonormal rows by reflections: the first M of I - Uᵀ W, (I + triu(2 U Uᵀ, 1)) W = 2 U."""

    def __init__(self, vectors: Tensor) -> None:
        longest = vectors.abs().amax(-1, keepdim=True)
        self._longest = torch.where(longest > 0, longest, 1.0)
        near = vectors / self._longest
        self._length = safe_norm(near).unsqueeze(-1)
        self._units = (near / self._length).to(torch.float64)
        self._gram = 2.0 * self._units @ self._units.t()
        self._weights = torch.linalg.solve_triangular(
            self._gram, 2.0 * self._units, upper=True, unitriangular=True
        )
        self._first = self._units[:, : len(vectors)]
        rows = torch.eye(*vectors.shape, dtype=torch.float64, device=vectors.device)
        self.rows = torch.addmm(rows, self._first.t(), self._weights, alpha=-1).to(vectors.dtype)

    def gradient(self, grad: Tensor) -> Tensor:
        """Of the vectors."""
        wide = -grad.to(torch.float64)
        by_right = torch.linalg.solve_triangular(
            self._gram.t(), self._first @ wide, upper=False, unitriangular=True
        )
        by_gram = (by_right @ self._weights.t()).triu(1)
        by_units = 2.0 * torch.addmm(by_right, by_gram + by_gram.t(), self._units, alpha=-1)
        by_units = by_units + F.pad(self._weights @ wide.t(), (0, wide.shape[1] - len(wide)))
        onto = (by_units * self._units).sum(-1, keepdim=True)
        turned = torch.addcmul(by_units, onto, self._units, value=-1).to(grad.dtype)
        return turned / (self._length * self._longest)


class _Triangles:
    """R and the other triangular matrix."""

    def __init__(self, outer: Tensor, inner: Tensor) -> None:
        raw = torch.stack((outer, inner))
        self._on_diagonal = torch.eye(len(outer), dtype=torch.bool, device=outer.device)
        self._squashed = torch.tanh(raw)
        both = torch.where(self._on_diagonal, DIAGONAL_LIMIT * self._squashed, raw.triu(1))
        self.outer, self.inner = both.unbind(0)

    def gradients(self, by_outer: Tensor, by_inner: Tensor) -> tuple[Tensor, ...]:
        """Of the raw parameters."""
        grad = torch.stack((by_outer, by_inner))
        squashed = DIAGONAL_LIMIT * torch.ops.aten.tanh_backward(grad, self._squashed)
        return torch.where(self._on_diagonal, squashed, grad.triu(1)).unbind(0)


@form_of(Sylvester)
def pass_sylvester(layer: Any, x: Tensor, score: Tensor) -> Pass:
    """The pass of y = x + Qᵀ R tanh(R̃ Q x + b): of planar layers side by side, R̃ R between them."""
    triangles = _Triangles(layer.outer, layer.inner)
    outer, inner = triangles.outer, triangles.inner
    frame = _Frame(layer.frame) if layer.dim > 1 else None
    rows = torch.ones_like(outer) if frame is None else frame.rows
    w, u_hat = inner @ rows, outer.t() @ rows
    act = torch.tanh(torch.addmm(layer.b, x, w.t()))
    slope, c = 1.0 - act.square(), _diagonal_product(outer, inner)
    moves = score_moves(score, act, slope, c, u_hat, (inner @ outer).t())

    def pull(v: Tensor) -> tuple[Tensor, Gradients]:
        steps = slope * (v @ u_hat.t())
        by_w, by_u_hat = steps.t() @ x, act.t() @ v
        by_outer, by_inner = triangles.gradients(rows @ by_u_hat.t(), by_w @ rows.t())
        grads = {layer.outer: by_outer, layer.inner: by_inner, layer.b: steps.sum(0)}
        if frame is not None:
            grads[layer.frame] = frame.gradient(torch.addmm(inner.t() @ by_w, outer, by_u_hat))
        return torch.addmm(v, steps, w), trained(grads)

    return Pass(
        torch.addmm(x, act, u_hat),
        _planar_log_det(act, c).sum(-1),
        torch.addmm(score, moves, w),
        pull,
    )
