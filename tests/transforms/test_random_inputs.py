"""Every layer and named flow at random shapes, dtypes, parameters and magnitudes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_flowvi import FLOWS
from pyro_flowvi.testing import ROUNDING_FACTOR, _check_values, _jacobian
from pyro_flowvi.transforms.splines import spline_forward, spline_inverse, spline_size
from tests.transforms.layers import LAYERS, randomized

MAKERS = {
    **LAYERS,
    **{
        f"flow {name}": lambda dim, make=make: make(dim, num_layers=2, hidden=(4,))
        for name, make in FLOWS.items()
    },
}
DIMS = st.integers(1, 6)
DTYPES = st.sampled_from([torch.float32, torch.float64])
SEEDS = st.integers(0, 2**31 - 1)
BATCHES = st.sampled_from([(), (1,), (3,), (0,), (2, 3), (2, 0), (2, 1, 2)])


def made(name, dim, dtype, seed, scale):
    torch.manual_seed(seed)
    return randomized(MAKERS[name](dim), scale).to(dtype)


def all_finite(flow, x, inverse=False):
    """Values, and gradients in input and parameters."""
    x = x.clone().requires_grad_()
    y, log_det = (flow.inverse_and_log_det if inverse else flow.forward_and_log_det)(x)
    params = [param for param in flow.parameters() if param.requires_grad]
    grads = torch.autograd.grad(y.sum() + log_det.sum(), [x, *params], allow_unused=True)
    return all(value.isfinite().all() for value in (y, log_det, *grads) if value is not None)


@pytest.mark.parametrize("name", MAKERS)
@given(dim=DIMS, dtype=DTYPES, seed=SEEDS, batch=BATCHES, scale=st.sampled_from([0.0, 0.3, 1.0]))
def test_shapes_dtypes_and_calls_that_agree(name, dim, dtype, seed, batch, scale):
    flow = made(name, dim, dtype, seed, scale)
    x = torch.randn(*batch, dim, dtype=dtype)
    y, log_det = flow.forward_and_log_det(x)
    back, back_det = flow.inverse_and_log_det(y)
    assert y.shape == back.shape == x.shape
    assert log_det.shape == back_det.shape == batch
    assert {value.dtype for value in (y, log_det, back, back_det)} == {dtype}
    assert torch.equal(flow(x), y)
    assert torch.equal(flow.log_abs_det_jacobian(x, y), log_det)
    assert torch.equal(flow.inv(y), back)


@pytest.mark.parametrize("name", MAKERS)
@given(
    dim=DIMS,
    dtype=DTYPES,
    seed=SEEDS,
    scale=st.sampled_from([0.3, 1.0, 3.0]),
    size=st.sampled_from([1e-6, 1.0, 10.0]),
)
def test_round_trip_and_log_det_at_random_parameters(name, dim, dtype, seed, scale, size):
    """Within a small factor of what the Jacobian allows; the log-determinant is autodiff's, of float64."""
    flow = made(name, dim, dtype, seed, min(scale, 0.5) if name.startswith("flow") else scale)
    x = size * torch.randn(3, dim, dtype=dtype)
    wide = copy.deepcopy(flow).double()
    _check_values(wide, x.double(), None, flow.exact_inverse)
    y, log_det = flow.forward_and_log_det(x)
    back = flow.inv(y)
    spectrum = torch.linalg.svdvals(_jacobian(wide.forward_and_log_det, x.double()))
    stretch, squeeze = spectrum[:, 0], 1.0 / spectrum[:, -1]
    eps = torch.finfo(dtype).eps
    allowed = (
        ROUNDING_FACTOR * eps * (1.0 + squeeze) * (1.0 + stretch) * (1.0 + x.norm(dim=-1) + y.norm(dim=-1))
    )
    assert ((back - x).norm(dim=-1) <= allowed).all()
    off = (log_det.double() - wide.forward_and_log_det(x.double())[1]).abs()
    assert (off <= eps**0.5 * (1.0 + stretch * squeeze)).all()


@pytest.mark.parametrize("name", LAYERS)
@given(
    dim=st.integers(1, 3),
    dtype=DTYPES,
    seed=SEEDS,
    raw=st.sampled_from([50.0, 100.0]),
    signs=st.sampled_from(["positive", "negative", "random"]),
    size=st.sampled_from([0.0, 1.0]),
)
def test_far_parameters_give_finite_values_and_gradients(name, dim, dtype, seed, raw, signs, size):
    flow = made(name, dim, dtype, seed, 0.0)
    with torch.no_grad():
        for param in flow.parameters():
            sign = torch.randn_like(param).sign() if signs == "random" else 1.0
            param.copy_(raw * sign * torch.ones_like(param) * (-1.0 if signs == "negative" else 1.0))
    x = size * torch.randn(3, dim, dtype=dtype)
    assert all_finite(flow, x)
    assert all_finite(flow, x, inverse=True)


@pytest.mark.parametrize("name", MAKERS)
@given(
    dim=DIMS,
    dtype=DTYPES,
    seed=SEEDS,
    size=st.sampled_from([0.0, 1e-30, 1e-15, 5.0, 1e5, 1e15]),
)
def test_magnitudes_give_finite_values_and_gradients(name, dim, dtype, seed, size):
    """Also at zero and at 5, the end of the splines' box."""
    flow = made(name, dim, dtype, seed, 0.3)
    x = torch.full((2, dim), size, dtype=dtype)
    x[1].neg_()
    assert all_finite(flow, x)
    assert all_finite(flow, x, inverse=True)


@given(dtype=DTYPES, seed=SEEDS, bins=st.integers(2, 9), scale=st.sampled_from([0.0, 1.0, 10.0, 100.0]))
def test_splines_on_their_knots_and_bounds(dtype, seed, bins, scale):
    """Finite gradients where bins meet, and the same point from either side."""
    torch.manual_seed(seed)
    raw = (scale * torch.randn(spline_size(bins), 1, dtype=dtype)).requires_grad_()
    sizes = 1e-3 + (1.0 - 1e-3 * bins) * raw[:bins].softmax(0)
    knots = 10.0 * sizes.cumsum(0) - 5.0
    x = torch.cat([knots, torch.nextafter(knots, knots + 1), knots.new_tensor([[-5.0], [5.0]])]).detach()
    x.requires_grad_()
    for function in (spline_forward, spline_inverse):
        y, log_slope = function(x, raw, 5.0)
        grads = torch.autograd.grad(y.sum() + log_slope.sum(), [x, raw])
        assert all(value.isfinite().all() for value in (y, log_slope, *grads))
    y, _ = spline_forward(x, raw, 5.0)
    assert (y[:bins] - y[bins : 2 * bins]).abs().max() <= 1e3 * torch.finfo(dtype).eps * 10.0
