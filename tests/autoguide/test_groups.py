"""Weights of the roots with groups integrated: against quadrature, and where there are no groups."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_flowvi import AutoRealNVP, diagnose, fit
from pyro_flowvi._compile.log_factors import LogFactors
from pyro_flowvi._program.log_density import UnconstrainedModel
from pyro_flowvi.autoguide._groups import find_groups, stratified

NUM = 40


def _data():
    generator = torch.Generator().manual_seed(0)
    theta = 1.0 + 0.7 * torch.randn(NUM, generator=generator)
    return torch.poisson(theta.exp(), generator=generator)


def in_a_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", NUM):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Poisson(theta.exp()), obs=y)


def by_index(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    group = torch.arange(NUM)
    with pyro.plate("groups", NUM):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
    with pyro.plate("rows", NUM):
        pyro.sample("y", dist.Poisson(theta[group].exp()), obs=y)


def seeing_each_other(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", NUM):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Poisson(theta.exp()), obs=y)
    pyro.sample("total", dist.Normal(theta.sum(-1), 1.0), obs=torch.tensor(40.0))


def one_plate_in_another(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("schools", 10, dim=-1):
        school = pyro.sample("school", dist.Normal(mu, tau))
    with pyro.plate("pupils", 4, dim=-2), pyro.plate("schools_again", 10, dim=-1):
        pupil = pyro.sample("pupil", dist.Normal(school.unsqueeze(-2), 0.5))
        pyro.sample("y", dist.Poisson(pupil.exp()), obs=y.reshape(4, 10))


def log_evidence(y):
    """By a grid over (mu, log tau), with Gauss-Hermite quadrature of each group."""
    nodes, log_weights = (torch.tensor(v).double() for v in _hermite(60))
    mu, log_tau = torch.meshgrid(torch.linspace(-1, 3, 121), torch.linspace(-5, 1.5, 131), indexing="ij")
    mu, tau = mu.double(), log_tau.double().exp()
    theta = mu[..., None] + tau[..., None] * nodes
    total = torch.distributions.Normal(0.0, 2.0).log_prob(mu) + log_tau
    total = total + torch.distributions.HalfNormal(1.0).log_prob(tau)
    for one in y.double():
        term = one * theta - theta.exp() - torch.lgamma(one + 1)
        total = total + (term + log_weights).logsumexp(-1)
    return float(total.logsumexp((0, 1))) + math.log(4 / 120 * 6.5 / 130)


def _hermite(num):
    import numpy as np

    x, w = np.polynomial.hermite_e.hermegauss(num)
    return x, np.log(w / math.sqrt(2 * math.pi))


@pytest.fixture(scope="module")
def y():
    return _data()


@pytest.fixture(scope="module")
def evidence(y):
    return log_evidence(y)


@pytest.mark.parametrize("model", [in_a_plate, by_index])
def test_the_evidence_is_that_of_quadrature(model, y, evidence):
    guide = AutoRealNVP(model)
    fit(model, guide, y, num_steps=200, progress=False, seed=0)
    found = diagnose(model, guide, y, num_samples=1000, seed=0, probes=False)
    assert found.num_groups == NUM
    assert found.log_evidence == pytest.approx(evidence, abs=3 * found.log_evidence_se + 0.01)
    assert found.log_evidence_se < 0.05
    assert 0.0 <= found.local_gap < found.log_evidence - found.elbo + 0.05
    assert found.elbo < evidence


def test_the_elbo_is_that_of_all_latents_together(y):
    guide = AutoRealNVP(in_a_plate)
    fit(in_a_plate, guide, y, num_steps=50, progress=False, seed=0)
    found = diagnose(in_a_plate, guide, y, seed=0, probes=False)
    loss = pyro.infer.Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        assert found.elbo == pytest.approx(-loss.loss(in_a_plate, guide, y), abs=0.15)


def test_resampled_draws_follow_groups(y):
    """A group with the wrong messages is put right by its own weights."""
    guide = AutoRealNVP(in_a_plate)
    fit(in_a_plate, guide, y, num_steps=200, progress=False, seed=0)
    pyro.set_rng_seed(0)
    right = guide.sample_posterior(20_000)["theta"]
    with torch.no_grad():
        guide._map.centre += 0.3
    wrong = guide.sample_posterior(4000)["theta"]
    again = guide.sample_posterior(4000, resample=True)["theta"]
    sd = right.std(0)
    assert ((wrong.mean(0) - right.mean(0)) / sd).abs().mean() > 0.2
    assert ((again.mean(0) - right.mean(0)) / sd).abs().max() < 0.15


@pytest.mark.parametrize("part", ["roots", "groups"])
def test_reasons_tell_roots_from_groups(part, y):
    guide = AutoRealNVP(in_a_plate)
    fit(in_a_plate, guide, y, num_steps=200, progress=False, seed=0)
    with torch.no_grad():
        if part == "roots":
            guide.affine.loc[0] += 0.1
        else:
            guide._map.centre += 0.5
    told = " ".join(diagnose(in_a_plate, guide, y, num_samples=1000, seed=0, probes=False).reasons)
    assert (", a root," in told) == (part == "roots")
    assert ("of a group given the roots" in told) == (part == "groups")


@pytest.mark.parametrize(("model", "num"), [(one_plate_in_another, 10), (by_index, NUM)])
def test_groups_are_what_is_independent_given_the_roots(model, num, y):
    guide = AutoRealNVP(model)
    guide.materialize(y)
    groups = find_groups(guide._flow, guide.density(y))
    assert groups is not None
    assert groups.num == num
    labels = groups.labels
    assert sorted(torch.bincount(labels[labels >= 0]).tolist()) == [len(labels[labels >= 0]) // num] * num


def test_no_groups_where_all_see_each_other(y):
    guide = AutoRealNVP(seeing_each_other)
    guide.materialize(y)
    assert find_groups(guide._flow, guide.density(y)) is None
    assert diagnose(seeing_each_other, guide, y, num_samples=200, probes=False).num_groups == 0


def test_no_groups_of_a_flat_guide(y):
    guide = AutoRealNVP(in_a_plate, structure=None)
    guide.materialize(y)
    assert find_groups(guide.pushforward(in_a_plate), guide.density(y)) is None


def test_terms_of_a_point_that_the_model_refuses():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        torch.linalg.cholesky(torch.diag_embed(z + 3.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2))

    factors = LogFactors(UnconstrainedModel(model))
    found = factors(torch.tensor([[0.0, 0.0], [-9.0, 0.0], [1.0, 1.0]]))
    assert found.isfinite().all(-1).tolist() == [True, False, True]
    assert not found[1].isfinite().any()


def test_strata():
    noise = stratified(2000, 4, 3)
    for draw in range(4):  # each of them is a fair draw
        for column in range(3):
            assert stats.kstest(noise[:, draw, column].numpy(), "norm").pvalue > 1e-4
    assert noise.mean(1).std() < 0.5 * 0.5  # of independent draws: .5
    assert abs(torch.corrcoef(noise[:, 0].T)[0, 1]) < 0.1
