"""The posteriors of the models in ``structured_models.py``: means, standard deviations and evidence.

Where the locals can be integrated given the hyperparameters u, in closed form or, for counts of groups, by
adaptive Gauss-Hermite quadrature, what is left are the few dimensions of log p(u, y): a grid around the mode
in two, 200,000 weighted draws from a multivariate t in more.  The other posteriors are NUTS's.  The results
are in ``benchmarks/results/structured_truth.json``, which ``python -m benchmarks.fits.structured
--truth`` writes.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import Beta, Binomial, HalfCauchy, HalfNormal, Normal, Poisson

from benchmarks.common import hierarchies
from benchmarks.common.results import Row
from benchmarks.common.structured_models import GROUP_SIZE
from benchmarks.common.structured_problem import F64, NUM_LOCALS, Problem, named

RESULTS = Path(__file__).parents[1] / "results" / "structured_truth.json"
SPACING, NUM_WEIGHTED, FREEDOM, CHUNK, NODES = 0.25, 200_000, 5.0, 100, 20
LOG_TWO_PI = math.log(2.0 * math.pi)

Given = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]
"""At n points: log p(u, y), ``(n,)``; by site the means and variances of the locals given u, ``(n, *)``."""


@dataclass(frozen=True)
class Marginal:
    """A posterior whose locals are integrated.

    :param names: of the coordinates of u, each as :class:`Problem` names the roots.
    :param given: from points u, ``(n, D)``.
    :param width: of the grid, in standard deviations of the Gaussian at the mode.
    :param num_weighted: draws in place of a grid.
    """

    names: tuple[str, ...]
    given: Callable[[Tensor], Given]
    width: float = 8.0
    start: float = 0.0
    num_weighted: int = NUM_WEIGHTED

    def mode(self) -> tuple[Tensor, Tensor]:
        """And a Cholesky factor of the covariance there."""

        def loss(point: Tensor) -> Tensor:
            return -self.given(point.unsqueeze(0))[0].squeeze(0)

        def with_gradient(x: Any) -> tuple[float, Any]:
            point = torch.tensor(x, dtype=F64, requires_grad=True)
            value = loss(point)
            (gradient,) = torch.autograd.grad(value, point)
            return value.item(), gradient.numpy()

        found = minimize(with_gradient, np.full(len(self.names), self.start), jac=True, method="BFGS")
        mode = torch.from_numpy(found.x)
        curvature: Any = torch.autograd.functional.hessian(loss, mode)
        return mode, torch.linalg.cholesky(torch.linalg.inv(curvature))

    def points(self) -> tuple[Tensor, Tensor, Tensor]:
        """Points ``(n, D)``, the logarithms of the volumes that they stand for, which are on the border."""
        mode, factor = self.mode()
        log_det, dim = factor.diagonal().log().sum(), len(mode)
        if self.on_a_grid:
            axis = SPACING * torch.arange(-round(self.width / SPACING), 1 + round(self.width / SPACING))
            steps = torch.cartesian_prod(axis, axis).to(F64)
            log_volumes = (log_det + dim * math.log(SPACING)).expand(len(steps))
            return mode + steps @ factor.T, log_volumes, steps.abs().amax(-1) >= self.width
        rng = np.random.default_rng(0)
        for size in (self.num_weighted // 10, self.num_weighted // 5, self.num_weighted):
            normal, chi2 = rng.standard_normal((size, dim)), rng.chisquare(FREEDOM, (size, 1))
            steps = torch.from_numpy(normal * np.sqrt(FREEDOM / chi2))
            kernel = -0.5 * (FREEDOM + dim) * (steps.square().sum(-1) / FREEDOM).log1p()
            constant = math.lgamma(0.5 * (FREEDOM + dim)) - math.lgamma(0.5 * FREEDOM)
            log_det = factor.diagonal().log().sum()
            log_density = kernel + constant - 0.5 * dim * math.log(FREEDOM * math.pi) - log_det
            points, log_volumes = mode + steps @ factor.T, -log_density - math.log(size)
            if size < self.num_weighted:
                # Scales near 0 have long tails, which the curvature at the mode does not see.
                with torch.no_grad():
                    log_joint = torch.cat([self.given(u)[0] for u in points.split(CHUNK)])
                weights = (log_joint + log_volumes).softmax(0)
                mode = weights @ points
                factor = torch.linalg.cholesky(points.T.cov(aweights=weights))
        return points, log_volumes, torch.zeros(size, dtype=torch.bool)

    @property
    def on_a_grid(self) -> bool:
        return len(self.names) == 2

    def moments(self) -> Row:
        """Of the whole posterior: [mean, sd] by name, and log p(y)."""
        points, log_volumes, border = self.points()
        with torch.no_grad():
            return self._moments(points, log_volumes, border)

    def _moments(self, points: Tensor, log_volumes: Tensor, border: Tensor) -> Row:
        log_weights, parts = [], []
        for u, volumes in zip(points.split(CHUNK), log_volumes.split(CHUNK), strict=True):
            log_joint, means, variances = self.given(u)
            log_weights.append(log_joint + volumes)
            found = {name: (value, 0.0 * value) for name, value in zip(self.names, u.unbind(-1), strict=True)}
            for site in means:
                some, spread = (named(site, values[site], NUM_LOCALS) for values in (means, variances))
                found |= {name: (some[name], spread[name]) for name in some}
            parts.append(found)
        log_weight = torch.cat(log_weights)
        weights = log_weight.softmax(0)
        if (outside := float(weights[border].sum())) > 1e-6:
            raise ValueError(f"expected a grid around the posterior, got {outside:.1e} of it on the border")
        scalars = {}
        for name in parts[0]:
            centres, spreads = (torch.cat([part[name][i] for part in parts]) for i in (0, 1))
            mean = weights @ centres
            scalars[name] = [float(mean), float((weights @ (spreads + (centres - mean).square())).sqrt())]
        row: Row = {"how": "grid" if self.on_a_grid else "weighted draws", "scalars": scalars}
        row["log_z"] = float(log_weight.logsumexp(0))
        return row if self.on_a_grid else row | {"ess": float(1.0 / weights.square().sum())}


def log_prior(scale: Tensor, prior: Any) -> Tensor:
    """Of the logarithm of a scale."""
    density: Tensor = prior.log_prob(scale) + scale.log()
    return density


def normal_groups(problem: Problem) -> Marginal:
    y, noise = problem.args
    schools = problem.truth == "eight schools"
    prior = HalfCauchy(torch.tensor(5.0, dtype=F64)) if schools else HalfNormal(torch.tensor(2.0, dtype=F64))

    def given(u: Tensor) -> Given:
        mu, tau = u[:, :1], u[:, 1:].exp()
        total = tau.square() + noise.square()
        log_joint = Normal(mu, total.sqrt()).log_prob(y).sum(-1) + Normal(0.0, 5.0).log_prob(mu[:, 0])
        mean = mu + tau.square() / total * (y - mu)
        variance = tau.square() * noise.square() / total
        return log_joint + log_prior(tau, prior).squeeze(-1), {"theta": mean}, {"theta": variance}

    return Marginal(("mu", "log tau"), given, 40.0 if len(y) <= 100 else 8.0)


def count_groups(problem: Problem) -> Marginal:
    y, trials = problem.args
    x, w = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(NODES))
    log_w = w.log() + 0.5 * x.square()

    def likelihood(theta: Tensor) -> Any:
        if "Poisson" in problem.truth:
            return Poisson(theta.exp()).log_prob(y)
        return Binomial(trials, logits=theta, validate_args=False).log_prob(y)

    def slopes(theta: Tensor) -> tuple[Tensor, Tensor]:
        """First and minus second derivatives of the log likelihood."""
        if "Poisson" in problem.truth:
            return y - theta.exp(), theta.exp()
        share = theta.sigmoid()
        return y - trials * share, trials * share * (1.0 - share)

    def given(u: Tensor) -> Given:
        mu, tau = u[:, :1], u[:, 1:].exp()
        with torch.no_grad():
            mode = mu.expand(-1, len(y)).clone()
            for _ in range(12):
                gradient, curvature = slopes(mode)
                step = (gradient - (mode - mu) / tau.square()) / (curvature + tau.square().reciprocal())
                mode = mode + step.clamp(-2.0, 2.0)
            sd = (slopes(mode)[1] + tau.square().reciprocal()).rsqrt()
        log_sum, nodes, terms = None, [], []
        for node, log_weight in zip(x, log_w, strict=True):
            theta = mode + sd * node
            nodes.append(theta)
            terms.append(likelihood(theta) + Normal(mu, tau).log_prob(theta) + log_weight + sd.log())
        stacked, theta = torch.stack(terms), torch.stack(nodes)
        log_sum = stacked.logsumexp(0)
        weights = (stacked - log_sum).exp()
        mean = (weights * theta).sum(0)
        variance = (weights * (theta - mean).square()).sum(0)
        log_joint = log_sum.sum(-1) + Normal(0.0, 5.0).log_prob(mu[:, 0])
        log_joint = log_joint + log_prior(tau, HalfNormal(2.0)).squeeze(-1)
        return log_joint, {"theta": mean}, {"theta": variance}

    return Marginal(("mu", "log tau"), given)


def grouped_regression(
    m: Tensor, factor: Tensor, sigma: Tensor, gram: Tensor, moment: Tensor, square: Tensor, size: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y_j ~ N(X_j b_j, sigma² I), b_j ~ N(m, L Lᵀ) at n points: log p(y), and means and variances of b.

    :param m: shape ``(n, 2)``; ``factor``, L, ``(n, 2, 2)``; ``sigma`` ``(n,)``.
    :param gram: X_jᵀ X_j, shape ``(J, 2, 2)``; ``moment``, X_jᵀ y_j, ``(J, 2)``.
    :param square: y_jᵀ y_j, shape ``(J,)``; ``size`` the length of y_j.
    """
    m, factor, noise = m.unsqueeze(1), factor.unsqueeze(1), sigma[:, None].square()
    pulled = (gram @ m.unsqueeze(-1)).squeeze(-1)
    residual = moment - pulled
    rest = square - 2.0 * (moment * m).sum(-1) + (pulled * m).sum(-1)
    inner = torch.eye(2, dtype=F64) + factor.mT @ gram @ factor / noise[..., None, None]
    root = torch.linalg.cholesky(inner)
    turned = (factor.mT @ residual.unsqueeze(-1)) / noise[..., None, None]
    solved = torch.cholesky_solve(turned, root)
    quadratic = rest / noise - (turned * solved).sum((-2, -1))
    log_det = 2.0 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + size * noise.log()
    log_p = -0.5 * (size * LOG_TWO_PI + log_det + quadratic).sum(-1)
    mean = m + (factor @ solved).squeeze(-1)
    half = torch.linalg.solve_triangular(root, factor.mT.expand_as(root), upper=False)
    return log_p, mean, half.square().sum(-2)


