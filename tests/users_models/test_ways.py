"""Each model of a user's with a guide of ours, by ``fit``, by ``CompiledSVI`` and by Pyro's own ``SVI``."""

import warnings

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoNormal

from pyro_flowvi import CompiledSVI, FitDiverged, fit

from .registry import CASES, PAGE, page

SERVED = [key for key, case in CASES.items() if case.refusal is None]
REFUSED = [key for key, case in CASES.items() if case.refusal is not None]
COMPILED_IN_LONG = {"line", "box", "by_logits", "gmm", "vae"}
"""One of each kind; compiling takes seconds each, and the others are marked slow."""
RATE, EVALUATIONS = 0.02, 30


def tiers(keys, long=None):
    """Parameters marked long or slow."""
    slow = {key: CASES[key].slow if long is None else key not in long for key in keys}
    return [pytest.param(key, marks=pytest.mark.slow if slow[key] else pytest.mark.long) for key in keys]


def build(key):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return CASES[key].build()


def train(svi_class, problem, guide, loss, steps, **options):
    svi = svi_class(problem.model, guide, pyro.optim.Adam({"lr": RATE}), loss, **options)
    return [svi.step(*problem.args) for _ in range(steps)], svi


@torch.no_grad()
def elbo(problem, guide, loss):
    """Its estimate, and the square of its standard error."""
    values = [-loss.loss(problem.model, guide, *problem.args) for _ in range(EVALUATIONS)]
    values = torch.tensor(values)
    return values.mean(), values.var() / EVALUATIONS


def check_draws(problem, guide):
    """Shapes of draws, and what Predictive makes of them."""
    trace = poutine.trace(problem.model).get_trace(*problem.args)
    full = {
        frame.name: frame.full_size for n in trace.nodes.values() for frame in n.get("cond_indep_stack", ())
    }
    latents = guide.sample_posterior(5)
    for name, value in latents.items():
        site = trace.nodes[name]
        assert value.shape[0] == 5
        expected = list(site["value"].shape)
        for frame in site["cond_indep_stack"]:
            if frame.vectorized:
                expected[frame.dim - site["fn"].event_dim] = full[frame.name] or frame.size
        assert list(value.shape[1:]) == expected, name
    drawn = Predictive(problem.model, guide=guide, num_samples=3)(*problem.args)
    observed = [name for name in trace.observation_nodes if not name.startswith("_")]
    assert all(value.shape[0] == 3 for value in drawn.values())
    assert any(name in drawn for name in (*latents, *observed))


@pytest.mark.parametrize("key", tiers(SERVED))
def test_fit(key):
    """As good as ``AutoNormal`` after as many steps of stock SVI, and right where the truth is known."""
    case, problem = CASES[key], build(key)
    sites = poutine.trace(problem.model).get_trace(*problem.args).nodes
    hidden = [name for name, site in sites.items() if getattr(site.get("fn"), "has_enumerate_support", False)]
    normal = AutoNormal(poutine.block(problem.model, hide=hidden))
    train(SVI, problem, normal, case.loss(), case.steps)
    (theirs, theirs_var), problem = elbo(problem, normal, case.loss()), build(key)
    guide = case.guide(problem.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            problem.model,
            guide,
            *problem.args,
            num_steps=case.steps,
            seed=0,
            progress=False,
            **case.fit_options,
        )
    assert {w.category.__name__ for w in caught} == ({case.warns} if case.warns else set())
    ours, ours_var = elbo(problem, guide, case.loss())
    ahead = ours > theirs - 3 * (ours_var + theirs_var).sqrt()
    assert ahead != case.behind
    check_draws(problem, guide)
    if problem.check is not None:
        problem.check(guide.sample_posterior(2000))


@pytest.mark.parametrize("key", tiers(SERVED))
def test_stock_svi(key):
    """The ELBO rises beyond its noise within ``svi_steps``."""
    case, problem = CASES[key], build(key)
    guide = case.guide(problem.model)
    guide(*problem.args)
    before, before_var = elbo(problem, guide, case.loss())
    losses, _ = train(SVI, problem, guide, case.loss(), case.svi_steps)
    after, after_var = elbo(problem, guide, case.loss())
    assert torch.tensor(losses).isfinite().all()
    assert (after > before + 3 * (before_var + after_var).sqrt()) != case.unsteady
    check_draws(problem, guide)


@pytest.mark.parametrize("key", tiers(SERVED, COMPILED_IN_LONG))
def test_compiled_svi(key):
    """The losses and parameters of Pyro's SVI; or it says why it runs eagerly."""
    case, outcomes = CASES[key], []
    for svi_class, options in ((SVI, {}), (CompiledSVI, {"compile": case.compiled == "yes"})):
        problem = build(key)
        losses, svi = train(svi_class, problem, case.guide(problem.model), case.loss(), 12, **options)
        params = [value.detach().clone() for value in pyro.get_param_store().values()]  # names count guides
        outcomes.append((torch.tensor(losses), params))
    (expected_losses, expected), (losses, params) = outcomes
    assert svi.compiled == (case.compiled == "yes")
    torch.testing.assert_close(losses, expected_losses, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-6)
    if case.compiled != "yes":
        problem = build(key)
        with pytest.raises(RuntimeError, match=case.cause):
            train(CompiledSVI, problem, case.guide(problem.model), case.loss(), 2, compile=True)


@pytest.mark.parametrize("key", tiers(REFUSED))
@pytest.mark.parametrize("way", ["fit", "CompiledSVI", "SVI"])
def test_refused(key, way):
    """By an error that names what is not served; where SVI runs all the same, its loss is infinite."""
    case, problem = CASES[key], build(key)
    guide = case.guide(problem.model)

    def run():
        if way == "fit":
            return fit(problem.model, guide, *problem.args, seed=0, progress=False).losses
        return train({"SVI": SVI, "CompiledSVI": CompiledSVI}[way], problem, guide, case.loss(), 3)[0]

    if case.refusal.error is FitDiverged and way != "fit":
        assert not torch.tensor(run()).isfinite().all()
    else:
        with pytest.raises(case.refusal.error, match=case.refusal.words):
            run()


def test_page():
    assert PAGE.read_text() == page(PAGE.read_text()), "python -m tests.users_models.registry"
