"""Steps of AutoFlowMixture outside Pyro have the gradient of Pyro's enumeration, whatever the model."""

import importlib

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

from pyro_flowvi import AutoFlowMixture, fit
from pyro_flowvi._compile.log_density import traced
from pyro_flowvi._compile.mixture_step import MixtureStep
from pyro_flowvi.infer import TraceEnumSTL_ELBO

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*found no sample sites configured for enumeration"),
]

fitting = importlib.import_module("pyro_flowvi.infer._fit")
GROUP = torch.tensor([0, 0, 1, 2, 1, 2, 0])
X = torch.tensor([[0.5, 1.0], [-1.0, 0.3], [2.0, -0.7], [0.1, 0.2]], dtype=torch.float64)


def grouped(index):
    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        y = torch.linspace(-1.0, 2.0, 7)
        pyro.sample("y", dist.Normal(index(a).square(), s.unsqueeze(-1)).to_event(1), obs=y)

    return model


def regression(product):
    def model():
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        pyro.sample("y", dist.Normal(product(b), 1.0).to_event(1), obs=torch.tensor([1.0, 0.0, 2.0, -1.0]))

    return model


def loop(element):
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        for i in range(3):
            pyro.sample(f"y{i}", dist.Normal(element(x, i).square(), 0.5), obs=torch.tensor(0.5 * i))

    return model


PAIRS = {
    "index": (grouped(lambda a: a[..., GROUP]), grouped(lambda a: a[GROUP])),
    "matrix": (regression(lambda b: (X * b.unsqueeze(-2)).sum(-1)), regression(lambda b: X @ b)),
    "loop": (loop(lambda x, i: x[..., i]), loop(lambda x, i: x[i])),
}


def away_from_the_posterior(model, num=3):
    torch.manual_seed(0)
    guide = AutoFlowMixture(model, num, num_layers=2, hidden=(4,), init_scale=0.6).materialize()
    with torch.no_grad():
        for param in guide.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return guide


def step_of(guide, particles):
    density = guide.density()
    flow = guide._flow
    params = [param for param in flow.parameters() if param.requires_grad]
    return MixtureStep(flow, params, traced(density, particles * guide.num_components))


def pyros_gradient(model, guide, objective, particles):
    elbo = objective(num_particles=particles, vectorize_particles=True, max_plate_nesting=0)
    guide.zero_grad()
    loss = elbo.loss_and_grads(model, guide)
    return loss, torch.cat([param.grad.flatten() for param in guide.parameters() if param.requires_grad])


@pytest.mark.parametrize("name", PAIRS)
def test_gradient_is_that_of_pyro_on_the_same_noise(name):
    for model in PAIRS[name]:
        guide = away_from_the_posterior(PAIRS[name][0])
        torch.manual_seed(3)
        loss, expected = pyros_gradient(PAIRS[name][0], guide, TraceEnumSTL_ELBO, 8)
        step = step_of(away_from_the_posterior(model), 8)
        torch.manual_seed(3)
        found = step._gradient()
        assert step._loss == pytest.approx(loss, rel=1e-9)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
        step.leave()


def test_gradient_is_on_average_that_of_trace_enum():
    """Without the score, whose mean is zero, of which Pyro's objective has the noise."""
    guide = away_from_the_posterior(PAIRS["index"][0], 2)
    torch.manual_seed(1)
    many = [pyros_gradient(PAIRS["index"][0], guide, TraceEnum_ELBO, 256)[1] for _ in range(40)]
    step = step_of(guide, 256)
    own = [step._gradient().clone() for _ in range(40)]
    step.leave()
    means, ses = zip(*((x.mean(0), x.std(0) / 40**0.5) for x in map(torch.stack, (many, own))), strict=True)
    gap = (means[0] - means[1]) / (ses[0].square() + ses[1].square()).sqrt().clamp(min=1e-9)
    assert gap.abs().max() < 4.5
    assert gap.square().mean() < 2.0


def test_draws_without_a_density_are_left_out():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("edge", torch.where(x > 1.0, -torch.inf, 0.0 * x))

    guide = AutoFlowMixture(model, 2, num_layers=2, hidden=(4,)).materialize()
    guide.place(torch.tensor([[-2.0], [0.5]]), torch.tensor([[0.3], [0.5]]), torch.tensor([0.4, 0.6]))
    step = step_of(guide, 64)
    torch.manual_seed(0)
    dropped = step(0.0).num_dropped
    torch.manual_seed(0)
    z = guide._flow(torch.randn(64, 2, 1))
    step.leave()
    assert dropped == int((z > 1.0).sum())
    assert dropped > 0


def test_components_that_are_lost_altogether_are_no_step():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("edge", torch.where(x > 1.0, -torch.inf, 0.0 * x))

    guide = AutoFlowMixture(model, 2, num_layers=2, hidden=(4,)).materialize()
    guide.place(torch.tensor([[-2.0], [9.0]]), torch.tensor([[0.3], [0.5]]), torch.tensor([0.4, 0.6]))
    step = step_of(guide, 8)
    before = [param.clone() for param in guide.parameters()]
    assert step(0.1).loss != step(0.1).loss  # NaN, from which fit recovers
    assert all(map(torch.equal, before, guide.parameters()))
    step.leave()


@pytest.mark.parametrize("name", PAIRS)
def test_a_model_that_does_not_broadcast_is_fitted_as_one_that_does(name, outside):
    losses = []
    for model in PAIRS[name]:
        pyro.clear_param_store()
        guide = AutoFlowMixture(model, 2, num_layers=2, hidden=(4,), enumerate="sequential")
        losses.append(fit(model, guide, num_steps=60, seed=0, progress=False).losses)
    assert outside == [True, True]
    torch.testing.assert_close(losses[0][:20], losses[1][:20], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-2)


def test_methods_of_ones_own_are_left_to_pyro(outside):
    class Own(AutoFlowMixture):
        def sample_latent(self, *args, **kwargs):
            return super().sample_latent(*args, **kwargs)

    model = PAIRS["index"][0]
    fit(model, Own(model, 2, num_layers=2, hidden=(4,)), num_steps=60, seed=0, progress=False)
    assert outside == [False]
