"""Pictures: what is drawn, not how it looks."""

from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowvi.diagnostics import Calibration, Diagnosis, diagnose
from pyro_flowvi.plotting import plot_calibration
from pyro_flowvi.plotting.fits import plot_khat, plot_pairs, plot_trace

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _close():
    yield
    matplotlib.pyplot.close("all")


class TestTrace:
    def test_all_that_a_result_has(self):
        result = SimpleNamespace(
            losses=torch.linspace(50.0, 1.0, 200),
            rates=torch.full((200,), 1e-2),
            gradient_norms=[1.0] * 200,
            elbos=[(100, -20.0, 0.1), (199, -1.0, 0.1)],
        )
        labels = [axis.get_ylabel() for axis in plot_trace(result).axes]
        assert labels == ["ELBO (nats)", "learning rate", "gradient norm"]

    def test_losses_alone(self):
        (axis,) = plot_trace(SimpleNamespace(losses=torch.tensor([3.0, 2.0, 1.0]), rates=None, elbos=[])).axes
        np.testing.assert_allclose(axis.lines[0].get_ydata(), [-3.0, -2.0, -1.0])

    def test_no_step(self):
        with pytest.raises(ValueError, match="at least one step"):
            plot_trace(SimpleNamespace(losses=torch.tensor([])))


class TestPairs:
    def test_sites_become_scalars(self):
        draws = {"mu": torch.randn(100), "theta": torch.randn(100, 2)}
        figure = plot_pairs(draws, {key: value + 1.0 for key, value in draws.items()})
        assert len(figure.axes) == 6
        assert {axis.get_xlabel() for axis in figure.axes} == {"", "mu", "theta[0]", "theta[1]"}

    def test_chosen_names(self):
        figure = plot_pairs({"mu": torch.randn(100), "theta": torch.randn(100, 9)}, names=["theta[8]", "mu"])
        assert [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()] == ["mu"]

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="expected scalars of the draws"):
            plot_pairs({"mu": torch.randn(10)}, names=["tau"])


class TestKhat:
    def test_points_are_the_largest_weights(self):
        def model():
            pyro.sample("x", dist.Normal(0.0, 1.0))

        def guide():
            pyro.sample("x", dist.Normal(0.0, 0.5))

        found = diagnose(model, guide, seed=0, probes=False)
        left = plot_khat(found).axes[0]
        drawn = left.lines[0].get_ydata()
        weights = np.exp(found.log_weights)
        np.testing.assert_allclose(drawn, np.sort(weights)[::-1][: len(drawn)] / weights.mean())

    def test_without_weights(self):
        with pytest.raises(ValueError, match="log weights"):
            plot_khat(Diagnosis(0.0, 0.0, 0.0, 1.0, 0.0, 100, "good", ()))


class TestCalibration:
    def test_curve_and_bars_are_those_of_the_ranks(self):
        ranks = np.random.default_rng(0).integers(0, 100, (50, 5))
        axes = plot_calibration(Calibration({"x": ranks}, 99, 50), names=["x[3]"]).axes
        x, y = axes[0].lines[-1].get_data()
        np.testing.assert_allclose(y, [(ranks[:, 3] < round(100 * at)).mean() - at for at in x], atol=1e-12)
        heights = [bar.get_height() for bar in axes[1].patches if bar.get_width() < 0.5]
        np.testing.assert_array_equal(heights, np.histogram(ranks[:, 3], 5, (0, 100))[0])

    def test_the_worst_are_shown(self):
        ranks = np.random.default_rng(0).integers(0, 100, (50, 5))
        ranks[:, 4] //= 3
        figure = Calibration({"x": ranks}, 99, 50).plot()
        assert len(figure.axes) == 8
        assert figure.axes[0].get_title().startswith("x[4], p ")

    def test_bad_input(self):
        found = Calibration({"x": np.zeros(0, dtype=int)}, 99, 0)
        with pytest.raises(ValueError, match="expected ranks"):
            plot_calibration(found)
        found = Calibration({"x": np.arange(9)}, 99, 9)
        with pytest.raises(ValueError, match="names: expected scalars"):
            found.plot(["y"])
