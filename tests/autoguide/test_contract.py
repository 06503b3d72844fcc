"""Every line of the guide contract, on the zoo."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_sample, init_to_value
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam

from pyro_flowvi import (
    AutoCIF,
    AutoFlow,
    AutoPlanar,
)
from pyro_flowvi._program.log_weights import LogWeights
from tests import zoo
from tests.guides import BIJECTIVE, GUIDES, KINDS

BASIC = ("hierarchy", "log_normal", "dirichlet")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*found no sample sites configured for enumeration"),
]


def case(name):
    return zoo.make_zoo()[name]


def step(model, guide, args, loss):
    """Two steps of stock SVI, after which every parameter has moved."""
    before = [param.detach().clone() for param in guide.materialize(*args).parameters()]
    svi = SVI(model, guide, Adam({"lr": 1e-2}), loss)
    assert all(torch.tensor(svi.step(*args)).isfinite() for _ in range(2))
    assert not any(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))


@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize(
    "kind", [kind if kind in KINDS else pytest.param(kind, marks=pytest.mark.long) for kind in GUIDES]
)
class TestZoo:
    def test_objectives(self, kind, name):
        model, args = case(name)
        losses = [TraceEnum_ELBO(max_plate_nesting=2)]
        if name != "enumerated":
            losses += [
                Trace_ELBO(num_particles=3, vectorize_particles=name != "not_for_batches"),
                RenyiELBO(num_particles=2),
            ]
            losses += [TraceGraph_ELBO()] if kind != "mixture" else []
        for loss in losses:
            step(model, GUIDES[kind](model), args, loss)

    def test_draws_are_in_the_support_and_scored(self, kind, name):
        model, args = case(name)
        guide = GUIDES[kind](model).materialize(*args)
        draws = guide.sample_posterior(7)
        for site, value in draws.items():
            support = guide.prototype_trace.nodes[site]["fn"].support
            shape = guide.prototype_trace.nodes[site]["value"].shape
            assert value.shape == (7,) + shape
            assert support.check(value).all()
        log_prob = guide.log_prob(draws)
        assert log_prob.shape == (7,)
        assert log_prob.isfinite().all()
        if not guide.lower_bound:
            single = {site: value[0] for site, value in draws.items()}
            torch.testing.assert_close(guide.log_prob(single), log_prob[0])

    def test_constrained_log_prob_is_what_pyro_scores(self, kind, name):
        """log_prob of a draw equals the guide trace's own log density."""
        if kind == "cif":
            pytest.skip("an estimate: test_continuously_indexed.py")
        model, args = case(name)
        guide = GUIDES[kind](model).materialize(*args)
        trace = poutine.trace(guide).get_trace(*args)
        values = {site: trace.nodes[site]["value"].detach() for site in guide._unconstrained_shapes}
        torch.testing.assert_close(guide.log_prob(values), trace.log_prob_sum(), rtol=1e-6, atol=1e-6)

    def test_summaries(self, kind, name):
        model, args = case(name)
        guide = GUIDES[kind](model).materialize(*args)
        median, quantiles = guide.median(), guide.quantiles([0.1, 0.5, 0.9])
        for site, value in median.items():
            assert value.shape == guide.prototype_trace.nodes[site]["value"].shape
            assert quantiles[site].shape == (3,) + value.shape
            torch.testing.assert_close(quantiles[site][1], value)
            support = guide.prototype_trace.nodes[site]["fn"].support
            assert support.check(quantiles[site]).all()
            if support.event_dim == 0:
                assert (quantiles[site].diff(dim=0) > 0).all()

    def test_state_dict_round_trip(self, kind, name):
        model, args = case(name)
        guide = GUIDES[kind](model).materialize(*args)
        twin = GUIDES[kind](model)
        twin.load_state_dict(guide.state_dict())  # before it has seen data
        assert twin.state_dict().keys() == guide.state_dict().keys()
        twin.materialize(*args)
        for key, value in guide.state_dict().items():
            assert torch.equal(twin.state_dict()[key], value)

    def test_particles_vectorize(self, kind, name):
        model, args = case(name)
        guide = GUIDES[kind](model).materialize(*args)
        assert LogWeights(model, guide, args).vectorized == (name != "not_for_batches")


