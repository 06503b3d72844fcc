"""Pyro's guides that are handlers, which run the model, against closed forms and Pyro's own SVI."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoHierarchicalNormalMessenger,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
)

from pyro_flowvi import CompiledSVI, compare, diagnose, fit, to_arviz
from pyro_flowvi._program.log_weights import LogWeights
from pyro_flowvi.infer import _fit

KINDS = (AutoNormalMessenger, AutoHierarchicalNormalMessenger, AutoRegressiveMessenger)
Y = torch.tensor([1.0, 2.0, 3.0])
MEAN, SD = 6.0 / 3.25, 3.25**-0.5
"""The posterior of :func:`normal`: precision 1/4 + 3, and mean the sum of the data by it."""


def normal(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def log_evidence():
    return dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 4.0).log_prob(Y).item()


def schools(y):
    """With what else a model may have: constrained latents, a computed site, a factor, a parameter."""
    noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    pyro.deterministic("twice", 2.0 * mu)
    pyro.factor("pull", -0.1 * mu.square())
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, noise), obs=y)


class Fixed(AutoNormalMessenger):
    """A guide of one's own, reparameterised without a transform."""

    def get_posterior(self, name, prior):
        return dist.Normal(MEAN, SD)


@pytest.mark.parametrize("kind", KINDS)
def test_fit_arrives_at_the_posterior(kind):
    guide = kind(normal)
    result = fit(normal, guide, Y, num_steps=600, lr=0.05, seed=0, progress=False)
    assert result.best_loss == pytest.approx(-log_evidence(), abs=0.01)
    assert result.guide is guide
    draws = to_arviz(normal, guide, Y, num_samples=4000, seed=1).posterior["mu"].values
    assert draws.mean() == pytest.approx(MEAN, abs=0.05)
    assert draws.std() == pytest.approx(SD, rel=0.06)
    assert diagnose(normal, guide, Y, seed=0).verdict == "good"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_a_closed_form(kind):
    guide = kind(normal)
    guide(Y)
    if kind is AutoRegressiveMessenger:  # an affine map of the prior
        loc, scale = guide.locs.mu.item(), 2.0 * guide.scales.mu.item()
    else:  # the prior's mean is zero, whatever the weight of it
        loc, scale = guide.locs.mu.item(), guide.scales.mu.item()
    stats = to_arviz(normal, guide, Y, num_samples=500, seed=1)
    mu = torch.as_tensor(stats.posterior["mu"].values)
    posterior = dist.Normal(MEAN, SD).log_prob(mu) + log_evidence()
    expected = posterior - dist.Normal(loc, scale).log_prob(mu)
    found = torch.as_tensor(stats.sample_stats["log_weight"].values, dtype=expected.dtype)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    kl = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(MEAN, SD)).item()
    found = diagnose(normal, guide, Y, probes=False, seed=0)
    assert found.elbo == pytest.approx(log_evidence() - kl, abs=5.0 * found.elbo_se)


@pytest.mark.parametrize("kind", KINDS)
def test_the_elbo_is_that_of_pyro(kind):
    guide = kind(schools)
    fit(schools, guide, Y, num_steps=50, lr=0.05, seed=0, progress=False)
    found = diagnose(schools, guide, Y, probes=False, seed=0)
    with torch.no_grad():
        losses = torch.tensor([Trace_ELBO().loss(schools, guide, Y) for _ in range(1500)])
    se = math.hypot(found.elbo_se, losses.std().item() / math.sqrt(len(losses)))
    assert found.elbo == pytest.approx(-losses.mean().item(), abs=4.0 * se)
    assert str(compare(schools, [guide], Y, probes=False, seed=0)).count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_fit_ends_where_pyro_does(kind):
    def train(loss, optim, take):
        svi = SVI(normal, guide, optim, loss)
        for _ in range(take):
            svi.step(Y)

    guide = kind(normal)
    train(Trace_ELBO(8, vectorize_particles=True, max_plate_nesting=1), pyro.optim.Adam({"lr": 0.05}), 400)
    by_pyro = diagnose(normal, guide, Y, probes=False, seed=0)
    pyro.clear_param_store()
    ours = kind(normal)
    fit(normal, ours, Y, num_steps=400, lr=0.05, seed=0, progress=False)
    by_fit = diagnose(normal, ours, Y, probes=False, seed=0)
    assert by_fit.elbo == pytest.approx(by_pyro.elbo, abs=0.02)


def test_compiled_steps_are_those_of_eager_pyro():
    found = []
    for compile in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1)
        svi = CompiledSVI(
            normal, AutoNormalMessenger(normal), pyro.optim.Adam({"lr": 0.05}), loss, compile=compile
        )
        found.append(svi.run(20, Y, progress=False))
        assert svi.compiled == compile
    torch.testing.assert_close(*found)


def test_parameters_of_the_model_are_its_own():
    """The handler's run shows them too; with them, equal weights of all draws are not the end of a fit."""
    structure = LogWeights(schools, AutoNormalMessenger(schools), (Y,)).structure
    assert structure.model_params == {"noise"}
    assert set(structure.latents) == {"mu", "tau", "theta"}
    assert "locs.mu" in structure.params


def test_a_guide_of_ones_own_is_trained_without_path_gradients(monkeypatch):
    kinds = []
    objective = _fit._objective
    monkeypatch.setattr(_fit, "_objective", lambda *a: kinds.append(type(objective(*a))) or objective(*a))
    result = fit(normal, Fixed(normal), Y, num_steps=3, seed=0, progress=False)
    assert kinds == [Trace_ELBO]
    assert result.best_loss == pytest.approx(-log_evidence(), abs=1e-3)


def test_rows_of_a_subsampled_plate():
    y = torch.tensor([1.0, 2.0, 3.0, 0.0, 1.5, 2.5])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("rows", len(y), subsample_size=3) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    guide = AutoNormalMessenger(model)
    fit(model, guide, y, num_steps=800, lr=0.03, seed=0, progress=False)
    assert guide.locs.mu.item() == pytest.approx(y.sum().item() / 6.25, abs=0.15)
    assert guide.scales.mu.item() == pytest.approx(6.25**-0.5, rel=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_swapped_they_are_refused(kind):
    guide = kind(normal)
    calls = (
        lambda: fit(guide, normal, Y, num_steps=2, progress=False),
        lambda: diagnose(guide, normal, Y),
        lambda: compare(guide, [normal], Y),
        lambda: to_arviz(guide, normal, Y),
        lambda: CompiledSVI(guide, normal, pyro.optim.Adam({"lr": 0.1})),
    )
    for call in calls:
        with pytest.raises(ValueError, match="swapped"):
            call()
