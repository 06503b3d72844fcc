"""Objectives: gradients against closed forms, quadrature, enumeration; what is logged, dropped, refused."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.testing.rejection_gamma import ShapeAugmentedGamma
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from pyro.nn import PyroModule
from pyro.optim import Adam
from torch.distributions import constraints, kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flowvi import FLOWS, AutoFlow, CompiledSVI
from pyro_flowvi._program.scoring import Scoring, is_scoring
from pyro_flowvi.objectives.annealed import TraceAnnealed_ELBO
from pyro_flowvi.objectives.importance_weighted import TraceIW_ELBO
from pyro_flowvi.objectives.path_gradient import TraceSTL_ELBO
from pyro_flowvi.objectives.pyro_corrected import TraceAuxiliary_ELBO, TraceMeanFieldJacobian_ELBO
from pyro_flowvi.transforms import LowerAffine, autoregressive
from tests.objectives.cases import (
    BETA,
    FINITE,
    GUIDES,
    MEAN,
    TRIL,
    assert_unbiased,
    auto_affine_flow,
    exact_gradient,
    flow_normal,
    gaussian,
    gradients,
    perturb,
    set_affine,
    stored,
    target,
)


def spread(draws):
    """Root of the trace of the covariance."""
    return draws.var(0).sum().sqrt().item()


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("name", GUIDES)
def test_stl_is_unbiased(name, vectorized):
    guide, normal = GUIDES[name](False)
    params = list(guide.parameters())
    elbo = TraceSTL_ELBO(num_particles=32 if vectorized else 4, vectorize_particles=vectorized)
    draws = gradients(elbo, gaussian, guide, params, 150)
    assert_unbiased(draws, exact_gradient(kl_divergence(normal(), target()), params))


@pytest.mark.parametrize("name", ["multivariate", "flow"])
def test_variance_is_zero_where_the_guide_is_the_posterior(name):
    """Roeder et al. 2017, section 3.3; spreads measured: below 1e-15 against 0.6 to 0.8."""
    guide, normal = GUIDES[name](True)
    assert kl_divergence(normal(), target()).item() == pytest.approx(0.0, abs=1e-12)
    params = list(guide.parameters())
    options = {"num_particles": 32, "vectorize_particles": True}
    path = gradients(TraceSTL_ELBO(**options), gaussian, guide, params, 50)
    total = gradients(Trace_ELBO(**options), gaussian, guide, params, 50)
    assert path.abs().max() < 1e-12
    assert spread(total) > 0.1


@pytest.mark.parametrize("name", ["planar", "realnvp", "neural_spline", "iaf", "maf", "sylvester", "radial"])
def test_variance_is_zero_for_flows_too(name):
    """Of all parameters, those of a flow that starts as the identity among them."""
    guide = AutoFlow(gaussian, lambda dim: FLOWS[name](dim, num_layers=2, hidden=(4,)), name="flow")
    guide()
    set_affine(guide)
    with torch.no_grad():  # named flows of few layers start near the identity, not all on it
        zeros = [p for n, p in guide.flow.named_parameters() if n.endswith((".u", ".b", "outer", "offset"))]
        for param in zeros:
            param.zero_()
    options = {"num_particles": 16, "vectorize_particles": True}
    params = list(guide.parameters())
    gap = guide.flow.forward_and_log_det(torch.randn(50, 2))[1] - TRIL.diagonal().log().sum()
    assert gap.abs().max() < 1e-10, "not the identity"
    assert gradients(TraceSTL_ELBO(**options), gaussian, guide, params, 10).abs().max() < 1e-9
    assert spread(gradients(Trace_ELBO(**options), gaussian, guide, params, 10)) > 0.1


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("vectorized", [True, False])
def test_logged_loss_is_that_of_trace_elbo(name, vectorized):
    guide, _ = GUIDES[name](False)
    options = {"num_particles": 4, "vectorize_particles": vectorized, "max_plate_nesting": 0}
    for method in ("loss", "loss_and_grads"):
        pyro.set_rng_seed(1)
        ours = getattr(TraceSTL_ELBO(**options), method)(gaussian, guide)
        pyro.set_rng_seed(1)
        assert ours == pytest.approx(getattr(Trace_ELBO(**options), method)(gaussian, guide), rel=1e-10)


def test_evaluate_loss_without_gradients():
    guide, _ = auto_affine_flow(False)
    svi = SVI(gaussian, guide, Adam({"lr": 0.01}), TraceSTL_ELBO(num_particles=4))
    pyro.set_rng_seed(1)
    ours = svi.evaluate_loss()
    pyro.set_rng_seed(1)
    assert ours == pytest.approx(Trace_ELBO(num_particles=4).loss(gaussian, guide), rel=1e-10)


def test_stl_of_a_foreign_flow_guide():
    """Pyro's own flow, whose density is scored through its inverse."""
    guide = pyro.infer.autoguide.AutoIAFNormal(gaussian, hidden_dim=[4])
    guide()
    params = list(guide.parameters())
    options = {"num_particles": 32, "vectorize_particles": True}
    path = gradients(TraceSTL_ELBO(**options), gaussian, guide, params, 60)
    total = gradients(Trace_ELBO(**options), gaussian, guide, params, 60)
    error = (path.mean(0) - total.mean(0)).abs()
    se = ((path.var(0) + total.var(0)) / 60).sqrt()
    assert (error < 4.5 * se + 1e-9).all()


