"""Affine maps and permutations."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_positive, check_positive_int
from ..numerics import finite_scale, safe_norm
from .base import FlowTransform, ParametricTransform, Raw

__all__ = [
    "ActNorm",
    "ElementwiseAffine",
    "Householder",
    "LULinear",
    "LowRankAffine",
    "LowerAffine",
    "Permute",
    "reflect",
    "times",
]

MAX_REFLECTIONS = 16


def _linear(x: Tensor, matrix: Tensor) -> Tensor:
    """``matrix @ x`` for vectors, batched where the matrix is."""
    if matrix.dim() == 2:
        return F.linear(x, matrix)
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def _solve(matrix: Tensor, x: Tensor, *, upper: bool, unit: bool) -> Tensor:
    """The inverse of a triangular ``matrix`` times vectors: one solve if one matrix serves all of them.

    The solver does not read the other triangle, nor the diagonal if it is a unit one.
    """
    rows = matrix.dim() == 2 and x.dim() > 1
    solved: Tensor = torch.linalg.solve_triangular(
        matrix.mT, x if rows else x.unsqueeze(-2), upper=not upper, left=False, unitriangular=unit
    )
    solved = solved if rows else solved.squeeze(-2)
    return solved


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix for row vectors; one matrix for the whole batch is one product.

    Example::

        >>> times(torch.ones(5, 2), torch.eye(2)).shape
        torch.Size([5, 2])
    """
    return x @ matrix if matrix.dim() == 2 else (x.unsqueeze(-2) @ matrix).squeeze(-2)


def reflect(x: Tensor, vectors: Tensor) -> Tensor:
    """Householder reflections ``x - 2 (v·x) v / |v|²``, one after another.

    :param x: shape ``(*, D)``.
    :param vectors: shape ``(*, K, D)``, of any length; a zero vector reflects nothing.
    :return: shape ``(*, D)``.

    Example::

        >>> reflect(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()
        [-1.0, -2.0]
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
    return x - times(times(x, units.mT), weights)


class ElementwiseAffine(ParametricTransform):
    r"""A location and a scale for each coordinate, :math:`f(x) = loc + e^{log\_scale} x`.

    :param dim: the length D of the vectors.
    :param scale: the scale to start from.
    :raises ValueError: if ``dim`` is not a positive integer or ``scale`` not positive.

    Shapes: input ``(*, D)``; ``loc`` and ``log_scale`` ``(D,)``, any real values.

    Example::

        >>> ElementwiseAffine(2, scale=0.5)(torch.ones(2))
        tensor([0.5000, 0.5000], grad_fn=<AddcmulBackward0>)
    """

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__(dim)
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.full((dim,), math.log(check_positive("scale", scale))))

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, log_scale = finite_scale(raw["log_scale"])
        y = torch.addcmul(raw["loc"], scale, x)
        return y, log_scale.sum(-1).expand(y.shape[:-1])

    def score_given(self, raw: Raw, x: Tensor, score: Tensor) -> Tensor:
        return score / finite_scale(raw["log_scale"])[0]

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        scale, log_scale = finite_scale(raw["log_scale"])
        x = (y - raw["loc"]) / scale
        return x, -log_scale.sum(-1).expand(x.shape[:-1])


class LowerAffine(ParametricTransform):
    r"""A location and a Cholesky factor, :math:`f(x) = loc + e^{log\_scale} \odot (x + Lx)`.

    L is strictly lower triangular: with x standard normal, f(x) is any multivariate normal.  The scale
    multiplies rows, so that L has no unit and one learning rate serves badly scaled coordinates.

    :param dim: the length D of the vectors.
    :param scale: the scale to start from.
    :raises ValueError: if ``dim`` is not a positive integer or ``scale`` not positive.

    Shapes: input ``(*, D)``; ``loc`` and ``log_scale`` ``(D,)``, ``lower`` ``(D, D)``, of which the part
    below the diagonal is used (absent if D = 1), any real values.

    Example::

        >>> flow = LowerAffine(3, scale=0.1)
        >>> flow.forward_and_log_det(torch.zeros(5, 3))[1].shape
        torch.Size([5])
    """

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__(dim)
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.full((dim,), math.log(check_positive("scale", scale))))
        if dim > 1:
            self.lower = nn.Parameter(torch.zeros(dim, dim))

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, log_scale = finite_scale(raw["log_scale"])
        if self.dim > 1:
            x = x + _linear(x, raw["lower"].tril(-1))
        y = torch.addcmul(raw["loc"], scale, x)
        return y, log_scale.sum(-1).expand(y.shape[:-1])

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.dim > 1:
            score = _solve(self.lower.detach().mT, score, upper=True, unit=True)
        return *self.forward_and_log_det(x), score / finite_scale(self.log_scale.detach())[0]

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        scale, log_scale = finite_scale(raw["log_scale"])
        x = (y - raw["loc"]) / scale
        if self.dim > 1:
            x = _solve(raw["lower"], x, upper=False, unit=True)
        return x, -log_scale.sum(-1).expand(x.shape[:-1])


class LULinear(ParametricTransform):
    r"""A linear map in triangular factors, :math:`f(x) = loc + L S U x`: any orientation-preserving mixing.

    L is unit lower triangular, U unit upper triangular, S diagonal and positive (Kingma and Dhariwal, *Glow*,
    2018, section 3.2, whose U has the diagonal; apart from it, small scales make no long inverse).  Starts as
    the identity.

    :param dim: the length D of the vectors.
    :raises ValueError: if ``dim`` is not a positive integer.

    Shapes: input ``(*, D)``; ``loc`` ``(D,)``, ``factors`` ``(D, D)``: L below the diagonal, U above it, and
    the logarithms of S on it; any real values.

    Example::

        >>> LULinear(3)(torch.ones(3)).tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.loc = nn.Parameter(torch.zeros(dim))
        self.factors = nn.Parameter(torch.zeros(dim, dim))

    @staticmethod
    def _scaled_upper(factors: Tensor) -> tuple[Tensor, Tensor]:
        scale, log_scale = finite_scale(factors.diagonal(dim1=-2, dim2=-1))
        return scale.unsqueeze(-1) * factors.triu(1) + torch.diag_embed(scale), log_scale.sum(-1)

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        upper, log_det = self._scaled_upper(raw["factors"])
        lower = raw["factors"].tril(-1)
        if upper.dim() == 2 and x.numel() >= upper.numel():  # many vectors: one product with each, not two
            matrix = torch.addmm(upper, lower, upper)
            loc = raw["loc"]
            y = F.linear(x, matrix, loc) if loc.dim() == 1 else loc + F.linear(x, matrix)
        else:
            x = _linear(x, upper)
            y = raw["loc"] + x + _linear(x, lower)
        return y, log_det.expand(y.shape[:-1])

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        factors = raw["factors"]
        scale, log_scale = finite_scale(factors.diagonal(dim1=-2, dim2=-1))
        x = _solve(factors, y - raw["loc"], upper=False, unit=True) / scale
        x = _solve(factors, x, upper=True, unit=True)
        return x, -log_scale.sum(-1).expand(x.shape[:-1])


