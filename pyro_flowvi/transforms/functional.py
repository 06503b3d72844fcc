r"""The pure mathematics of the flow layers: ``(x, params) -> (y, log_det)``.

Every function takes ``x`` of shape ``(*, D)`` and parameters whose leading dimensions broadcast with
``*`` and returns the image and the log-determinant of its Jacobian, shape ``(*,)``.  Inverses return the
log-determinant *of the inverse*.  Parameters are raw: any real number is valid.

The inverses of planar and radial flows are derived here because no paper has them.

**Planar** :math:`y = x + \hat u \tanh(w \cdot x + b)`.  With :math:`s = w \cdot x + b` and
:math:`c = w \cdot \hat u`, the product of both sides with w gives the scalar equation

.. math:: s + c \tanh s = w \cdot y + b =: t ,

whose left side is strictly increasing since c > -1.  So s is unique, and
:math:`x = y - \hat u \tanh s`.  It is solved by Halley's method, which costs one tanh a step, as Newton's
does, and is of third order, from a start that is near the root for every c.  For t >= 0 (the function is
odd): if c >= 0, :math:`\max(\mathrm{artanh}(t / (1 + c)), t - c)`, exact for c = 0 and in the limit of
large c; if c < 0, the root of :math:`s + c s / (1 + s / 2) = t`, a quadratic.

**Radial** :math:`y = x_0 + (x - x_0)(1 + \beta / (\alpha + r))`, :math:`r = |x - x_0|`.  Distances map as
:math:`r' = r (1 + \beta / (\alpha + r))`, that is :math:`r^2 + (\alpha + \beta - r') r - \alpha r' = 0`,
whose one non-negative root is :math:`r = (D - B) / 2 = 2 \alpha r' / (B + D)`,
:math:`B = \alpha + \beta - r', D = \sqrt{B^2 + 4 \alpha r'}`: of the two forms, the one that adds
numbers of one sign.

**Sylvester** :math:`y = x + Q R \tanh(\tilde R Q^T x + b)`, Q with orthonormal columns, R and
:math:`\tilde R` upper triangular.  Multiplied by :math:`Q^T`, with :math:`v = Q^T x, w = Q^T y`, it is
:math:`w = v + R \tanh(\tilde R v + b)`, whose row i has the unknowns i ... M alone: from the last row up,
with
:math:`s_i = (\tilde R v + b)_i` and :math:`\tilde R_{ii}` times the row,

.. math:: s_i + R_{ii} \tilde R_{ii} \tanh s_i = \tilde R_{ii} (w_i - \sum_{j>i} R_{ij} \tanh s_j)
    + \sum_{j>i} \tilde R_{ij} v_j + b_i ,

the scalar equation of the planar flow.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics import newton_root, safe_norm, shifted_softplus

__all__ = [
    "orthonormal_frame",
    "planar_forward",
    "planar_inverse",
    "planar_params",
    "planar_score",
    "radial_forward",
    "radial_inverse",
    "radial_params",
    "radial_power",
    "radial_score",
    "reflect",
    "sylvester_forward",
    "sylvester_inverse",
]

PLANAR_FLOOR = 1e-3
"""c = w·û stays above -1 + this: the slope of a planar layer is never smaller."""

RADIAL_FLOOR = 1e-3
"""The reference distance α of a radial layer is never smaller."""

NEWTON_STEPS = 2
"""With the two of ``newton_root`` four: what c = -1 + 1e-3 needs in float64; elsewhere three do."""


def planar_params(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    r"""The constrained direction û and the contraction c = w·û of a planar flow.

    :math:`\hat u = u + (m(w \cdot u) - w \cdot u) w / |w|^2`, c = m(w·u), m the shifted softplus: the
    identity at u = 0 and finite at w = 0, where the textbook choice explodes (Rezende and Mohamed 2015,
    appendix A.1, has m(0) = -0.31).

    :param w: shape ``(*, D)``.
    :param u: shape ``(*, D)``.
    :return: û of shape ``(*, D)`` and c of shape ``(*,)``, c > -1 + 1e-3.
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
    """Inverse of :func:`planar_forward`, with the log-determinant of the inverse."""
    acts = []
    layers = zip(w.unbind(-2), u_hat.unbind(-2), c.unbind(-1), b.unbind(-1), strict=True)
    for w_k, u_k, c_k, b_k in reversed(list(layers)):
        act = torch.tanh(_solve_planar(_project(y, w_k) + b_k, c_k))
        y = torch.addcmul(y, act.unsqueeze(-1), u_k, value=-1)
        acts.append(act)
    return y, -_planar_log_det(torch.stack(acts[::-1], -1), c).sum(-1)