# -- structure of models and guides --------------------------------------------------------------------
OBJECTIVES = {
    "stl": TraceSTL_ELBO,
    "annealed": lambda **options: TraceAnnealed_ELBO(lambda step: 1.0, **options),
}


@pytest.mark.parametrize("vectorized", [True, pytest.param(False, marks=pytest.mark.long)])
def test_guide_whose_sites_depend_on_one_another(vectorized):
    def model():
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.sample("z2", dist.Normal(z1, 0.5))

    def guide():
        loc, slope = pyro.param("loc", torch.tensor([0.5, -1.0])), pyro.param("slope", torch.tensor(2.0))
        z1 = pyro.sample("z1", dist.Normal(loc[0], 0.7))
        scale = pyro.param("log_scale", torch.tensor(-0.5)).exp()
        pyro.sample("z2", dist.Normal(loc[1] + slope * z1, scale))

    def exact(loc, slope, log_scale):
        zero, s = torch.zeros(()), log_scale.exp()
        row = torch.stack([torch.tensor(0.7), zero]), torch.stack([0.7 * slope, s])
        q = dist.MultivariateNormal(
            torch.stack([loc[0], loc[1] + slope * loc[0]]), scale_tril=torch.stack(row)
        )
        tril = torch.tensor([[1.0, 0.0], [1.0, 0.5]])
        return kl_divergence(q, dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))

    elbo = TraceSTL_ELBO(num_particles=8, vectorize_particles=vectorized)
    elbo.loss(model, guide)
    params = stored("loc", "slope", "log_scale")
    assert_unbiased(gradients(elbo, model, guide, params, 300), exact_gradient(exact(*params), params))


def rows_kl(loc, log_scale, y):
    """KL from the posterior of each row of z ~ N(0, 1), y ~ N(z, 1), up to a constant."""
    return kl_divergence(dist.Normal(loc, log_scale.exp()), dist.Normal(y / 2, math.sqrt(0.5)))


def rows_params(y):
    loc = pyro.param("loc", torch.linspace(-1.0, 1.0, len(y)))
    return loc, pyro.param("log_scale", -0.2 * torch.ones(len(y)))


