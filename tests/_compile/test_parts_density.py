"""Densities of data in parts by graphs: the whole, and an estimate from one part."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowvi._compile.parts_density import MinibatchDensity, WholeDensity
from pyro_flowvi._program.data_in_parts import in_rows, row_plate
from pyro_flowvi._program.log_density import UnconstrainedModel

N = 60
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, 2, generator=GENERATOR, dtype=torch.float64)
COINS = torch.rand(N, generator=GENERATOR, dtype=torch.float64).round()


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


def model(count=10):
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("columns", 2):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", N, subsample_size=count) as rows:
        pyro.sample("y", dist.Bernoulli(logits=b + w @ X[rows].T), obs=COINS[rows])


def one_at_a_time(count=10):
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", N, subsample_size=count) as rows:
        pyro.sample("y", dist.Bernoulli(logits=b + X[rows] @ w), obs=COINS[rows])


@pytest.fixture(params=[model, one_at_a_time], ids=["together", "one at a time"])
def both(request):
    """The parts of ten rows, and the density of all rows."""
    program = request.param
    parts = in_rows(UnconstrainedModel(program), program, row_plate(program, (), {}), 10, range(N))
    return parts, UnconstrainedModel(program, (None,))


@pytest.mark.parametrize("size", [1, 5, 70])
def test_the_whole(both, size):
    parts, full = both
    z = torch.randn(size, 3)
    for found, expected in zip(WholeDensity(parts)(z), full.value_and_grad(z), strict=True):
        torch.testing.assert_close(found, expected)


def test_an_epoch_of_estimates_is_the_whole(both):
    parts, full = both
    center, z = torch.tensor([0.1, -0.2, 0.3]), torch.randn(4, 3)
    density = MinibatchDensity(parts, WholeDensity(parts), center, 4)
    estimates = [density.exactly(z) for _ in range(6)]
    expected = full.value_and_grad(z)
    for i in (0, 1):
        torch.testing.assert_close(torch.stack([pair[i] for pair in estimates]).mean(0), expected[i])
    assert not torch.allclose(estimates[0][0], estimates[1][0])


def test_no_noise_at_the_center(both):
    parts, full = both
    center = torch.tensor([0.1, -0.2, 0.3])
    density = MinibatchDensity(parts, WholeDensity(parts), center, 1)
    for _ in range(3):
        for found, expected in zip(
            density.exactly(center[None]), full.value_and_grad(center[None]), strict=True
        ):
            torch.testing.assert_close(found, expected)


def test_goes_on_where_it_was(both):
    parts, _ = both
    z = torch.randn(2, 3)
    one, other = (MinibatchDensity(parts, WholeDensity(parts), torch.full((3,), 0.1 * k), 2) for k in (1, 2))
    for _ in range(8):
        one.exactly(z)
    other.load(one.state())
    torch.testing.assert_close(other.exactly(z), one.exactly(z))
    one.repeat()
    torch.testing.assert_close(other.exactly(z)[0].shape, one.exactly(z)[0].shape)
