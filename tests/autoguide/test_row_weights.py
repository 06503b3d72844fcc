"""Weights with the rows of a subsampled plate integrated, at once and in passes: against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowvi import AutoRealNVP, diagnose, fit
from pyro_flowvi.autoguide._row_weights import weigh_roots
from pyro_flowvi.diagnostics import _weighted_draws

NUM, SHOWN = 60, 20


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("rows", NUM, subsample_size=SHOWN) as index:
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y[index])


@pytest.fixture(scope="module")
def y():
    generator = torch.Generator().manual_seed(0)
    return 1.0 + 1.3 * torch.randn(NUM, generator=generator)


@pytest.fixture
def guide(y):
    guide = AutoRealNVP(model)
    fit(model, guide, y, seed=0, num_steps=200, progress=False)
    return guide


@pytest.fixture(scope="module")
def evidence(y):
    """By a grid over (mu, log tau): given these the rows are normal."""
    mu, log_tau = torch.meshgrid(
        torch.linspace(-1, 3, 401).double(), torch.linspace(-7, 1.5, 401).double(), indexing="ij"
    )
    sd = (log_tau.mul(2).exp() + 1.0).sqrt()
    total = torch.distributions.Normal(0.0, 2.0).log_prob(mu) + log_tau
    total = total + torch.distributions.HalfNormal(1.0).log_prob(log_tau.exp())
    for one in y.double():
        total = total + torch.distributions.Normal(mu, sd).log_prob(one)
    return float(total.logsumexp((0, 1))) + math.log(4 / 400 * 8.5 / 400)


def test_all_rows_at_once(guide, y, evidence):
    found = diagnose(model, guide, y, seed=0, num_samples=1000)
    assert found.num_groups == NUM
    assert found.log_evidence == pytest.approx(evidence, abs=3 * found.log_evidence_se + 0.01)
    assert found.verdict != "poor"
    assert found.probes is not None
    assert found.probes.rhat < 1.3


def test_in_passes(guide, y, evidence, monkeypatch):
    monkeypatch.setattr(_weighted_draws, "MOST_AT_ONCE", 0)
    found = diagnose(model, guide, y, seed=0, num_samples=1000)
    assert found.num_groups == NUM
    assert found.log_evidence == pytest.approx(evidence, abs=3 * found.log_evidence_se + 0.01)
    assert abs(found.local_gap) < 0.1  # the rows are normal given the roots
    assert any("passes over its rows" in reason for reason in found.reasons)


def test_both_have_the_same_elbo(guide, y):
    sweep = guide.sweep(lambda _: [((y,), {})])
    pyro.set_rng_seed(0)
    with torch.no_grad():
        weighed = weigh_roots(sweep, 4000, 64)
        _, together = sweep.log_weights(4000, 64)
    assert weighed is not None
    assert float(weighed.log_ratios.mean()) == pytest.approx(float(together.mean()), abs=0.1)
    assert weighed.log_weights.std() <= together.std() + 0.02
