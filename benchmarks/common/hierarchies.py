"""Two hierarchical models with plates and loops, as users write them, whose posteriors are known exactly.

- ``radon``: log radon of 919 houses in the 85 counties of Minnesota, an intercept for each county; written
  with ``a[county]``, which does not broadcast over particles, and with ``a[..., county]``, which does.  The
  data are posteriordb's, the priors those of its ``radon_variable_intercept_centered``.
- ``walk``: a random walk with drift that is seen through noise, one site for each of its 100 steps.

The models are in the language that Pyro and NumPyro share: ``p`` and ``dist`` are of either.  Their *effects*
u are all sites but two scales.  Given these, tau and sigma, u is Gaussian:

    D u ~ N(0, tau² I),  u_i ~ N(0, 1 / p_i) where p_i > 0,  y ~ N(A u, sigma² I),

and so is its posterior, with precision diag(p) + DᵀD / tau² + AᵀA / sigma².  What is left, the posterior of
two numbers, is a sum over a grid.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from benchmarks.common.posteriors import read_data

Array = NDArray[np.float64]

NUM_COUNTIES, NUM_STEPS = 85, 100
WIDTH, SPACING, CHUNK = 8.0, 0.25, 64
"""The grid's half width and spacing, in standard deviations; points at a time."""


def radon(p: Any, dist: Any, intercepts: Callable[[Any, Any], Any], county: Any, floor: Any, y: Any) -> None:
    """``intercepts``: from those of the counties and the county of each house, those of the houses."""
    mu = p.sample("mu", dist.Normal(0.0, 10.0))
    beta = p.sample("beta", dist.Normal(0.0, 10.0))
    tau = p.sample("tau", dist.HalfNormal(1.0))
    sigma = p.sample("sigma", dist.HalfNormal(1.0))
    with p.plate("counties", NUM_COUNTIES):
        a = p.sample("a", dist.Normal(mu, tau))
    with p.plate("houses", len(y)):
        p.sample("y", dist.Normal(intercepts(a, county) + beta * floor, sigma), obs=y)


def plain(a: Any, county: Any) -> Any:
    return a[county]


def broadcasting(a: Any, county: Any) -> Any:
    return a[..., county]


def walk(p: Any, dist: Any, y: Any) -> None:
    drift = p.sample("drift", dist.Normal(0.0, 1.0))
    tau = p.sample("tau", dist.HalfNormal(1.0))
    sigma = p.sample("sigma", dist.HalfNormal(1.0))
    x = p.sample("x_0", dist.Normal(0.0, 5.0))
    p.sample("y_0", dist.Normal(x, sigma), obs=y[0])
    for t in range(1, len(y)):
        x = p.sample(f"x_{t}", dist.Normal(x + drift, tau))
        p.sample(f"y_{t}", dist.Normal(x, sigma), obs=y[t])


