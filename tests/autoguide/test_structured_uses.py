"""Guides that run the model's priors, in the uses that single models ask for."""

import copy
import gc
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam

from pyro_flowvi import AutoFlow, AutoPlanar, CompiledSVI
from tests import zoo
from tests.autoguide.test_structured_contract import ALL, OBJECTIVES, case, made, same_state, step
from tests.hierarchies import scale_without_prior, schools


class TestStore:
    def trained(self, model, args, **options):
        guide = AutoPlanar(model, name="guide", **options).materialize(*args)
        svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(5):
            svi.step(*args)
        return guide

    @pytest.mark.parametrize("later", ["auto", "program"])
    @pytest.mark.parametrize("name", ["schools", "counties", "loop", "slopes"])
    def test_a_restored_store_is_adopted(self, name, later):
        """As in a new process."""
        model, args = case(name)
        guide = self.trained(model, args)
        state = {key: value.clone() for key, value in guide.state_dict().items()}
        file = io.BytesIO()
        torch.save(pyro.get_param_store().get_state(), file)
        del guide
        gc.collect()
        pyro.clear_param_store()
        file.seek(0)
        pyro.get_param_store().set_state(torch.load(file, weights_only=False))
        fresh = AutoPlanar(model, name="guide", structure=later).materialize(*args)
        fresh.sample_posterior(3)
        assert fresh.structure.taken
        assert fresh.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())
        SVI(model, fresh, Adam({"lr": 0.1}), Trace_ELBO()).step(*args)
        assert not any(torch.equal(p, state[key]) for key, p in fresh.named_parameters())

    def test_a_store_of_a_flat_guide(self):
        """A guide that would take the structure is flat where the store says so."""
        model, args = case("schools")
        flat = self.trained(model, args, structure=None)
        state = {key: value.clone() for key, value in flat.state_dict().items()}
        saved = copy.deepcopy(pyro.get_param_store().get_state())
        del flat
        gc.collect()
        pyro.clear_param_store()
        pyro.get_param_store().set_state(saved)
        fresh = AutoPlanar(model, name="guide").materialize(*args)
        fresh.sample_posterior(2)
        assert not fresh.structure.taken
        assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())
        step(model, fresh, args, Trace_ELBO())

    def test_a_state_of_a_flat_guide(self):
        model, args = case("schools")
        flat = AutoPlanar(model, structure=None).materialize(*args)
        fresh = AutoPlanar(model)
        fresh.load_state_dict(flat.state_dict())
        fresh.materialize(*args)
        assert not fresh.structure.taken
        assert "restored" in str(fresh.structure)
        assert same_state(fresh, flat)
        values = flat.sample_posterior(3)
        torch.testing.assert_close(fresh.log_prob(values), flat.log_prob(values))

    def test_a_state_of_a_structured_guide_in_a_flat_one(self):
        model, args = case("schools")
        structured = AutoPlanar(model).materialize(*args)
        with pytest.raises(RuntimeError, match=r"Unexpected key|Missing key|size mismatch"):
            AutoPlanar(model, structure=None).materialize(*args).load_state_dict(structured.state_dict())


# -- one guide, other uses -----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["schools", "counties", "slopes"])
def test_jit_trace_elbo(name):
    model, args = case(name)
    guide = made("planar", model, args)
    step(model, guide, args, JitTrace_ELBO(ignore_jit_warnings=True))


@pytest.mark.parametrize("name", ["schools", "three_levels", "counties", "loop"])
def test_the_bound_is_pyros(name):
    """The mean of log p - log q over draws of the guide, by stock objectives and by log_prob."""
    model, args = case(name)
    guide = made("realnvp", model, args)
    nesting = 3 if name == "three_levels" else 1
    loss = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=nesting)
    bound = -loss.loss(model, guide, *args)
    draws = guide.sample_posterior(400)
    log_q, log_p = guide.log_prob(draws).detach(), []
    for i in range(len(log_q)):
        values = {site: value[i] for site, value in draws.items()}
        log_p.append(poutine.trace(poutine.condition(model, values)).get_trace(*args).log_prob_sum())
    weights = torch.stack(log_p) - log_q
    assert weights.mean() == pytest.approx(bound, abs=5.0 * float(weights.std()) / 20.0)


