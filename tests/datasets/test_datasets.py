"""Energies and densities against quadrature and a second formula; what is drawn against its law."""

import math
import pickle
from importlib.resources import files

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from scipy.special import logsumexp, roots_legendre

from pyro_flowvi import AutoPlanar
from pyro_flowvi.datasets import (
    ENERGIES,
    ENERGY_BOX,
    NINE_MODES,
    NormalLattice,
    hide_labels,
    mauna_loa_co2,
    minnesota_radon,
    nine_modes,
    pinwheel,
    pinwheel_log_prob,
    two_circles,
    two_circles_log_prob,
    two_moons,
)

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


def integral(log_prob, reach, step):
    """Of a density over a box, by the midpoint rule."""
    grid = np.arange(-reach, reach, step) + step / 2
    strips = (np.stack(np.meshgrid(part, grid), -1) for part in np.array_split(grid, 20))
    return sum(np.exp(log_prob(strip)).sum((0, 1)) for strip in strips) * step**2


class TestPinwheel:
    def test_the_generator_of_the_paper(self):
        """Row vectors times rotation matrices, ten times and then a twentieth, as the paper's code has it."""
        noise = np.random.default_rng(3).standard_normal((60, 2))
        features = noise * [0.3, 0.05] + [1.0, 0.0]
        expected = []
        for label, feature in zip(np.repeat(np.arange(3), 20), features, strict=True):
            angle = 2 * np.pi * label / 3 + 0.25 * np.exp(feature[0])
            rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            expected.append(10 * feature @ rotation / 20)
        points, labels = pinwheel(20, 3, seed=3)
        np.testing.assert_allclose(points, expected)
        assert labels.tolist() == [0] * 20 + [1] * 20 + [2] * 20

    @pytest.mark.parametrize("bend", [{}, {"num_classes": 3, "tangential_std": 0.3, "rate": 0.5}])
    def test_the_density_has_mass_one(self, bend):
        """The second pinwheel folds over itself within its bulk: the folds are integrable singularities."""
        mass = integral(lambda x: pinwheel_log_prob(x, **bend, per_class=True), 1.8, 0.025)
        np.testing.assert_allclose(mass, 1.0, atol=2e-2 if bend else 1e-4)

    def test_the_density_by_change_of_variables(self):
        """Where the map is one to one: the normal density of f over a numerical Jacobian determinant."""
        noise = np.random.default_rng(0).uniform(-2, 2, (50, 2))

        def wing(n):
            first, second = 1 + 0.3 * n[..., 0], 0.05 * n[..., 1]
            angle = 2 * np.pi * 2 / 5 + 0.25 * np.exp(first)
            turned = (first + 1j * second) * np.exp(-1j * angle) / 2
            return np.stack([turned.real, turned.imag], -1)

        step = 1e-6
        columns = [(wing(noise + step * e) - wing(noise - step * e)) / (2 * step) for e in np.eye(2)]
        log_det = np.log(np.abs(np.linalg.det(np.stack(columns, -1))))
        expected = -0.5 * (noise**2).sum(-1) - np.log(2 * np.pi) - log_det
        got = pinwheel_log_prob(wing(noise), per_class=True)
        np.testing.assert_allclose(got[:, 2], expected, atol=1e-6)
        np.testing.assert_allclose(pinwheel_log_prob(wing(noise)), logsumexp(got, -1) - np.log(5))

    def test_figures_of_the_best_possible_model(self):
        points, labels = pinwheel(4000, seed=1)
        per_class = pinwheel_log_prob(points, per_class=True)
        assert (per_class.argmax(-1) == labels).mean() == pytest.approx(0.999, abs=1e-3)
        assert -pinwheel_log_prob(points).mean() == pytest.approx(-1.1413, abs=0.02)

    def test_shapes(self):
        assert pinwheel_log_prob(np.zeros((0, 2))).shape == (0,)
        assert pinwheel_log_prob(np.zeros((2, 3, 2)), 4, per_class=True).shape == (2, 3, 4)
        assert pinwheel_log_prob(torch.zeros(2)).shape == ()


