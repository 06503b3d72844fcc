"""to_arviz: what ArviZ makes of it, against closed forms and hand computations."""

import builtins

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.autoname import scope
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LocScaleReparam
from scipy import stats

from pyro_flowvi import AutoPlanar
from pyro_flowvi.diagnostics import to_arviz
from tests import zoo

az = pytest.importorskip("arviz")

# ArviZ warns of the single chain, and of packages that it will split into.
pytestmark = pytest.mark.filterwarnings("ignore")

Y = torch.tensor([0.3, 1.2, -0.5, 0.8, 2.0])
PRECISION = 1.0 / 4.0 + len(Y)
MEAN, SD = float(Y.sum()) / PRECISION, PRECISION**-0.5


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def posterior(y):
    pyro.sample("mu", dist.Normal(MEAN, SD))


def shifted(y):
    pyro.sample("mu", dist.Normal(MEAN + 0.5 * SD, 1.2 * SD))


def test_groups():
    data = to_arviz(model, posterior, Y, num_samples=500, seed=0)
    assert data.posterior["mu"].shape == (1, 500)
    assert data.posterior_predictive["y"].shape == (1, 500, 5)
    np.testing.assert_allclose(data.observed_data["y"], Y)
    mu = data.posterior["mu"].values
    np.testing.assert_allclose(data.log_likelihood["y"], stats.norm.logpdf(Y, mu[..., None], 1.0))
    np.testing.assert_allclose(data.sample_stats["log_q"], stats.norm.logpdf(mu, MEAN, SD))
    log_p = stats.norm.logpdf(mu, 0, 2) + data.log_likelihood["y"].values.sum(-1)
    np.testing.assert_allclose(data.sample_stats["log_p"], log_p)
    np.testing.assert_allclose(data.sample_stats["log_weight"], log_p - data.sample_stats["log_q"])


def test_predictions_have_the_predictive_law():
    data = to_arviz(model, posterior, Y, seed=0)
    drawn = data.posterior_predictive["y"].values
    assert drawn.mean() == pytest.approx(MEAN, abs=0.05)
    assert drawn.std() == pytest.approx((1 + SD**2) ** 0.5, rel=0.03)


def test_resampled_draws_are_the_posterior():
    data = to_arviz(model, shifted, Y, seed=0, resample=True)
    mu = data.posterior["mu"].values
    assert mu.mean() == pytest.approx(MEAN, abs=0.1 * SD)
    assert mu.std() == pytest.approx(SD, rel=0.05)


def test_loo_against_the_closed_form():
    """elpd of each value given the others, which are normal."""
    data = to_arviz(model, posterior, Y, seed=0)
    expected = 0.0
    for i, value in enumerate(Y):
        others = torch.cat([Y[:i], Y[i + 1 :]])
        precision = 0.25 + len(others)
        loc = float(others.sum()) / precision
        expected += stats.norm.logpdf(float(value), loc, (1 + 1 / precision) ** 0.5)
    found = az.loo(data)
    assert float(getattr(found, "elpd_loo", getattr(found, "elpd", None))) == pytest.approx(
        expected, abs=0.05
    )


def test_summary_and_pairs():
    import matplotlib

    matplotlib.use("agg")
    data = to_arviz(model, posterior, Y, seed=0)
    table = az.summary(data, round_to="none")
    assert table["mean"]["mu"] == pytest.approx(MEAN, abs=0.1 * SD)
    args = zoo.make_zoo()["hierarchy"][1]
    guide = AutoNormal(zoo.hierarchy)
    guide(*args)
    az.plot_pair(to_arviz(zoo.hierarchy, guide, *args, num_samples=200))
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("name", ["lkj", "nested_plates", "flat", "not_for_batches", "dirichlet", "missing"])
def test_shapes_of_all_kinds_of_models(name):
    program, args = zoo.make_zoo()[name]
    data = to_arviz(program, AutoPlanar(program, num_layers=1), *args, num_samples=50)
    batched = {key: tuple(value.shape) for key, value in data.log_likelihood.data_vars.items()}
    assert (
        batched
        == {
            "lkj": {"y": (1, 50, 20)},
            "nested_plates": {"y": (1, 50, 2, 3)},
            "flat": {"y": (1, 50, 12)},
            "not_for_batches": {"y": (1, 50)},
            "dirichlet": {"counts": (1, 50)},
            "missing": {"y_observed": (1, 50, 4)},
        }[name]
    )
    for group in ("posterior", "posterior_predictive", "log_likelihood", "sample_stats"):
        for value in data[group].data_vars.values():
            assert np.isfinite(value.values).all()


