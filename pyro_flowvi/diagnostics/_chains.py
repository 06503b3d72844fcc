"""Many short chains of Hamiltonian Monte Carlo at once, in whitened coordinates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

__all__ = ["LEAPS_ALONE", "ChainStates", "Chains", "Whitening", "guarded", "run_chains"]

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]
TARGET: Final = 0.8
"""Acceptance to which step sizes are adapted (Beskos et al. 2013: .65 is optimal, .8 safe for few steps)."""
LEAPS: Final = (2, 8)
"""Least and most leapfrog steps of a trajectory."""
LENGTH: Final = 2.4
"""Length of a trajectory: between a quarter and a half of the period of a standard normal."""
LEAPS_ALONE: Final = 5
"""Leapfrog steps where all chains have step sizes of their own."""
MOST_ROUNDING: Final = 1e3
"""Nats of rounding in a log density above which it is none, as a difference of gamma functions far out."""
MAX_FULL_DIM: Final = 200
"""Up to this many latents the covariance is full, above it diagonal."""


@dataclass(frozen=True)
class Whitening:
    """z = loc + L u, with the mean and covariance of a guide's draws."""

    loc: Tensor
    factor: Tensor
    """Lower triangular, ``(D, D)``, or the diagonal, ``(D,)``."""

    @classmethod
    def of(cls, z: Tensor) -> "Whitening":
        """From draws of shape ``(S, D)``."""
        z = z.double()
        loc, (size, dim) = z.mean(0), z.shape
        scale = z.std(0).clamp_min(1e-12)
        if dim > MAX_FULL_DIM or size < 20 * dim:
            return cls(loc, scale)
        correlation = torch.cov(((z - loc) / scale).T).reshape(dim, dim)
        factor, failed = torch.linalg.cholesky_ex(correlation + 1e-9 * torch.eye(dim).to(z))
        return cls(loc, scale) if failed else cls(loc, scale.unsqueeze(-1) * factor)

    def __call__(self, z: Tensor) -> Tensor:
        """Whitened coordinates of ``z``, ``(*, D)``."""
        centred = z.double() - self.loc
        if self.factor.dim() == 1:
            return centred / self.factor
        flat = centred.reshape(-1, len(self.loc)).T
        solved: Tensor = torch.linalg.solve_triangular(self.factor, flat, upper=False)
        return solved.T.reshape(centred.shape)

    def inverse(self, u: Tensor) -> Tensor:
        """``z`` of whitened coordinates."""
        return self.loc + (u * self.factor if self.factor.dim() == 1 else u @ self.factor.T)

    def gradient(self, g: Tensor) -> Tensor:
        """The gradient by ``u`` of one by ``z``."""
        return g * self.factor if self.factor.dim() == 1 else g @ self.factor

    @property
    def log_det(self) -> float:
        """log |dz/du|."""
        diagonal = self.factor if self.factor.dim() == 1 else self.factor.diagonal()
        return float(diagonal.log().sum())


