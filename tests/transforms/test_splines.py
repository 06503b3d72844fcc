"""Rational-quadratic splines: float32 accuracy against an exact inverse, boundaries, tails."""

import pytest
import torch

from pyro_flowvi.transforms import SplineCoupling
from pyro_flowvi.transforms.splines import spline_forward, spline_inverse, spline_size

NUM_BINS = 8


def points(bound, dtype):
    """Inside, on and next to the boundary, and outside."""
    ends = torch.tensor([bound, -bound], dtype=dtype)
    near = torch.nextafter(ends, torch.zeros((), dtype=dtype)), torch.nextafter(ends, 2 * ends)
    grid = torch.linspace(-bound - 1, bound + 1, 401, dtype=dtype)
    return torch.cat([grid, ends, *near, torch.tensor([0.0, -100.0, 1e6], dtype=dtype)])


def cases(scale, bound):
    """1,000 splines at all points: x of shape (1000, M, 1) and raw (1000, 1, 3K - 1, 1)."""
    raw = scale * torch.randn(1000, 1, spline_size(NUM_BINS), 1, dtype=torch.float32)
    x = points(bound, torch.float32).unsqueeze(-1).expand(1000, -1, 1)
    return x, raw


def bisect(y, raw, bound):
    """The exact inverse of the float64 spline, without the formula of the inverse."""
    low, high = torch.full_like(y, -bound), torch.full_like(y, bound)
    for _ in range(64):
        middle = 0.5 * (low + high)
        below = spline_forward(middle, raw, bound)[0] < y
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(y.abs() > bound, y, 0.5 * (low + high))


@pytest.mark.parametrize(
    "bound", [pytest.param(1.0, marks=pytest.mark.long), 3.0, pytest.param(10.0, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_float32_round_trip_is_as_good_as_that_of_an_exact_inverse(scale, bound):
    x, raw = cases(scale, bound)
    y, log_slope = spline_forward(x, raw, bound)
    back, back_slope = spline_inverse(y, raw, bound)
    for value in (y, log_slope, back, back_slope):
        assert value.isfinite().all()
    # What an exact inverse makes of the correctly rounded image: no float32 code knows more.
    rounded = spline_forward(x.double(), raw.double(), bound)[0].float()
    exact = (bisect(rounded.double(), raw.double(), bound) - x.double()).abs().max()
    error = (back - x).abs().max()
    assert error <= 3 * exact
    if scale == 0.5:
        assert error <= 1e-4 * max(1.0, bound / 3.0)


def test_float64_round_trip():
    x, raw = (value.double() for value in cases(0.5, 3.0))
    y, log_slope = spline_forward(x, raw, 3.0)
    back, back_slope = spline_inverse(y, raw, 3.0)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(back_slope, -log_slope, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boundary_is_smooth(dtype):
    """The derivative is 1 on the boundary, from both sides, and gradients are finite there."""
    raw = (3 * torch.randn(50, 1, spline_size(NUM_BINS), 1, dtype=dtype)).requires_grad_()
    x = points(3.0, dtype).unsqueeze(-1).expand(50, -1, 1).clone().requires_grad_()
    for function in (spline_forward, spline_inverse):
        y, log_slope = function(x, raw, 3.0)
        assert log_slope[x.abs() == 3.0].abs().max() <= 16 * torch.finfo(dtype).eps
        grads = torch.autograd.grad(y.sum() + log_slope.sum(), [x, raw])
        assert all(grad.isfinite().all() for grad in grads)


def test_extreme_raw_parameters_are_finite():
    raw = torch.tensor([-1e4, 1e4, 0.0, 88.0]).repeat(6)[: spline_size(NUM_BINS)].unsqueeze(-1)
    raw = raw.to(torch.float32).requires_grad_()
    x = points(3.0, torch.float32).unsqueeze(-1)
    for function in (spline_forward, spline_inverse):
        y, log_slope = function(x, raw, 3.0)
        assert y.isfinite().all()
        assert log_slope.isfinite().all()
        (grad,) = torch.autograd.grad(y.sum() + log_slope.sum(), raw)
        assert grad.isfinite().all()


def test_identity_outside_and_at_zero():
    x = points(3.0, torch.float64).unsqueeze(-1)
    torch.testing.assert_close(spline_forward(x, torch.zeros(spline_size(5), 1), 3.0)[0], x)
    raw = torch.randn(spline_size(5), 1)
    outside = x[x.abs() > 3.0].unsqueeze(-1)
    y, log_slope = spline_forward(outside, raw, 3.0)
    assert torch.equal(y, outside)
    assert not log_slope.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bins": 1}, "num_bins: expected 2 to 512, got 1"),
        ({"num_bins": 0}, "num_bins: expected a positive integer, got 0"),
        ({"bound": -1.0}, "bound: expected a positive number, got -1.0"),
        ({"mask": [True, True]}, "mask: expected at least one False"),
        ({"mask": [True]}, "mask: expected 2 booleans"),
        ({"mask": "left"}, "mask: expected one of"),
        ({"activation": "swish"}, "activation: expected one of"),
        ({"hidden": (0,)}, "hidden: expected a positive integer, got 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SplineCoupling(2, **options)
