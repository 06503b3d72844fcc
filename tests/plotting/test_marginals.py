"""Densities of scalars: posterior, prior and reference, against those that are known."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal, init_to_value
from scipy import stats

from pyro_flowvi import AutoPlanar
from pyro_flowvi._program.log_weights import LogWeights
from pyro_flowvi.plotting import plot_marginals

Y = torch.tensor([0.5, 1.5, 4.0])


def model(y, scale=2.0):
    mu = pyro.sample("mu", dist.Normal(10.0, scale))
    tau = pyro.sample("tau", dist.Exponential(1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, tau), obs=y)


def curve(axis, label):
    (line,) = [line for line in axis.lines if line.get_label() == label]
    return line.get_data()


def labels_of(axis):
    return axis.get_legend_handles_labels()[1]


class TestDensities:
    @pytest.mark.parametrize(
        ("draws", "truth", "error"),
        [
            (dist.Normal(3.0, 2.0), stats.norm(3.0, 2.0), 0.05),
            (dist.Exponential(1.0), stats.expon(), 0.1),  # does not leak below 0, nor bend down there
            (dist.Uniform(0.0, 1.0), stats.uniform(), 0.1),
        ],
    )
    def test_known_ones(self, draws, truth, error):
        (axis,) = plot_marginals({"x": draws.sample((50_000,))})
        x, y = curve(axis, "posterior")
        peak = truth.pdf(np.linspace(-5, 5, 1001)).max()
        np.testing.assert_allclose(y, truth.pdf(x), atol=error * peak)

    def test_a_heavy_tail_has_the_density_of_the_log(self):
        (axis,) = plot_marginals({"x": dist.LogNormal(0.0, 2.0).sample((50_000,))})
        assert axis.get_xscale() == "log"
        x, y = curve(axis, "posterior")
        np.testing.assert_allclose(y, stats.norm(0.0, 2.0).pdf(np.log(x)), atol=0.01)

    def test_two_modes_are_not_smeared(self):
        draws = torch.cat([torch.randn(2000) - 20.0, torch.randn(2000) + 20.0])
        x, y = curve(plot_marginals({"x": draws})[0], "posterior")
        truth = 0.5 * stats.norm(-20.0).pdf(x) + 0.5 * stats.norm(20.0).pdf(x)
        np.testing.assert_allclose(y, truth, atol=0.03)

    def test_integers_and_point_masses(self):
        counts = torch.tensor([0.0, 1.0, 1.0, 4.0])
        one, two = plot_marginals({"k": counts, "one": torch.ones(4)})
        np.testing.assert_allclose(curve(one, "posterior"), [[0.0, 1.0, 4.0], [0.25, 0.5, 0.25]])
        np.testing.assert_allclose(curve(two, "posterior")[0], [1.0, 1.0])


class TestSets:
    def test_prior_of_the_guides_own_model_and_data(self):
        guide = AutoPlanar(model).materialize(Y, scale=0.5)
        mu, tau = plot_marginals(guide, prior=True, num_samples=20_000)
        assert labels_of(mu) == ["posterior", "prior"]
        x, y = curve(tau, "prior")
        np.testing.assert_allclose(y, np.exp(-x), atol=0.1)
        _, y = curve(mu, "prior")
        assert y.max() == pytest.approx(1 / (0.5 * math.sqrt(2 * math.pi)), rel=0.1)

    def test_a_prior_is_smooth(self):
        """Within 5 % of its peak, which lies where it should, with the usual number of draws."""

        def wide(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            pyro.sample("y", dist.Normal(mu, 5.0), obs=y)

        guide = AutoPlanar(wide).materialize(torch.tensor(0.0))
        guide.place_at(torch.tensor([0.0]), torch.tensor([[5.0]]))
        x, y = curve(plot_marginals(guide, prior=True)[0], "prior")
        truth = stats.norm(0.0, 5.0).pdf(x)
        np.testing.assert_allclose(y, truth, atol=0.05 * truth.max())
        assert abs(x[y.argmax()]) < 1.5

    def test_few_draws_of_the_prior_of_large_data(self, monkeypatch):
        counts = []
        own = LogWeights.draws
        monkeypatch.setattr(LogWeights, "draws", lambda self, num: counts.append(num) or own(self, num))
        for size, times in ((3, 10), (20_000, 1)):
            counts.clear()
            plot_marginals({"mu": torch.randn(50)}, torch.randn(size), prior=model, names=["mu"])
            assert counts == [2000] * times

    def test_prior_of_pyros_guide(self):
        """Its model is wrapped in a handler that draws where the guide is to start."""
        program = poutine.condition(model, data={"tau": torch.tensor(1.0)})
        start = init_to_value(values={"mu": torch.tensor(10.0)})
        guide = AutoNormal(program, init_loc_fn=start, init_scale=1.0)
        guide(Y)
        (axis,) = plot_marginals(guide, Y, prior=True, num_samples=2000)
        x, y = curve(axis, "prior")
        np.testing.assert_allclose(y, stats.norm(10.0, 2.0).pdf(x), atol=0.03)

    def test_prior_of_a_model_and_its_arguments(self):
        draws = {"mu": 10.0 + torch.randn(100)}
        for (axis,) in (
            plot_marginals(draws, Y, prior=model, scale=0.1),
            plot_marginals(draws, Y, prior=model, model_kwargs={"scale": 0.1}),
        ):
            assert curve(axis, "prior")[1].max() > 3.0
        with pytest.raises(TypeError, match="'scal'; did you mean 'scale'"):
            plot_marginals(draws, Y, prior=model, scal=0.1)

    def test_prior_of_a_model_that_cannot_be_batched(self):
        def loop(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            if mu > 0:
                mu = mu * 1.0
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        (axis,) = plot_marginals({"mu": torch.randn(50)}, Y[0], prior=loop, num_samples=100)
        assert labels_of(axis) == ["posterior", "prior"]

    def test_draws_of_prior_and_reference(self):
        draws = {"a": torch.randn(200), "b": torch.randn(200, 2)}
        axes = plot_marginals(
            draws, prior=draws, reference=draws, names=["b"], labels=("fit", "before", "NUTS")
        )
        assert [axis.get_xlabel() for axis in axes] == ["b[0]", "b[1]"]
        assert [labels_of(axis) for axis in axes] == [["fit", "before", "NUTS"]] * 2
        np.testing.assert_allclose(curve(axes[0], "fit"), curve(axes[0], "NUTS"))

    def test_a_wide_prior_does_not_flatten_the_posterior(self):
        draws = torch.randn(500)
        (axis,) = plot_marginals({"a": draws}, prior={"a": 1000.0 * torch.randn(500)})
        low, high = axis.get_xlim()
        assert high - low < 4 * float(draws.max() - draws.min())

    def test_what_is_left_out_is_told(self):
        axes = plot_marginals({"theta": torch.randn(50, 30)})
        assert len(axes) == 12
        assert axes[3].get_title(loc="right") == "12 of 30 scalars"
        assert len(axes[0].figure.axes) == 12

    def test_labels_of_neighbours_do_not_run_into_each_other(self):
        for shift in (-1.0, 0.3, 1234.5):
            axes = plot_marginals(torch.randn(500, 4) + shift)
            axes[0].figure.canvas.draw()
            boxes = [
                label.get_window_extent()
                for axis in axes
                for label, tick in zip(axis.get_xticklabels(), axis.get_xticks(), strict=True)
                if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]
            ]
            assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))

    def test_a_last_row_that_is_not_full(self):
        figure = pyplot.figure()
        axes = plot_marginals(torch.randn(50, 6), ax=figure)
        assert list(axes) == figure.axes

    def test_bad_input(self):
        draws = {"mu": torch.randn(20)}
        with pytest.raises(ValueError, match="prior: expected a model, or draws"):
            plot_marginals(draws, prior=True)
        with pytest.raises(ValueError, match="args: expected none"):
            plot_marginals(draws, Y)
        with pytest.raises(ValueError, match="expected scalars of the prior"):
            plot_marginals(draws, prior={"tau": torch.randn(20)})

        def improper():
            pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))

        with pytest.raises(ValueError, match="prior: expected a model of proper priors"):
            plot_marginals(draws, prior=improper)
