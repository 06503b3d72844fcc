"""Autoregressive layers: order, inverse in all precisions, gradients, size of the traced graph."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flowvi.testing import check_transform
from pyro_flowvi.transforms import AffineAutoregressive, Autoregressive, Conditional, SplineAutoregressive
from pyro_flowvi.transforms.univariate import Affine
from tests.transforms.layers import randomized

LAYERS = [AffineAutoregressive, SplineAutoregressive]


@pytest.mark.parametrize("hidden", [(3,), (9, 4), (5, 5, 5)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_jacobian_is_triangular(layer, reverse, hidden):
    flow = randomized(layer(6, hidden=hidden, reverse=reverse), 0.5)
    jacobian = torch.autograd.functional.jacobian(flow, torch.randn(6))
    below = jacobian.triu(1) if not reverse else jacobian.tril(-1)
    assert not below.any()
    assert (jacobian.diagonal() > 0).all()


@pytest.mark.parametrize("dim", [2, 30, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", LAYERS)
def test_round_trip(layer, dtype, dim):
    flow = randomized(layer(dim, hidden=(40,)), 0.1).to(dtype)
    x = torch.randn(5, 3, dim, dtype=dtype)
    y, log_det = flow.forward_and_log_det(x)
    back, back_det = flow.inverse_and_log_det(y)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(back, x, rtol=0, atol=tolerance)
    torch.testing.assert_close(back_det, -log_det, rtol=0, atol=dim * tolerance)


@pytest.mark.parametrize("layer", LAYERS)
def test_traced_inverse_does_not_grow_with_the_dimension(layer):
    def size(dim):
        flow = randomized(layer(dim, hidden=(8, 8)), 0.1)
        graph = make_fx(lambda y: torch.autograd.grad(flow.inverse_and_log_det(y)[1].sum(), y)[0])
        return len(graph(torch.randn(4, dim, requires_grad=True)).graph.nodes)

    assert size(20) == size(3)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_the_inverse_are_those_of_autodiff_through_the_loop(layer, activation):
    """Against the textbook inverse, coordinate by coordinate, which autodiff can follow."""
    flow = randomized(layer(4, hidden=(6, 5), activation=activation), 0.5)
    y = torch.randn(7, 4, requires_grad=True)

    def textbook(y):
        x = torch.zeros_like(y)
        for i in range(4):
            h = flow.conditioner(x).unflatten(-1, flow.offset.shape)
            solved = flow.transformer.inverse(y, h, flow.offset)[0]
            x = torch.cat([x[:, :i], solved[:, i : i + 1], x[:, i + 1 :]], -1)
        return x

    weights = torch.randn(7, 4)
    inputs = [y, *flow.parameters()]
    torch.testing.assert_close(flow.inverse_and_log_det(y)[0], textbook(y))
    expected = torch.autograd.grad((weights * textbook(y)).sum(), inputs)
    actual = torch.autograd.grad((weights * flow.inverse_and_log_det(y)[0]).sum(), inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layer", LAYERS)
def test_function_transforms(layer):
    """vmap over inputs, over contexts and over whole parameter sets, and jacrev."""
    flow = randomized(layer(3, hidden=(5,)), 0.4)
    y = torch.randn(6, 3)
    expected, log_det = flow.inverse_and_log_det(y)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: flow.inverse_and_log_det(row)[0]))(y)
    torch.testing.assert_close(jacobian.slogdet()[1], log_det)

    class Inverse(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, y):
            return self.flow.inverse_and_log_det(y)[0]

    call = Inverse()
    stacked = {name: torch.stack([p, p + 0.1]) for name, p in call.named_parameters()}
    mapped = torch.func.vmap(lambda params: torch.func.functional_call(call, params, (y,)))(stacked)
    torch.testing.assert_close(mapped[0], expected)

    conditional = randomized(Conditional(flow, 2, (4,)), 0.4)
    contexts = torch.randn(4, 6, 2)
    mapped = torch.func.vmap(lambda context: conditional.condition(context).inv(y))(contexts)
    torch.testing.assert_close(mapped, conditional.condition(contexts).inv(y))


def test_second_derivative_of_the_inverse_is_refused():
    flow = randomized(AffineAutoregressive(3), 0.3)
    y = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(flow.inv(y).sum(), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(grad.sum(), y)


def test_log_scale_has_no_floor():
    """Pyro's clamp keeps each conditional sd above 0.0067: here the free part reaches anything."""
    flow = AffineAutoregressive(2)
    with torch.no_grad():
        flow.offset[0].fill_(-14.0)
    x = torch.ones(2)
    torch.testing.assert_close(flow(x), torch.exp(torch.tensor(-14.0)) * x)
    torch.testing.assert_close(flow.inv(flow(x)), x)


