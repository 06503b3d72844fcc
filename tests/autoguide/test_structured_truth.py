"""Centred hierarchies, as users write them, fitted at the defaults: against closed forms and quadrature."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Binomial, HalfNormal, Normal, Poisson, Uniform

from benchmarks.common import structured_models as models
from benchmarks.common import structured_truths as truths
from pyro_flowvi import AutoRealNVP, fit

NUM_DRAWS = 20_000


EARLY = pytest.mark.xfail(reason="few latents: the fit ends with an sd of the roots 11 to 17 % narrow")


def fitted(model, *args, **options):
    guide = AutoRealNVP(model)
    result = fit(model, guide, *args, seed=0, progress=False, **options)
    assert guide.structure.taken
    pyro.set_rng_seed(1)
    return guide.sample_posterior(NUM_DRAWS), result


def check(draws, truth, mean=0.1, sd=0.1):
    """Each scalar's mean within 0.1 sd, its sd within 10 %."""
    for name, (centre, spread) in truth.items():
        values = draws[name]
        assert abs(float(values.mean()) - centre) <= mean * spread, name
        assert abs(math.log(float(values.std()) / spread)) <= sd, name


def moments(log_weight, values):
    """Mean and standard deviation over the points of a grid, by name."""
    weight = (log_weight - log_weight.logsumexp(0)).exp()
    found = {}
    for name, value in values.items():
        centre = float(weight @ value)
        found[name] = centre, math.sqrt(float(weight @ (value - centre) ** 2))
    return found


def grid(*axes):
    """Points of a grid, and whether each is on its border."""
    points = torch.cartesian_prod(*(torch.linspace(low, high, num) for low, high, num in axes))
    border = torch.zeros(len(points), dtype=torch.bool)
    for column, (low, high, _) in zip(points.unbind(-1), axes, strict=True):
        border |= (column == low) | (column == high)
    return points, border


def groups_by_quadrature(log_likelihood, mu_range, tau_range, nodes=60):
    """mu ~ N(0, 5), tau ~ HalfNormal(2), theta_i ~ N(mu, tau): the posterior of (mu, log tau), log p(y)."""
    points, border = grid((*mu_range, 121), (*tau_range, 141))
    mu, tau = points[:, 0], points[:, 1].exp()
    x, w = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(nodes))
    log_w = (w / w.sum()).log()
    terms = [
        log_likelihood((mu + tau * node).unsqueeze(-1)) + one for node, one in zip(x, log_w, strict=True)
    ]
    log_joint = torch.stack(terms).logsumexp(0).sum(-1)
    log_joint = log_joint + Normal(0.0, 5.0).log_prob(mu) + HalfNormal(2.0).log_prob(tau) + points[:, 1]
    assert log_joint.softmax(0)[border].sum() < 1e-3
    cell = (mu_range[1] - mu_range[0]) / 120 * (tau_range[1] - tau_range[0]) / 140
    truth = moments(log_joint, {"mu": mu, "log tau": points[:, 1]})
    return truth, float(log_joint.logsumexp(0)) + math.log(cell)


def roots(problem, truth):
    names = {f"{kind} {site}".strip() for site, kind in problem.roots.items()}
    return {name: pair for name, pair in truth.items() if name.split("[")[0] in names}


def check_problem(problem, locals_mean=0.15, locals_sd=0.1, width=None):
    """Roots, and ten of the latents."""
    name = "100 normal groups" if "normal groups" in problem.truth else problem.truth
    marginal = truths.MARGINALS[name](problem)
    truth = replace(marginal, width=width or marginal.width).moments()
    draws, _ = fitted(problem.model, *problem.args)
    found = problem.coordinates(draws)
    known = roots(problem, truth["scalars"])
    assert len(known) >= 2
    check(found, known)
    check(found, {k: v for k, v in truth["scalars"].items() if k not in known}, locals_mean, locals_sd)


@pytest.mark.long
def test_a_hundred_groups():
    check_problem(models.groups(100, "normal"))


@pytest.mark.long
def test_eight_schools():
    check_problem(models.eight_schools(), locals_sd=0.12)


@pytest.mark.long
@pytest.mark.parametrize("likelihood", [pytest.param("Poisson", marks=EARLY), "binomial"])
def test_groups_of_counts(likelihood):
    problem = models.groups(30, likelihood)
    y, trials = problem.args

    def log_likelihood(theta):
        if likelihood == "Poisson":
            return Poisson(theta.exp()).log_prob(y)
        return Binomial(trials, logits=theta).log_prob(y)

    truth, _ = groups_by_quadrature(log_likelihood, (-1.5, 4.0), (-9.0, 2.0))
    draws, _ = fitted(problem.model, *problem.args)
    check(problem.coordinates(draws), truth)


