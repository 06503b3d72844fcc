"""The importance-weighted ELBO: its value, its bound and both gradients."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_flowvi import AutoFlow
from pyro_flowvi.objectives.importance_weighted import TraceIW_ELBO
from pyro_flowvi.transforms import Planar
from tests.objectives.cases import FINITE, assert_unbiased, exact_gradient, gradients, z_scores

# -- importance-weighted bounds -----------------------------------------------------------------------
SLOPE = 0.7


def line(y):
    slope = pyro.param("slope", torch.tensor(SLOPE))
    x = pyro.sample("x", dist.Normal(0.3, 1.2))
    pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)


def line_guide(y):
    loc, log_scale = pyro.param("loc", torch.tensor(0.2)), pyro.param("log_scale", torch.tensor(-0.3))
    pyro.sample("x", dist.Normal(loc, log_scale.exp()))


def iw_bound(loc, log_scale, slope, y, num, points=24):
    """The bound by Gauss-Hermite quadrature over the noise of all particles."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    nodes, weights = torch.as_tensor(nodes), torch.as_tensor(weights / math.sqrt(2 * math.pi))
    x = loc + log_scale.exp() * nodes
    log_w = dist.Normal(0.3, 1.2).log_prob(x) + dist.Normal(slope * x, 0.5).log_prob(y)
    log_w = log_w - dist.Normal(loc, log_scale.exp()).log_prob(x)
    total, mass = log_w, weights
    for _ in range(num - 1):
        total = torch.logaddexp(total.unsqueeze(-1), log_w)
        mass = mass.unsqueeze(-1) * weights
    return (mass * (total - math.log(num))).sum()


@pytest.mark.parametrize("vectorized", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("dreg", [True, False])
def test_iw_is_unbiased(dreg, vectorized):
    y = torch.tensor(1.5)
    elbo = TraceIW_ELBO(3, dreg=dreg, vectorize_particles=vectorized)
    elbo.differentiable_loss(line, line_guide, y)
    params = [pyro.param(name).unconstrained() for name in ("loc", "log_scale", "slope")]
    exact = exact_gradient(-iw_bound(*params, y, 3), params)
    draws = gradients(elbo, line, line_guide, params, 1500 if vectorized else 600, (y,))
    assert_unbiased(draws, exact)
    losses = torch.tensor([elbo.loss(line, line_guide, y) for _ in range(600)])
    assert z_scores(losses, -iw_bound(*params, y, 3).detach()) < 4.5


@pytest.mark.parametrize("dreg", [True, False])
def test_iw_is_unbiased_for_a_flow(dreg):
    y = torch.tensor(1.5)
    guide = AutoFlow(line, lambda dim: Planar(dim), name="flow")
    elbo = TraceIW_ELBO(3, dreg=dreg, vectorize_particles=True)
    elbo.differentiable_loss(line, guide, y)
    affine = guide.affine
    with torch.no_grad():
        affine.loc.fill_(0.2)
        affine.log_scale.fill_(-0.3)
    params = [affine.loc, affine.log_scale, pyro.param("slope").unconstrained()]
    exact = exact_gradient(-iw_bound(*params, y, 3), params)
    assert_unbiased(gradients(elbo, line, guide, params, 1000, (y,)), exact)


@pytest.mark.parametrize("vectorized", [True, False])
def test_iw_value_is_the_log_mean_of_the_weights(vectorized):
    y = torch.tensor(1.5)
    elbo = TraceIW_ELBO(5, vectorize_particles=vectorized, max_plate_nesting=0)
    poutine.trace(line_guide).get_trace(y)  # makes the parameters
    pyro.set_rng_seed(3)
    loss = elbo.loss(line, line_guide, y)
    pyro.set_rng_seed(3)
    x = 0.2 + math.exp(-0.3) * (
        torch.randn(5) if vectorized else torch.stack([torch.randn(()) for _ in "12345"])
    )
    log_w = dist.Normal(0.3, 1.2).log_prob(x) + dist.Normal(SLOPE * x, 0.5).log_prob(y)
    log_w = log_w - dist.Normal(0.2, math.exp(-0.3)).log_prob(x)
    assert loss == pytest.approx(-(log_w.logsumexp(0) - math.log(5)).item(), rel=1e-10)
    pyro.set_rng_seed(3)
    assert elbo.loss_and_grads(line, line_guide, y) == pytest.approx(loss, rel=1e-10)


def test_iw_bound_rises_to_the_evidence():
    y = torch.tensor(1.5)
    evidence = dist.Normal(SLOPE * 0.3, math.hypot(0.5, SLOPE * 1.2)).log_prob(y).item()
    bounds = []
    for num in (2, 16, 256):
        elbo = TraceIW_ELBO(num, vectorize_particles=True, max_plate_nesting=0)
        bounds.append(-sum(elbo.loss(line, line_guide, y) for _ in range(300)) / 300)
    assert bounds[0] + 0.03 < bounds[1] < bounds[2] < evidence + 0.02
    assert bounds[2] == pytest.approx(evidence, abs=0.05)


def test_dreg_keeps_its_signal_with_many_particles():
    """The Gaussian example of Rainforth et al. 2018, section 4.1: z ~ N(mu, I), x ~ N(z, I), q a little off
    its best; signal-to-noise ratio of the gradient of the guide's offset at 2 and 500 particles.  Measured:
    plain 0.05 at both, doubly reparameterised 0.04 and 0.39."""
    dim, x = 20, torch.randn(20, dtype=torch.float64)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide():
        b = pyro.param("b", 0.01 * torch.randn(dim))
        pyro.sample("z", dist.Normal(0.5 * x + b, math.sqrt(2 / 3)).to_event(1))

    def ratio(num, dreg):
        elbo = TraceIW_ELBO(num, dreg=dreg, vectorize_particles=True, max_plate_nesting=0)
        elbo.loss(model, guide)
        draws = gradients(elbo, model, guide, [pyro.param("b").unconstrained()], 300)
        return (draws.mean(0).abs() / draws.std(0)).mean().item()

    plain, twice = [ratio(n, False) for n in (2, 500)], [ratio(n, True) for n in (2, 500)]
    assert twice[1] > 3 * plain[1]
    assert twice[1] > twice[0]


@FINITE
def test_iw_counts_a_particle_of_density_zero():
    """It is a weight of zero, not a failure: left out, the bound would be above the evidence."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("inside", torch.where(x > 0, 0.0, -torch.inf))

    def guide():
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    elbo = TraceIW_ELBO(1000, vectorize_particles=True)
    assert elbo.loss_and_grads(model, guide) == pytest.approx(math.log(2.0), abs=0.2)
    assert elbo.num_dropped == 0
    assert pyro.param("loc").unconstrained().grad.isfinite().all()