def test_computed_sites_are_posterior():
    """A reparameterised site is no data, although Pyro has it observed."""
    program = pyro.poutine.reparam(zoo.hierarchy, config={"theta": LocScaleReparam(0.0)})
    args = zoo.make_zoo()["hierarchy"][1]
    data = to_arviz(program, AutoPlanar(program, num_layers=1), *args, num_samples=50)
    assert set(data.log_likelihood.data_vars) == {"y"}
    posterior = data.posterior
    expected = posterior["mu"].values[..., None] + posterior["theta_decentered"].values
    np.testing.assert_allclose(posterior["theta"], expected)


def test_no_pointwise_likelihood_where_sites_are_summed_out():
    program, args = zoo.make_zoo()["enumerated"]
    data = to_arviz(program, AutoPlanar(program, num_layers=1), *args, num_samples=50)
    assert "log_likelihood" not in data
    assert data.posterior_predictive["y"].shape == (1, 50, 5)


def test_without_arviz(monkeypatch):
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if name == "arviz":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(ImportError, match="extra 'arviz'"):
        to_arviz(model, posterior, Y)


def test_the_kind_of_data_is_that_of_the_installed_version():
    """An InferenceData before 1.0, a DataTree from 1.0 on; ArviZ's own summary reads either."""
    data = to_arviz(model, posterior, Y, num_samples=4000)
    expected = "InferenceData" if int(az.__version__.partition(".")[0]) < 1 else "DataTree"
    assert type(data).__name__ == expected
    summary = az.summary(data, kind="stats")
    assert abs(float(summary["mean"]["mu"]) - MEAN) < 0.1 * SD
    assert abs(float(summary["sd"]["mu"]) / SD - 1.0) < 0.1


def test_dimensions_have_the_names_of_plates():
    def model(x, y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("county", 3, dim=-1):
            effect = pyro.sample("effect", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("year", 4, dim=-2):
                pyro.sample("y", dist.Normal(effect @ x, scale), obs=y)
            pyro.sample("pair", dist.Normal(effect, 1.0).to_event(1), obs=torch.zeros(3, 2))

    guide = AutoPlanar(model, num_layers=1)
    data = to_arviz(model, guide, torch.ones(2), torch.zeros(4, 3), num_samples=10)
    assert data.posterior["effect"].dims == ("chain", "draw", "county", "effect_dim_1")
    assert data.posterior["scale"].dims == ("chain", "draw")
    assert data.log_likelihood["pair"].shape == (1, 10, 3)
    assert data.log_likelihood["pair"].dims[2] == "county"
    assert data.observed_data["y"].dims == ("year", "county")


def test_names_of_scopes():
    """The names of Pyro's ``scope`` hold a "/", which neither ArviZ 1.x nor netCDF takes."""
    within = scope(model, prefix="part")
    data = to_arviz(within, scope(posterior, prefix="part"), Y, num_samples=20, seed=0)
    plain = to_arviz(model, posterior, Y, num_samples=20, seed=0)
    np.testing.assert_array_equal(data.posterior["part.mu"], plain.posterior["mu"])
    assert not any("/" in dim for dim in data.log_likelihood["part.y"].dims)
