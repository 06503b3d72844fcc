"""CompiledSVI: what it refuses and why, whose state it works on, when it compiles."""

import copy
import math
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam, ClippedAdam, ExponentialLR
from torch import nn

from pyro_flowvi import AutoPlanar, CompiledSVI
from pyro_flowvi._compile import graph_cache, policy, torch_private
from pyro_flowvi._compile.optimizers import FlatParameters, make_buckets, meet
from pyro_flowvi._compile.tensor_objectives import tensor_loss
from pyro_flowvi.infer import CannotCompile, CompileWarning

Y = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
HERE = __file__


def prior():
    return pyro.sample("mu", dist.Normal(0.0, 10.0))


def likelihood(mu, y):
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def model(y):
    likelihood(prior(), y)


def guide(y=None):
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("mu", dist.Normal(loc, scale))


def make(model=model, guide=guide, optim=None, loss=None, **options):
    optim = Adam({"lr": 0.05}) if optim is None else optim
    return CompiledSVI(model, guide, optim, loss or Trace_ELBO(), **options)


def refused(model, *args, guide=guide, **kwargs):
    """The one warning of a run that stays eager, long enough that it would compile."""
    svi = make(model, guide)
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(policy, "PAYS_AT_LEAST", 300)
        losses = svi.run(500, *(args or (Y,)), progress=False, **kwargs)
    assert not svi.compiled
    assert len(losses) == 500
    assert losses[-100:].mean() < losses[:100].mean()
    (warning,) = [w for w in caught if w.category is CompileWarning]
    return str(warning.message)


