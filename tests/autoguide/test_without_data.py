"""A guide that is set up answers whatever it is called with, as Pyro's autoguides do."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import Adam

from pyro_flowvi import AutoPlanar

from ..guides import GUIDES, KINDS


def regression(x, y=None):
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        return pyro.sample("y", dist.Normal(b * x, 1.0), obs=y)


def local(x, y=None):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        return pyro.sample("y", dist.Normal(z * x, 1.0), obs=y)


@pytest.fixture
def x():
    return torch.linspace(-1.0, 1.0, 30)


def trained(kind, model, x):
    guide = GUIDES[kind](model)
    loss = TraceEnum_ELBO(max_plate_nesting=1) if kind == "mixture" else Trace_ELBO()
    SVI(model, guide, Adam({"lr": 0.02}), loss).step(x, 2.0 * x)
    return guide


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", [regression, local])
def test_draws_alone(kind, model, x):
    guide = trained(kind, model, x)
    shapes = {name: draw.shape for name, draw in guide(x, 2.0 * x).items()}
    calls = [(), (None,), (torch.zeros(7),), ("refused", 1), (x, None)]
    for call in calls:
        assert {name: draw.shape for name, draw in guide(*call).items()} == shapes
        assert guide.median(*call).keys() == guide.quantiles([0.5], *call).keys() == shapes.keys()
    assert guide(y=None)["b" if model is regression else "scale"].shape == ()
    for parallel in (False, True):
        draws = Predictive(guide, num_samples=3, parallel=parallel)()
        # A plate of the guide keeps its place, to the right of Predictive's own.
        assert all(draws[name].reshape((3,) + shape).isfinite().all() for name, shape in shapes.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parallel", [False, True])
def test_new_rows(kind, parallel, x):
    guide = trained(kind, regression, x)
    new = Predictive(regression, guide=guide, num_samples=4, parallel=parallel)(torch.randn(7))["y"]
    assert new.shape == (4, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_new_rows_with_latents_of_their_own(kind, x):
    """The model draws them, given the latents that all rows share."""
    guide = trained(kind, local, x)
    draws = guide.sample_posterior(50)
    new = Predictive(local, posterior_samples={"scale": draws["scale"]})(torch.ones(7))
    assert new["z"].shape == new["y"].shape == (50, 7)


def test_the_model_is_not_run_again(x):
    calls = []

    def model(data):
        calls.append(data)
        pyro.sample("b", dist.Normal(0.0, 1.0))

    guide = AutoPlanar(model).materialize(x)
    calls.clear()
    for rows in range(1, 5):
        guide(torch.zeros(rows))
    assert not calls


def test_draws_do_not_depend_on_the_call(x):
    guide = trained("realnvp", regression, x)
    drawn = []
    for call in ((x, 2.0 * x), (), (torch.zeros(3),)):
        pyro.set_rng_seed(0)
        drawn.append(guide(*call)["b"])
    assert drawn[0].equal(drawn[1])
    assert drawn[0].equal(drawn[2])


def test_a_guide_that_was_moved(x):
    """Its supports follow at the next call with data."""

    def model(data):
        pyro.sample("u", dist.Uniform(data.min() - 1.0, data.max()))

    guide = AutoPlanar(model).materialize(x.double()).float()
    assert guide()["u"].shape == ()
    assert guide(x.float())["u"].dtype == torch.float32
    assert guide._site("u")["fn"].low.dtype == torch.float32


def test_in_a_list_of_guides(x):
    guide = AutoGuideList(local)
    guide.append(AutoPlanar(poutine.block(local, hide=["z"])))
    guide.append(AutoNormal(poutine.block(local, expose=["z"])))
    SVI(local, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(x, x)
    for call in ((), (None,), (torch.zeros(7),)):
        assert guide(*call)["scale"].shape == ()
        assert guide(*call)["z"].shape == (30,)


class Walk(ForecastingModel):
    """A random walk with drift; its locals end with the data, and the forecast has more of them."""

    def model(self, zero_data, covariates):
        level = pyro.sample("level", dist.Normal(0.0, 10.0))
        scale = pyro.sample("scale", dist.LogNormal(-2.0, 1.0))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        self.predict(dist.Normal(0.0, scale.unsqueeze(-1)), (level + drift.cumsum(-1)).unsqueeze(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_forecast(kind):
    data, covariates = torch.randn(20, 1).cumsum(0), torch.zeros(25, 0)
    model = Walk()
    options = {"num_steps": 5, "log_every": 0, "vectorize_particles": False}
    forecaster = Forecaster(model, data, covariates[:20], guide=GUIDES[kind](model), **options)
    assert forecaster(data, covariates, num_samples=7).shape == (7, 5, 1)
    assert forecaster(data, covariates[:22], num_samples=3).shape == (3, 2, 1)
