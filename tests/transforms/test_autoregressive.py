"""Autoregressive layers: order, inverse in all precisions, gradients, size of the traced graph."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flowvi.transforms import AffineAutoregressive, Conditional, SplineAutoregressive
from tests.transforms.test_properties import randomized

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
