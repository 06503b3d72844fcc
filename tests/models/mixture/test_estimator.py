"""FlowMixture as scikit-learn's estimators are used, and its parts."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from pyro_flowvi.datasets import hide_labels, pinwheel, two_circles
from pyro_flowvi.models import FlowMixture
from pyro_flowvi.models.mixture import _search as mixture_search
from pyro_flowvi.models.mixture._labels import Targets
from pyro_flowvi.models.mixture._partitions import STARTS, cluster_gaussians, warm_starts
from tests.models.mixture.matching import accuracy

QUICK = {"flow": "realnvp", "init": "kmeans", "num_layers": 2, "hidden": (4,), "max_iter": 40}


def quick(num=2, **options):
    return FlowMixture(num, **{**QUICK, "random_state": 0, **options})


def blobs(num=60, distance=4.0, dim=2, classes=2, seed=0):
    y = np.repeat(np.arange(classes), num)
    centers = distance * np.arange(classes)[:, None] * np.ones(dim)
    return centers[y] + np.random.default_rng(seed).standard_normal((len(y), dim)), y


# -- scikit-learn's conventions --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_check_estimator():
    found = check_estimator(FlowMixture(1, **{**QUICK, "max_iter": 20}), on_skip=None)
    assert len(found) > 35
    assert {check["status"] for check in found} <= {"passed", "skipped"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_check_estimator_at_defaults():
    assert {check["status"] for check in check_estimator(FlowMixture(), on_skip=None)} <= {
        "passed",
        "skipped",
    }


def test_import_needs_no_scikit_learn():
    script = """
import sys
import pyro_flowvi, pyro_flowvi.models
assert not [name for name in sys.modules if name.partition(".")[0] == "sklearn"]
sys.modules["sklearn"] = None
from pyro_flowvi.models import FlowMixture
from pyro_flowvi.models.mixture import _search
try:
    FlowMixture(2)
except ImportError as error:
    assert "pyro-flowvi[sklearn]" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


@pytest.mark.long
def test_pipeline_search_clone_and_pandas():
    pandas = pytest.importorskip("pandas")
    x, y = (part[np.random.default_rng(0).permutation(120)] for part in blobs(dim=3, distance=10.0))
    frame = pandas.DataFrame(x, columns=["a", "b", "c"])
    pipeline = make_pipeline(PCA(2), StandardScaler(), quick())
    assert accuracy(y, pipeline.fit(frame).predict(frame)) == 1.0
    search = GridSearchCV(quick(), {"n_components": [1, 2]}, cv=2).fit(frame)
    assert search.best_params_ == {"n_components": 2}
    mixture = clone(search.best_estimator_).fit(frame, pandas.Series(y))
    assert list(mixture.feature_names_in_) == ["a", "b", "c"]
    np.testing.assert_allclose(clone(mixture).fit(x, y).score_samples(x), mixture.score_samples(frame))


def test_pickle_and_continue():
    x, _ = blobs()
    mixture = quick().fit(x)
    twin = pickle.loads(pickle.dumps(mixture))
    np.testing.assert_array_equal(twin.score_samples(x), mixture.score_samples(x))
    before = mixture.score(x)
    twin.set_params(warm_start=True, noise=0.0, max_iter=400).fit(x)
    assert twin.start_ == "warm_start"
    assert twin.score(x) > before
    assert mixture.score(x) == before
    with pytest.raises(ValueError, match="warm_start: expected the columns"):
        twin.set_params(n_components=3).fit(x)


def test_not_fitted():
    with pytest.raises(NotFittedError):
        quick().sample()
    with pytest.raises(NotFittedError):
        quick().predict(np.zeros((2, 2)))


# -- the density ------------------------------------------------------------------------------------


def test_density_is_normalised_in_the_units_of_the_data():
    x, _ = blobs()
    x = x * [30.0, 0.1] + [1000.0, -5.0]
    mixture = quick().fit(x)
    low, high = x.mean(0) - 6 * x.std(0), x.mean(0) + 6 * x.std(0)
    sides = [np.linspace(a, b, 400) for a, b in zip(low, high, strict=True)]
    grid = np.stack(np.meshgrid(*sides), -1).reshape(-1, 2)
    cell = np.prod([side[1] - side[0] for side in sides])
    assert np.exp(mixture.score_samples(grid)).sum() * cell == pytest.approx(1.0, abs=1e-3)
    np.testing.assert_allclose(mixture.predict_proba(x).sum(1), 1.0)
    np.testing.assert_array_equal(mixture.predict_proba(x).argmax(1), mixture.predict(x))


