"""Fits of flows outside Pyro: on which programs, and that all is as it would be inside."""

import copy
import importlib
import random
import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_flowvi import AutoCIF, AutoNICE, AutoRealNVP, diagnose, fit
from pyro_flowvi._compile.indexed_step import IndexedStep
from pyro_flowvi._compile.log_density import traced
from pyro_flowvi.distributions import FlowDistribution
from pyro_flowvi.infer import CompileWarning
from pyro_flowvi.infer._checkpoint import Checkpoint

fitting = importlib.import_module("pyro_flowvi.infer._fit")
OPTIONS = {"seed": 0, "progress": False}


def data():
    torch.manual_seed(0)
    group, x = torch.randint(0, 4, (40,)), torch.randn(40)
    return group, x, x + torch.randn(4)[group] + 0.5 * torch.randn(40)


def regression(index):
    def model(group, x, y):
        mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(2.0))
        slope, s = pyro.sample("slope", dist.Normal(0.0, 5.0)), pyro.sample("s", dist.HalfNormal(2.0))
        with pyro.plate("groups", 4):
            a = pyro.sample("a", dist.Normal(mu, tau))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(index(a, group) + slope * x, s), obs=y)

    return model


plain = regression(lambda a, group: a[group])
broadcasting = regression(lambda a, group: a[..., group])


def test_a_model_that_does_not_broadcast_is_fitted_as_one_that_does(outside):
    """The same steps on the same noise: losses agree to rounding, and so do the verdict's figures."""
    torch.set_default_dtype(torch.float64)
    try:
        losses, figures = [], []
        for model in (broadcasting, plain):
            pyro.clear_param_store()
            guide = AutoRealNVP(model, num_layers=2)
            losses.append(fit(model, guide, *data(), num_steps=60, **OPTIONS).losses)
            figures.append(diagnose(model, guide, *data(), num_samples=1000, seed=1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert outside == [True, True]
    assert torch.allclose(losses[0], losses[1], rtol=1e-6)
    assert figures[0].elbo == pytest.approx(figures[1].elbo, rel=1e-6)
    assert figures[0].khat == pytest.approx(figures[1].khat, abs=1e-3)


@pytest.mark.parametrize(
    "call",
    [
        {"loss": Trace_ELBO()},
        {"optim": pyro.optim.Adam({"lr": 0.01})},
        {"compile": False},
        {"validation": data()},
    ],
    ids=lambda call: next(iter(call)),
)
def test_what_the_user_chooses_is_left_to_pyro(outside, call):
    fit(broadcasting, AutoNICE(broadcasting, num_layers=2), *data(), num_steps=60, **call, **OPTIONS)
    assert outside == [False]


def one_extra(model):
    return AutoCIF(model, num_layers=2, num_extra=1)


class OwnDraws(AutoCIF):
    def sample_latent(self, *args, **kwargs):
        return super().sample_latent(*args, **kwargs)


@pytest.mark.parametrize("make", [AutoNormal, one_extra, OwnDraws])
def test_other_guides_are_left_to_pyro(outside, make):
    fit(broadcasting, make(broadcasting), *data(), num_steps=60, **OPTIONS)
    assert outside == [False]


@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.usefixtures("double")
def test_a_continuously_indexed_flow(outside, order):
    """A step's loss and gradient, against autograd's of the auxiliary ELBO with the density's own
    parameters held."""

    def model():
        y = torch.tensor([0.3, -0.2, 1.4])
        a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(a.unsqueeze(-1), b.unsqueeze(-1)).expand([3]).to_event(1), obs=y)

    guide = AutoCIF(model, num_layers=2, hidden=(6,), order=order).materialize()
    flow, density = guide.trained_map(model), guide.density()
    with torch.no_grad():
        for param in flow.parameters():
            param += 0.1 * torch.randn_like(param)
    params = list(flow.parameters())
    step = IndexedStep(flow, params, traced(density, 32))
    torch.manual_seed(1)
    found = step._gradient().clone()
    torch.manual_seed(1)
    drawn = flow(torch.randn(32, 4))
    log_q = FlowDistribution(None, copy.deepcopy(flow).requires_grad_(False)).log_prob(drawn)
    log_r = dist.Normal(0.0, 1.0).log_prob(drawn[:, 2:]).sum(-1)
    loss = (log_q - log_r - density.log_density(drawn[:, :2])).mean()
    expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, params)])
    step.leave()
    assert step._loss == pytest.approx(float(loss.detach()), rel=1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    result = fit(model, AutoCIF(model, num_layers=2, order=order), num_steps=60, **OPTIONS)
    assert outside == [True]
    assert result.losses[-10:].mean() < result.losses[:10].mean() + 0.1


class TestProgramsThatChange:
    """A graph would hold what they did when it was recorded."""

    def test_a_count_of_calls(self, outside):
        calls = [0]

        def model():
            calls[0] += 1
            pyro.sample("x", dist.Normal(float(calls[0] > 1000), 1.0))

        fit(model, AutoNICE(model, num_layers=2), num_steps=60, **OPTIONS)
        assert outside == [False]

    @pytest.mark.filterwarnings("ignore:the model is run draw by draw")
    @pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(()).item()])
    def test_noise_of_its_own(self, outside, draw):
        def model():
            pyro.sample("x", dist.Normal(draw(), 1.0))

        fit(model, AutoNICE(model, num_layers=2), num_steps=60, **OPTIONS)
        assert outside == [False]

    def test_a_handler_around_the_fit(self, outside):
        def model():
            pyro.sample("x", dist.Normal(0.0, 1.0))

        with poutine.scale(scale=0.5):
            fit(model, AutoNICE(model, num_layers=2), num_steps=60, **OPTIONS)
        assert outside == [False]

    def test_another_model_than_the_guides(self, outside):
        """The guide was built for the model; the data enter with another one of the same latents."""

        def prior():
            return pyro.sample("x", dist.Normal(0.0, 1.0))

        def posterior():
            pyro.sample("y", dist.Normal(prior(), 0.1), obs=torch.tensor(2.0))

        guide = AutoNICE(prior, num_layers=2)
        fit(posterior, guide, num_steps=60, **OPTIONS)
        assert outside == [False]


