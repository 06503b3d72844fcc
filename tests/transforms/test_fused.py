"""Passes that are written out, against the modules' own forward pass with score and autograd's gradients."""

import copy
import itertools
import math

import pytest
import torch

from pyro_flowvi import FLOWS
from pyro_flowvi.autoguide._affine import FramedElementwise, FramedLower
from pyro_flowvi.flows import indexed_layers
from pyro_flowvi.nn import MLP
from pyro_flowvi.transforms import (
    AffineAutoregressive,
    AffineCoupling,
    Autoregressive,
    Compose,
    Coupling,
    ElementwiseAffine,
    HeavyTails,
    IndexedCompose,
    IndexedLayer,
    Inverse,
    LowerAffine,
    LowRankAffine,
    Permute,
    Planar,
    Radial,
    SplineAutoregressive,
    SplineCoupling,
    Sylvester,
)
from pyro_flowvi.transforms._fused import has_form, pass_through
from pyro_flowvi.transforms.base import forward_with_score
from pyro_flowvi.transforms.univariate import Additive, Affine, Multiplicative, RationalQuadratic
from tests.transforms.layers import LAYERS, randomized

DTYPES = (torch.float32, torch.float64)


def mixed(dim):
    return [i % 3 != 1 for i in range(dim)] if dim > 1 else [False]


def framed(affine, scale):
    affine.set_frame(torch.randn(affine.dim), scale)
    return affine


def with_frozen(layer, *names):
    for name in names:
        getattr(layer, name).requires_grad_(False)
    return layer


def frozen_index(dim):
    layer = IndexedLayer(Radial(dim), index_dim=1)
    layer.mover.network.activation = "relu"
    layer.index.requires_grad_(False)
    return layer


def twice(dim):
    one, other = Planar(dim, num_layers=2), AffineCoupling(dim, hidden=(4,))
    return Compose([one, other, LowerAffine(dim), one, other])


WRITTEN_OUT = {
    **{
        f"coupling_{transformer.kind}_{activation}": (
            lambda dim, transformer=transformer, activation=activation: Coupling(
                dim, transformer, mask=mixed(dim), hidden=(4,), activation=activation
            )
        )
        for transformer in (Additive(), Affine(2.0), Multiplicative(2.0), RationalQuadratic(1.5, 4))
        for activation in ("tanh", "relu")
    },
    "elementwise": lambda dim: ElementwiseAffine(dim, scale=0.3),
    "act_norm": LAYERS["act_norm"],
    "lower": lambda dim: LowerAffine(dim, scale=0.3),
    "low_rank": lambda dim: LowRankAffine(dim, scale=0.3),
    "frame": lambda dim: framed(FramedLower(dim), torch.rand(dim, dim).tril() + torch.eye(dim)),
    "frame_diagonal": lambda dim: framed(FramedElementwise(dim), 0.1 + torch.rand(dim)),
    "no_frame": lambda dim: FramedLower(dim),
    "permute": lambda dim: Permute(torch.randperm(dim)),
    "planar": lambda dim: Planar(dim),
    "planar_8": lambda dim: Planar(dim, num_layers=8),
    "sylvester": lambda dim: Sylvester(dim),
    "affine_ar": lambda dim: AffineAutoregressive(dim, hidden=(7, 3)),
    "affine_ar_reverse": lambda dim: AffineAutoregressive(dim, hidden=(6,), reverse=True, activation="relu"),
    "spline_ar": lambda dim: SplineAutoregressive(dim, hidden=(7, 4), num_bins=4, bound=1.5, reverse=True),
    "inverse_affine_ar": lambda dim: Inverse(AffineAutoregressive(dim, hidden=(7, 3), reverse=True)),
    "inverse_spline_ar": lambda dim: Inverse(SplineAutoregressive(dim, hidden=(4,), num_bins=4, bound=1.5)),
    "radial": lambda dim: Radial(dim),
    "radial_8": lambda dim: Radial(dim, num_layers=8),
}
OTHERS = {
    **{
        f"indexed_{flow}_{order}": lambda dim, flow=flow, order=order: IndexedCompose(
            [
                *indexed_layers(flow, dim, num_layers=2, hidden=(5,), index_dim=2, order=order),
                LowerAffine(dim),
            ]
        )
        for flow in ("neural_spline_ar", "realnvp")
        for order in ("after", "before")
    },
    "indexed_relu_and_frozen": lambda dim: IndexedCompose([frozen_index(dim), ElementwiseAffine(dim)]),
    "heavy_tails": lambda dim: HeavyTails(dim),
    "without_form": lambda dim: Compose([Planar(dim), HeavyTails(dim), LowerAffine(dim)]),
    "twice": twice,
    "frozen": lambda dim: Compose(
        [
            with_frozen(Planar(dim, num_layers=2), "w"),
            with_frozen(Radial(dim, num_layers=2), "centre", "a"),
            with_frozen(SplineCoupling(dim, hidden=(4,)), "offset"),
            with_frozen(LowRankAffine(dim), "log_scale"),
            with_frozen(LowerAffine(dim), "loc"),
        ]
    ),
    **{f"flow_{name}": lambda dim, flow=flow: flow(dim) for name, flow in FLOWS.items()},
}


def trained(transform):
    return [param for param in transform.parameters() if param.requires_grad]


