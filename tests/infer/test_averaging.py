"""The average of the weights against its closed form, and the exchange with the present ones."""

import pytest
import torch

from pyro_flowvi.infer._averaging import WeightAverage, put_back, snapshot


def weights(*values):
    return {f"w{i}": torch.tensor([value], dtype=torch.float64) for i, value in enumerate(values)}


class TestAverage:
    def test_constant_decay(self):
        """Late in a run: the sum of the powers of the decay."""
        average = WeightAverage(0.9, every=2)
        average.update(weights(3.0), 10**9)
        values = [1.0, -2.0, 5.0]
        for value in values:
            average.update(weights(value), 10**9)
        b = 0.9**2
        expected = 3.0 * b**3 + (1 - b) * sum(x * b ** (2 - i) for i, x in enumerate(values))
        assert average.values["w0"].item() == pytest.approx(expected, rel=1e-12)

    def test_polynomial_decay_at_first(self):
        """With a = 1 and b = 1 it is the mean of all iterates, and of the start."""
        average = WeightAverage(0.9999, early=1.0, lag=1.0)
        values = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for step, value in enumerate(values.tolist()):
            average.update(weights(value), step)
            assert average.values["w0"].item() == pytest.approx(values[: step + 1].mean().item())

    def test_the_weight_falls_to_its_floor(self):
        average = WeightAverage(0.99, every=10)
        found = [average.weight(step) for step in (10, 199, 500, 10_000)]
        assert found == pytest.approx([1.0, 0.5, 100 / 501, 1 - 0.99**10])

    def test_it_begins_anew_with_other_parameters(self):
        average = WeightAverage(0.9)
        average.update(weights(1.0), 10**9)
        average.update(weights(2.0, 5.0), 10**9)
        assert {name: value.item() for name, value in average.values.items()} == {"w0": 2.0, "w1": 5.0}
        average.forget()
        average.update(weights(7.0), 10**9)
        assert average.values["w0"].item() == 7.0


class TestInPlace:
    def test_exchange_and_return(self):
        average, params = WeightAverage(0.9), weights(1.0, 2.0)
        average.update(weights(10.0, 20.0), 0)
        with average.in_place(params):
            assert [param.item() for param in params.values()] == [10.0, 20.0]
        assert [param.item() for param in params.values()] == [1.0, 2.0]

    def test_an_error_within_brings_the_present_ones_back(self):
        average, params = WeightAverage(0.9), weights(1.0)
        average.update(weights(10.0), 0)

        def interrupted():
            with average.in_place(params):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert params["w0"].item() == 1.0

    def test_the_memory_of_parameters_stays(self):
        params = weights(1.0)
        view = params["w0"].view(1, 1)
        kept = snapshot(params)
        params["w0"].add_(4.0)
        put_back(params, kept)
        assert view.item() == 1.0

    def test_parameters_that_it_does_not_know_stay_as_they_are(self):
        average, params = WeightAverage(0.9), weights(1.0, 2.0)
        average.update(weights(10.0), 0)
        with average.in_place(params):
            assert [param.item() for param in params.values()] == [1.0, 2.0]
