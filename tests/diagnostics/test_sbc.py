"""sbc on conjugate models, whose exact guides are known, and on models as users write them."""

import sys
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.poutine import block, mask

from pyro_flowvi import AutoFlow, AutoPlanar, sbc

QUIET = {"seed": 0, "progress": False}
QUICK = {"fit_kwargs": {"num_steps": 1}}
Y = torch.zeros(4)
GROUP = torch.tensor([0, 0, 1, 1, 2, 2])


def conjugate(y):
    mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.5), obs=y)


def normal_posterior(model, shift=0.0, scale=1.0):
    """A maker of guides: the posterior of ``conjugate``, moved and widened in its own sd."""

    def guide(y):
        precision = 1 / 4 + len(y) / 2.25
        sd = precision**-0.5
        mean = (1 / 4 + y.sum() / 2.25) / precision
        pyro.sample("mu", dist.Normal(mean + shift * sd, scale * sd))

    return guide


class TestConjugate:
    @pytest.mark.parametrize("num", [40, pytest.param(200, marks=pytest.mark.long)])
    def test_exact_guides_are_calibrated(self, num):
        found = sbc(conjugate, normal_posterior, Y, num=num, **QUICK, **QUIET)
        assert found.verdict == "calibrated"
        assert found.p_value > 0.1
        assert len(found) == num
        assert set(found.ranks) == {"mu", "log density"}
        u = (found.ranks["mu"] + 0.5) / 1001
        assert u.mean() == pytest.approx(0.5, abs=4 / np.sqrt(12 * num))

    @pytest.mark.parametrize(
        ("how", "words"),
        [
            ({"scale": 0.5}, "U-shaped: the guide is too narrow"),
            ({"scale": 2.0}, "humped: the guide is too wide"),
            ({"shift": 0.8}, "low: the guide lies too high"),
        ],
    )
    def test_wrong_guides_are_not(self, how, words):
        found = sbc(conjugate, partial(normal_posterior, **how), Y, num=50, **QUICK, **QUIET)
        assert found.verdict == "not calibrated"
        assert words in found.shape("mu")

    def test_resampled_draws_of_a_wide_guide(self):
        """Exact weights of one latent: what is too wide as it is, is calibrated once it is resampled."""
        wide = partial(normal_posterior, scale=2.0, shift=0.5)
        found = sbc(conjugate, wide, Y, num=50, resample=True, **QUICK, **QUIET)
        assert found.verdict == "calibrated"
        assert found.ranks["mu"].max() <= 1000

    def test_a_guide_that_ignores_the_data(self):
        """The prior: ranks of the latent are uniform, those of the log density are not (Modrák et al.)."""

        def prior(model):
            return lambda y: pyro.sample("mu", dist.Normal(1.0, 2.0))

        found = sbc(conjugate, prior, Y, num=30, **QUICK, **QUIET)
        assert found.adjusted()["mu"] > 0.05
        assert found.adjusted()["log density"] < 1e-4
        assert "less likely than the latents" in found.shape("log density")

    @pytest.mark.long
    @pytest.mark.parametrize("make", [AutoNormal, partial(AutoPlanar, num_layers=2)])
    def test_fitted_guides(self, make):
        options = {"num_steps": 100, "lr": 0.1}
        assert sbc(conjugate, make, Y, num=30, fit_kwargs=options, **QUIET).verdict == "calibrated"


