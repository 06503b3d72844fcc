"""log_evidence and its standard error against closed forms, quadrature and bridge sampling."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss

from pyro_flowvi import AutoFlowMixture, AutoRealNVP, fit
from pyro_flowvi.diagnostics import diagnose

FLOOR = 0.005
"""Nats that are left to quadrature and to weights without noise."""


def check(model, guide, args, truth, seed=0, num_samples=2000):
    """The evidence of a pair, after it was compared with the truth."""
    found = diagnose(model, guide, *args, seed=seed, probes=False, num_samples=num_samples)
    assert math.isfinite(found.log_evidence_se)
    assert found.log_evidence_se < 0.1  # else the comparison says nothing
    assert found.log_evidence == pytest.approx(float(truth), abs=3 * found.log_evidence_se + FLOOR)
    return found


def on_grid(log_joint, *axes):
    """log of the integral of exp(log_joint) by the trapezoidal rule on a rectangle that has all the mass."""
    values = log_joint(*torch.meshgrid(*axes, indexing="ij"))
    edges = [values.select(i, j) for i in range(values.dim()) for j in (0, -1)]
    assert max(float(edge.max()) for edge in edges) < float(values.max()) - 15.0
    return values.flatten().logsumexp(0) + sum(float((axis[1] - axis[0]).log()) for axis in axes)


def of_normals(y, mean, covariance):
    return dist.MultivariateNormal(mean.expand(len(y)), covariance).log_prob(y)


class TestClosedForms:
    def test_normal_mean(self):
        y = torch.tensor([1.2, 0.3, 2.5, 1.9])

        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.5, 2.0))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(mu, 1.5), obs=y)

        def guide(y):
            pyro.sample("mu", dist.Normal(1.6, 0.8))  # the posterior is N(1.35, .66²)

        truth = of_normals(y, torch.tensor(0.5), 2.25 * torch.eye(4) + 4.0)
        check(model, guide, (y,), truth)

    def test_beta_binomial(self):
        def model():
            p = pyro.sample("p", dist.Beta(2.0, 3.0))
            pyro.sample("y", dist.Binomial(20, p), obs=torch.tensor(13.0))

        def guide():
            pyro.sample("p", dist.Beta(11.0, 8.0))  # the posterior is Beta(15, 10)

        check(model, guide, (), dist.BetaBinomial(2.0, 3.0, 20).log_prob(torch.tensor(13.0)))

    def test_gamma_poisson(self):
        counts = torch.tensor([3.0, 7.0, 4.0, 4.0, 6.0])

        def model(counts):
            rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
            with pyro.plate("rows", len(counts)):
                pyro.sample("count", dist.Poisson(rate), obs=counts)

        def guide(counts):
            pyro.sample("rate", dist.LogNormal(1.5, 0.25))

        a, b, total, n = torch.tensor(2.0), 0.5, counts.sum(), len(counts)
        truth = (
            a * math.log(b) - torch.lgamma(a) + torch.lgamma(a + total) - (a + total) * math.log(b + n)
        ) - torch.lgamma(counts + 1.0).sum()
        check(model, guide, (counts,), truth)

    def test_linear_regression(self):
        x = torch.stack([torch.ones(12), torch.linspace(-1, 1, 12), torch.linspace(-1, 1, 12) ** 2], -1)
        y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(12)

        def model(x, y):
            beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 2.0).to_event(1))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal((x @ beta.unsqueeze(-1)).squeeze(-1), 0.3), obs=y)

        guide = AutoRealNVP(model, num_layers=2)
        fit(model, guide, x, y, num_steps=20, progress=False, seed=0)
        truth = of_normals(y, torch.tensor(0.0), 0.09 * torch.eye(12) + 4.0 * x @ x.T)
        check(model, guide, (x, y), truth)

    def test_bridge_sampling(self):
        """A normal law of unknown mean and precision, whose posterior can be drawn from."""
        y = torch.tensor([0.3, 1.1, -0.4, 2.0, 0.9, 0.2, 1.4, -1.0])
        n, shrunk = len(y), 1.0 + len(y)
        mean = y.sum() / shrunk
        rate = 2.0 + 0.5 * ((y - y.mean()).square().sum() + n / shrunk * y.mean().square())

        def model(y):
            precision = pyro.sample("precision", dist.Gamma(3.0, 2.0))
            mu = pyro.sample("mu", dist.Normal(0.0, precision.rsqrt()))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(mu, precision.rsqrt()), obs=y)

        def guide(y):
            pyro.sample("precision", dist.LogNormal(0.15, 0.45))
            pyro.sample("mu", dist.Normal(mean + 0.1, 0.4))

        def log_ratio(precision, mu):  # of the model's density over the guide's
            scale = precision.rsqrt()
            log_p = dist.Gamma(3.0, 2.0).log_prob(precision) + dist.Normal(0.0, scale).log_prob(mu)
            log_p = log_p + dist.Normal(mu, scale).log_prob(y.unsqueeze(-1)).sum(0)
            log_q = dist.LogNormal(0.15, 0.45).log_prob(precision)
            return log_p - log_q - dist.Normal(mean + 0.1, 0.4).log_prob(mu)

        size = 40_000
        exact = dist.Gamma(3.0 + 0.5 * n, rate).sample((size,))
        of_posterior = log_ratio(exact, dist.Normal(mean, (shrunk * exact).rsqrt()).sample())
        of_guide = log_ratio(
            dist.LogNormal(0.15, 0.45).sample((size,)), dist.Normal(mean + 0.1, 0.4).sample((size,))
        )
        truth = torch.tensor(0.0)
        for _ in range(100):  # Meng and Wong 1996, as many draws of either kind
            above = (of_guide - torch.logaddexp(of_guide, truth)).logsumexp(0)
            truth = above - (-torch.logaddexp(of_posterior, truth)).logsumexp(0)
        check(model, guide, (y,), truth)


class TestQuadrature:
    def test_logistic_regression(self):
        x = torch.stack([torch.ones(15), torch.linspace(-2, 2, 15)], -1)
        y = (torch.arange(15) % 3 < torch.linspace(0.2, 3.0, 15)).to(x)

        def model(x, y):
            beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 2.5).to_event(1))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Bernoulli(logits=(x @ beta.unsqueeze(-1)).squeeze(-1)), obs=y)

        def log_joint(a, b):
            logits = a.unsqueeze(-1) + b.unsqueeze(-1) * x[:, 1]
            prior = dist.Normal(0.0, 2.5)
            likelihood = dist.Bernoulli(logits=logits).log_prob(y).sum(-1)
            return prior.log_prob(a) + prior.log_prob(b) + likelihood

        def guide(x, y):
            factor = torch.linalg.cholesky(torch.tensor([[1.0, 0.2], [0.2, 0.9]]))
            loc = torch.tensor([0.8, 1.2])
            pyro.sample("beta", dist.MultivariateStudentT(7.0, loc, factor))

        axis = torch.linspace(-12.0, 12.0, 400)
        check(model, guide, (x, y), on_grid(log_joint, axis, axis))

    def test_banana(self):
        def log_joint(x, y):
            return -0.5 * (x - 1.0) ** 2 - 2.0 * (y - x**2) ** 2 - 0.1 * y.abs()

        def model():
            x = pyro.sample("x", dist.Normal(0.0, 10.0).mask(False))
            y = pyro.sample("y", dist.Normal(0.0, 10.0).mask(False))
            pyro.factor("density", log_joint(x, y))

        def guide():
            x = pyro.sample("x", dist.StudentT(6.0, 0.7, 0.9))
            pyro.sample("y", dist.Normal(x**2, 0.6))

        truth = on_grid(log_joint, torch.linspace(-6, 8, 800), torch.linspace(-8, 70, 4000))
        check(model, guide, (), truth)

    @pytest.mark.long
    def test_two_modes(self):
        """Modes of .3 and .7 of the mass, 8 sd apart, under a mixture of flows."""

        def log_joint(x, y):
            first = math.log(0.3) + dist.Normal(-4.0, 1.0).log_prob(x) + dist.Normal(2.0, 0.5).log_prob(y)
            second = math.log(0.7) + dist.Normal(4.0, 1.0).log_prob(x)
            second = second + dist.Normal(0.2 * (x - 4.0) ** 2, 0.7).log_prob(y)
            return torch.logaddexp(first, second) - 3.0

        def model():
            x = pyro.sample("x", dist.Normal(0.0, 10.0).mask(False))
            y = pyro.sample("y", dist.Normal(0.0, 10.0).mask(False))
            pyro.factor("density", log_joint(x, y))

        guide = AutoFlowMixture(model, num_components=2, num_layers=4)
        fit(model, guide, num_steps=150, progress=False, seed=0)
        check(model, guide, (), -3.0)


def effects(y, noise):
    """One normal value of each group."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, noise), obs=y)


