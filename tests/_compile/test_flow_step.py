"""A step of a flow outside Pyro against eager Pyro's path gradient and Adam."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_flowvi import AutoFlow, AutoNICE, AutoPlanar, AutoRealNVP
from pyro_flowvi._compile.flow_step import FlowStep
from pyro_flowvi._compile.log_density import TracedDensity
from pyro_flowvi.flows import FLOWS
from pyro_flowvi.infer import TraceSTL_ELBO

PARTICLES = 16


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3):
        pyro.sample("x", dist.Normal(0.0, (0.5 * v).exp()))


def grouped(group, y):
    """Does not broadcast over particles."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("groups", 3):
        a = pyro.sample("a", dist.Normal(mu, tau))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a[group], 0.5), obs=y)


def data():
    return torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0.3, -0.5, 1.0, 0.4, -0.2])


def trained(guide):
    return [param for param in guide._flow.parameters() if param.requires_grad]


def perturbed(guide, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for param in guide.parameters():
            param += 0.1 * torch.randn_like(param)
    return guide


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("flow", sorted(FLOWS))
def test_equals_the_path_gradient_of_eager_pyro(flow):
    """On the same noise: the loss, and the gradient of every parameter."""
    guide = perturbed(AutoFlow(funnel, flow).materialize())
    step = FlowStep(guide._flow, trained(guide), TracedDensity(guide.density(), PARTICLES))
    before = step._values.clone()
    torch.manual_seed(3)
    stats = step(lr=0.0)
    gradient = step.moments[0] / 0.1  # the first moment after one step
    assert torch.equal(step._values, before)
    step.leave()
    torch.manual_seed(3)
    elbo = TraceSTL_ELBO(PARTICLES, max_plate_nesting=1, vectorize_particles=True)
    loss = elbo.loss_and_grads(funnel, guide)
    expected = torch.cat([param.grad.reshape(-1) for param in trained(guide)])
    assert stats.loss == pytest.approx(loss, rel=1e-10)
    assert torch.allclose(gradient, expected, rtol=1e-7, atol=1e-9)


def test_takes_the_steps_of_stock_svi():
    """Twenty steps of torch's Adam on the same noise, from a model that broadcasts."""
    ours = perturbed(AutoRealNVP(funnel, num_layers=2, name="ours").materialize())
    theirs = AutoRealNVP(funnel, num_layers=2, name="theirs").materialize()
    theirs._flow.load_state_dict(ours._flow.state_dict())
    step = FlowStep(ours._flow, trained(ours), TracedDensity(ours.density(), PARTICLES))
    elbo = TraceSTL_ELBO(PARTICLES, max_plate_nesting=1, vectorize_particles=True)
    svi = SVI(funnel, theirs, pyro.optim.Adam({"lr": 0.01}), elbo)
    torch.manual_seed(5)
    found = [step(lr=0.01).loss for _ in range(20)]
    torch.manual_seed(5)
    assert found == pytest.approx([svi.step() for _ in range(20)], rel=1e-9)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-9)


def test_model_that_does_not_broadcast():
    """The gradient is the mean of those of one draw each, by eager Pyro."""
    guide = perturbed(AutoNICE(grouped, num_layers=2).materialize(*data()))
    density = TracedDensity(guide.density(*data()), PARTICLES)
    assert density.batched
    assert not density.density.batched
    step = FlowStep(guide._flow, trained(guide), density)
    torch.manual_seed(1)
    noise = torch.randn(PARTICLES, guide.latent_dim)
    torch.manual_seed(1)
    stats = step(lr=0.0)
    gradient = step.moments[0] / 0.1
    step.leave()
    total, losses = torch.zeros_like(gradient), []
    for x in noise:
        z, log_det = guide._flow.forward_and_log_det(x)
        log_q = dist.Normal(torch.zeros_like(x), 1.0).log_prob(x).sum() - log_det
        losses.append((log_q - density.density.log_density(z)).item())
        at = z.detach().requires_grad_()
        back, back_log_det = guide._flow.inverse_and_log_det(at)
        score = dist.Normal(torch.zeros_like(x), 1.0).log_prob(back).sum() + back_log_det
        slope = torch.autograd.grad(score - density.density.log_density(at), at)[0]
        grads = torch.autograd.grad(z, trained(guide), slope, allow_unused=True)
        pairs = zip(trained(guide), grads, strict=True)
        total += torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs])
    assert stats.loss == pytest.approx(sum(losses) / PARTICLES, rel=1e-10)
    assert torch.allclose(gradient, total / PARTICLES, rtol=1e-6, atol=1e-9)


def test_particles_without_density_are_left_out():
    """As in the objective of eager Pyro, and counted as there."""

    def cut():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("edge", torch.where(x > 0.0, 0.0, -math.inf))

    guide = AutoPlanar(cut, num_layers=2, init_scale=1.0).materialize()
    step = FlowStep(guide._flow, trained(guide), TracedDensity(guide.density(), PARTICLES))
    torch.manual_seed(0)
    stats = step(lr=0.0)
    gradient = step.moments[0] / 0.1
    step.leave()
    torch.manual_seed(0)
    elbo = TraceSTL_ELBO(PARTICLES, max_plate_nesting=0, vectorize_particles=True)
    loss = elbo.loss_and_grads(cut, guide)
    expected = torch.cat([param.grad.reshape(-1) for param in trained(guide)])
    assert 0 < stats.num_dropped == int(elbo.num_dropped) < PARTICLES
    assert stats.loss == pytest.approx(loss, rel=1e-10)
    assert torch.allclose(gradient, expected, rtol=1e-7, atol=1e-9)


def test_limits_and_memory():
    """Above the second limit nothing moves; the parameters get their own memory back, with their values."""
    guide = perturbed(AutoRealNVP(funnel, num_layers=2).materialize())
    homes = [param.data_ptr() for param in trained(guide)]
    limits = torch.tensor([math.inf, 0.0], dtype=torch.float64)
    step = FlowStep(guide._flow, trained(guide), TracedDensity(guide.density(), PARTICLES), limits)
    before = [param.detach().clone() for param in trained(guide)]
    assert step(lr=0.1).grad_norm > 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, trained(guide), strict=True))
    limits[1] = math.inf
    step(lr=0.1)
    moved = [param.detach().clone() for param in trained(guide)]
    assert not all(torch.equal(a, b) for a, b in zip(before, moved, strict=True))
    step.leave()
    assert [param.data_ptr() for param in trained(guide)] == homes
    assert all(torch.equal(a, b) for a, b in zip(moved, trained(guide), strict=True))
