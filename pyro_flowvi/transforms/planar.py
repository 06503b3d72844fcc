r"""Planar flows, with the exact inverse that no other PyTorch library has.

The functions take ``x`` of shape ``(*, D)`` and parameters whose leading dimensions broadcast with ``*``,
and return the image and the log-determinant of its Jacobian, shape ``(*,)``; inverses that *of the inverse*.
:func:`planar_params` makes valid parameters of any real numbers.  The inverse is derived here because no
paper has it.

The layer is :math:`y = x + \hat u \tanh(w \cdot x + b)`.  With :math:`s = w \cdot x + b` and
:math:`c = w \cdot \hat u`, the product of both sides with w gives the scalar equation

.. math:: s + c \tanh s = w \cdot y + b =: t ,

whose left side is strictly increasing since c > -1.  So s is unique, and
:math:`x = y - \hat u \tanh s`.  It is solved by Halley's method, which costs one tanh a step, as Newton's
does, and is of third order, from a start that is near the root for every c.  For t >= 0 (the function is
odd): if c >= 0, :math:`\max(\mathrm{artanh}(t / (1 + c)), t - c)`, exact for c = 0 and in the limit of
large c; if c < 0, the root of :math:`s + c s / (1 + s / 2) = t`, a quadratic.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._checks import check_positive_int
from ..numerics import newton_root, safe_norm, shifted_softplus
from .base import ParametricTransform, Raw
from .conditional import Conditional

__all__ = ["ConditionalPlanar", "Planar", "planar_forward", "planar_inverse", "planar_params", "planar_score"]

NEWTON_STEPS = 2
"""With the two of ``newton_root`` four: what c = -1 + 1e-3 needs in float64; elsewhere three do."""
PLANAR_FLOOR = 1e-3
"""c = w·û stays above -1 + this: the slope of a planar layer is never smaller."""


def planar_params(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    r"""The constrained direction û and the contraction c = w·û of a planar flow.

    :math:`\hat u = u + (m(w \cdot u) - w \cdot u) w / |w|^2`, c = m(w·u), m the shifted softplus: the
    identity at u = 0 and finite at w = 0, where the textbook choice explodes (Rezende and Mohamed 2015,
    appendix A.1, has m(0) = -0.31).

    :param w: shape ``(*, D)``.
    :param u: shape ``(*, D)``.
    :return: û of shape ``(*, D)`` and c of shape ``(*,)``, c > -1 + 1e-3.

    Example::

        >>> _, c = planar_params(torch.tensor([1.0, 0.0]), torch.tensor([-5.0, 0.0]))
        >>> bool(c > -1.0)
        True
    """
    c, excess = shifted_softplus((w * u).sum(-1), PLANAR_FLOOR - 1.0)
    length = safe_norm(w)
    # Dividing twice by the length: by its square would overflow in the backward pass.
    u_hat = u + (excess / length).unsqueeze(-1) * (w / length.unsqueeze(-1))
    return u_hat, c


def _planar_log_det(act: Tensor, c: Tensor) -> Tensor:
    return torch.log1p(c * (1.0 - act.square()))


def _project(x: Tensor, w: Tensor) -> Tensor:
    """w·x.  One vector for the whole batch is a matrix-vector product: no temporary of x's size."""
    return torch.matmul(x, w) if w.dim() == 1 else (x * w).sum(-1)


def _add_outer(x: Tensor, act: Tensor, u: Tensor) -> Tensor:
    """x + act u.  As an outer product its backward pass is two matrix-vector products."""
    if u.dim() == 1 and x.dim() == 2 and torch.is_grad_enabled():
        return torch.addr(x, act, u)
    return torch.addcmul(x, act.unsqueeze(-1), u)


