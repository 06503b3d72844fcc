"""Bad input is refused with an error that names it, before anything is trained."""

import math
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoGuideList
from pyro.optim import Adam

from pyro_flowvi import AutoFlow, AutoPlanar, AutoRadial, compare, diagnose, fit, to_arviz
from pyro_flowvi.transforms import Planar
from tests import zoo


def hierarchy():
    return zoo.make_zoo()["hierarchy"]


@pytest.mark.parametrize("guide_class", [AutoPlanar, AutoRadial])
class TestConstructor:
    def test_model(self, guide_class):
        with pytest.raises(ValueError, match="model: expected a callable, got 3"):
            guide_class(3)

    @pytest.mark.parametrize("num_layers", [0, -1, 2.5, True])
    def test_num_layers(self, guide_class, num_layers):
        with pytest.raises(ValueError, match="num_layers: expected a positive integer"):
            guide_class(zoo.hierarchy, num_layers=num_layers)

    def test_init_loc_fn(self, guide_class):
        with pytest.raises(ValueError, match=r"init_loc_fn: expected .* got 'median'"):
            guide_class(zoo.hierarchy, init_loc_fn="median")

    @pytest.mark.parametrize("init_scale", [0.0, -1.0, float("inf"), "large"])
    def test_init_scale(self, guide_class, init_scale):
        with pytest.raises(ValueError, match="init_scale: expected a positive number"):
            guide_class(zoo.hierarchy, init_scale=init_scale)

    def test_affine(self, guide_class):
        with pytest.raises(ValueError, match=r"affine: expected 'auto'.* got 'upper'"):
            guide_class(zoo.hierarchy, affine="upper")

    def test_name(self, guide_class):
        with pytest.raises(ValueError, match="name: expected a non-empty string, got 7"):
            guide_class(zoo.hierarchy, name=7)


class TestBuild:
    def test_unknown_key(self):
        with pytest.raises(ValueError, match=r"flow: expected one of .*'planar'.*got 'plannar'"):
            AutoFlow(zoo.hierarchy, "plannar")

    @pytest.mark.parametrize("build", [None, 3])
    def test_not_callable(self, build):
        with pytest.raises(ValueError, match="flow: expected a key of FLOWS or a callable"):
            AutoFlow(zoo.hierarchy, build)

    def test_transform_instead_of_its_builder(self):
        with pytest.raises(ValueError, match="flow: expected a key of FLOWS or a callable"):
            AutoFlow(zoo.hierarchy, Planar(5))

    def test_builder_of_something_else(self):
        model, args = hierarchy()
        with pytest.raises(ValueError, match="flow: expected it to return a Transform"):
            AutoFlow(model, lambda dim: torch.nn.Linear(dim, dim)).materialize(*args)


