"""The posteriors of the models in ``minibatch_models.py``: means, standard deviations and evidence.

What ``structured_truths.py`` has already stands in ``benchmarks/results/structured_truth.json``; the
others, which ``python -m benchmarks.fits.minibatches --truth`` computes, in ``minibatches_truth.json``.  The
locals of a million groups and the slopes are integrated in closed form, those of counts by adaptive
Gauss-Hermite quadrature.  What is left is a grid of the two roots, or weighted draws of more.  Of the
regression: draws from the normal at the mode, with their weights.
"""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor
from torch.distributions import Beta, HalfNormal, Normal
from torch.nn.functional import softplus

from benchmarks.common import structured_truths
from benchmarks.common.minibatch_models import counts
from benchmarks.common.results import Row
from benchmarks.common.structured_problem import F64, Problem
from benchmarks.common.structured_truths import LOG_TWO_PI, Given, Marginal, log_prior

RESULTS = Path(__file__).parents[1] / "results" / "minibatches_truth.json"
ROWS_AT_ONCE = 20_000
SLOPES_DRAWS, REGRESSION_DRAWS = 20_000, 20_000
NEW_GROUPS, NEW_SEED = 10, 11


def normal_groups(problem: Problem) -> Marginal:
    """Of the roots alone."""
    y, noise = problem.args

    def given(u: Tensor) -> Given:
        mu, tau = u[:, :1], u[:, 1:].exp()
        log_joint = Normal(0.0, 5.0).log_prob(mu[:, 0]) + log_prior(tau, HalfNormal(2.0)).squeeze(-1)
        for some_y, some_noise in zip(y.split(ROWS_AT_ONCE), noise.split(ROWS_AT_ONCE), strict=True):
            variance = tau.square() + some_noise.square()
            terms = variance.log() + (some_y - mu).square() / variance
            log_joint = log_joint - 0.5 * (terms.sum(-1) + len(some_y) * LOG_TWO_PI)
        return log_joint, {}, {}

    return Marginal(("mu", "log tau"), given)


def slopes(problem: Problem) -> Marginal:
    """Of the roots alone; the inverse of a matrix of 2 x 2 is written out."""
    x, y = problem.args
    size, length = y.shape
    sums = {"x": x.sum(-1), "xx": x.square().sum(-1), "y": y.sum(-1), "xy": (x * y).sum(-1)}
    square = float(y.square().sum())

    def given(u: Tensor) -> Given:
        (a, b), (s, t) = u[:, :2].unsqueeze(1).unbind(-1), u[:, 2:4].exp().unsqueeze(1).unbind(-1)
        rho, sigma = u[:, 4:5].tanh(), u[:, 5:].exp()
        noise = sigma.square()
        # Gram matrix and moments of y - a - b x.
        gram = torch.tensor(float(length), dtype=F64), sums["x"], sums["xx"]
        first = sums["y"] - a * gram[0] - b * gram[1]
        second = sums["xy"] - a * gram[1] - b * gram[2]
        rest = square + (-2.0 * (a * sums["y"] + b * sums["xy"])).sum(-1)
        rest = rest + (a.square() * gram[0] + 2.0 * a * b * gram[1] + b.square() * gram[2]).sum(-1)
        # The precision of a group's two coefficients given the roots, and the prior's determinant.
        det_prior = (s * t).square() * (1.0 - rho.square())
        p, q, r = (
            t.square() / det_prior + gram[0] / noise,
            -rho * s * t / det_prior + gram[1] / noise,
            s.square() / det_prior + gram[2] / noise,
        )
        det = p * r - q.square()
        quadratic = (r * first.square() - 2.0 * q * first * second + p * second.square()) / det
        log_p = -0.5 * (det.log() + det_prior.log() - quadratic / noise.square()).sum(-1)
        log_p = log_p - 0.5 * (rest / noise[:, 0] + size * length * (LOG_TWO_PI + noise[:, 0].log()))
        # LKJ(2) of one correlation is a Beta(2, 2) of (1 + rho) / 2.
        log_p = log_p + Beta(2.0, 2.0).log_prob(0.5 * (1.0 + rho[:, 0])) - math.log(2.0)
        log_p = log_p + (1.0 - rho[:, 0].square()).log() + Normal(0.0, 5.0).log_prob(u[:, :2]).sum(-1)
        scales = torch.cat([u[:, 2:4], u[:, 5:]], -1).exp()
        return log_p + log_prior(scales, HalfNormal(2.0)).sum(-1), {}, {}

    names = ("m[1]", "m[2]", "log t[1]", "log t[2]", "artanh C", "log sig")
    return Marginal(names, given, num_weighted=SLOPES_DRAWS)


