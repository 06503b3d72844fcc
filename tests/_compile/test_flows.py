"""Every flow of the registry runs compiled, with a context too, and takes the steps of stock SVI."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_flowvi import FLOWS, AutoCIF, AutoFlow, CompiledSVI
from pyro_flowvi.distributions import FlowDistribution

QUICK = ("neural_spline", "maf")
"""Each takes several seconds to compile: these have the gathers, the operators of the autoregressive inverse
and the masked networks, and the amortised one below the couplings and the context."""

CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in FLOWS]


def model(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.square().sum(-1), 0.5), obs=y)


def losses_and_params(svi_class, guide, make_model, args, num_steps=6, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    program = guide()
    svi = svi_class(make_model, program, Adam({"lr": 1e-2}), loss, **options)
    losses = [svi.step(*args) for _ in range(num_steps)]
    return losses, [value.detach().clone() for value in pyro.get_param_store().values()]


def assert_same_steps(guide, make_model, args):
    eager, eager_params = losses_and_params(SVI, guide, make_model, args)
    compiled, params = losses_and_params(CompiledSVI, guide, make_model, args, compile=True)
    assert compiled == pytest.approx(eager, rel=1e-8)
    for a, b in zip(params, eager_params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_guide(name):
    def guide():
        return AutoFlow(model, lambda dim: FLOWS[name](dim, num_layers=2, hidden=(4,)), name="guide")

    assert_same_steps(guide, model, (torch.tensor(2.0),))


@pytest.mark.parametrize("num_extra", [0, pytest.param(2, marks=pytest.mark.long)])
def test_continuously_indexed(num_extra):
    def guide():
        return AutoCIF(model, "planar", 1, index_hidden=(3,), num_extra=num_extra, name="guide")

    assert_same_steps(guide, model, (torch.tensor(2.0),))


def rows_model(rows):
    with pyro.plate("rows", len(rows)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=rows[:, 0])


@pytest.mark.parametrize(
    "name", [name if name == "realnvp" else pytest.param(name, marks=pytest.mark.long) for name in FLOWS]
)
def test_amortised(name):
    """A conditional flow as the guide of a latent for each row."""

    def make_guide():
        flow = FLOWS[name](2, num_layers=2, hidden=(4,), context_dim=1)

        def guide(rows):
            pyro.module("flow", flow)
            with pyro.plate("rows", len(rows)):
                pyro.sample("z", FlowDistribution(None, flow.condition(rows)))

        return guide

    assert_same_steps(make_guide, rows_model, (torch.randn(5, 1),))
