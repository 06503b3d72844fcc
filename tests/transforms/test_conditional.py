"""A conditioned transform is a view of its module: it sees every later update, as Pyro's do."""

import pytest
import torch

from pyro_flowvi import FLOWS
from pyro_flowvi.distributions import FlowDistribution, IndexedFlow
from pyro_flowvi.transforms import (
    Conditional,
    ConditionalCompose,
    ConditionalPlanar,
    ConditionalRadial,
    IndexedCompose,
    IndexedLayer,
    Permute,
    Planar,
    SplineCoupling,
    multiscale_realnvp,
)
from tests.transforms.layers import LAYERS, randomized

DIM = 4


CONDITIONALS = {
    **{name: lambda name=name: Conditional(LAYERS[name](DIM), 3, (4,)) for name in LAYERS},
    **{
        f"flow {name}": lambda name=name: FLOWS[name](DIM, num_layers=2, hidden=(4,), context_dim=3)
        for name in FLOWS
    },
    "conditional planar": lambda: ConditionalPlanar(DIM, 3, hidden=(4,)),
    "conditional radial": lambda: ConditionalRadial(DIM, 3, hidden=(4,)),
    "compose of conditionals": lambda: ConditionalCompose(
        [ConditionalPlanar(DIM, 3), Permute([3, 1, 0, 2]), Planar(DIM)]
    ),
    "image": lambda: multiscale_realnvp((1, 2, 2), num_scales=1, num_layers=1, channels=2, context_dim=3),
}
for without_parameters in ("permute", "compose"):
    del CONDITIONALS[without_parameters]


@pytest.fixture(params=CONDITIONALS)
def conditional(request):
    return randomized(CONDITIONALS[request.param]())


def test_trained_while_it_is_conditioned(conditional):
    """Each backward pass has a graph of its own, and ends where a new condition at each step does."""
    start = {key: value.clone() for key, value in conditional.state_dict().items()}
    context, rows = torch.randn(5, 3), torch.randn(3, 5, DIM)
    ends = []
    for once in (True, False):
        conditional.load_state_dict(start)
        transform = conditional.condition(context)
        optim = torch.optim.SGD(conditional.parameters(), lr=1e-3)
        for x in rows:
            optim.zero_grad()
            transform = transform if once else conditional.condition(context)
            y = transform(x)
            (y.square().sum() - transform.log_abs_det_jacobian(x, y).sum()).backward()
            optim.step()
        ends.append({key: value.clone() for key, value in conditional.state_dict().items()})
    for key, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][key])
    assert any(not torch.equal(ends[0][key], value) for key, value in start.items())


def test_equals_a_fresh_condition_after_an_update(conditional):
    context, x = torch.randn(5, 3), torch.randn(5, DIM)
    with torch.no_grad():  # gradients are those of the call, not of the conditioning
        transform = conditional.condition(context)
    stale = transform(x)
    randomized(conditional)
    fresh = conditional.condition(context)
    assert not torch.equal(transform(x), stale)
    for ours, expected in zip(
        (*transform.forward_and_log_det(x), *transform.inverse_and_log_det(x)),
        (*fresh.forward_and_log_det(x), *fresh.inverse_and_log_det(x)),
        strict=True,
    ):
        assert torch.equal(ours, expected)
    y = transform(x)
    torch.testing.assert_close(
        transform.log_abs_det_jacobian(x, y), torch.func.vmap(_log_det_by_autodiff(conditional))(context, x)
    )
    assert y.requires_grad


def _log_det_by_autodiff(conditional):
    def log_det(context, x):
        jacobian = torch.func.jacrev(lambda x: conditional.condition(context)(x))(x)
        return torch.linalg.slogdet(jacobian)[1]

    return log_det


@pytest.mark.parametrize("layer", [Planar, SplineCoupling])
@pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det", "forward_with_score"])
def test_a_call_runs_the_network_once(layer, method):
    conditional, calls = Conditional(layer(DIM), 3), []
    conditional.network.register_forward_hook(lambda *_: calls.append(1))
    transform = conditional.condition(torch.randn(5, 3))
    assert not calls
    x = torch.randn(5, DIM, requires_grad=True)
    getattr(transform, method)(x, *([-x.detach()] if method == "forward_with_score" else []))
    assert len(calls) == 1


def test_distribution_of_a_conditioned_flow():
    conditional = ConditionalPlanar(2, 3, num_layers=2)
    context, z = torch.randn(5, 3), torch.randn(5, 2)
    q = FlowDistribution(None, conditional.condition(context))
    stale = q.log_prob(z)
    randomized(conditional)
    assert not torch.equal(q.log_prob(z), stale)
    assert torch.equal(q.log_prob(z), FlowDistribution(None, conditional.condition(context)).log_prob(z))


def test_indexed_flow_given_a_context():
    """Its memory of a draw ends with a change of the parameters of a conditional layer as well."""
    layer = IndexedLayer(ConditionalPlanar(2, 3), 1, (4,), context_dim=3)
    q = IndexedFlow(None, IndexedCompose([layer]), context=torch.randn(5, 3))
    z = q.rsample()
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z))
    randomized(layer.transform)
    torch.manual_seed(1)
    bound = q.log_prob(z)
    torch.manual_seed(1)
    assert torch.equal(bound, q.log_prob_bound(z, q.num_index_samples))
