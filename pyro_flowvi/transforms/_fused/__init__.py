"""Layers' passes for training, written out by hand: forward with the score, then back, in few operations.

Autograd goes over a layer three times for what a training step needs: the image, the score at it, and the
gradients.  The forms here share what the three have in common.  A layer without one goes through autograd.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base import forward_with_score, vector_jacobian
from ..compose import Chain
from ..indexed import IndexedCompose
from . import affine, autoregressive, planar, radial, sylvester  # noqa: F401 - each enters its forms
from ._pass import EXACT, Form, Gradients, Pass, accumulate, form_of
from .coupling import pass_coupling
from .indexed import pass_indexed
from .spline import pass_spline

__all__ = ["Form", "Pass", "form_of", "has_form", "pass_through"]

_FORMS: tuple[Form, ...] = (pass_coupling, pass_spline)
"""Of what is composed: each gives a pass of a layer of the kinds that it knows, and None of others."""


def _written_out(layer: Any, x: Tensor, score: Tensor) -> Pass | None:
    exact = EXACT.get(type(layer))
    with torch.no_grad():
        for form in _FORMS if exact is None else (exact,):
            found = form(layer, x, score)
            if found is not None:
                return found
    return None


def _by_autograd(layer: Any, x: Tensor, score: Tensor, params: Sequence[Tensor]) -> Pass:
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        y, log_det, pushed = forward_with_score(layer, at, score)

    def pull(v: Tensor) -> tuple[Tensor, Gradients]:
        found = vector_jacobian([y], [v], [at, *params])
        back, *grads = (
            torch.zeros_like(p) if g is None else g for p, g in zip((at, *params), found, strict=True)
        )
        return back, dict(zip(params, grads, strict=True))

    return Pass(y.detach(), log_det.detach(), pushed.detach(), pull)


def has_form(layer: Any) -> bool:
    """Whether a layer's pass is written out."""
    like = next(layer.parameters(), torch.zeros(()))
    x = like.new_zeros(1, layer.dim)
    return _written_out(layer, x, x) is not None


def pass_through(layer: Any, x: Tensor, score: Tensor) -> Pass:
    """A layer's image of a matrix of rows, log-determinants, scores at the image, and the way back.

    :param layer: a transform of vectors; the layers of a composition one by one.
    :param x: shape ``(P, D)``.
    :param score: ∇ log q at ``x``, same shape.
    """
    if isinstance(layer, IndexedCompose):
        with torch.no_grad():
            found = pass_indexed(layer, x, score, pass_through)
    elif isinstance(layer, Chain):
        return _through_chain(layer, x, score)
    else:
        found = _written_out(layer, x, score)
    if found is not None:
        return found
    parameters = layer.parameters() if isinstance(layer, torch.nn.Module) else ()
    return _by_autograd(layer, x, score, [p for p in parameters if p.requires_grad])


def _through_chain(chain: Chain, x: Tensor, score: Tensor) -> Pass:
    passes = []
    for part in chain:
        passes.append(pass_through(part, x, score))
        x, score = passes[-1].image, passes[-1].score
    log_det = torch.stack([one.log_det.expand(x.shape[:-1]) for one in passes]).sum(0)

    def pull(v: Tensor) -> tuple[Tensor, Gradients]:
        grads: dict[Tensor, Tensor] = {}
        for one in reversed(passes):
            v, found = one.pull(v)
            accumulate(grads, found)
        return v, grads

    return Pass(x, log_det, score, pull)
