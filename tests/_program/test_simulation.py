"""Draws of latents and data from models as users write them, and the models of these data."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam

from pyro_flowvi._program.simulation import GenerativeModel

GROUP = torch.tensor([0, 0, 1, 2])


def rows(y, scale=1e-6):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def seen(drawn):
    """What the model of the drawn data observes when it is run."""
    trace = poutine.trace(drawn.model).get_trace(*drawn.args, **drawn.kwargs)
    return {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample" and s["is_observed"]}


class TestData:
    def test_an_argument_is_written_over_and_the_users_stays(self):
        y = torch.full((3,), 9.0)
        drawn = GenerativeModel(rows, (y,)).draw()
        torch.testing.assert_close(drawn.args[0], drawn.latents["mu"].expand(3), atol=1e-4, rtol=0.0)
        torch.testing.assert_close(seen(drawn)["y"], drawn.args[0])
        assert y.equal(torch.full((3,), 9.0))

    def test_a_keyword_and_a_dict(self):
        drawn = GenerativeModel(rows, (), {"y": torch.zeros(3), "scale": 1e-5}).draw()
        assert drawn.kwargs["y"].eq(seen(drawn)["y"]).all()

        def model(data):
            pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1e-6), obs=data["y"][0])

        drawn = GenerativeModel(model, ({"y": (torch.zeros(()), "name")},)).draw()
        assert drawn.args[0]["y"][0] == seen(drawn)["y"] != 0.0

    def test_what_is_computed_of_an_argument_is_observed_all_the_same(self):
        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.sample("log_y", dist.Normal(mu, 1e-6), obs=y.log())

        drawn = GenerativeModel(model, (torch.tensor(2.0),)).draw()
        assert drawn.args[0] == 2.0
        assert abs(seen(drawn)["log_y"] - drawn.latents["mu"]) < 1e-4

    def test_a_loop_over_time_reads_what_it_drew(self):
        """x_t = 0.5 x_{t-1} + tiny noise, the lag read from the argument."""

        def model(x):
            phi = pyro.sample("phi", dist.Delta(torch.tensor(0.5)))
            start = pyro.sample("start", dist.Normal(0.0, 1.0))
            for t in pyro.markov(range(len(x))):
                mean = start if t == 0 else phi * x[t - 1]
                pyro.sample(f"x_{t}", dist.Normal(mean, 1e-7), obs=x[t])

        drawn = GenerativeModel(model, (torch.full((5,), 7.0),)).draw()
        expected = drawn.latents["start"] * 0.5 ** torch.arange(5)
        torch.testing.assert_close(drawn.args[0], expected.to(drawn.args[0]), atol=1e-4, rtol=0.0)

    @pytest.mark.parametrize("kind", ["lags", "prior"])
    def test_arguments_stay_where_the_model_reads_them_elsewhere_too(self, kind):
        def model(x):
            loc = x.mean() if kind == "prior" else 0.0
            a = pyro.sample("a", dist.Normal(loc, 1.0))
            mean = a if kind == "prior" else a * x[:-1]
            pyro.sample("x", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=x[1:])

        x = torch.tensor([1.0, 2.0, 3.0, 4.0])
        drawn = GenerativeModel(model, (x,)).draw()
        assert drawn.args[0].equal(x)
        assert not seen(drawn)["x"].eq(x[1:]).any()

    def test_sites_that_this_call_does_not_observe(self):
        def model(y=None):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", 3):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        drawn = GenerativeModel(model, observed=["y"]).draw()
        assert set(drawn.latents) == {"mu"}
        assert seen(drawn)["y"].equal(drawn.data["y"])

    def test_computed_sites_are_no_data(self):
        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.deterministic("twice", 2 * mu)
            with pyro.plate("groups", 3):
                theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0).to_event(1), obs=y)

        centred = poutine.reparam(model, {"theta": LocScaleReparam(0.0)})
        drawn = GenerativeModel(centred, (torch.zeros(3),)).draw()
        assert set(drawn.data) == {"y"}
        assert set(drawn.latents) == {"mu", "theta_decentered"}

    def test_discrete_sites_are_drawn(self):
        @config_enumerate
        def model(y):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            with pyro.plate("rows", len(y)):
                k = pyro.sample("k", dist.Categorical(torch.ones(2)))
                pyro.sample("y", dist.Normal(loc[k], 1e-6), obs=y)

        drawn = GenerativeModel(model, (torch.zeros(4),)).draw()
        expected = drawn.latents["loc"][drawn.latents["k"]]
        torch.testing.assert_close(drawn.args[0], expected, atol=1e-4, rtol=0.0)


class TestMasks:
    def test_rows_that_a_mask_leaves_out(self):
        def model(y, there):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(y)), poutine.mask(mask=there):
                z = pyro.sample("z", dist.Normal(mu, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

        there = torch.tensor([True, False, True])
        y = torch.tensor([0.0, math.nan, 0.0])
        drawn = GenerativeModel(model, (y, there)).draw()
        assert drawn.counted["z"].equal(there)
        assert drawn.args[0].isfinite().all()

    def test_missing_data_are_latents(self):
        def model(y, there):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=there)

        drawn = GenerativeModel(model, (torch.zeros(3), torch.tensor([True, False, True]))).draw()
        assert drawn.counted["y_unobserved"].tolist() == [False, True, False]
        assert set(drawn.data) == {"y_observed"}


def test_moments_of_a_hierarchy():
    """y = a[group] + noise has the variance 1 + 4 + 0.25; two rows of a group share 5 of it, of others 1."""

    def model(group, y):
        mu = pyro.sample("mu", dist.Normal(3.0, 1.0))
        with pyro.plate("groups", 3):
            a = pyro.sample("a", dist.Normal(mu, 2.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(a[group], 0.5), obs=y)

    source = GenerativeModel(model, (GROUP, torch.zeros(4)))
    y = torch.stack([source.draw().args[1] for _ in range(3000)])
    assert y.mean() == pytest.approx(3.0, abs=0.15)
    cov = y.T.cov()
    assert cov[0, 0] == pytest.approx(5.25, rel=0.12)
    assert cov[0, 1] == pytest.approx(5.0, rel=0.12)
    assert cov[0, 3] == pytest.approx(1.0, abs=0.35)


class TestRefusals:
    def refused(self, model, match, *args, **options):
        with pytest.raises(ValueError, match=match):
            GenerativeModel(model, args, **options)

    def test_factors(self):
        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.factor("more", -mu.square())
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        self.refused(model, "site 'more': expected a model without pyro.factor", torch.zeros(()))

    def test_improper_priors(self):
        def model(y):
            mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        self.refused(model, "site 'mu': expected a proper prior", torch.zeros(()))

    def test_priors_that_are_masked_out(self):
        def model(y):
            with poutine.mask(mask=False):
                mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        self.refused(model, "site 'mu': expected a proper prior, got a masked one", torch.zeros(()))

    def test_parameters(self):
        def model(y):
            scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
            pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, scale)), 1.0), obs=y)

        self.refused(model, r"expected no parameters of its own.*\['scale'\]", torch.zeros(()))

    def test_subsampled_plates(self):
        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(y), subsample_size=2) as index:
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

        self.refused(model, "plate 'rows': expected all 5 rows, got 2 of them", torch.zeros(5))

    def test_scaled_densities(self):
        self.refused(poutine.scale(rows, 0.5), "expected a density that is not scaled", torch.zeros(2))

    def test_no_data(self):
        def model():
            pyro.sample("mu", dist.Normal(0.0, 1.0))

        self.refused(model, "expected one that observes data in this call")
        self.refused(model, r"observed: expected sites of the model, got \['x'\]", observed=["x"])
