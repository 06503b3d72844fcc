"""How a fit went: the curves are those of the result."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pyro_flowvi.plotting import plot_trace


class TestTrace:
    def test_all_that_a_result_has(self):
        result = SimpleNamespace(
            losses=torch.linspace(50.0, 1.0, 200),
            rates=torch.full((200,), 1e-2),
            gradient_norms=[1.0] * 200,
            elbos=[(100, -20.0, 0.1), (199, -1.0, 0.1)],
        )
        labels = [axis.get_ylabel() for axis in plot_trace(result)]
        assert labels == ["ELBO (nats)", "learning rate", "gradient norm"]

    def test_losses_alone(self):
        (axis,) = plot_trace(SimpleNamespace(losses=torch.tensor([3.0, 2.0, 1.0]), rates=None, elbos=[]))
        np.testing.assert_allclose(axis.lines[0].get_ydata(), [-3.0, -2.0, -1.0])

    def test_no_step(self):
        with pytest.raises(ValueError, match="at least one step"):
            plot_trace(SimpleNamespace(losses=torch.tensor([])))