class TestModels:
    def test_without_latents(self):
        def model():
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

        with pytest.raises(ValueError, match="model: expected at least one continuous latent site"):
            AutoPlanar(model).materialize()

    def test_only_enumerated_latents(self):
        @config_enumerate
        def model():
            pyro.sample("z", dist.Bernoulli(0.5))

        with pytest.raises(ValueError, match="model: expected at least one continuous latent site"):
            AutoPlanar(model).materialize()

    def test_discrete_latent_that_nobody_enumerates(self):
        def model():
            pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Bernoulli(0.5))

        with pytest.raises(ValueError, match=r"site 'z': .*config_enumerate.*hide=\['z'\]"):
            AutoPlanar(model).materialize()

    def test_discrete_missing_values(self):
        """Fact 3: obs_mask drops ``infer``, so enumeration would be lost in silence."""

        def model(y, mask):
            p = pyro.sample("p", dist.Beta(1.0, 1.0))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Bernoulli(p), obs=y, obs_mask=mask, infer={"enumerate": "parallel"})

        args = torch.tensor([1.0, 0.0]), torch.tensor([True, False])
        with pytest.raises(ValueError, match="site 'y_unobserved'"):
            AutoPlanar(model).materialize(*args)
        AutoPlanar(config_enumerate(model)).materialize(*args)

    def test_support_that_depends_on_a_latent(self):
        """Fact 19: Pyro freezes the support of the first trace."""

        def model():
            alpha = pyro.sample("alpha", dist.Uniform(0.0, 1.0))
            pyro.sample("beta", dist.Uniform(0.0, 1.0 - alpha))

        with pytest.raises(ValueError, match=r"site 'beta': expected a fixed support.*beta_unit"):
            AutoPlanar(model).materialize()

    def test_bounds_that_do_not_move_are_fine(self):
        def model(low):
            pyro.sample("x", dist.Uniform(low, low + 1.0))

        AutoPlanar(model).materialize(torch.tensor(3.0))

    def test_distribution_without_a_support(self):
        """As those of ``pyro.contrib.bnn``; a guide that draws the site itself goes beside a flow."""

        class Doubled(dist.TorchDistribution):
            arg_constraints: ClassVar = {}
            has_rsample = True

            def __init__(self, loc):
                self.loc = loc
                super().__init__(loc.shape)

            def rsample(self, sample_shape=()):
                return 2 * (self.loc + torch.randn(torch.Size(sample_shape) + self.loc.shape))

            def log_prob(self, value):
                return dist.Normal(2 * self.loc, 2.0).log_prob(value)

        def model():
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            x = pyro.sample("x", Doubled(loc))
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

        def own():
            pyro.sample("x", Doubled(pyro.param("own_loc", torch.tensor(0.0))))

        with pytest.raises(ValueError, match=r"site 'x': .* support is, got Doubled.*hide=\['x'\]"):
            AutoPlanar(model).materialize()
        guide = AutoGuideList(model)
        guide.append(AutoPlanar(poutine.block(model, hide=["x"]), num_layers=1))
        guide.append(own)
        svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
        assert all(math.isfinite(svi.step()) for _ in range(3))

    def test_mixture_of_different_supports(self):
        def model():
            parts = dist.Uniform(torch.tensor([0.0, 5.0]), torch.tensor([1.0, 6.0]))
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))

        with pytest.raises(NotImplementedError, match="components have different supports"):
            AutoPlanar(model).materialize()

    def test_shape_that_changes(self):
        model, _ = hierarchy()
        guide = AutoPlanar(model).materialize(torch.zeros(4))
        guide(torch.ones(4))
        other = torch.zeros(5)
        refused = pytest.raises(
            ValueError,
            match=r"site 'theta': expected unconstrained shape \(4,\).*got \(5,\).*posterior_samples=globals",
        )
        for run in (
            guide.materialize,
            guide.density,
            lambda y: fit(model, guide, y, num_steps=2, progress=False),
            lambda y: diagnose(model, guide, y),
            lambda y: compare(model, {"planar": guide}, y),
            lambda y: to_arviz(model, guide, y, num_samples=10),
        ):
            with refused:
                run(other)
        with pytest.raises(ValueError, match="site 'y'"):  # Pyro's own
            SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(other)
        assert guide(torch.ones(4))["theta"].shape == (4,)  # and the guide is as it was

    def test_site_that_vanishes(self):
        def model(both):
            pyro.sample("x", dist.Normal(0.0, 1.0))
            if both:
                pyro.sample("y", dist.Normal(0.0, 1.0))

        guide = AutoPlanar(model).materialize(True)
        with pytest.raises(ValueError, match=r"site 'y': expected unconstrained shape \(\).*got None"):
            guide.materialize(False)
        assert set(guide(False)) == {"x", "y"}

    @pytest.mark.parametrize("validate", [False, True])
    def test_nan_in_the_data(self, validate):
        model, (y,) = hierarchy()
        y = y.clone()
        y[1] = float("nan")
        guide = AutoPlanar(model)
        with pyro.validation_enabled(validate):
            for run in (guide.materialize, guide, lambda y: fit(model, guide, y, progress=False)):
                with pytest.raises(ValueError, match=r"site 'y': .*without NaN, got 1 NaN in 4 values"):
                    run(y)
        assert not list(guide.parameters())

    def test_nan_behind_a_mask_is_fine(self):
        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=~y.isnan()):
                pyro.sample("y", dist.Normal(mu, 1.0, validate_args=False), obs=y)

        with pyro.validation_enabled(False):
            AutoPlanar(model).materialize(torch.tensor([1.0, float("nan")]))


