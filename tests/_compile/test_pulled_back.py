"""The density in a flow's noise: against autograd through the whole, by graph and by modules."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowvi._compile.log_density import traced
from pyro_flowvi._compile.pulled_back import _PulledBack, pulled_back
from pyro_flowvi._program.log_density import UnconstrainedModel
from pyro_flowvi.flows import FLOWS
from pyro_flowvi.transforms import Compose


def model():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    pyro.sample("y", dist.StudentT(4.0, x, s.unsqueeze(-1)).to_event(1), obs=torch.ones(3))


def flow_of(name):
    torch.manual_seed(0)
    flow = Compose([FLOWS[name](4)])
    with torch.no_grad():
        for param in flow.parameters():
            param += 0.1 * torch.randn_like(param)
    return flow


@pytest.mark.parametrize("name", ["realnvp", "planar", "iaf", "neural_spline"])
def test_equals_autograd_through_both(name):
    density, flow = UnconstrainedModel(model), flow_of(name)
    found = pulled_back(flow, traced(density, 8), density.start)
    x = torch.randn(11, 4, requires_grad=True)
    z, log_det = flow.forward_and_log_det(x)
    expected = density.log_density(z) + log_det
    (slope,) = torch.autograd.grad(expected.sum(), x)
    value, gradient = found(x.detach())
    torch.testing.assert_close(value, expected.detach(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(gradient, slope, atol=1e-3, rtol=1e-3)


def test_is_a_graph_where_the_model_is():
    density, flow = UnconstrainedModel(model), flow_of("realnvp")
    graph = traced(density, 8)
    assert isinstance(pulled_back(flow, graph, density.start), _PulledBack)
    assert not isinstance(pulled_back(flow, graph.by_model, density.start), _PulledBack)
