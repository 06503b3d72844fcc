"""The verdict on predictions: conjugate models, symmetric posteriors, long chains of another library."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_flowvi import AutoRealNVP, fit
from pyro_flowvi.diagnostics import compare, diagnose
from pyro_flowvi.diagnostics._outputs import MOST_OUTPUTS, Outputs
from pyro_flowvi.diagnostics._weighted_draws import weighted_draws


def design():
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(20, 2, generator=generator)
    x = torch.cat([torch.ones(20, 1), columns.to(torch.get_default_dtype())], -1)
    noise = torch.randn(20, generator=generator).to(x)
    return x, x @ x.new_tensor([1.0, -1.0, 0.5]) + noise


def regression(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    mu = pyro.deterministic("mu", (x * w).sum(-1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def posterior(x, y):
    covariance = torch.linalg.inv(torch.eye(3).to(x) / 4.0 + x.T @ x)
    return covariance @ x.T @ y, covariance


def gaussian(loc, covariance):
    return lambda *_, **__: pyro.sample("w", dist.MultivariateNormal(loc, covariance))


def outputs_of(model, guide, *args, of="predictions"):
    return Outputs(weighted_draws(model, guide, args, None, 100), of)


class TestRegression:
    """The posterior of a linear regression is normal, and so are its predictions."""

    @pytest.mark.parametrize("of", ["predictions", "y", ["mu"]])
    def test_exact_guide_is_good(self, of):
        x, y = design()
        found = diagnose(regression, gaussian(*posterior(x, y)), x, y, of=of, seed=0)
        assert found.verdict == "good"
        assert found.predictive_shift < 0.01
        assert found.chains_shift < 0.15
        assert found.chains_coverage == pytest.approx(0.9, abs=0.05)

    @pytest.mark.parametrize("num_samples", [500, 1000])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    @pytest.mark.long
    def test_exact_guide_at_any_size(self, num_samples, seed):
        x, y = design()
        guide = gaussian(*posterior(x, y))
        for of in ("y", "mu"):
            found = diagnose(regression, guide, x, y, of=of, seed=seed, num_samples=num_samples)
            assert found.verdict == "good"

    def test_moments_are_those_of_the_closed_form(self):
        x, y = design()
        loc, covariance = posterior(x, y)
        outputs = outputs_of(regression, gaussian(loc, covariance), x, y)
        found = outputs.at(loc + torch.randn(4000, 3) @ torch.linalg.cholesky(covariance).T)
        mean, variance = x @ loc, (x @ covariance * x).sum(-1) + 1.0
        np.testing.assert_allclose(found.first.mean(0), mean.cpu(), atol=0.05)
        np.testing.assert_allclose(found.second.mean(0) - found.first.mean(0) ** 2, variance.cpu(), rtol=0.05)
        np.testing.assert_allclose(found.drawn.var((0, 1)), variance.cpu(), rtol=0.1)

    def test_narrow_guide_is_not_good(self):
        """With half of the sd an interval of a mean holds what one of ±1.645 / 2 sd does: 59 %."""
        x, y = design()
        loc, covariance = posterior(x, y)
        found = diagnose(regression, gaussian(loc, covariance / 4), x, y, of="mu", seed=0)
        assert found.verdict == "poor"
        expected = 2.0 * stats.norm.cdf(stats.norm.ppf(0.95) / 2.0) - 1.0
        assert found.chains_coverage == pytest.approx(expected, abs=0.07)
        assert any("chains from the guide's draws" in reason for reason in found.reasons)

    @pytest.mark.parametrize(("shift", "verdict"), [(0.6, "usable"), (3.0, "poor")])
    def test_shifted_guide_is_not_good(self, shift, verdict):
        x, y = design()
        loc, covariance = posterior(x, y)
        step = shift * covariance.diagonal().sqrt()
        found = diagnose(regression, gaussian(loc + step, covariance), x, y, of="predictions", seed=0)
        off = (x @ step).abs() / ((x @ covariance * x).sum(-1) + 1.0).sqrt()
        assert found.verdict == verdict
        assert found.chains_shift == pytest.approx(float(off.max()), abs=0.12)
        if verdict == "usable":
            assert found.predictive_shift == pytest.approx(float(off.max()), abs=0.12)

    def test_by_weights_alone(self):
        x, y = design()
        loc, covariance = posterior(x, y)
        exact = diagnose(regression, gaussian(loc, covariance), x, y, of="mu", probes=False)
        narrow = diagnose(regression, gaussian(loc, covariance / 4), x, y, of="mu", probes=False, seed=0)
        assert (exact.verdict, narrow.verdict) == ("good", "poor")
        assert math.isnan(exact.chains_shift)
        assert math.isnan(exact.chains_coverage)

    def test_nothing_changes_without(self):
        x, y = design()
        found = diagnose(regression, gaussian(*posterior(x, y)), x, y, seed=0, num_samples=500)
        assert math.isnan(found.predictive_shift)
        assert not any("outputs" in reason for reason in found.reasons)

    def test_keywords_and_comparison(self):
        x, y = design()
        loc, covariance = posterior(x, y)
        guides = {"exact": gaussian(loc, covariance), "narrow": gaussian(loc, covariance / 4)}
        table = compare(regression, guides, x=x, y=y, of="mu", num_samples=500, seed=0)
        assert table["exact"].verdict == "good"
        assert table["narrow"].verdict == "poor"

    def test_unconverged_is_not_good(self):
        class Result:
            converged = False

        x, y = design()
        guide = gaussian(*posterior(x, y))
        found = diagnose(regression, guide, x, y, of="y", fit_result=Result(), probes=False)
        assert found.verdict == "usable"


class TestSymmetries:
    """Several modes: one of them is enough where all predict the same."""

    def test_product_of_two_coefficients(self):
        """y = a b x + noise, a guide at a, b > 0: the posterior of a b by quadrature."""
        x = torch.linspace(-1.0, 1.0, 20)
        y = 2.0 * x + 0.3 * torch.sin(5.0 * x)

        def model():
            a = pyro.sample("a", dist.Normal(0.0, 1.5))
            b = pyro.sample("b", dist.Normal(0.0, 1.5))
            slope = pyro.deterministic("slope", a * b)
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(slope * x, 0.3), obs=y)

        def guide():
            """log a and log b: nearly normal on the ridge, a b = 2."""
            log_a = pyro.sample("log_a", dist.Normal(0.35, 0.4), infer={"is_auxiliary": True})
            log_b = pyro.sample("log_b", dist.Normal(loc - log_a, scale), infer={"is_auxiliary": True})
            pyro.sample("a", dist.Delta(log_a.exp(), log_density=-log_a))
            pyro.sample("b", dist.Delta(log_b.exp(), log_density=-log_b))

        grid = torch.linspace(-5.0, 5.0, 801)
        a, b = grid.unsqueeze(-1), grid
        log_p = -(a.square() + b.square()) / 4.5 - (
            (y - (a * b).unsqueeze(-1) * x).square().sum(-1) / (2 * 0.09)
        )
        p = (log_p - log_p.max()).exp()
        p = p / p.sum()
        mean = float((p * a * b).sum())
        sd = float((p * (a * b - mean).square()).sum().sqrt())
        loc, scale = math.log(mean) - 0.5 * (sd / mean) ** 2, sd / mean
        whole = diagnose(model, guide, seed=0)
        assert any("missed" in reason or "mirror" in reason for reason in whole.reasons)
        found = diagnose(model, guide, seed=0, of="slope")
        assert found.verdict != "poor"
        assert found.chains_shift < 0.15
        assert diagnose(model, guide, seed=0, of="predictions").verdict != "poor"
        loc += 3.0 * scale
        assert diagnose(model, guide, seed=0, of="slope").verdict != "good"

    def test_a_missed_mode_that_predicts_otherwise(self):
        def model():
            x = pyro.sample(
                "x",
                dist.MixtureSameFamily(
                    dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-3.0, 3.0]), 0.3)
                ),
            )
            with pyro.plate("rows", 2):
                pyro.sample("y", dist.Normal(x, 10.0), obs=torch.zeros(2))
            pyro.deterministic("size", x.abs())

        def guide():
            pyro.sample("x", dist.Normal(2.97, 0.297))

        assert diagnose(model, guide, seed=0, of="predictions").verdict == "poor"
        assert diagnose(model, guide, seed=0, of="size").verdict == "good"

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_network_against_nuts(self, seed):
        """A hidden layer of 5: 3,840 modes with the same predictions.

        Means and sds of the predictions by NumPyro 0.22, 4 chains of 2,500 after 1,000: R-hat 1.0005 of the
        network's values, effective size above 7,500.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.linspace(-2, 2, 40)
        y = torch.sin(1.5 * x) + 0.2 * torch.randn(40, generator=generator)
        mean = [-0.5488, -0.7697, -0.8925, -0.8516, -0.5756, 0.0069, 0.6852, 1.0166, 0.9081, 0.5184]
        sd = [0.2417, 0.2125, 0.2151, 0.2131, 0.2151, 0.2166, 0.2162, 0.2155, 0.2162, 0.2156]

        def model(x, y):
            w = pyro.sample("w", dist.Normal(0.0, 1.5).expand([5]).to_event(1))
            b = pyro.sample("b", dist.Normal(0.0, 1.5).expand([5]).to_event(1))
            v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
            s = pyro.sample("s", dist.HalfNormal(0.5))
            with pyro.plate("rows", len(y)):
                f = (torch.tanh(x.unsqueeze(-1) * w + b) * v).sum(-1)
                pyro.sample("y", dist.Normal(f, s), obs=y)

        guide = AutoRealNVP(model)
        fit(model, guide, x, y, seed=seed, progress=False)
        draws = weighted_draws(model, guide, (x, y), None, 4000)
        found = Outputs(draws, "predictions").at(draws.z)
        off = np.abs(found.first.mean(0)[::4] - mean) / sd
        assert off.max() < 0.1  # the guide is right, so that the verdict must say so
        assert diagnose(model, guide, x, y, seed=0).verdict == "poor"
        assert diagnose(model, guide, x, y, seed=0, of="predictions").verdict != "poor"