def planar_forward(x: Tensor, w: Tensor, u_hat: Tensor, c: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Planar layers, one after another (Rezende and Mohamed 2015, equations 10 to 12).

    :param x: shape ``(*, D)``.
    :param w: shape ``(*, K, D)``, one row a layer.
    :param u_hat: shape ``(*, K, D)``, from :func:`planar_params`.
    :param c: shape ``(*, K)``, likewise.
    :param b: shape ``(*, K)``.
    :return: y of shape ``(*, D)`` and the log-determinant, shape ``(*,)``.

    Example::

        >>> w, u = torch.ones(1, 2), torch.zeros(1, 2)
        >>> y, log_det = planar_forward(torch.ones(3, 2), w, *planar_params(w, u), torch.zeros(1))
        >>> y.shape, log_det.tolist()
        (torch.Size([3, 2]), [0.0, 0.0, 0.0])
    """
    acts = []
    for w_k, u_k, b_k in zip(w.unbind(-2), u_hat.unbind(-2), b.unbind(-1), strict=True):
        act = torch.tanh(_project(x, w_k) + b_k)
        x = _add_outer(x, act, u_k)
        acts.append(act)
    return x, _planar_log_det(torch.stack(acts, -1), c).sum(-1)


def planar_score(x: Tensor, w: Tensor, u_hat: Tensor, c: Tensor, b: Tensor, score: Tensor) -> Tensor:
    """The score at the image of ``x`` of a density whose score at ``x`` is given, layer by layer.

    J = I + û ψᵀ with ψ = (1 - tanh²) w, so that J⁻ᵀ is Sherman's and Morrison's formula.

    Example::

        >>> x, w, u, b = torch.ones(3, 2), torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1)
        >>> planar_score(x, w, *planar_params(w, u), b, score=-x)[0].tolist()
        [-1.0, -1.0]
    """
    layers = zip(w.unbind(-2), u_hat.unbind(-2), c.unbind(-1), b.unbind(-1), strict=True)
    for w_k, u_k, c_k, b_k in layers:
        act = torch.tanh(_project(x, w_k) + b_k)
        slope = 1.0 - act.square()
        stretch = 1.0 + c_k * slope
        # The log-determinant log(1 + c (1 - tanh²)) has the gradient -2 c tanh (1 - tanh²) w / (1 + ...).
        along = _project(score, u_k) + 2.0 * c_k.square() * act * slope / stretch
        weight = slope * (2.0 * c_k * act - along) / stretch
        score = score + weight.unsqueeze(-1) * w_k
        x = torch.addcmul(x, act.unsqueeze(-1), u_k)
    return score


def _planar_residual(s: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The residual and the slope that makes Newton's step Halley's; at the root it is the slope."""
    act = torch.tanh(s)
    bend = c * act
    curved = torch.addcmul(c, bend, act, value=-1.0)  # c (1 - tanh²)
    slope = 1.0 + curved
    residual = (s - t) + bend
    return residual, torch.addcmul(slope, residual / slope, act * curved)


def _planar_start(t: Tensor, c: Tensor) -> Tensor:
    size = t.abs()
    # artanh(q) = log1p(q / ((1 - q) / 2)) / 2; near and beyond q = 1 the clamp and t - c take over.
    artanh = 0.5 * torch.log1p(size / torch.sub(0.5 * (1.0 + c), size, alpha=0.5).clamp(min=1.0))
    expanding = torch.maximum(artanh, size - c)
    # Of large t any start will do, for there the first step is exact, and its square would overflow.
    near = size.clamp(max=100.0)
    half = 1.0 + c - 0.5 * near
    contracting = (half.square() + 2.0 * near).sqrt() - half
    return torch.copysign(torch.where(c >= 0, expanding, contracting), t)


def _solve_planar(t: Tensor, c: Tensor) -> Tensor:
    """The root s of s + c tanh(s) = t, c > -1."""
    start = _planar_start(t.detach(), c.detach())
    return newton_root(_planar_residual, start, t, c, num_steps=NEWTON_STEPS)


