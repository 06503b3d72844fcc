"""The picture of simulation-based calibration."""

import numpy as np
import pytest

from pyro_flowvi.diagnostics import Calibration
from pyro_flowvi.plotting import plot_calibration


class TestCalibration:
    def test_curve_and_bars_are_those_of_the_ranks(self):
        ranks = np.random.default_rng(0).integers(0, 100, (50, 5))
        axes = plot_calibration(Calibration({"x": ranks}, 99, 50), names=["x[3]"])[:, 0]
        x, y = axes[0].lines[-1].get_data()
        np.testing.assert_allclose(y, [(ranks[:, 3] < round(100 * at)).mean() - at for at in x], atol=1e-12)
        heights = [bar.get_height() for bar in axes[1].patches if bar.get_width() < 0.5]
        np.testing.assert_array_equal(heights, np.histogram(ranks[:, 3], 5, (0, 100))[0])

    def test_the_worst_are_shown(self):
        ranks = np.random.default_rng(0).integers(0, 100, (50, 5))
        ranks[:, 4] //= 3
        axes = Calibration({"x": ranks}, 99, 50).plot()
        assert axes.shape == (2, 4)
        assert axes[0, 0].get_title().startswith("x[4], p ")

    def test_bad_input(self):
        found = Calibration({"x": np.zeros(0, dtype=int)}, 99, 0)
        with pytest.raises(ValueError, match="expected ranks"):
            plot_calibration(found)
        found = Calibration({"x": np.arange(9)}, 99, 9)
        with pytest.raises(ValueError, match="names: expected scalars"):
            found.plot(["y"])