def compiled_and_eager(model, args, loss, steps=40, kind="planar", compile=True):
    found = []
    for make in (SVI, lambda *a: CompiledSVI(*a, compile=compile)):
        gc.collect()
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        guide = made(kind, model, args, name="guide")
        svi = make(model, guide, pyro.optim.Adam({"lr": 0.01}), loss())
        losses = [svi.step(*args) for _ in range(steps)]
        values = {key: value.detach().clone() for key, value in pyro.get_param_store().items()}
        found.append((losses, values, svi))
        del guide
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("schools", marks=pytest.mark.long),
        pytest.param("slopes", marks=pytest.mark.long),
        pytest.param("counties", marks=pytest.mark.slow),
        pytest.param("padded", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("objective", ["Trace, vectorized", "STL"])
def test_compiled_equals_eager(name, objective):
    if torch.get_default_dtype() != torch.float64:
        pytest.skip("compares to 1e-8")
    model, args = case(name)
    (losses, values, _), (its_losses, its_values, svi) = compiled_and_eager(
        model, args, OBJECTIVES[objective]
    )
    assert svi.compiled, svi.cause
    assert its_losses == pytest.approx(losses, rel=1e-8, abs=1e-8)
    for key, value in values.items():
        torch.testing.assert_close(its_values[key], value, rtol=1e-8, atol=1e-8)


class TestEnumeration:
    @staticmethod
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(theta + 4.0 * z, 0.5), obs=y)

    y = (0.1, 4.2, 0.5, -0.3, 3.8)

    @pytest.mark.parametrize("kind", ALL)
    def test_a_discrete_site_of_the_model(self, kind):
        y = torch.tensor(self.y)
        guide = made(kind, self.model, (y,))
        assert guide.structure.found.messages == {"theta": {"mu", "tau"}}
        assert set(guide.sample_posterior(2)) == {"mu", "tau", "theta"}
        step(self.model, guide, (y,), TraceEnum_ELBO(max_plate_nesting=1))

    def test_a_prior_after_a_discrete_site_is_unknown(self):
        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
            with pyro.plate("groups", len(y)):
                z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                theta = pyro.sample("theta", dist.Normal(mu + z, 1.0))
                other = pyro.sample("other", dist.Normal(mu, 1.0))
                pyro.sample("y", dist.Normal(theta + other, 0.5), obs=y)

        y = torch.tensor(self.y)
        guide = AutoPlanar(model).materialize(y)
        assert guide.structure.found.messages == {"other": {"mu"}}
        assert guide.structure.found.roots == ("mu", "theta")
        step(model, guide, (y,), TraceEnum_ELBO(max_plate_nesting=1))


def test_in_a_guide_list():
    """Of a part of the latents: a prior that what is hidden has no part in is known."""
    model, args = case("counties")
    guide = AutoGuideList(model)
    guide.append(AutoPlanar(poutine.block(model, hide=["sigma"])))
    guide.append(AutoNormal(poutine.block(model, expose=["sigma"])))
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert all(torch.tensor(svi.step(*args)).isfinite() for _ in range(3))
    assert guide[0].structure.taken
    assert guide[0].structure.found.messages == {"a": {"mu", "tau"}}


def test_in_a_guide_list_without_the_parent():
    """The prior of what is left depends on a latent that another guide has."""
    model, args = case("counties")
    guide = AutoGuideList(model)
    guide.append(AutoPlanar(poutine.block(model, hide=["tau"])))
    guide.append(AutoNormal(poutine.block(model, expose=["tau"])))
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert all(torch.tensor(svi.step(*args)).isfinite() for _ in range(3))
    assert "a" not in guide[0].structure.found.messages
    first, second = (guide[0].sample_posterior(2)["a"] for _ in range(2))
    assert not torch.equal(first, second)


def test_keyword_arguments():
    def model(y, *, scale, known=True):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, scale))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y if known else None)

    y, kwargs = torch.randn(4), {"scale": torch.tensor(0.3)}
    guide = AutoPlanar(model).materialize(y, **kwargs)
    assert guide.structure.taken
    step(model, guide, (y,), Trace_ELBO(), kwargs)
    assert guide.median(y, **kwargs)["theta"].shape == (4,)
    draws = Predictive(model, guide=guide, num_samples=3)(y, known=False, **kwargs)
    assert draws["y"].shape == (3, 4)


