"""Random starts without clustering: rings are told apart, normals found, and the best start is taken."""

import pytest
import torch

from pyro_flowvi.datasets import two_circles, two_circles_log_prob
from pyro_flowvi.distributions import PolarNormal
from pyro_flowvi.models import VMoNF
from pyro_flowvi.models.mixture.random_starts import multistart, ring_flow

LOCS = [[-6.0, 0.0], [6.0, 0.0], [0.0, 8.0]]


def clusters(num=100):
    return torch.cat([loc + torch.randn(num, 2) for loc in torch.tensor(LOCS)])


def small(num=3, **options):
    return VMoNF(num, 2, num_layers=2, hidden=(4,), **options)


@pytest.mark.parametrize("seed", [0, 1])
def test_rings_within_rings(seed):
    """What no partition by distance finds, with no label: every row, and nearly the true likelihood."""
    points, labels = two_circles(256, noise=0.02, seed=seed)
    x = torch.as_tensor(points).to(torch.tensor(0.0))
    model = VMoNF(2, 2, flow=ring_flow, base=PolarNormal(2))
    multistart(model, x, seed=seed)
    found = model.responsibilities(x).argmax(-1).cpu().numpy()
    assert (found == labels).mean() in (0.0, 1.0)
    best_possible = two_circles_log_prob(points, noise=0.02).mean()
    assert model.log_prob(x).mean().item() == pytest.approx(best_possible, abs=0.05)


@pytest.mark.parametrize("options", [{}, {"flow": "neural_spline"}, {"shared_layers": 1}], ids=str)
def test_normals(options):
    x, model = clusters(), small(**options)
    x = (x - x.mean(0)) / x.std(0)
    networks = {name: value.clone() for name, value in model.state_dict().items() if "last" in name}
    multistart(model, x, num_starts=16, num_steps=150)
    parts = model.responsibilities(x).argmax(-1).reshape(3, -1)
    assert all((row == row.mode().values).float().mean() > 0.98 for row in parts)
    assert len({int(row.mode().values) for row in parts}) == 3
    torch.testing.assert_close(model.mixture().weights, torch.full((3,), 1 / 3), atol=0.1, rtol=0)
    assert networks
    for name, value in networks.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_the_best_start_is_taken():
    """Which the held-out rows of a split with the same generator tell."""
    x, model = clusters(), small()
    nlls = multistart(model, x, num_starts=8, num_steps=20, seed=5)
    assert len(nlls) == 8
    assert nlls == sorted(nlls)
    order = torch.randperm(300, generator=torch.Generator(x.device).manual_seed(5), device=x.device)
    assert -model.log_prob(x[order[:60]]).mean().item() == pytest.approx(nlls[0], rel=1e-5)


def test_the_seed_decides():
    x = clusters()
    first, again, other = (multistart(small(), x, num_starts=4, num_steps=5, seed=s) for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("weights", ["fixed", "dirichlet"])
def test_other_weights_stay(weights):
    model = small(weights=weights)
    before = model.mixture().weights
    multistart(model, clusters(), num_starts=2, num_steps=3)
    assert torch.equal(model.mixture().weights, before)


def test_one_component_and_one_start():
    model = small(1)
    x = 5.0 + 2.0 * torch.randn(200, 2)
    assert len(multistart(model, x, num_starts=1, num_steps=150)) == 1
    draws = model.sample(2000)
    torch.testing.assert_close(draws.mean(0), x.mean(0), atol=0.4, rtol=0)
    torch.testing.assert_close(draws.std(0), x.std(0), atol=0.4, rtol=0)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x": torch.zeros(100, 3)}, "x"),
        ({"x": torch.zeros(10, 2)}, "x"),
        ({"num_starts": 0}, "num_starts"),
        ({"num_steps": 0}, "num_steps"),
        ({"lr": 0.0}, "lr"),
        ({"batch_size": 0}, "batch_size"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        multistart(**{"model": small(), "x": clusters(20), **change})


def test_indexed_components_are_refused():
    with pytest.raises(ValueError, match=r"^model: expected components that are flows"):
        multistart(small(index_dim=1), clusters(20))