def test_samples_are_of_the_density():
    x, _ = blobs(200)
    mixture = quick().fit(x)
    draws, components = mixture.sample(4000)
    assert draws.shape == (4000, 2)
    np.testing.assert_allclose(draws.mean(0), x.mean(0), atol=0.2)
    np.testing.assert_allclose(np.cov(draws.T), np.cov(x.T), rtol=0.15)
    np.testing.assert_allclose(np.bincount(components) / 4000, mixture.weights_, atol=0.01)
    assert (mixture.predict(draws) == components).mean() > 0.98
    np.testing.assert_array_equal(mixture.sample(5)[0], mixture.sample(5)[0])


def test_criteria_count_free_parameters():
    x, _ = blobs()
    mixture = quick().fit(x)
    total = sum(param.numel() for param in mixture.model_.parameters())
    free = total - 1 - 2 * 3  # one weight, and the upper triangles with their diagonals
    log_likelihood = mixture.score_samples(x).sum()
    assert mixture.aic(x) == pytest.approx(2 * free - 2 * log_likelihood)
    assert mixture.bic(x) == pytest.approx(np.log(len(x)) * free - 2 * log_likelihood)


def test_one_component_is_maximum_likelihood():
    """Of normal data: as good as the Gaussian that it starts from, on new data too."""
    x = np.random.default_rng(0).standard_normal((1000, 2)) @ [[2.0, 0.0], [1.0, 0.5]]
    new = np.random.default_rng(1).standard_normal((1000, 2)) @ [[2.0, 0.0], [1.0, 0.5]]
    gaussian = GaussianMixture(1).fit(x)
    assert quick(1, max_iter=200).fit(x).score(new) > gaussian.score(new) - 0.02


# -- recipes ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_starts_are_ranked_by_held_out_rows(monkeypatch):
    """k-means cuts the circles in half planes; the likelihood of held-out rows knows better."""
    x, y = two_circles(150)
    monkeypatch.setattr(mixture_search, "AUTO_STARTS", ("kmeans", "spectral"))
    monkeypatch.setattr(mixture_search, "FOLDS", 1)
    mixture = FlowMixture(2, flow="neural_spline", max_iter=600, random_state=0).fit(x)
    tried = {each["init"]: each["held_out_nll"] for each in mixture.starts_}
    assert mixture.start_ == "spectral" == min(tried, key=tried.get)
    assert accuracy(y, mixture.start_labels_) == accuracy(y, mixture.predict(x)) == 1.0


def test_few_labels():
    x, y = two_circles(100)
    labels = hide_labels(y, 8) * 3 + 2  # the classes are 2 and 5, what was -1 is -1 still
    mixture = FlowMixture(2, flow="neural_spline", init="label_spreading", max_iter=300, random_state=0).fit(
        x, labels
    )
    assert mixture.classes_.tolist() == [2, 5]
    assert (mixture.predict(x) == 3 * y + 2).mean() > 0.99


def test_pinwheel():
    x, y = pinwheel(200, 3)
    mixture = FlowMixture(3, flow="realnvp", init="kmeans", max_iter=400, random_state=0).fit(x)
    assert accuracy(y, mixture.predict(x)) > 0.98
    assert mixture.score(x) > GaussianMixture(3, random_state=0).fit(x).score(x) + 0.05


@pytest.mark.parametrize("name", list(STARTS))
def test_starts(name):
    x, y = blobs(50, distance=8.0, classes=3)
    labels = hide_labels(y, 4) if name == "label_spreading" else np.full(len(y), -1)
    parts = warm_starts([name], x, labels, 3, np.random.RandomState(0))[name]
    assert parts.shape == (150,)
    assert set(parts) <= {0, 1, 2}
    if name != "random":
        assert accuracy(y, parts) == 1.0
    if name == "label_spreading":
        np.testing.assert_array_equal(parts, y)


