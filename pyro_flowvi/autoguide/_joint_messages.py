"""Messages to latents whose prior is a multivariate normal."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._coupling import lower_of, raw_of
from ._fixed import Fixed

__all__ = ["JointMessages"]

MOST_LOG_FACTOR = 4.0
"""Bound of what the roots add to the logarithm of a factor."""


class JointMessages(Fixed):
    """Factors exp(gᵀ(z - a) - (z - a)ᵀ W Wᵀ (z - a) / 2) for N latents of K numbers each.

    In the coordinates w = S⁻¹ (z - l) of the prior N(l, S Sᵀ) the product has the precision I + Sᵀ W Wᵀ S,
    which is well conditioned for whatever prior.  W is kept in the latents' own coordinates, where it does
    not turn with S.

    :param shape: ``(*, K)``.
    :param num_roots: how many roots the messages move with, 0 for none.
    :param scale: standard deviation that a message alone has at first.
    """

    names = ("centre", "slope", "factor", "slope_by_root", "log_weight_by_root", "unit")
    trained = "slope", "factor"
    """Of these what is trained in a frame."""
    fixed_centre: Tensor | None
    fixed_slope: Tensor
    fixed_factor: Tensor
    fixed_unit: Tensor

    def __init__(self, shape: Sequence[int], num_roots: int, scale: float) -> None:
        super().__init__()
        *rows, self.width = shape
        self.num = math.prod(rows)
        self.shape = self.num, self.width
        self.centre = nn.Parameter(torch.zeros(self.num, self.width))
        self.slope = nn.Parameter(torch.zeros(self.num, self.width))
        factor = torch.diag_embed(torch.full((self.num, self.width), -math.log(scale)))
        self.factor = nn.Parameter(factor)
        """Lower factors W, on the diagonal their logarithms."""
        if num_roots:
            self.slope_by_root = nn.Parameter(torch.zeros(num_roots, self.num * self.width))
            self.log_weight_by_root = nn.Parameter(torch.zeros(num_roots, self.num))

    def _given(self, moved: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Centres, slopes and factors W for roots that have ``moved``, ``(P, R)``."""
        own = lower_of(self.factor)
        centre: Tensor = self.fixed_or("centre")
        slope: Tensor
        if self.fixed_centre is None:
            slope, factor = self.slope, own
        else:
            slope = self.fixed_slope + (self.fixed_unit @ self.slope.unsqueeze(-1)).squeeze(-1)
            factor = self.fixed_factor @ own
        by_root = self.fixed_or("slope_by_root"), self.fixed_or("log_weight_by_root")
        if moved is None or by_root[0] is None:
            return centre, slope.unsqueeze(0), factor.unsqueeze(0)
        slope = slope + (moved @ by_root[0]).reshape(-1, self.num, self.width)
        weight = (0.5 * moved @ by_root[1]).clamp(-MOST_LOG_FACTOR, MOST_LOG_FACTOR).exp()
        return centre, slope, factor * weight.unsqueeze(-1).unsqueeze(-1)

    def by_row(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """A site's priors by latent, ``(P, N, K)`` and ``(P, N, K, K)``."""
        return loc.reshape(-1, *self.shape), scale.reshape(-1, *self.shape, self.width)

    def _place(self, loc: Tensor, scale: Tensor, moved: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of the precision, in the prior's coordinates."""
        centre, slope, factor = self._given(moved)
        spread = factor.mT @ scale
        eye = torch.eye(self.width, dtype=scale.dtype, device=scale.device)
        precision = torch.linalg.cholesky(eye + spread.mT @ spread)
        offset = (loc - centre).unsqueeze(-1)
        pull = scale.mT @ slope.unsqueeze(-1) - spread.mT @ (factor.mT @ offset)
        return torch.cholesky_solve(pull, precision), precision

    def _log_det(self, scale: Tensor, precision: Tensor) -> Tensor:
        log_det: Tensor = (_log_diagonal(scale) - _log_diagonal(precision)).sum(-1)
        return log_det

    def forward_and_log_det(
        self, x: Tensor, loc: Tensor, scale: Tensor, moved: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Latents of noise ``(P, N, K)``, and log |det| of each, ``(P, N)``."""
        mean, precision = self._place(loc, scale, moved)
        w = mean + torch.linalg.solve_triangular(precision.mT, x.unsqueeze(-1), upper=True)
        z = loc + (scale @ w).squeeze(-1)
        return z, self._log_det(scale, precision).expand(z.shape[:-1])

    def push(self, score: Tensor, loc: Tensor, scale: Tensor, moved: Tensor | None) -> Tensor:
        """J⁻ᵀ score, with the Jacobian J of :meth:`forward_and_log_det` by the noise; ``(P, N, K)``."""
        precision = self._place(loc, scale, moved)[1]
        turned = precision @ score.unsqueeze(-1)
        pushed: Tensor = torch.linalg.solve_triangular(scale.mT, turned, upper=True).squeeze(-1)
        return pushed

    def inverse_and_log_det(
        self, z: Tensor, loc: Tensor, scale: Tensor, moved: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Noise of latents ``(P, N, K)``, and log |det| of the inverse."""
        mean, precision = self._place(loc, scale, moved)
        w = torch.linalg.solve_triangular(scale, (z - loc).unsqueeze(-1), upper=False)
        x = (precision.mT @ (w - mean)).squeeze(-1)
        return x, -self._log_det(scale, precision).expand(z.shape[:-1])

    def as_fixed(self) -> dict[str, Tensor]:
        own = self.own_numbers()
        own["factor"] = own["unit"] = lower_of(own["factor"])
        return own

    @torch.no_grad()
    def leave(self) -> None:
        if self.fixed_centre is None:
            return
        centre, slope, factor = self._given(None)
        self.set_fixed(
            {
                "centre": centre,
                "slope": slope[0],
                "factor": raw_of(factor[0]),
                "slope_by_root": self.fixed_or("slope_by_root"),
                "log_weight_by_root": self.fixed_or("log_weight_by_root"),
            },
            own=True,
        )


def _log_diagonal(lower: Tensor) -> Tensor:
    return lower.diagonal(dim1=-2, dim2=-1).log()