class Householder(ParametricTransform):
    """Householder reflections one after another: any rotation, with as many as there are dimensions.

    Tomczak and Welling, *Improving Variational Auto-Encoders using Householder Flow*, 2016.  Volume
    preserving. Starts as the identity, for the vectors start in equal pairs.

    :param dim: the length D of the vectors.
    :param num_reflections: the number K, even; by default D, or D + 1, and at most 16.
    :raises ValueError: if a size is not a positive integer, or ``num_reflections`` odd.

    Shapes: input ``(*, D)``; ``vectors`` ``(K, D)`` (absent if D = 1), any real values.

    Example::

        >>> Householder(3)(torch.ones(3)).round(decimals=4).tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(self, dim: int, num_reflections: int | None = None) -> None:
        super().__init__(dim)
        if num_reflections is None:
            num_reflections = min(dim + dim % 2, MAX_REFLECTIONS)
        if check_positive_int("num_reflections", num_reflections) % 2:
            raise ValueError(f"num_reflections: expected an even number, got {num_reflections}")
        self.num_reflections = num_reflections
        if dim > 1:
            self.vectors = nn.Parameter(torch.randn(num_reflections // 2, dim).repeat_interleave(2, 0))

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        y = reflect(x, raw["vectors"]) if self.dim > 1 else x
        return y, y.new_zeros(y.shape[:-1])

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        x = reflect(y, raw["vectors"].flip(-2)) if self.dim > 1 else y
        return x, x.new_zeros(x.shape[:-1])

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_reflections={self.num_reflections}"


class ActNorm(ElementwiseAffine):
    """A location and a scale for each coordinate that can start from data.

    Kingma and Dhariwal, *Glow*, 2018, section 3.1.  :meth:`initialize` is an explicit step, so that neither a
    traced call nor a copy depends on whether a first batch was seen.

    :param dim: the length D of the vectors.
    :raises ValueError: if ``dim`` is not a positive integer.

    Example::

        >>> layer = ActNorm(2)
        >>> y = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> layer.initialize(y)
        >>> layer.inv(y).mean(0).tolist()
        [0.0, 0.0]
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    @torch.no_grad()
    def initialize(self, y: Tensor) -> None:
        """Sets location and scale so that the *inverse* of ``y``, ``(*, D)``, has mean 0 and variance 1.

        :raises ValueError: if ``y`` is of another length, has fewer than two vectors, or a coordinate does
            not vary.
        """
        if y.dim() == 0 or y.shape[-1] != self.dim:
            raise ValueError(f"y: expected shape (*, {self.dim}), got {tuple(y.shape)}")
        rows = y.reshape(-1, self.dim)
        spread = rows.std(0, correction=0) if len(rows) > 1 else rows.new_zeros(self.dim)
        if not bool((spread > 0).all() & spread.isfinite().all()):
            raise ValueError(f"y: expected at least 2 vectors that differ everywhere, got {tuple(y.shape)}")
        self.loc.copy_(rows.mean(0))
        self.log_scale.copy_(spread.log())