def test_starts_follow_labels():
    x, y = blobs(50, distance=8.0, classes=3)
    parts = warm_starts(["kmeans"], x, hide_labels(y, 1), 3, np.random.RandomState(0))["kmeans"]
    np.testing.assert_array_equal(parts, y)


@pytest.mark.parametrize(("name", "limit"), [("kmeans", "MAX_ROWS"), ("spectral", "MAX_SPECTRAL_ROWS")])
def test_start_of_many_rows_and_columns(name, limit, monkeypatch):
    """Part of the rows is clustered, in some principal components; the others follow the nearest."""
    monkeypatch.setattr(f"pyro_flowvi.models.mixture._partitions.{limit}", 400)
    x, y = blobs(1000, distance=3.0, dim=40)
    parts = warm_starts([name], x, np.full(len(y), -1), 2, np.random.RandomState(0))[name]
    assert accuracy(y, parts) == 1.0


def test_separate_parts_are_the_spectral_start():
    x, y = blobs(40, distance=50.0, classes=4)
    for num in (3, 4):  # one component fewer than parts that no edge connects, and as many
        parts = warm_starts(["spectral"], x, np.full(len(y), -1), num, np.random.RandomState(0))["spectral"]
        assert len(np.unique(parts)) == num
        for label in range(4):
            assert len(np.unique(parts[y == label])) == 1


def test_cluster_gaussians_are_those_of_the_parts():
    x, y = blobs(500, classes=2, dim=3)
    loc, factors, weights = cluster_gaussians(x, np.eye(3)[y])
    for k in range(2):
        np.testing.assert_allclose(loc[k], x[y == k].mean(0))
        np.testing.assert_allclose(factors[k] @ factors[k].T, np.cov(x[y == k].T, bias=True), atol=0.01)
    np.testing.assert_allclose(loc[2], x.mean(0))  # nothing is in it: that of all rows, hardly weighed
    assert 0 < weights[2] < 1e-3


# -- labels -----------------------------------------------------------------------------------------


def test_classes_and_components_without_class():
    x, y = blobs(classes=3, distance=8.0)
    labels = np.where(y == 2, -1, np.array([40, -7, 0])[y])
    mixture = quick(3).fit(x, labels)
    assert mixture.classes_.tolist() == [-7, 40]
    assert mixture.n_components_ == 3
    assert mixture.component_labels_.tolist() == [-7, 40, 41]
    np.testing.assert_array_equal(mixture.predict(x), np.array([40, -7, 41])[y])
    assert mixture.predict_proba(x).shape == (180, 3)
    assert set(mixture.sample(50)[1]) == {-7, 40, 41}
    assert quick(1).fit(x, y).n_components_ == 3


def test_labels_that_are_no_integers():
    x, y = blobs(distance=8.0)
    names = np.array(["no", "yes"])[y]
    np.testing.assert_array_equal(quick().fit(x, names).predict(x), names)
    some = names.astype(object)
    some[5:60] = -1
    mixture = quick(3).fit(x, some)
    assert mixture.component_labels_.tolist() == ["no", "yes", 2]
    np.testing.assert_array_equal(quick().fit(x, some).predict(x), names)


def test_labels_that_are_all_missing_are_none():
    x, _ = blobs()
    mixture, other = quick().fit(x, np.full(len(x), -1)), quick().fit(x)
    assert mixture.classes_.size == 0
    np.testing.assert_array_equal(mixture.score_samples(x), other.score_samples(x))


def test_one_class_alone():
    x, _ = blobs()
    mixture = quick(1).fit(x, np.full(len(x), 3))
    assert (mixture.predict(x) == 3).all()
    assert quick(2).fit(x, np.where(np.arange(len(x)) < 5, 3, -1)).component_labels_.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5] * 120, "y: expected integers, or -1 for a row without a label, got np.float64\\(0.5\\)"),
        ([np.nan] * 120, "y: expected integers.*nan"),
        ([1j] * 120, "Complex data not supported"),
        ([0] * 119, "y: expected 120 labels, one for each row of X, got 119"),
        (["a", "-1"] * 60, "y: expected an array of objects"),
        (np.array([0, None] * 60, dtype=object), "y: expected labels that can be sorted"),
    ],
)
def test_wrong_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        quick().fit(blobs()[0], labels)


def test_targets_of_whole_floats_and_booleans():
    assert Targets.of([1.0, -1.0, 2.0], 3).codes.tolist() == [0, -1, 1]
    assert Targets.of(np.array([True, False]), 2).classes.tolist() == [0, 1]


