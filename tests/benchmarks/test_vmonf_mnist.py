"""The benchmark of mixtures of flows on MNIST, on images that are made here."""

import argparse
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from scipy.special import expit
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA

from benchmarks.measured.mixtures import vmonf_mnist as table
from benchmarks.mixtures import vmonf_mnist
from pyro_flowvi.datasets import LabelledImages


def part(num, seed):
    """Images of 6 x 6 pixels of six classes: a bright row each, with noise."""
    generator = np.random.default_rng(seed)
    labels = np.arange(num) % 6
    images = generator.integers(0, 60, (num, 1, 6, 6))
    images[np.arange(num), 0, labels] += 150
    return LabelledImages(images, labels, 256)


@pytest.fixture
def whole():
    return part(240, 0), part(60, 1), part(60, 2)


def test_images_of_the_first_digits(whole):
    pixels, labels = vmonf_mnist.of_digits(whole[0], 5)
    assert pixels.shape == (200, 36)
    assert labels.max() == 4
    np.testing.assert_allclose(pixels[0].reshape(6, 6)[0], whole[0].images[0, 0, 0] / 255.0)


def test_the_density_of_pixels_is_a_normal_one_where_the_mixture_is():
    generator = np.random.default_rng(0)
    factor = generator.standard_normal((6, 6)) * [3.0, 2.0, 1.0, 0.1, 0.1, 0.1]
    train, other = (generator.standard_normal((n, 6)) @ factor.T for n in (400, 100))
    pca = PCA(4).fit(train)
    centered = train - train.mean(0)
    axes = np.linalg.svd(centered, full_matrices=False)[2][:2]
    within = np.cov(centered @ axes.T, rowvar=False, bias=True)
    inside = axes.T @ axes
    left = np.trace((np.eye(6) - inside) @ np.cov(centered, rowvar=False, bias=True)) / 4
    covariance = axes.T @ within @ axes + left * (np.eye(6) - inside)
    truth = -multivariate_normal(train.mean(0), covariance).logpdf(other).mean()
    assert vmonf_mnist.pixel_nll(pca, 2, train, other, 1, 0) == pytest.approx(truth, abs=1e-3)


def test_features_know_no_label_of_the_test(whole, monkeypatch):
    monkeypatch.setattr(vmonf_mnist, "COLUMNS", (4, 8))
    task = vmonf_mnist.Task(whole, 6, 5, 0)
    assert task.columns == min(task.tried, key=task.tried.get)
    assert task.z.shape == (240, task.columns)
    shown = task.labels >= 0
    assert np.bincount(task.labels[shown]).tolist() == [5] * 6
    assert (task.labels[shown] == task.y[shown]).all()
    wrong = LabelledImages(whole[2].images, whole[2].labels[::-1].copy(), 256)
    other = vmonf_mnist.Task((*whole[:2], wrong), 6, 5, 0)
    np.testing.assert_array_equal(task.test_z, other.test_z)


def test_labels_name_the_classes(whole, monkeypatch):
    monkeypatch.setattr(vmonf_mnist, "COLUMNS", (4,))
    with_labels, without = (vmonf_mnist.Task(whole, 6, each, 0) for each in (5, 0))
    turned = (with_labels.test_y + 1) % 6
    assert with_labels.scores(turned) == {"accuracy": 0.0, "nmi": pytest.approx(1.0)}
    assert without.scores(turned)["accuracy"] == 1.0


def test_logits_keep_the_levels():
    levels = np.arange(256)[None]
    found = vmonf_mnist.logits(levels / 255.0, np.random.default_rng(0))
    share = (expit(found) - vmonf_mnist.LOGIT_MARGIN) / (1.0 - 2.0 * vmonf_mnist.LOGIT_MARGIN)
    assert (np.floor(256.0 * share) == levels).all()


@pytest.mark.parametrize("labels", [0, 5])
def test_a_run_of_all_methods(labels, whole, monkeypatch):
    quick = {"flow": "gaussian", "init": "kmeans", "max_iter": 60}
    for name in ("OPTIONS", "WIDER"):
        monkeypatch.setattr(vmonf_mnist, name, quick)
    monkeypatch.setattr(vmonf_mnist, "COLUMNS", (5,))
    monkeypatch.setattr(vmonf_mnist, "parts_of", lambda folder, seed: whole)
    options = argparse.Namespace(data=Path(), published_steps=2, batch=16, device="cpu")
    keys = [key for key in vmonf_mnist.keys([0], [0]) if (key["digits"], key["labels"]) == (5, labels)]
    rows = [{**key, **vmonf_mnist.run(key, options)} for key in keys]
    assert len(rows) == (3 if labels else 5)
    found = {one["method"]: one for row in rows for one in row["rows"]}
    assert found["FlowMixture"]["accuracy"] > 0.95
    assert found["FlowMixture"]["nmi"] > 0.9
    assert found["FlowMixture, half of its start held"]["accuracy"] > 0.95
    peer = "LabelSpreading, alpha 0.2" if labels else "KMeans"
    assert found[peer]["accuracy"] > 0.95
    if not labels:
        assert found["VMoNF, amortised, by p"]["nll"] > found["GaussianMixture"]["nll"]
        assert found["VMoNF, amortised, of pixels, by p"]["nll"] is None
    text = table([{**row, "seed": 0} for row in rows])
    assert f"| 0 to 4 | {labels or 'none'} | {peer} |" in text


def test_differences_are_those_of_like_seeds():
    def row(seed, method, accuracy, nmi):
        one = {"method": method, "accuracy": accuracy, "nmi": nmi, "nll": None}
        return {"digits": 10, "labels": 5, "seed": seed, "rows": [one]}

    rows = [row(s, "FlowMixture", 0.9 + 0.01 * s, 0.8) for s in (0, 1)]
    rows += [row(s, "KMeans", 0.9 - 0.03 * s, 0.7) for s in (1, 0)]
    text = table(rows)
    assert "| 0 to 9 | 5 | KMeans | +0.020 (1 of 2 above 0) | +0.100 (2 of 2 above 0) | – | – |" in text
    assert "| 0 to 9 | 5 | FlowMixture | 2 | 0.905 (0.900 to 0.910) | 0.800 | – | – |" in text
    assert table([{**rows[0], "error": "stopped"}]) == ""