@pytest.mark.long
@pytest.mark.parametrize("build", [models.slopes_in_a_plate, models.slopes_by_row])
def test_varying_slopes(build):
    check_problem(build(20))


@pytest.mark.long
@pytest.mark.xfail(
    strict=True, reason="the fit ends 0.02 nats below the evidence, with a scale's sd 14 % narrow"
)
def test_three_levels():
    check_problem(models.three_levels(8, 4, 5))


@pytest.mark.long
@pytest.mark.xfail(strict=True, reason="the fit ends with the sd of mu_b 21 % narrow")
def test_counties():
    data = models.Data(0)
    county, floor = data.integers(0, 85, 300), data.integers(0, 2, 300).double()
    y = 1.0 + 0.4 * data.normal(85)[county] - 0.6 * floor + 0.7 * data.normal(300)
    check_problem(models.radon_slopes_of(county, floor, y))


def normal_groups(y, noise):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, noise), obs=y)


def by_index(group, y, noise):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", 10):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(theta[group], noise), obs=y)


def closed_form(y, noise, mu_range, tau_range, prior=None):
    """mu and log tau on a grid with the groups integrated; log p(y)."""
    points, border = grid((*mu_range, 201), (*tau_range, 301))
    mu, tau = points[:, 0], points[:, 1].exp()
    prior = HalfNormal(2.0) if prior is None else prior
    spread = (tau.square().unsqueeze(-1) + noise.square()).sqrt()
    log_joint = Normal(mu.unsqueeze(-1), spread).log_prob(y).sum(-1)
    log_joint = log_joint + Normal(0.0, 5.0).log_prob(mu) + prior.log_prob(tau) + points[:, 1]
    assert log_joint.softmax(0)[border].sum() < 1e-3
    cell = (mu_range[1] - mu_range[0]) / 200 * (tau_range[1] - tau_range[0]) / 300
    return moments(log_joint, {"mu": mu, "log tau": points[:, 1]}), float(log_joint.logsumexp(0)) + math.log(
        cell
    )


def coordinates(draws):
    return {"mu": draws["mu"], "log tau": draws["tau"].log()}


def test_groups_that_differ():
    """Well away from the neck of the funnel."""
    y = 1.0 + torch.linspace(-3.0, 3.0, 12)
    noise = torch.full((12,), 0.8)
    truth, log_z = closed_form(y, noise, (-3.0, 5.0), (-2.0, 2.5))
    draws, result = fitted(normal_groups, y, noise)
    check(coordinates(draws), truth)
    assert -result.best_loss == pytest.approx(log_z, abs=0.05)


@pytest.mark.long
def test_groups_that_do_not_differ():
    """The posterior is the neck of the funnel: log tau has its prior's long tail to the left."""
    y, noise = torch.tensor([0.3, -0.2, 0.1, 0.0, -0.4, 0.2]), torch.ones(6)
    truth, log_z = closed_form(y, noise, (-4.0, 4.0), (-12.0, 2.5))
    draws, result = fitted(normal_groups, y, noise)
    check(coordinates(draws), truth)
    assert -result.best_loss == pytest.approx(log_z, abs=0.05)


@pytest.mark.long
@EARLY
def test_rows_by_an_index():
    """As the groups' means, of which some have no row."""
    generator = torch.Generator().manual_seed(5)
    group = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 5, 5, 6, 7])  # none of 8 and 9
    y = 0.5 * group + torch.randn(15, generator=generator)
    counts = torch.bincount(group).double()
    means = torch.zeros(8, dtype=y.dtype).index_add(0, group, y) / counts
    noise = torch.tensor(1.0)
    truth, _ = closed_form(means, (1.0 / counts).sqrt(), (-4.0, 7.0), (-9.0, 2.5))
    draws, _ = fitted(by_index, group, y, noise)
    check(coordinates(draws), truth)
    tau, mu = draws["tau"], draws["mu"]
    standard = (draws["theta"][:, 8:] - mu.unsqueeze(-1)) / tau.unsqueeze(-1)
    assert standard.mean(0).abs().max() < 0.1  # what has no data follows its prior
    assert (standard.std(0).log().abs() < 0.1).all()