class TestBeforeData:
    @pytest.mark.parametrize("call", ["median", "sample_posterior", "get_posterior", "get_transform"])
    def test_says_to_materialize(self, call):
        model, args = hierarchy()
        guide = AutoPlanar(model)
        with pytest.raises(RuntimeError, match="materialize"):
            getattr(guide, call)()
        guide.materialize(*args)
        getattr(guide, call)()

    def test_median_with_the_models_arguments(self):
        model, args = hierarchy()
        assert set(AutoPlanar(model).median(*args)) == {"mu", "theta"}
        assert AutoPlanar(model).quantiles([0.5], *args)["theta"].shape == (1, 4)


class TestLogProb:
    @pytest.fixture
    def guide(self):
        model, args = zoo.make_zoo()["log_normal"]
        return AutoPlanar(model).materialize(*args)

    def test_wrong_sites(self, guide):
        with pytest.raises(ValueError, match=r"samples: expected the sites \['scale'\], got \['mu'\]"):
            guide.log_prob({"mu": torch.ones(3)})

    def test_nan(self, guide):
        with pytest.raises(ValueError, match=r"samples\['scale'\]: .*without NaN"):
            guide.log_prob({"scale": torch.tensor([1.0, float("nan")])})

    def test_outside_the_support(self, guide):
        value = torch.tensor([1.0, -1.0], requires_grad=True)
        log_prob = guide.log_prob({"scale": value})
        assert log_prob.isfinite().tolist() == [True, False]
        assert log_prob[1] == -torch.inf
        log_prob[0].backward()
        assert value.grad.isfinite().all()

    def test_quantiles(self, guide):
        with pytest.raises(ValueError, match=r"quantiles: expected probabilities in \[0, 1\]"):
            guide.quantiles([0.5, 1.5])


class TestFit:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_steps": 0}, "num_steps: expected a positive integer, got 0"),
            ({"lr": -1.0}, "lr: expected a positive number"),
            ({"num_particles": 1.5}, "num_particles: expected a positive integer"),
            ({"loss": "elbo"}, r"loss: expected a pyro\.infer\.ELBO"),
            ({"optim": "adam"}, r"optim: expected an optimizer of pyro\.optim or torch\.optim"),
            ({"loss": Trace_ELBO(), "num_particles": 3}, "num_particles: expected None with a loss"),
        ],
    )
    def test_options(self, options, message):
        model, args = hierarchy()
        with pytest.raises(ValueError, match=message):
            fit(model, AutoPlanar(model), *args, **options)

    @pytest.mark.parametrize(
        ("args", "options", "message"),
        [
            ((), {"batches": 1}, "batches: expected an iterable or a callable of the step, got 1"),
            ((), {"batches": []}, "batches: expected at least one batch, got none"),
            ((1,), {"batches": [1]}, "batches: expected no further arguments"),
            ((1,), {"checkpoint": "/no/such/folder/file"}, "checkpoint: expected a file in a folder"),
        ],
    )
    def test_data_and_files(self, args, options, message):
        model, _ = hierarchy()
        with pytest.raises(ValueError, match=message):
            fit(model, AutoPlanar(model), *args, **options)

    def test_guide_that_is_no_guide(self):
        with pytest.raises(ValueError, match="guide: expected a callable, got 3"):
            fit(zoo.hierarchy, 3)

    def test_diagnose_needs_draws(self):
        model, args = hierarchy()
        with pytest.raises(ValueError, match="num_samples: expected at least 100, got 10"):
            diagnose(model, AutoPlanar(model), *args, num_samples=10)


def test_svi_without_fit_refuses_as_well():
    model, (y,) = hierarchy()
    svi = SVI(model, AutoPlanar(model), Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.raises(ValueError, match="site 'y'"):
        svi.step(y * float("nan"))
