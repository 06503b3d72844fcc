"""What benchmarks of clusterings share, against brute force and data whose parts are known."""

from itertools import permutations

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.decomposition import PCA

from benchmarks.common.clusterings import component_images, gaussian_from, matched_accuracy, peers, spreadings
from pyro_flowvi.models import FlowMixture


def blobs(num=80, distance=8.0, seed=0):
    y = np.repeat([0, 1], num)
    return distance * y[:, None] + np.random.default_rng(seed).standard_normal((2 * num, 2)), y


def test_accuracy_is_that_of_the_best_matching():
    generator = np.random.default_rng(0)
    y, clusters = generator.integers(0, 4, 50), generator.integers(0, 4, 50)
    best = max((np.array(order)[clusters] == y).mean() for order in permutations(range(4)))
    assert matched_accuracy(y, clusters) == pytest.approx(best)
    assert matched_accuracy(np.array([0, 0, 1]), np.array([2, 2, 0])) == 1.0


def test_clusters_beyond_the_classes_are_wrong():
    assert matched_accuracy(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 2])) == 0.75


def test_em_starts_from_the_partition():
    """The components keep the order of its parts."""
    z, y = blobs()
    for parts in (y, 1 - y):
        assert (gaussian_from(z, parts, 2, 0).predict(z) == parts).all()


def test_peers_find_what_is_far_apart():
    z, y = blobs()
    for name, peer in peers(2, 0).items():
        assert matched_accuracy(y, peer.fit(z).predict(z)) == 1.0, name
    labels = np.where(np.arange(len(y)) % 40 == 0, y, -1)
    found = spreadings()
    assert [each.alpha for each in found.values()] == [0.2, 0.99]
    for spreading in found.values():
        assert (spreading.fit(z, labels).predict(z) == y).all()


def test_images_are_those_of_each_component():
    generator = np.random.default_rng(0)
    patterns = np.eye(16)[[0, 5, 10, 15]].reshape(2, 2, 16).sum(1) * 0.6 + 0.2
    y = np.repeat([0, 1], 60)
    pixels = patterns[y] + 0.02 * generator.standard_normal((120, 16))
    pca = PCA(3, random_state=0).fit(pixels)
    flows = FlowMixture(2, flow="gaussian", init="kmeans", random_state=0).fit(pca.transform(pixels), y)
    images = component_images(flows, pca, 50, 4)
    assert images.shape == (100, 4, 4)
    for label in (0, 1):
        mean = images[50 * label : 50 * (label + 1)].mean(0)
        np.testing.assert_allclose(mean.ravel(), patterns[label], atol=0.03)