class TestTwoCircles:
    def test_radii_and_noise(self):
        points, labels = two_circles(20_000, noise=0.02)
        for label, radius in enumerate((0.4, 0.8)):
            distance = np.linalg.norm(points[labels == label], axis=1)
            assert distance.mean() == pytest.approx(radius, abs=1e-3)
            assert distance.std() == pytest.approx(0.02, rel=0.03)
            assert abs(points[labels == label].mean(0)).max() < 0.02

    @pytest.mark.parametrize("noise", [0.05, 0.3])
    def test_the_density_has_mass_one(self, noise):
        mass = integral(lambda x: two_circles_log_prob(x, noise=noise, per_class=True), 3.0, 0.02)
        np.testing.assert_allclose(mass, 1.0, atol=1e-6)

    def test_the_density_by_averaging_over_angles(self):
        x = np.random.default_rng(0).normal(scale=0.6, size=(30, 2))
        angles = np.linspace(0, 2 * np.pi, 4000, endpoint=False)
        for column, radius in enumerate((0.4, 0.8)):
            means = radius * np.stack([np.cos(angles), np.sin(angles)], -1)
            squares = ((x[:, None] - means) ** 2).sum(-1) / (2 * 0.03**2)
            expected = logsumexp(-squares, -1) - np.log(4000) - np.log(2 * np.pi * 0.03**2)
            got = two_circles_log_prob(x, noise=0.03, per_class=True)[:, column]
            np.testing.assert_allclose(got, expected, atol=1e-9)

    def test_the_noise_is_a_deviation(self):
        """The reference figure of the best possible model, -1.9203, is reached with .005 as a deviation."""
        points, _ = two_circles(50_000, seed=1)
        assert -two_circles_log_prob(points).mean() == pytest.approx(-1.9183, abs=0.01)

    def test_far_away_and_at_the_centre(self):
        assert np.isfinite(two_circles_log_prob([[0.0, 0.0], [1e3, 0.0]])).all()


class TestNineModes:
    @pytest.mark.parametrize("lattice", [NINE_MODES, NormalLattice((-1.0, 1.0), sd=0.4)])
    def test_the_density_has_mass_one(self, lattice):
        mass = integral(lambda x: lattice.log_prob(torch.as_tensor(x)).numpy(), lattice.reach, 0.05)
        assert mass == pytest.approx(1.0, abs=1e-3)

    def test_draws(self):
        points, labels = nine_modes(2000, seed=1)
        means = np.array([points[labels == mode].mean(0) for mode in range(9)])
        np.testing.assert_allclose(means, NINE_MODES.locs.numpy(), atol=0.03)
        assert (points - NINE_MODES.locs.numpy()[labels]).std() == pytest.approx(0.25, rel=0.02)
        log_prob = NINE_MODES.log_prob(torch.as_tensor(points))
        entropy = math.log(9) + math.log(2 * math.pi * math.e * 0.25**2)
        assert log_prob.mean().item() == pytest.approx(-entropy, abs=0.02)
        nearest = NINE_MODES.component_log_prob(torch.as_tensor(points)).argmax(-1).numpy()
        assert (nearest == labels).mean() > 0.999

    def test_masses(self):
        points, _ = nine_modes(1000)
        masses = NINE_MODES.masses(torch.as_tensor(points))
        np.testing.assert_allclose(masses.numpy(), (1 - math.exp(-4.5)) / 9, atol=2e-3)
        assert NINE_MODES.masses(torch.tensor([[1.0, 1.0]])).sum() == 0


DRAWN = pytest.mark.parametrize("draw", [pinwheel, two_circles, nine_modes, two_moons])