class SinhArcsinh(torch.nn.Module):
    """y = sinh(e^s arsinh(x) + t), with a parameter of its own in s."""

    bends = True
    num_params = 2

    def __init__(self):
        super().__init__()
        self.tail = torch.nn.Parameter(torch.tensor(0.1))

    def _parts(self, h, offset):
        s, t = (offset if h is None else offset + h).unbind(-2)
        return s.tanh() + self.tail, t

    def forward(self, x, h, offset):
        s, t = self._parts(h, offset)
        angle = s.exp() * x.asinh() + t
        return angle.sinh(), s + angle.cosh().log() - 0.5 * x.square().log1p()

    def inverse(self, y, h, offset):
        s, t = self._parts(h, offset)
        angle = (y.asinh() - t) * (-s).exp()
        return angle.sinh(), angle.cosh().log() - s - 0.5 * y.square().log1p()


@dataclass(frozen=True)
class Shear:
    """y = e^s x + t, of which the network moves t alone: the slope depends on no input."""

    bends: ClassVar[bool] = False
    num_params: ClassVar[int] = 2

    def _parts(self, h, offset):
        s, t = offset.unbind(-2)
        return s, t if h is None else t + h[..., 1, :]

    def forward(self, x, h, offset):
        s, t = self._parts(h, offset)
        y = s.exp() * x + t
        return y, s.expand(y.shape)

    def inverse(self, y, h, offset):
        s, t = self._parts(h, offset)
        x = (y - t) * (-s).exp()
        return x, -s.expand(x.shape)


class Twice(Affine):
    """Of a kind of the package, but another map: f twice."""

    def forward(self, x, h, offset):
        y, first = super().forward(x, h, offset)
        z, second = super().forward(y, h, offset)
        return z, first + second

    def inverse(self, y, h, offset):
        x, first = super().inverse(y, h, offset)
        z, second = super().inverse(x, h, offset)
        return z, first + second


FOREIGN = {"sinh_arcsinh": SinhArcsinh, "shear": Shear, "twice": lambda: Twice(2.0)}


def foreign(name, dim, **options):
    return randomized(Autoregressive(dim, FOREIGN[name](), hidden=(6,), **options), 0.3)


class TestForeignTransformer:
    """A transformer that is none of the package's: D passes of the network in place of the operator."""

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("dim", [1, 2, 5])
    @pytest.mark.parametrize("name", FOREIGN)
    def test_properties(self, name, dim, reverse):
        check_transform(
            foreign(name, dim, reverse=reverse), torch.randn(2, 3, dim), gradients=name != "shear"
        )

    @pytest.mark.parametrize("dim", [1, 3])
    @pytest.mark.parametrize("name", FOREIGN)
    def test_properties_given_a_context(self, name, dim):
        flow = randomized(Conditional(foreign(name, dim), 2, (4,)), 0.3)
        check_transform(flow, torch.randn(4, dim), context=torch.randn(4, 2))

    @pytest.mark.parametrize("name", FOREIGN)
    def test_jacobian_of_the_inverse_is_the_inverse_jacobian(self, name):
        flow, x = foreign(name, 4), torch.randn(7, 4)
        y, _ = flow.forward_and_log_det(x)
        forward = torch.func.vmap(torch.func.jacrev(lambda x: flow.forward_and_log_det(x)[0]))(x)
        inverse = torch.func.vmap(torch.func.jacrev(lambda y: flow.inverse_and_log_det(y)[0]))(y)
        torch.testing.assert_close(inverse, torch.linalg.inv(forward))
        torch.testing.assert_close(flow.inverse_and_log_det(y)[1], inverse.slogdet()[1])

    @pytest.mark.parametrize("dim", [1, 4, 40])  # above 32 through the inverse
    @pytest.mark.parametrize("name", FOREIGN)
    def test_score_is_that_of_the_density(self, name, dim):
        flow = randomized(Autoregressive(dim, FOREIGN[name](), hidden=(40,)), 0.1)
        x = torch.randn(5, dim, requires_grad=True)
        y, _, score = flow.forward_with_score(x, -x.detach())
        y = y.detach().requires_grad_()
        back, log_det = flow.inverse_and_log_det(y)
        log_prob = -0.5 * back.square().sum(-1) + log_det
        torch.testing.assert_close(score, torch.autograd.grad(log_prob.sum(), y)[0])

    def test_agrees_with_the_operator(self):
        """The same map under a kind of its own."""

        class Own(Affine):
            pass

        flow = randomized(AffineAutoregressive(5, hidden=(7, 3)), 0.4)
        same = Autoregressive(5, Own(2.0), hidden=(7, 3))
        same.load_state_dict(flow.state_dict())
        y = torch.randn(3, 5)
        torch.testing.assert_close(same.inverse_and_log_det(y), flow.inverse_and_log_det(y))

    def test_second_derivative_of_the_inverse(self):
        flow = foreign("sinh_arcsinh", 3)
        y = torch.randn(2, 3, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda y: flow.inverse_and_log_det(y)[0], y)
