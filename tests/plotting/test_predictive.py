"""Posterior predictive checks: which site, which values, and what is drawn of them."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot
from pyro.infer.autoguide import AutoNormal
from scipy import stats

from pyro_flowvi import AutoPlanar
from pyro_flowvi.plotting import plot_ppc


def at(value):
    """A guide with all of its mass near one value of mu."""
    return lambda *args, **kwargs: pyro.sample("mu", dist.Normal(value, 1e-4))


def normal(y, mask=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=torch.tensor(True) if mask is None else mask):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def counts(y, z=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(mu.exp()), obs=y)
        if z is not None:
            pyro.sample("z", dist.Normal(mu, 1.0), obs=z)


def curve(axis, label):
    (line,) = [line for line in axis.lines if line.get_label() == label]
    return line.get_data()


class TestDensities:
    def test_replicates_are_of_the_models_distribution(self):
        axis = plot_ppc(normal, at(3.0), torch.randn(2000) + 3.0, num_samples=60, seed=0)
        x, y = curve(axis, "mean of all replicates")
        np.testing.assert_allclose(y, stats.norm(3.0).pdf(x), atol=0.02)
        assert len(axis.lines) == 50 + 2
        assert axis.get_legend_handles_labels()[1] == ["50 replicates", "mean of all replicates", "observed"]
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("y", "density")

    def test_the_mean_lies_within_the_replicates(self):
        """Of two humps, whose dip depends on the smoothing, with data of the model itself."""

        def humps(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            parts = dist.Normal(torch.stack([mu - 2.0, mu + 2.0], -1), 1.0)
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts), obs=y)

        y = torch.randn(80) + 4.0 * torch.randint(2, (80,)) - 2.0
        axis = plot_ppc(humps, at(0.0), y, num_samples=50, seed=0)
        x, mean = curve(axis, "mean of all replicates")
        each = np.stack([np.interp(x, *line.get_data()) for line in axis.lines if line.get_alpha() == 0.35])
        assert len(each) == 50
        assert ((each.min(0) <= mean) & (mean <= each.max(0))).all()
        # Between humps and in the dip half of them are on either side, which they were not of pooled draws.
        share = (each < mean).mean(0)[(x > -2.5) & (x < 2.5)]
        assert share.min() > 0.25
        assert share.max() < 0.75

    def test_observed_lie_on_top(self):
        y = torch.randn(5000) * 2.0
        axis = plot_ppc(normal, at(0.0), y, num_samples=5)
        assert axis.lines[-1].get_label() == "observed"
        x, height = curve(axis, "observed")
        np.testing.assert_allclose(height, stats.norm(0.0, 2.0).pdf(x), atol=0.02)

    def test_few_data_have_ticks(self):
        y = torch.tensor([1.0, 2.0, 5.0])
        axis = plot_ppc(normal, at(2.0), y, num_samples=5)
        np.testing.assert_allclose(axis.lines[-1].get_xdata(), y)

    def test_masked_and_missing_values_are_left_out_of_both(self):
        y = torch.tensor([1.0, 2.0, 1e6, 3.0])
        axis = plot_ppc(normal, at(2.0), y, mask=torch.tensor([True, True, False, True]), num_samples=5)
        np.testing.assert_allclose(axis.lines[-1].get_xdata(), [1.0, 2.0, 3.0])
        with pytest.raises(ValueError, match="site: expected data of 'y'"):
            plot_ppc(normal, at(2.0), y, mask=torch.zeros(4, dtype=torch.bool), num_samples=5)

    def test_a_seed_and_axes(self):
        _, axis = pyplot.subplots()
        y = torch.randn(20)
        first = curve(plot_ppc(normal, at(0.0), y, num_samples=5, seed=1), "mean of all replicates")
        again = plot_ppc(normal, at(0.0), y, num_samples=5, seed=1, ax=axis)
        assert again is axis
        np.testing.assert_array_equal(first, curve(again, "mean of all replicates"))


class TestShares:
    def test_counts_have_bars_at_integers(self):
        y = torch.tensor([0.0, 1.0, 1.0, 3.0])
        axis = plot_ppc(counts, at(0.0), y, num_samples=4000, seed=0)
        bars = axis.patches
        np.testing.assert_allclose([bar.get_height() for bar in bars][:4], [0.25, 0.5, 0.0, 0.25])
        np.testing.assert_allclose([bar.get_x() + bar.get_width() / 2 for bar in bars][:4], [0, 1, 2, 3])
        # Shares of four draws of a Poisson(1): the median and the quantiles are those of a binomial.
        (container,) = [c for c in axis.containers if hasattr(c, "has_yerr")]
        median = container.lines[0].get_ydata()
        shares = stats.binom(4, stats.poisson(1.0).pmf(np.arange(3)))
        np.testing.assert_allclose(median[:3], shares.ppf(0.5) / 4)
        low, high = np.array([segment[:, 1] for segment in container.lines[2][0].get_segments()]).T
        np.testing.assert_allclose(low[:3], shares.ppf(0.05) / 4)
        np.testing.assert_allclose(high[:3], shares.ppf(0.95) / 4)

    def test_binary_and_categories(self):
        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Categorical(logits=torch.stack([mu, -mu, 2 * mu], -1)), obs=y)

        y = torch.tensor([0, 2, 2, 1])
        axis = plot_ppc(model, AutoNormal(model), y, num_samples=20)
        np.testing.assert_allclose([bar.get_height() for bar in axis.patches], [0.25, 0.25, 0.5])

    def test_wide_counts_are_put_together(self):
        y = dist.Poisson(300.0).sample((200,))
        axis = plot_ppc(counts, at(float(np.log(300.0))), y, num_samples=50)
        assert len(axis.patches) <= 31
        assert sum(bar.get_height() for bar in axis.patches) == pytest.approx(1.0)

    def test_a_histogram(self):
        y = torch.randn(400)
        axis = plot_ppc(normal, at(0.0), y, kind="histogram", num_samples=50)
        assert sum(bar.get_height() for bar in axis.patches) == pytest.approx(1.0)
        assert axis.get_ylabel() == "share of the data"


class TestSites:
    def test_one_of_several(self):
        y, z = torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.2])
        assert plot_ppc(counts, at(0.0), y, z=z, site="z", num_samples=10).get_xlabel() == "z"
        for site in (None, "mu", "x"):
            with pytest.raises(ValueError, match=r"site: expected .*'y', 'z'"):
                plot_ppc(counts, at(0.0), y, z=z, site=site, num_samples=10)

    def test_models_that_cannot_be_batched(self):
        def loop(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            scale = 1.0 if mu > 0 else 2.0
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(mu, scale), obs=y)

        axis = plot_ppc(loop, at(2.0), torch.randn(300) + 2.0, num_samples=40, seed=0)
        x, y = curve(axis, "mean of all replicates")
        assert 1.5 < x[y.argmax()] < 2.5

    def test_a_flow(self):
        guide = AutoPlanar(normal, num_layers=1)
        assert plot_ppc(normal, guide, torch.randn(30), num_samples=10).get_xlabel() == "y"

    def test_bad_input(self):
        y = torch.randn(5)
        with pytest.raises(ValueError, match="kind: expected one of"):
            plot_ppc(normal, at(0.0), y, kind="violin")
        with pytest.raises(ValueError, match="kind: expected one but 'bars'"):
            plot_ppc(normal, at(0.0), y, kind="bars", num_samples=5)
        with pytest.raises(ValueError, match="num_samples: expected a positive integer"):
            plot_ppc(normal, at(0.0), y, num_samples=0)

        def subsampled(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            with pyro.plate("rows", len(y), subsample_size=2) as rows:
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

        with pytest.raises(ValueError, match="model: expected one that is called with all of its data"):
            plot_ppc(subsampled, at(0.0), y, num_samples=5)
