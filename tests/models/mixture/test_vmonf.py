"""VMoNF: its objectives against sums over components, scikit-learn's mixtures, EM and maximum likelihood."""

import copy
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, infer_discrete

import pyro_flowvi
from pyro_flowvi.distributions import FlowDistribution, IndexedFlow, PolarNormal
from pyro_flowvi.flows import FLOWS
from pyro_flowvi.infer import CompiledSVI
from pyro_flowvi.models import VMoNF
from pyro_flowvi.transforms import Compose, ElementwiseAffine

pytestmark = pytest.mark.usefixtures("double")


def elbo(**options):
    return TraceEnum_ELBO(max_plate_nesting=1, **options)


def data(num=40):
    x = torch.randn(num, 2)
    x[: num // 2] += 3.0
    y = torch.full((num,), -1)
    y[:3], y[-2:] = 0, 1
    return x, y


def small(num=3, **options):
    """A model away from its start."""
    options = {"num_layers": 2, "hidden": (8,), **options}
    vmonf = VMoNF(num, 2, **options)
    for param in vmonf.parameters():
        param.data.add_(0.2 * torch.randn_like(param))
    return vmonf


def gap(q, p):
    return (q * (q.log() - p.log())).sum(-1)


OPTIONS = [{}, {"shared_layers": 2}, {"weights": "fixed"}, {"flow": "neural_spline"}]


@pytest.mark.parametrize("options", OPTIONS)
def test_exact_objective_is_the_likelihood(options):
    x, _ = data()
    vmonf = small(**options)
    assert elbo().loss(vmonf.model, vmonf.guide, x) == pytest.approx(
        -vmonf.log_prob(x).sum().item(), abs=1e-10
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_amortised_objective_is_the_elbo_and_the_gap_is_the_divergence(options):
    x, _ = data()
    vmonf = small(inference="amortized", temperature=0.7, **options)
    q = vmonf.classify(x)
    expected = (q * (vmonf.joint_log_prob(x) - q.log())).sum(-1)
    loss = elbo().loss(vmonf.model, vmonf.guide, x)
    assert loss == pytest.approx(-expected.sum().item(), abs=1e-10)
    evidence = vmonf.log_prob(x)
    assert torch.allclose(evidence - expected, gap(q, vmonf.responsibilities(x)), atol=1e-10)
    assert -loss <= evidence.sum().item()


def labelled_terms(vmonf, x, y):
    """log p(x) of rows without a label, log p(x, y) of the others."""
    joint = vmonf.joint_log_prob(x)
    known = joint.gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return torch.where(y >= 0, 0.0, joint.logsumexp(-1)), torch.where(y >= 0, known, 0.0)


@pytest.mark.parametrize("inference", ["exact", "amortized"])
def test_partly_labelled_batch_is_exact(inference):
    x, y = data()
    vmonf = small(inference=inference)
    unknown, known = labelled_terms(vmonf, x, y)
    if inference == "amortized":
        q = vmonf.classify(x)
        bound = (q * (vmonf.joint_log_prob(x) - q.log())).sum(-1)
        unknown = torch.where(y >= 0, 0.0, bound)
    loss = elbo().differentiable_loss(vmonf.model, vmonf.guide, x, y)
    assert torch.allclose(-loss, (unknown + known).sum(), atol=1e-10)
    params = list(vmonf.parameters())
    found = torch.autograd.grad(-loss, params)
    expected = torch.autograd.grad((unknown + known).sum(), params)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_labels_alone_and_none_at_all():
    x, y = data()
    vmonf = small()
    everywhere = torch.arange(len(x)) % 3
    _, known = labelled_terms(vmonf, x, everywhere)
    assert elbo().loss(vmonf.model, vmonf.guide, x, everywhere) == pytest.approx(
        -known.sum().item(), abs=1e-10
    )
    none = elbo().loss(vmonf.model, vmonf.guide, x, torch.full_like(y, -1))
    assert none == pytest.approx(elbo().loss(vmonf.model, vmonf.guide, x), abs=1e-10)


def test_weights_of_labels():
    x, y = data()
    vmonf = small(inference="amortized", supervised_weight=3.0, classifier_weight=2.0)
    plain = copy.deepcopy(vmonf)
    plain.supervised_weight, plain.classifier_weight = 1.0, 0.0
    _, known = labelled_terms(vmonf, x, y)
    log_q = vmonf.classify(x).log().gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    extra = 2.0 * known.sum() + 2.0 * log_q[y >= 0].sum()
    found = elbo().loss(vmonf.model, vmonf.guide, x, y) - elbo().loss(plain.model, plain.guide, x, y)
    assert found == pytest.approx(-extra.item(), abs=1e-9)


def test_minibatches_are_scaled():
    x, y = data()
    for vmonf in (small(), small(inference="amortized", supervised_weight=2.0, classifier_weight=1.0)):
        parts = [slice(0, 10), slice(10, 20), slice(20, 30), slice(30, 40)]
        losses = [elbo().loss(vmonf.model, vmonf.guide, x[part], y[part], size=40) for part in parts]
        assert np.mean(losses) == pytest.approx(elbo().loss(vmonf.model, vmonf.guide, x, y), abs=1e-9)


def test_several_components_of_a_class():
    x, y = data()
    for inference in ("exact", "amortized"):
        vmonf = small(4, classes=[0, 0, 1, 1], inference=inference)
        joint = vmonf.joint_log_prob(x).unflatten(-1, (2, 2))
        loss = elbo().loss(vmonf.model, vmonf.guide, x, y)
        if inference == "exact":
            known = joint.logsumexp(-1).gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)
            total = torch.where(y >= 0, known, joint.flatten(-2).logsumexp(-1)).sum()
            assert loss == pytest.approx(-total.item(), abs=1e-9)
        sums = vmonf.by_class(vmonf.responsibilities(x))
        assert torch.allclose(sums, joint.logsumexp(-1).softmax(-1), atol=1e-10)
        assert np.isfinite(loss)


def test_one_component_is_maximum_likelihood():
    x, _ = data()
    vmonf = small(1)
    alone = FlowDistribution(None, vmonf.components.part(0))
    assert elbo().loss(vmonf.model, vmonf.guide, x) == pytest.approx(
        -alone.log_prob(x).sum().item(), abs=1e-9
    )


def gaussians(weights):
    vmonf = VMoNF(3, 2, ElementwiseAffine)
    scale_tril = torch.randn(3, 2, 2).tril()
    scale_tril.diagonal(dim1=-2, dim2=-1).exp_()
    vmonf.place(torch.randn(3, 2), scale_tril, weights)
    return vmonf, scale_tril


def test_affine_components_have_the_likelihood_of_a_gaussian_mixture_and_the_gradient_of_em():
    mixture = pytest.importorskip("sklearn.mixture")
    x, _ = data()
    weights = torch.tensor([0.2, 0.3, 0.5])
    vmonf, scale_tril = gaussians(weights)
    covariances = scale_tril @ scale_tril.mT
    theirs = mixture.GaussianMixture(3)
    theirs.weights_, theirs.covariances_ = weights.numpy(), covariances.numpy()
    theirs.means_ = vmonf.components.each[-1].loc.detach().numpy()
    theirs.precisions_cholesky_ = np.linalg.cholesky(np.linalg.inv(covariances.numpy()))
    assert np.allclose(vmonf.log_prob(x).detach(), theirs.score_samples(x.numpy()), atol=1e-10)
    responsibilities = torch.as_tensor(theirs.predict_proba(x.numpy()))
    assert torch.allclose(vmonf.responsibilities(x), responsibilities, atol=1e-10)

    elbo().differentiable_loss(vmonf.model, vmonf.guide, x).backward()
    counts = responsibilities.sum(0)
    # EM: weights move to the mean responsibility, means to the weighted mean of the data.
    assert torch.allclose(-vmonf.weights.logits.grad, counts - len(x) * weights, atol=1e-9)
    moved = (responsibilities.mT @ x) - counts[:, None] * torch.as_tensor(theirs.means_)
    towards = torch.linalg.solve(covariances, moved.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(-vmonf.components.each[-1].loc.grad, towards, atol=1e-9)


def test_marginals_and_discrete_inference():
    x, y = data()
    vmonf = small()
    marginal = elbo().compute_marginals(vmonf.model, vmonf.guide, x)["component"]
    assert torch.allclose(marginal.probs, vmonf.responsibilities(x), atol=1e-10)
    with_labels = elbo().compute_marginals(vmonf.model, vmonf.guide, x, y)["component"].probs
    assert torch.allclose(with_labels[y >= 0], torch.eye(3)[y[y >= 0]], atol=1e-12)
    best = poutine.trace(infer_discrete(vmonf.model, first_available_dim=-2, temperature=0)).get_trace(x)
    assert (best.nodes["component"]["value"] == vmonf.responsibilities(x).argmax(-1)).all()


def test_dirichlet_weights():
    x, _ = data()
    vmonf = small(weights="dirichlet", concentration=0.5)
    vmonf.weights_posterior.logits.data.fill_(6.0)
    posterior, prior = dist.Dirichlet(torch.full((3,), 6.0).exp()), dist.Dirichlet(torch.full((3,), 0.5))
    draws = posterior.sample((2000,))
    log_lik = (draws.log().unsqueeze(1) + vmonf.mixture().component_log_prob(x)).logsumexp(-1).sum(-1)
    terms = (log_lik + prior.log_prob(draws) - posterior.log_prob(draws)).detach()
    losses = torch.tensor([elbo().loss(vmonf.model, vmonf.guide, x) for _ in range(300)])
    standard_error = (terms.var() / len(terms) + losses.var() / len(losses)).sqrt()
    assert abs(losses.mean() + terms.mean()) < 4 * standard_error
    assert torch.allclose(vmonf.mixture().weights, torch.full((3,), 1 / 3))


def test_dirichlet_posterior_is_the_conjugate_one():
    x = torch.randn(100, 2)
    x[:70] += 30.0
    vmonf = VMoNF(3, 2, ElementwiseAffine, weights="dirichlet", concentration=0.5)
    vmonf.place(torch.tensor([0.0, 30.0, -50.0]).unsqueeze(-1).expand(3, 2), torch.eye(2).expand(3, 2, 2))
    counts = torch.tensor([30.0, 70.0, 0.0])
    vmonf.weights_posterior.logits.data.copy_((counts + 0.5).log())
    own = dist.Normal(torch.where(torch.arange(100) < 70, 30.0, 0.0).unsqueeze(-1), 1.0).log_prob(x).sum()
    evidence = (
        own + torch.lgamma(counts + 0.5).sum() - 3 * math.lgamma(0.5) + math.lgamma(1.5) - math.lgamma(101.5)
    )
    for _ in range(5):  # at the posterior the estimate has no noise
        assert elbo().loss(vmonf.model, vmonf.guide, x) == pytest.approx(-evidence.item(), abs=1e-8)


def test_consistency():
    x, _ = data()
    vmonf = small(consistency=2.0, consistency_noise=1e-9, consistency_ramp=10)
    plain = copy.deepcopy(vmonf)
    plain.consistency = 0.0
    base = elbo().loss(plain.model, plain.guide, x)
    best = (
        vmonf.mixture().component_log_prob(x).gather(-1, vmonf.responsibilities(x).argmax(-1, keepdim=True))
    )
    for step, share in ((None, 1.0), (0, 0.0), (5, 0.5), (torch.tensor(20), 1.0)):
        found = elbo().loss(vmonf.model, vmonf.guide, x, step=step) - base
        assert found == pytest.approx(-2.0 * share * best.sum().item(), abs=1e-4)


def test_compiled_steps_are_the_eager_ones():
    x, y = data()
    vmonf = small(inference="amortized", num_layers=1)
    state = copy.deepcopy(vmonf.state_dict())

    def train(kind, **more):
        pyro.clear_param_store()
        vmonf.load_state_dict(state)
        pyro.set_rng_seed(1)
        svi = kind(vmonf.model, vmonf.guide, pyro.optim.Adam({"lr": 0.01}), elbo(), **more)
        losses = [svi.step(x, y) for _ in range(3)]
        return losses, [param.detach().clone() for param in vmonf.parameters()]

    (eager, params), (compiled, others) = train(SVI), train(CompiledSVI, compile=True)
    assert compiled == pytest.approx(eager, rel=1e-9)
    for one, other in zip(params, others, strict=True):
        assert torch.allclose(one, other, atol=1e-8)


def test_trains_under_stock_svi_and_fit():
    x, _ = data(200)
    vmonf = VMoNF(2, 2, num_layers=2, hidden=(8,))
    before = vmonf.log_prob(x).mean().item()
    result = pyro_flowvi.fit(vmonf.model, vmonf.guide, x, num_steps=150, progress=False)
    assert result.losses[-1] < result.losses[0]
    assert vmonf.log_prob(x).mean().item() > before + 0.5


def test_selected_components():
    x, _ = data()
    for options in ({}, {"weights": "dirichlet"}, {"inference": "amortized", "shared_layers": 1}):
        vmonf = small(**options)
        two = vmonf.select([2, 0])
        assert two.num_components == 2
        assert two.num_classes == 3
        assert two.name != vmonf.name
        joint = vmonf.mixture().component_log_prob(x)[:, [2, 0]]
        assert torch.allclose(two.mixture().component_log_prob(x), joint, atol=1e-12)
        elbo().differentiable_loss(two.model, two.guide, x).backward()
        assert all(param.grad is not None for param in two.parameters())
        assert all(param.grad is None for param in vmonf.parameters())
    with pytest.raises(ValueError, match="indices"):
        vmonf.select([])


def test_copies():
    x, _ = data()
    vmonf = small(inference="amortized")
    for other in (copy.deepcopy(vmonf), pickle.loads(pickle.dumps(vmonf))):
        assert other.name != vmonf.name
        assert torch.equal(other.log_prob(x), vmonf.log_prob(x))
    new = VMoNF(3, 2, num_layers=2, hidden=(8,), inference="amortized")
    new.load_state_dict(vmonf.state_dict())
    assert torch.equal(new.log_prob(x), vmonf.log_prob(x))


@pytest.mark.parametrize(
    "base",
    [
        lambda: dist.StudentT(torch.full((2,), 20.0), 0.0, 1.0).to_event(1),
        lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        lambda: PolarNormal(2),
    ],
)
def test_the_base_moves_along(base):
    x, _ = data()
    vmonf = small(base=base())
    expected = vmonf.log_prob(x)
    other = copy.deepcopy(vmonf).float()
    assert other.log_prob(x.float()).dtype == other.sample(3).dtype == torch.float32
    assert torch.allclose(other.log_prob(x.float()).double(), expected, atol=1e-3)
    assert vmonf.log_prob(x).equal(expected)
    assert other.double().sample(3).dtype == torch.float64


def test_param_store_restores(tmp_path):
    x, _ = data()
    vmonf = small(name="saved")
    elbo().loss(vmonf.model, vmonf.guide, x)
    pyro.get_param_store().save(tmp_path / "store.pt")
    expected = vmonf.log_prob(x).detach()
    del vmonf
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    new = VMoNF(3, 2, num_layers=2, hidden=(8,), name="saved")
    assert -elbo().loss(new.model, new.guide, x) == pytest.approx(expected.sum().item())


X, Y = torch.zeros(4, 2, dtype=torch.float64), torch.tensor([0, 1, 2, -1])


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (X, torch.tensor([0, 1, 3, -1]), r"y: expected labels from 0 to 2, or -1, got \[-1, 0, 1, 3\]"),
        (X, torch.tensor([0, 1, -2, -1]), "y: expected labels from 0 to 2, or -1"),
        (X, Y.double(), "y: expected integers"),
        (X, [0, 1, 2, -1], "y: expected integers"),
        (X, Y[:3], r"y: expected shape \(4,\)"),
        (X[:, :1], Y, r"x: expected shape \(N, 2\)"),
        (X[:0], Y[:0], "x: expected shape"),
        (X.long(), Y, "x: expected torch.float32 or torch.float64"),
        (X.numpy(), Y, "x: expected a tensor"),
        (X / 0, Y, "x: expected finite values, got 8 that are not"),
    ],
)
def test_bad_data(x, y, match):
    vmonf = small()
    with pytest.raises(ValueError, match=match):
        vmonf.model(x, y)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_components": 0}, "num_components"),
        ({"dim": 0}, "dim"),
        ({"flow": "nonesuch"}, "flow: expected one of"),
        ({"inference": "both"}, "inference: expected one of"),
        ({"weights": "free"}, "weights: expected one of"),
        ({"shared_layers": -1}, "shared_layers"),
        ({"shared_layers": 1, "index_dim": 1}, "shared_layers: expected 0"),
        ({"index_dim": -1}, "index_dim"),
        ({"num_index_samples": 0}, "num_index_samples"),
        ({"temperature": 0.0}, "temperature"),
        ({"classes": [0, 2]}, "classes"),
        ({"classes": [0]}, "classes"),
        ({"concentration": -1.0}, "concentration"),
        ({"supervised_weight": -1.0}, "supervised_weight"),
        ({"classifier_weight": 1.0}, "classifier_weight: expected 0 with exact"),
        ({"consistency": float("nan")}, "consistency"),
        ({"name": ""}, "name"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        VMoNF(**{"num_components": 2, "dim": 2, **options})


def test_bad_places():
    vmonf = small()
    eye = torch.eye(2).expand(3, 2, 2)
    with pytest.raises(ValueError, match=r"loc: expected finite values of shape \(3, 2\)"):
        vmonf.place(torch.zeros(2, 2), eye)
    with pytest.raises(ValueError, match="positive diagonal"):
        vmonf.place(torch.zeros(3, 2), -eye)
    with pytest.raises(ValueError, match="size: expected at least the 4 rows"):
        vmonf.model(X, size=3)
    with pytest.raises(ValueError, match="inference: expected 'amortized'"):
        vmonf.classify(X)


def test_continuously_indexed_components():
    x, y = data()
    vmonf = small(index_dim=1, weights="fixed")
    alone = [IndexedFlow(None, vmonf.components.part(k)) for k in range(3)]
    extended = torch.cat([x, torch.randn(len(x), 2)], -1)
    expected = torch.stack([one.extended.log_prob(extended) for one in alone], -1)
    found = vmonf.mixture().components.log_prob(extended.unsqueeze(-2))
    assert torch.allclose(found, expected, atol=1e-9)
    with torch.no_grad():
        vmonf.num_index_samples = 4000
        near = vmonf.sample(50)
        expected = torch.stack([one.log_prob_bound(near, 4000) for one in alone], -1).logsumexp(-1)
        assert torch.allclose(vmonf.log_prob(near).mean(), expected.mean() - math.log(3), atol=0.3)
        evidence = vmonf.log_prob(x).sum()
        vmonf.num_index_samples = 1
        losses = torch.tensor([elbo().loss(vmonf.model, vmonf.guide, x) for _ in range(50)])
    assert -losses.mean() < evidence + 3 * losses.std() / 50**0.5
    elbo().differentiable_loss(vmonf.model, vmonf.guide, x, y).backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in vmonf.parameters())
    assert vmonf.sample(7).shape == (7, 2)
    vmonf.place(torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2))


def test_callable_flow():
    vmonf = VMoNF(2, 3, lambda dim: Compose([FLOWS["maf"](dim), FLOWS["planar"](dim)]), shared_layers=2)
    assert len(list(vmonf.flow)) == 3
    assert vmonf.log_prob(torch.zeros(5, 3)).shape == (5,)