@pytest.mark.parametrize("name", BASIC)
@pytest.mark.parametrize("kind", GUIDES)
class TestDropIn:
    def test_elbo_module(self, kind, name):
        model, args = case(name)
        guide = GUIDES[kind](model).materialize(*args)
        elbo = Trace_ELBO(num_particles=2)(model, guide)
        optimizer = torch.optim.Adam(elbo.parameters(), lr=1e-2)
        before = guide.affine.loc.detach().clone()
        elbo(*args).backward()
        optimizer.step()
        assert not torch.equal(guide.affine.loc, before)

    @pytest.mark.parametrize("parallel", [False, True])
    def test_predictive(self, kind, name, parallel):
        model, args = case(name)
        guide = GUIDES[kind](model).materialize(*args)
        with pyro.validation_enabled(False):
            draws = Predictive(model, guide=guide, num_samples=5, parallel=parallel)(*args)
        for site in guide._unconstrained_shapes:
            value = guide.prototype_trace.nodes[site]["value"]
            assert draws[site].numel() == 5 * value.numel()

    def test_neutra(self, kind, name):
        model, args = case(name)
        if kind not in BIJECTIVE:
            with pytest.raises(ValueError, match="NeuTraReparam only supports") as error:
                NeuTraReparam(GUIDES[kind](model).materialize(*args)).reparam(model)(*args)
            assert "no bijection of the latents" in str(error.value.__cause__)
            return
        guide = GUIDES[kind](model).materialize(*args)
        neutra = NeuTraReparam(guide)
        kernel = NUTS(neutra.reparam(model), max_tree_depth=3)
        mcmc = MCMC(kernel, num_samples=3, warmup_steps=3, disable_progbar=True)
        mcmc.run(*args)
        (draws,) = mcmc.get_samples().values()
        values = neutra.transform_sample(draws.unsqueeze(-2))  # left of the model's plate
        assert set(values) == set(guide._unconstrained_shapes)

    def test_module_local_params(self, kind, name):
        """Fact 14: with SVI, Pyro's guides with plain parameters raise AttributeError."""
        model, args = case(name)
        with pyro.settings.context(module_local_params=True):
            step(model, GUIDES[kind](model), args, Trace_ELBO())
            elbo = Trace_ELBO()(model, GUIDES[kind](model).materialize(*args))
            elbo(*args).backward()


def test_neutra_density_is_the_models():
    """The reparameterised model's density is p(x(z)) |dx/dz|."""
    model, args = case("hierarchy")
    guide = AutoPlanar(model, num_layers=2).materialize(*args)
    reparam = NeuTraReparam(guide).reparam(model)
    z = torch.randn(guide.latent_dim)
    trace = poutine.trace(poutine.condition(reparam, {"mu_shared_latent": z})).get_trace(*args)
    x, log_det = guide.get_transform().forward_and_log_det(z)
    values = {"mu": x[0], "theta": x[1:]}
    truth = poutine.trace(poutine.condition(model, values)).get_trace(*args).log_prob_sum() + log_det
    torch.testing.assert_close(trace.log_prob_sum(), truth)