@pytest.mark.parametrize("vectorized", [True, pytest.param(False, marks=pytest.mark.long)])
def test_subsampled_plate(vectorized):
    y = torch.tensor([1.0, -1.0, 2.0, 0.5])

    def model(y):
        with pyro.plate("rows", 4, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    def guide(y):
        loc, log_scale = rows_params(y)
        with pyro.plate("rows", 4, subsample_size=2) as index:
            pyro.sample("z", dist.Normal(loc[index], log_scale[index].exp()))

    elbo = TraceSTL_ELBO(num_particles=4, vectorize_particles=vectorized)
    elbo.loss(model, guide, y)
    params = stored("loc", "log_scale")
    exact = exact_gradient(rows_kl(*params, y).sum(), params)
    assert_unbiased(gradients(elbo, model, guide, params, 400, (y,)), exact)


@pytest.mark.parametrize("vectorized", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("change", ["mask", "scale"])
def test_masks_and_scales(change, vectorized):
    y = torch.tensor([1.0, -1.0, 2.0])
    weight = {"mask": torch.tensor([True, False, True]), "scale": 0.3}[change]

    @getattr(poutine, change)(**{change: weight})
    def model(y):
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    @getattr(poutine, change)(**{change: weight})
    def guide(y):
        loc, log_scale = rows_params(y)
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    elbo = TraceSTL_ELBO(num_particles=4, vectorize_particles=vectorized)
    elbo.loss(model, guide, y)
    params = stored("loc", "log_scale")
    exact = exact_gradient((weight * rows_kl(*params, y)).sum(), params)
    assert_unbiased(gradients(elbo, model, guide, params, 300, (y,)), exact)


@pytest.mark.parametrize("change", ["mask", "scale"])
def test_a_flow_guide_masked_or_scaled_as_a_whole(change):
    """Its own score is of the plain density: the density is then taken at the draw."""
    weight = {"mask": torch.tensor(True), "scale": 0.3}[change]
    guide, normal = auto_affine_flow(False)
    handler = getattr(poutine, change)
    elbo = TraceSTL_ELBO(num_particles=32, vectorize_particles=True)
    params = list(guide.parameters())
    options = {change: weight}
    draws = gradients(elbo, handler(gaussian, **options), handler(guide, **options), params)
    assert_unbiased(draws, exact_gradient(weight * kl_divergence(normal(), target()), params))


@pytest.mark.parametrize("kind", [AutoNormal, AutoFlow])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_constrained_support(objective, kind):
    def model():
        pyro.sample("x", dist.LogNormal(0.4, 0.5))

    guide = (
        AutoNormal(model, init_scale=0.8) if kind is AutoNormal else AutoFlow(model, LowerAffine, name="a")
    )
    guide()
    elbo = OBJECTIVES[objective](num_particles=32, vectorize_particles=True)
    params = list(guide.parameters())
    if kind is AutoNormal:
        q = dist.Normal(guide.locs.x, guide.scales.x)
    else:
        q = dist.Normal(guide.flow(torch.zeros(1)), guide.flow(torch.ones(1)) - guide.flow(torch.zeros(1)))
    exact = exact_gradient(kl_divergence(q, dist.Normal(0.4, 0.5)).sum(), params)
    assert_unbiased(gradients(elbo, model, guide, params), exact)


def test_list_of_guides():
    def model():
        a = pyro.sample("a", target())
        pyro.sample("b", dist.LogNormal(0.5, 2.0))
        return a

    guide = AutoGuideList(model)
    flow = AutoFlow(poutine.block(model, hide=["b"]), LowerAffine, name="a")
    guide.append(flow)
    guide.append(AutoNormal(poutine.block(model, expose=["b"])))
    guide()
    perturb(flow)
    normal = guide[1]
    params = [*flow.parameters(), *normal.parameters()]
    exact = kl_divergence(flow_normal(flow), target())
    exact = exact + kl_divergence(dist.Normal(normal.locs.b, normal.scales.b), dist.Normal(0.5, 2.0))
    elbo = TraceSTL_ELBO(num_particles=32, vectorize_particles=True)
    assert_unbiased(gradients(elbo, model, guide, params), exact_gradient(exact, params))


def test_point_guides():
    """The gradient of a point is that of log p, of which nothing is random."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 2.0))
        pyro.sample("scale", dist.LogNormal(x, 1.0))

    guide = AutoDelta(model)
    guide()
    params = list(guide.parameters())
    for elbo in (TraceSTL_ELBO(), TraceSTL_ELBO(num_particles=3, vectorize_particles=True), TraceIW_ELBO(2)):
        ours = gradients(elbo, model, guide, params, 1)[0]
        torch.testing.assert_close(ours, gradients(Trace_ELBO(), model, guide, params, 1)[0])
    tempered = gradients(TraceAnnealed_ELBO(lambda step: BETA), model, guide, params, 1)[0]
    torch.testing.assert_close(tempered, BETA * ours)


def test_points_whose_parameters_are_in_their_density():
    """A flow written by hand: base noise, and its image as a Delta with the log-Jacobian as density."""

    def model():
        pyro.sample("z", dist.Normal(1.0, 2.0))

    def guide():
        loc, log_scale = pyro.param("loc", torch.tensor(0.0)), pyro.param("log_scale", torch.tensor(0.3))
        x = pyro.sample("base", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        density = -log_scale.expand(x.shape)
        pyro.sample("z", dist.Delta(loc + log_scale.exp() * x, log_density=density))

    elbo = TraceSTL_ELBO(num_particles=16, vectorize_particles=True)
    elbo.loss(model, guide)
    params = stored("loc", "log_scale")
    q = dist.Normal(params[0], params[1].exp())
    exact = exact_gradient(kl_divergence(q, dist.Normal(1.0, 2.0)), params)
    assert_unbiased(gradients(elbo, model, guide, params), exact)


def test_factor_in_the_guide():
    def guide():
        loc = pyro.param("loc", torch.tensor([0.5, -0.5]))
        x = pyro.sample("x", dist.Normal(loc, 1.0).to_event(1))
        pyro.factor("penalty", 3.0 * (x - loc.square()).sum(-1), has_rsample=True)

    elbo = TraceSTL_ELBO(num_particles=16, vectorize_particles=True)
    elbo.loss(gaussian, guide)
    params = stored("loc")
    q = dist.Normal(params[0], 1.0).to_event(1)
    penalty = 3.0 * (params[0] - params[0].square()).sum()
    exact = exact_gradient(kl_divergence(q, target()) + penalty, params)
    assert_unbiased(gradients(elbo, gaussian, guide, params), exact)


class Decoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 2)

    def forward(self, y):
        pyro.module("decoder", self)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(pyro.param("prior", torch.tensor(0.5)), 1.0))
            mean = self.layer(z.unsqueeze(-1))
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store because requires_grad=False")
@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_of_the_model(frozen):
    """E over the guide of the gradient of log p, by closed form: E z = loc, E z² = loc² + scale²."""
    y = torch.randn(3, 2)
    model = Decoder()

    def guide(y):
        loc, log_scale = rows_params(y)
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    elbo = TraceSTL_ELBO(num_particles=16, vectorize_particles=True)
    elbo.loss(model, guide, y)
    weight, bias = model.layer.weight, model.layer.bias
    loc, log_scale, prior = stored("loc", "log_scale", "prior")
    variance = (2 * log_scale).exp()
    misfit = (y - loc.unsqueeze(-1) * weight[:, 0] - bias).square().sum()
    expected = misfit + (variance.sum() * weight.square()).sum()
    expected = 0.5 * (expected + (variance + (loc - prior).square()).sum()) - log_scale.sum()
    if frozen:
        bias.requires_grad_(False)
    params = [p for p in (weight, bias, prior, loc, log_scale) if p.requires_grad]
    assert_unbiased(gradients(elbo, model, guide, params, 200, (y,)), exact_gradient(expected, params))
    assert [p.requires_grad for p in (weight, bias)] == [True, not frozen]
    assert bias.grad is None


@pytest.mark.parametrize("name", ["stl", "iw", "iw plain", "annealed"])
def test_no_parameter_is_touched_but_in_its_gradient(name):
    elbo = {
        "stl": TraceSTL_ELBO(),
        "iw": TraceIW_ELBO(2),
        "iw plain": TraceIW_ELBO(2, dreg=False),
        "annealed": TraceAnnealed_ELBO(lambda step: 0.5),
    }[name]
    guide, _ = auto_affine_flow(False)
    guide.affine.loc.requires_grad_(False)
    before = {key: (p.requires_grad, p.detach().clone()) for key, p in guide.named_parameters()}

    def watched():
        assert {key: p.requires_grad for key, p in guide.named_parameters()} == {
            key: flag for key, (flag, _) in before.items()
        }
        gaussian()

    elbo.loss_and_grads(watched, guide)
    for key, param in guide.named_parameters():
        flag, value = before[key]
        assert param.requires_grad == flag
        assert torch.equal(param, value)
        assert (param.grad is None) != flag


@pytest.mark.parametrize("kind", ["iaf", "neural_spline_ar"])
def test_autoregressive_guides_take_no_inverse_pass(kind, monkeypatch):
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(32), 1.0).to_event(1))

    def refuse(*args, **kwargs):
        raise AssertionError("an inverse pass")

    monkeypatch.setattr(autoregressive, "solve_autoregressive", refuse)
    guide = AutoFlow(model, lambda dim: FLOWS[kind](dim, num_layers=2, hidden=(32,)), name="flow")
    for elbo in (TraceSTL_ELBO(num_particles=4, vectorize_particles=True), TraceIW_ELBO(2, dreg=False)):
        svi = SVI(model, guide, Adam({"lr": 0.01}), elbo)
        assert all(math.isfinite(svi.step()) for _ in range(3))
        assert math.isfinite(svi.evaluate_loss())


def test_scores_are_asked_for_within_other_handlers_and_traces():
    seen = []

    def guide(x):
        with pyro.plate("rows", 2), poutine.scale(scale=2.0), poutine.block(), poutine.mask(mask=True):
            seen.append(is_scoring())
        return x + 1.0

    def asked(x):
        with Scoring():
            return poutine.trace(guide)(x)

    for run in (guide, asked, make_fx(asked), guide):
        run(torch.zeros(2))
    with pytest.raises(ZeroDivisionError), Scoring():
        guide(1 / 0)
    assert seen == [False, True, True, False]
    assert not is_scoring()


# -- what is left out, and what is refused -------------------------------------------------------------
def holed(bound):
    """A model without a density beyond a bound."""

    def model():
        weight = pyro.param("weight", torch.tensor(1.0))
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("hole", weight * torch.where(x > bound, torch.nan, 0.0 * x))

    return model


def normal_guide():
    loc, scale = (
        pyro.param("loc", torch.tensor(0.3)),
        pyro.param("scale", torch.tensor(2.0), constraints.positive),
    )
    pyro.sample("x", dist.Normal(loc, scale))


@pytest.fixture
def unvalidated():
    """Where Pyro validates, a factor of NaN is an error."""
    with pyro.validation_enabled(False):
        yield


@FINITE
@pytest.mark.usefixtures("unvalidated")
@pytest.mark.parametrize("vectorized", [True, False])
def test_particles_that_fail_are_left_out_and_counted(vectorized):
    elbo = TraceSTL_ELBO(num_particles=50, vectorize_particles=vectorized, max_plate_nesting=0)
    normal_guide()
    pyro.set_rng_seed(5)
    loss = elbo.loss_and_grads(holed(1.0), normal_guide)
    pyro.set_rng_seed(5)
    noise = torch.randn(50) if vectorized else torch.stack([torch.randn(()) for _ in range(50)])
    loc, log_scale = (p.detach().requires_grad_() for p in stored("loc", "scale"))
    x = loc + log_scale.exp() * noise
    kept = x <= 1.0
    assert 0 < kept.sum() < 50
    assert elbo.num_dropped == (~kept).sum()
    fixed = dist.Normal(loc.detach(), log_scale.detach().exp())
    each = (fixed.log_prob(x) - dist.Normal(0.0, 1.0).log_prob(x))[kept]
    assert loss == pytest.approx(each.mean().item(), rel=1e-10)
    for ours, truth in zip(
        stored("loc", "scale"), torch.autograd.grad(each.mean(), [loc, log_scale]), strict=True
    ):
        torch.testing.assert_close(ours.grad, truth)
    elbo.loss_and_grads(holed(1.0), normal_guide)
    assert elbo.num_dropped > (~kept).sum()


@FINITE
@pytest.mark.parametrize("vectorized", [True, False])
def test_a_gradient_that_is_not_finite_is_left_out_too(vectorized):
    """The density is finite beyond the bound, its gradient 0 times infinity."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("kink", ((x < 1.0) * (1.0 - x)).sqrt())

    elbo = TraceSTL_ELBO(num_particles=50, vectorize_particles=vectorized, max_plate_nesting=0)
    normal_guide()
    pyro.set_rng_seed(5)
    loss = elbo.loss_and_grads(model, normal_guide)
    pyro.set_rng_seed(5)
    noise = torch.randn(50) if vectorized else torch.stack([torch.randn(()) for _ in range(50)])
    assert elbo.num_dropped == (0.3 + 2.0 * noise > 1.0).sum() > 0
    assert math.isfinite(loss)
    assert all(param.grad.isfinite().all() for param in stored("loc", "scale"))
    pyro.set_rng_seed(5)
    assert elbo.differentiable_loss(model, normal_guide).item() == pytest.approx(loss)


@FINITE
@pytest.mark.usefixtures("unvalidated")
@pytest.mark.parametrize(
    "elbo", [TraceSTL_ELBO(), TraceIW_ELBO(2), TraceIW_ELBO(4, vectorize_particles=True)]
)
def test_no_particle_left_is_a_loss_of_nan(elbo):
    normal_guide()
    before = [p.detach().clone() for p in stored("loc", "scale")]
    loss = elbo.loss_and_grads(holed(-1e9), normal_guide)
    assert math.isnan(loss)
    assert elbo.num_dropped == elbo.num_particles
    for param, value in zip(stored("loc", "scale"), before, strict=True):
        assert torch.equal(param, value)
        assert param.grad is None or (param.grad == 0).all()


def test_refusals_name_the_site():
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k, 1.0))

    def discrete():
        pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    def partly():
        pyro.sample("k", ShapeAugmentedGamma(torch.tensor(2.0), torch.tensor(1.0)))

    def continuous():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    for elbo in (TraceSTL_ELBO(), TraceIW_ELBO(2, dreg=False), TraceAnnealed_ELBO(lambda step: 1.0)):
        with pytest.raises(ValueError, match=r"site \'k\'.*reparameterised.*Bernoulli"):
            elbo.loss_and_grads(model, discrete)
        with pytest.raises(ValueError, match=r"site \'k\'.*reparameterised"):
            elbo.loss_and_grads(model, partly)
        with pytest.raises(ValueError, match=r"site \'k\'.*enumeration in the guide"):
            elbo.loss_and_grads(model, config_enumerate(discrete))
        with (
            pyro.validation_enabled(False),
            pytest.raises(ValueError, match=r"site \'k\'.*enumeration in the model"),
        ):
            elbo.loss_and_grads(config_enumerate(model), continuous)