class TestKindsOfOutputs:
    def test_counts(self):
        """Gamma and Poisson are conjugate; a guide of too large rates is found."""
        y = torch.tensor([0.0, 2.0, 1.0, 3.0, 1.0, 0.0])

        def model():
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Poisson(rate), obs=y)

        def guide(factor=1.0):
            pyro.sample("rate", dist.Gamma(2.0 + y.sum(), (1.0 + len(y)) / factor))

        found = diagnose(model, guide, seed=0, of="y")
        assert found.verdict == "good"
        assert found.chains_coverage == pytest.approx(0.9, abs=0.03)
        assert diagnose(model, lambda: guide(2.0), seed=0, of="y").verdict != "good"

    def test_choices(self):
        """A site of categories has an output for each: its probability."""
        y = torch.tensor([0, 1, 1, 2])
        counts = torch.bincount(y, minlength=3)

        def model():
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Categorical(p), obs=y)

        def guide():
            pyro.sample("p", dist.Dirichlet(1.0 + counts))

        outputs = outputs_of(model, guide)
        assert outputs.names[:4] == ["y[0,0]", "y[0,1]", "y[0,2]", "y[1,0]"]
        found = diagnose(model, guide, seed=0, of="y", num_samples=1000)
        assert found.verdict == "good"

    def test_without_a_mean(self):
        def model():
            loc = pyro.sample("loc", dist.Normal(0.0, 0.1))
            with pyro.plate("rows", 3):
                pyro.sample("y", dist.Cauchy(loc, 1.0), obs=torch.zeros(3))

        def guide(loc=0.0):
            pyro.sample("loc", dist.Normal(loc, 0.1))

        assert diagnose(model, guide, seed=0, of="y", num_samples=1000).verdict == "good"

    def test_binary(self):
        y = torch.tensor([1.0, 0.0, 1.0])

        def model():
            p = pyro.sample("p", dist.Beta(1.0, 1.0))
            with pyro.plate("rows", 3):
                pyro.sample("y", dist.Bernoulli(p), obs=y)

        def guide(a=3.0):
            pyro.sample("p", dist.Beta(a, 2.0))

        assert diagnose(model, guide, seed=0, of="y").verdict == "good"
        assert diagnose(model, lambda: guide(9.0), seed=0, of="y").verdict != "good"

    def test_what_a_mask_leaves_out_is_no_output(self):
        seen = torch.tensor([True, True, False])

        def model():
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", 3), pyro.poutine.mask(mask=seen):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor([0.0, 1.0, 100.0]))

        def guide():
            pyro.sample("mu", dist.Normal(1.0 / 3.0, math.sqrt(1.0 / 3.0)))

        assert outputs_of(model, guide).names == ["y[0]", "y[1]"]
        assert diagnose(model, guide, seed=0, of="predictions").verdict == "good"

    def test_many_outputs_are_thinned(self):
        def model():
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", 1500):
                pyro.sample("y", dist.Normal(mu, 50.0), obs=torch.zeros(1500))

        def guide():
            pyro.sample("mu", dist.Normal(0.0, 1.02 * (1.0 + 1500 / 2500.0) ** -0.5))

        outputs = outputs_of(model, guide)
        assert (len(outputs.names), outputs.total) == (MOST_OUTPUTS, 1500)
        assert outputs.names[-1] == "y[1499]"
        found = diagnose(model, guide, seed=0, of="y", num_samples=400)
        assert found.verdict == "good"
        assert any("1000 of 1500" in reason for reason in found.reasons)

    def test_one_by_one(self):
        """A model that reads single elements of a latent does not take many of its values at once."""

        def model(y):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.deterministic("difference", theta[0] - theta[1])
            for i in range(2):
                pyro.sample(f"y_{i}", dist.Normal(theta[i], 1.0), obs=y[i])

        y = torch.tensor([0.4, -1.0])

        def guide(y, scale=0.5**0.5):
            pyro.sample("theta", dist.Normal(0.5 * y, scale).to_event(1))

        outputs = outputs_of(model, guide, y, of=["difference", "y_1"])
        assert outputs.most_draws < 1000
        found = outputs.at(torch.tensor([[0.5, 0.25], [1.0, 3.0]]))
        np.testing.assert_allclose(found.first, [[0.25, 0.25], [-2.0, 3.0]])
        np.testing.assert_allclose(found.second, [[0.0625, 1.0625], [4.0, 10.0]])
        assert diagnose(model, guide, y, seed=0, of="predictions", num_samples=200).verdict != "poor"

    def test_sites_that_are_summed_out(self):
        """The prediction of a mixture is that of data to come, whose component is not known."""

        def model():
            mu = pyro.sample("mu", dist.Normal(torch.tensor([-2.0, 2.0]), 0.1).to_event(1))
            with pyro.plate("rows", 5):
                z = pyro.sample("z", dist.Bernoulli(0.25), infer={"enumerate": "parallel"}).long()
                loc = torch.where(z == 1, mu[..., 1], mu[..., 0])
                pyro.sample("y", dist.Normal(loc, 0.5), obs=torch.zeros(5))

        outputs = outputs_of(model, lambda: pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1)))
        found = outputs.at(torch.tensor([-2.0, 2.0]).expand(4000, 2))
        assert found.first.mean() == pytest.approx(-1.0, abs=0.05)
        assert found.second.mean() == pytest.approx(4.25, abs=0.02)