def slopes(problem: Problem) -> Marginal:
    x, y = (values.reshape(-1, GROUP_SIZE) for values in problem.args[-2:])
    design = torch.stack([torch.ones_like(x), x], -1)
    gram, moment = design.mT @ design, (design.mT @ y.unsqueeze(-1)).squeeze(-1)
    data = gram, moment, y.square().sum(-1), torch.full((len(y),), float(y.shape[1]), dtype=F64)

    def given(u: Tensor) -> Given:
        m, t, rho, sigma = u[:, :2], u[:, 2:4].exp(), u[:, 4].tanh(), u[:, 5].exp()
        rest = (1.0 - rho.square()).sqrt()
        factor = torch.stack([t[:, 0], torch.zeros_like(rho), t[:, 1] * rho, t[:, 1] * rest], -1)
        log_p, mean, variance = grouped_regression(m, factor.reshape(-1, 2, 2), sigma, *data)
        # LKJ(2) of one correlation is a Beta(2, 2) of (1 + rho) / 2.
        log_p = log_p + Beta(2.0, 2.0).log_prob(0.5 * (1.0 + rho)) - math.log(2.0) + 2.0 * rest.log()
        log_p = log_p + Normal(0.0, 5.0).log_prob(m).sum(-1) + log_prior(t, HalfNormal(2.0)).sum(-1)
        return log_p + log_prior(sigma, HalfNormal(2.0)), {"ab": mean}, {"ab": variance}

    return Marginal(("m[1]", "m[2]", "log t[1]", "log t[2]", "artanh C", "log sig"), given)