def test_guides_that_are_handlers_are_refused():
    guide = pyro.infer.autoguide.AutoNormalMessenger(gaussian)
    with pytest.raises(ValueError, match=r"guide: expected a program, got the handler AutoNormalMessenger"):
        TraceSTL_ELBO(num_particles=2, vectorize_particles=True).loss_and_grads(gaussian, guide)


def test_what_pyro_validates_is_validated():
    def wide():
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def unmarked():
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0))

    with pytest.raises(ValueError, match="shapes disagree at site 'x'"):
        TraceSTL_ELBO().loss(gaussian, wide)
    with pytest.raises(ValueError, match="invalid log_prob shape"):
        TraceSTL_ELBO().loss(unmarked, unmarked)
    with pytest.warns(UserWarning, match="vars in model but not guide"):
        TraceSTL_ELBO().loss(gaussian, lambda: None)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TraceSTL_ELBO(num_particles=0), "num_particles"),
        (lambda: TraceIW_ELBO(1), "num_particles: expected at least 2"),
        (lambda: TraceAnnealed_ELBO(0.5), "schedule: expected a callable"),
        (
            lambda: TraceAnnealed_ELBO(lambda step: 0.0),
            "schedule: expected a positive number, got 0.0 at step 0",
        ),
        (lambda: TraceAnnealed_ELBO(lambda step: math.inf), "schedule: expected a positive number"),
    ],
)
def test_arguments_are_checked(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_guides_without_draws():
    def model():
        pyro.sample("y", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0), obs=torch.tensor(2.0))

    svi = SVI(model, lambda: None, Adam({"lr": 0.1}), TraceSTL_ELBO())
    for _ in range(200):
        svi.step()
    assert pyro.param("mean").item() == pytest.approx(2.0, abs=0.05)