class TestOtherData:
    """The priors are those of the data that the guide was set up with, until it is set up again."""

    @staticmethod
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(w * x, 1e-3))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    def test_materialize_reads_the_priors_again(self):
        x, y = torch.ones(4), torch.zeros(4)
        guide = AutoPlanar(self.model).materialize(x, y)
        state = copy.deepcopy(guide.state_dict())
        guide.materialize(-2.0 * x, y)
        assert all(torch.equal(value, state[key]) for key, value in guide.state_dict().items())
        with torch.no_grad():  # no messages
            guide.get_transform()[-1].log_weight.fill_(-60.0)
            guide.get_transform()[-1].slope.zero_()
        draws = guide.sample_posterior(500)
        slope = (draws["theta"].mean(-1) * draws["w"]).mean() / draws["w"].square().mean()
        assert slope == pytest.approx(-2.0, abs=0.05)

    def test_steps_on_other_data(self):
        x, y = torch.ones(4), torch.randn(4)
        guide = AutoPlanar(self.model).materialize(x, y)
        step(self.model, guide, (2.0 * x, y + 1.0), Trace_ELBO())

    def test_prediction_for_other_rows(self):
        x, y = torch.ones(4), torch.randn(4)
        guide = AutoPlanar(schools).materialize(y, x)
        draws = guide.sample_posterior(5)
        new = Predictive(schools, posterior_samples={name: draws[name] for name in ("mu", "tau")})
        assert new(torch.zeros(9), torch.ones(9))["theta"].shape == (5, 9)


def test_parameters_of_the_model():
    """Scales that are trained with the guide, which sees them as they are."""
    y = 3.0 * torch.randn(6)
    guide = AutoPlanar(scale_without_prior).materialize(y)
    svi = SVI(scale_without_prior, guide, Adam({"lr": 0.05}), Trace_ELBO())
    assert all(torch.tensor(svi.step(y)).isfinite() for _ in range(5))
    assert pyro.param("scale") != 1.0
    with torch.no_grad():
        guide.get_transform()[-1].log_weight.fill_(-60.0)
        guide.get_transform()[-1].slope.zero_()
        for key, param in guide.named_parameters():
            if "by_root" in key or "shapes" in key:
                param.zero_()
        pyro.param("scale").unconstrained().fill_(-12.0)
    draws = guide.sample_posterior(4)
    torch.testing.assert_close(draws["theta"], draws["mu"].unsqueeze(-1).expand(4, 6), rtol=0.0, atol=1e-3)


class Groups(PyroModule):
    def __init__(self):
        super().__init__()
        self.mu = PyroSample(dist.Normal(0.0, 3.0))
        self.theta = PyroSample(lambda self: dist.Normal(self.mu, 0.5).expand([4]).to_event(1))

    def forward(self, y):
        pyro.sample("y", dist.Normal(self.theta, 1.0).to_event(1), obs=y)


def test_a_module():
    model, y = Groups(), torch.randn(4)
    guide = AutoPlanar(model).materialize(y)
    assert guide.structure.found.messages == {"theta": {"mu"}}
    step(model, guide, (y,), Trace_ELBO())
    twin = copy.deepcopy(guide)
    assert set(twin.sample_posterior(2)) == {"mu", "theta"}


@pytest.mark.parametrize("objective", ["Trace", "Trace, vectorized"])
def test_module_local_params(objective):
    model, args = case("schools")
    with pyro.settings.context(module_local_params=True):
        step(model, made("realnvp", model, args), args, OBJECTIVES[objective]())


def test_names_in_the_store():
    model, args = case("schools")
    guide = made("planar", model, args, name="mine")
    guide(*args)
    assert set(pyro.get_param_store()) == {
        f"mine.{name.removeprefix('flow.')}" for name, _ in guide.named_parameters()
    }


def test_masks_are_read_at_every_call():
    model, (y, mask) = case("padded")
    guide = made("realnvp", model, (y, mask))
    assert guide.latent_dim == 1 + 2 * int(mask.sum())
    trace = poutine.trace(guide).get_trace(y, mask)
    assert trace.nodes["z"]["value"].shape == mask.shape


def test_a_flow_of_ones_own():
    guide = AutoFlow(zoo.hierarchy, lambda dim: dist.transforms.affine_coupling(dim), structure="program")
    guide.materialize(torch.zeros(4))
    step_args = (torch.zeros(4),)
    svi = SVI(zoo.hierarchy, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert all(torch.tensor(svi.step(*step_args)).isfinite() for _ in range(3))
