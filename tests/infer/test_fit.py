"""fit: what it promises."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from pyro.optim import ExponentialLR

from pyro_flowvi import AutoPlanar, FitDiverged, fit
from pyro_flowvi._program.log_weights import LogWeights
from pyro_flowvi.infer import CannotCompile
from pyro_flowvi.objectives._choice import objective_for
from tests import zoo

SCHEDULE = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.99}


def case(name):
    return zoo.make_zoo()[name]


def test_result():
    model, args = case("hierarchy")
    guide = AutoPlanar(model, num_layers=2)
    result = fit(model, guide, *args, num_steps=60, seed=0, progress=False)
    assert result.guide is guide
    assert result.losses.shape == (60,)
    assert result.stop_reason == "completed"
    assert result.wall_time > 0
    assert set(result.best_state) == {
        f"{guide.name}.{name.removeprefix('flow.')}" for name, _ in guide.named_parameters()
    }
    for name, param in guide.named_parameters():
        assert torch.equal(result.best_state[f"{guide.name}.{name.removeprefix('flow.')}"], param)
    assert "completed: 60 steps" in repr(result)


def test_best_loss_is_the_guides():
    model, args = case("hierarchy")
    guide = AutoPlanar(model, num_layers=2)
    result = fit(model, guide, *args, num_steps=200, seed=0, progress=False)
    weights = LogWeights(model, guide, args).log_weights(4000)
    assert result.best_loss == pytest.approx(-weights.mean().item(), abs=0.2)


def test_a_seed_gives_the_same_run_twice():
    model, args = case("hierarchy")
    runs = [
        fit(model, AutoPlanar(model), *args, num_steps=30, seed=3, progress=False).losses for _ in range(2)
    ]
    assert torch.equal(*runs)
    other = fit(model, AutoPlanar(model), *args, num_steps=30, seed=4, progress=False).losses
    assert not torch.equal(runs[0], other)


def test_a_far_posterior_is_located():
    model, args = case("far")
    guide = AutoPlanar(model)
    result = fit(model, guide, *args, num_steps=1, seed=0, progress=False)
    assert result.located
    assert guide.median()["mu"] == pytest.approx(100.0, abs=1.0)


def test_a_mode_that_is_a_bad_start_is_not_taken():
    """The density of a centred funnel is unbounded where its neck narrows; no fit should go there."""

    def funnel():
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(8), (v / 2).exp().unsqueeze(-1)).to_event(1))

    guide = AutoPlanar(funnel)
    result = fit(funnel, guide, num_steps=1, seed=0, progress=False)
    assert -result.best_loss > -20.0
    assert guide.median()["v"] > -5.0


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_takes_pyros_guides(make):
    model, args = case("hierarchy")
    result = fit(model, make(model), *args, num_steps=300, seed=0, progress=False)
    assert result.losses[-20:].mean() < result.losses[:20].mean()


def test_takes_a_guide_list_and_a_function():
    model, args = case("hierarchy")
    parts = AutoGuideList(model)
    parts.append(AutoPlanar(pyro.poutine.block(model, hide=["theta"])))
    parts.append(AutoNormal(pyro.poutine.block(model, expose=["theta"])))
    fit(model, parts, *args, num_steps=20, progress=False)

    def guide(y):
        loc = pyro.param("loc", torch.zeros(()))
        mu = pyro.sample("mu", dist.Normal(loc, 0.5))
        with pyro.plate("groups", len(y)):
            pyro.sample("theta", dist.Normal(mu, 0.5))

    result = fit(model, guide, *args, num_steps=20, progress=False)
    assert set(result.best_state) == {"loc"}


@pytest.mark.parametrize("name", ["enumerated", "not_for_batches", "subsampled_globals"])
def test_takes_models_of_every_kind(name):
    model, args = case(name)
    result = fit(model, AutoPlanar(model, num_layers=2), *args, num_steps=20, progress=False)
    assert result.losses.isfinite().all()


def test_chooses_the_objective():
    for name, kind in (("hierarchy", Trace_ELBO), ("enumerated", TraceEnum_ELBO)):
        model, args = case(name)
        guide = AutoPlanar(model).materialize(*args)
        elbo = objective_for(LogWeights(model, guide, args), 8)
        assert type(elbo) is kind
        assert elbo.vectorize_particles
    model, args = case("not_for_batches")
    guide = AutoPlanar(model).materialize(*args)
    assert not objective_for(LogWeights(model, guide, args), 8).vectorize_particles


def test_vectorization_that_runs_but_is_wrong_is_found():
    """mu[0] of a batch of particles is the first particle, not the first coordinate."""

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(mu[0].sum(), 1.0), obs=torch.tensor(1.0))

    guide = AutoPlanar(model).materialize()
    assert not LogWeights(model, guide).vectorized


def test_parameters_of_the_model_are_trained_and_kept():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.tensor(3.0), dist.constraints.positive)

        def forward(self, y):
            bias = pyro.param("bias", torch.tensor(0.0))
            mu = pyro.sample("mu", dist.Normal(0.0, 0.1))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(mu + bias, self.scale), obs=y)

    y = 2 + 0.5 * torch.randn(200)
    model = Model()
    result = fit(model, AutoPlanar(model), y, num_steps=1500, lr=0.02, seed=0, progress=False)
    assert {"bias", "scale"} <= set(result.best_state)
    assert pyro.param("bias").item() == pytest.approx(y.mean().item(), abs=0.15)
    assert model.scale.item() == pytest.approx(y.std().item(), rel=0.1)


def test_kwargs_loss_and_optim():
    model, (y,) = case("hierarchy")
    schedule = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.9}
    )
    for optim in (pyro.optim.ClippedAdam({"lr": 0.01}), schedule):
        result = fit(
            model,
            AutoPlanar(model),
            model_kwargs={"y": y},
            num_steps=20,
            loss=Trace_ELBO(num_particles=2),
            optim=optim,
            progress=False,
        )
        assert result.losses.isfinite().all()


class TestDivergence:
    @staticmethod
    def model_that_breaks(at):
        calls = {"count": 0}

        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            calls["count"] += 1
            bad = float("nan") if calls["count"] >= at else 0.0
            pyro.sample("y", dist.Normal(x + bad, 1.0, validate_args=False), obs=torch.tensor(0.5))

        return model, calls

    def test_names_step_and_site_and_restores(self):
        model, calls = self.model_that_breaks(at=10**9)
        guide = AutoPlanar(model, num_layers=2)
        with pyro.validation_enabled(False):
            fit(model, guide, num_steps=50, seed=0, progress=False)
            before = copy.deepcopy(guide.state_dict())
            used = calls["count"]
            model, _ = self.model_that_breaks(at=used + 60)
            with pytest.raises(FitDiverged, match=r"step \d+: .* first at site 'y'") as error:
                fit(model, guide, num_steps=10**4, lr=1e-3, seed=0, compile=False, progress=False)
        assert error.value.step > 0
        assert error.value.site == "y"
        assert len(error.value.losses) == error.value.step
        for key, value in guide.state_dict().items():
            assert value.isfinite().all()
            assert (value - before[key]).abs().max() < 1.0

    def test_at_the_first_step_the_guide_is_untouched(self):
        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("bad", x * float("inf"))

        guide = AutoPlanar(model, num_layers=2).materialize()
        before = copy.deepcopy(guide.state_dict())
        with pyro.validation_enabled(False), pytest.raises(FitDiverged, match=r"step 0.*'bad'"):
            fit(model, guide, num_steps=5, progress=False)
        for key, value in guide.state_dict().items():
            if not key.endswith(("loc", "log_scale")):
                assert torch.equal(value, before[key])
            assert value.isfinite().all()

    def test_infinite_gradient_is_met_before_a_parameter_moves(self):
        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("root", -(x - x.detach()).abs().sqrt())  # finite value, infinite slope

        guide = AutoPlanar(model, num_layers=2)
        with pyro.validation_enabled(False), pytest.raises(FitDiverged, match="root"):
            fit(model, guide, num_steps=5, progress=False)
        assert all(param.isfinite().all() for param in guide.parameters())

    def test_a_value_that_pyro_refuses_is_named(self):
        seen = {"steps": 0}

        class Counting(Trace_ELBO):
            def loss_and_grads(self, *args, **kwargs):
                seen["steps"] += 1
                return super().loss_and_grads(*args, **kwargs)

        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            y = torch.tensor(1.0 if seen["steps"] < 30 else -1.0)
            pyro.sample("y", dist.Exponential(x.exp()), obs=y)

        with pytest.raises(FitDiverged, match=r"step 29: .*'y'") as error:
            fit(model, AutoPlanar(model), num_steps=40, loss=Counting(), progress=False)
        assert isinstance(error.value.__cause__, ValueError)


def test_ctrl_c_returns_the_best_state_so_far():
    model, args = case("hierarchy")
    calls = {"count": 0}

    def interrupted(y):
        calls["count"] += 1
        if calls["count"] == 700:
            raise KeyboardInterrupt
        model(y)

    guide = AutoPlanar(interrupted, num_layers=2)
    result = fit(interrupted, guide, *args, num_steps=10**5, compile=False, progress=False)
    assert result.stop_reason == "interrupted"
    assert 0 < len(result.losses) < 10**5
    assert result.best_state
    assert "interrupted" in repr(result)


def test_progress_bar(capsys):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal((x**2).exp(), 1.0), obs=torch.tensor(2.0))

    fit(model, AutoPlanar(model), num_steps=5)
    shown = capsys.readouterr().err
    assert shown.index("set-up") < shown.index("search for a start: 4 runs") < shown.index("5/5")
    assert "completed at step 5" in shown
    guide = AutoPlanar(model)
    result = fit(model, guide, num_steps=1000, compile=False)
    shown = capsys.readouterr().err
    assert "round 1 of 3, ELBO" in shown
    # A bar that stops before its end would look like an abort.
    steps = len(result.losses)
    assert result.stop_reason == "converged"
    assert steps < 1000
    assert f"converged at step {steps}" in shown
    assert f"{steps}/{steps}" in shown.rpartition("\r")[2]
    again = fit(model, AutoPlanar(model), num_steps=1000, init=guide)
    assert f"{again.stop_reason} at step {len(again.losses)}" in capsys.readouterr().err
    fit(model, AutoPlanar(model), num_steps=5, progress=False)
    assert not capsys.readouterr().err


class TestCompiled:
    def test_equals_the_eager_run(self):
        """Same noise, same schedule, same best state; and the user's own schedule is stepped as well."""
        model, args = case("hierarchy")
        for optim in (None, lambda: ExponentialLR(dict(SCHEDULE))):
            results = [
                fit(
                    model,
                    AutoPlanar(model, num_layers=2, name=f"guide_{optim is None}_{choice}"),
                    *args,
                    num_steps=60,
                    optim=optim and optim(),
                    seed=0,
                    compile=choice,
                    progress=False,
                )
                for choice in (False, True)
            ]
            eager, fast = results
            assert torch.allclose(fast.losses, eager.losses, rtol=1e-7)
            for one, two in zip(sorted(fast.best_state), sorted(eager.best_state), strict=True):
                # Adam makes steps of the learning rate even of rounding, where a path gradient vanishes.
                assert torch.allclose(fast.best_state[one], eager.best_state[two], rtol=1e-4, atol=1e-6)

    def test_by_default_at_the_default_length(self):
        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        y = torch.tensor([3.0, 4.0, 5.0])
        guide = AutoPlanar(model, num_layers=2)
        fit(model, guide, y, seed=0, progress=False)
        draws = guide.sample_posterior(20_000)["mu"]
        variance = 1.0 / (0.01 + 3.0)
        assert draws.mean().item() == pytest.approx(12.0 * variance, abs=0.05)
        assert draws.var().item() == pytest.approx(variance, rel=0.1)

    def test_a_gradient_that_is_not_finite_stops_before_a_parameter_moves(self):
        def model(gate):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            # The root of zero: finite, with an infinite slope.
            pyro.factor("y", (x - x.detach()).abs().sqrt() * (gate > 0.5))

        guide = AutoPlanar(model, num_layers=2)
        gate = torch.tensor(1.0)
        with pyro.validation_enabled(False), pytest.raises(FitDiverged, match="step 0"):
            fit(model, guide, gate, num_steps=5, compile=True, progress=False)

    def test_divergence_of_a_compiled_step(self):
        """The data turn bad in place, after the step was compiled."""
        data = torch.ones(3)

        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        guide = AutoPlanar(model, num_layers=2)
        bars = []

        def poison(self, n=1):
            bars.append(getattr(self, "desc", None))  # Inductor has bars of its own
            if bars.count("AutoPlanar") == 7:
                data[0] = math.inf

        with pytest.MonkeyPatch.context() as patch, pyro.validation_enabled(False):
            patch.setattr("tqdm.tqdm.update", poison)
            with pytest.raises(FitDiverged, match=r"step 7: .* first at site 'y'") as error:
                fit(model, guide, data, num_steps=20, compile=True, seed=0)
        assert len(error.value.losses) == 7
        assert all(p.isfinite().all() for p in guide.parameters())

    @pytest.mark.filterwarnings("ignore:the model is run draw by draw")
    def test_refusal_is_raised_where_it_is_demanded(self):
        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("y", -x * x.item())

        with pytest.raises(CannotCompile, match=r"\.item\(\)"):
            fit(model, AutoPlanar(model, num_layers=2), num_steps=5, compile=True, progress=False)


