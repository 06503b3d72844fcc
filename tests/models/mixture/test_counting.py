"""The number of components of a FlowMixture, against how many clusters were drawn."""

import numpy as np
import pytest

from pyro_flowvi.datasets import pinwheel, two_circles, two_moons
from pyro_flowvi.models import FlowMixture
from tests.models.mixture.matching import accuracy


def grid(num, distance, seed, dim=2, size=200):
    """Normals on a lattice of two columns, and in further dimensions around zero."""
    centers = np.zeros((num, dim))
    centers[:, :2] = distance * np.array([[k // 2, k % 2] for k in range(num)])
    y = np.repeat(np.arange(num), size)
    return centers[y] + np.random.default_rng(seed).standard_normal((len(y), dim)), y


@pytest.mark.parametrize(
    ("num", "dim"), [(2, 1), *(pytest.param(*each, marks=pytest.mark.long) for each in [(1, 2), (4, 2)])]
)
def test_normals(num, dim):
    x, y = grid(num, 6.0, 0, max(dim, 2))
    x = x if dim > 1 else x[:, 1:]
    mixture = FlowMixture("auto", max_iter=150 if num > 2 else 60, random_state=0).fit(x)
    assert mixture.n_components_ == num == len(mixture.weights_)
    assert accuracy(y, mixture.predict(x)) > 0.98
    assert list(mixture.counting_) == list(range(1, len(mixture.counting_) + 1))
    assert len(mixture.counting_) <= num + 3
    assert f"components: {num}, the best of 1 to {len(mixture.counting_)}" in str(mixture.summary())


def test_never_fewer_than_classes():
    x, y = grid(2, 6.0, 0, size=60)
    assert FlowMixture("auto", max_iter=50, random_state=0).fit(x, y % 2).n_components_ == 2
    few = FlowMixture("auto", max_iter=20, random_state=0).fit(x[::6], y[::6])
    assert (few.n_components_, few.counting_) == (2, {})


def test_warm_start_keeps_the_number():
    x, _ = grid(2, 8.0, 0)
    mixture = FlowMixture("auto", flow="gaussian", max_iter=30, warm_start=True, random_state=0).fit(x)
    assert mixture.n_components_ == mixture.fit(x[:200]).n_components_ == 2
    assert mixture.partial_fit(x[200:]).n_components_ == 2


def test_what_is_no_number():
    with pytest.raises(ValueError, match="n_components: expected a positive integer, got 'many'"):
        FlowMixture("many").fit(np.random.randn(60, 2))


DATA = {
    "three wings": (3, lambda seed: pinwheel(512, 3, seed=seed)),
    "five wings": (5, lambda seed: pinwheel(512, 5, seed=seed)),
    "eight wings": (8, lambda seed: pinwheel(512, 8, seed=seed)),
    "two circles": (2, lambda seed: two_circles(512, seed=seed)),
    "two moons": (2, lambda seed: two_moons(600, noise=0.1, seed=seed)),
    "six normals": (6, lambda seed: grid(6, 4.5, seed)),
    "six normals in ten columns": (6, lambda seed: grid(6, 6.0, seed, 10)),
    "one normal": (1, lambda seed: grid(1, 0.0, seed, size=1000)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("seed", range(5))
def test_clusters(name, seed):
    num, draw = DATA[name]
    x, y = draw(seed)
    mixture = FlowMixture("auto", random_state=seed).fit(x)
    assert mixture.n_components_ == num
    if name != "two moons":  # which flows of two components do not keep apart where they touch
        assert accuracy(y, mixture.predict(x)) > 0.94