@DRAWN
def test_the_seed_decides(draw):
    (first, labels), (again, _), (other, _) = (draw(20, seed=seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert first.dtype == np.float64
    assert labels.dtype == np.int64
    assert first.shape == (len(labels), 2)


@DRAWN
def test_no_point(draw):
    with pytest.raises(ValueError, match=r"num.*: expected a positive integer, got 0"):
        draw(0)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: pinwheel(10, 0), "num_classes"),
        (lambda: pinwheel(10, radial_std=-1.0), "radial_std"),
        (lambda: pinwheel_log_prob(np.zeros((3, 3))), "x"),
        (lambda: pinwheel_log_prob(np.zeros((3, 2)), tangential_std=0.0), "tangential_std"),
        (lambda: two_circles(10, radii=(0.4, -0.8)), "radii"),
        (lambda: two_circles(10, noise=-1.0), "noise"),
        (lambda: two_circles_log_prob(np.zeros((3, 2)), noise=0.0), "noise"),
        (lambda: two_circles_log_prob(1.0), "x"),
        (lambda: hide_labels(np.zeros(3), 1), "y"),
        (lambda: hide_labels(np.zeros((3, 1), int), 1), "y"),
        (lambda: hide_labels([0, 0, 1], 2), "num_per_class"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        call()


def test_hidden_labels():
    labels = np.repeat([0, 1, 5, -1], 30)
    hidden = hide_labels(labels, 4, seed=1)
    shown = hidden != -1
    assert (hidden[shown] == labels[shown]).all()
    assert np.bincount(hidden[shown]).tolist() == [4, 4, 0, 0, 0, 4]
    assert (hidden == hide_labels(labels, 4, seed=1)).all()
    assert (hidden != hide_labels(labels, 4, seed=2)).any()


def test_radon():
    """Facts that Gelman and Hill's chapter 12 and the case studies after it tell of these houses."""
    survey = minnesota_radon()
    assert len(survey.log_radon) == len(survey.floor) == len(survey.county) == 919
    assert len(survey.names) == len(set(survey.names)) == len(survey.log_uranium) == 85
    assert not {"Grant", "Red Lake"} & set(survey.names)
    assert list(survey.names) == sorted(survey.names, key=str.lower)
    houses = dict(zip(survey.names, np.bincount(survey.county).tolist(), strict=True))
    assert min(houses.values()) == 1
    expected = {"Lac qui Parle": 2, "Mahnomen": 1, "Hennepin": 105, "St. Louis": 116, "Ramsey": 32}
    assert {name: houses[name] for name in expected} == expected
    assert np.bincount(survey.floor).tolist() == [766, 153]
    activity = np.exp(survey.log_radon) - 0.1
    np.testing.assert_allclose(activity, activity.round(1), atol=1e-9)
    assert sorted(activity[survey.county == 0].round(1)) == [1.0, 2.2, 2.2, 2.9]
    assert activity.min() == pytest.approx(0.0, abs=1e-9)
    assert activity.max() == pytest.approx(48.2)
    # A public table of the survey has .658327 ppm of uranium in Ramsey.
    ramsey = survey.log_uranium[survey.names.index("Ramsey")]
    assert np.exp(ramsey) - 0.1 == pytest.approx(0.658327, abs=1e-6)


def test_the_notice_lies_beside_the_radon():
    notice = files("pyro_flowvi.datasets").joinpath("radon_mn.LICENSE.txt").read_text(encoding="utf-8")
    assert "BSD 3-Clause License" in notice
    assert "Stan Developers" in notice


def test_mauna_loa_co2():
    """Against the annual means of NOAA, another laboratory there, as of 2015; NaN where there are no data."""
    month, ppm = mauna_loa_co2()
    assert month.shape == ppm.shape == (526,)
    assert (np.diff(month) == np.timedelta64(1, "M")).all()
    missing = [str(when) for when in month[np.isnan(ppm)]]
    assert missing == ["1958-06", "1958-10", "1964-02", "1964-03", "1964-04"]
    for year, expected in {"1980": 338.68, "1990": 354.35, "2000": 369.52}.items():
        of_year = month.astype("datetime64[Y]") == np.datetime64(year)
        assert of_year.sum() == 12
        assert ppm[of_year].mean() == pytest.approx(expected, abs=0.3)