class TestRuns:
    @pytest.mark.long
    def test_the_same_in_two_processes(self):
        pytest.importorskip("joblib")
        one, two = (
            sbc(conjugate, normal_posterior, Y, num=6, num_processes=n, **QUICK, **QUIET) for n in (1, 2)
        )
        for name, ranks in one.ranks.items():
            np.testing.assert_array_equal(ranks, two.ranks[name])

    def test_several_processes_need_joblib(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "joblib", None)
        with pytest.raises(ImportError, match="extra 'parallel'"):
            sbc(conjugate, normal_posterior, Y, num=2, num_processes=2, **QUICK, **QUIET)

    def test_more_fits_begin_with_the_same(self):
        few, more = (sbc(conjugate, normal_posterior, Y, num=n, **QUICK, **QUIET) for n in (3, 5))
        np.testing.assert_array_equal(few.ranks["mu"], more.ranks["mu"][:3])

    def test_generators_and_parameters_of_the_user_stay(self):
        pyro.param("loc", torch.tensor(3.0))
        state = torch.get_rng_state()
        sbc(conjugate, AutoNormal, Y, num=2, **QUICK, **QUIET)
        assert torch.get_rng_state().equal(state)
        assert dict(pyro.get_param_store().items()) == {"loc": torch.tensor(3.0)}

    def test_without_a_seed_runs_differ(self):
        first, second = (
            sbc(conjugate, normal_posterior, Y, num=3, progress=False, **QUICK) for _ in range(2)
        )
        assert not np.array_equal(first.ranks["mu"], second.ranks["mu"])

    def test_failures_are_counted(self):
        calls = []

        def sometimes(model):
            calls.append(model)
            if len(calls) == 3:  # of which the first is a try
                raise RuntimeError("no guide today")
            return normal_posterior(model)

        found = sbc(conjugate, sometimes, Y, num=4, **QUICK, **QUIET)
        assert found.failures == ((1, "RuntimeError: no guide today"),)
        assert len(found) == 3

    def test_all_fail(self):
        def model(y):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            pyro.sample("y", dist.Normal(0.0, scale * torch.tensor(1e300) * 1e300), obs=y)

        with (
            pyro.validation_enabled(False),
            pytest.raises(RuntimeError, match=r"all 2 fits failed.*site 'y'"),
        ):
            sbc(model, AutoNormal, torch.zeros(()), num=2, **QUICK, **QUIET)

    def test_ten_in_a_row_fail(self):
        def unlucky(model):
            if not tries:  # the try before the first fit
                tries.append(model)
                return normal_posterior(model)
            raise IndexError("no such row")

        tries = []
        with pytest.raises(RuntimeError, match="all 10 fits failed, the first with IndexError: no such row"):
            sbc(conjugate, unlucky, Y, num=1000, **QUICK, **QUIET)

    def test_warnings_are_told_once(self):
        def warns(model):
            import warnings

            warnings.warn("look out", UserWarning, stacklevel=1)
            return normal_posterior(model)

        with pytest.warns(UserWarning, match="look out") as caught:
            found = sbc(conjugate, warns, Y, num=3, **QUICK, **QUIET)
        assert len(caught) == 1  # of the try
        assert found.notes == {"UserWarning: look out": 3}

    def test_an_interrupted_run_keeps_what_there_is(self):
        calls = []

        def interrupts(model):
            calls.append(model)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return normal_posterior(model)

        found = sbc(conjugate, interrupts, Y, num=9, **QUICK, **QUIET)
        assert len(found) == 2
        assert "interrupted with 7 fits to go" in str(found)

    def test_verdicts(self):
        found = sbc(conjugate, normal_posterior, Y, num=3, verdicts=True, **QUICK, **QUIET)
        # A step has not converged, so that exact guides are not called good.
        assert found.verdicts == ("usable",) * 3
        assert len(found.among("usable")) == 3
        assert len(found.among("good")) == 0


