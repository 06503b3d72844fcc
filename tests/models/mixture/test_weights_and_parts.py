"""FlowMixture with weights, in parts, in float32, and its moments, against what these are elsewhere."""

import pickle

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.semi_supervised import LabelSpreading

from pyro_flowvi.datasets import hide_labels, pinwheel
from pyro_flowvi.models import FlowMixture
from pyro_flowvi.models.mixture._columns import Columns, Rows, counts_of
from pyro_flowvi.models.mixture._partitions import STARTS, cluster_gaussians, in_one_unit, warm_starts
from tests.models.mixture.matching import accuracy

QUICK = {"flow": "realnvp", "init": "kmeans", "num_layers": 2, "hidden": (4,), "max_iter": 40}


def quick(num=2, **options):
    return FlowMixture(num, **{**QUICK, "random_state": 0, **options})


def two_blobs(num=60, distance=8.0, seed=0):
    y = np.repeat([0, 1], num)
    return distance * y[:, None] + np.random.default_rng(seed).standard_normal((2 * num, 2)), y


# -- weights ----------------------------------------------------------------------------------------


def test_integer_weights_are_repeated_rows():
    x = np.random.default_rng(0).standard_normal((20, 2))
    weights = np.random.default_rng(1).integers(0, 3, 20)
    weighted, repeated = quick(1).fit(x, sample_weight=weights), quick(1).fit(np.repeat(x, weights, axis=0))
    np.testing.assert_allclose(weighted.score_samples(x), repeated.score_samples(x), rtol=1e-9)
    assert weighted.start_labels_.shape == (20,)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_weights_make_another_density(scale):
    """A fifth of one cluster: the other one has five times its weight, as if rows had been left out."""
    x, y = two_blobs(400)
    weights = scale * np.where(y == 0, 0.2, 1.0)
    mixture = quick(2, max_iter=300).fit(x, sample_weight=weights)
    first = mixture.predict(x[:1])[0]
    assert mixture.weights_[first] == pytest.approx(1 / 6, abs=0.02)
    assert mixture.score(x, sample_weight=weights) == pytest.approx(
        np.average(mixture.score_samples(x), weights=weights)
    )
    np.testing.assert_allclose(mixture.mean_, np.average(x, axis=0, weights=weights))


def test_weights_within_a_cluster_move_it():
    """Importance weights of a normal: those of one with another mean."""
    x = np.random.default_rng(0).standard_normal((4000, 1))
    mixture = quick(1, max_iter=300).fit(x, sample_weight=np.exp(0.5 * x[:, 0] - 0.125))
    assert mixture.means_[0, 0] == pytest.approx(0.5, abs=0.08)
    assert mixture.covariances_[0, 0, 0] == pytest.approx(1.0, abs=0.15)


def test_order_of_the_rows_does_not_matter():
    x, _ = two_blobs()
    order = np.random.default_rng(0).permutation(len(x))
    mixture, other = quick().fit(x), quick().fit(x[order])
    np.testing.assert_allclose(mixture.score_samples(x), other.score_samples(x), rtol=1e-6)
    np.testing.assert_array_equal(mixture.start_labels_[order], other.start_labels_)


def test_rows_of_no_weight_have_a_start_label():
    x, y = two_blobs()
    mixture = quick().fit(x, sample_weight=np.arange(120) % 2)
    assert accuracy(y, mixture.start_labels_) == 1.0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (-np.ones(120), "sample_weight: expected weights of at least 0"),
        (np.zeros(120), "(?i)sample.weight"),
        (np.ones(3), "sample_weight"),
        (np.full(120, np.nan), "NaN"),
        (np.arange(120) < 1, "n_components = 2, n_samples = 1"),
    ],
)
def test_wrong_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        quick().fit(two_blobs()[0], sample_weight=weights)


def test_counts_and_columns():
    x = np.array([[0.0], [3.0], [9.0]])
    assert counts_of([2, 1, 0], x).tolist() == [2, 1, 0]
    np.testing.assert_allclose(counts_of([0.2, 0.1, 0.3], x), [1.0, 0.5, 1.5])
    columns = Columns.of(x, np.array([2.0, 1.0, 0.0]))
    assert (columns.mean[0], columns.scale[0]) == pytest.approx((1.0, np.sqrt(2.0)))
    rows = Rows.of(x, np.array([0, -1, 1]), np.array([2.0, 1.0, 0.0]), columns)
    assert sorted(rows.place) == [0, 1]
    np.testing.assert_allclose(rows.z, columns.standardised(x[rows.place]))


@pytest.mark.parametrize("name", ["kmeans", "gmm", "neighbours"])
def test_starts_with_weights(name):
    """Far rows that hardly count do not have a part of their own."""
    x, y = two_blobs(50, distance=6.0)
    x = np.concatenate([x, [[300.0, 300.0]]])
    counts = np.append(np.ones(100), 1e-9)
    assert name in STARTS
    parts = warm_starts([name], x, np.full(101, -1), 2, np.random.RandomState(0), counts=counts)[name]
    assert accuracy(y, parts[:100]) == 1.0


def test_label_spreading_sees_every_row_of_some_thousand():
    """By part of them, the rest following the nearest, its classes have other borders."""
    x, y = pinwheel(1300, 5, seed=0)
    labels = hide_labels(y, 3)
    parts = warm_starts(["label_spreading"], x, labels, 5, np.random.RandomState(0))["label_spreading"]
    z = in_one_unit(x, np.arange(len(x)), np.ones(len(x)), 5, np.random.RandomState(0))
    whole = LabelSpreading(kernel="knn", n_neighbors=10, alpha=0.99, max_iter=1000).fit(z, labels)
    np.testing.assert_array_equal(parts, whole.transduction_)


