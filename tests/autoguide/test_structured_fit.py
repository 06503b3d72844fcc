"""``fit`` of guides that run the model's priors: what it must take, and what it leaves behind."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroSample

from pyro_flowvi import AutoRealNVP, diagnose, fit
from pyro_flowvi.autoguide._rivals import falls_behind
from pyro_flowvi.datasets import EIGHT_SCHOOLS
from pyro_flowvi.demo import eight_schools
from tests.autoguide.test_structured_contract import case, step
from tests.hierarchies import NAMES, scale_without_prior


def quickly(model, *args, num_steps=20, **options):
    guide = AutoRealNVP(model, num_layers=2, hidden=(5,), **options)
    result = fit(model, guide, *args, num_steps=num_steps, progress=False, seed=0)
    assert all(value.isfinite().all() for value in guide.sample_posterior(100).values())
    return guide, result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "name", [n if n == "slopes" else pytest.param(n, marks=pytest.mark.long) for n in NAMES]
)
def test_takes(name, dtype):
    torch.set_default_dtype(dtype)
    model, args = case(name)
    guide, result = quickly(model, *args)
    assert guide.structure.taken or "the flat guide had the better ELBO" in guide.structure.why
    assert math.isfinite(result.best_loss)
    assert {param.dtype for param in guide.parameters()} == {dtype}


def test_a_discrete_site_of_the_model():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(theta + 4.0 * z, 0.5), obs=y)

    guide, _ = quickly(model, torch.tensor([0.1, 4.2, 0.5, -0.3, 3.8]))
    assert guide.structure.taken


def test_without_second_derivatives():
    """Torch has none of ``logit``: the start is that of the same model in other words."""

    def model(y, logit):
        mean = pyro.sample("mean", dist.Beta(2.0, 2.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(logit(mean), tau))
            pyro.sample("y", dist.Binomial(10, logits=theta), obs=y)

    y, found = torch.tensor([3.0, 5.0, 6.0, 2.0, 7.0]), []
    for logit in (torch.logit, lambda p: p.log() - (-p).log1p()):
        pyro.set_rng_seed(0)
        guide, result = quickly(model, y, logit, num_steps=5)
        assert guide.structure.taken
        found.append((result.losses[0], guide.median()["theta"]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


def test_rows_that_are_drawn_at_each_step():
    """The latents are global: groups of which a step sees some rows."""

    def model(group, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("groups", 8):
            a = pyro.sample("a", dist.Normal(mu, tau))
        with pyro.plate("rows", len(y), subsample_size=10) as index:
            pyro.sample("y", dist.Normal(a[..., group[index]], 1.0), obs=y[index])

    quickly(model, torch.arange(40) % 8, torch.randn(40))


def test_no_site_is_small():
    """Fields alone, and one given the other."""

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(70), 1.0).to_event(1))
        with pyro.plate("rows", 70):
            theta = pyro.sample("theta", dist.Normal(w, 0.5))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    y = torch.randn(70)
    guide, result = quickly(model, y, num_steps=200)
    assert guide.structure.taken
    variance = 1.0 + 0.25 + 1.0
    evidence = dist.Normal(0.0, math.sqrt(variance)).log_prob(y).sum()
    assert -result.best_loss == pytest.approx(float(evidence), abs=0.5)


def test_one_large_site():
    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(70), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w, 1.0).to_event(1), obs=y)

    assert quickly(model, torch.randn(70), structure="program")[0].structure.taken


@pytest.mark.long
def test_a_parameter_of_the_model_reaches_its_maximum():
    """The scale of the groups has no prior: it goes to the maximum of the evidence."""
    y = 1.0 + 2.0 * torch.randn(20)
    quickly(scale_without_prior, y, num_steps=1500)
    scales = torch.linspace(0.5, 5.0, 901)
    covariance = torch.eye(20) * (1.0 + scales[:, None, None] ** 2) + 9.0
    evidence = dist.MultivariateNormal(torch.zeros(20), covariance).log_prob(y)
    assert float(pyro.param("scale").detach()) == pytest.approx(float(scales[evidence.argmax()]), rel=0.1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("data", "noise"),
    [((5.0, -3.0, 2.0, 8.0, 0.0, 1.0), 1.0), ((0.0,) * 6, 1.0), ((900.0, 1100.0, 1000.0), 10.0)],
)
def test_flat_priors(data, noise):
    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        tau = pyro.sample("tau", dist.HalfCauchy(10.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, noise), obs=y)

    guide, _ = quickly(model, torch.tensor(data), num_steps=100)
    assert guide.structure.taken
    mean = sum(data) / len(data)
    assert float(guide.median()["mu"]) == pytest.approx(mean, abs=2.0 * (noise + (max(data) - min(data)) / 2))


def test_a_module():
    class Groups(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(1, 1)
            self.mu = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, x, y):
            with pyro.plate("groups", len(y)):
                theta = pyro.sample("theta", dist.Normal(self.mu + self.net(x).squeeze(-1), 0.3))
                pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    model, x = Groups(), torch.linspace(-2.0, 2.0, 10).unsqueeze(-1)
    before = model.net.weight.detach().clone()
    guide, _ = quickly(model, x, 2.0 * x.squeeze(-1))
    assert guide.structure.taken
    assert model.net.weight > before


def test_goes_flat():
    """A prior whose numbers are of one large site, coupled by the data beyond what can be taken apart."""

    def model(x, y):
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("columns", x.shape[1]):
            w = pyro.sample("w", dist.Normal(0.0, tau))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x = torch.randn(20, 1100) / 30.0
    guide = AutoRealNVP(model, num_layers=2, hidden=(5,)).materialize(x, torch.randn(20))
    assert guide.structure.taken
    fit(model, guide, x, torch.randn(20), num_steps=2, progress=False, seed=0)
    assert not guide.structure.taken
    assert "no mode given the roots" in str(guide.structure)
    draws = guide.sample_posterior(3)
    assert draws["w"].shape == (3, 1100)
    assert guide.log_prob(draws).isfinite().all()
    fresh = AutoRealNVP(model, num_layers=2, hidden=(5,))
    fresh.load_state_dict(guide.state_dict())
    fresh.materialize(x, torch.randn(20))
    assert not fresh.structure.taken
    torch.testing.assert_close(fresh.log_prob(draws), guide.log_prob(draws))


def test_after_a_fit():
    model, args = case("schools")
    guide = AutoRealNVP(model, num_layers=2, hidden=(5,))
    fit(model, guide, *args, num_steps=40, progress=False, seed=0)
    assert guide.structure.taken
    values = guide.sample_posterior(4)
    expected = guide.log_prob(values)
    twin, loaded = copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))
    fresh = AutoRealNVP(model, num_layers=2, hidden=(5,))
    fresh.load_state_dict(guide.state_dict())
    fresh.materialize(*args)
    for other in (twin, loaded, fresh):
        torch.testing.assert_close(other.log_prob(values), expected)
    fit(model, guide, *args, num_steps=20, progress=False, seed=1)
    step(model, guide, args, Trace_ELBO())


@pytest.mark.long
def test_diagnose():
    model, args = case("schools")
    guide = AutoRealNVP(model, num_layers=2, hidden=(5,))
    fit(model, guide, *args, num_steps=300, progress=False, seed=0)
    assert diagnose(model, guide, *args).khat < 0.7
    resampled = guide.sample_posterior(100, resample=True)
    assert resampled["theta"].shape == (100, 6)


@pytest.mark.parametrize("seed", [0, pytest.param(4, marks=pytest.mark.long)])
def test_the_tail_of_a_scale(seed):
    """A fit does not end while the tail of tau itself, not of its logarithm, is off: by quadrature."""
    y, sigma = (torch.tensor(EIGHT_SCHOOLS[key], dtype=torch.float64) for key in ("y", "sigma"))
    tau = torch.linspace(1e-3, 400.0, 400_001, dtype=torch.float64)
    variance = sigma.unsqueeze(-1).square() + tau.square()
    # mu is integrated out in closed form, given tau.
    precision, weighted = variance.reciprocal().sum(0) + 1 / 25.0, (y.unsqueeze(-1) / variance).sum(0)
    log_p = (
        weighted.square() / precision
        - precision.log()
        - (variance.log() + y.unsqueeze(-1) ** 2 / variance).sum(0)
    )
    p = (0.5 * log_p - (tau / 5.0).square().log1p()).softmax(0)
    mean = (p * tau).sum()
    sd = (p * (tau - mean).square()).sum().sqrt()
    guide = AutoRealNVP(eight_schools)
    fit(eight_schools, guide, y, sigma, seed=seed, progress=False)
    drawn = guide.sample_posterior(100_000)["tau"]
    assert drawn.mean() == pytest.approx(mean.item(), abs=0.1 * sd.item())
    assert drawn.std() == pytest.approx(sd.item(), rel=0.08)


def test_one_draw_far_out_does_not_hide_that_a_guide_falls_behind():
    """The standard error that it makes is as large as the gap."""
    good = torch.randn(512) - 98.0
    bad = torch.randn(512) - 97.0
    bad[3] = -1e22
    assert falls_behind(bad, good)
    assert not falls_behind(good, bad)
    assert falls_behind(good, good + 1.0)
    assert not falls_behind(good, torch.randn(512) - 98.05)
