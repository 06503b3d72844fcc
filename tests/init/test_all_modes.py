"""The number of modes of log densities of which it is known, and their masses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowvi._compile.log_density import traced
from pyro_flowvi._program.log_density import UnconstrainedModel
from pyro_flowvi.init import find_all_modes, find_modes
from pyro_flowvi.init._bent_paths import connected
from pyro_flowvi.init.gaussians import Gaussian


def search(program, *args):
    density = UnconstrainedModel(program, args)
    return find_all_modes(traced(density), density.start, prior=density.prior_draws(32))


def vector(dim, log_density):
    def model():
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (dim,)))
        pyro.factor("density", log_density(z))

    return model


def normals(locs, scales, shares):
    locs, scales, shares = locs.double(), scales.double(), shares.double()
    parts = dist.Normal(locs, scales.unsqueeze(-1)).to_event(1)
    mixture = dist.MixtureSameFamily(dist.Categorical(shares), parts, validate_args=False)
    return vector(locs.shape[-1], mixture.log_prob)


def lattice(num):
    axis = 6.0 * torch.arange(float(num))
    return torch.cartesian_prod(axis, axis) - 7.0


def on_axes(dim, *places):
    locs = torch.zeros(len(places), dim)
    for row, (axis, at) in zip(locs, places, strict=True):
        row[axis] = at
    return locs


MIXTURES = {
    "sixteen": (lattice(4), torch.full((16,), 0.8), 1.0 + torch.arange(16.0) / 5.0),
    "narrow and wide": (
        torch.tensor([[-4.0, 0.0], [4.0, 0.0]]),
        torch.tensor([0.05, 1.5]),
        torch.tensor([2.0, 3.0]),
    ),
    "ten dimensions": (on_axes(10, (0, -4.0), (0, 4.0)), torch.tensor([1.0, 1.0]), torch.tensor([3.0, 7.0])),
    "twenty dimensions": (
        on_axes(20, (0, 8.0), (3, -8.0), (7, 10.0)),
        torch.tensor([1.0, 0.7, 1.3]),
        torch.tensor([2.0, 5.0, 3.0]),
    ),
    "far": (torch.tensor([[0.0, 0.0], [30.0, -40.0]]), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_number_and_masses(name):
    locs, scales, shares = (value.double() for value in MIXTURES[name])
    found = search(normals(locs, scales, shares))
    order = torch.cdist(locs, found.gaussian.loc).argmin(-1)
    assert found.found == len(locs) == len(order.unique())
    torch.testing.assert_close(found.gaussian.loc[order], locs, atol=0.05, rtol=0.0)
    torch.testing.assert_close(found.weights[order], shares / shares.sum(), rtol=0.03, atol=0.0)
    assert found.weights.sum() == pytest.approx(1.0)
    assert found.weights.tolist() == sorted(found.weights.tolist(), reverse=True)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_given_number_has_the_same_modes(name):
    locs, scales, shares = (value.double() for value in MIXTURES[name])
    density = UnconstrainedModel(normals(locs, scales, shares))
    found = find_modes(traced(density), density.start, len(locs))
    assert found.found == len(locs)
    order = torch.cdist(locs, found.gaussian.loc).argmin(-1)
    torch.testing.assert_close(found.weights[order], shares / shares.sum(), rtol=0.03, atol=0.0)


def log_banana(z):
    u, v = z.unbind(-1)
    return dist.Normal(0.0, 2.0).log_prob(u) + dist.Normal(0.5 * u**2, 0.3).log_prob(v)


def ripple(z, size):
    return size * (3.0 * z[..., 0]).cos()


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Normal(0.0, (0.5 * v).exp()))


def schools():
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
        sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


ONE_MODE = {
    "normal": vector(3, lambda z: -0.5 * (z - 40.0).square().sum(-1) / 25.0),
    "banana": vector(2, log_banana),
    "funnel": funnel,
    "eight schools, centred": schools,
    "heavy tails": vector(3, lambda z: -2.0 * (z.square() / 3.0).log1p().sum(-1)),
    "rippled": vector(2, lambda z: -0.05 * z.square().sum(-1) + ripple(z, 0.4)),
    "rippled banana": vector(2, lambda z: log_banana(z) + ripple(z, 0.4)),
    "ring": vector(
        2,
        lambda z: (
            -2.0 * (z.norm(dim=-1) - 4.0).square() + 0.3 * (3.0 * torch.atan2(z[..., 1], z[..., 0])).cos()
        ),
    ),
    "two that share their mass": normals(
        torch.tensor([[-1.25, 0.0], [1.25, 0.0]]), torch.ones(2), torch.ones(2)
    ),
}


@pytest.mark.parametrize("name", ONE_MODE)
def test_one_mode_is_one(name):
    found = search(ONE_MODE[name])
    assert found.found == len(found.weights) == len(found.gaussian.loc) == 1


def test_noise_is_several_modes_to_a_given_number():
    """Of what :func:`find_modes` takes for modes, some are one."""
    density = UnconstrainedModel(ONE_MODE["rippled"])
    assert find_modes(traced(density), density.start, 4).found > 1


def test_two_modes_of_a_ripple_each():
    def log_density(z):
        return torch.logaddexp(-0.5 * (z[..., 0] - 9.0) ** 2, -0.125 * (z[..., 0] + 9.0) ** 2) + ripple(
            z, 0.4
        )

    found = search(vector(1, log_density))
    grid = torch.linspace(-40.0, 40.0, 100_001).unsqueeze(-1)
    share = float(log_density(grid).softmax(0)[grid[:, 0] > 0].sum())
    assert found.found == 2
    right = found.weights[found.gaussian.loc[:, 0] > 0]
    assert float(right) == pytest.approx(share, rel=0.1)


def test_what_has_no_mass_is_left_out():
    locs, shares = torch.tensor([[-8.0], [0.0], [8.0]]), torch.tensor([0.499, 0.5, 0.001])
    assert search(normals(locs, torch.ones(3), shares)).found == 2


def test_no_more_than_the_heaviest(monkeypatch):
    monkeypatch.setattr("pyro_flowvi.init._all_modes.MAX_COMPONENTS", 3)
    locs, scales, shares = (value.double() for value in MIXTURES["sixteen"])
    found = search(normals(locs, scales, shares))
    torch.testing.assert_close(found.weights, shares[-3:].flip(0) / shares[-3:].sum(), rtol=0.03, atol=0.0)


def test_many_latents_have_one_gaussian():
    found = search(lambda: pyro.sample("x", dist.Normal(torch.full((201,), 3.0), 2.0).to_event(1)))
    assert (found.found, found.gaussian.loc.shape) == (1, (1, 201))


def test_effort_is_bounded():
    """A density of waves without end: the search gives up."""
    calls = []

    def waves(z):
        calls.append(len(z))
        return z.cos().sum(-1) * 5.0, -5.0 * z.sin()

    found = find_all_modes(waves, torch.zeros(2))
    assert found.found <= 32
    assert sum(calls) < 3_000_000


@pytest.mark.parametrize(("depth", "groups"), [(0.9, [[0, 1]]), (1.1, [[0], [1]])])
def test_the_dip_decides(depth, groups):
    """Along a half circle, where the straight line is far outside of it."""

    def density(z):
        angle = torch.atan2(z[..., 1], z[..., 0])
        return -50.0 * (z.norm(dim=-1) - 2.0).square() + 0.5 * depth * (4.0 * angle).cos()

    def value_and_grad(z):
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            value = density(z)
            return value.detach(), torch.autograd.grad(value.sum(), z)[0]

    at = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    peaked = Gaussian(at, 0.1 * torch.eye(2).expand(2, 2, 2), ("modes",) * 2)
    assert math.isclose(float(density(at)[0] - density(torch.tensor([2**0.5] * 2))), depth, abs_tol=1e-6)
    assert connected(value_and_grad, peaked) == groups
