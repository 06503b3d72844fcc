"""The score carried along the forward pass, against the density that the inverse gives."""

import math

import pytest
import torch
from pyro.distributions.transforms import AffineAutoregressive as PyroAutoregressive
from pyro.nn import AutoRegressiveNN
from torch.distributions import transforms as T
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flowvi import FLOWS
from pyro_flowvi.autoguide._affine import FramedElementwise, FramedLower
from pyro_flowvi.distributions import FlowDistribution
from pyro_flowvi.transforms import (
    ActNorm,
    AffineAutoregressive,
    AffineCoupling,
    Autoregressive,
    Compose,
    Conditional,
    Coupling,
    ElementwiseAffine,
    HeavyTails,
    Inverse,
    LowerAffine,
    Permute,
    Planar,
    Radial,
    SplineAutoregressive,
    autoregressive,
)
from pyro_flowvi.transforms.base import (
    forward_and_log_det,
    forward_with_score,
    inverse_and_log_det,
    score_by_inverse,
)
from pyro_flowvi.transforms.univariate import Additive, Affine, Multiplicative, RationalQuadratic
from tests.transforms.layers import LAYERS, randomized


def mixed(dim):
    return [i % 3 != 1 for i in range(dim)] if dim > 1 else [False]


def foreign(dim):
    return Compose([LowerAffine(dim), T.AffineTransform(1.0, -2.0), Planar(dim), T.SigmoidTransform()])


def framed(affine, scale):
    affine.set_frame(torch.randn(affine.dim), scale)
    return affine


CASES = {
    **LAYERS,
    **{
        f"coupling_{transformer.kind}_{mask if isinstance(mask, str) else 'mixed'}": (
            lambda dim, transformer=transformer, mask=mask: Coupling(
                dim, transformer, mask=mask(dim) if callable(mask) else mask, hidden=(4,)
            )
        )
        for transformer in (Additive(), Affine(2.0), Multiplicative(2.0), RationalQuadratic(3.0, 4))
        for mask in ("first", "second", "even", "odd", mixed)
    },
    "affine_ar_reverse": lambda dim: AffineAutoregressive(dim, hidden=(6,), reverse=True, activation="relu"),
    "spline_ar": lambda dim: SplineAutoregressive(dim, hidden=(6,), num_bins=4),
    "additive_ar": lambda dim: Autoregressive(dim, Additive(), hidden=(6,)),
    "multiplicative_ar": lambda dim: Autoregressive(dim, Multiplicative(2.0), hidden=(6,)),
    "planar_8": lambda dim: Planar(dim, num_layers=8),
    "radial_8": lambda dim: Radial(dim, num_layers=8),
    "inverse_planar": lambda dim: Inverse(Planar(dim, num_layers=2)),
    "inverse_coupling": lambda dim: Inverse(AffineCoupling(dim, hidden=(4,))),
    "act_norm": lambda dim: ActNorm(dim),
    "frame": lambda dim: framed(FramedLower(dim), torch.rand(dim, dim).tril() + torch.eye(dim)),
    "frame_diagonal": lambda dim: framed(FramedElementwise(dim), 0.1 + torch.rand(dim)),
    "nested": lambda dim: Compose(
        [
            Compose([AffineCoupling(dim, hidden=(4,)), Permute(torch.randperm(dim))]),
            Inverse(Compose([Radial(dim), LowerAffine(dim)])),
            HeavyTails(dim),
        ]
    ),
    "foreign": foreign,
    "tanh": lambda dim: T.TanhTransform(),
    "pyro": lambda dim: PyroAutoregressive(AutoRegressiveNN(max(dim, 2), [5])) if dim > 1 else foreign(dim),
}
MEETS_TWO_DERIVATIVES = {name for name in CASES if "inverse" not in name and name not in ("nested", "pyro")}


def built(build, dim):
    """With random parameters; transforms of torch have none."""
    transform = build(dim)
    return randomized(transform, 0.4) if isinstance(transform, torch.nn.Module) else transform


def standard_log_prob(x):
    return -0.5 * x.square().sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


@torch.no_grad()
def score_by_differences(transform, y, step=1e-5):
    """∇ log q at the image of standard normal noise, by differences of values through the inverse."""

    def log_q(value):
        x, log_det = inverse_and_log_det(transform, value)
        return standard_log_prob(x) + log_det

    steps = step * torch.eye(y.shape[-1])
    return torch.stack([(log_q(y + e) - log_q(y - e)) / (2 * step) for e in steps], -1)


