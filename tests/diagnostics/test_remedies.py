"""What a verdict advises works on the fit that it was advised for, and is never what is in use."""

import dataclasses
import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

from pyro_flowvi import AutoFlowMixture, AutoNeuralSpline, AutoPlanar, AutoRealNVP, fit
from pyro_flowvi.diagnostics import diagnose, to_arviz
from pyro_flowvi.diagnostics._symmetries import Symmetry
from pyro_flowvi.diagnostics._verdict import Figures, Judgement, judge
from pyro_flowvi.diagnostics.probes import Probes


def advised(found, words):
    """Whether a verdict that is not good gives the advice."""
    return found.verdict != "good" and any(words in advice for advice in found.advice)


def fitted(model, guide, *args, **options):
    result = fit(model, guide, *args, progress=False, seed=0, **options)
    return diagnose(model, guide, *args, seed=0, fit_result=result)


def banana():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.5))


class TestWork:
    def test_resampled_draws(self):
        """Mean and sd of N(0, 1), of which the guide is off by .4 sd and a quarter too wide."""

        def model():
            pyro.sample("x", dist.Normal(0.0, 1.0))

        def guide():
            pyro.sample("x", dist.Normal(0.4, 1.25))

        assert advised(diagnose(model, guide, seed=0), "to_arviz(..., resample=True)")
        draws = to_arviz(model, guide, num_samples=4000, resample=True).posterior["x"].values
        assert draws.mean() == pytest.approx(0.0, abs=0.1)
        assert draws.std() == pytest.approx(1.0, rel=0.1)

    def test_resampled_draws_of_rows(self):
        """A network that was not trained, on data far from its prior: to_arviz has the data to weigh by."""

        def model(y):
            with pyro.plate("rows", len(y)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

        y = torch.tensor([0.9])
        guide = AutoRealNVP(model, amortize="auto").materialize(y)
        found = diagnose(model, guide, y, seed=0)
        assert advised(found, "to_arviz(..., resample=True)")
        assert not advised(found, "guide.sample_posterior")
        with pytest.raises(RuntimeError, match="sees a part of its data"):
            guide.sample_posterior(10, resample=True)
        draws = to_arviz(model, guide, y, num_samples=4000, resample=True, seed=0).posterior["z"].values
        assert draws.mean() == pytest.approx(0.45, abs=0.1)
        assert draws.std() == pytest.approx(0.5**0.5, rel=0.1)

    def test_a_density_in_place_of_a_point_mass(self):
        def model():
            pyro.sample("x", dist.LogNormal(1.0, 0.5))

        delta = AutoDelta(model)
        delta()
        assert advised(diagnose(model, delta, seed=0), "take a guide with a density there, AutoRealNVP")
        assert fitted(model, AutoRealNVP(model), num_steps=50).verdict == "good"

    @pytest.mark.long
    def test_proper_priors(self):
        def model(prior):
            a, b = pyro.sample("a", prior), pyro.sample("b", prior)
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=torch.tensor(1.0))

        flat = dist.ImproperUniform(dist.constraints.real, (), ())
        guide = AutoRealNVP(model).materialize(flat)
        assert advised(diagnose(model, guide, flat, seed=0), "give the sites ['a', 'b'] proper priors")
        proper = dist.Normal(0.0, 10.0)
        assert fitted(model, AutoRealNVP(model), proper, num_steps=50).verdict == "good"

    @pytest.mark.long
    def test_a_support(self):
        def cut_off():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("positive", torch.where(x > 0.0, 0.0, -torch.inf))

        def model():
            pyro.sample("x", dist.HalfNormal(1.0))

        def guide():
            pyro.sample("x", dist.Normal(0.8, 0.6))

        assert advised(diagnose(cut_off, guide, seed=0), "HalfNormal in place of a factor")
        # Of a single latent, whose log has a tail that no Gaussian has, couplings are affine.
        assert advised(fitted(model, AutoRealNVP(model)), "take AutoNeuralSpline")
        assert fitted(model, AutoNeuralSpline(model)).verdict == "good"

    @pytest.mark.long
    def test_a_richer_guide(self):
        assert advised(fitted(banana, AutoNormal(banana)), "AutoRealNVP")
        assert fitted(banana, AutoRealNVP(banana)).verdict == "good"

    @pytest.mark.long
    def test_longer(self):
        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("bent", dist.Normal(x**2, 0.5).log_prob(pyro.sample("y", dist.Normal(0.0, 5.0))))

        found = fitted(model, AutoRealNVP(model), num_steps=10)
        assert "the training had not converged" in found.reasons
        assert advised(found, "train longer")
        assert fitted(model, AutoRealNVP(model)).verdict == "good"

    @pytest.mark.long
    def test_longer_after_steps_of_ones_own(self):
        """Of a flow that has had ten steps, of which no result of a fit tells, and then more."""

        def model():
            x = pyro.sample("x", dist.Normal(3.0, 0.5))
            pyro.sample("y", dist.Normal(x, 0.5))

        guide = AutoPlanar(model, 1, structure=None)
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), pyro.infer.Trace_ELBO(20))
        pyro.set_rng_seed(0)
        for _ in range(10):
            svi.step()
        early = diagnose(model, guide, seed=0)
        assert early.verdict == "poor"
        assert early.advice[0].startswith("train longer, unless the ELBO had stopped rising")
        for _ in range(600):
            svi.step()
        assert diagnose(model, guide, seed=0).verdict != "poor"

    @pytest.mark.long
    def test_several_modes(self):
        def model():
            parts = dist.Normal(torch.tensor([-4.0, 4.0]), 1.0)
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.4, 0.6])), parts))

        assert advised(fitted(model, AutoRealNVP(model)), "take AutoFlowMixture")
        assert fitted(model, AutoFlowMixture(model, num_components=2)).verdict == "good"

    @pytest.mark.long
    def test_tails(self):
        def model():
            with pyro.plate("sites", 6):
                pyro.sample("x", dist.StudentT(3.0, 0.0, 1.0))

        assert advised(fitted(model, AutoRealNVP(model)), "AutoRealNVP(..., tails=True)")
        assert fitted(model, AutoRealNVP(model, tails=True)).verdict == "good"

    @pytest.mark.long
    def test_a_funnel(self):
        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            tau = pyro.sample("tau", dist.HalfCauchy(5.0))
            with pyro.plate("groups", len(y)):
                theta = pyro.sample("theta", dist.Normal(mu, tau))
                pyro.sample("y", dist.Normal(theta, 12.0), obs=y)

        y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
        assert advised(fitted(model, AutoNormal(model), y), "AutoRealNVP")
        assert fitted(model, AutoRealNVP(model), y).verdict == "good"

    @pytest.mark.long
    def test_an_order_of_what_is_exchanged(self):
        y = torch.cat([torch.linspace(-1.5, 1.5, 12), torch.linspace(4.5, 7.5, 12)]).unsqueeze(-1)

        def model(prior):
            means = pyro.sample("means", prior)
            terms = dist.Normal(means.unsqueeze(-2), 1.0).log_prob(y)
            pyro.factor("y", terms.logsumexp(-1).sum(-1))

        free = dist.Normal(torch.full((2,), 3.0), 5.0).to_event(1)
        ordered = dist.TransformedDistribution(free, dist.transforms.OrderedTransform())
        assert advised(fitted(model, AutoRealNVP(model), free), "OrderedTransform()")
        assert fitted(model, AutoRealNVP(model), ordered).verdict == "good"


