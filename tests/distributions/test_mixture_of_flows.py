"""MixtureOfFlows against torch's mixtures, quadrature and exact gradients."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_flowvi.distributions import FlowDistribution, MixtureOfFlows
from pyro_flowvi.distributions.mixture_of_flows import stratified_indices
from pyro_flowvi.flows import FLOWS
from pyro_flowvi.transforms import Compose, ElementwiseAffine, LowerAffine, Planar, Stacked


@pytest.fixture(autouse=True)
def _seed():
    pyro.set_rng_seed(0)


def flows(num=3, dim=2, key="realnvp", scale=0.3):
    each = [Compose([FLOWS[key](dim, num_layers=2, hidden=(8,)), LowerAffine(dim)]) for _ in range(num)]
    for transform in each:
        for param in transform.double().parameters():
            param.data.add_(scale * torch.randn_like(param))
    return each


LOGITS = torch.tensor([0.5, -0.3, 0.9], dtype=torch.float64)


def test_scores_as_torch_does_one_by_one():
    each = flows()
    mixture = MixtureOfFlows(None, Stacked(each), LOGITS)
    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    theirs = [dist.TransformedDistribution(base, [transform]) for transform in each]
    x = 3 * torch.randn(50, 2, dtype=torch.float64)
    expected = torch.stack([one.log_prob(x) for one in theirs], -1)
    assert torch.allclose(mixture.component_log_prob(x), expected, atol=1e-10)
    joint = expected + LOGITS.log_softmax(-1)
    assert torch.allclose(mixture.joint_log_prob(x), joint, atol=1e-10)
    assert torch.allclose(mixture.log_prob(x), joint.logsumexp(-1), atol=1e-10)
    assert torch.allclose(mixture.responsibilities(x), joint.softmax(-1), atol=1e-10)


def test_affine_components_are_a_gaussian_mixture():
    maps = [LowerAffine(2).double() for _ in range(3)]
    for affine in maps:
        for param in affine.parameters():
            torch.nn.init.normal_(param)
    matrices = torch.stack([a(torch.eye(2, dtype=torch.float64)).mT - a.loc[:, None] for a in maps])
    components = dist.MultivariateNormal(torch.stack([a.loc for a in maps]), matrices @ matrices.mT)
    theirs = dist.MixtureSameFamily(dist.Categorical(logits=LOGITS), components)
    x = 3 * torch.randn(20, 2, dtype=torch.float64)
    assert torch.allclose(
        MixtureOfFlows(None, Stacked(maps), LOGITS).log_prob(x), theirs.log_prob(x), atol=1e-10
    )


def test_density_integrates_to_one():
    mixture = MixtureOfFlows(None, Stacked(flows(scale=0.2)), LOGITS)
    grid = torch.linspace(-12.0, 12.0, 601, dtype=torch.float64)
    with torch.no_grad():
        density = mixture.log_prob(torch.cartesian_prod(grid, grid)).exp()
    assert density.sum() * (grid[1] - grid[0]) ** 2 == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("key", ["neural_spline", "maf", "sylvester"])
def test_other_families(key):
    each = flows(key=key)
    x = torch.randn(5, 2, dtype=torch.float64)
    mixture = MixtureOfFlows(None, Stacked(each))
    expected = torch.stack([FlowDistribution(None, one).log_prob(x) for one in each], -1)
    assert torch.allclose(mixture.component_log_prob(x), expected, atol=1e-9)


def test_shared_layers_and_base():
    each, shared = flows(), flows(1)[0]
    base = dist.StudentT(5.0, torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    mixture = MixtureOfFlows(base, Compose([Stacked(each), shared]), LOGITS)
    x = torch.randn(5, 2, dtype=torch.float64)
    alone = [FlowDistribution(base, Compose([one, shared])).log_prob(x) for one in each]
    assert torch.allclose(mixture.component_log_prob(x), torch.stack(alone, -1), atol=1e-10)
    assert mixture.sample((4,)).shape == (4, 2)


def test_shapes():
    mixture = MixtureOfFlows(None, Stacked(flows()), LOGITS)
    assert mixture.batch_shape == ()
    assert mixture.event_shape == (2,)
    assert mixture.num_components == 3
    assert mixture.rsample((5, 4)).shape == (5, 4, 2)
    assert mixture.rsample_components((5,)).shape == (5, 3, 2)
    wide = mixture.expand((6,))
    assert wide.rsample((4,)).shape == (4, 6, 2)
    assert wide.log_prob(torch.zeros(2).double()).shape == (6,)
    assert mixture.log_prob(torch.zeros(0, 2).double()).shape == (0,)
    given = mixture.given(torch.arange(3).unsqueeze(-1))
    assert given.log_prob(torch.zeros(5, 2).double()).shape == (3, 5)
    assert given.expand((3, 5)).rsample().shape == (3, 5, 2)


def test_draws_have_the_moments_of_quadrature():
    mixture = MixtureOfFlows(None, Stacked(flows(scale=0.2)), LOGITS)
    grid = torch.linspace(-12.0, 12.0, 601, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        mass = mixture.log_prob(points).exp() * (grid[1] - grid[0]) ** 2
    mean = (mass[:, None] * points).sum(0)
    sd = ((mass[:, None] * points**2).sum(0) - mean**2).sqrt()
    draws = mixture.sample((40_000,))
    assert ((draws.mean(0) - mean).abs() < 4 * sd / 200).all()
    assert ((draws.std(0) - sd).abs() < 0.02 * sd).all()


def test_strata():
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    counts = torch.stack([stratified_indices(weights, 10).bincount(minlength=3) for _ in range(50)])
    assert (counts == torch.tensor([2, 5, 3])).all()
    single = torch.cat([stratified_indices(weights, 3)[:1] for _ in range(4000)])
    assert torch.allclose(single.bincount(minlength=3).double() / 4000, weights, atol=0.04)  # 5 s.e.
    assert stratified_indices(weights.expand(4, 3), 7).shape == (7, 4)
    assert stratified_indices(torch.tensor([0.0, 1.0]), 100).eq(1).all()


def test_draws_of_a_component_come_from_it():
    maps = [ElementwiseAffine(1).double() for _ in range(3)]
    for k, affine in enumerate(maps):
        affine.loc.data.fill_(100.0 * k)
    mixture = MixtureOfFlows(None, Stacked(maps), LOGITS)
    z, index = mixture.rsample_with_component((200,))
    assert ((z[:, 0] - 100.0 * index).abs() < 10).all()
    chosen = torch.tensor([2, 0, 1, 1])
    assert ((mixture.given(chosen).rsample()[:, 0] - 100.0 * chosen).abs() < 10).all()


def exact_gradient(mixture, params, log_target, num=200_000):
    """Of E_q[log q - log target], with the sum over components done exactly."""
    z = mixture.rsample_components((num,))
    loss = (mixture.weights * (mixture.log_prob(z) - log_target(z))).sum(-1).mean()
    return torch.autograd.grad(loss, params)


def test_gradient_under_trace_elbo_is_unbiased():
    each = Stacked(flows())
    logits = LOGITS.clone().requires_grad_()
    params = [logits, each.each[-1].loc]
    target = dist.Normal(torch.tensor([1.0, -1.0], dtype=torch.float64), 1.0).to_event(1)
    expected = exact_gradient(MixtureOfFlows(None, each, logits), params, target.log_prob)
    elbo = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=0)

    def model():
        pyro.sample("z", target)

    def guide():
        pyro.sample("z", MixtureOfFlows(None, each, logits))

    found = [torch.autograd.grad(elbo.differentiable_loss(model, guide), params) for _ in range(40)]
    for i, true in enumerate(expected):
        grads = torch.stack([grad[i] for grad in found])
        standard_error = grads.std(0) / len(found) ** 0.5
        assert ((grads.mean(0) - true).abs() < 4 * standard_error + 5e-3).all()


def test_last_draw_only_has_score_parts():
    mixture = MixtureOfFlows(None, Stacked(flows()), LOGITS)
    mixture.score_parts(mixture.rsample((3,)))
    with pytest.raises(ValueError, match="x: expected the last draw"):
        mixture.score_parts(torch.zeros(3, 2).double())


def test_bad_input():
    with pytest.raises(ValueError, match="transform: expected a batch shape"):
        MixtureOfFlows(None, Planar(2))
    with pytest.raises(ValueError, match=r"logits: expected shape \(\*, 3\), got \(2,\)"):
        MixtureOfFlows(None, Stacked(flows()), torch.zeros(2))
    with pytest.raises(ValueError, match="value"):
        MixtureOfFlows(None, Stacked(flows()), LOGITS, validate_args=True).log_prob(
            torch.full((2,), torch.nan)
        )