# -- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 0}, "n_components: expected a positive integer, got 0"),
        ({"flow": "nsf"}, "flow: expected"),
        ({"init": "ward"}, "init: expected one of"),
        ({"init": "label_spreading"}, "init: expected a start that the data allow"),
        ({"max_iter": 0}, "max_iter: expected"),
        ({"n_init": 1.5}, "n_init: expected"),
        ({"learning_rate": -1.0}, "learning_rate: expected"),
        ({"validation_fraction": 1.0}, "validation_fraction: expected a number below 1"),
        ({"noise": -1.0}, "noise: expected"),
        ({"weight_decay": float("nan")}, "weight_decay: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
    ],
)
def test_wrong_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        quick().set_params(**options).fit(blobs()[0])


def test_wrong_data():
    x, _ = blobs()
    with pytest.raises(ValueError, match="NaN"):
        quick().fit(np.where(x > 3.0, np.nan, x))
    with pytest.raises(ValueError, match="n_components = 7, n_samples = 5"):
        quick(7).fit(x[:5])
    with pytest.raises(ValueError, match="X: expected a column that varies"):
        quick(1).fit(np.ones((10, 2)))
    with pytest.raises(ValueError, match="n_samples: expected"):
        quick(1).fit(x).sample(0)


def test_constant_column():
    """Normal around its value with standard deviation 0.001: the rest of the density is untouched."""
    x, _ = blobs()
    wide = np.insert(x, 1, 7.0, axis=1)
    mixture, plain = quick().fit(wide), quick().fit(x)
    np.testing.assert_array_equal(mixture.predict(wide), plain.predict(x))
    at_value = -np.log(1e-3 * np.sqrt(2.0 * np.pi))
    np.testing.assert_allclose(mixture.score_samples(wide), plain.score_samples(x) + at_value)
    assert mixture.score_samples(wide + [0.0, 0.01, 0.0]).max() < mixture.score_samples(wide).max() - 40
    assert mixture.held_out_nll_ == pytest.approx(plain.held_out_nll_ - at_value)
    draws, _ = mixture.sample(100)
    np.testing.assert_allclose(draws[:, 1], 7.0, atol=0.01)


def test_copied_column_and_repeated_rows():
    x, _ = blobs()
    mixture = quick().fit(np.concatenate([x, x[:, :1]], 1))
    assert np.isfinite(mixture.score_samples(np.concatenate([x, x[:, :1]], 1))).all()
    mixture = quick().fit(np.repeat(x[::10], 10, axis=0))
    assert np.isfinite(mixture.score(x))


def test_component_without_rows():
    """All rows have one of two labels, so that the third component gets none: it stays, hardly weighed."""
    x, y = blobs(distance=8.0)
    mixture = quick(3, max_iter=100).fit(x, y)
    assert mixture.weights_[2] < 0.02
    np.testing.assert_array_equal(mixture.predict(x), y)


def test_divergence_keeps_the_last_good_state():
    x, _ = blobs()
    with pytest.warns(ConvergenceWarning, match="not finite"):
        mixture = quick(learning_rate=1e30).fit(x)
    assert not mixture.converged_
    gaussians = GaussianMixture(2, random_state=0).fit(x)
    assert mixture.score(x) > gaussians.score(x) - 0.2


def test_few_rows_and_one_column():
    x = np.array([[0.0], [0.1], [5.0], [5.1]])
    mixture = FlowMixture(2, random_state=0).fit(x)
    assert accuracy(np.array([0, 0, 1, 1]), mixture.predict(x)) == 1.0
    assert mixture.held_out_nll_ == np.inf


def test_seed_and_other_settings_of_torch():
    x, _ = blobs()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    scores = quick().fit(x).score_samples(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(quick().fit(x).score_samples(x), scores, rtol=1e-12)
    assert abs(quick(random_state=1).fit(x).score_samples(x) - scores).max() > 1e-6


def test_progress(capfd):
    quick(verbose=1).fit(blobs()[0])
    shown = capfd.readouterr().err
    assert "fitting kmeans, realnvp" in shown
    assert "NLL" in shown
    quick().fit(blobs()[0])
    assert not capfd.readouterr().err