class TestRefusals:
    """What a trace would bake in: eager, with one warning that names cause and line."""

    def test_python_randomness(self):
        def model(y):
            mu = prior()
            noise = random.random()
            likelihood(mu + 0.1 * noise, y)

        message = refused(model)
        assert "Python's random module" in message
        assert HERE in message
        assert "in model" in message

    def test_numpy_randomness(self):
        def model(y):
            likelihood(prior() + 0.1 * np.random.rand(), y)

        message = refused(model)
        assert "numpy.random" in message
        assert "in model" in message

    def test_a_generator_of_its_own(self):
        generator = np.random.default_rng(0)

        def model(y):
            likelihood(prior() + 0.1 * generator.normal(), y)

        assert "two runs with one seed differ" in refused(model)

    def test_the_value_of_a_draw(self):
        def model(y):
            mu = prior()
            likelihood(mu + 0.0 * mu.item(), y)

        message = refused(model)
        assert ".item()" in message
        assert "likelihood(mu + 0.0 * mu.item(), y)" in message

    def test_a_branch_on_a_draw(self):
        def model(y):
            mu = prior()
            if mu > 100.0:
                mu = mu - 100.0
            likelihood(mu, y)

        assert "if mu > 100.0:" in refused(model)

    def test_a_branch_on_a_parameter(self):
        def model(y):
            if pyro.param("loc", torch.tensor(0.0)) > 100.0:
                raise AssertionError
            likelihood(prior(), y)

        assert "depends on parameters" in refused(model)

    def test_boolean_indexing(self):
        def model(y):
            mu = prior()
            likelihood(mu, y[y - mu < 100.0])

        message = refused(model)
        assert "depends on parameters (boolean indexing)" in message
        assert "y[y - mu < 100.0]" in message

    def test_a_site_that_appears_sometimes(self):
        def model(y):
            if torch.rand(()) > 0.5:
                pyro.sample("extra", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))
            likelihood(prior(), y)

        assert "site extra" in refused(model)

    def test_a_parameter_that_appears_sometimes(self):
        def model(y):
            if torch.rand(()) > 0.5:
                pyro.param("late", torch.tensor(0.0))
            likelihood(prior(), y)

        assert "parameter late" in refused(model)

    def test_state_of_the_program(self):
        calls = {"count": 0}

        def model(y):
            calls["count"] += 1
            likelihood(prior(), y)

        assert "calls['count']" in refused(model)

    def test_a_value_computed_outside_torch(self):
        def model(y):
            mu = prior()
            likelihood(mu + 0.5 * float(mu.detach().numpy()), y)

        assert ".numpy()" in refused(model)

    def test_a_buffer_that_is_replaced(self):
        class Counter(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("seen", torch.tensor(0.0))

            def forward(self, mu):
                self.seen = self.seen + 1.0
                return mu

        net = Counter()

        def model(y):
            likelihood(net(prior()), y)

        assert "net.seen" in refused(model)

    def test_an_array_for_an_argument(self):
        def model(y):
            likelihood(prior(), torch.as_tensor(y))

        message = refused(model, Y.numpy())
        assert "ndarray" in message
        assert "pass tensors" in message

    def test_an_objective_without_a_tensor_form(self):
        svi = make(loss=TraceGraph_ELBO())
        with pytest.warns(CompileWarning, match="objective TraceGraph_ELBO"):
            svi.run(1600, Y, progress=False)
        with pytest.raises(CannotCompile, match="objective TraceGraph_ELBO"):
            make(loss=TraceGraph_ELBO(), compile=True)

    def test_raises_where_compilation_is_demanded(self):
        def model(y):
            mu = prior()
            likelihood(mu + mu.item(), y)

        with pytest.raises(CannotCompile, match=r"\.item\(\)") as error:
            make(model, compile=True).step(Y)
        assert HERE in error.value.line

    def test_no_compiler(self):
        from torch._inductor import config

        with config.patch({"cpp.cxx": ("no-such-compiler",)}):
            assert "install g++" in refused(model)

    @pytest.mark.parametrize("name", ["make_fx", "compile_fx_inner", "lowering"])
    def test_a_torch_without_a_private_name(self, monkeypatch, name):
        monkeypatch.setitem(torch_private._PLACES, name, f"torch.gone.{name}")
        assert f"has no torch.gone.{name}.{name}; tried were 2.11" in refused(model)


class TestArguments:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model": 3}, "model: expected a callable, got 3"),
            ({"guide": None}, "guide: expected a callable"),
            ({"optim": "adam"}, "optim: expected an optimizer of pyro.optim or torch.optim, got 'adam'"),
            ({"loss": 1.0}, "loss: expected a pyro.infer.ELBO"),
            ({"compile": "always"}, "compile: expected True, False or 'auto', got 'always'"),
        ],
    )
    def test_bad_ones_are_named(self, change, message):
        arguments = {
            "model": model,
            "guide": guide,
            "optim": Adam({"lr": 0.1}),
            "loss": Trace_ELBO(),
        } | change
        with pytest.raises(ValueError, match=message):
            CompiledSVI(**arguments)

    def test_number_of_steps(self):
        with pytest.raises(ValueError, match="num_steps: expected a positive integer, got 0"):
            make().run(0, Y)

    def test_an_optimizer_without_the_parameters(self):
        other = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
        with pytest.raises(ValueError, match="optim: expected an optimizer over all parameters, got one"):
            make(optim=other).step(Y)


class TestPolicy:
    """When "auto" compiles is a matter of counts."""

    def test_step_waits(self, monkeypatch):
        monkeypatch.setattr(policy, "STEPS_BEFORE", 5)
        svi = make()
        compiled_at = [svi.step(Y) is not None and svi.compiled for _ in range(8)]
        assert compiled_at == [False] * 6 + [True] * 2

    def test_short_runs_stay_eager_and_add_up(self):
        svi = make()
        for _ in range(3):
            svi.run(400, Y, progress=False)
            assert not svi.compiled
        svi.run(500, Y, progress=False)
        assert svi.compiled

    def test_off(self):
        svi = make(compile=False)
        svi.run(1800, Y, progress=False)
        assert not svi.compiled
        assert svi.cause is None

    def test_large_graphs(self, monkeypatch):
        monkeypatch.setattr(policy, "MAX_OPERATIONS", 10)
        svi = make()
        svi.run(1800, Y, progress=False)
        assert not svi.compiled

    def test_shapes_that_change_too_often(self, monkeypatch):
        monkeypatch.setattr(graph_cache, "MAX_GRAPHS", 2)
        svi = make(compile=True)
        svi.step(Y)
        svi.step(Y[:2])
        assert len(svi._stepper.graphs.steps) == 2
        with pytest.raises(CannotCompile, match="more than 2 graphs are needed"):
            svi.step(Y[:1])

    def test_progress(self, capsys):
        make().run(20, Y)
        assert "20/20" in capsys.readouterr().err


