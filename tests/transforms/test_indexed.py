"""Indexed layers as bijections of variable and noise."""

import pytest
import torch

from pyro_flowvi.distributions import FlowDistribution
from pyro_flowvi.flows import FLOWS, indexed_layers
from pyro_flowvi.testing import check_transform
from pyro_flowvi.transforms import (
    Compose,
    ElementwiseAffine,
    IndexedCompose,
    IndexedLayer,
    Planar,
    SplineAutoregressive,
)

ORDERS = ("after", "before")


def flow(order):
    layers = [
        IndexedLayer(SplineAutoregressive(2, hidden=(4,), num_bins=3), 2, (4,), order=order),
        IndexedLayer(Planar(2), 1, (3,), order=order),
        ElementwiseAffine(2),
    ]
    whole = IndexedCompose(layers)
    with torch.no_grad():
        for param in whole.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return whole


@pytest.mark.parametrize("order", ORDERS)
class TestBijection:
    def test_properties(self, order):
        check_transform(flow(order), torch.randn(12, 5))

    def test_properties_with_a_context(self, order):
        conditional = FLOWS["planar"](2, num_layers=1, context_dim=3)
        parts = [
            IndexedLayer(conditional, 2, (4,), order=order, context_dim=3),
            IndexedLayer(Planar(2), 1, (3,), order=order),
            ElementwiseAffine(2),
        ]
        check_transform(IndexedCompose(parts), torch.randn(7, 4, 5), context=torch.randn(4, 3))

    def test_scores_are_autodiffs(self, order):
        q = FlowDistribution(None, flow(order))
        y, log_prob, score = q.rsample_with_score((6,))
        at = y.detach().requires_grad_()
        (expected,) = torch.autograd.grad(q.log_prob(at).sum(), at)
        torch.testing.assert_close(score, expected, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(log_prob, q.log_prob(y))

    def test_starts_as_g(self, order):
        layers = indexed_layers("neural_spline", 3, num_layers=2, index_dim=2, order=order, index_scale=0.0)
        inner = Compose([layer.transform for layer in layers])
        with torch.no_grad():
            for param in inner.parameters():
                param.add_(0.3 * torch.randn_like(param))
        x = torch.randn(6, 7)
        y, log_det = IndexedCompose(layers).forward_and_log_det(x)
        expected, expected_det = inner.forward_and_log_det(x[:, :3])
        torch.testing.assert_close(y, torch.cat([expected, x[:, 3:]], -1))
        torch.testing.assert_close(log_det, expected_det)


@pytest.mark.parametrize("name", FLOWS)
def test_layers_of_the_registry_one_by_one(name):
    """As many as asked for, each as FLOWS has it, with gradients for all parameters."""
    layers = indexed_layers(name, 3, num_layers=3, hidden=(4,))
    assert [layer.dim for layer in layers] == [3, 3, 3]
    assert len({id(layer.transform) for layer in layers}) == 3
    x = torch.randn(8, 6)
    whole = IndexedCompose(layers)
    torch.testing.assert_close(whole.inv(whole(x)), x)
    moving = [(layer.transform(x[:, :3]) - x[:, :3]).abs().amax(0) > 1e-3 for layer in map(perturbed, layers)]
    assert torch.stack(moving).any(0).all()  # masks and orders alternate


def perturbed(layer):
    with torch.no_grad():
        for param in layer.parameters():
            param.add_(0.5 * torch.randn_like(param))
    return layer


def test_a_callable_gives_one_layer_a_call():
    layers = indexed_layers(Planar, 2, num_layers=2)
    assert isinstance(layers[0].transform, Planar)
    assert len(layers) == 2