def test_as_a_module():
    guide = AutoFlow(gaussian, LowerAffine, name="affine")
    model = PyroModule()
    model.forward = gaussian
    loss = TraceSTL_ELBO(num_particles=8, vectorize_particles=True)(model, guide)
    loss()
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    assert abs(value.item()) < 1e-3
    torch.testing.assert_close(flow_normal(guide).mean, MEAN, atol=0.02, rtol=0.0)


def steps(svi_class, make_elbo, compile_options, run):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide, _ = auto_affine_flow(False)
    elbo = make_elbo()
    svi = svi_class(gaussian, guide, Adam({"lr": 0.01}), elbo, **compile_options)
    losses = svi.run(12, progress=False).tolist() if run else [svi.step() for _ in range(12)]
    return losses, [p.detach().clone() for p in guide.parameters()], elbo


BATCH = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 0}
COMPILED = {
    "annealed": lambda: TraceAnnealed_ELBO(lambda step: 0.2 + 0.05 * step, **BATCH),
    "iw": lambda: TraceIW_ELBO(**BATCH),
    "stl": lambda: TraceSTL_ELBO(**BATCH),
    "looped": lambda: TraceSTL_ELBO(num_particles=2),
    "iw plain": lambda: TraceIW_ELBO(dreg=False, **BATCH),
    "auxiliary": lambda: TraceAuxiliary_ELBO(**BATCH),
    "mean field": lambda: TraceMeanFieldJacobian_ELBO(**BATCH),
}
NORMAL_RUN = ("annealed", "iw")


@pytest.mark.parametrize(
    "name", [n if n in NORMAL_RUN else pytest.param(n, marks=pytest.mark.long) for n in COMPILED]
)
def test_compiled_steps_are_those_of_stock_svi(name):
    """Of the annealed one, both ways to step; its β differs at each."""
    stock, expected, elbo = steps(SVI, COMPILED[name], {}, False)
    for run in (False, True) if name == "annealed" else (False,):
        ours, params, ours_elbo = steps(CompiledSVI, COMPILED[name], {"compile": True}, run)
        assert ours == pytest.approx(stock, rel=1e-8)
        for a, b in zip(params, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        assert (
            getattr(ours_elbo, "steps", 0) == getattr(elbo, "steps", 0) == (12 if name == "annealed" else 0)
        )