def planar_inverse(y: Tensor, w: Tensor, u_hat: Tensor, c: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`planar_forward`, with the log-determinant of the inverse.

    Example::

        >>> w, u, b = torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1)
        >>> y, _ = planar_forward(torch.ones(3, 2), w, *planar_params(w, u), b)
        >>> torch.allclose(planar_inverse(y, w, *planar_params(w, u), b)[0], torch.ones(3, 2))
        True
    """
    acts = []
    layers = zip(w.unbind(-2), u_hat.unbind(-2), c.unbind(-1), b.unbind(-1), strict=True)
    for w_k, u_k, c_k, b_k in reversed(list(layers)):
        act = torch.tanh(_solve_planar(_project(y, w_k) + b_k, c_k))
        y = torch.addcmul(y, act.unsqueeze(-1), u_k, value=-1)
        acts.append(act)
    return y, -_planar_log_det(torch.stack(acts[::-1], -1), c).sum(-1)


class Planar(ParametricTransform):
    r"""Planar layers, :math:`f(x) = x + \hat u \tanh(w \cdot x + b)`, ``num_layers`` in a row.

    Each layer stretches space across one hyperplane (Rezende and Mohamed, *Variational Inference with
    Normalizing Flows*, 2015, equations 10 to 12).  The inverse is exact: a scalar equation, solved to
    machine precision by a fixed number of Halley steps, differentiable by the implicit function theorem
    (derivation at the head of this module).  Pyro, zuko and normflows have none for tanh.

    The parameters of all layers are stacked, so that a call has few and large operations.  Starts as the
    identity (u = 0), with w and b random.  The raw u is divided by K: together the layers then move as far
    in an optimizer's step as one would, and do not outrun the affine map of a guide.

    :param dim: the length D of the vectors.
    :param num_layers: the number K of layers.
    :raises ValueError: if a size is not a positive integer.

    Shapes: input ``(*, D)``; ``w`` and ``u`` ``(K, D)``, ``b`` ``(K,)``, any real values.

    Example::

        >>> flow = Planar(5, num_layers=8)
        >>> x = torch.randn(100, 5)
        >>> y, log_det = flow.forward_and_log_det(x)
        >>> torch.allclose(flow.inv(y), x, atol=1e-5)
        True
    """

    def __init__(self, dim: int, num_layers: int = 1) -> None:
        super().__init__(dim)
        self.num_layers = check_positive_int("num_layers", num_layers)
        self.w = nn.Parameter(torch.randn(num_layers, dim) / math.sqrt(dim))
        self.u = nn.Parameter(torch.zeros(num_layers, dim))
        self.b = nn.Parameter(torch.randn(num_layers))

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        u_hat, c = planar_params(raw["w"], raw["u"] / self.num_layers)
        return planar_forward(x, raw["w"], u_hat, c, raw["b"])

    def score_given(self, raw: Raw, x: Tensor, score: Tensor) -> Tensor:
        u_hat, c = planar_params(raw["w"], raw["u"] / self.num_layers)
        return planar_score(x, raw["w"], u_hat, c, raw["b"], score)

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        u_hat, c = planar_params(raw["w"], raw["u"] / self.num_layers)
        return planar_inverse(y, raw["w"], u_hat, c, raw["b"])

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_layers={self.num_layers}"


class ConditionalPlanar(Conditional):
    """:class:`Planar` layers whose parameters depend on a context.

    :param dim: the length of the vectors.
    :param context_dim: the length of the context vectors.
    :param num_layers: the number of layers.
    :param hidden: widths of the network that maps the context to the parameters.
    :raises ValueError: if a size is not a positive integer.

    Example::

        >>> flow = ConditionalPlanar(2, context_dim=3).condition(torch.randn(10, 3))
        >>> flow.batch_shape
        torch.Size([10])
    """

    def __init__(
        self, dim: int, context_dim: int, num_layers: int = 1, hidden: Sequence[int] = (32,)
    ) -> None:
        super().__init__(Planar(dim, num_layers), context_dim, hidden)
