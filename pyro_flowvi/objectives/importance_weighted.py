"""The importance-weighted ELBO and its doubly reparameterised gradient."""

import math

import torch
from torch import Tensor

from .._checks import check_positive_int
from .path_gradient import TraceSTL_ELBO

__all__ = ["TraceIW_ELBO"]


class TraceIW_ELBO(TraceSTL_ELBO):
    """The importance-weighted ELBO, log of the mean of ``num_particles`` weights p / q.

    Burda, Grosse and Salakhutdinov 2016, equation 8.  With ``dreg`` its doubly reparameterised gradient
    (Tucker, Lawson, Gu and Maddison 2019, equation 8): path gradients weighted by the squares of the
    normalised weights, whose signal does not vanish with more particles.  Otherwise the gradient of the
    bound itself, by reparameterisation (Burda et al., equation 14).  Both are unbiased.

    Model parameters get the gradient of the bound.  A particle of density zero has its part in the mean,
    one whose density or gradient is NaN or infinite has not.

    :param num_particles: importance samples of the bound, at least 2.
    :param dreg: whether to take the doubly reparameterised gradient.
    :param max_plate_nesting: as in :class:`TraceSTL_ELBO`, as are the other keywords.
    :raises ValueError: if ``num_particles`` is below 2; at the first step as :class:`TraceSTL_ELBO`.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> elbo = TraceIW_ELBO(num_particles=64, vectorize_particles=True)
        >>> abs(elbo.loss(model, guide)) < 5.0
        True
    """

    def __init__(
        self,
        num_particles: int = 2,
        dreg: bool = True,
        *,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        retain_graph: bool | None = None,
    ) -> None:
        if check_positive_int("num_particles", num_particles) < 2:
            raise ValueError(f"num_particles: expected at least 2, got {num_particles}")
        super().__init__(num_particles, max_plate_nesting, vectorize_particles, retain_graph=retain_graph)
        self.dreg = self._path = bool(dreg)

    def _counts(self, weights: Tensor, good: Tensor) -> Tensor:
        return good | weights.isneginf()

    def _weigh(self, weights: Tensor, good: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = torch.where(good, weights, -torch.inf).logsumexp(0)
        shares = torch.where(good, (weights - total).exp(), 0.0)
        loss = self._counts(weights, good).sum().to(weights).log() - total
        return loss, shares.square(), shares