def test_gaussians_of_rows_that_are_one_are_those_of_all():
    x = np.array([[0.0], [0.0], [0.0], [2.0], [4.0]])
    loc, factors, _ = cluster_gaussians(x, np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 2))
    np.testing.assert_allclose(loc[:, 0], [1.2, 3.0])
    assert factors[0, 0, 0] ** 2 > x.var()


# -- moments and dtypes -----------------------------------------------------------------------------


def test_moments_are_those_of_the_components():
    x, y = two_blobs(500)
    x = np.insert(x * [3.0, 0.1] + [100.0, -5.0], 1, 7.0, axis=1)
    mixture = quick(2, max_iter=200).fit(x)
    for k in range(2):
        own = x[mixture.predict(x) == k]
        np.testing.assert_allclose(mixture.means_[k, [0, 2]], own.mean(0)[[0, 2]], atol=0.3)
        np.testing.assert_allclose(
            np.sqrt(np.diag(mixture.covariances_[k])[[0, 2]]), own.std(0)[[0, 2]], rtol=0.1
        )
        assert mixture.means_[k, 1] == pytest.approx(7.0)
        assert mixture.covariances_[k, 1, 1] == pytest.approx(1e-6)
    draws, labels = mixture.sample(200_000)
    for k in range(2):
        own = draws[labels == k]
        error = np.sqrt(own.var(0) / len(own) + mixture.means_se_[k] ** 2)
        assert (np.abs(mixture.means_[k] - own.mean(0)) < 5 * error + 1e-12).all()
        spread = np.cov(own.T)
        error = mixture.covariances_se_[k] * np.sqrt(1 + 20_000 / len(own))
        np.testing.assert_array_less(np.abs(mixture.covariances_[k] - spread), 5 * error + 1e-4)
    assert y.size == 1000


def test_errors_of_moments_are_those_of_repeated_draws():
    from pyro_flowvi.models.mixture._moments import component_moments

    mixture = quick(2).fit(two_blobs()[0])
    found = [component_moments(mixture.model_, seed=seed) for seed in range(30)]
    for name in ("means", "covariances"):
        spread = np.std([getattr(each, name) for each in found], axis=0)
        expected = np.mean([getattr(each, f"{name}_se") for each in found], axis=0)
        np.testing.assert_allclose(spread, expected, rtol=0.6)


def test_moments_before_and_after_fits():
    mixture = quick()
    assert not hasattr(mixture, "means_")
    with pytest.raises(NotFittedError):
        mixture.covariances_se_  # noqa: B018
    x, _ = two_blobs()
    before = mixture.fit(x).means_
    twin = pickle.loads(pickle.dumps(mixture))
    np.testing.assert_array_equal(twin.means_, before)
    assert np.abs(mixture.fit(x + 50.0).means_ - before).min() > 40


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_answers_have_the_dtype_of_the_data(dtype):
    x, _ = two_blobs()
    mixture = quick().fit(x.astype(dtype))
    answers = [
        mixture.means_,
        mixture.covariances_,
        mixture.means_se_,
        mixture.weights_,
        mixture.sample(3)[0],
    ]
    answers += [mixture.score_samples(x.astype(dtype)), mixture.predict_proba(x.astype(dtype))]
    assert {answer.dtype for answer in answers} == {np.dtype(dtype)}
    np.testing.assert_allclose(
        quick().fit(x).score_samples(x), mixture.score_samples(x.astype(dtype)), rtol=1e-3
    )
    assert mixture.score_samples(x.astype(int)).dtype == np.float64


# -- parts ------------------------------------------------------------------------------------------


def test_partial_fit_learns_from_later_rows():
    x, y = pinwheel(1000, 3, seed=0)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    new = pinwheel(500, 3, seed=1)[0]
    mixture = FlowMixture(3, flow="realnvp", init="kmeans", max_iter=300, random_state=0)
    first = mixture.partial_fit(x[:300]).score(new)
    assert mixture.rows_seen_ == 300
    for part in np.array_split(x[300:], 6):
        mixture.partial_fit(part)
    assert (mixture.rows_seen_, mixture.start_) == (3000, "partial_fit")
    assert mixture.score(new) > first + 0.02
    assert accuracy(y, mixture.predict(x)) > 0.98
    assert mixture.held_out_nll_ == pytest.approx(-mixture.score(new), abs=0.2)


def test_partial_fit_follows_the_weights_of_all_rows():
    x, y = two_blobs(300)
    mixture = quick(2, max_iter=100).partial_fit(x)
    for _ in range(2):
        mixture.partial_fit(x[y == 0])
    assert mixture.weights_[mixture.predict(x[:1])[0]] == pytest.approx(0.75, abs=0.02)


def test_partial_fit_with_labels():
    x, y = two_blobs()
    mixture = quick(2, batch_size=32).partial_fit(x[:60], np.full(60, 3), classes=[3, 9])
    assert mixture.classes_.tolist() == [3, 9]
    for _ in range(6):
        mixture.partial_fit(x, np.array([3, 9])[y])
    assert (mixture.predict(x) == np.array([3, 9])[y]).mean() > 0.95
    with pytest.raises(ValueError, match=r"y: expected labels among the classes \[3, 9\], got \[4\]"):
        mixture.partial_fit(x, np.full(120, 4))
    with pytest.raises(ValueError, match="features"):
        mixture.partial_fit(x[:, :1])


def test_partial_fit_goes_on_from_a_fit_and_a_fit_begins_anew():
    x, _ = two_blobs()
    mixture = quick().fit(x)
    before = mixture.score(x)
    assert mixture.partial_fit(x).score(x) != before
    assert mixture.rows_seen_ == 240
    assert mixture.fit(x).score(x) == before
    assert mixture.rows_seen_ == 120