def radon_slopes(problem: Problem) -> Marginal:
    county, floor, y = problem.args
    design = torch.stack([torch.ones_like(floor), floor], -1)
    pieces = design[:, :, None] * design[:, None], design * y[:, None], y.square(), torch.ones_like(y)
    data = [piece.new_zeros(hierarchies.NUM_COUNTIES, *piece.shape[1:]) for piece in pieces]
    data = [total.index_add(0, county, piece) for total, piece in zip(data, pieces, strict=True)]

    def given(u: Tensor) -> Given:
        m, scales = u[:, :2], u[:, 2:].exp()
        log_p, mean, variance = grouped_regression(m, torch.diag_embed(scales[:, :2]), scales[:, 2], *data)
        log_p = log_p + Normal(0.0, 10.0).log_prob(m).sum(-1) + log_prior(scales, HalfNormal(1.0)).sum(-1)
        return log_p, *({"a": value[..., 0], "b": value[..., 1]} for value in (mean, variance))

    return Marginal(("mu_a", "mu_b", "log tau_a", "log tau_b", "log sigma"), given)


def three_levels(problem: Problem) -> Marginal:
    y = problem.args[0].permute(2, 1, 0)
    schools, classes, pupils = y.shape
    means = y.mean(-1)
    top = means.mean(-1)
    within = (y - means[..., None]).square().sum()
    between = pupils * (means - top[:, None]).square().sum()

    def given(u: Tensor) -> Given:
        mu, (ta, tb, sigma) = u[:, 0], u[:, 1:].exp().unbind(-1)
        # The eigenvalues of the covariance of a school, and the squares in their spaces.
        low = sigma.square()
        middle = low + pupils * tb.square()
        high = middle + pupils * classes * ta.square()
        ends = pupils * classes * (top - mu[:, None]).square().sum(-1)
        terms = (
            (low, schools * classes * (pupils - 1), within),
            (middle, schools * (classes - 1), between),
            (high, schools, ends),
        )
        log_p = -0.5 * sum(count * (LOG_TWO_PI + v.log()) + squares / v for v, count, squares in terms)
        log_p = log_p + Normal(0.0, 5.0).log_prob(mu) + log_prior(u[:, 1:].exp(), HalfNormal(2.0)).sum(-1)
        noise = (middle / (pupils * classes))[:, None]
        share = ta.square()[:, None] / (ta.square()[:, None] + noise)
        mean, variance = mu[:, None] + share * (top - mu[:, None]), share * noise
        # Of a class given its school, and then with what is not known of the school.
        left = (low / pupils / (tb.square() + low / pupils))[:, None, None]
        of_class = means.mT + left * (mean[:, None] - means.mT)
        spread = left * tb[:, None, None].square() + left.square() * variance[:, None]
        variances = {"a": variance.expand_as(mean), "c": spread.expand_as(of_class)}
        return log_p, {"a": mean, "c": of_class}, variances

    return Marginal(("mu", "log ta", "log tb", "log sig"), given)


