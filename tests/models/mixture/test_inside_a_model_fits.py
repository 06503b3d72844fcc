"""Fits of larger models with VMoNF's component, against closed forms and a Gibbs sampler of the posterior."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, infer_discrete
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.ops.indexing import Vindex

from pyro_flowvi import AutoFlowMixture, AutoRealNVP, CompiledSVI, VMoNF, diagnose, fit
from pyro_flowvi.datasets import hide_labels, pinwheel, two_moons
from pyro_flowvi.infer._training_loop import TrainingLoop
from pyro_flowvi.models import FlowMixture

from .test_inside_a_model import SITES, Regression, as_function, continuous, data, elbo, small

COEFFICIENTS = torch.tensor([[0.0, 1.0], [2.0, -1.0], [-2.0, 0.5]], dtype=torch.float64)
NOISE = torch.tensor([0.5, 0.3, 0.8], dtype=torch.float64)
SHAPE, RATE, SPREAD = 2.0, 1.0, 25.0
"""Of the priors: variances are inverse gamma, coefficients normal with that multiple of their variance."""


pytestmark = pytest.mark.usefixtures("double")


# -- training -------------------------------------------------------------------------------------


def trained(kind, form, steps=4, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vmonf = small(name="inner")
    before = {key: value.clone() for key, value in vmonf.state_dict().items()}
    model = form(Regression(vmonf))
    guide = AutoNormal(continuous(model))
    objective = elbo(num_particles=2, vectorize_particles=True)
    svi = kind(model, guide, pyro.optim.Adam({"lr": 0.01}), objective, **options)
    losses = [svi.step(*data()) for _ in range(steps)]
    return losses, before, vmonf


FORMS = [lambda model: model, as_function]


@pytest.mark.parametrize("form", FORMS)
def test_svi_trains_the_mixture(form):
    _, before, vmonf = trained(SVI, form)
    for key, param in vmonf.named_parameters():
        assert not torch.equal(param, before[key]), key


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_compiled_steps_are_the_eager_ones(form):
    (losses, _, vmonf), (compiled, _, other) = trained(SVI, form), trained(CompiledSVI, form, compile=True)
    assert compiled == pytest.approx(losses, rel=1e-9)
    for one, another in zip(vmonf.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, another, atol=1e-8)


@pytest.mark.parametrize(
    "make_guide",
    [AutoRealNVP, lambda model: AutoFlowMixture(model, 2), lambda model: AutoNormal(continuous(model))],
)
def test_fit_trains_the_mixture_and_keeps_the_best_state(make_guide):
    vmonf = small(name="inner")
    model = Regression(vmonf)
    guide = make_guide(model)
    result = fit(model, guide, *data(60), num_steps=60, seed=0, progress=False)
    assert result.best_loss < result.losses[0]
    own = {f"inner.{key}": param for key, param in vmonf.named_parameters()}
    assert {key for key in result.best_state if key.startswith("inner.")} == set(own)
    assert all(torch.equal(result.best_state[key], param) for key, param in own.items())


def test_fit_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    rows = data(60)

    def run(path, stop=None):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = Regression(small(name="inner"))
        calls, own = [], TrainingLoop._record

        def counted(self, *args):
            own(self, *args)
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainingLoop, "_record", counted)
            patch.setattr("pyro_flowvi.infer._fit.CHECKPOINT_SECONDS", 0.0)
            guide = AutoRealNVP(model, num_layers=2, name="guide")
            return fit(model, guide, *rows, num_steps=20, seed=0, checkpoint=path, progress=False)

    whole = run(tmp_path / "whole")
    assert run(tmp_path / "parts", stop=13).stop_reason == "interrupted"
    resumed = run(tmp_path / "parts")
    assert resumed.losses.equal(whole.losses)
    assert all(resumed.best_state[name].equal(value) for name, value in whole.best_state.items())


# -- the component of each row --------------------------------------------------------------------


def test_posterior_of_the_component():
    """By marginals and by draws: that of Bayes' rule at the guide's point, labels certain."""
    vmonf = small()
    model = Regression(vmonf)
    x, t, y, labels = rows = data()
    guide = AutoDelta(continuous(model))
    found = elbo().compute_marginals(model, guide, *rows)["component"].probs
    alpha, beta, sigma = (getattr(guide, site) for site in SITES)
    outcome = dist.Normal(alpha + beta * t.unsqueeze(-1), sigma).log_prob(y.unsqueeze(-1))
    joint = vmonf.joint_log_prob(x) + outcome
    allowed = (labels.unsqueeze(-1) == torch.arange(3)) | (labels.unsqueeze(-1) == -1)
    expected = torch.where(allowed, joint, -math.inf).softmax(-1)
    assert torch.allclose(found, expected, atol=1e-10)
    known = poutine.replay(model, poutine.trace(guide).get_trace(*rows))
    best = poutine.trace(infer_discrete(known, first_available_dim=-2, temperature=0)).get_trace(*rows)
    assert torch.equal(best.nodes["component"]["value"], expected.argmax(-1))
    drawn = infer_discrete(known, first_available_dim=-2)
    draws = [poutine.trace(drawn).get_trace(*rows).nodes["component"]["value"] for _ in range(200)]
    counts = torch.stack([(torch.stack(draws) == k).double().mean(0) for k in range(3)], -1)
    assert torch.allclose(counts, expected, atol=5 * 0.5 / 200**0.5)


def test_rows_that_are_drawn():
    """Without x the model draws it, from the component that it has drawn."""
    vmonf = VMoNF(2, 2, num_layers=1, hidden=(4,))
    vmonf.place(torch.tensor([[-50.0, 0.0], [50.0, 0.0]]), torch.eye(2).expand(2, 2, 2))
    model = Regression(vmonf)
    t = torch.zeros(30)
    guide = AutoNormal(continuous(model))
    guide(torch.zeros(30, 2), t, t)
    draws = Predictive(model, guide=guide, num_samples=20)(None, t, None)
    assert draws["x"].shape == (20, 30, 2)
    assert draws["y"].shape == (20, 30)
    assert torch.equal(draws["x"][..., 0] > 0, draws["component"] == 1)


# -- the posterior of the regression --------------------------------------------------------------


def conjugate(t, y, component):
    """Means and standard deviations of intercept, slope and variance, given the components: shape (K, 6)."""
    rows = []
    for k in component.unique():
        one = component == k
        design = torch.stack([torch.ones_like(t[one]), t[one]], -1)
        precision = design.T @ design + torch.eye(2) / SPREAD
        mean = torch.linalg.solve(precision, design.T @ y[one])
        shape = SHAPE + 0.5 * one.sum()
        rate = RATE + 0.5 * (y[one] @ y[one] - mean @ precision @ mean)
        variance = rate / (shape - 1)
        sd = (torch.linalg.inv(precision).diagonal() * variance).sqrt()
        rows.append([mean[0], sd[0], mean[1], sd[1], variance, variance / (shape - 2).sqrt()])
    return torch.tensor(rows)


def gibbs(t, y, joint, sweeps=1500, chains=20):
    """The same with the components summed out, and their probabilities: drawn in turn from what they are
    given the other, p(x, component) of each row known.

    :param joint: log p(x_i, k), shape ``(N, K)``, -inf where a label excludes k.
    """
    num, size = len(t), joint.shape[-1]
    design = torch.stack([torch.ones_like(t), t], -1)
    squares = (design.unsqueeze(-1) * design.unsqueeze(-2)).flatten(-2)
    component = joint.argmax(-1).expand(chains, num)
    draws, probs = [], torch.zeros(num, size)
    for sweep in range(sweeps):
        mine = torch.nn.functional.one_hot(component, size).to(t).mT
        precision = (mine @ squares).unflatten(-1, (2, 2)) + torch.eye(2) / SPREAD
        covariance = torch.linalg.inv(precision)
        mean = (covariance @ (mine @ (design * y.unsqueeze(-1))).unsqueeze(-1)).squeeze(-1)
        rate = RATE + 0.5 * (mine @ y**2 - (mean * (precision @ mean.unsqueeze(-1)).squeeze(-1)).sum(-1))
        variance = rate / dist.Gamma(SHAPE + 0.5 * mine.sum(-1), 1.0).sample()
        scale_tril = torch.linalg.cholesky(covariance * variance[..., None, None])
        coefficients = dist.MultivariateNormal(mean, scale_tril=scale_tril).sample()
        outcome = dist.Normal(coefficients @ design.T, variance.sqrt().unsqueeze(-1)).log_prob(y)
        given = (joint.T + outcome).mT.softmax(-1)
        component = dist.Categorical(given).sample()
        if sweep >= sweeps // 5:
            draws.append(torch.cat([coefficients, variance.unsqueeze(-1)], -1))
            probs += given.mean(0)
    values = torch.cat(draws)
    return torch.stack([values.mean(0), values.std(0)], -1).flatten(-2), probs / len(draws)


def regression(vmonf):
    """The model with conjugate priors, whose posterior given the components is closed."""

    def model(x, t, y, labels, size=None, rows=None):
        shape = torch.full((vmonf.num_components,), SHAPE)
        variance = pyro.sample("variance", dist.InverseGamma(shape, RATE).to_event(1))
        spread = (SPREAD * variance).sqrt()
        alpha = pyro.sample("alpha", dist.Normal(torch.zeros_like(spread), spread).to_event(1))
        beta = pyro.sample("beta", dist.Normal(torch.zeros_like(spread), spread).to_event(1))
        rows = torch.arange(len(t)) if rows is None else rows
        with pyro.plate("data", size or len(t), subsample=rows):
            component = vmonf.sample_component(x, labels)
            loc = Vindex(alpha)[..., component] + Vindex(beta)[..., component] * t
            pyro.sample("y", dist.Normal(loc, Vindex(variance)[..., component].sqrt()), obs=y)

    return model


def wings(num, **options):
    return with_outcomes(*pinwheel(num, 3, seed=0, **options), seed=0)


def with_outcomes(points, component, seed):
    """The components; standardised rows, a covariate, an outcome, and five labels of each component."""
    labels = torch.tensor(hide_labels(component, 5, seed=seed))
    x, component = torch.tensor((points - points.mean(0)) / points.std(0)), torch.tensor(component)
    t = torch.randn(len(x))
    alpha, beta = COEFFICIENTS[component].unbind(-1)
    return component, (x, t, alpha + beta * t + NOISE[component] * torch.randn(len(x)), labels)


def moments(guide):
    with torch.no_grad():
        draws = guide.sample_posterior(20_000)
    values = torch.stack([draws[site] for site in ("alpha", "beta", "variance")], -1)
    return torch.stack([values.mean(0), values.std(0)], -1).flatten(-2)


def assert_near(found, truth, mean=0.1, sd=0.1):
    """Means are within so many standard deviations, and these within so large a share."""
    off = ((found - truth)[:, ::2] / truth[:, 1::2]).abs().max()
    ratio = found[:, 1::2] / truth[:, 1::2]
    assert off < mean, f"a mean is off by {off:.2f} standard deviations"
    assert (ratio - 1).abs().max() < sd, f"standard deviations are {ratio} of the right ones"


def labelled(joint, labels):
    allowed = (labels.unsqueeze(-1) == torch.arange(joint.shape[-1])) | (labels.unsqueeze(-1) == -1)
    return torch.where(allowed, joint, -math.inf)


def accuracy(probs, component):
    return (probs.argmax(-1) == component).double().mean().item()


def component_probs(model, guide, rows, num=30):
    """p(component | x, y, labels), averaged over draws of the guide."""
    with torch.no_grad():
        each = [elbo().compute_marginals(model, guide, *rows)["component"].probs for _ in range(num)]
    return torch.stack(each).mean(0)


def test_conjugate_regression_is_what_gibbs_finds_with_all_labels():
    component, (_, t, y, _) = wings(40)
    joint = torch.where(torch.nn.functional.one_hot(component).bool(), 0.0, -math.inf)
    assert_near(gibbs(t, y, joint)[0], conjugate(t, y, component), mean=0.03, sd=0.03)


def test_clear_components_give_the_posterior_of_known_ones():
    """Wings apart: the mixture is fitted to x first, with few labels, and then held."""
    pytest.importorskip("sklearn")
    component, rows = wings(60, radial_std=0.15)
    mixture = FlowMixture(3, flow="realnvp", init="label_spreading", max_iter=150, random_state=0)
    vmonf = mixture.fit(rows[0], rows[3]).model_.requires_grad_(False)
    model = regression(vmonf)
    guide = AutoRealNVP(model)
    result = fit(model, guide, *rows, seed=0, progress=False)
    assert result.converged
    truth = conjugate(*rows[1:3], component)
    assert_near(moments(guide), truth)
    assert accuracy(component_probs(model, guide, rows), component) == 1.0
    assert diagnose(model, guide, *rows, seed=0).verdict == "good"


@pytest.fixture(scope="module")
def overlapping():
    """Moons that overlap: a start on x with labels, then all together, with the whole data and batches."""
    pytest.importorskip("sklearn")
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    component, rows = with_outcomes(*two_moons(300, noise=0.2, seed=4), seed=4)
    start = FlowMixture(2, flow="realnvp", random_state=0).fit(rows[0], rows[3]).model_
    fits = {}
    for kind in ("whole", "batches"):
        pyro.clear_param_store()
        vmonf = copy.deepcopy(start)
        model = regression(vmonf)
        guide = AutoRealNVP(model)
        options = {"num_steps": 300, "seed": 0, "progress": False}
        if kind == "whole":
            fit(model, guide, *rows, **options)
        else:
            parts = torch.randperm(300).split(100)
            batches = [(*(each[part] for each in rows), 300, part) for part in parts]
            fit(model, guide, batches=batches, **options)
        # The posterior given the mixture: the parameters stay, the guide goes on.
        vmonf.requires_grad_(False)
        final = AutoRealNVP(model)
        result = fit(model, final, *rows, init=guide, num_steps=1000, seed=0, progress=False)
        fits[kind] = model, final, vmonf, result
    return component, rows, start, fits


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "batches"])
def test_overlapping_components(overlapping, kind):
    component, rows, start, fits = overlapping
    model, guide, vmonf, result = fits[kind]
    x, t, y, labels = rows
    assert result.converged
    joint = labelled(vmonf.joint_log_prob(x), labels)
    truth, expected = gibbs(t, y, joint)
    assert_near(moments(guide), truth, mean=0.05, sd=0.05)
    probs = component_probs(model, guide, rows)
    assert (probs - expected).abs().max() < 0.03
    assert accuracy(probs, component) > accuracy(start.responsibilities(x), component)
    assert diagnose(model, guide, *rows, seed=0).verdict == "good"


@pytest.mark.slow
def test_minibatches_agree_with_the_whole_data(overlapping):
    _, rows, _, fits = overlapping
    found = [moments(fits[kind][1]) for kind in ("whole", "batches")]
    assert_near(*found, mean=0.3, sd=0.1)
    probs = [component_probs(*fits[kind][:2], rows) for kind in ("whole", "batches")]
    assert (probs[0].argmax(-1) == probs[1].argmax(-1)).double().mean() > 0.98