class TestBadArguments:
    @pytest.mark.parametrize("of", [0, [], "", [1], {"y"}, True])
    def test_of_another_kind(self, of):
        x, y = design()
        with pytest.raises(ValueError, match="of: expected 'predictions' or names of sites"):
            diagnose(regression, gaussian(*posterior(x, y)), x, y, of=of, num_samples=100)

    @pytest.mark.parametrize("of", ["z", ["y", "z"], "w"])
    def test_unknown_names(self, of):
        x, y = design()
        with pytest.raises(ValueError, match=r"of: expected observed sites \(y\) .*\(mu\), got .*[zw]"):
            diagnose(regression, gaussian(*posterior(x, y)), x, y, of=of, num_samples=100)

    def test_nothing_observed(self):
        def model():
            pyro.sample("x", dist.Normal(0.0, 1.0))

        with pytest.raises(ValueError, match=r"of: expected observed sites .there are none"):
            diagnose(model, model, of="predictions", num_samples=100)

    def test_subsampled_data(self):
        def model():
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", 10, subsample_size=2) as rows:
                pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.zeros(10)[rows])

        def guide():
            pyro.sample("mu", dist.Normal(0.0, 0.3))

        with pytest.raises(ValueError, match="of: expected None where the model subsamples"):
            diagnose(model, guide, of="predictions", num_samples=100)