GUIDES = [
    ("AutoNormal", False), ("AutoRealNVP", True), ("AutoNeuralSpline", True), ("AutoFlowMixture", True)
]  # fmt: skip
QUIET = Probes(
    0.01, 0.05, "x", 0.01, 0.05, "x", 0.01, False, 0.0, 0.0, 0.0, 1.0, 0.1, True, 1000
)  # fmt: skip
SYMMETRIES = [None, Symmetry("swapping a and b", 2, 1.0, True, False), Symmetry("signs", 2, 1.0, False, True)]


def many_figures():
    """Figures of all kinds of findings, alone and together."""
    sound = Figures(0.1, 0.7, 3900.0, 0.001, 4000, 0, 2, 0.01, 0.01, "x", 0.1, QUIET, True, scale_name="y")
    weights = [
        {},
        {"khat": 0.6},
        {"khat": 0.9, "ess": 3000.0},
        {"khat": 1.2, "ess": 20.0, "shift": 1.0},
        {"ess": 50.0},
        {"shift": 0.3, "scale_shift": 0.1},
        {"scale_shift": 0.5, "elbo_se": 1.0},
    ]
    probes = [
        {},
        *({"missed": 0.4, "symmetry": symmetry} for symmetry in SYMMETRIES),
        {"missed": 0.01},
        {"left": 0.3},
        {"differs": True, "location": 0.5},
        {"differs": True, "location": 0.5, "resampled": 0.6},
        {"conclusive": False},
        {"rhat": 2.0},
        {"tail_index": 0.8},
    ]
    others = [
        {},
        {"converged": False},
        {"converged": None},
        {"num_nonfinite": 3},
        {"has_tails": True},
        {"probes": None},
    ]
    for (guide, own), w, p, other in itertools.product(GUIDES, weights, probes, others):
        changed = {"probes": dataclasses.replace(QUIET, **p), **w, **other}
        yield dataclasses.replace(sound, guide=guide, resamples=own, **changed)