class TestRandomness:
    def test_steps_and_seeds_differ_and_a_seed_repeats(self):
        def fresh(seed):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            # A rate of zero: losses differ by their noise alone.
            svi = make(optim=torch.optim.SGD, compile=True)
            svi.optim.pt_optim_args["lr"] = 1e-12
            return svi.run(6, Y, progress=False)

        one, same, other = fresh(1), fresh(1), fresh(2)
        assert torch.equal(one, same)
        assert len(set(one.tolist())) == 6
        assert not set(one.tolist()) & set(other.tolist())

    def test_compiling_draws_nothing(self):
        """Eager and compiled runs see the same noise, so that they may be mixed."""
        losses = {}
        for choice in (False, True):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            losses[choice] = make(compile=choice).run(30, Y, progress=False)
        assert torch.allclose(losses[False], losses[True], rtol=1e-9)


class TestState:
    """The parameters are at every moment those of the modules and of the store."""

    def run_both(self, act, optim=lambda: Adam({"lr": 0.05}), steps=10):
        """Parameters after steps, ``act`` and further steps: all eager, and compiled."""
        results = []
        for choice in (False, True):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            svi = make(optim=optim(), compile=choice)
            svi.run(steps, Y, progress=False)
            svi = act(svi) or svi
            for _ in range(steps):
                svi.step(Y)
            assert not choice or not isinstance(svi, CompiledSVI) or svi.compiled
            results.append({name: value.detach().clone() for name, value in pyro.get_param_store().items()})
        eager, fast = results
        for name, value in eager.items():
            assert torch.allclose(fast[name], value, rtol=1e-9), name

    def test_goes_on_with_stock_svi(self):
        self.run_both(lambda svi: SVI(svi.model, svi.guide, svi.optim, Trace_ELBO()))

    def test_goes_on_with_stock_svi_and_clipped_adam(self):
        self.run_both(
            lambda svi: SVI(svi.model, svi.guide, svi.optim, Trace_ELBO()),
            lambda: ClippedAdam({"lr": 0.05, "lrd": 0.9, "clip_norm": 0.5}),
        )

    def test_stock_steps_between(self):
        def between(svi):
            stock = SVI(svi.model, svi.guide, svi.optim, Trace_ELBO())
            for _ in range(3):
                stock.step(Y)

        self.run_both(between)

    def test_values_are_written(self):
        def write(svi):
            with torch.no_grad():
                pyro.get_param_store()._params["loc"].fill_(3.0)

        self.run_both(write)

    def test_memory_is_replaced(self):
        def replace(svi):
            param = pyro.get_param_store()._params["loc"]
            param.data = torch.full_like(param.data, -2.0)

        self.run_both(replace)

    def test_the_rate_is_changed(self):
        def change(svi):
            for optimizer in svi.optim.optim_objs.values():
                optimizer.param_groups[0]["lr"] = 0.5

        self.run_both(change)

    def test_one_rate_is_changed(self):
        def change(svi):
            optimizer = svi.optim.optim_objs[pyro.get_param_store()._params["loc"]]
            optimizer.param_groups[0]["lr"] = 0.5

        self.run_both(change)

    def test_stock_steps_between_with_clipped_adam(self):
        def between(svi):
            stock = SVI(svi.model, svi.guide, svi.optim, Trace_ELBO())
            for _ in range(3):
                stock.step(Y)

        self.run_both(between, lambda: ClippedAdam({"lr": 0.05, "lrd": 0.9}))

    def test_another_hyperparameter_is_changed(self):
        def change(svi):
            for optimizer in svi.optim.optim_objs.values():
                optimizer.param_groups[0]["betas"] = (0.5, 0.9)

        self.run_both(change)

    def test_an_optimizer_without_a_learning_rate(self):
        self.run_both(lambda svi: None, lambda: pyro.optim.AdagradRMSProp({"eta": 0.5}))

    def test_a_schedule(self):
        def schedule():
            return ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5})

        self.run_both(lambda svi: svi.optim.step(), schedule)

    def test_optimizer_state_is_saved_and_restored(self, tmp_path):
        svi = make(compile=True)
        svi.run(20, Y, progress=False)
        svi.optim.save(tmp_path / "optim")
        pyro.get_param_store().save(tmp_path / "params")
        pyro.set_rng_seed(5)
        expected = svi.run(10, Y, progress=False)

        pyro.clear_param_store()
        pyro.get_param_store().load(tmp_path / "params")
        restored = Adam({"lr": 0.05})
        restored.load(tmp_path / "optim")
        pyro.set_rng_seed(5)
        found = make(optim=restored, compile=False).run(10, Y, progress=False)
        assert torch.allclose(found, expected, rtol=1e-9)

    def test_a_store_that_is_cleared(self):
        """Stock SVI starts anew; so does the compiled step."""
        svi = make(compile=True)
        svi.run(50, Y, progress=False)
        pyro.clear_param_store()
        svi.step(Y)
        assert abs(pyro.param("loc").item()) < 0.06
        svi.step(Y)
        assert svi.compiled
        assert abs(pyro.param("loc").item()) < 0.11

    def test_a_parameter_that_is_frozen(self):
        svi = make(compile=True)
        svi.run(5, Y, progress=False)
        loc = pyro.get_param_store()._params["loc"].requires_grad_(False)
        before = loc.clone()
        svi.run(5, Y, progress=False)
        assert torch.equal(loc, before)
        assert svi.compiled

    def test_parameters_of_another_precision(self):
        model = lambda y: likelihood(prior(), y)  # noqa: E731
        guide = AutoNormal(model)
        svi = make(model, guide, compile=True)
        svi.run(5, Y, progress=False)
        guide.to(torch.float32)
        svi.run(5, Y, progress=False)
        assert all(p.dtype == torch.float32 for p in guide.parameters())

    def test_copies_are_independent(self):
        guide = AutoNormal(model)
        svi = make(guide=guide, compile=True)
        svi.run(5, Y, progress=False)
        twin = copy.deepcopy(
            guide.locs.mu_unconstrained if hasattr(guide.locs, "mu_unconstrained") else guide.locs
        )
        before = (
            [p.detach().clone() for p in twin.parameters()] if isinstance(twin, nn.Module) else [twin.clone()]
        )
        svi.run(5, Y, progress=False)
        after = list(twin.parameters()) if isinstance(twin, nn.Module) else [twin]
        assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))

    def test_gradients_are_left_clean(self):
        svi = make(compile=True)
        svi.run(5, Y, progress=False)
        assert all(p.grad is None for p in pyro.get_param_store()._params.values())


