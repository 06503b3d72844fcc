"""Stacked: each of the K transforms does what it does alone."""

import copy
import pickle

import pytest
import torch
from torch import nn

from pyro_flowvi.flows import FLOWS
from pyro_flowvi.testing import check_transform
from pyro_flowvi.transforms import Compose, FlowTransform, Householder, LowerAffine, Permute, Planar, Stacked


def moved(transforms, scale=0.1):
    """The transforms away from the identity."""
    for transform in transforms:
        for param in transform.parameters():
            param.data.add_(scale * torch.randn_like(param))
    return transforms


@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("key", FLOWS)
def test_equals_each_alone(key, dim):
    torch.manual_seed(0)
    alone = moved([FLOWS[key](dim, num_layers=2).double() for _ in range(3)])
    stacked = Stacked(alone)
    x = torch.randn(4, 5, 3, dim, dtype=torch.float64)
    for run in ("forward_and_log_det", "inverse_and_log_det"):
        y, log_det = getattr(stacked, run)(x)
        together = torch.autograd.grad(y.sin().sum() + log_det.sum(), list(stacked.parameters()))
        for k, transform in enumerate(alone):
            y_k, log_det_k = getattr(transform, run)(x[..., k, :])
            assert torch.allclose(y[..., k, :], y_k, atol=1e-9)
            assert torch.allclose(log_det[..., k], log_det_k, atol=1e-9)
            grads = torch.autograd.grad(y_k.sin().sum() + log_det_k.sum(), list(transform.parameters()))
            for both, one in zip(together, grads, strict=True):
                assert torch.allclose(both[k], one, atol=1e-8)


class Joined(FlowTransform):
    """All K vectors as one, so that the property suite, whose transforms have no batch shape, takes it."""

    def __init__(self, stacked):
        super().__init__(stacked.num * stacked.dim)
        self.stacked = stacked

    def forward_and_log_det(self, x):
        y, log_det = self.stacked.forward_and_log_det(x.unflatten(-1, (self.stacked.num, -1)))
        return y.flatten(-2), log_det.sum(-1)

    def inverse_and_log_det(self, y):
        x, log_det = self.stacked.inverse_and_log_det(y.unflatten(-1, (self.stacked.num, -1)))
        return x.flatten(-2), log_det.sum(-1)


def test_properties():
    torch.manual_seed(0)
    flows = Stacked(FLOWS["realnvp"](2, num_layers=2, hidden=(4,)) for _ in range(3))
    check_transform(Joined(flows), torch.randn(5, 6))


def test_number_of_vectors():
    with pytest.raises(ValueError, match=r"x: expected shape \(\*, 3, 2\)"):
        Stacked(FLOWS["realnvp"](2) for _ in range(3))(torch.zeros(2, 2))


@pytest.mark.parametrize("shape", [(2,), (1, 2), (7, 1, 2), (0, 1, 2), (3, 2), (0, 3, 2)])
def test_shapes_broadcast(shape):
    flows = Stacked(moved([FLOWS["realnvp"](2) for _ in range(3)]))
    x = torch.randn(shape)
    y, log_det = flows.forward_and_log_det(x)
    assert y.shape == torch.broadcast_shapes(shape, (3, 2))
    assert log_det.shape == y.shape[:-1]
    same = flows.forward_and_log_det(x.expand(y.shape).contiguous())
    assert torch.allclose(y, same[0], atol=1e-6)
    assert torch.allclose(log_det, same[1], atol=1e-6)


def test_part_and_select_are_copies():
    torch.manual_seed(0)
    alone = moved([FLOWS["neural_spline"](2) for _ in range(3)])
    flows = Stacked(alone)
    x = torch.randn(6, 2)
    for k, transform in enumerate(alone):
        assert torch.allclose(flows.part(k)(x), transform(x), atol=1e-6)
    two = flows.select([2, 0])
    before = two(x.unsqueeze(-2))
    assert torch.allclose(before[:, 0], alone[2](x), atol=1e-6)
    for param in flows.parameters():
        param.data.zero_()
    assert torch.equal(two(x.unsqueeze(-2)), before)
    with pytest.raises(IndexError, match="below 3"):
        flows.part(3)


def test_copies_keep_their_own_parameters():
    flows = Stacked(moved([FLOWS["realnvp"](2) for _ in range(2)]))
    x = torch.randn(4, 1, 2)
    before = flows(x)
    for copied in (copy.deepcopy(flows), pickle.loads(pickle.dumps(flows))):
        assert torch.equal(copied(x), before)
        for param in copied.parameters():
            param.data.zero_()
        assert not torch.equal(copied(x), before)
    assert torch.equal(flows(x), before)
    new = Stacked(FLOWS["realnvp"](2) for _ in range(2))
    new.load_state_dict(flows.state_dict())
    assert torch.equal(new(x), before)


def test_buffers_that_differ_are_stacked():
    flows = Stacked([Compose([Permute([1, 0, 2]), Planar(3)]), Compose([Permute([2, 0, 1]), Planar(3)])])
    x = torch.arange(3.0)
    assert flows(x)[0].tolist() != flows(x)[1].tolist()
    assert torch.allclose(flows.inv(flows(x)), x.expand(2, 3), atol=1e-6)


@pytest.mark.parametrize(
    ("transforms", "match"),
    [
        ([], "at least one"),
        ([torch.distributions.transforms.ExpTransform()], "modules that are transforms"),
        ([nn.Linear(2, 2)], "modules that are transforms"),
        ([LowerAffine(2), LowerAffine(3)], "dimension"),
        ([Householder(2), LowerAffine(2)], "structure"),
        ([Stacked([Planar(2)])], "batch shape"),
    ],
)
def test_bad_input(transforms, match):
    with pytest.raises(ValueError, match=match):
        Stacked(transforms)