def test_enumerated_sites_are_summed_out(outside):
    """A mixture of two normals whose indicator Pyro enumerates; the posterior of its centre by quadrature."""
    y = torch.tensor([-1.9, 2.2, 2.0, -2.1, 1.8])

    def model():
        centre = pyro.sample("centre", dist.Normal(2.0, 1.0))
        with pyro.plate("rows", 5):
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal((2.0 * k - 1.0) * centre, 0.5), obs=y)

    guide = AutoRealNVP(model, num_layers=2)
    fit(model, guide, num_steps=300, **OPTIONS)
    assert outside == [True]
    c = torch.linspace(-3.0, 6.0, 20001, dtype=torch.float64)
    both = torch.stack([dist.Normal(s * c.unsqueeze(-1), 0.5).log_prob(y.double()) for s in (1.0, -1.0)])
    weights = (dist.Normal(2.0, 1.0).log_prob(c) + both.logsumexp(0).sum(-1)).softmax(0)
    mean = float((weights * c).sum())
    sd = float((weights * (c - mean) ** 2).sum().sqrt())
    draws = guide.sample_posterior(20000)["centre"].double()
    assert float(draws.mean()) == pytest.approx(mean, abs=0.1 * sd)
    assert float(draws.std()) == pytest.approx(sd, rel=0.1)


def test_what_has_to_run_draw_by_draw_is_named_once():
    """A latent that Python reads: no graph holds it, and the model does not broadcast."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        scale = 2.0 if float(x.detach()[0]) > 0.0 else 1.0
        pyro.sample("y", dist.Normal(x[1], scale), obs=torch.tensor(0.5))

    with pytest.warns(CompileWarning) as told:
        fit(model, AutoNICE(model, num_layers=2), num_steps=5, compile=False, **OPTIONS)
    messages = [str(w.message) for w in told if "draw by draw" in str(w.message)]
    assert len(messages) == 1
    assert "float(x.detach()[0])" in messages[0]
    assert "a[..., group]" in messages[0]


def test_memory_of_parameters_is_given_back():
    """A view that a user holds sees the trained values."""
    guide = AutoRealNVP(broadcasting, num_layers=2, structure=None).materialize(*data())
    held = guide.affine.loc.data.view(-1)
    fit(broadcasting, guide, *data(), num_steps=60, **OPTIONS)
    assert held.data_ptr() == guide.affine.loc.data_ptr()


def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path, monkeypatch, outside):
    """Bit for bit, from the middle of the second round."""
    monkeypatch.setattr(fitting, "CHECKPOINT_SECONDS", 0.0)
    write, half = Checkpoint.write, tmp_path / "half"

    def keep_one(self, loop, identity):
        write(self, loop, identity)
        if loop.progress.step == 220:
            shutil.copy(self.path, half)

    monkeypatch.setattr(Checkpoint, "write", keep_one)
    results = []
    for path in (tmp_path / "whole", half):
        pyro.clear_param_store()
        guide = AutoRealNVP(plain, num_layers=2, name="guide")
        options = {"num_steps": 1000, "tolerance": 1e-9, "checkpoint": path}
        results.append(fit(plain, guide, *data(), **options, **OPTIONS))
        del guide
    assert outside == [True, True]
    assert len(results[0].losses) > 400
    assert torch.equal(results[0].losses, results[1].losses)
    for name, value in results[0].best_state.items():
        assert torch.equal(value, results[1].best_state[name])