class TestBestState:
    @pytest.mark.parametrize(
        "seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 5))]
    )
    def test_a_start_without_density_does_not_freeze_the_run(self, seed):
        """-inf among the first weights must not make every later state look worse."""
        y = 3 + torch.randn(20)

        def model(y):
            x = pyro.sample("x", dist.Normal(0.0, 5.0))
            pyro.factor("half", torch.where(x > -2, 0.0, -torch.inf))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(x.unsqueeze(-1), 1.0), obs=y)

        guide = AutoNormal(model, init_scale=1.0)
        try:
            result = fit(model, guide, y, num_steps=500, num_particles=2, lr=0.05, seed=seed, progress=False)
        except FitDiverged:
            pytest.skip("a draw without density ended this seed")
        assert guide.median()["x"].item() == pytest.approx(y.mean().item(), abs=0.6)
        assert result.best_loss < 100.0

    def test_early_divergence_goes_back_to_the_start(self):
        seen = {"steps": 0}

        class Counting(Trace_ELBO):
            def loss_and_grads(self, *args, **kwargs):
                seen["steps"] += 1
                return super().loss_and_grads(*args, **kwargs)

        def guide():
            loc = pyro.param("loc", torch.tensor(0.0))
            pyro.sample("x", dist.Normal(loc, 1.0))

        def model():
            x = pyro.sample("x", dist.Normal(5.0, 1.0))
            pyro.factor("bad", x * (float("nan") if seen["steps"] > 4 else 0.0))

        options = {"num_steps": 900, "lr": 0.3, "loss": Counting(), "compile": False, "progress": False}
        with pyro.validation_enabled(False), pytest.raises(FitDiverged, match="step 4"):
            fit(model, guide, **options)
        assert pyro.param("loc").item() == 0.0

    def test_parameters_that_come_and_go(self):
        seen = {"calls": 0}

        def guide():
            seen["calls"] += 1
            loc = pyro.param("z_loc", torch.tensor(0.0))
            name, size = (("a", 2), ("c", 3), ("c", 3), ("c", 3))[seen["calls"] % 4]
            loc = loc + pyro.param(name, torch.zeros(size)).sum()
            pyro.sample("x", dist.Normal(loc, 1.0))

        def model():
            pyro.sample("x", dist.Normal(1.0, 1.0))

        result = fit(model, guide, num_steps=40, progress=False, num_particles=1)
        assert {"z_loc", "a", "c"} <= set(result.best_state)
        for name, value in result.best_state.items():
            assert torch.equal(pyro.param(name), value)

    def test_names_under_module_local_params(self):
        model, args = case("hierarchy")
        with pyro.settings.context(module_local_params=True):
            guide = AutoPlanar(model, num_layers=2)
            result = fit(model, guide, *args, num_steps=20, progress=False)
        assert set(result.best_state) == {name for name, _ in guide.named_parameters()}

    def test_frozen_location_stays(self):
        model, args = case("far")
        guide = AutoPlanar(model).materialize(*args)
        guide.affine.loc.requires_grad_(False)
        before = guide.affine.loc.clone()
        fit(model, guide, *args, num_steps=5, progress=False)
        assert torch.equal(guide.affine.loc, before)


def test_a_schedule_by_metric_is_refused():
    model, args = case("hierarchy")
    adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}}
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        fit(model, AutoPlanar(model), *args, optim=pyro.optim.ReduceLROnPlateau(adam))
