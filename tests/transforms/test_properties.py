"""The registry, and every layer, through the property checks."""

import pytest
import torch

from pyro_flowvi import FLOWS, transforms
from pyro_flowvi.testing import check_transform
from pyro_flowvi.transforms import (
    Conditional,
    ConditionalPlanar,
    ConditionalRadial,
    FlowTransform,
    Planar,
)
from tests.transforms.layers import LAYERS, randomized

OF_THEIR_OWN_SHAPE = {"Conv1x1", "IndexedCompose", "Logit", "Partial", "Squeeze2d", "Stacked"}
"""Not maps of vectors of any dimension: checked in files of their own."""


def test_every_layer_is_in_the_list():
    listed = {type(part) for make in LAYERS.values() for part in make(3).modules()}
    public = {name: getattr(transforms, name) for name in set(transforms.__all__) - OF_THEIR_OWN_SHAPE}
    layers = [kind for kind in public.values() if isinstance(kind, type) and issubclass(kind, FlowTransform)]
    assert not [kind for kind in layers if not any(issubclass(each, kind) for each in listed)]


@pytest.mark.parametrize("scale", [0.0, 0.5])
@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, dim, scale):
    check_transform(randomized(LAYERS[name](dim), scale), torch.randn(6, dim))


@pytest.mark.parametrize(
    ("dim", "batch"),
    [
        (1, (4,)),
        (2, (2, 3)),
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in ((1, (2, 3)), (2, (4,)), (5, (4,)), (5, (2, 3)))
        ),
    ],
)
@pytest.mark.parametrize("name", FLOWS)
def test_registry(name, dim, batch):
    flow = randomized(FLOWS[name](dim, num_layers=3, hidden=(5,)), 0.3)
    check_transform(flow, torch.randn(*batch, dim))


@pytest.mark.parametrize("dim", [pytest.param(1, marks=pytest.mark.long), 3])
@pytest.mark.parametrize("name", FLOWS)
def test_conditional_registry(name, dim):
    flow = randomized(FLOWS[name](dim, num_layers=2, hidden=(4,), context_dim=2), 0.3)
    check_transform(flow, torch.randn(3, dim), context=torch.randn(3, 2))


@pytest.mark.parametrize(
    "layer", [ConditionalPlanar(2, 3, hidden=(4,)), ConditionalRadial(2, 3, hidden=(4,))]
)
def test_conditional_layer_trains_every_parameter_from_its_start(layer):
    check_transform(layer, torch.randn(5, 2), context=torch.randn(5, 3))


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("permute", "compose")])
def test_any_parametric_layer_can_be_conditional(name, dim):
    if (name, dim) == ("householder", 1):
        with pytest.raises(ValueError, match="parameters that a context can move"):
            Conditional(LAYERS[name](dim), context_dim=2)
        return
    flow = randomized(Conditional(LAYERS[name](dim), context_dim=2, hidden=(4,)), 0.3)
    check_transform(flow, torch.randn(4, dim), context=torch.randn(4, 2))


@pytest.mark.parametrize("dim", [1, 2, 7, 50])
@pytest.mark.parametrize("name", FLOWS)
def test_registry_starts_near_the_identity(name, dim):
    x = torch.randn(100, dim)
    y, log_det = FLOWS[name](dim).forward_and_log_det(x)
    assert (y - x).abs().max() <= 0.1
    assert log_det.abs().max() <= 0.1


@pytest.mark.parametrize("name", FLOWS)
def test_registry_starts_near_the_identity_for_any_context(name):
    x, context = torch.randn(100, 3), 10 * torch.randn(100, 2)
    y = FLOWS[name](3, context_dim=2).condition(context)(x)
    assert (y - x).abs().max() <= 0.1


def test_conditional_batch_is_row_by_row():
    """Each row of a batched context gives what that context gives alone."""
    flow = randomized(ConditionalPlanar(3, 2, num_layers=2), 0.5)
    x, context = torch.randn(7, 5, 3), torch.randn(5, 2)
    y, log_det = flow.condition(context).forward_and_log_det(x)
    for i in range(5):
        y_i, log_det_i = flow.condition(context[i]).forward_and_log_det(x[:, i])
        torch.testing.assert_close(y[:, i], y_i)
        torch.testing.assert_close(log_det[:, i], log_det_i)


class TestCheckTransform:
    """The checks themselves must fail on what is wrong."""

    class WrongLogDet(Planar):
        def forward_and_log_det(self, x):
            y, log_det = super().forward_and_log_det(x)
            return y, log_det + 1e-4

    class WrongInverse(Planar):
        def inverse_and_log_det(self, y):
            x, log_det = super().inverse_and_log_det(y)
            return x + 1e-5, log_det

    class DetachedParameter(Planar):
        def forward_given(self, raw, x):
            return super().forward_given({**raw, "w": raw["w"].detach()}, x)

    class Baked(Planar):
        def forward_and_log_det(self, x):
            shift = x.detach().sum().item()
            y, log_det = super().forward_and_log_det(x)
            return y + 0.0 * shift, log_det

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            (WrongLogDet, "log_det off"),
            (WrongInverse, r"f⁻¹\(f\(x\)\) - x"),
            (DetachedParameter, "gradcheck"),
        ],
    )
    def test_finds(self, kind, message):
        with pytest.raises(AssertionError, match=message):
            check_transform(randomized(kind(3), 0.5), torch.randn(4, 3))

    def test_finds_what_cannot_be_traced(self):
        with pytest.raises(Exception, match=r"vmap|item"):
            check_transform(self.Baked(3), torch.randn(4, 3))

    def test_takes_foreign_transforms(self):
        check_transform(torch.distributions.transforms.SigmoidTransform(), torch.randn(4, 3))

    def test_takes_frozen_parameters_and_single_vectors(self):
        flow = randomized(Planar(3), 0.3)
        flow.b.requires_grad_(False)
        check_transform(flow, torch.randn(4, 3))
        check_transform(flow, torch.randn(3))
