"""diagnose and psis against known cases."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

from pyro_flowvi import AutoPlanar, AutoRadial, fit
from pyro_flowvi._program.log_weights import LogWeights
from pyro_flowvi.diagnostics import compare, diagnose
from pyro_flowvi.diagnostics._verdict import Figures, judge
from pyro_flowvi.psis import effective_sample_size, generalized_pareto_shape, khat_threshold, psis, resample
from tests import zoo


def normal_guide(scale, loc=0.0):
    return lambda: pyro.sample("x", dist.Normal(loc, scale))


def standard_normal():
    pyro.sample("x", dist.Normal(0.0, 1.0))


class TestPsis:
    def test_sign(self):
        """Weights of a light-tailed proposal are heavy-tailed; of a heavy-tailed one, bounded."""
        x = np.random.default_rng(0).standard_normal(4000)

        def log_ratio(sd):  # of N(0, 1) over N(0, sd²) at draws of the latter
            return -0.5 * (sd * x) ** 2 + 0.5 * x**2 + math.log(sd)

        assert psis(log_ratio(0.3))[1] > 0.7  # in theory 1 - sd²
        assert psis(log_ratio(1.5))[1] < 0.3

    def test_khat_of_pareto_weights(self):
        """The density ratio r with P(r > t) = t^(-1/k) has shape k."""
        uniform = np.random.default_rng(0).random(100_000)
        for shape in (0.3, 0.5, 0.9):
            assert psis(-shape * np.log(uniform))[1] == pytest.approx(shape, abs=0.1)

    def test_smoothed_weights_estimate_a_mean(self):
        x = 1.3 * np.random.default_rng(1).standard_normal(20_000)
        log_weights, _ = psis(-0.5 * (x - 0.5) ** 2 + 0.5 * (x / 1.3) ** 2)
        assert (np.exp(log_weights) * x).sum() == pytest.approx(0.5, abs=0.03)
        assert np.exp(log_weights).sum() == pytest.approx(1.0)

    @pytest.mark.parametrize("nu", [1.0, 2.0, 5.0])
    def test_shape_of_student_tails(self, nu):
        t = np.abs(np.random.default_rng(0).standard_t(nu, 200_000))
        assert generalized_pareto_shape(t) == pytest.approx(1 / nu, abs=0.12)

    def test_threshold_depends_on_the_number_of_draws(self):
        assert khat_threshold(100) == pytest.approx(0.5)
        assert khat_threshold(10**6) == 0.7

    def test_resampling_keeps_the_weights(self):
        weights = np.random.default_rng(0).dirichlet(np.ones(50))
        counts = np.bincount(resample(np.log(weights), 10_000, seed=1), minlength=50)
        assert np.abs(counts - 10_000 * weights).max() <= 1.0

    def test_equal_weights(self):
        log_weights, khat = psis(np.zeros(100))
        assert khat == -np.inf
        np.testing.assert_allclose(np.exp(log_weights), 0.01)

    def test_rounded_weights(self):
        """Of an exact guide in float32 the log weights are a few values next to each other."""
        log_ratios = 4e-6 * np.round(np.random.default_rng(0).standard_normal(4000))
        log_weights, khat = psis(log_ratios)
        assert khat == -np.inf
        np.testing.assert_allclose(log_weights, log_ratios - np.log(np.exp(log_ratios).sum()))

    def test_effective_sample_size(self):
        weights = np.random.default_rng(0).random(50)
        expected = weights.sum() ** 2 / (weights**2).sum()
        assert effective_sample_size(np.log(weights) + 1000) == pytest.approx(expected)

    @pytest.mark.parametrize("bad", [[], [[0.0]], [0.0, math.nan]])
    def test_bad_input(self, bad):
        for function in (psis, effective_sample_size):
            with pytest.raises(ValueError, match="expected a vector of finite numbers"):
                function(bad)


class TestDiagnose:
    def test_exact_guide(self):
        found = diagnose(standard_normal, normal_guide(1.0), seed=0)
        assert found.elbo == pytest.approx(0.0, abs=1e-6)
        assert found.ess == pytest.approx(4000)
        assert found.verdict == "good"

    @pytest.mark.parametrize("scale", [0.5, 0.8, 1.5])
    def test_elbo_and_ess_against_closed_forms(self, scale):
        found = diagnose(standard_normal, normal_guide(scale), seed=0, num_samples=40_000)
        divergence = 0.5 * (scale**2 - 1) - math.log(scale)
        assert found.elbo == pytest.approx(-divergence, abs=5 * found.elbo_se)
        assert found.elbo_se == pytest.approx(abs(scale**2 - 1) / math.sqrt(2) / 200, rel=0.1)
        if scale > 1 / math.sqrt(2):  # else the weights have no variance
            second_moment = scale**2 / math.sqrt(2 * scale**2 - 1)
            assert found.ess / 40_000 == pytest.approx(1 / second_moment, rel=0.05)
        assert found.elbo <= found.iw_elbo <= 0.05

    def test_light_tails_are_poor(self):
        found = diagnose(standard_normal, normal_guide(0.1), seed=0)
        assert found.verdict == "poor"
        assert "tails" in found.reasons[0]

    def test_wrong_place_is_poor(self):
        assert diagnose(standard_normal, normal_guide(1.0, loc=5.0), seed=0).verdict == "poor"

    def test_draws_without_density_are_poor(self):
        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("half", torch.where(x > 0, 0.0, -torch.inf))

        found = diagnose(model, normal_guide(1.0), seed=0)
        assert found.verdict == "poor"
        assert any("not finite" in reason for reason in found.reasons)

    def test_all_draws_without_density(self):
        def model():
            pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("never", torch.tensor(-torch.inf))

        assert diagnose(model, normal_guide(1.0)).verdict == "poor"

    def test_point_mass(self):
        """A Delta has no density to weigh by; its equal weights must not pass for a fit."""
        model, args = zoo.make_zoo()["hierarchy"]
        guide = AutoDelta(model)
        guide(*args)
        assert diagnose(model, guide, *args).verdict == "poor"

    @pytest.mark.parametrize("name", ["enumerated", "not_for_batches"])
    @pytest.mark.long
    def test_draw_by_draw(self, name):
        model, args = zoo.make_zoo()[name]
        guide = AutoPlanar(model, num_layers=2)
        fit(model, guide, *args, num_steps=100, progress=False)
        found = diagnose(model, guide, *args, num_samples=200)
        assert math.isfinite(found.elbo)

    def test_enumerated_weights_equal_a_hand_computation(self):
        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(x + 2 * z, 1.0), obs=torch.tensor(1.0))

        def evidence():
            parts = [0.7 * dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0)).exp(),
                     0.3 * dist.Normal(2.0, 2**0.5).log_prob(torch.tensor(1.0)).exp()]  # fmt: skip
            return float(sum(parts).log())

        guide = AutoPlanar(model)
        fit(model, guide, num_steps=600, lr=0.03, progress=False, seed=0)
        found = diagnose(model, guide, num_samples=1000, seed=0)
        assert found.iw_elbo == pytest.approx(evidence(), abs=0.02)
        assert found.elbo <= evidence() + 3 * found.elbo_se

    def test_enumerated_weights_equal_pyros_one_by_one(self):
        """The batched contraction against TraceEnum_ELBO of single draws, on a plate of mixtures."""
        model, args = zoo.make_zoo()["enumerated"]
        particles = LogWeights(model, AutoPlanar(model), args)
        assert particles.vectorized
        batched = particles.log_weights(20_000)
        particles.vectorized = False
        single = particles.log_weights(400)
        assert batched.mean() == pytest.approx(single.mean().item(), abs=4 * single.std().item() / 20)
        assert batched.std() == pytest.approx(single.std().item(), rel=0.3)

    def test_sites_that_the_guide_sums_out_itself_are_not_called_good(self):
        """The rows lie 6 sd apart by their labels, of which the second guide knows nothing."""
        y = torch.cat([torch.full((20,), -3.2), torch.full((20,), 2.8)])

        def model():
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(y)):
                c = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
                pyro.sample("y", dist.Normal(m + 6.0 * c - 3.0, 1.0), obs=y)

        def exact():
            pyro.sample("m", dist.Normal(-0.2 * 40 / 41, 41**-0.5))

        def ignorant():
            exact()
            with pyro.plate("rows", len(y)):
                pyro.sample("c", dist.Bernoulli(torch.full((len(y),), 0.5)), infer={"enumerate": "parallel"})

        assert diagnose(model, exact, seed=0, probes=False).verdict == "good"
        found = diagnose(model, ignorant, num_samples=1000, seed=0, probes=False)
        assert found.verdict == "usable"
        assert any("sums out the sites ['c']" in reason for reason in found.reasons)
        assert "leave the sites ['c'] out of the guide" in found.advice[-1]

    def test_says_that_weights_are_noisy_under_subsampling(self):
        model, args = zoo.make_zoo()["subsampled_globals"]
        found = diagnose(model, AutoPlanar(model), *args)
        assert any("subsamples" in reason for reason in found.reasons)

    def test_any_guide_and_kwargs(self):
        model, (y,) = zoo.make_zoo()["hierarchy"]
        for make in (AutoNormal, AutoRadial):
            guide = make(model)
            fit(model, guide, y, num_steps=50, progress=False)
            assert diagnose(model, guide, model_kwargs={"y": y}).verdict in ("good", "usable", "poor")

    def test_gap_tends_to_the_divergence(self):
        """IW-ELBO -> log Z, so that the gap is KL(q || p) where the weights have a variance."""
        scale, log_z = 1.3, -4.0

        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("evidence", torch.full_like(x, log_z))

        found = diagnose(model, normal_guide(scale), seed=0, num_samples=40_000, probes=False)
        assert found.iw_elbo == pytest.approx(log_z, abs=0.01)
        assert found.gap == pytest.approx(0.5 * (scale**2 - 1) - math.log(scale), abs=0.02)

    @pytest.mark.parametrize("offset", [0.05, 0.2, 0.5])
    def test_shift_is_that_of_the_mean(self, offset):
        found = diagnose(standard_normal, normal_guide(1.0, offset), seed=0, num_samples=20_000, probes=False)
        assert found.shift == pytest.approx(offset, abs=0.02)
        assert found.verdict == ("good" if offset < 0.1 else "usable")

    def test_scale_shift_is_that_of_the_sd(self):
        found = diagnose(standard_normal, normal_guide(0.85), seed=0, num_samples=20_000, probes=False)
        assert found.scale_shift == pytest.approx(-math.log(0.85), abs=0.03)
        assert found.verdict == "usable"  # k-hat 0.28 and no shift, and yet the sd is wrong

    def test_unconverged_is_not_good(self):
        class Result:
            converged = False

        found = diagnose(standard_normal, normal_guide(1.0), seed=0, fit_result=Result(), probes=False)
        assert found.verdict == "usable"
        assert "converged" in " ".join(found.reasons)

    def test_constrained_guides_are_located(self):
        """Of a log-normal scale the unconstrained coordinate is normal: the shift is in its sd."""

        def model():
            pyro.sample("s", dist.LogNormal(0.0, 1.0))

        def guide():
            pyro.sample("s", dist.LogNormal(0.3, 1.0))

        found = diagnose(model, guide, seed=0, num_samples=20_000, probes=False)
        assert found.shift == pytest.approx(0.3, abs=0.03)

    @pytest.mark.parametrize(("name", "value"), [("num_samples", 50), ("num_samples", 0.5), ("probes", 1)])
    def test_bad_arguments(self, name, value):
        with pytest.raises(ValueError, match=name):
            diagnose(standard_normal, normal_guide(1.0), **{name: value})


class TestCompare:
    def test_ranks_by_elbo(self):
        guides = {f"sd {s}": normal_guide(s) for s in (0.3, 1.0, 0.6)}
        table = compare(standard_normal, guides, seed=0, probes=False)
        assert [name for name, _ in table] == ["sd 1.0", "sd 0.6", "sd 0.3"]
        elbos = [row.elbo for _, row in table]
        expected = [0.0] + [math.log(s) - 0.5 * (s**2 - 1) for s in (0.6, 0.3)]
        np.testing.assert_allclose(elbos, expected, atol=0.03)
        assert table[0] is table["sd 1.0"]
        assert len(str(table).splitlines()) == 4
        assert table._repr_html_().count("<tr>") == 4

    def test_a_khat_of_equal_weights(self):
        """Nearly equal weights have no tail; both ways to print it say so."""
        table = compare(standard_normal, {"exact": normal_guide(1.0)}, seed=0, probes=False)
        assert table[0].khat == -math.inf
        assert "k-hat -" in str(table[0])
        assert "inf" not in str(table) + table._repr_html_()

    def test_names_of_a_list(self):
        guides = [AutoNormal(standard_normal), AutoPlanar(standard_normal), AutoNormal(standard_normal)]
        table = compare(standard_normal, guides, num_samples=100, probes=False)
        assert sorted(name for name, _ in table) == ["AutoNormal", "AutoNormal_1", "AutoPlanar"]

    @pytest.mark.parametrize("guides", [[], {}, "AutoNormal", [1.0]])
    def test_bad_guides(self, guides):
        with pytest.raises(ValueError, match="guides"):
            compare(standard_normal, guides)


@pytest.mark.parametrize("name", ["AutoNeuralSpline", "AutoRealNVP", "AutoFlowMixture", "AutoNormal"])
def test_advice_does_not_name_the_guide_that_is_used(name):
    weak = Figures(1.5, 0.7, 5.0, 1.0, 1000, 0, 2, 1.0, 0.5, "x", 0.0, None, None, name, name != "AutoNormal")
    told = " ".join(judge(weak).advice)
    assert f"guide: {name}" not in told
    assert f"take {name}" not in told
    assert ("sample_posterior" in told) <= (name != "AutoNormal")


def test_data_on_another_device_are_refused():
    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    guide = AutoPlanar(model, num_layers=2).materialize(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"args\[0\]: .*guide's device .*, got a tensor on meta"):
        diagnose(model, guide, torch.ones(1, device="meta"))
