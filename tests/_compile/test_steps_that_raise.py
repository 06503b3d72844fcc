"""CompiledSVI where a step raises: eager steps with one warning, and nothing left behind."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_flowvi import CompiledSVI
from pyro_flowvi.infer import CannotCompile, CompileWarning

from .test_watched_state import programs

Y = torch.tensor([1.0, 1.0, 0.0])


def discrete_model():
    with pyro.plate("d", 3):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y.to(z))


def discrete_guide():
    p = pyro.param("p", torch.full((3,), 0.999))
    with pyro.plate("d", 3):
        pyro.sample("z", dist.Bernoulli(p))


def run_discrete(svi_class, steps=12, act=lambda svi, i: None, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    optim = pyro.optim.Adam({"lr": 1e-7})
    svi = svi_class(discrete_model, discrete_guide, optim, Trace_ELBO(), **options)
    losses = []
    for i in range(steps):
        act(svi, i)
        losses.append(svi.step())
    state = optim.get_state()["p"]["state"][0]
    moments = [state["exp_avg"].tolist(), state["exp_avg_sq"].tolist(), float(state["step"])]
    return [losses, pyro.param("p").tolist(), moments, torch.get_rng_state().tolist()]


def test_a_comparison_that_raises_leaves_everything_as_it_was(monkeypatch):
    """Perturbed probabilities leave the unit interval."""
    monkeypatch.setattr("pyro_flowvi._compile.policy.STEPS_BEFORE", 3)
    expected = run_discrete(SVI)
    with pytest.warns(CompileWarning, match="the compiled step failed in a comparison") as caught:
        assert run_discrete(CompiledSVI) == expected
    assert len([w for w in caught if w.category is CompileWarning]) == 1
    with pytest.raises(CannotCompile, match="failed in a comparison"):
        run_discrete(CompiledSVI, compile=True)


def test_machine_code_that_fails(monkeypatch):
    monkeypatch.setattr("pyro_flowvi._compile.policy.STEPS_BEFORE", 1)
    monkeypatch.setattr("pyro_flowvi._compile.eager_check.PERTURBATION", 1e-6)

    def fail(*tensors):
        torch.rand(3)
        raise RuntimeError("broken")

    def break_it(svi, i):
        if i == 6 and isinstance(svi, CompiledSVI):
            (step,) = svi._stepper.graphs.steps.values()
            step.run = fail

    expected = run_discrete(SVI)
    with pytest.warns(CompileWarning, match="the compiled step failed with RuntimeError: broken"):
        found = run_discrete(CompiledSVI, act=break_it)
    assert found[3] == expected[3]
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert np.allclose(np.hstack(one), np.hstack(other), rtol=1e-9)


def test_a_program_that_raises_in_a_trial(monkeypatch):
    """Stock SVI does not meet the seeds of the trials."""
    monkeypatch.setattr("pyro_flowvi._compile.policy.STEPS_BEFORE", 1)

    def read():
        if torch.initial_seed() < 3:
            raise ArithmeticError("an unlucky draw")
        return 1.0

    svi = CompiledSVI(*programs(read), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    pyro.set_rng_seed(7)
    with pytest.warns(CompileWarning, match=r"ArithmeticError: an unlucky draw \(.*raise ArithmeticError"):
        assert len([svi.step() for _ in range(4)]) == 4
    assert svi.cause is not None
