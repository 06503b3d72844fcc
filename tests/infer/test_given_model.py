"""fit and diagnose are about the model that they are given, also where the guide was made of another one."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_flowvi import AutoRealNVP, diagnose, fit

Y = torch.tensor([-3.4, -2.1, -3.3, -2.9, 2.2, 3.9, 3.1, 3.4, 2.7, 3.0])


def mixture(y):
    centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
    width = pyro.sample("width", dist.HalfNormal(2.0))
    with pyro.plate("rows", len(y)):
        side = pyro.sample("side", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(centre + 6 * side - 3, width), obs=y)


@pytest.mark.filterwarnings("ignore:the model is run draw by draw")
def test_a_discrete_site_hidden_from_the_guide():
    """As Pyro's autoguides want it: the start and the verdict sum the site out as the objective does."""
    y = Y.to(torch.get_default_dtype())
    guides = AutoRealNVP(mixture), AutoRealNVP(poutine.block(mixture, hide=["side"]))
    results = [fit(mixture, guide, y, seed=0, num_steps=300, progress=False) for guide in guides]
    assert results[1].start == results[0].start
    assert results[1].best_loss == pytest.approx(results[0].best_loss, abs=0.05)
    assert diagnose(mixture, guides[1], y, seed=0).verdict == "good"


def test_another_prior_than_the_guides():
    def model(y, centre=50.0):
        loc = pyro.sample("loc", dist.Normal(centre, 1.0))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc + shift, 1.0), obs=y)

    def other(y):
        model(y, centre=0.0)

    y = Y.to(torch.get_default_dtype())
    guide = AutoRealNVP(other)
    result = fit(model, guide, y, seed=0, num_steps=100, progress=False)
    # The mean of (loc, shift) given n rows: the prior's, moved alike by what the rows say of the sum.
    moved = len(y) * (y.mean().item() - 50.0) / (2 * len(y) + 1)
    assert guide.median()["loc"].item() == pytest.approx(50.0 + moved, abs=0.1)
    assert guide.median()["shift"].item() == pytest.approx(moved, abs=0.1)
    assert result.best_loss == pytest.approx(-exact(y), abs=0.05)
    assert diagnose(model, guide, y, seed=0).verdict == "good"


def exact(y):
    """The evidence: rows are normal around 50 with a common part of variance 2."""
    covariance = torch.eye(len(y)) + 2.0
    return dist.MultivariateNormal(torch.full_like(y, 50.0), covariance).log_prob(y).item()
