"""The picture of importance weights."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest

from pyro_flowvi.diagnostics import Diagnosis, diagnose
from pyro_flowvi.plotting import plot_khat


class TestKhat:
    def test_points_are_the_largest_weights(self):
        def model():
            pyro.sample("x", dist.Normal(0.0, 1.0))

        def guide():
            pyro.sample("x", dist.Normal(0.0, 0.5))

        found = diagnose(model, guide, seed=0, probes=False)
        left, _ = plot_khat(found)
        drawn = left.lines[0].get_ydata()
        weights = np.exp(found.log_weights)
        np.testing.assert_allclose(drawn, np.sort(weights)[::-1][: len(drawn)] / weights.mean())

    @pytest.mark.parametrize(("khat", "told"), [(0.2, "0.20"), (9.0, "9.00"), (-np.inf, "no tail")])
    def test_zones_end_at_the_thresholds(self, khat, told):
        weights = np.random.default_rng(0).standard_normal(400)
        found = Diagnosis(0.0, 0.0, 0.0, 300.0, khat, 400, "good", (), log_weights=weights)
        _, right = plot_khat(found)
        words = [text.get_text().partition(":")[0] for text in right.texts]
        assert words == ["good", "usable", "poor", told]
        heights = [text.get_position()[1] for text in right.texts[:3]]
        assert heights[0] < 0.5 < heights[1] < found.khat_threshold < heights[2]
        assert {0.5, found.khat_threshold} <= set(right.get_yticks())
        ticks = [text.get_text() for text in right.get_yticklabels()]
        assert ticks == ["0.00", "0.50", f"{found.khat_threshold:.2f}", "1.00"]
        low, high = right.get_ylim()
        assert low < right.lines[-1].get_ydata()[0] < high

    def test_without_weights(self):
        with pytest.raises(ValueError, match="log weights"):
            plot_khat(Diagnosis(0.0, 0.0, 0.0, 1.0, 0.0, 100, "good", ()))
