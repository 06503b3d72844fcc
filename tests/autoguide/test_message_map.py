"""The transform of guides that run the model's priors, and what it is in closed form."""

import copy
import math
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Gamma, MultivariateNormal, Normal

from pyro_flowvi import FLOWS, AutoCIF, AutoFlow
from pyro_flowvi.testing import check_transform
from pyro_flowvi.transforms.base import forward_and_log_det, inverse_and_log_det
from tests.hierarchies import NAMES, SWEEP, make_hierarchies
from tests.transforms.layers import randomized

LARGE = ("topics",)
"""Of too many latents for a Jacobian in every test."""


def flow_of(dim, key="realnvp"):
    return FLOWS[key](dim, num_layers=2, hidden=(5,))


def guide_of(name, flow=flow_of, **options):
    model, args = make_hierarchies()[name]
    guide = AutoFlow(model, flow, structure="program", **options).materialize(*args)
    assert guide.structure.taken
    return guide


def transform_of(name, spread=0.2, **options):
    """With random parameters."""
    return randomized(guide_of(name, **options).get_transform(), spread)


def map_of(name, spread=0.2):
    """The message map alone."""
    return transform_of(name, spread)[-1]


def jacobian(transform, x):
    """(P, D, D)."""
    rows = [
        torch.autograd.functional.jacobian(lambda v: forward_and_log_det(transform, v)[0], row) for row in x
    ]
    return torch.stack(rows)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n in LARGE else n for n in NAMES]
)
def test_is_a_transform(name):
    transform = transform_of(name, 0.1)
    check_transform(transform, torch.randn(4, transform.dim), gradients=False)