def test_each_reason_that_lowers_a_verdict_has_one_advice(monkeypatch):
    added = []

    def record(self, reason, rank=2, advice=""):
        added.append((reason, rank, advice))
        return add(self, reason, rank, advice)

    add = Judgement.add
    monkeypatch.setattr(Judgement, "add", record)
    for figures in many_figures():
        added.clear()
        judgement = judge(figures)
        lowering = {advice for _, rank, advice in added if rank < 2}
        assert "" not in lowering, added
        assert lowering <= set(judgement.advice)
        assert len(judgement.advice) == len(set(judgement.advice))
        assert bool(lowering) == (judgement.rank < 2)


def test_longer_comes_before_another_shape_of_a_flow():
    """Unless it is known to have converged, or most draws count; advice on other guides stays first."""
    seen = set()
    for figures in many_figures():
        told = judge(figures).told
        shape = [line for line in told if "richer" in line or "layers" in line or "tails=True" in line]
        short = figures.converged is False or (figures.converged is None and figures.share < 0.5)
        if figures.resamples and short and shape and judge(figures).verdict == "poor":
            assert told[0].startswith("train longer")
            assert sum("train longer" in line for line in told) == 1
            seen.add((figures.guide, figures.converged))
        elif figures.converged is not False:
            assert not any("train longer" in line for line in told)
    assert len(seen) == 6


def test_the_guide_in_use_is_not_advised():
    for figures in many_figures():
        for advice in judge(figures).advice:
            assert f"take {figures.guide}" not in advice
            assert f"guide, {figures.guide}" not in advice
            assert not (figures.has_tails and "tails=True" in advice)


def test_resampled_draws_are_not_advised_where_they_are_of_no_use():
    """A poor verdict has other advice, one that is usable the same as before."""
    of_no_use = 0
    for figures in many_figures():
        judgement = judge(figures)
        resample = [line for line in judgement.advice if "resample=True" in line]
        kept = [line for line in judgement.advice if line not in resample]
        if judgement.verdict == "poor":
            assert kept
            assert list(judgement.told) == kept
            few = figures.ess < 100.0 or figures.khat > figures.khat_threshold
            sound = not few and figures.scale_shift < 0.1 and not figures.num_nonfinite
            of_no_use += bool(resample) and not sound
        else:
            assert list(judgement.told) == judgement.advice * (judgement.verdict == "usable")
    assert of_no_use > 50


def test_heavy_tails_are_what_the_weights_advise():
    heavy = dataclasses.replace(QUIET, tail_index=0.6, left=0.2)
    weak = Figures(1.2, 0.7, 20.0, 0.05, 4000, 0, 2, 1.0, 0.1, "x", 0.1, heavy, True, "AutoRealNVP")
    assert "AutoRealNVP(..., tails=True)" in judge(weak).advice[0]
    assert not any("tails=True" in a for a in judge(dataclasses.replace(weak, has_tails=True)).advice)


def test_more_layers_are_not_advised_for_one_latent():
    for figures in many_figures():
        told = " ".join(judge(dataclasses.replace(figures, dim=1)).advice)
        assert "AutoRealNVP more layers" not in told