@dataclass(frozen=True)
class Hierarchy:
    """A model with its data, and what its posterior is computed from.

    :param names: of the M effects, by site and index from 1, as :func:`scoring.scalars` names them.
    :param differences: D, shape ``(J, M)``.
    :param design: A, shape ``(N, M)``.
    :param precision: p, shape ``(M,)``, 0 for effects whose prior is in D alone.
    """

    model: Callable[..., None]
    args: tuple[Tensor, ...]
    names: tuple[str, ...]
    y: Tensor = field(repr=False)
    differences: Tensor = field(repr=False)
    design: Tensor = field(repr=False)
    precision: Tensor = field(repr=False)

    def given(self, log_scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At log tau and log sigma, ``(*, 2)``: the log density of them and y, up to a constant, ``(*,)``;
        mean and Cholesky factor of the precision of the effects, ``(*, M)`` and ``(*, M, M)``."""
        tau, sigma = log_scales.exp().unbind(-1)
        prior, seen, moment = self._products
        precision = torch.diag(self.precision) + prior / tau.square()[..., None, None]
        factor = torch.linalg.cholesky(precision + seen / sigma.square()[..., None, None])
        moment = moment / sigma.square()[..., None]
        mean = torch.cholesky_solve(moment.unsqueeze(-1), factor).squeeze(-1)
        misfit = self.y.square().sum() / sigma.square() - (moment * mean).sum(-1)
        log_density = -0.5 * misfit - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_density = log_density - len(self.differences) * tau.log() - len(self.y) * sigma.log()
        # The half-normal priors, and the Jacobian of the logarithms.
        log_density = log_density - 0.5 * (tau.square() + sigma.square()) + log_scales.sum(-1)
        return log_density, mean, factor

    @cached_property
    def _products(self) -> tuple[Tensor, Tensor, Tensor]:
        moment = self.design.T @ self.y
        return self.differences.T @ self.differences, self.design.T @ self.design, moment

    def grid(self) -> tuple[Tensor, Tensor]:
        """Values of log tau and log sigma around the mode, ``(G, 2)``, and their probabilities, ``(G,)``."""

        def loss(point: Tensor) -> Tensor:
            return -self.given(point)[0]

        start = np.log([0.5, 0.5])
        mode = torch.from_numpy(minimize(lambda x: loss(torch.from_numpy(x)).item(), start, method="BFGS").x)
        curvature: Any = torch.autograd.functional.hessian(loss, mode)
        scale = torch.linalg.cholesky(curvature.inverse())
        axis = torch.linspace(-WIDTH, WIDTH, 1 + round(2 * WIDTH / SPACING), dtype=torch.float64)
        steps = torch.cartesian_prod(axis, axis)
        points = mode + steps @ scale.T
        weights = torch.cat([self.given(part)[0] for part in points.split(CHUNK)]).softmax(0)
        if (outside := float(weights[steps.abs().amax(-1) == WIDTH].sum())) > 1e-4:
            raise ValueError(f"expected a grid around the posterior, got {outside:.1e} of it on the border")
        return points, weights

    def exact(self, num_draws: int) -> dict[str, Array]:
        """Independent draws of each scalar, ``(num_draws,)``, from a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        points, weights = self.grid()
        counts = torch.multinomial(weights, num_draws, True, generator=generator).bincount(
            minlength=len(points)
        )
        points, counts = points[counts > 0], counts[counts > 0]
        effects = []
        for part, many in zip(points.split(CHUNK), counts.split(CHUNK), strict=True):
            _, means, factors = self.given(part)
            for mean, factor, count in zip(means, factors, many.tolist(), strict=True):
                noise = torch.randn(len(mean), count, generator=generator, dtype=torch.float64)
                effects.append(mean + torch.linalg.solve_triangular(factor.T, noise, upper=True).T)
        scales = points.exp().repeat_interleave(counts, 0).unbind(-1)
        columns = [*scales, *torch.cat(effects).unbind(-1)]
        return {
            name: values.numpy() for name, values in zip(("tau", "sigma", *self.names), columns, strict=True)
        }


def load_radon(folder: str | Path, intercepts: Callable[[Any, Any], Any]) -> Hierarchy:
    """Of a posteriordb folder: :func:`radon` with one way to index."""
    data = read_data(folder, "radon_mn")
    county, floor, y = data["county_idx"].long() - 1, data["floor_measure"], data["log_radon"]
    return radon_of(intercepts, county, floor, y)


def radon_of(intercepts: Callable[[Any, Any], Any], county: Tensor, floor: Tensor, y: Tensor) -> Hierarchy:
    eye, zeros = torch.eye(NUM_COUNTIES, dtype=torch.float64), torch.zeros(len(y), 1, dtype=torch.float64)
    return Hierarchy(
        lambda p, dist, *args: radon(p, dist, intercepts, *args),
        (county, floor, y),
        ("mu", "beta", *(f"a[{i}]" for i in range(1, NUM_COUNTIES + 1))),
        y.double(),
        torch.cat([-torch.ones_like(eye[:, :1]), torch.zeros_like(eye[:, :1]), eye], -1),
        torch.cat([zeros, floor.double().unsqueeze(-1), eye[county]], -1),
        torch.tensor([0.01, 0.01, *[0.0] * NUM_COUNTIES], dtype=torch.float64),
    )


def made_up_walk(num_steps: int = NUM_STEPS) -> Hierarchy:
    """:func:`walk` of as many steps, with data that it has drawn."""
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.normal(0.1, 0.5, num_steps))
    y = torch.from_numpy(x + rng.normal(0.0, 0.5, num_steps))
    eye = torch.eye(num_steps, dtype=torch.float64)
    zeros = torch.zeros(num_steps, 1, dtype=torch.float64)
    return Hierarchy(
        walk,
        (y.to(torch.get_default_dtype()),),
        ("drift", *(f"x_{t}" for t in range(num_steps))),
        y,
        torch.cat([zeros[1:] - 1.0, eye[1:] - eye[:-1]], -1),
        torch.cat([zeros, eye], -1),
        torch.tensor([1.0, 0.04, *[0.0] * (num_steps - 1)], dtype=torch.float64),
    )