def repeated_counts(problem: Problem) -> Marginal:
    """The locals whose moments are given are groups of another seed, which the roots have not seen."""
    (y,) = problem.args
    rows = torch.cat([counts(NEW_GROUPS, NEW_SEED), y]).sum(-1), y.shape[-1]
    x, w = (torch.from_numpy(values) for values in hermegauss(structured_truths.NODES))
    log_w = w.log() + 0.5 * x.square()

    def given(u: Tensor) -> Given:
        mu, tau = u[:, :1], u[:, 1:].exp()
        total, repeats = rows
        with torch.no_grad():
            mode = mu.expand(-1, len(total)).clone()
            for _ in range(12):
                rate = repeats * mode.exp()
                slope = total - rate - (mode - mu) / tau.square()
                mode = mode + (slope / (rate + tau.square().reciprocal())).clamp(-2.0, 2.0)
            sd = (repeats * mode.exp() + tau.square().reciprocal()).rsqrt()
        terms, nodes = [], []
        for node, log_weight in zip(x, log_w, strict=True):
            theta = mode + sd * node
            nodes.append(theta[:, :NEW_GROUPS])
            terms.append(total * theta - repeats * theta.exp() + Normal(mu, tau).log_prob(theta) + log_weight)
        stacked = torch.stack(terms)
        log_sum = stacked.logsumexp(0) + sd.log()
        weights, theta = stacked[..., :NEW_GROUPS].softmax(0), torch.stack(nodes)
        mean = (weights * theta).sum(0)
        variance = (weights * (theta - mean).square()).sum(0)
        log_joint = log_sum[:, NEW_GROUPS:].sum(-1) - (y + 1.0).lgamma().sum()
        log_joint = log_joint + Normal(0.0, 5.0).log_prob(mu[:, 0])
        log_joint = log_joint + log_prior(tau, HalfNormal(2.0)).squeeze(-1)
        return log_joint, {"new theta": mean}, {"new theta": variance}

    return Marginal(("mu", "log tau"), given)


def regression(problem: Problem) -> Row:
    """Newton's mode, and the weights of draws from the normal there."""
    x, y = problem.args
    design = torch.cat([torch.ones(len(x), 1, dtype=F64), x], -1)
    prior_sd = torch.tensor([2.0] + [1.0] * x.shape[-1], dtype=F64)
    mode = torch.zeros_like(prior_sd)
    for _ in range(20):
        share = (design @ mode).sigmoid()
        precision = (
            design.T @ ((share * (1.0 - share))[:, None] * design) + prior_sd.square().reciprocal().diag()
        )
        mode = mode + torch.linalg.solve(precision, design.T @ (y - share) - mode / prior_sd.square())
    covariance = torch.linalg.inv(precision)
    proposal = torch.distributions.MultivariateNormal(mode, covariance)
    torch.manual_seed(0)
    draws = proposal.sample((REGRESSION_DRAWS,))

    def log_joint(w: Tensor) -> Tensor:
        logits = w @ design.T
        return Normal(0.0, prior_sd).log_prob(w).sum(-1) + w @ (design.T @ y) - softplus(logits).sum(-1)

    log_weight = torch.cat([log_joint(w) for w in draws.split(structured_truths.CHUNK)])
    log_weight = log_weight - proposal.log_prob(draws)
    weights = log_weight.softmax(0)
    # The plain draws are a control: what they are off by chance is known.
    centred = draws - mode
    mean = mode + weights @ centred - centred.mean(0)
    variance = (
        weights @ centred.square() - centred.square().mean(0) + covariance.diagonal() - (mean - mode).square()
    )
    values = {"b": [mean[0], variance[0].sqrt()]}
    values |= {f"w[{i}]": [mean[i], variance[i].sqrt()] for i in range(1, len(mean))}
    scalars = {name: [float(value) for value in pair] for name, pair in values.items()}
    log_z = float(log_weight.logsumexp(0)) - math.log(len(draws))
    ess = float(1.0 / weights.square().sum())
    return {"how": "weighted draws", "scalars": scalars, "log_z": log_z, "ess": ess}


MARGINALS: Mapping[str, Callable[[Problem], Marginal]] = {
    "1,000,000 normal groups": normal_groups,
    "slopes of 20,000 groups": slopes,
    "20,000 groups of counts": repeated_counts,
}


def compute(problem: Problem) -> Row:
    """The truth of a problem that ``structured_truths.py`` does not have."""
    started = time.perf_counter()
    known = MARGINALS.get(problem.truth)
    row = regression(problem) if known is None else known(problem).moments()
    return row | {"seconds": time.perf_counter() - started}


def own_truths() -> dict[str, Row]:
    return structured_truths.read_truths(RESULTS)


def read_truths() -> dict[str, Row]:
    """Those of ``structured_truths.py`` too, by their names."""
    return structured_truths.read_truths() | own_truths()
