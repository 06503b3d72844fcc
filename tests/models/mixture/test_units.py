"""Fits and starts do not depend on the units of the columns; degenerate rows have a finite likelihood."""

import math

import numpy as np
import pytest

from pyro_flowvi.models import FlowMixture
from pyro_flowvi.models.mixture._partitions import STARTS, warm_starts
from pyro_flowvi.models.mixture._search import _behind

UNITS = {
    "small and large": ([1e-3, 1e3, 7e6], [0.0, 0.0, 0.0]),
    "offsets": ([2.0, 1e-3, 1e5], [-3e5, 2e3, 1.7e9]),
    "extreme": ([1e-200, 1e200, 1.0], [0.0, 0.0, 1e9]),
}


def blobs(dim=3, classes=3, distance=6.0, size=60):
    """Normal clusters at a distance along one axis each; the other columns are noise."""
    y = np.repeat(np.arange(classes), size)
    centres = distance * np.eye(max(dim, classes))[:classes, :dim]
    return centres[y] + np.random.default_rng(0).standard_normal((len(y), dim)), y


def is_partition(found, y):
    pairs = set(zip(found.tolist(), y.tolist(), strict=True))
    return len(pairs) == len(set(y.tolist())) == len(set(found.tolist()))


@pytest.mark.parametrize(
    "units", ["offsets", *(pytest.param(name, marks=pytest.mark.long) for name in UNITS if name != "offsets")]
)
def test_fits_in_other_units_are_the_same(units):
    """Labels are equal, and log likelihoods differ by the log Jacobian."""
    x, y = blobs()
    scale, offset = map(np.array, UNITS[units])
    moved = x * scale + offset
    fits = [FlowMixture(3, max_iter=40, random_state=0).fit(each) for each in (x, moved)]
    jacobian = np.log(scale).sum()
    assert is_partition(fits[0].predict(x), y)
    np.testing.assert_array_equal(fits[1].predict(moved), fits[0].predict(x))
    np.testing.assert_allclose(fits[1].score_samples(moved) + jacobian, fits[0].score_samples(x), atol=1e-3)
    assert fits[1].held_out_nll_ - jacobian == pytest.approx(fits[0].held_out_nll_, abs=1e-3)
    for one, other in zip(*(fit.starts_ for fit in fits), strict=True):
        assert one["init"] == other["init"]
        assert other["held_out_nll"] - jacobian == pytest.approx(one["held_out_nll"], abs=1e-3)
    np.testing.assert_allclose((fits[1].sample(50)[0] - offset) / scale, fits[0].sample(50)[0], atol=1e-3)


def test_single_precision_is_taken_as_it_is():
    x, y = blobs()
    x = (x * [1.0, 1e-3, 1e3] + [0.0, 2000.0, 1.7e6]).astype(np.float32)
    mixture = FlowMixture(3, max_iter=30, random_state=0).fit(x)
    assert is_partition(mixture.predict(x), y)
    np.testing.assert_array_equal(
        FlowMixture(3, max_iter=30, random_state=0).fit(x.astype(np.float64)).score_samples(x),
        mixture.score_samples(x),
    )


@pytest.mark.parametrize("name", [name for name in STARTS if name not in ("label_spreading", "random")])
def test_columns_of_noise_do_not_hide_the_one_that_tells_parts_apart(name):
    """In raw distances 8 standard deviations are clear; in those of standardised columns alone, not."""
    x, y = blobs(dim=20, classes=2, distance=8.0, size=150)
    scale = np.exp(3.0 * np.random.default_rng(1).standard_normal(20))
    parts = warm_starts([name], x * scale, np.full(len(y), -1), 2, np.random.RandomState(0))[name]
    assert max((parts == y).mean(), (parts != y).mean()) > 0.99


@pytest.mark.parametrize("start", ["auto", "kmeans"])
def test_every_start_has_a_score(start):
    """Also the only one there is, whose score is that of the full training."""
    x, _ = blobs()
    mixture = FlowMixture(3, init=start, max_iter=30, random_state=0).fit(x)
    assert all(math.isfinite(each["held_out_nll"]) and "reason" not in each for each in mixture.starts_)
    if len(mixture.starts_) == 1:
        assert mixture.starts_[0]["held_out_nll"] <= mixture.held_out_nll_ + 1.0


def test_no_rows_held_out_is_said():
    mixture = FlowMixture(2, max_iter=20, random_state=0).fit(blobs(size=10)[0])
    assert mixture.held_out_nll_ == math.inf
    assert [each["reason"] for each in mixture.starts_] == ["no rows were held out"]


def test_a_start_without_finite_likelihood_is_behind():
    good, bad = np.zeros(10), np.full(10, np.nan)
    huge = np.where(np.arange(10) == 3, np.inf, 0.0)
    assert _behind([bad, good, huge, good + 1.0], {0, 1, 2}) == {0: math.inf, 1: 0.0, 2: math.inf}


def repeated(rows, times):
    return np.repeat(np.asarray(rows, dtype=float), times, axis=0)


DEGENERATE = {
    "fewer distinct rows than components": (repeated([[0, 1], [2, 3]], 40), 3),
    "one column, two values": (repeated([[0], [2]], 40), 3),
    "groups of equal rows": (repeated(np.random.default_rng(0).standard_normal((12, 2)), 10), 4),
    "whole numbers": (np.random.default_rng(0).integers(0, 3, (120, 2)).astype(float), 3),
    "one column": (blobs(1, 2)[0], 2),
    "a constant of 1e15": (np.insert(blobs(2, 2)[0], 1, 1e15, axis=1), 2),
    "a timestamp that varies by milliseconds": (blobs(2, 2)[0] * [1.0, 1e-3] + [0.0, 1.7e9], 2),
    "an outlier": (np.concatenate([blobs(2, 2)[0], [[1e9, -1e9]]]), 2),
    "as many rows as components": (np.eye(3), 3),
}


QUICK = ("fewer distinct rows than components", "one column", "an outlier")


@pytest.mark.parametrize(
    "case",
    [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in DEGENERATE if name not in QUICK)],
)
def test_degenerate_rows(case):
    x, num = DEGENERATE[case]
    mixture = FlowMixture(num, max_iter=20, random_state=0).fit(x)
    assert np.isfinite(mixture.score_samples(x)).all()
    assert np.isfinite(mixture.predict_proba(x)).all()
    assert np.isfinite(mixture.sample(20)[0]).all()
    assert not any(math.isnan(each["held_out_nll"]) for each in mixture.starts_)
    assert mixture.weights_.shape == (num,)
