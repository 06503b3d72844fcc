"""Vectorisation is found out site by site, and weights are those of Pyro's own objectives."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_flowvi import AutoPlanar, diagnose, fit
from pyro_flowvi._program.log_weights import LogWeights


def test_a_small_wrong_term_is_not_hidden_by_a_large_right_one():
    torch.set_default_dtype(torch.float32)
    y = torch.randn(20_000)

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        pyro.factor("all_particles", -0.005 * x.sum() ** 2)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    guide = AutoPlanar(model).materialize()
    assert not LogWeights(model, guide).vectorized


def test_large_data_in_float32_vectorizes():
    torch.set_default_dtype(torch.float32)
    design, y = torch.randn(20_000, 5), torch.randn(20_000)

    def model():
        beta = pyro.sample("beta", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal((beta * design).sum(-1), 1.0), obs=y)

    assert LogWeights(model, AutoPlanar(model).materialize()).vectorized


def summing_model():
    pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("w", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("wrong", [lambda x: 0.3 * x.sum(), lambda x: x[0]])
def test_a_guide_that_is_not_written_for_batches(wrong):
    def guide():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("w", dist.Normal(wrong(x), 1.0))

    particles = LogWeights(summing_model, guide)
    assert not particles.vectorized
    assert particles.log_weights(200).mean() > -2.0


def test_a_guide_written_for_batches():
    def guide():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("w", dist.Normal(0.3 * x.sum(-1), 1.0))

    assert LogWeights(summing_model, guide).vectorized


def test_a_discrete_site_enumerated_in_the_guide():
    def model():
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(2.0 * z, 1.0))

    def guide():
        infer = {"enumerate": "parallel"}
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])), infer=infer)
        pyro.sample("x", dist.Normal(2.0 * z, 1.1))

    weights = LogWeights(model, guide).log_weights(400)
    truth = -TraceEnum_ELBO(num_particles=20_000, max_plate_nesting=0, vectorize_particles=True).loss(
        model, guide
    )
    assert weights.mean().item() == pytest.approx(truth, abs=4 * weights.std().item() / 20)


@pytest.mark.parametrize("drawn", [False, True])
def test_what_is_summed_out_is_run_no_oftener_than_it_must(drawn):
    runs, y = [], torch.tensor([0.3, -1.2, 2.0])

    def model():
        runs.append(None)
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0)) if drawn else torch.tensor(1.0)
        with pyro.plate("rows", len(y)):
            side = pyro.sample("side", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(2.0 * side, scale), obs=y)

    def guide():
        if drawn:
            pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("rows", len(y)):
            pyro.sample("side", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    weights = LogWeights(model, guide)
    runs.clear()
    found = weights.log_weights(50)
    assert len(runs) == (50 if drawn else 2)
    assert len(found.unique()) == (50 if drawn else 1)
    if not drawn:
        terms = [
            math.log(2.0 * p) + dist.Normal(2.0 * side, 1.0).log_prob(y) for side, p in ((0, 0.7), (1, 0.3))
        ]
        torch.testing.assert_close(found[0], torch.stack(terms).mean(0).sum())


def test_batches_of_any_length():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(x + z, 1.0), obs=torch.tensor(1.0))

    particles = LogWeights(model, AutoPlanar(model).materialize())
    for size in (1, 7, 8, 9):
        assert particles.log_weights(size, max_batch=8).shape == (size,)


def test_tied_and_discrete_weights_are_judged():
    def model():
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide():
        pyro.sample("z", dist.Bernoulli(0.4))

    for seed in range(3):
        assert diagnose(model, guide, seed=seed).verdict == "good"


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_fit_takes_a_guide_of_a_blocked_model():
    """The remedy that the refusal of discrete sites names."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        k = pyro.sample("k", dist.Poisson(1.0))
        pyro.sample("y", dist.Normal(mu + 0 * k, 1.0), obs=y)

    guide = AutoPlanar(pyro.poutine.block(model, hide=["k"]))
    result = fit(model, guide, torch.tensor(1.0), num_steps=10, progress=False)
    assert result.losses.isfinite().all()


def test_a_model_that_runs_for_many_particles_but_not_for_all_values_of_its_discrete_site():
    @config_enumerate
    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            if k.dim() > 2 and x.dim():  # all values of k, and many x
                raise RuntimeError("not written for this")
            pyro.sample("y", dist.Normal(x + 2 * k, 0.5), obs=y)

    y = torch.tensor([0.0, 2.0, 2.1])
    guide = AutoPlanar(model, num_layers=2).materialize(y)
    weights = LogWeights(model, guide, (y,))
    assert not weights.vectorized
    grid = torch.linspace(-6.0, 6.0, 2001)
    parts = torch.tensor([0.7, 0.3]).log() + dist.Normal(
        grid[:, None, None] + torch.tensor([0.0, 2.0]), 0.5
    ).log_prob(y[:, None])
    joint = parts.logsumexp(-1).sum(-1) + dist.Normal(0.0, 1.0).log_prob(grid)
    evidence = joint.logsumexp(0) + (grid[1] - grid[0]).log()
    result = fit(model, guide, y, num_steps=20, seed=0, progress=False)
    assert abs(weights.log_weights(200).mean() - evidence) < 0.1
    assert torch.isfinite(result.losses).all()
