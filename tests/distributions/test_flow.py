"""FlowDistribution against torch's TransformedDistribution and quadrature."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowvi.distributions import FlowDistribution
from pyro_flowvi.transforms import ConditionalPlanar, LowerAffine, Planar, Radial


def randomized(transform):
    with torch.no_grad():
        for param in transform.parameters():
            param.copy_(torch.randn_like(param))
    return transform


@pytest.mark.parametrize("kind", [Planar, Radial])
def test_agrees_with_torch(kind):
    flow = randomized(kind(3, num_layers=4))
    ours = FlowDistribution(None, flow)
    theirs = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [flow])
    z, log_prob = ours.rsample_and_log_prob((100,))
    torch.testing.assert_close(log_prob, theirs.log_prob(z))
    torch.testing.assert_close(ours.log_prob(z), log_prob)
    anywhere = 10 * torch.randn(50, 3)
    torch.testing.assert_close(ours.log_prob(anywhere), theirs.log_prob(anywhere))


@pytest.mark.parametrize("kind", [Planar, Radial])
def test_density_integrates_to_one(kind):
    flow = FlowDistribution(None, randomized(kind(1, num_layers=3)))
    grid = torch.linspace(-60, 60, 400_001).unsqueeze(-1)
    with torch.no_grad():
        assert torch.trapezoid(flow.log_prob(grid).exp(), grid[:, 0]) == pytest.approx(1.0, abs=1e-4)


def test_shapes():
    flow = FlowDistribution(None, Planar(3))
    assert (flow.batch_shape, flow.event_shape) == ((), (3,))
    wide = flow.expand((4, 1)).expand((4, 2))
    assert wide.batch_shape == (4, 2)
    z, log_prob = wide.rsample_and_log_prob((5,))
    assert (z.shape, log_prob.shape) == ((5, 4, 2, 3), (5, 4, 2))
    assert wide.log_prob(z).shape == (5, 4, 2)
    assert flow.expand((5,)).log_prob(torch.zeros(3)).shape == (5,)
    assert flow.sample().shape == (3,)
    assert not flow.sample().requires_grad
    assert flow.rsample().requires_grad
    assert flow.rsample((0,)).shape == (0, 3)


def test_context_is_part_of_the_batch_shape():
    """Fact 13: Pyro's conditioned distribution forgets the context's batch."""
    flow = randomized(ConditionalPlanar(2, context_dim=3))
    q = FlowDistribution(None, flow.condition(torch.randn(6, 3)))
    assert q.batch_shape == (6,)
    z, log_prob = q.rsample_and_log_prob((5,))
    assert z.shape == (5, 6, 2)
    torch.testing.assert_close(q.log_prob(z), log_prob)
    with pytest.raises(ValueError, match="condition it on a context first"):
        FlowDistribution(None, flow)


def test_other_base():
    base = dist.StudentT(4.0, torch.zeros(3), 1.0).to_event(1)
    q = FlowDistribution(base, randomized(LowerAffine(3)))
    z, log_prob = q.rsample_and_log_prob((10,))
    torch.testing.assert_close(q.log_prob(z), log_prob)
    theirs = dist.TransformedDistribution(base, [q.transform])
    torch.testing.assert_close(log_prob, theirs.log_prob(z))
    assert q.expand((2,)).sample().shape == (2, 3)
    with pytest.raises(ValueError, match=r"base: expected event_shape \(3,\), got \(\)"):
        FlowDistribution(dist.Normal(torch.zeros(3), 1.0), Planar(3))


def test_to():
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    for q in (FlowDistribution(None, Planar(3)), FlowDistribution(base, Planar(3))):
        moved = q.to(torch.float32)
        assert moved is q
        assert q.sample((2,)).dtype == torch.float32
        assert q.log_prob(torch.zeros(3, dtype=torch.float32)).dtype == torch.float32
    assert base.base_dist.loc.dtype == torch.get_default_dtype()
    with pytest.raises(ValueError, match="dtype: expected"):
        FlowDistribution(None, Planar(3)).to(torch.float16)


def test_nothing_is_cached():
    flow = Planar(2)
    q = FlowDistribution(None, flow)
    z, before = q.rsample_and_log_prob()
    with torch.no_grad():
        flow.u.add_(1.0)
    assert not torch.equal(q.log_prob(z), before)


def test_in_a_pyro_model():
    flow = Planar(2)

    def model():
        with pyro.plate("rows", 5):
            return pyro.sample("z", FlowDistribution(None, flow))

    trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["z"]["value"].shape == (5, 2)
    trace.compute_log_prob()
    assert trace.nodes["z"]["log_prob"].shape == (5,)


def test_bad_input():
    with pytest.raises(ValueError, match="transform: expected a Transform, got int"):
        FlowDistribution(None, 3)
    with pytest.raises(ValueError, match="dim: expected a positive integer, got None"):
        FlowDistribution(None, dist.transforms.ExpTransform())
    assert FlowDistribution(None, dist.transforms.ExpTransform(), dim=2).sample().shape == (2,)
