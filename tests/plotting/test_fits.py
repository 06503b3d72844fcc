"""Pictures: what is drawn, not how it looks."""

from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowvi.diagnostics import Diagnosis, diagnose
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