def radial_params(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """α = softplus(a) + 1e-3 and β = softplus(a + b) - softplus(a) > -α of a radial flow.

    The identity at b = 0.  The floor keeps the slope at the centre, 1 + β/α, finite for any a.

    :param a: any shape.
    :param b: shape of ``a``.
    :return: ``(alpha, beta)``.
    """
    alpha = F.softplus(a)
    return alpha + RADIAL_FLOOR, F.softplus(a + b) - alpha


def _radial_log_det(heights: list[Tensor], alpha: Tensor, beta: Tensor, dim: int) -> Tensor:
    """The sum over layers, of which each gives h = 1 / (α + r)."""
    h = torch.stack(heights, -1)
    stretch = beta * h
    return torch.add(torch.log1p(alpha * h * stretch), torch.log1p(stretch), alpha=dim - 1).sum(-1)


def radial_forward(x: Tensor, centre: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Radial layers, one after another (Rezende and Mohamed 2015, equations 13 and 14).

    :param x: shape ``(*, D)``.
    :param centre: shape ``(*, K, D)``, one row a layer.
    :param alpha: shape ``(*, K)``, positive, from :func:`radial_params`.
    :param beta: shape ``(*, K)``, larger than ``-alpha``.
    :return: y of shape ``(*, D)`` and the log-determinant, shape ``(*,)``.
    """
    heights = []
    layers = zip(centre.unbind(-2), alpha.unbind(-1), beta.unbind(-1), strict=True)
    for centre_k, alpha_k, beta_k in layers:
        delta = x - centre_k
        h = (alpha_k + safe_norm(delta)).reciprocal()
        x = torch.addcmul(x, delta, (beta_k * h).unsqueeze(-1))
        heights.append(h)
    return x, _radial_log_det(heights, alpha, beta, x.shape[-1])


def radial_score(x: Tensor, centre: Tensor, alpha: Tensor, beta: Tensor, score: Tensor) -> Tensor:
    """The score at the image of ``x`` of a density whose score at ``x`` is given, layer by layer.

    J is (1 + β h) I less a multiple of δ δᵀ with δ = x - x₀ and h = 1 / (α + |δ|).
    """
    last = x.shape[-1] - 1
    for centre_k, alpha_k, beta_k in zip(centre.unbind(-2), alpha.unbind(-1), beta.unbind(-1), strict=True):
        delta = x - centre_k
        radius = safe_norm(delta)
        h = (alpha_k + radius).reciprocal()
        across, along = 1.0 + beta_k * h, 1.0 + alpha_k * beta_k * h.square()
        bend = -beta_k * h.square() * (last / across + 2.0 * alpha_k * h / along)
        unit = delta / radius.unsqueeze(-1)
        score = score - bend.unsqueeze(-1) * unit
        onto = (score * unit).sum(-1)
        score = score / across.unsqueeze(-1)
        score = score + (onto * (1.0 / along - 1.0 / across)).unsqueeze(-1) * unit
        x = torch.addcmul(x, delta, (beta_k * h).unsqueeze(-1))
    return score


def radial_inverse(y: Tensor, centre: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`radial_forward` in closed form, with the log-determinant of the inverse."""
    heights = []
    layers = zip(centre.unbind(-2), alpha.unbind(-1), beta.unbind(-1), strict=True)
    for centre_k, alpha_k, beta_k in reversed(list(layers)):
        delta = y - centre_k
        r_out = safe_norm(delta)
        b = (alpha_k - r_out) + beta_k
        root = (b.square() + 4.0 * alpha_k * r_out).sqrt()
        size = b.abs() + root
        r = torch.where(b <= 0, 0.5 * size, 2.0 * alpha_k * r_out / size)
        h = (alpha_k + r).reciprocal()
        y = centre_k + delta / (1.0 + beta_k * h).unsqueeze(-1)
        heights.append(h)
    return y, -_radial_log_det(heights[::-1], alpha, beta, y.shape[-1])


def radial_power(x: Tensor, log_power: Tensor) -> tuple[Tensor, Tensor]:
    """x |x|^(p - 1), whose inverse is that of the power 1 / p.

    J is |x|^(p - 1) (I + (p - 1) u uᵀ) with u = x / |x|, so its determinant p |x|^(D (p - 1)).

    :param x: shape ``(*, D)``.
    :param log_power: log p, shape ``(*,)``.
    :return: y of shape ``(*, D)`` and the log-determinant, shape ``(*,)``.
    """
    # Squares of what comes out have to be finite too.
    highest = 0.45 * math.log(torch.finfo(x.dtype).max)
    log_scale = (log_power.expm1() * safe_norm(x).log()).clamp(-highest, highest)
    return x * log_scale.exp().unsqueeze(-1), x.shape[-1] * log_scale + log_power


def reflect(x: Tensor, vectors: Tensor) -> Tensor:
    """Householder reflections x - 2 (v·x) v / |v|², one after another.

    :param x: shape ``(*, D)``.
    :param vectors: shape ``(*, K, D)``, of any length; a zero vector reflects nothing.
    :return: shape ``(*, D)``.
    """
    # A unit vector does not depend on the length: brought near 1 first, so that none is too short.
    longest = vectors.detach().abs().amax(-1, keepdim=True)
    near = vectors / torch.where(longest > 0, longest, 1.0)
    units = near / safe_norm(near).unsqueeze(-1)
    # The product of all is I - Uᵀ W, U the units as rows, with (I + 2 triu(U Uᵀ, 1)) W = 2 U (Schreiber and
    # Van Loan, *A storage-efficient WY representation*, 1989): two products with the batch in place of K
    # passes.  The system is small, and ill-conditioned where vectors are nearly parallel: in float64.
    wide = units.to(torch.float64)
    gram = 2.0 * wide @ wide.mT
    weights = torch.linalg.solve_triangular(gram, 2.0 * wide, upper=True, unitriangular=True).to(units.dtype)
    return x - _times(_times(x, units.mT), weights)


def orthonormal_frame(vectors: Tensor) -> Tensor:
    """M orthonormal rows: the first M unit vectors after M Householder reflections.

    :param vectors: shape ``(*, M, D)``, M at most D.
    :return: shape ``(*, M, D)``.
    """
    num, dim = vectors.shape[-2:]
    rows = torch.eye(num, dim, dtype=vectors.dtype, device=vectors.device)
    return reflect(rows, vectors.unsqueeze(-3))


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix for row vectors; one matrix for the whole batch is one product."""
    return x @ matrix if matrix.dim() == 2 else (x.unsqueeze(-2) @ matrix).squeeze(-2)


def sylvester_forward(
    x: Tensor, frame: Tensor, outer: Tensor, inner: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """A Sylvester layer (van den Berg et al. 2018, equations 13 and 14).

    :param x: shape ``(*, D)``.
    :param frame: the transposed Q, shape ``(*, M, D)``, from :func:`orthonormal_frame`.
    :param outer: R, upper triangular, shape ``(*, M, M)``.
    :param inner: the other triangular matrix; products of the two diagonals are above -1.
    :param b: shape ``(*, M)``.
    :return: y of shape ``(*, D)`` and the log-determinant, shape ``(*,)``.
    """
    act = torch.tanh(_times(_times(x, frame.mT), inner.mT) + b)
    y = x + _times(_times(act, outer.mT), frame)
    return y, _planar_log_det(act, _diagonal_product(outer, inner)).sum(-1)


def _diagonal_product(outer: Tensor, inner: Tensor) -> Tensor:
    return outer.diagonal(dim1=-2, dim2=-1) * inner.diagonal(dim1=-2, dim2=-1)


def sylvester_inverse(
    y: Tensor, frame: Tensor, outer: Tensor, inner: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`sylvester_forward`, with the log-determinant of the inverse."""
    w = _times(y, frame.mT)
    c = _diagonal_product(outer, inner)
    acts: list[Tensor] = []
    inputs: list[Tensor] = []
    for i in reversed(range(w.shape[-1])):
        known = w[..., i]
        drive = b[..., i]
        if acts:
            known = known - (outer[..., i, i + 1 :] * torch.stack(acts, -1)).sum(-1)
            drive = drive + (inner[..., i, i + 1 :] * torch.stack(inputs, -1)).sum(-1)
        act = torch.tanh(_solve_planar(inner[..., i, i] * known + drive, c[..., i]))
        acts.insert(0, act)
        inputs.insert(0, known - outer[..., i, i] * act)
    act = torch.stack(acts, -1)
    return y - _times(_times(act, outer.mT), frame), -_planar_log_det(act, c).sum(-1)