def counts_of_groups(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.LogNormal(-0.5, 0.5))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Poisson(theta.exp()), obs=y)


def rows_of_groups(group, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", 36):
        a = pyro.sample("a", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a[..., group], 0.8), obs=y)


def by_roots(log_likelihood, log_scale=0.0):
    """log p(y), from log p(y given mu, tau) of a grid, with the priors of the models above."""

    def log_joint(mu, log_tau):
        prior = dist.Normal(0.0, 3.0).log_prob(mu) + dist.Normal(log_scale, 0.5).log_prob(log_tau)
        return prior + log_likelihood(mu, log_tau.exp())

    return on_grid(log_joint, torch.linspace(-6.0, 7.0, 131), torch.linspace(-4.5, 3.5, 81))


def fitted(model, *args, num_steps=30):
    guide = AutoRealNVP(model, num_layers=2, structure="program")
    fit(model, guide, *args, num_steps=num_steps, progress=False, seed=0)
    return guide


class TestGroups:
    def test_normal_groups(self):
        noise = torch.linspace(0.5, 1.5, 40)
        y = 1.0 + 0.8 * torch.randn(40) + noise * torch.randn(40)

        def log_likelihood(mu, tau):
            scale = (tau.unsqueeze(-1).square() + noise.square()).sqrt()
            return dist.Normal(mu.unsqueeze(-1), scale).log_prob(y).sum(-1)

        found = check(effects, fitted(effects, y, noise), (y, noise), by_roots(log_likelihood))
        assert found.num_groups == 40

    def test_poisson_groups(self):
        y = torch.poisson((1.0 + 0.6 * torch.randn(35)).exp())
        nodes, weights = (torch.as_tensor(value).to(y) for value in hermegauss(40))

        def log_likelihood(mu, tau):  # the groups by Gauss and Hermite's rule
            theta = mu[..., None, None] + tau[..., None, None] * nodes
            terms = dist.Poisson(theta.exp()).log_prob(y.unsqueeze(-1))
            inner = (terms + weights.log() - 0.5 * math.log(2.0 * math.pi)).logsumexp(-1)
            return inner.sum(-1)

        found = check(
            counts_of_groups, fitted(counts_of_groups, y), (y,), by_roots(log_likelihood, log_scale=-0.5)
        )
        assert found.num_groups == 35

    def test_rows_of_groups(self):
        group = torch.arange(90) ** 2 % 36  # some groups have no row
        y = 2.0 + torch.randn(36)[group] + 0.8 * torch.randn(90)
        sizes = torch.bincount(group, minlength=36).to(y)
        sums = torch.zeros(36).to(y).index_add(0, group, y)
        within = (y.square().sum() - (sums.square() / sizes.clamp(min=1.0)).sum()) / 0.64

        def log_likelihood(mu, tau):
            """Of the groups' means, N(mu, tau² + .64 / n), and of the rows around these."""
            seen = sizes > 0
            scale = (tau.unsqueeze(-1).square() + 0.64 / sizes[seen]).sqrt()
            of_means = dist.Normal(mu.unsqueeze(-1), scale).log_prob(sums[seen] / sizes[seen]).sum(-1)
            log_dets = (2.0 * math.pi * 0.64) ** 0.5
            free = len(y) - int(seen.sum())
            return of_means - 0.5 * within - free * math.log(log_dets) - 0.5 * sizes[seen].log().sum()

        found = check(rows_of_groups, fitted(rows_of_groups, group, y), (group, y), by_roots(log_likelihood))
        assert found.num_groups == 36