@pytest.mark.long
def test_lognormal_scales_of_groups():
    """Latents that are positive: the logarithms of rates are normal given the roots."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("groups", len(y)):
            rate = pyro.sample("rate", dist.LogNormal(mu, tau))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    y = torch.tensor([0.0, 3, 1, 7, 2, 2, 12, 4, 1, 0, 5, 3, 30, 2, 6])
    truth, _ = groups_by_quadrature(lambda t: Poisson(t.exp()).log_prob(y), (-2.0, 4.0), (-5.0, 2.0))
    draws, _ = fitted(model, y)
    check(coordinates(draws), truth)


@pytest.mark.long
def test_gamma_groups():
    """A prior that is no normal in log space: a Gamma's of a small shape, conjugate to the counts."""

    def model(y):
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", len(y)):
            rate = pyro.sample("rate", dist.Gamma(1.5, b))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    y = torch.tensor([0.0, 3, 1, 7, 2, 2, 12, 4, 1, 0, 5, 3])
    log_b = torch.linspace(-4.0, 3.0, 2001)
    b = log_b.exp().unsqueeze(-1)
    each = 1.5 * b.log() - (1.5 + y) * (1.0 + b).log() + torch.lgamma(1.5 + y) - math.lgamma(1.5)
    truth = moments(each.sum(-1) + Normal(0.0, 1.0).log_prob(log_b), {"log b": log_b})
    draws, _ = fitted(model, y)
    check({"log b": draws["b"].log()}, truth)
    # Given b each rate is Gamma(1.5 + y, 1 + b).
    scaled = draws["rate"] * (1.0 + draws["b"].unsqueeze(-1)) / (1.5 + y)
    assert (scaled.mean(0) - 1.0).abs().max() < 0.1


def student_groups(y, noise):
    mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
    tau = pyro.sample("tau", dist.HalfNormal(50.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.StudentT(3.0, mu, tau))
        pyro.sample("y", dist.Normal(theta, noise), obs=y)


def student_by_quadrature(y, noise, mu_range, tau_range, prior=None):
    prior = HalfNormal(50.0) if prior is None else prior
    points, border = grid((*mu_range, 161), (*tau_range, 101))
    mu, tau = points[:, 0], points[:, 1].exp()
    x, w = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(100))
    log_w, each = (w / w.sum()).log().unsqueeze(-1), []
    for one in y:
        theta = one + noise * x.unsqueeze(-1)
        each.append((dist.StudentT(3.0, mu, tau).log_prob(theta) + log_w).logsumexp(0))
    log_joint = torch.stack(each).sum(0) + Normal(0.0, 100.0).log_prob(mu)
    log_joint = log_joint + prior.log_prob(tau) + points[:, 1]
    assert log_joint.softmax(0)[border].sum() < 1e-3 or isinstance(prior, Uniform)
    return moments(log_joint, {"mu": mu, "log tau": points[:, 1]})


@pytest.mark.long
@pytest.mark.parametrize("scale", [1.0, pytest.param(50.0, marks=EARLY)])
def test_student_t_groups(scale):
    """A prior with heavy tails, and two groups that stand out."""
    y = torch.tensor([1.2, 0.7, 1.5, 9.0, 0.2, 1.1, 2.0, -0.3, 1.4, 0.9, -6.0, 1.6])
    y, noise = scale * (y - 1.0) + (1000.0 if scale > 1.0 else 1.0), 0.5 * scale
    mu_range = (-3.0, 5.0) if scale == 1.0 else (-300.0, 1300.0)
    truth = student_by_quadrature(y, noise, mu_range, (math.log(scale) - 3.0, math.log(scale) + 4.0))
    draws, _ = fitted(student_groups, y, noise)
    check(coordinates(draws), truth)


@pytest.mark.long
def test_student_t_groups_far_from_the_start():
    """A likelihood far in the tails of priors that are not log-concave."""
    generator = torch.Generator().manual_seed(0)
    y = 1000.0 + 50.0 * torch.randn(12, generator=generator)

    def model(y):
        tau = pyro.sample("tau", dist.Uniform(0.0, 100.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.StudentT(3.0, mu, tau))
            pyro.sample("y", dist.Normal(theta, 10.0), obs=y)

    prior = Uniform(0.0, 100.0 + 1e-9)
    truth = student_by_quadrature(y, 10.0, (700.0, 1100.0), (0.0, math.log(100.0)), prior)
    draws, _ = fitted(model, y)
    check(coordinates(draws), truth)


@pytest.mark.long
def test_data_far_from_what_the_prior_expects():
    y = torch.tensor([700.0, 1000.0, 1300.0, 900.0, 1400.0, 800.0])
    prior = torch.distributions.HalfCauchy(5.0)

    def model(y, noise):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, noise), obs=y)

    truth, log_z = closed_form(y, torch.ones(6), (-25.0, 25.0), (5.0, 9.5), prior)
    draws, result = fitted(model, y, torch.ones(6))
    check(coordinates(draws), truth)
    assert -result.best_loss == pytest.approx(log_z, abs=0.1)