class LowRankAffine(ParametricTransform):
    r"""A location and diagonal + low-rank matrix, :math:`f(x) = loc + (diag(s) + W W^T) x`, s > 0.

    Memory and time grow linearly in D: the determinant by the matrix determinant lemma, the inverse by
    Woodbury's identity, both through the Cholesky factor of the small matrix
    :math:`I + W^T diag(s)^{-1} W`.

    :param dim: the length D of the vectors.
    :param rank: the number R of columns of W; by default the rounded square root of D.
    :param scale: the scale to start from.
    :raises ValueError: if ``dim`` or ``rank`` is not a positive integer or ``scale`` not positive.

    Shapes: input ``(*, D)``; ``loc`` and ``log_scale`` ``(D,)``, ``factor`` ``(D, R)``, any real values.

    Example::

        >>> LowRankAffine(1000).factor.shape
        torch.Size([1000, 32])
    """

    def __init__(self, dim: int, rank: int | None = None, scale: float = 1.0) -> None:
        super().__init__(dim)
        rank = round(math.sqrt(dim)) if rank is None else check_positive_int("rank", rank)
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.full((dim,), math.log(check_positive("scale", scale))))
        # Small but not zero: at W = 0 the gradient of W Wᵀ vanishes.
        size = 0.1 * math.sqrt(scale / (dim * rank))
        self.factor = nn.Parameter(size * torch.randn(dim, rank))

    @staticmethod
    def _factor(raw: Raw, scale: Tensor) -> Tensor:
        """W, as large beside the square roots of s as the small matrix can tell its 1 from rounding."""
        factor = raw["factor"]
        most = torch.finfo(factor.dtype).eps ** -0.5 / 16.0 * scale.sqrt().unsqueeze(-1)
        return torch.maximum(torch.minimum(factor, most), -most)

    def _parts(self, raw: Raw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """s, W, the factor of the small matrix, and the log-determinant."""
        scale, log_scale = finite_scale(raw["log_scale"])
        factor = self._factor(raw, scale)
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        cholesky = torch.linalg.cholesky(eye + factor.mT @ (factor / scale.unsqueeze(-1)))
        log_det = log_scale.sum(-1) + 2.0 * cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return scale, factor, cholesky, log_det

    @staticmethod
    def _solve(y: Tensor, scale: Tensor, factor: Tensor, cholesky: Tensor) -> Tensor:
        """The inverse of the matrix, which is symmetric, times vectors."""

        def solve(rest: Tensor) -> Tensor:
            rest = rest / scale
            inner = torch.cholesky_solve(_linear(rest, factor.mT).unsqueeze(-1), cholesky).squeeze(-1)
            return rest - _linear(inner, factor) / scale

        x = solve(y)
        # Where W is large beside s the difference cancels; what is left over is solved for once more.
        with torch.no_grad():
            correction = solve(y - scale * x - _linear(_linear(x, factor.mT), factor))
        return x + correction

    def forward_given(self, raw: Raw, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, factor, _, log_det = self._parts(raw)
        y = raw["loc"] + scale * x + _linear(_linear(x, factor.mT), factor)
        return y, log_det.expand(y.shape[:-1])

    def score_given(self, raw: Raw, x: Tensor, score: Tensor) -> Tensor:
        return self._solve(score, *self._parts(raw)[:3])

    def inverse_given(self, raw: Raw, y: Tensor) -> tuple[Tensor, Tensor]:
        scale, factor, cholesky, log_det = self._parts(raw)
        x = self._solve(y - raw["loc"], scale, factor, cholesky)
        return x, -log_det.expand(x.shape[:-1])


class Permute(FlowTransform):
    """A fixed permutation of the coordinates, :math:`f(x)_i = x_{p(i)}`.

    :param permutation: the integers 0 ... D - 1 in some order.
    :raises ValueError: if ``permutation`` is not a permutation.

    Example::

        >>> Permute([2, 0, 1])(torch.tensor([0.0, 1.0, 2.0]))
        tensor([2., 0., 1.])
    """

    def __init__(self, permutation: Sequence[int] | Tensor) -> None:
        order = torch.as_tensor(permutation, device="cpu")
        if order.dim() != 1 or sorted(order.tolist()) != list(range(len(order))):
            raise ValueError(
                f"permutation: expected the integers 0 to D - 1 in some order, got {permutation}"
            )
        super().__init__(len(order))
        inversions = sum(a > b for i, a in enumerate(order.tolist()) for b in order.tolist()[i + 1 :])
        self.sign = 1 - 2 * (inversions % 2)
        order = order.long().to(torch.get_default_device())
        self.permutation: Tensor
        self.inverse_permutation: Tensor
        self.register_buffer("permutation", order)
        self.register_buffer("inverse_permutation", order.argsort())

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., self.permutation], x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y[..., self.inverse_permutation], y.new_zeros(y.shape[:-1])