def guarded(value_and_grad: ValueAndGrad, whitening: Whitening, like: Tensor) -> ValueAndGrad:
    """The density of whitened points: float64, and -inf with gradient 0 where the model fails.

    :param like: a tensor of the model's dtype and device.
    """

    def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return value_and_grad(z)
        except (ValueError, RuntimeError):  # a Cholesky factor, say, that one of the points has not
            if len(z) == 1:
                return z.new_full((1,), -torch.inf), torch.zeros_like(z)
        half = len(z) // 2
        (a, b), (c, d) = evaluate(z[:half]), evaluate(z[half:])
        return torch.cat([a, c]), torch.cat([b, d])

    most = MOST_ROUNDING / torch.finfo(like.dtype).eps

    def density(u: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = evaluate(whitening.inverse(u).to(like))
        value, gradient = value.double(), whitening.gradient(gradient.double())
        bad = ~(value.isfinite() & (value < most) & gradient.isfinite().all(-1))
        return value.masked_fill(bad, -torch.inf), gradient.masked_fill(bad.unsqueeze(-1), 0.0)

    return density


@dataclass(frozen=True)
class Chains:
    """What :func:`run_chains` saw.

    :param states: whitened states after the warm-up, ``(T, P, D)``.
    :param log_p: their log densities, ``(T, P)``.
    :param acceptance: mean acceptance of each chain after the warm-up, ``(P,)``.
    :param num_gradients: gradients of the density that were computed, for all chains.
    """

    states: Tensor
    log_p: Tensor
    acceptance: Tensor
    num_gradients: int


@dataclass(frozen=True)
class ChainStates:
    """What the probes' chains saw, as points of the unconstrained space.

    :param start: where each chain started, ``(P, D)``.
    :param states: after the warm-up, ``(T, P, D)``.
    :param from_guide: which started at draws of the guide, ``(P,)``.
    :param density: points to log densities and gradients.
    """

    start: Tensor
    states: Tensor
    from_guide: Tensor
    density: ValueAndGrad


def run_chains(
    density: ValueAndGrad,
    start: Tensor,
    groups: Tensor,
    temperature: Callable[[float], Tensor],
    warmup: int,
    evaluations: int,
) -> Chains:
    """Runs all chains at once until each has used its gradients.

    Chains of group 0 share one step size, so that adapting it hardly disturbs their law; each of the
    others, which start anywhere, has its own.

    :param density: whitened points, ``(P, D)``, to log densities and gradients.
    :param start: ``(P, D)``, at which the density is finite.
    :param groups: 0 or 1 of each chain, ``(P,)``.
    :param temperature: share of the gradients used, from 0 to 1 -> temperature of each chain, ``(P,)``.
    :param warmup: iterations that adapt and are dropped.
    :param evaluations: gradients for each chain.
    """
    u, (size, dim) = start, start.shape
    log_p, gradient = density(u)
    shared = groups == 0
    # A first step moves a chain by a few units at most, however steep the density where it starts.
    steep = gradient.norm(dim=-1) / dim**0.5
    log_step = (
        (0.7 * dim**-0.25 * torch.ones(size).to(u)).minimum(2.0 * steep.clamp_min(1e-300).rsqrt()).log()
    )
    log_step[shared] = log_step[shared].median() if bool(shared.any()) else 0.0
    states, densities, rates, used, iteration = [], [], [], 1, 0
    while used < evaluations:
        beta = 1.0 / temperature(used / evaluations)
        step = log_step.exp() * (0.7 + 0.5 * torch.rand(size).to(u))
        leaps = LEAPS_ALONE
        if bool(shared.any()):
            leaps = min(max(round(LENGTH / float(log_step[shared].median().exp())), LEAPS[0]), LEAPS[1])
        new_u, new_log_p, new_gradient, energy = _trajectory(density, u, log_p, gradient, beta, step, leaps)
        used += leaps
        rate = energy.clamp(max=0.0).exp()
        accept = torch.rand(size).to(u) < rate
        u = torch.where(accept.unsqueeze(-1), new_u, u)
        gradient = torch.where(accept.unsqueeze(-1), new_gradient, gradient)
        log_p = torch.where(accept, new_log_p, log_p)
        if iteration < warmup:
            gain = 1.5 / (1.0 + iteration / 5.0) ** 0.6
            change = gain * (rate - TARGET)
            change[shared] = change[shared].mean() if bool(shared.any()) else 0.0
            log_step = (log_step + change).clamp(max=0.3)
        else:
            states.append(u)
            densities.append(log_p)
            rates.append(rate)
        iteration += 1
    return Chains(torch.stack(states), torch.stack(densities), torch.stack(rates).mean(0), used * size)


def _trajectory(
    density: ValueAndGrad,
    u: Tensor,
    log_p: Tensor,
    gradient: Tensor,
    beta: Tensor,
    step: Tensor,
    leaps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The end of a leapfrog trajectory and the log of its acceptance ratio."""
    momentum = torch.randn_like(u)
    before = beta * log_p - 0.5 * momentum.square().sum(-1)
    size, inverse = step.unsqueeze(-1), beta.unsqueeze(-1)
    new_u, new_log_p, lost = u, log_p, torch.zeros_like(log_p, dtype=torch.bool)
    for _ in range(leaps):
        momentum = momentum + 0.5 * size * inverse * gradient
        moved = new_u + size * momentum
        lost = lost | ~(moved.abs() < 1e8).all(-1)
        new_u = torch.where(lost.unsqueeze(-1), u, moved)
        new_log_p, gradient = density(new_u)
        momentum = momentum + 0.5 * size * inverse * gradient
    energy = beta * new_log_p - 0.5 * momentum.square().sum(-1) - before
    energy = torch.where(lost | energy.isnan(), -torch.inf, energy)
    return new_u, new_log_p, gradient, energy
