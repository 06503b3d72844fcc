"""Every distribution and prior flow at random shapes, dtypes and parameters."""

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyro_flowvi import FLOWS
from pyro_flowvi.distributions import FlowDistribution, IndexedFlow, MixtureOfFlows, PolarNormal
from pyro_flowvi.flows import indexed_layers
from pyro_flowvi.transforms import Stacked
from tests.transforms.layers import randomized

SIZES = {"num_layers": 2, "hidden": (4,)}
NAMES = [
    name if name in ("planar", "realnvp") else pytest.param(name, marks=pytest.mark.long) for name in FLOWS
]
SHAPES = st.sampled_from([(), (0,), (3,), (2, 1), (2, 0)])


def flow_distribution(name, dim, dtype, batch, scale):
    context = torch.randn(*batch, 2, dtype=dtype)
    flow = randomized(FLOWS[name](dim, context_dim=2, **SIZES), scale).to(dtype)
    return FlowDistribution(None, flow.condition(context))


def based(name, dim, dtype, batch, scale):
    base = dist.Normal(torch.zeros(*batch, dim, dtype=dtype), 1.0).to_event(1)
    return FlowDistribution(base, randomized(FLOWS[name](dim, **SIZES), scale).to(dtype))


def mixture(name, dim, dtype, batch, scale):
    flows = Stacked(randomized(FLOWS[name](dim, **SIZES), scale).to(dtype) for _ in range(3))
    return MixtureOfFlows(None, flows, torch.randn(*batch, 3, dtype=dtype))


def indexed(name, dim, dtype, batch, scale):
    base = dist.Normal(torch.zeros(*batch, dim, dtype=dtype), 1.0).to_event(1)
    layers = [randomized(layer, scale).to(dtype) for layer in indexed_layers(name, dim, index_dim=1, **SIZES)]
    return IndexedFlow(base, layers, num_index_samples=3)


def polar(name, dim, dtype, batch, scale):
    return PolarNormal(dim, (scale * torch.randn(batch, dtype=dtype)).exp())


MAKERS = {
    "flow": flow_distribution,
    "flow over a base": based,
    "mixture": mixture,
    "indexed": indexed,
    "polar": polar,
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", NAMES)
@given(
    dim=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    batch=SHAPES,
    draws=SHAPES,
    scale=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**31 - 1),
)
def test_shapes_dtypes_and_expansion(kind, name, dim, dtype, batch, draws, scale, seed):
    if kind == "polar" and name != next(iter(FLOWS)):
        return
    torch.manual_seed(seed)
    q = MAKERS[kind](name, dim, dtype, batch, scale)
    assert (q.batch_shape, q.event_shape) == (batch, (dim,))
    for method in (q.sample, q.rsample):
        z = method(draws)
        assert z.shape == draws + batch + (dim,)
        assert z.dtype == dtype
    log_prob = q.log_prob(z.detach())
    assert log_prob.shape == draws + batch
    assert log_prob.dtype == dtype
    assert log_prob.isfinite().all()
    assert q.log_prob(torch.zeros(dim, dtype=dtype)).shape == batch
    wider = q.expand((4, *batch))
    assert wider.batch_shape == (4, *batch)
    assert wider.sample(draws).shape == draws + (4, *batch, dim)
    assert wider.log_prob(torch.zeros(dim, dtype=dtype)).shape == (4, *batch)
    if kind != "indexed":  # whose log_prob is an estimate
        value = torch.randn(dim, dtype=dtype)
        torch.testing.assert_close(wider.log_prob(value), q.log_prob(value).expand(4, *batch))


@pytest.mark.parametrize("kind", ["flow over a base", "mixture"])
@pytest.mark.parametrize("name", NAMES)
@given(dim=st.integers(1, 2), seed=st.integers(0, 2**31 - 1))
def test_density_sums_to_one(kind, name, dim, seed):
    """On a grid, with volumes by quadrature."""
    torch.manual_seed(seed)
    q = MAKERS[kind](name, dim, torch.float64, (), 0.2)
    draws = q.sample((2000,))
    low, high = draws.amin(0), draws.amax(0)
    low, high = low - 0.6 * (high - low), high + 0.6 * (high - low)
    count = 4001 if dim == 1 else 401
    sides = [
        torch.linspace(float(a), float(b), count, dtype=torch.float64) for a, b in zip(low, high, strict=True)
    ]
    grid = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)
    cell = ((high - low) / (count - 1)).prod()
    with torch.no_grad():
        total = q.log_prob(grid).exp().sum() * cell
    assert float(total) == pytest.approx(1.0, abs=5e-3)
