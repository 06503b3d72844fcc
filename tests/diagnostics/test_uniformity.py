"""The test of uniform ranks against enumeration and simulation, and what the shape of ranks is told as."""

import itertools

import numpy as np
import pytest
from scipy.special import ndtr
from scipy.stats import binom

from pyro_flowvi import Calibration
from pyro_flowvi.diagnostics._uniformity import band, counts_below, points, uniform_p_value


def statistic(ranks, num_values):
    """The smallest two-sided tail probability, written from its definition."""
    num, found = len(ranks), 1.0
    for point in points(num, num_values):
        count, law = int((ranks < point).sum()), binom(num, point / num_values)
        found = min(found, 2 * min(law.cdf(count), law.sf(count - 1)))
    return found


@pytest.mark.parametrize(("num", "num_values"), [(3, 4), (5, 3), (4, 5)])
def test_p_values_by_enumeration(num, num_values):
    samples = [np.array(ranks) for ranks in itertools.product(range(num_values), repeat=num)]
    statistics = np.array([statistic(ranks, num_values) for ranks in samples])
    for ranks, own in zip(samples, statistics, strict=True):
        expected = (statistics <= own + 1e-12).mean()
        assert uniform_p_value(ranks, num_values) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("num", "num_values"), [(30, 101), (100, 1001), (300, 5)])
def test_level_and_band_by_simulation(num, num_values):
    rng = np.random.default_rng(0)
    samples = rng.integers(0, num_values, (1500, num))
    p = np.array([uniform_p_value(ranks, num_values) for ranks in samples])
    for level in (0.05, 0.3):  # the statistic is discrete, so that a level may be reached from below only
        assert level - 0.05 < (p <= level).mean() < level + 0.025
    low, high = band(num, num_values)
    counts = np.array([counts_below(ranks, num_values) for ranks in samples])
    inside = ((low <= counts) & (counts <= high)).all(1)
    assert 0.93 < inside.mean() < 0.985
    np.testing.assert_array_equal(inside, p > 0.05)


def of_normals(shift=0.0, scale=1.0, num=200):
    """Ranks of a standard normal among draws of another, as exact as 1,000 draws are."""
    z = np.random.default_rng(0).standard_normal(num)
    return np.minimum((1001 * ndtr((z - shift) / scale)).astype(int), 1000)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (of_normals(scale=0.5), "U-shaped: the guide is too narrow, its sd about 0.5"),
        (of_normals(scale=1.7), "humped: the guide is too wide, its sd about 1.7"),
        (of_normals(shift=0.5), "low: the guide lies too high, by about 0.5 sd"),
        (of_normals(shift=-0.5), "high: the guide lies too low, by about 0.5 sd"),
    ],
)
def test_shapes_in_words(ranks, words):
    found = Calibration({"x": ranks}, 1000, 200)
    assert found.verdict == "not calibrated"
    assert words in str(found)


def test_holm_adjusts_for_all_scalars():
    found = Calibration({"x": of_normals(), "y": of_normals(shift=0.3), "z": of_normals()}, 1000, 200)
    p = {name: float(p) for name, p in found.p_values.items()}
    assert p["y"] < p["x"]
    expected = [min(1.0, 3 * p["y"]), *[min(1.0, 2 * p["x"])] * 2]
    assert list(found.adjusted().values()) == pytest.approx(expected)
    assert found.p_value == pytest.approx(3 * p["y"])


def test_what_is_slightly_wrong_in_each_scalar_shows_in_all_together():
    z = np.random.default_rng(0).standard_normal((100, 12))
    exact, narrow = (np.minimum((1001 * ndtr(z / scale)).astype(int), 1000) for scale in (1.0, 0.85))
    assert Calibration({"x": exact}, 1000, 100).verdict == "calibrated"
    found = Calibration({"x": narrow}, 1000, 100)
    adjusted = found.adjusted()
    assert adjusted["x[:]"] < 1e-3
    assert "too narrow, its sd about 0.9" in found.shape("x[:]")


def test_level_of_all_together():
    """Over columns that depend on one another, as latents do."""
    rng, below = np.random.default_rng(0), []
    for _ in range(1000):
        z = rng.standard_normal((40, 6)) * 0.6 + 0.8 * rng.standard_normal((40, 1))
        found = Calibration({"x": np.minimum((101 * ndtr(z)).astype(int), 100)}, 100, 40)
        below.append(found._shapes["x[:]"].p < 0.1)
    assert 0.04 < np.mean(below) < 0.125


def test_few_fits_decide_nothing_but_what_is_gross():
    assert Calibration({"x": of_normals(num=10)}, 1000, 10).verdict == "undecided"
    assert Calibration({"x": np.zeros(10, dtype=int)}, 1000, 10).verdict == "not calibrated"


def test_failures_and_interruptions_are_told():
    found = Calibration({"x": of_normals(num=30)}, 1000, 40, None, ((3, "FitDiverged: lost"),), {"note": 2})
    assert "1 of 40 fits failed, the first at 3: FitDiverged: lost" in str(found)
    assert "interrupted with 9 fits to go" in str(found)
    assert "2 fits warned: note" in str(found)


def test_among_needs_verdicts():
    with pytest.raises(ValueError, match="verdicts=True"):
        Calibration({"x": of_normals()}, 1000, 200).among("good")
