"""Coverage probes: what they must find, and where they must keep quiet."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_flowvi.diagnostics import diagnose
from pyro_flowvi.diagnostics._chains import Whitening, guarded, run_chains
from pyro_flowvi.diagnostics._ranks import LOCATION_UNIT, SCALE_UNIT, gap_of
from pyro_flowvi.diagnostics.probes import Effort, probe
from tests import zoo


def normal(dim, loc=0.0, scale=1.0):
    return lambda: pyro.sample("x", dist.Normal(torch.full((dim,), loc), scale).to_event(1))


def two_modes(dim, distance, weight):
    def model():
        loc = torch.zeros(2, dim)
        loc[1, 0] = distance
        parts = dist.Normal(loc, 1.0).to_event(1)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([1 - weight, weight])), parts))

    return model


def funnel(dim):
    def model():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        scale = (v / 2).exp().unsqueeze(-1)
        pyro.sample("x", dist.Normal(torch.zeros(dim - 1), scale).to_event(1))

    return model


def banana():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.3))


class TestChains:
    def test_leave_a_normal_invariant(self):
        """Chains that start from a correlated normal still have its moments."""
        tril = torch.linalg.cholesky(torch.tensor([[4.0, 1.9], [1.9, 1.0]]))
        start = torch.randn(2000, 2) @ tril.T

        def density(z):
            white = torch.linalg.solve_triangular(tril, z.T, upper=False)
            return -0.5 * white.square().sum(0), -torch.cholesky_solve(z.T, tril).T

        whitening = Whitening.of(start)
        whitened = guarded(density, whitening, start)
        ones = torch.ones(2000)
        chains = run_chains(whitened, whitening(start), torch.zeros(2000).long(), lambda _: ones, 5, 60)
        end = whitening.inverse(chains.states[-1])
        assert torch.cov(end.T).numpy() == pytest.approx((tril @ tril.T).numpy(), rel=0.15)
        assert chains.acceptance.mean() == pytest.approx(0.8, abs=0.15)
        assert abs(np.corrcoef(end[:, 0], start[:, 0])[0, 1]) < 0.3

    def test_whitening_round_trip(self):
        z = torch.randn(500, 3) @ torch.tensor([[1.0, 0, 0], [5, 2, 0], [0, 1, 0.1]]).T + 7.0
        whitening = Whitening.of(z)
        u = whitening(z)
        torch.testing.assert_close(whitening.inverse(u), z)
        torch.testing.assert_close(torch.cov(u.T), torch.eye(3), atol=1e-4, rtol=0)

    def test_a_failing_point_is_apart(self):
        def density(z):
            if bool((z < 0).any()):
                raise ValueError("no Cholesky factor")
            return -z.sum(-1), -torch.ones_like(z)

        value, gradient = guarded(density, Whitening(torch.zeros(1), torch.ones(1)), torch.zeros(1))(
            torch.tensor([[1.0], [-1.0], [2.0]])
        )
        assert value.tolist() == [-1.0, -math.inf, -2.0]
        assert gradient.squeeze(-1).tolist() == [-1.0, 0.0, -1.0]


class TestGap:
    @pytest.mark.parametrize("memory", [0.0, 0.5, 0.8])
    def test_of_chains_that_remember_their_start(self, memory):
        """Autoregressive chains towards N(0.5, 1) from N(0, 1): the gap is 0.5, not what they moved."""
        rng = np.random.default_rng(0)
        start = rng.standard_normal((20_000, 1))
        end = 0.5 + memory * (start - 0.5) + math.sqrt(1 - memory**2) * rng.standard_normal(start.shape)
        gap, se = gap_of(start, end, np.zeros(1))
        assert gap[0] == pytest.approx(0.5, abs=4 * se[0])
        assert se[0] == pytest.approx(math.sqrt(1 - memory**2) / (1 - memory) / math.sqrt(20_000), rel=0.05)

    def test_units_of_ranks(self):
        x, h = np.random.default_rng(0).standard_normal(10**6), 0.05
        rank = stats.norm.cdf
        location = (rank(x + h).mean() - rank(x - h).mean()) / (2 * h)
        spread = np.abs(rank(x * math.exp(h)) - 0.5).mean() - np.abs(rank(x * math.exp(-h)) - 0.5).mean()
        assert location == pytest.approx(LOCATION_UNIT, rel=0.01)
        assert spread / (2 * h) == pytest.approx(SCALE_UNIT, rel=0.01)


class TestMissedModes:
    @pytest.mark.parametrize("dim", [1, 2, 10])
    @pytest.mark.parametrize("distance", [6.0, 15.0])
    def test_one_of_two(self, dim, distance):
        found = diagnose(two_modes(dim, distance, 0.5), normal(dim), seed=0)
        assert found.verdict == "poor"
        assert "mode" in " ".join(found.reasons)
        assert found.probes.missed == pytest.approx(0.5, abs=0.2)

    @pytest.mark.parametrize(("weight", "verdict"), [(0.1, "poor"), (0.01, "usable"), (1e-4, "good")])
    def test_counts_by_its_mass(self, weight, verdict):
        found = diagnose(two_modes(2, 8.0, weight), normal(2), seed=0)
        assert found.verdict == verdict
        assert found.probes.missed == pytest.approx(weight, rel=0.3, abs=1e-3)

    def test_a_guide_with_both_is_good(self):
        model = two_modes(2, 8.0, 0.3)
        assert diagnose(model, model, seed=0).verdict == "good"

    def test_wrong_weights_of_modes_are_not_good(self):
        found = diagnose(two_modes(2, 8.0, 0.5), two_modes(2, 8.0, 0.2), seed=0)
        assert found.verdict != "good"
        assert found.shift > 0.3

    @pytest.mark.parametrize("at", [-4.0, -2.0])
    def test_the_neck_of_a_funnel_that_is_cut_off(self, at):
        """All weights are equal, and yet a part of the mass is missing: v < at of N(0, 3), 9 and 25 %."""
        low = stats.norm.cdf(at / 3.0)

        class Cut(dist.Normal):
            def rsample(self, shape=()):
                uniform = low + (1 - low) * torch.rand(self._extended_shape(torch.Size(shape)))
                return 3.0 * torch.special.ndtri(uniform)

            def log_prob(self, value):
                return super().log_prob(value) - math.log1p(-low)

            def expand(self, shape, _instance=None):
                return Cut(self.loc.expand(shape), self.scale.expand(shape))

        def cut():
            v = pyro.sample("v", Cut(torch.tensor(0.0), torch.tensor(3.0)))
            pyro.sample("x", dist.Normal(torch.zeros(9), (v / 2).exp().unsqueeze(-1)).to_event(1))

        for seed in range(3):
            found = diagnose(funnel(10), cut, seed=seed)
            assert found.ess == pytest.approx(4000, rel=0.01)
            assert found.verdict != "good"


class TestDrift:
    def test_correlated_target_under_independent_guide(self):
        """The marginal sd of the best independent guide is sqrt(1 - rho^2) of the true one."""
        tril = torch.linalg.cholesky(torch.tensor([[1.0, 0.8], [0.8, 1.0]]))

        def model():
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))

        found = diagnose(model, normal(2, scale=0.6), seed=0)
        assert found.verdict != "good"
        assert found.probes.differs
        assert found.probes.scale == pytest.approx(-math.log(0.6), abs=0.2)

    def test_offset(self):
        found = diagnose(normal(3), normal(3, loc=0.3), seed=0)
        assert found.probes.location == pytest.approx(-0.3, abs=4 * found.probes.location_se)
        assert found.verdict == "usable"

    def test_gaussian_on_a_funnel(self):
        def guide():
            pyro.sample("v", dist.Normal(1.0, 1.5))
            pyro.sample("x", dist.Normal(torch.zeros(9), 1.0).to_event(1))

        assert diagnose(funnel(10), guide, seed=0).verdict != "good"

    def test_sound_moments_with_bad_weights(self):
        """All of 200 sds are 7 % too small: the weights are useless, no mean or interval is off by much."""
        found = diagnose(normal(200), normal(200, scale=0.93), seed=0)
        assert found.ess < 400
        assert found.verdict in ("usable", "poor")
        if found.verdict == "usable" and found.khat > found.khat_threshold:
            assert "the moments are sound, the weights are not" in found.reasons[0]


class TestQuiet:
    @pytest.mark.parametrize("dim", [1, 5, 30])
    def test_exact_normal(self, dim):
        verdicts = [
            diagnose(normal(dim), normal(dim), seed=seed, num_samples=1000).verdict for seed in range(5)
        ]
        assert verdicts == ["good"] * 5

    @pytest.mark.parametrize("num_samples", [500, 1000, 4000])
    def test_exact_with_many_latents(self, num_samples):
        verdicts = [
            diagnose(normal(100), normal(100), seed=seed, num_samples=num_samples).verdict
            for seed in range(3)
        ]
        assert "poor" not in verdicts
        assert verdicts.count("good") >= 2

    def test_exact_banana_and_student(self):
        def student():
            pyro.sample("x", dist.StudentT(3.0, torch.zeros(2), 1.0).to_event(1))

        assert diagnose(banana, banana, seed=0).verdict == "good"
        found = diagnose(student, student, seed=0)
        assert found.verdict == "good"
        assert found.tail_index == pytest.approx(1 / 3, abs=0.25)

    def test_exact_funnel_is_not_poor(self):
        model = funnel(10)
        assert diagnose(model, model, seed=0).verdict in ("good", "usable")

    def test_where_they_make_no_sense(self):
        model, args = zoo.make_zoo()["subsampled_globals"]
        found = diagnose(model, pyro.infer.autoguide.AutoNormal(model), *args)
        assert found.probes is None
        assert any("no coverage probes" in reason for reason in found.reasons)

    def test_left_out_on_request(self):
        found = diagnose(normal(1), normal(1), seed=0, probes=False)
        assert found.probes is None
        assert not any("probes" in reason for reason in found.reasons)

    def test_repeatable(self):
        first, second = (diagnose(normal(2), normal(2), seed=3).probes for _ in range(2))
        assert first == second


def test_chains_of_one_state_give_no_warning():
    """Short steps, where the model runs for one point at a time; a warning is an error here."""
    z = torch.randn(200, 2)
    for shift in (0.0, 5.0):
        found = probe(
            lambda z, shift=shift: (-5e5 * (z - shift).square().sum(-1), -1e6 * (z - shift)),
            z,
            np.zeros(200),
            np.full(200, 1 / 200),
            ["x", "y"],
            Effort.of(2, batched=False, in_noise=False),
        )
        assert found.differs


@pytest.mark.parametrize("height", [200.0, 1e30])
def test_a_spike_is_no_region(height):
    """Of hardly any measure, or of rounding alone, as where two gamma functions cancel."""
    z = torch.randn(1000, 2)
    equal = np.full(1000, 1e-3)

    def density(z):
        at = z[:, 0] - 25.0
        spike = height * torch.exp(-0.5 * (at / 1e-4).square()) if height < 1e10 else height * (at > 0)
        slope = torch.zeros_like(z)
        return -0.5 * z.square().sum(-1) + spike, -z + slope

    for seed in range(3):
        torch.manual_seed(seed)
        found = probe(density, z, np.log(equal), equal, ["x", "y"], Effort())
        assert found.missed < 0.005