def walk(problem: Problem) -> Marginal:
    exact = hierarchies.made_up_walk(len(problem.args[0]))
    effects = len(exact.names)
    picks = torch.zeros(effects, 11, dtype=F64)
    wanted = named("x", torch.arange(1, effects).unsqueeze(0), NUM_LOCALS)
    index = [0, *(int(value) for value in wanted.values())]
    picks[index, range(len(index))] = 1.0
    known = exact.precision[exact.precision > 0]
    # What ``given`` leaves out: the constants of the normal densities and of the half-normal priors.
    constant = 0.5 * float(known.log().sum()) + math.log(2.0 / math.pi)
    constant -= 0.5 * LOG_TWO_PI * (len(known) + len(exact.differences) + len(exact.y) - effects)

    def given(u: Tensor) -> Given:
        log_p, mean, factor = exact.given(u)
        half = torch.linalg.solve_triangular(factor, picks.expand(len(u), -1, -1), upper=False)
        variance = half.square().sum(-2)[:, : len(index)]
        # The indices are those of ``named`` already.
        columns = (values.unbind(-1) for values in (mean[:, index], variance))
        means, variances = (dict(zip(["drift", *wanted], values, strict=True)) for values in columns)
        return log_p + constant, means, variances

    return Marginal(("log tau", "log sigma"), given)


MARGINALS: Mapping[str, Callable[[Problem], Marginal]] = {
    "eight schools": normal_groups,
    "100 normal groups": normal_groups,
    "1,000 normal groups": normal_groups,
    "10,000 normal groups": normal_groups,
    "2,000 Poisson groups": count_groups,
    "2,000 binomial groups": count_groups,
    "slopes": slopes,
    "three levels": three_levels,
    "radon slopes": radon_slopes,
    "walk": walk,
}


def compute(problem: Problem) -> Row:
    """The truth of a problem of :data:`MARGINALS`."""
    started = time.perf_counter()
    row = MARGINALS[problem.truth](problem).moments()
    return row | {"seconds": time.perf_counter() - started}


def read_truths(path: Path = RESULTS) -> dict[str, Row]:
    found: dict[str, Row] = json.loads(path.read_text()) if path.exists() else {}
    return found


def truth(problem: Problem, path: Path = RESULTS) -> Row:
    """What is known of a posterior: "scalars" are [mean, sd] by name, "log_z" is log p(y) or None."""
    return read_truths(path)[problem.truth]


def errors(draws: Mapping[str, Tensor], truth: Row) -> Row:
    """The worst error of a mean, in sds, and which it is; the lowest and highest ratio of sds, and which."""
    off, ratios = {}, {}
    for name, values in draws.items():
        mean, sd, *_ = truth["scalars"][name]
        off[name] = abs(float(values.mean()) - mean) / sd
        ratios[name] = float(values.std()) / sd
    worst, low, high = max(off, key=off.__getitem__), *(f(ratios, key=ratios.__getitem__) for f in (min, max))
    found: Row = {"worst_mean": off[worst], "worst_name": worst}
    found |= {"sd_low": ratios[low], "sd_low_name": low, "sd_high": ratios[high], "sd_high_name": high}
    return found