def score_by_jacobian(transform, x):
    """J⁻ᵀ(score - ∇ log |det J|) for each row, J and its determinant by autodiff of the map alone."""
    rows = []
    for row in x.detach().reshape(-1, x.shape[-1]):
        row = row.requires_grad_()
        jacobian = torch.autograd.functional.jacobian(
            lambda v: forward_and_log_det(transform, v)[0], row, create_graph=True
        )
        log_det = jacobian.slogdet()[1]
        bend = torch.zeros_like(row)
        if log_det.requires_grad:
            bend = torch.autograd.grad(log_det, row, allow_unused=True, materialize_grads=True)[0]
        rows.append(torch.linalg.solve(jacobian.mT, -row - bend).detach())
    return torch.stack(rows).reshape(x.shape)


def check(transform, x, tolerance=2e-6):
    x = x.requires_grad_()
    y, log_det, score = forward_with_score(transform, x, -x.detach())
    expected, expected_det = forward_and_log_det(transform, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(log_det, expected_det)
    assert not score.requires_grad
    assert score.shape == x.shape
    truth = score_by_differences(transform, y.detach())
    torch.testing.assert_close(score, truth, rtol=tolerance, atol=tolerance)
    return score


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("name", CASES)
def test_layer(name, dim):
    transform = built(CASES[name], dim)
    x = torch.randn(3, dim)
    score = check(transform, x)
    if name in MEETS_TWO_DERIVATIVES:
        torch.testing.assert_close(score, score_by_jacobian(transform, x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("name", FLOWS)
def test_registry(name, dim):
    flow = randomized(FLOWS[name](dim, num_layers=3, hidden=(5,)), 0.3)
    check(flow, torch.randn(4, dim))


@pytest.mark.parametrize("name", FLOWS)
def test_conditional_registry(name):
    """By the default path: each row has parameters of its own."""
    flow = randomized(FLOWS[name](3, num_layers=2, hidden=(4,), context_dim=2), 0.3)
    check(flow.condition(torch.randn(4, 2)), torch.randn(4, 3))


@pytest.mark.parametrize("name", ["planar_8", "radial_8", "lower", "coupling_affine_mixed", "affine_ar"])
def test_any_score_comes_in(name):
    """Not that of the standard normal alone: what layers before have made of it."""
    transform = randomized(CASES[name](4), 0.4)
    x, score = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    y, _, pushed = forward_with_score(transform, x, score)
    torch.testing.assert_close(pushed, score_by_inverse(transform, y, score))


@pytest.mark.parametrize("batch", [(), (7,), (3, 1)])
@pytest.mark.parametrize("name", [*CASES, *FLOWS])
def test_batch_shapes(name, batch):
    transform = built(CASES.get(name) or (lambda dim: FLOWS[name](dim, num_layers=2, hidden=(4,))), 3)
    x = torch.randn(*batch, 3).requires_grad_()
    y, log_det, score = forward_with_score(transform, x, -x.detach())
    assert y.shape == score.shape == (*batch, 3)
    assert log_det.shape == batch
    rows = x.detach().reshape(-1, 3).requires_grad_()
    expected = forward_with_score(transform, rows, -rows.detach())[2]
    torch.testing.assert_close(score.reshape(-1, 3), expected)


@pytest.mark.parametrize("name", FLOWS)
def test_float32(name):
    flow = randomized(FLOWS[name](4, num_layers=3, hidden=(5,)), 0.3)
    x = torch.randn(20, 4, requires_grad=True)
    expected = forward_with_score(flow, x, -x.detach())[2]
    x32 = x.detach().float().requires_grad_()
    score = forward_with_score(flow.float(), x32, -x32.detach())[2]
    assert score.dtype == torch.float32
    # Where a map squeezes, a score is large and its rounding too.
    torch.testing.assert_close(score.double(), expected, rtol=2e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("name", FLOWS)
def test_traces(name):
    """In one graph with the gradient of the parameters, as a compiled step has it."""
    flow = randomized(FLOWS[name](3, num_layers=2, hidden=(4,)), 0.3)

    def run(x):
        x = x.requires_grad_()
        y, log_det, score = forward_with_score(flow, x, -x.detach())
        (grad,) = torch.autograd.grad((y * score).sum() + log_det.sum(), next(iter(flow.parameters())))
        return y.detach(), log_det.detach(), score, grad

    graph = make_fx(run)(torch.randn(4, 3))
    x = torch.randn(4, 3)
    for traced, expected in zip(graph(x), run(x.clone()), strict=True):
        torch.testing.assert_close(traced, expected)


@pytest.mark.parametrize("name", FLOWS)
def test_parameters_get_the_gradient_of_the_plain_pass(name):
    """The score leaves nothing in the graph of image and log-determinant, nor in ``.grad``."""
    flow = randomized(FLOWS[name](3, num_layers=2, hidden=(4,)), 0.3)
    x = torch.randn(4, 3, requires_grad=True)

    def gradients(y, log_det):
        return torch.autograd.grad(y.square().sum() - log_det.sum(), list(flow.parameters()))

    y, log_det, _ = forward_with_score(flow, x, -x.detach())
    assert all(param.grad is None for param in flow.parameters())
    for ours, plain in zip(gradients(y, log_det), gradients(*forward_and_log_det(flow, x)), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", FLOWS)
def test_frozen_parameters(name):
    flow = randomized(FLOWS[name](3, num_layers=2, hidden=(4,)), 0.3).requires_grad_(False)
    check(flow, torch.randn(2, 3))


@pytest.mark.parametrize("sample_shape", [(), (5,), (5, 1)])
def test_distribution(sample_shape):
    flow = randomized(FLOWS["realnvp"](3, num_layers=2, hidden=(4,)), 0.3)
    q = FlowDistribution(None, flow)
    torch.manual_seed(1)
    z, log_prob, score = q.rsample_with_score(sample_shape)
    torch.manual_seed(1)
    z_plain, log_prob_plain = q.rsample_and_log_prob(sample_shape)
    torch.testing.assert_close(z, z_plain)
    torch.testing.assert_close(log_prob, log_prob_plain)
    at = z.detach().requires_grad_()
    (expected,) = torch.autograd.grad(q.log_prob(at).sum(), at)
    torch.testing.assert_close(score, expected)


def test_distribution_with_context():
    flow = randomized(FLOWS["realnvp"](3, num_layers=2, hidden=(4,), context_dim=2), 0.3)
    q = FlowDistribution(None, flow.condition(torch.randn(6, 2)))
    z, _, score = q.rsample_with_score((4,))
    at = z.detach().requires_grad_()
    (expected,) = torch.autograd.grad(q.log_prob(at).sum(), at)
    torch.testing.assert_close(score, expected)


def test_draws_within_no_grad():
    q = FlowDistribution(None, FLOWS["realnvp"](3, num_layers=2, hidden=(4,)))
    with torch.no_grad():
        assert q.rsample_with_score((4,))[2].shape == (4, 3)


@pytest.mark.parametrize("kind", [AffineAutoregressive, SplineAutoregressive])
def test_autoregressive_layers_take_no_inverse_pass(kind, monkeypatch):
    """Up to the dimension from which whole Jacobians would cost more; beyond it they agree."""
    layer = randomized(kind(32, hidden=(40,)), 0.1)
    x = torch.randn(3, 32, requires_grad=True)
    expected = score_by_inverse(layer, layer(x), -x.detach())

    def refuse(*args, **kwargs):
        raise AssertionError("an inverse pass")

    monkeypatch.setattr(autoregressive, "solve_autoregressive", refuse)
    torch.testing.assert_close(forward_with_score(layer, x, -x.detach())[2], expected)
    monkeypatch.undo()
    wide = randomized(kind(33, hidden=(40,)), 0.1)
    x = torch.randn(3, 33, requires_grad=True)
    expected = score_by_inverse(wide, wide(x), -x.detach())
    torch.testing.assert_close(forward_with_score(wide, x, -x.detach())[2], expected)
    monkeypatch.setattr(autoregressive, "MAX_DENSE_JACOBIAN", 64)
    torch.testing.assert_close(forward_with_score(wide, x, -x.detach())[2], expected)


def test_extreme_parameters_are_finite():
    for transform in (Planar(3, num_layers=2), Radial(3, num_layers=2), ElementwiseAffine(3)):
        with torch.no_grad():
            for param in transform.parameters():
                param.fill_(30.0)
        x = torch.randn(4, 3, requires_grad=True)
        assert forward_with_score(transform, x, -x.detach())[2].isfinite().all()


def test_radial_layer_at_its_centre():
    layer = randomized(Radial(3), 0.3)
    x = layer.centre.detach().clone().requires_grad_()
    assert forward_with_score(layer, x, -x.detach())[2].isfinite().all()


@pytest.mark.parametrize("layer", [Planar, Radial, ElementwiseAffine, AffineCoupling])
def test_conditional_layers(layer):
    """With parameters of their own for each row, those with a shortcut and those without."""
    conditional = randomized(Conditional(layer(3), 2, (4,)))
    transform = conditional.condition(torch.randn(5, 2))
    x = torch.randn(7, 5, 3).requires_grad_()
    score = torch.randn(7, 5, 3)
    y, log_det, found = forward_with_score(transform, x, score)
    torch.testing.assert_close(found, score_by_inverse(transform, y, score), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close((y, log_det), forward_and_log_det(transform, x))
    assert not found.requires_grad