def standard_normal():
    pyro.sample("x", dist.Normal(0.0, 1.0))


def normal_guide(loc, scale):
    return lambda: pyro.sample("x", dist.Normal(loc, scale))


class TestStandardError:
    def test_is_infinite_where_khat_is_high(self):
        found = diagnose(standard_normal, normal_guide(0.0, 0.2), seed=0, probes=False)
        assert found.khat > found.khat_threshold
        assert found.log_evidence_se == math.inf

    @pytest.mark.parametrize(("loc", "scale"), [(0.3, 1.3), (0.0, 0.8), (1.0, 1.0)])
    def test_is_calibrated(self, loc, scale):
        """Root of the mean square of 20 errors in units of their standard errors."""
        runs = [
            diagnose(standard_normal, normal_guide(loc, scale), seed=seed, probes=False, num_samples=1000)
            for seed in range(20)
        ]
        z = np.array([run.log_evidence / run.log_evidence_se for run in runs])
        assert 0.5 < math.sqrt((z**2).mean()) < 1.6

    @pytest.mark.long
    def test_is_calibrated_by_groups(self):
        noise = torch.linspace(0.5, 1.5, 40)
        y = 1.0 + 0.8 * torch.randn(40) + noise * torch.randn(40)

        def log_likelihood(mu, tau):
            scale = (tau.unsqueeze(-1).square() + noise.square()).sqrt()
            return dist.Normal(mu.unsqueeze(-1), scale).log_prob(y).sum(-1)

        truth = float(by_roots(log_likelihood))
        guide = fitted(effects, y, noise, num_steps=10)
        runs = [
            diagnose(effects, guide, y, noise, seed=seed, probes=False, num_samples=500) for seed in range(20)
        ]
        assert all(run.num_groups == 40 for run in runs)
        z = np.array([(run.log_evidence - truth) / run.log_evidence_se for run in runs])
        assert 0.5 < math.sqrt((z**2).mean()) < 1.6
