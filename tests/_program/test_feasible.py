"""Supports that end where the data end: a start of finite density is found, and fits end near the truth."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowvi import AutoNeuralSpline, AutoPlanar, FitDiverged, diagnose, fit
from pyro_flowvi._program.log_density import UnconstrainedModel


def width(y, **options):
    theta = pyro.sample("theta", dist.Pareto(1.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Uniform(0.0, theta, **options), obs=y)


def far_width(y):
    theta = pyro.sample("theta", dist.LogNormal(0.0, 10.0))
    pyro.sample("y", dist.Uniform(0.0, theta).expand([3]).to_event(1), obs=1e4 * y[:3])


def shift(y):
    """Exponential from mu on."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    inside = (y > mu).all()
    pyro.factor("seen", torch.where(inside, len(y) * rate.log() - rate * (y - mu).sum(), -torch.inf))


def ordered(y):
    m = pyro.sample("m", dist.Normal(0.0, 5.0).expand([3]).to_event(1))
    pyro.factor("order", torch.where((m[1:] > m[:-1]).all(), 0.0, -torch.inf))
    pyro.sample("y", dist.Normal(m, 1.0).to_event(1), obs=y[:3])


def censored(y):
    """Known up to an interval, with hard edges."""
    mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
    with pyro.plate("rows", len(y)):
        x = pyro.sample("x", dist.Normal(mu, 1.0))
        pyro.factor("inside", torch.where((x > y) & (x < y + 1.0), 0.0, -torch.inf))


def change_point(y):
    t = pyro.sample("t", dist.Uniform(0.0, 100.0))
    pyro.factor("late", torch.where(t > 90.0 + y[0], 0.0, -torch.inf))


def below_the_data(y):
    """Pyro refuses the parameter, not the value, at most starts."""
    theta = pyro.sample("theta", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(theta, (theta - y.max()).sqrt()).expand([len(y)]).to_event(1), obs=y)


KINDS = [width, far_width, shift, ordered, censored, change_point, below_the_data]


@pytest.mark.parametrize("model", KINDS, ids=lambda f: f.__name__)
def test_a_start_of_finite_density_is_found(model):
    y = torch.tensor([5.0, 1.0, 2.0, 3.0])
    guide = AutoPlanar(model, 2).materialize(y)
    assert UnconstrainedModel(model, (y,)).log_density(guide._init_loc()).isfinite()
    # As stock SVI meets it: most draws of the guide before training have a density.
    draws = guide.get_posterior().sample((20,))
    with torch.no_grad():
        values = torch.stack([guide.density(y).log_density(z) for z in draws])
    assert values.isfinite().double().mean() >= 0.5


def test_a_start_that_has_a_density_is_left_alone():
    init = pyro.infer.autoguide.init_to_value(values={"theta": torch.tensor(7.0)})
    y = torch.tensor([1.0, 5.0])
    guide = AutoPlanar(width, 2, init_loc_fn=init).materialize(y)
    assert guide.affine.loc.item() == pytest.approx(torch.tensor(6.0).log().item(), abs=1e-5)


@pytest.mark.parametrize("options", [{"validate_args": False}, {}], ids=["-inf", "refused"])
@pytest.mark.long
def test_the_width_of_a_uniform(options):
    """The posterior is a Pareto from the largest observation on, of shape n + 1."""

    def model(y):
        width(y, **options)

    y = 5.0 * torch.rand(20)
    guide = AutoNeuralSpline(model)
    fit(model, guide, y, seed=0, num_steps=1000, progress=False)
    theta = guide.sample_posterior(4000, resample=True)["theta"]
    assert theta.mean().item() == pytest.approx(21 * y.max().item() / 20, abs=0.15)
    assert diagnose(model, guide, y, seed=0).verdict in ("poor", "usable")


@pytest.mark.parametrize("options", [{"validate_args": False}, {}], ids=["-inf", "refused"])
def test_where_no_start_has_a_density_the_error_says_how_to_give_one(options):
    def model(y):
        pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Uniform(0.0, 1.0, **options), obs=y)

    with pytest.raises(FitDiverged, match=r"step 0: .*first at site 'y'.*init_loc_fn"):
        fit(model, AutoPlanar(model, 2), torch.tensor(2.0), num_steps=5, progress=False)


def test_where_pyro_refuses_every_start():
    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, theta * torch.nan), obs=torch.tensor(2.0))

    with pytest.raises(
        ValueError, match=r"(?s)Expected parameter scale.*at \['y'\] was found; .*init_loc_fn"
    ):
        AutoPlanar(model, 2).materialize()