class TestSurroundings:
    """What the program reaches is the present one, or the step is traced anew."""

    def test_data_in_a_closure(self):
        data = {"y": Y.clone()}

        def model():
            likelihood(prior(), data["y"])

        svi = make(model, lambda: guide(), compile=True)
        svi.run(5, progress=False)
        low = svi.evaluate_loss()
        data["y"].add_(100.0)  # in place: the same graph
        assert svi.step() > low + 1000.0
        assert svi._stepper.graphs.num_built == 1
        data["y"] = Y.clone()  # another tensor: another graph
        assert svi.step() < low + 1000.0
        assert svi._stepper.graphs.num_built == 2

    def test_a_number_in_a_closure(self):
        options = {"shift": 0.0}

        def model(y):
            likelihood(prior() + options["shift"], y)

        svi = make(model, compile=True)
        svi.run(5, Y, progress=False)
        options["shift"] = 1000.0
        assert svi.step(Y) > 1e5

    def test_values_of_data_that_python_reads(self):
        def model(y):
            likelihood(prior() * int(y.max()), y[y > 0.5])

        data = Y.clone()
        svi = make(model, compile=True)
        svi.run(5, data, progress=False)
        before = svi._stepper.graphs.num_built
        data[0] = 400.0
        assert svi.step(data) > 1e4
        assert svi._stepper.graphs.num_built == before + 1

    def test_a_count_that_a_module_keeps_and_reads(self):
        """BatchNorm without a momentum averages over the number of batches seen, which it reads."""
        net = nn.BatchNorm1d(1, momentum=None)

        def model(y):
            likelihood(prior() + net(y.unsqueeze(-1)).squeeze(-1), y)

        with pytest.raises(CannotCompile, match="what the program changes in place"):
            make(model, compile=True).step(Y)

    def test_tensors_that_a_program_changes(self):
        """Comparisons with eager Pyro leave no trace."""
        seen = torch.zeros(())

        def model(y):
            seen.add_(1.0)
            likelihood(prior(), y)

        svi = make(model, compile=True)
        svi.run(30, Y, progress=False)
        assert svi.compiled
        assert seen.item() == 30.0

    def test_objects_functions_and_settings_that_are_replaced(self):
        box = {"f": lambda x: x}
        drop = nn.Dropout(0.0)
        objective = Trace_ELBO()

        def model(y):
            likelihood(box["f"](prior()) + 100.0 * drop(torch.ones(3)), y)

        svi = make(model, loss=objective, compile=True)
        svi.run(3, Y, progress=False)
        box["f"] = lambda x: x + 1000.0
        assert svi.step(Y) > 1e6
        box["f"] = lambda x: x
        drop.p = 1.0
        assert svi.step(Y) < 1e3
        objective.num_particles = 3
        svi.step(Y)
        assert svi._stepper.graphs.num_built == 4

    def test_handlers_around_the_step(self):
        svi = make(compile=True)
        svi.run(3, Y, progress=False)
        plain = svi.evaluate_loss(Y)
        with poutine.scale(scale=100.0):  # eager
            assert svi.step(Y) > 20.0 * plain
        assert svi.step(Y) < 5.0 * plain

    def test_an_optimizer_that_is_replaced(self):
        svi = make(compile=True)
        svi.run(5, Y, progress=False)
        svi.optim = Adam({"lr": 1e-9})
        before = pyro.param("loc").item()
        svi.run(5, Y, progress=False)
        assert pyro.param("loc").item() == pytest.approx(before, abs=1e-6)

    def test_an_optimizer_that_is_replaced_before_a_new_shape(self):
        svi = make(compile=True)
        svi.run(5, Y, progress=False)
        svi.optim = Adam({"lr": 1e-9})
        before = pyro.param("loc").item()
        svi.step(Y[:2])
        assert pyro.param("loc").item() == pytest.approx(before, abs=1e-6)

    def test_views_of_parameters_stay_views(self):
        svi = make(compile=False)
        svi.step(Y)
        view = pyro.get_param_store()._params["loc"].detach()
        fast = make(compile=True)
        fast.run(10, Y, progress=False)
        assert view.item() == pyro.param("loc").item()

    def test_training_and_evaluation(self):
        net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))

        def model(y):
            pyro.module("net", net)
            likelihood(prior() + net(y.unsqueeze(-1)).squeeze(-1), y)

        svi = make(model, compile=True)
        seen = net[1].running_mean.clone()
        svi.run(5, Y, progress=False)
        assert int(net[1].num_batches_tracked) == 5
        assert not torch.equal(net[1].running_mean, seen)
        net.eval()
        svi.run(5, Y, progress=False)
        assert int(net[1].num_batches_tracked) == 5
        assert len(svi._stepper.graphs.steps) == 2


