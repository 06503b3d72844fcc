"""Training through a message map: scores and gradients against autograd's, and at extreme scales."""

import copy

import pytest
import torch

from pyro_flowvi.transforms._fused import _by_autograd, has_form, pass_through
from pyro_flowvi.transforms.base import forward_and_log_det, forward_with_score, inverse_and_log_det
from tests.autoguide.test_message_map import map_of, transform_of
from tests.hierarchies import SWEEP
from tests.transforms.layers import randomized


def standard_score(transform, y, score_of_noise=None):
    """∇ log q at the image of standard normal noise, by autodiff through the inverse."""
    y = y.detach().requires_grad_()
    x, log_det = inverse_and_log_det(transform, y)
    (score,) = torch.autograd.grad((log_det - 0.5 * x.square().sum(-1)).sum(), y)
    return score


@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("name", SWEEP)
class TestTraining:
    @staticmethod
    def setting(name, framed):
        transform = transform_of(name)
        if framed:
            transform[-1].enter_frame()
            randomized(transform[-1], 0.1)
        return transform, torch.randn(6, transform.dim)

    def test_score(self, name, framed):
        transform, x = self.setting(name, framed)
        y, _, score = forward_with_score(transform, x.requires_grad_(), -x.detach())
        truth = standard_score(transform, y)
        torch.testing.assert_close(score, truth, rtol=1e-6, atol=1e-6 * truth.abs().max().item())

    def test_written_out_pass(self, name, framed):
        transform, x = self.setting(name, framed)
        assert has_form(transform[-1])
        score, v = torch.randn_like(x), torch.randn_like(x)
        params = [p for p in transform.parameters() if p.requires_grad]
        found = pass_through(transform, x, score)
        # Through the whole at once: the image by autodiff, the score by the inverse.
        y, log_det = forward_and_log_det(transform, x.requires_grad_())
        truth = torch.autograd.grad(y, [x, *params], v, allow_unused=True, materialize_grads=True)
        back, grads = found.pull(v)
        torch.testing.assert_close(found.image, y.detach())
        torch.testing.assert_close(found.log_det, log_det.detach())
        assert set(grads) <= set(params)
        mine = [back, *(grads.get(p, torch.zeros_like(p)) for p in params)]
        for one, true in zip(mine, truth, strict=True):
            assert one.shape == true.shape
            torch.testing.assert_close(one, true, rtol=1e-7, atol=1e-9 * (1.0 + true.abs().max().item()))

    def test_written_out_score(self, name, framed):
        transform, x = self.setting(name, framed)
        found = pass_through(transform, x, -x)
        truth = standard_score(transform, found.image)
        torch.testing.assert_close(found.score, truth, rtol=1e-6, atol=1e-6 * truth.abs().max().item())

    def test_equal_to_autograds_pass(self, name, framed):
        transform, x = self.setting(name, framed)
        layer = transform[-1]
        score, v = torch.randn_like(x), torch.randn_like(x)
        params = [p for p in layer.parameters() if p.requires_grad]
        one, other = pass_through(layer, x, score), _by_autograd(layer, x, score, params)
        for a, b in ((one.image, other.image), (one.log_det, other.log_det), (one.score, other.score)):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
        (back, grads), (its_back, its_grads) = one.pull(v), other.pull(v)
        torch.testing.assert_close(back, its_back)
        for param in params:
            mine = grads.get(param, torch.zeros_like(param))
            torch.testing.assert_close(mine, its_grads[param], rtol=1e-7, atol=1e-8)
        again = one.pull(v)[0]  # the way back can be gone twice
        torch.testing.assert_close(again, back)

    def test_frozen_parameters(self, name, framed):
        transform, x = self.setting(name, framed)
        layer = transform[-1]
        for param in layer.parameters():
            param.requires_grad_(False)
        trained = [p for p in transform.parameters() if p.requires_grad]
        _, grads = pass_through(transform, x, -x).pull(torch.randn_like(x))
        assert set(grads) <= set(trained)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("log_scale", [-30.0, -15.0, 15.0, 30.0])
@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("schools", ["tau"]),
        ("slopes", ["t"]),
        ("three_levels", ["ta", "tb"]),
        ("loop", ["s"]),
        ("counties", ["tau"]),
        ("padded", ["s"]),
        ("rates", ["k"]),
        ("rates", ["b"]),
    ],
)
def test_extreme_scales(name, scales, log_scale, dtype):
    """The neck of a funnel, and its other end: values and gradients are finite, on either way back."""
    if dtype == torch.float32 and scales == ["k"]:
        pytest.skip("a Gamma of shape 1e-7 has a location of -1e7 in log space, which float32 cannot move")
    layer = copy.deepcopy(map_of(name, 0.1)).to(dtype)
    x = torch.randn(4, layer.dim, dtype=dtype)
    for scale in scales:
        x[:, layer.places()[scale]] = log_scale
    params = [p for p in layer.parameters() if p.requires_grad]
    at = x.clone().requires_grad_()
    z, log_det = forward_and_log_det(layer, at)
    assert z.isfinite().all()
    assert log_det.isfinite().all()
    grads = torch.autograd.grad(z.sum() + log_det.sum(), [at, *params], allow_unused=True)
    assert all(grad.isfinite().all() for grad in grads if grad is not None)
    found = pass_through(layer, x, -x)
    back, grads = found.pull(torch.ones_like(x))
    assert found.image.isfinite().all()
    assert found.score.isfinite().all()
    assert back.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads.values())
