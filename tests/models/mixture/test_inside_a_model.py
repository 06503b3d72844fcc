"""VMoNF's component as a site of a larger model: objective, gradients, minibatches, names, and fits."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule
from pyro.ops.indexing import Vindex

from pyro_flowvi import AutoRealNVP, VMoNF

NUM = 3
SITES = ("alpha", "beta", "sigma")


pytestmark = pytest.mark.usefixtures("double")


def elbo(**options):
    return TraceEnum_ELBO(max_plate_nesting=1, **options)


def data(num=12):
    x = torch.randn(num, 2)
    labels = torch.full((num,), -1)
    labels[:3] = torch.arange(3)
    return x, torch.randn(num), torch.randn(num), labels


def small(num=NUM, **options):
    """A mixture away from its start."""
    vmonf = VMoNF(num, 2, **{"num_layers": 2, "hidden": (4,), **options})
    for param in vmonf.parameters():
        param.data.add_(0.2 * torch.randn_like(param))
    return vmonf


class Regression(PyroModule):
    """An intercept, a slope and a noise for each component."""

    def __init__(self, vmonf, drawn_weights=False):
        super().__init__()
        self.vmonf, self.drawn_weights = vmonf, drawn_weights

    def forward(self, x, t, y, labels=None, size=None, rows=None, mask=None, seen=True):
        num = self.vmonf.num_components
        logits = None
        if self.drawn_weights:
            logits = pyro.sample("weights", dist.Dirichlet(torch.full((num,), 2.0))).log()
        alpha = pyro.sample("alpha", dist.Normal(torch.zeros(num), 2.0).to_event(1))
        beta = pyro.sample("beta", dist.Normal(torch.zeros(num), 2.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(torch.ones(num)).to_event(1))
        rows = torch.arange(len(t)) if rows is None else rows
        with pyro.plate("data", size or len(t), subsample=rows):
            component = self.vmonf.sample_component(x, labels, logits=logits, mask=mask)
            loc = Vindex(alpha)[..., component] + Vindex(beta)[..., component] * t
            with poutine.mask(mask=seen):
                pyro.sample("y", dist.Normal(loc, Vindex(sigma)[..., component]), obs=y)


def as_function(module):
    """The same model with the mixture in a closure, and no module of Pyro around it."""
    return lambda *args, **kwargs: type(module).forward(module, *args, **kwargs)


def continuous(model):
    return poutine.block(model, hide=["component"])


def by_hand(vmonf, point, x, t, y, labels=None, mask=None, seen=True):
    """log p(latents) + Σ_i log Σ_k π_k p(x_i | k) p(y_i | k), with the components of a label alone."""
    alpha, beta, sigma = (point[site] for site in SITES)
    prior = dist.Normal(0.0, 2.0).log_prob(torch.cat([alpha, beta])).sum()
    prior = prior + dist.HalfNormal(1.0).log_prob(sigma).sum()
    logits = vmonf.weights.logits
    if "weights" in point:
        logits = point["weights"].log()
        prior = prior + dist.Dirichlet(torch.full_like(logits, 2.0)).log_prob(point["weights"])
    each = vmonf.mixture().component_log_prob(x.nan_to_num())
    known = torch.ones(len(x), dtype=torch.bool) if mask is None else mask
    joint = logits.log_softmax(-1) + torch.where(known.unsqueeze(-1), each, 0.0)
    outcome = dist.Normal(alpha + beta * t.unsqueeze(-1), sigma).log_prob(y.unsqueeze(-1))
    joint = joint + outcome * torch.as_tensor(seen).unsqueeze(-1)
    if labels is not None:
        allowed = (labels.unsqueeze(-1) == vmonf.classes) | (labels.unsqueeze(-1) == -1)
        joint = torch.where(allowed, joint, -math.inf)
    return prior + joint.logsumexp(-1).sum()


MODELS = {
    "attribute": lambda vmonf: Regression(vmonf),
    "closure": lambda vmonf: as_function(Regression(vmonf)),
}
OPTIONS = [
    {},
    {"shared_layers": 2, "weights": "fixed"},
    {"num": 4, "classes": [0, 1, 1, 2]},
    {"flow": "neural_spline"},
]


def agrees_with_hand(model, vmonf, call, **point_options):
    """The objective of point masses is the hand-written sum, and so is its gradient in every parameter."""
    guide = AutoDelta(continuous(model))
    found = elbo().differentiable_loss(model, guide, **call)
    point = {site: getattr(guide, site) for site in (*SITES, *point_options.get("more", ()))}
    hand = {key: value for key, value in call.items() if key not in ("size", "rows")}
    expected = -by_hand(vmonf, point, **hand)
    assert torch.allclose(found, expected, atol=1e-9)
    params = [*(p for p in vmonf.parameters() if p.requires_grad), *guide.parameters()]
    own = vmonf.weights.logits
    params = [p for p in params if not point_options or p is not own]
    for one, other in zip(*(torch.autograd.grad(each, params) for each in (found, expected)), strict=True):
        assert torch.allclose(one, other, atol=1e-9)
        assert other.abs().max() > 0


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_objective_and_gradients_are_those_of_the_sum_by_hand(kind, options):
    vmonf = small(**options)
    x, t, y, labels = data()
    for call in ({"labels": labels}, {"labels": None}, {"labels": labels.clamp_min(0)}):
        agrees_with_hand(MODELS[kind](vmonf), vmonf, {"x": x, "t": t, "y": y, **call})


def test_rows_without_x_or_without_y():
    vmonf = small()
    x, t, y, labels = data()
    mask, seen = torch.arange(12) % 3 != 2, torch.arange(12) % 4 != 1
    x[~mask] = torch.nan
    call = {"x": x, "t": t, "y": y, "labels": labels, "mask": mask, "seen": seen}
    agrees_with_hand(Regression(vmonf), vmonf, call)


def test_weights_from_a_site_of_the_model():
    vmonf = small()
    x, t, y, labels = data()
    call = {"x": x, "t": t, "y": y, "labels": labels}
    agrees_with_hand(Regression(vmonf, drawn_weights=True), vmonf, call, more=("weights",))
    assert not [key for key in pyro.get_param_store() if key.startswith(f"{vmonf.name}.weights")]


def test_weights_that_depend_on_covariates():
    vmonf = small()
    x, t, _, labels = data()
    slope = torch.tensor([0.0, 1.0, -2.0])

    def model():
        with pyro.plate("data", len(x)):
            vmonf.sample_component(x, labels, logits=slope * t.unsqueeze(-1))

    joint = (slope * t.unsqueeze(-1)).log_softmax(-1) + vmonf.mixture().component_log_prob(x)
    allowed = (labels.unsqueeze(-1) == torch.arange(NUM)) | (labels.unsqueeze(-1) == -1)
    expected = torch.where(allowed, joint, -math.inf).logsumexp(-1).sum()
    assert elbo().loss(model, lambda: None) == pytest.approx(-expected.item(), abs=1e-9)


@pytest.mark.parametrize("make_guide", [AutoDelta, AutoNormal, AutoRealNVP])
def test_minibatches_are_unbiased(make_guide):
    """The mean over a partition of the rows is the objective of all, at the same draws of the guide."""
    vmonf = small()
    model = Regression(vmonf)
    x, t, y, labels = data()
    guide = make_guide(continuous(model))
    guide(x, t, y, labels)
    params = [*vmonf.parameters()]

    def value(rows, size=None):
        pyro.set_rng_seed(1)
        batch = (each[rows] for each in (x, t, y, labels))
        loss = elbo().differentiable_loss(model, guide, *batch, size=size)
        return loss, torch.autograd.grad(loss, params)

    whole, gradients = value(torch.arange(12))
    parts = [value(rows, size=12) for rows in torch.randperm(12).split(4)]
    assert torch.allclose(torch.stack([loss for loss, _ in parts]).mean(), whole, atol=1e-9)
    for i, gradient in enumerate(gradients):
        assert torch.allclose(sum(each[i] for _, each in parts) / len(parts), gradient, atol=1e-9)


def test_groups_of_rows():
    """A component for each group, with several outcomes: x has the dimensions of the plates around."""
    vmonf = small()
    x, y = torch.randn(5, 1, 2), torch.randn(5, 7)
    labels = torch.tensor([0, 1, -1, -1, 2]).unsqueeze(-1)
    level = torch.tensor([0.0, 1.0, 2.0])

    def model():
        with pyro.plate("groups", 5, dim=-2):
            component = vmonf.sample_component(x, labels)
            with pyro.plate("data", 7, dim=-1):
                pyro.sample("y", dist.Normal(level[component], 1.0), obs=y)

    outcome = dist.Normal(level, 1.0).log_prob(y.unsqueeze(-1)).sum(1)
    joint = vmonf.joint_log_prob(x.squeeze(1)) + outcome
    allowed = (labels == torch.arange(NUM)) | (labels == -1)
    expected = torch.where(allowed, joint, -math.inf).logsumexp(-1).sum()
    loss = TraceEnum_ELBO(max_plate_nesting=2).loss(model, lambda: None)
    assert loss == pytest.approx(-expected.item(), abs=1e-9)


@pytest.mark.parametrize("options", [{"supervised_weight": 3.0}, {"consistency": 2.0}])
def test_rows_without_x_in_the_further_terms(options):
    """They count as they would by themselves, with a label alone."""
    vmonf = small(**options, consistency_noise=1e-9)
    x, _, _, labels = data()
    mask = torch.arange(12) > 1

    def model(x, labels, mask=None):
        with pyro.plate("data", len(x)):
            vmonf.sample_component(x, labels, mask=mask)

    found = elbo().loss(model, lambda *args: None, x, labels, mask)
    weight = options.get("supervised_weight", 1.0)
    unknown = weight * vmonf.weights.logits.log_softmax(-1)[labels[:2]].sum()
    known = elbo().loss(model, lambda *args: None, x[2:], labels[2:])
    assert found == pytest.approx(known - unknown.item(), abs=1e-4)


def test_amortised_guide():
    """The guide's q(c | x) gives the ELBO, and rows with a label have their component for certain."""
    vmonf = small(inference="amortized")
    x, t, y, labels = data()
    level = torch.tensor([0.0, 1.0, 2.0])

    def model():
        with pyro.plate("data", len(x)):
            component = vmonf.sample_component(x, labels)
            pyro.sample("y", dist.Normal(level[component] + t, 1.0), obs=y)

    def guide():
        with pyro.plate("data", len(x)):
            vmonf.guide_component(x, labels)

    q = vmonf.classify(x)
    q = torch.where((labels >= 0).unsqueeze(-1), torch.eye(NUM)[labels], q)
    outcome = dist.Normal(level + t.unsqueeze(-1), 1.0).log_prob(y.unsqueeze(-1))
    expected = (q * (vmonf.joint_log_prob(x) + outcome) - torch.special.xlogy(q, q)).sum()
    assert elbo().loss(model, guide) == pytest.approx(-expected.item(), abs=1e-9)
    with pytest.raises(ValueError, match="inference: expected 'amortized'"):
        small().guide_component(x)


# -- parameters -----------------------------------------------------------------------------------


def params_of(model, *args, **kwargs):
    trace = poutine.trace(model).get_trace(*args, **kwargs)
    return [site["value"] for site in trace.nodes.values() if site["type"] == "param"]


@pytest.mark.parametrize("kind", MODELS)
def test_parameters_stand_in_the_store_once(kind):
    vmonf = small(name="inner")
    shown = params_of(MODELS[kind](vmonf), *data())
    assert {id(p) for p in shown} == {id(p) for p in vmonf.parameters()}
    assert len(shown) == len(list(vmonf.parameters())) == len(pyro.get_param_store())
    assert all(key.startswith("inner.") for key in pyro.get_param_store())


def test_copies_of_a_larger_model_have_parameters_of_their_own():
    first = Regression(small())
    other = copy.deepcopy(first)
    shown = [params_of(model, *data()) for model in (first, other)]
    assert not {id(p) for p in shown[0]} & {id(p) for p in shown[1]}
    assert len(pyro.get_param_store()) == 2 * len(shown[0])
