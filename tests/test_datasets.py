"""The energies against quadrature and a second formula; the two moons."""

import math
import pickle

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from scipy.special import roots_legendre

from pyro_flowvi import AutoPlanar
from pyro_flowvi.datasets import ENERGIES, ENERGY_BOX, two_moons

EACH = pytest.mark.parametrize("name", list(ENERGIES))


def table_1(name, z1, z2):
    """U as Rezende and Mohamed's table 1 prints it, in NumPy."""
    w1 = np.sin(2 * np.pi * z1 / 4)
    w2 = 3 * np.exp(-0.5 * ((z1 - 1) / 0.6) ** 2)
    w3 = 3 / (1 + np.exp(-(z1 - 1) / 0.3))
    if name == "U1":
        ring = 0.5 * ((np.sqrt(z1**2 + z2**2) - 2) / 0.4) ** 2
        return ring - np.log(np.exp(-0.5 * ((z1 - 2) / 0.6) ** 2) + np.exp(-0.5 * ((z1 + 2) / 0.6) ** 2))
    if name == "U2":
        return 0.5 * ((z2 - w1) / 0.4) ** 2
    low, scale = (w2, 0.35) if name == "U3" else (w3, 0.4)
    return -np.log(np.exp(-0.5 * ((z2 - w1) / scale) ** 2) + np.exp(-0.5 * ((z2 - w1 + low) / 0.35) ** 2))


@EACH
def test_formula(name):
    z = np.random.default_rng(0).uniform((-4, -3), (4, 3), (1000, 2))
    expected = table_1(name, *z.T)
    np.testing.assert_allclose(ENERGIES[name](torch.as_tensor(z)).numpy(), expected, rtol=1e-9, atol=1e-9)


@EACH
def test_log_normalizer(name):
    """By Gauss and Legendre's rule on panels: z1 in the box, z2 as far as the density is not zero."""
    node, weight = roots_legendre(20)

    def rule(low, high, panels):
        edges = np.linspace(low, high, panels + 1)
        half = np.diff(edges)[:, None] / 2
        return (edges[:-1, None] + half * (1 + node)).ravel(), (half * weight).ravel()

    x, x_weight = rule(*ENERGY_BOX, 40)
    y, y_weight = rule(-10, 10, 100)
    z = torch.as_tensor(np.stack(np.meshgrid(x, y, indexing="ij"), -1))
    total = x_weight @ np.exp(-ENERGIES[name](z).numpy()) @ y_weight
    assert ENERGIES[name].log_normalizer == pytest.approx(math.log(total), abs=1e-5)


@EACH
def test_shapes_and_gradients(name):
    energy = ENERGIES[name]
    assert energy.name == name
    for shape in ((), (0,), (3,), (2, 1, 3)):
        assert energy(torch.zeros(*shape, 2)).shape == shape
    z = torch.tensor([[0.0, 0.0], [4.0, 30.0], [-4.0, -30.0]], requires_grad=True)
    energy(z).sum().backward()
    assert z.grad.isfinite().all()


@EACH
@pytest.mark.parametrize("weight", [1.0, torch.tensor(0.3)])
def test_the_model_has_the_log_density_minus_u(name, weight):
    generator = torch.Generator().manual_seed(0)
    z = 8.0 * torch.rand(7, 2, generator=generator) - 4.0
    values = {"z1": z[:, 0], "z2": z[:, 1]}
    trace = poutine.trace(poutine.condition(ENERGIES[name].model, values)).get_trace(weight)
    log_prob = sum(
        site["fn"].log_prob(site["value"]) for site in trace.nodes.values() if site["type"] == "sample"
    )
    torch.testing.assert_close(log_prob, -weight * ENERGIES[name](z))
    for site in ("z1", "z2"):
        assert trace.nodes[site]["fn"].support.check(z).all()
    assert not trace.nodes["z1"]["fn"].support.check(torch.tensor(4.1))


@EACH
def test_kl_is_minus_elbo_and_log_z(name):
    """With vectorised particles, from one seed: the ELBO against the mean of the draws themselves."""
    energy = ENERGIES[name]
    guide = AutoPlanar(energy.model, num_layers=2, init_scale=1.0).materialize()
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=0)
    torch.manual_seed(1)
    minus_elbo = elbo.loss(energy.model, guide)
    torch.manual_seed(1)
    draws = guide.sample_posterior(50)
    log_q = guide.log_prob(draws)
    cost = log_q + energy(torch.stack([draws["z1"], draws["z2"]], -1))
    kl = cost.mean().item() + energy.log_normalizer
    assert minus_elbo + energy.log_normalizer == pytest.approx(kl, rel=1e-6)


def test_energies_are_pickled():
    energy = pickle.loads(pickle.dumps(ENERGIES["U1"]))
    assert energy == ENERGIES["U1"]


class TestTwoMoons:
    def test_on_the_circles_without_noise(self):
        points, labels = two_moons(101, noise=0.0)
        centre = np.where(labels[:, None] == 0, (0.0, 0.0), (1.0, 0.5))
        np.testing.assert_allclose(np.linalg.norm(points - centre, axis=1), 1.0)
        assert np.bincount(labels).tolist() == [50, 51]
        assert (points[labels == 0, 1] >= 0).all()
        assert (points[labels == 1, 1] <= 0.5 + 1e-12).all()

    def test_seed_and_noise(self):
        (first, _), (again, _), (other, _) = (two_moons(2000, 0.1, seed) for seed in (1, 1, 2))
        assert (first == again).all()
        assert (first != other).any()
        spread = (first - two_moons(2000, 0.0)[0]).std()
        assert spread == pytest.approx(0.1, rel=0.05)

    @pytest.mark.parametrize(("num", "noise"), [(0, 0.1), (2.5, 0.1), (10, -1.0), (10, math.nan)])
    def test_bad_arguments(self, num, noise):
        with pytest.raises(ValueError, match="expected"):
            two_moons(num, noise)
