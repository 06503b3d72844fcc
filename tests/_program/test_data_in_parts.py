"""Data a part at a time: the parts' mean is the density of all rows."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.utils.data import DataLoader, TensorDataset

from pyro_flowvi._program.call import as_call
from pyro_flowvi._program.data_in_parts import in_batches, in_rows, row_plate
from pyro_flowvi._program.log_density import UnconstrainedModel
from pyro_flowvi._ranks import ALONE

N, B = 23, 5
GENERATOR = torch.Generator().manual_seed(0)
X, Y, POINTS = (
    torch.randn(shape, generator=GENERATOR, dtype=torch.float64) for shape in ((N, 2), (N,), (3, 3))
)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


def coefficients():
    w = pyro.sample("w", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    return w, pyro.sample("sd", dist.LogNormal(0.0, 1.0))


def observe(w, sd, x, y):
    pyro.sample("y", dist.Normal(x @ w, sd), obs=y)


def full():
    w, sd = coefficients()
    with pyro.plate("rows", N):
        observe(w, sd, X, Y)


def by_plate():
    w, sd = coefficients()
    with pyro.plate("rows", N, subsample_size=B) as rows:
        observe(w, sd, X[rows], Y[rows])


def of_a_fixed_size():
    w, sd = coefficients()
    with pyro.plate("rows", N, subsample_size=B) as rows:
        observe(w, sd, X[rows].reshape(B, 2), Y[rows])


def by_index(rows):
    w, sd = coefficients()
    with pyro.plate("rows", N, subsample=rows) as shown:
        observe(w, sd, X[shown], Y[shown])


def by_scale(x, y):
    w, sd = coefficients()
    with pyro.plate("rows", len(y)), poutine.scale(scale=N / len(y)):
        observe(w, sd, x, y)


def by_size(x, y):
    w, sd = coefficients()
    with pyro.plate("rows", N, subsample_size=len(y)):
        observe(w, sd, x, y)


def whole(parts):
    total = 0.0
    for part, share in enumerate(parts.shares):
        total = total + share * parts.densities[parts.put(part)].log_density(POINTS)
    return total


def assert_whole(parts):
    torch.testing.assert_close(whole(parts), UnconstrainedModel(full).log_density(POINTS))
    parts.order(3)
    torch.testing.assert_close(whole(parts), UnconstrainedModel(full).log_density(POINTS))


@pytest.mark.parametrize(
    ("model", "size", "number"),
    [(by_plate, 8, 3), (by_plate, 100, 1), (by_plate, 2, 5), (of_a_fixed_size, 8, 5)],
)
def test_rows_of_a_plate(model, size, number):
    parts = in_rows(UnconstrainedModel(model), model, row_plate(model, (), {}), size, range(N))
    assert len(parts) == number
    assert_whole(parts)


def test_epochs_have_other_parts():
    parts = in_rows(UnconstrainedModel(by_plate), by_plate, row_plate(by_plate, (), {}), 8, range(N))

    def first(epoch):
        parts.order(epoch)
        return parts.densities[parts.put(0)].log_density(POINTS[0]).item()

    assert first(1) != first(2)
    assert first(1) == first(1)


LISTS = {
    "index": (by_index, [(rows,) for rows in torch.arange(N).split(B)]),
    "scale": (by_scale, list(zip(X.split(B), Y.split(B), strict=True))),
    "size": (by_size, [{"x": x, "y": y} for x, y in zip(X.split(B), Y.split(B), strict=True)]),
    "loader": (by_scale, DataLoader(TensorDataset(X, Y), B, shuffle=True)),
}


@pytest.mark.parametrize("name", LISTS)
def test_batches_of_an_epoch(name):
    model, batches = LISTS[name]
    args, kwargs = as_call(next(iter(batches)))
    parts = in_batches(UnconstrainedModel(model, args, kwargs), model, batches, as_call)
    parts.divide(ALONE)
    assert len(parts) == 5
    assert_whole(parts)


class Noisy:
    """Another epoch has other data."""

    def __len__(self):
        return 2

    def __iter__(self):
        return iter([(X[:B], torch.randn(B)), (X[B : 2 * B], torch.randn(B))])


@pytest.mark.parametrize(
    "batches",
    [Noisy(), lambda step: (X, Y), (pair for pair in [(X, Y)])],
    ids=["augmented", "callable", "generator"],
)
def test_batches_without_an_epoch(batches):
    assert in_batches(UnconstrainedModel(by_scale, (X, Y)), by_scale, batches, as_call) is None


def test_a_plate_that_draws_rows_beside_the_batches():
    def model(x):
        w, sd = coefficients()
        with pyro.plate("rows", N, subsample_size=len(x)) as rows:
            observe(w, sd, x, Y[rows])

    batches = [(x,) for x in X[:20].split(B)]
    assert in_batches(UnconstrainedModel(model, batches[0]), model, batches, as_call) is None


def two_plates():
    w, sd = coefficients()
    with pyro.plate("rows", N, subsample_size=B) as rows:
        observe(w, sd, X[rows], Y[rows])
    with pyro.plate("others", 9, subsample_size=3):
        pyro.sample("z", dist.Normal(w[0], 1.0), obs=torch.zeros(3))


def a_loop():
    w, sd = coefficients()
    for i in pyro.plate("rows", N, subsample_size=B):
        pyro.sample(f"y_{i}", dist.Normal(X[i] @ w, sd), obs=Y[i])


def locals_under_it():
    with pyro.plate("rows", N, subsample_size=B) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y[rows])


@pytest.mark.parametrize("model", [full, two_plates, a_loop, locals_under_it])
def test_what_is_no_plate_of_rows(model):
    assert row_plate(model, (), {}) is None


def test_rows_that_the_model_says():
    assert row_plate(by_index, (torch.arange(B),), {}) is None