def by_modules(transform, params, x, score, v):
    """Image, log-determinant, score, and what autograd pulls back."""
    x = x.clone().requires_grad_()
    y, log_det, pushed = forward_with_score(transform, x, score)
    grads = torch.autograd.grad(y, [x, *params], v, allow_unused=True, materialize_grads=True)
    return [y.detach(), log_det.detach(), pushed.detach(), *grads]


@torch.no_grad()
def written_out(transform, params, x, score, v):
    one = pass_through(transform, x, score)
    back, grads = one.pull(v)
    assert set(grads) <= set(params)
    log_det = one.log_det.expand(x.shape[:-1])
    return [one.image, log_det, one.score, back, *(grads.get(p, torch.zeros_like(p)) for p in params)]


def check(transform, batch, dtype):
    """In a dtype, against the modules in float64."""
    exact = copy.deepcopy(transform).to(torch.float64)
    inputs = [torch.randn(batch, transform.dim, dtype=dtype) for _ in range(3)]
    expected = by_modules(exact, trained(exact), *(value.double() for value in inputs))
    transform.to(dtype)
    bound = 1e-9 if dtype == torch.float64 else 1e-3
    for found, true in zip(written_out(transform, trained(transform), *inputs), expected, strict=True):
        assert found.dtype == dtype
        assert found.shape == true.shape
        assert not found.requires_grad
        assert float((found - true).norm()) <= bound * (1.0 + float(true.norm()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2, 5, 30])
@pytest.mark.parametrize("name", [*WRITTEN_OUT, *OTHERS])
def test_equal_to_the_modules(name, dim, dtype):
    torch.manual_seed(3)
    transform = randomized({**WRITTEN_OUT, **OTHERS}[name](dim), 0.1)
    for batch in (1, 64):
        check(transform, batch, dtype)


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_has_a_form(name):
    assert has_form(WRITTEN_OUT[name](3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_extreme_parameters(name, dtype):
    """What is finite by the modules is finite here too, and the image the same."""
    torch.manual_seed(3)
    for dim, value, size in itertools.product((1, 3), (-1e4, -30.0, 0.0, 30.0, 1e4), (0.0, 1.0, 100.0)):
        transform = WRITTEN_OUT[name](dim).to(dtype)
        for param in transform.parameters():
            torch.nn.init.constant_(param, value)
        inputs = [size * torch.randn(5, dim, dtype=dtype) for _ in range(3)]
        expected = by_modules(transform, trained(transform), *inputs)
        found = written_out(transform, trained(transform), *inputs)
        for mine, its in zip(found, expected, strict=True):
            assert bool((mine.isfinite() | ~its.isfinite()).all())
        tolerance = 1e-3 if dtype == torch.float32 else 1e-8
        torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)


class Doubled(Planar):
    def forward_given(self, raw, x):
        y, log_det = super().forward_given(raw, x)
        return 2.0 * y, log_det + self.dim * math.log(2.0)

    def score_given(self, raw, x, score):
        return 0.5 * super().score_given(raw, x, score)


class Turned(AffineCoupling):
    def forward_with_score(self, x, score):
        y, log_det, score = super().forward_with_score(x, score)
        return -y, log_det, -score


class Halved(FramedLower):
    def forward_given(self, raw, x):
        y, log_det = super().forward_given(raw, x)
        return 0.5 * y, log_det - self.dim * math.log(2.0)

    def forward_with_score(self, x, score):
        return *self.forward_and_log_det(x), 2.0 * super().forward_with_score(x, score)[2]


@pytest.mark.parametrize("kind", [Doubled, Turned, Halved])
def test_a_subclass_is_not_taken_for_its_parent(kind):
    transform = randomized(kind(3), 0.2)
    assert not has_form(transform)
    check(transform, 5, torch.float64)


@pytest.mark.parametrize(
    "build",
    [
        lambda: HeavyTails(3),
        lambda: Inverse(AffineCoupling(3, hidden=(4,))),
        lambda: Autoregressive(3, Additive(), hidden=(4,)),
        lambda: Coupling(3, Affine(2.0), conditioner=lambda n, m: MLP(n, (4,), m).double()),
    ],
)
def test_a_layer_without_a_form_goes_through_autograd(build):
    check(randomized(build(), 0.2), 5, torch.float64)


def test_the_way_back_can_be_gone_twice():
    for build in WRITTEN_OUT.values():
        transform = randomized(build(3), 0.2)
        x, v = torch.randn(4, 3), torch.randn(4, 3)
        one = pass_through(transform, x, -x)
        with torch.no_grad():
            first, second = one.pull(v), one.pull(2.0 * v)
        torch.testing.assert_close(2.0 * first[0], second[0])
        for param, grad in first[1].items():
            torch.testing.assert_close(2.0 * grad, second[1][param])


def test_low_rank_score_where_the_factor_is_large():
    """Against a solve with the whole matrix."""
    torch.manual_seed(1)
    layer = LowRankAffine(2, rank=2, scale=1e-12).to(torch.float64)
    layer.factor.data.copy_(torch.tensor([[1.0, 0.2], [-0.3, 0.8]]))
    x, score = torch.randn(2, 5, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, x[0])
    expected = torch.linalg.solve(jacobian.mT, score.mT).mT
    for found in (forward_with_score(layer, x, score)[2], pass_through(layer, x, score).score):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.norm()))