class TestSetUp:
    def test_parameters_exist_after_materialize(self):
        model, args = case("far")
        guide = AutoPlanar(model, num_layers=2)
        assert not list(guide.parameters())
        assert guide.materialize(*args) is guide
        assert {name for name, _ in guide.named_parameters()} == {
            f"flow.parts.{name}" for name in ("0.w", "0.u", "0.b", "1.loc", "1.log_scale")
        }

    def test_set_up_is_not_captured(self):
        """A parameter trace of the first call holds the guide's parameters and nothing of the model's."""

        def model():
            pyro.param("from_the_model", torch.ones(()))
            pyro.sample("x", dist.Normal(0.0, 1.0))

        guide = AutoPlanar(model, name="guide")
        with poutine.trace(param_only=True) as capture:
            guide()
        assert {name.split(".")[0] for name in capture.trace.nodes} == {"guide"}

    def test_first_call_inside_vectorized_particles(self):
        model, args = case("hierarchy")
        guide = AutoPlanar(model)
        with pyro.plate("particles", 6, dim=-2):
            guide(*args)
        assert guide.latent_dim == 5

    def test_starts_from_init_loc_fn_and_init_scale(self):
        """Fact 9: Pyro's flow guide ignores its starting point."""
        model, args = case("far")
        init = init_to_value(values={"mu": torch.tensor(100.0)})
        guide = AutoPlanar(model, init_loc_fn=init, init_scale=0.01).materialize(*args)
        draws = guide.sample_posterior(2000)["mu"]
        assert draws.mean() == pytest.approx(100.0, abs=0.01)
        assert draws.std() == pytest.approx(0.01, rel=0.1)

    @pytest.mark.parametrize("affine", ["lower", "elementwise", "low_rank"])
    def test_affine_kinds_start_alike(self, affine):
        model, args = case("hierarchy")
        guide = AutoPlanar(model, affine=affine, init_loc_fn=init_to_sample, structure=None)
        draws = guide.materialize(*args).get_posterior().sample((4000,))
        torch.testing.assert_close(draws.mean(0), guide.affine.loc.detach(), atol=0.02, rtol=0.0)
        torch.testing.assert_close(draws.std(0), torch.full((5,), 0.1), atol=0.02, rtol=0.0)

    def test_without_affine_the_base_is_standard_normal(self):
        model, args = case("hierarchy")
        guide = AutoPlanar(model, affine=None, structure=None).materialize(*args)
        assert guide.affine is None
        draws = guide.get_posterior().sample((4000,))
        assert draws.std(0) == pytest.approx(torch.ones(5), abs=0.1)

    def test_many_latents_get_a_low_rank_affine(self):
        def model():
            pyro.sample("x", dist.Normal(torch.zeros(201), 1.0).to_event(1))

        names = [name for name, _ in AutoPlanar(model).materialize().named_parameters()]
        assert "flow.parts.1.factor" in names
        assert "flow.parts.1.lower" not in names


class TestLocals:
    @staticmethod
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("data", len(y), subsample_size=4) as index:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y[index])

    def test_subsampled_locals_are_refused(self):
        """Fact 8: Pyro freezes the dimension of the first subsample, in silence."""
        with pytest.raises(ValueError, match=r"site 'theta'.*plate 'data' \(4 of 12\).*AutoGuideList"):
            AutoCIF(self.model).materialize(torch.randn(12))
        assert AutoPlanar(self.model).materialize(torch.randn(12))()["theta"].shape == (4,)

    @pytest.mark.long
    def test_the_alternative_works(self):
        guide = AutoGuideList(self.model)
        guide.append(AutoPlanar(poutine.block(self.model, hide=["theta"])))
        guide.append(AutoNormal(poutine.block(self.model, expose=["theta"])))
        svi = SVI(self.model, guide, Adam({"lr": 0.05}), Trace_ELBO())
        y = 5 + torch.randn(12)
        first = sum(svi.step(y) for _ in range(20))
        for _ in range(1500):
            svi.step(y)
        assert sum(svi.step(y) for _ in range(20)) < first
        # The marginal model y ~ N(mu, 1 + tau²) locates mu near the mean of the data.
        assert guide.median(y)["mu"] == pytest.approx(y.mean(), abs=1.0)

    def test_explicit_subsample_without_locals_is_left_to_the_model(self):
        seen = []

        def model(y, index):
            mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
            with pyro.plate("data", len(y), subsample=index) as drawn:
                seen.append(drawn)
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y[drawn])

        guide = AutoPlanar(model)
        svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
        index = torch.tensor([1, 3])
        svi.step(torch.randn(12), index)
        assert all(torch.equal(drawn, index) for drawn in seen)