class TestModels:
    def test_a_hierarchy_with_keywords_and_a_mask(self):
        def model(group, *, y, num, there):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
            with pyro.plate("groups", 3):
                a = pyro.sample("a", dist.Normal(mu, tau))
            with pyro.plate("rows", len(y)), mask(mask=there):
                pyro.sample("y", dist.Normal(a[group], 1.0), obs=y)

        # A mapping for a name that is an option of sbc.
        extra = {"model_kwargs": {"num": 3}, "y": torch.zeros(6), "there": GROUP < 2}
        found = sbc(model, AutoNormal, GROUP, num=2, sites=["a", "tau"], **extra, **QUICK, **QUIET)
        assert {name: ranks.shape for name, ranks in found.ranks.items()} == {
            "a": (2, 3),
            "tau": (2,),
            "log density": (2,),
        }

    def test_what_is_masked_out_has_no_rank(self):
        def model(y, there):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(y)), mask(mask=there):
                z = pyro.sample("z", dist.Normal(mu, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

        there = torch.tensor([True, False, True])
        found = sbc(model, partial(AutoFlow, flow="nice"), torch.zeros(3), there, num=2, **QUICK, **QUIET)
        assert (found.ranks["z"] < 0).all(0).tolist() == [False, True, False]
        assert np.isnan(found.p_values["z"]).tolist() == [False, True, False]
        assert set(found.scalars) == {"mu", "z[0]", "z[2]", "log density"}

    def test_constant_numbers_have_no_rank(self):
        def model(y):
            factor = pyro.sample("factor", dist.LKJCholesky(2, 1.0))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=y)

        found = sbc(model, partial(AutoFlow, flow="nice"), torch.zeros(5, 2), num=2, **QUICK, **QUIET)
        assert set(found.scalars) == {"factor[1,0]", "factor[1,1]", "log density"}

    def test_discrete_sites_that_are_summed_out(self):
        @config_enumerate
        def model(y):
            loc = pyro.sample("loc", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).to_event(1))
            with pyro.plate("rows", len(y)):
                k = pyro.sample("k", dist.Bernoulli(0.5)).long()
                pyro.sample("y", dist.Normal(loc[k], 1.0), obs=y)

        def make(model):
            return AutoNormal(block(model, hide=["k"]))

        found = sbc(model, make, torch.zeros(4), num=2, **QUICK, **QUIET)
        assert set(found.ranks) == {"loc", "log density"}

    def test_discrete_sites_that_the_guide_draws(self):
        """Exact: z given y has odds of 3 to 1 for what was seen; ties are broken at random."""

        def model(y):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Bernoulli(0.25 + 0.5 * z), obs=y)

        def make(model):
            return lambda y: pyro.sample("z", dist.Bernoulli(0.25 + 0.5 * y))

        found = sbc(model, make, torch.zeros(()), num=40, num_samples=99, **QUICK, **QUIET)
        assert found.p_values["z"] > 0.05

    def test_sites_that_the_call_does_not_observe(self):
        def model(y=None):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", 3):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        found = sbc(model, AutoNormal, num=2, observed=["y"], **QUICK, **QUIET)
        assert set(found.ranks) == {"mu", "log density"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"num": 0}, "num: expected a positive integer"),
            ({"num_samples": 0.5}, "num_samples: expected a positive integer"),
            ({"num_processes": -1}, "num_processes: expected a positive integer"),
            ({"sites": "mu"}, "sites: expected a list of names"),
            ({"sites": ["tau"]}, r"sites: expected latents of the model, \['mu'\], got \['tau'\]"),
            ({"observed": ["z"]}, r"observed: expected sites of the model, got \['z'\]"),
            ({"fit_kwargs": {"seed": 1}}, r"fit_kwargs: expected options of fit.*got \['seed'\]"),
            ({"fit_kwargs": 3}, "fit_kwargs: expected a mapping"),
            ({"what": 3}, "what: expected an option of sbc or an argument of the model"),
        ],
    )
    def test_arguments(self, options, match):
        with pytest.raises(ValueError, match=match):
            sbc(conjugate, normal_posterior, Y, **{**QUIET, **options})

    def test_a_guide_in_place_of_its_maker(self):
        with pytest.raises(ValueError, match="make_guide: expected a callable of a model"):
            sbc(conjugate, AutoPlanar(conjugate), Y, **QUIET)

    def test_a_maker_that_makes_no_guide(self):
        with pytest.raises(ValueError, match="guide: expected a callable, got None"):
            sbc(conjugate, lambda model: None, Y, **QUIET)

    def test_a_model_without_a_joint_distribution(self):
        def model(y):
            pyro.factor("more", -pyro.sample("mu", dist.Normal(0.0, 1.0)).square())
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

        with pytest.raises(ValueError, match="without pyro"):
            sbc(model, AutoNormal, torch.zeros(()), **QUIET)