OBJECTIVES = [
    Trace_ELBO(num_particles=2),
    Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    TraceMeanField_ELBO(num_particles=2),
    TraceEnum_ELBO(num_particles=2, max_plate_nesting=1),
    RenyiELBO(alpha=0.5, num_particles=3),
    RenyiELBO(alpha=2.0, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{type(o).__name__}-{o.vectorize_particles}")
@pytest.mark.parametrize("discrete", [False, True])
def test_objectives_in_tensors_equal_pyros(objective, discrete):
    """Value and gradient; also with a discrete site, enumerated where the objective does that."""
    if discrete and isinstance(objective, (TraceMeanField_ELBO, RenyiELBO)) and objective.vectorize_particles:
        pytest.skip("Pyro's own objective asks for reparameterised sites")
    enumerate_ = {"enumerate": "parallel"} if isinstance(objective, TraceEnum_ELBO) else {}

    def discrete_model(y):
        mu = prior()
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.0, 0.8])), infer=enumerate_)
        likelihood(mu + k, y)

    def discrete_guide(y):
        guide(y)
        logits = pyro.param("logits", torch.tensor([0.3, 0.1, -0.2]))
        pyro.sample("k", dist.Categorical(logits=logits), infer=enumerate_)

    if discrete and isinstance(objective, TraceMeanField_ELBO):
        pytest.skip("not reparameterised")
    pair = (discrete_model, discrete_guide) if discrete else (model, guide)
    results = []
    for form in ("pyro", "tensors"):
        pyro.set_rng_seed(3)
        with poutine.trace(param_only=True) as capture, pyro.validation_enabled(False):
            if form == "pyro":
                loss = objective.loss_and_grads(*pair, Y)
            else:
                loss, surrogate = tensor_loss(objective)(*pair, (Y,), {})
                surrogate.backward()
                loss = loss.detach()
        params = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
        results.append((float(torch.as_tensor(loss)), [p.grad.clone() for p in params]))
        for param in params:
            param.grad = None
    (loss, grads), (tensor_value, tensor_grads) = results
    assert loss == pytest.approx(tensor_value, rel=1e-10, nan_ok=True)
    for one, two in zip(grads, tensor_grads, strict=True):
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}),
        (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.3}),
        (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}),
        (pyro.optim.clipped_adam.ClippedAdam, {"lr": 0.1, "clip_norm": 0.5, "lrd": 0.9}),
        (pyro.optim.clipped_adam.ClippedAdam, {"lr": 0.1, "centered_variance": True, "weight_decay": 0.1}),
    ],
)
def test_fused_rules_equal_the_optimizers(kind, options):
    shapes = [(2, 3), (), (4,)]
    eager = [torch.randn(shape).requires_grad_() for shape in shapes]
    fused = [p.detach().clone().requires_grad_() for p in eager]
    wrapper, other = (pyro.optim.PyroOptim(kind, options) for _ in range(2))
    meet(other, fused)
    (bucket,) = make_buckets(fused, other)
    assert isinstance(bucket, FlatParameters)
    for step in range(12):
        grads = [torch.randn(shape) for shape in shapes]
        for param, grad in zip(eager, grads, strict=True):
            param.grad = grad.clone()
        wrapper(eager)
        if step % 4 == 3:  # an eager step in between
            for param, grad in zip(fused, grads, strict=True):
                param.grad = grad.clone()
            other(fused)
            bucket.adopt()
            assert bucket.intact()
        else:
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            for old, new in zip(bucket.state, bucket.stepped(bucket.state, flat), strict=True):
                old.copy_(new)
            bucket.write()
        for one, two in zip(eager, fused, strict=True):
            assert torch.allclose(one, two, rtol=1e-12)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_equals_eager():
    losses = []
    torch.set_default_device("cuda")
    for choice in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = make(compile=choice)
        losses.append(svi.run(50, Y.cuda(), progress=False))
        assert svi.compiled == choice
    assert losses[1].is_cuda
    assert len(set(losses[1].tolist())) == 50


def test_data_on_another_device_are_refused_at_the_first_step():
    y = Y.to(torch.get_default_dtype())
    guide = AutoPlanar(model, num_layers=2).materialize(y)
    svi = CompiledSVI(model, guide, Adam({"lr": 1e-2}), Trace_ELBO())
    with pytest.raises(ValueError, match=r"args\[0\]: .*guide's device .*, got a tensor on meta"):
        svi.step(y.to("meta"))
    assert math.isfinite(svi.step(y))  # nothing is left of the refused one