class TestPrediction:
    """After training with y, a call without it predicts: y is then no latent of the guide."""

    @staticmethod
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(w * x, 0.1), obs=y)

    @pytest.mark.parametrize("parallel", [False, True])
    @pytest.mark.parametrize("rows", [5, 9])
    def test_posterior_predictive(self, parallel, rows):
        guide = AutoPlanar(self.model)
        step(self.model, guide, (torch.ones(5), torch.ones(5)), Trace_ELBO())
        draws = Predictive(self.model, guide=guide, num_samples=3, parallel=parallel)(torch.ones(rows))
        assert draws["y"].shape == (3, rows)

    def test_model_and_guide_in_one_module(self):
        class Prior(PyroModule):
            def __init__(self):
                super().__init__()
                self.w = PyroSample(dist.Normal(0.0, 1.0))

            def forward(self, y):
                return pyro.sample("y", dist.Normal(self.w, 1.0), obs=y)

        class Both(PyroModule):
            def __init__(self):
                super().__init__()
                self.prior = Prior()
                self.guide = AutoPlanar(self.prior)

        assert set(Both().guide(torch.tensor(1.0))) == {"prior.w"}

    def test_distribution_as_argument(self):
        guide = AutoPlanar(lambda prior: pyro.sample("x", prior))
        assert set(guide(dist.Normal(0.0, 1.0))) == {"x"}

    def test_empty_site(self):
        def model():
            pyro.sample("empty", dist.Normal(0.0, 1.0).expand([0]).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0))

        guide = AutoPlanar(model).materialize()
        assert guide.median()["empty"].shape == (0,)
        assert guide.quantiles([0.1, 0.9])["empty"].shape == (2, 0)


@pytest.mark.parametrize("build", ["spline", "affine_coupling", "affine_autoregressive", "planar", "radial"])
def test_pyros_own_transforms(build):
    """Pyro's planar and radial have no inverse: a draw is scored from its own forward pass."""
    model, args = case("hierarchy")
    make = getattr(dist.transforms, build)
    guide = AutoFlow(model, lambda dim: make(dim))
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert all(torch.tensor(svi.step(*args)).isfinite() for _ in range(3))
    assert guide.median()["theta"].shape == (4,)


def test_every_parameter_has_one_name():
    """Fact 6: in Pyro one Parameter is registered under two names, and JitTrace_ELBO fails on it."""
    model, args = case("hierarchy")
    guide = AutoPlanar(model).materialize(*args)
    with poutine.trace(param_only=True) as capture:
        guide(*args)
    shown = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
    assert len(shown) == len({id(param) for param in shown}) == len(list(guide.parameters()))


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_elbo():
    model, args = case("hierarchy")
    step(model, AutoPlanar(model, num_layers=2), args, JitTrace_ELBO(ignore_jit_warnings=True))


def test_every_coordinate_is_transformed():
    """Fact 17: a coupling without permutation leaves half of the coordinates as they were."""
    for kind in BIJECTIVE:
        guide = GUIDES[kind](zoo.hierarchy, affine=None).materialize(torch.zeros(4))
        with torch.no_grad():
            for param in guide.parameters():
                param.add_(0.5 * torch.randn_like(param))
        x = torch.randn(50, 5)
        assert ((guide.get_transform()(x) - x).abs().amax(0) > 1e-3).all()


def test_number_of_draws():
    model, args = case("hierarchy")
    guide = AutoPlanar(model).materialize(*args)
    assert guide.sample_posterior(np.int64(3))["theta"].shape == (3, 4)
    assert guide.sample_posterior((2, 3))["theta"].shape == (2, 3, 4)
    assert guide.log_prob(guide.sample_posterior((2, 3))).shape == (2, 3)
    assert guide.sample_posterior(0)["theta"].shape == (0, 4)
    assert guide.sample_posterior()["mu"].shape == ()


def test_a_model_that_runs_only_near_its_start():
    """The check of supports looks around the start; a model that fails there is not refused."""

    def model():
        b = pyro.sample("b", dist.Uniform(torch.tensor(-1.0), torch.tensor(1.0)))
        torch.linalg.cholesky((b - 0.29).reshape(1, 1))

    init = init_to_value(values={"b": torch.tensor(0.3)})
    for _ in range(5):
        AutoPlanar(model, init_loc_fn=init).materialize()