@pytest.mark.parametrize("name", SWEEP)
def test_every_parameter_is_trained(name):
    """Networks whose last layer is zero wait for it: within three steps all have a gradient."""
    transform = guide_of(name).get_transform()
    params = dict(transform.named_parameters())
    x, target, seen = torch.randn(20, transform.dim), torch.randn(transform.dim), set()
    optimizer = torch.optim.Adam(params.values(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        y, log_det = forward_and_log_det(transform, x)
        (0.5 * (y - target).square().sum(-1) - log_det).mean().backward()
        seen |= {key for key, p in params.items() if p.grad is not None and bool((p.grad != 0).any())}
        optimizer.step()
    assert set(params) == seen


@pytest.mark.parametrize("name", SWEEP)
class TestMap:
    def test_determinant(self, name):
        layer = map_of(name)
        x = torch.randn(3, layer.dim)
        _, log_det = forward_and_log_det(layer, x)
        torch.testing.assert_close(log_det, jacobian(layer, x).slogdet()[1])

    def test_is_triangular(self, name):
        """Roots, what is free, and then in the program's order."""
        layer = map_of(name)
        matrix = jacobian(layer, torch.randn(2, layer.dim))
        places = layer.places()
        first = [*layer.structure.roots, *layer.structure.free]
        ordered = [*first, *(site for site in places if site not in first)]
        order = torch.empty(layer.dim, dtype=torch.long)
        for i, site in enumerate(ordered):
            order[places[site][places[site] >= 0]] = i
        above = order.unsqueeze(-1) < order
        assert (matrix[:, above] == 0).all()

    def test_inverse(self, name):
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
            layer = copy.deepcopy(map_of(name)).to(dtype)
            x = torch.randn(50, layer.dim, dtype=dtype)
            y, log_det = forward_and_log_det(layer, x)
            back, back_det = inverse_and_log_det(layer, y)
            assert y.dtype == back.dtype == log_det.dtype == dtype
            torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(back_det, -log_det, rtol=tolerance, atol=tolerance)

    def test_roots_pass(self, name):
        layer = map_of(name)
        x = torch.randn(3, layer.dim)
        places = torch.cat([layer.places()[site].flatten() for site in layer.structure.roots])
        assert torch.equal(forward_and_log_det(layer, x)[0][:, places], x[:, places])

    def test_batches_and_single_vectors(self, name):
        layer = map_of(name)
        x = torch.randn(2, 3, layer.dim)
        y, log_det = forward_and_log_det(layer, x)
        assert y.shape == x.shape
        assert log_det.shape == (2, 3)
        one, its_det = forward_and_log_det(layer, x[1, 2])
        torch.testing.assert_close(one, y[1, 2])
        torch.testing.assert_close(its_det, log_det[1, 2])

    def test_empty_batches(self, name):
        layer = map_of(name)
        x = torch.randn(0, 3, layer.dim)
        assert forward_and_log_det(layer, x)[0].shape == x.shape
        assert inverse_and_log_det(layer, x)[1].shape == (0, 3)

    def test_frames_are_other_words_for_the_same(self, name):
        transform = transform_of(name)
        layer, x = transform[-1], torch.randn(5, transform.dim)
        expected = forward_and_log_det(transform, x)
        layer.enter_frame()
        in_frame = forward_and_log_det(transform, x)
        with torch.no_grad():
            for param in layer.parameters():
                param.add_(0.05 * torch.randn_like(param))
        moved = forward_and_log_det(transform, x)
        layer.leave_frame()
        after = forward_and_log_det(transform, x)
        for found, truth in ((in_frame, expected), (after, moved)):
            torch.testing.assert_close(found[0], truth[0], rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(found[1], truth[1], rtol=1e-8, atol=1e-8)

    def test_deepcopy(self, name):
        transform = transform_of(name)
        twin, x = copy.deepcopy(transform), torch.randn(3, transform.dim)
        before = forward_and_log_det(transform, x)[0]
        randomized(twin, 0.3)
        assert torch.equal(forward_and_log_det(transform, x)[0], before)
        assert not torch.equal(forward_and_log_det(twin, x)[0], before)


@pytest.mark.parametrize("key", [pytest.param(key, marks=pytest.mark.long) for key in FLOWS])
def test_other_flows(key):
    transform = transform_of("schools", flow=partial(flow_of, key=key))
    check_transform(transform, torch.randn(4, transform.dim), gradients=False)


# -- what the map is -----------------------------------------------------------------------------


def silent(layer):
    """Without messages."""
    with torch.no_grad():
        for key, param in layer.named_parameters():
            if "by_root" in key or "slope" in key:
                param.zero_()
            elif "log_weight" in key:
                param.fill_(-60.0)
            elif "factor" in key:
                param.copy_(torch.diag_embed(torch.full_like(param.diagonal(dim1=-2, dim2=-1), -60.0)))
    return layer


def test_without_messages_it_draws_from_the_prior():
    model, args = make_hierarchies()["three_levels"]
    layer = silent(AutoFlow(model, flow_of, structure="program").materialize(*args).get_transform()[-1])
    x = torch.randn(6, layer.dim)
    z, log_det = forward_and_log_det(layer, x)
    places = layer.places()
    mu, ta, tb = (z[:, places[name]] for name in ("mu", "ta", "tb"))
    a = mu.unsqueeze(-1) + ta.exp().unsqueeze(-1) * x[:, places["a"]]
    c = a.unsqueeze(-2) + tb.exp()[:, None, None] * x[:, places["c"]]
    torch.testing.assert_close(z[:, places["a"]], a)
    torch.testing.assert_close(z[:, places["c"]], c)
    torch.testing.assert_close(log_det, 4.0 * ta + 8.0 * tb)


def test_without_messages_a_vector_is_drawn_from_its_prior():
    layer = silent(map_of("slopes", 0.0))
    x = torch.randn(5, layer.dim)
    z, log_det = forward_and_log_det(layer, x)
    places = layer.places()
    m, t, correlation = z[:, places["m"]], z[:, places["t"]].exp(), z[:, places["factor"]]
    row = torch.distributions.biject_to(dist.constraints.corr_cholesky)(correlation)
    scale = t.unsqueeze(-1) * row
    own = MultivariateNormal(m.unsqueeze(1), scale_tril=scale.unsqueeze(1)).log_prob(z[:, places["ab"]])
    rest = x[:, places["ab"]].square().sum((-1, -2)) / 2.0 + math.log(2 * math.pi) * 4
    torch.testing.assert_close(own.sum(-1), -rest - log_det)


@pytest.mark.parametrize("log_tau", [-3.0, 0.0, 4.0])
def test_the_message_of_a_normal_observation_is_exact(log_tau):
    """With g = (y - a) / noise² and r = 1 / noise² latents have the conditional posterior, for all roots."""
    model, (y, noise) = make_hierarchies()["schools"]
    layer = AutoFlow(model, flow_of, structure="program").materialize(y, noise).get_transform()[-1]
    with torch.no_grad():
        layer.centre.normal_()
        layer.log_weight.copy_(-2.0 * noise.log())
        layer.slope.copy_((y - layer.centre) / noise.square())
    places = layer.places()
    z = torch.randn(7, layer.dim)
    z[:, places["tau"]] = log_tau
    mu, tau = z[:, places["mu"]].unsqueeze(-1), z[:, places["tau"]].exp().unsqueeze(-1)
    x, log_det = inverse_and_log_det(layer, z)
    inner = places["theta"]
    found = Normal(0.0, 1.0).log_prob(x[:, inner]).sum(-1) + log_det
    precision = tau**-2 + noise**-2
    mean = (mu / tau**2 + y / noise**2) / precision
    torch.testing.assert_close(found, Normal(mean, precision.rsqrt()).log_prob(z[:, inner]).sum(-1))


def test_free_sites_are_normal():
    layer = map_of("topics")
    assert layer.structure.free == ("weights",)
    x = torch.zeros(1, layer.dim)
    where = layer.places()["weights"]
    shifted = x.clone()
    shifted[:, where] = 1.0
    low, high = (forward_and_log_det(layer, value)[0][:, where] for value in (x, shifted))
    lower = forward_and_log_det(layer, -shifted)[0][:, where]
    torch.testing.assert_close(high - low, low - lower)


def test_gamma_of_a_huge_shape():
    """Where the prior is nearly normal in log space, with a silent message it is that."""
    layer = silent(map_of("rates", 0.0))
    places, x = layer.places(), torch.randn(4000, layer.dim)
    x[:, places["k"]], x[:, places["b"]] = math.log(1e6), 2.0
    z, log_det = forward_and_log_det(layer, x)
    assert z.isfinite().all()
    assert log_det.isfinite().all()
    draws = Gamma(torch.tensor(1e6), math.exp(2.0)).sample((4000, 4)).log()
    found = z[:, places["rate"]].detach()
    assert (found.mean() - draws.mean()).abs() < 5 * draws.std() / math.sqrt(16_000)
    assert found.std() == pytest.approx(draws.std().item(), rel=0.03)


@pytest.mark.parametrize("name", ["schools", "three_levels", "slopes"])
def test_far_roots(name):
    """How messages move with the roots is bounded, so that no draw explodes."""
    layer = map_of(name, 0.5)
    roots = torch.cat([layer.places()[site].flatten() for site in layer.structure.roots])
    x = torch.zeros(2, layer.dim)
    for size in (10.0, -10.0):
        x[:, roots] = size
        z, log_det = forward_and_log_det(layer, x)
        assert z.isfinite().all()
        assert log_det.isfinite().all()


def test_indices_of_a_cif():
    """The map is the last layer there, too."""
    model, args = make_hierarchies()["schools"]
    guide = AutoCIF(model, num_layers=2, hidden=(5,), index_hidden=(4,), structure="program").materialize(
        *args
    )
    assert guide.structure.taken
    draws = guide.sample_posterior(6)
    assert all(value.isfinite().all() for value in draws.values())
    assert guide.log_prob(draws).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_pickle(name):
    transform = transform_of(name)
    twin, x = pickle.loads(pickle.dumps(transform)), torch.randn(3, transform.dim)
    assert torch.equal(forward_and_log_det(twin, x)[0], forward_and_log_det(transform, x)[0])
    for point in (x, forward_and_log_det(transform, x)[0]):
        assert torch.equal(inverse_and_log_det(twin, point)[0], inverse_and_log_det(transform, point)[0])


def test_a_buffer_that_the_model_writes_into():
    """A later latent reads what an earlier one left in one tensor."""

    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        path = torch.zeros(len(y) + 1)
        for t in range(len(y)):
            path[t + 1] = pyro.sample(f"x_{t}", dist.Normal(path[t], scale))
        pyro.sample("y", dist.Normal(path[1:], 1.0).to_event(1), obs=y)

    guide = AutoFlow(model, flow_of).materialize(torch.zeros(3))
    parents = guide.structure.found.messages
    assert (parents["x_0"], parents["x_1"]) == ({"scale"}, {"scale", "x_0"})
    # What was written into the tensor before counts, wherever in it that was.
    assert {"scale", "x_1"} <= parents["x_2"] <= {"scale", "x_0", "x_1"}
    assert guide.sample_posterior(4)["x_2"].shape == (4,)


def test_no_draws():
    guide = guide_of("schools")
    assert guide.sample_posterior(0)["theta"].shape == (0, 6)
    assert guide.log_prob({name: value[:0] for name, value in guide.sample_posterior(2).items()}).shape == (
        0,
    )
