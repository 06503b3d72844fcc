"""Continuously-indexed flows against hand computation, quadrature and finite differences."""

import copy
import math
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy.interpolate import CubicSpline
from scipy.stats import norm

from pyro_flowvi._program.log_weights import LogWeights
from pyro_flowvi.distributions import FlowDistribution, IndexedFlow
from pyro_flowvi.flows import FLOWS, indexed_layers
from pyro_flowvi.infer import TraceSTL_ELBO, fit
from pyro_flowvi.transforms import (
    Compose,
    Conditional,
    ElementwiseAffine,
    IndexedCompose,
    IndexedLayer,
    Planar,
)

ORDERS = ("after", "before")


def moved(module, scale=0.4, seed=0):
    """The same module, away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in module.parameters():
            param.add_(scale * torch.randn(param.shape, generator=generator))
    return module


def affine_layers(dim, index_dim, num_layers, order, scale=0.3):
    """Layers of which everything can be written down by hand."""
    return moved(
        torch.nn.ModuleList(
            IndexedLayer(ElementwiseAffine(dim), index_dim, (4, 3), order=order, index_scale=0.0)
            for _ in range(num_layers)
        ),
        scale,
    )


# -- the same in numpy, from the paper's formulas -------------------------------------------------------


def network(net, x):
    """Log-scale and shift of a network of ``x``, as the layer documents them: b + 2 tanh(h / 2), and t."""
    h = x
    for layer in net.network.hidden:
        h = np.tanh(h @ layer.weight.detach().numpy().T + layer.bias.detach().numpy())
    h = (h @ net.network.last.weight.detach().numpy().T).reshape(*h.shape[:-1], 2, -1)
    b, t = net.offset.detach().numpy()
    return b + 2.0 * np.tanh(h[..., 0, :] / 2.0), t + h[..., 1, :]


def preimage(layer, y, u):
    """w with G(w; u) = y, and log |det ∂G/∂w|."""
    loc, log_scale = layer.transform.loc.detach().numpy(), layer.transform.log_scale.detach().numpy()
    s, t = network(layer.mover, u)
    if layer.order == "before":  # G = g(e^-s (w - t))
        return (y - loc) * np.exp(-log_scale) * np.exp(s) + t, (log_scale - s).sum(-1)
    return ((y - t) * np.exp(-s) - loc) * np.exp(-log_scale), (log_scale + s).sum(-1)


def gaussian(net, given, u):
    """Log density of the index given the variable."""
    log_sd, mean = network(net, given)
    return norm.logpdf(u, mean, np.exp(log_sd)).sum(-1)


def log_ratio_by_hand(layers, z, noise):
    """log q_0 + Σ log q_l - log |det| - log r_l, with indices that r makes of standard normal ``noise``."""
    total, w = 0.0, z
    for layer, e in zip(reversed(layers), reversed(noise), strict=True):
        log_sd, mean = network(layer.reverse, w)
        u = mean + np.exp(log_sd) * e
        total = total - gaussian(layer.reverse, w, u)
        w, log_det = preimage(layer, w, u)
        total = total - log_det + gaussian(layer.index, w, u)
    return total + norm.logpdf(w).sum(-1)


@pytest.mark.parametrize("order", ORDERS)
def test_bounds_equal_a_hand_computation(order):
    layers = affine_layers(2, 3, 2, order)
    q = IndexedFlow(None, layers)
    z = torch.randn(5, 2)
    torch.manual_seed(7)
    found = q.log_prob_bound(z, 4)
    torch.manual_seed(7)
    noise = torch.randn(4, 5, 6).numpy()
    ratios = log_ratio_by_hand(layers, np.broadcast_to(z.numpy(), (4, 5, 2)), np.split(noise, 2, -1))
    expected = np.logaddexp.reduce(ratios, 0) - math.log(4)
    assert found.detach().numpy() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("order", ORDERS)
def test_the_bound_of_a_draw_equals_a_hand_computation(order):
    """From the forward pass, step by step as the paper has it."""
    layers = affine_layers(2, 1, 3, order)
    q = IndexedFlow(None, layers)
    torch.manual_seed(3)
    z, bound = q.rsample_and_log_prob((6,))
    torch.manual_seed(3)
    drawn = torch.randn(6, 5).numpy()
    w, total = drawn[:, :2], norm.logpdf(drawn[:, :2]).sum(-1)
    for i, layer in enumerate(layers):
        log_sd, mean = network(layer.index, w)
        u = mean + np.exp(log_sd) * drawn[:, 2 + i : 3 + i]
        total += gaussian(layer.index, w, u)
        s, t = network(layer.mover, u)
        loc, log_scale = layer.transform.loc.detach().numpy(), layer.transform.log_scale.detach().numpy()
        if order == "before":
            w = np.exp(log_scale) * (np.exp(-s) * (w - t)) + loc
        else:
            w = np.exp(s) * (np.exp(log_scale) * w + loc) + t
        total -= preimage(layer, w, u)[1] + gaussian(layer.reverse, w, u)
    assert z.detach().numpy() == pytest.approx(w, abs=1e-10)
    assert bound.detach().numpy() == pytest.approx(total, abs=1e-10)


# -- quadrature ---------------------------------------------------------------------------------------------


def log_density(layers, z, nodes, weights):
    """log q(z) of the last layer by quadrature over all indices, one number each."""
    if not len(layers):
        return norm.logpdf(z).sum(-1)
    *before, layer = layers
    z = np.broadcast_to(z[..., None, :], z.shape[:-1] + (len(nodes), z.shape[-1]))
    u = np.broadcast_to(nodes[:, None], z.shape[:-1] + (1,))
    w, log_det = preimage(layer, z, u)
    inner = log_density(before, w, nodes, weights) + gaussian(layer.index, w, u) - log_det
    return np.logaddexp.reduce(inner + np.log(weights), -1)


NODES, WEIGHTS = np.polynomial.legendre.leggauss(60)
NODES, WEIGHTS = 10.0 * NODES, 10.0 * WEIGHTS
GRID = np.linspace(-20.0, 20.0, 401)[:, None]
CASES = [(1, 1), (1, 2), (2, 1)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-d, {case[1]} layers")
def flow(request):
    """A flow with the log density that quadrature finds."""
    dim, num_layers = request.param
    layers = list(affine_layers(dim, 1, num_layers, "after"))
    if dim > 1:
        return IndexedFlow(None, layers), lambda z: log_density(layers, z.numpy(), NODES, WEIGHTS)
    table = CubicSpline(GRID[:, 0], log_density(layers, GRID, NODES, WEIGHTS))
    return IndexedFlow(None, layers), lambda z: table(z[..., 0].numpy())


def test_quadrature_has_converged():
    layers = list(affine_layers(1, 1, 2, "after"))
    mass = np.exp(log_density(layers, GRID, NODES, WEIGHTS)).sum() * (GRID[1, 0] - GRID[0, 0])
    assert mass == pytest.approx(1.0, abs=1e-5)


@torch.no_grad()
def test_the_bounds_hold_the_truth_between_them_and_tighten(flow):
    """Of the mean over draws; the gaps fall as 1 / M."""
    q, truth = flow
    torch.manual_seed(0)
    gaps = {}
    for count in (8, 32, 128):
        z, lower, upper = q.rsample_with_bound((4_000,), count)
        exact = torch.as_tensor(truth(z))
        below, above = exact - lower, upper - exact
        for gap in (below, above):
            assert gap.mean() > -3.0 * gap.std() / math.sqrt(len(gap))
        gaps[count] = float(below.mean()), float(above.mean())
    for side in (0, 1):
        rates = [gaps[8][side] / gaps[32][side], gaps[32][side] / gaps[128][side]]
        assert rates == pytest.approx([4.0, 4.0], rel=0.6)


@torch.no_grad()
def test_the_estimate_is_unbiased_for_the_density(flow):
    q, truth = flow
    z = torch.randn(4, q.event_shape[0])
    torch.manual_seed(1)
    estimates = q.log_prob_bound(z.expand(20_000, *z.shape), 1).exp()
    error = estimates.std(0) / math.sqrt(len(estimates))
    gap = estimates.mean(0) - torch.as_tensor(truth(z)).exp()
    assert (gap.abs() < 4.0 * error).all()


@torch.no_grad()
def test_many_index_draws_give_the_density(flow):
    q, truth = flow
    z = torch.randn(3, q.event_shape[0])
    torch.manual_seed(1)
    assert q.log_prob_bound(z, 100_000).numpy() == pytest.approx(truth(z), abs=0.02)


# -- gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_extra", [0, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_of_a_fixed_noise_bound(order, num_extra):
    """Autodiff against central differences, of the negative ELBO of a banana."""
    layers = moved(
        torch.nn.ModuleList(
            indexed_layers("neural_spline_ar", 2, num_layers=2, hidden=(4,), index_hidden=(3,), order=order)
        )
    )
    q = IndexedFlow(None, layers, num_extra=num_extra)

    def loss():
        torch.manual_seed(0)
        z, bound = q.rsample_and_log_prob((8,))
        target = -0.5 * z[:, 0] ** 2 - 2.0 * (z[:, 1] - z[:, 0] ** 2) ** 2
        return (bound - target).mean()

    params = list(layers.parameters())
    gradients = torch.autograd.grad(loss(), params)
    step = 1e-6
    with torch.no_grad():
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            ways = [torch.randn(param.shape, generator=generator) for param in params]
            values = []
            for sign in (1.0, -2.0):
                torch._foreach_add_(params, ways, alpha=sign * step)
                values.append(loss())
            torch._foreach_add_(params, ways, alpha=step)
            slope = float(values[0] - values[1]) / (2 * step)
            expected = sum(float((a * b).sum()) for a, b in zip(ways, gradients, strict=True))
            assert slope == pytest.approx(expected, rel=1e-5, abs=1e-7)


# -- what a distribution of Pyro's does ------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("order", ORDERS)
def test_starts_as_the_flow_that_it_is_made_of(name, order):
    """With s = t = 0 and r = q the indices change nothing, and both bounds are the density."""
    layers = indexed_layers(name, 3, num_layers=2, hidden=(5,), index_dim=2, order=order, index_scale=0.0)
    inner = moved(Compose([layer.transform for layer in layers]))
    plain = FlowDistribution(None, inner)
    q = IndexedFlow(None, layers)
    z, lower, upper = q.rsample_with_bound((7,), 3)
    for bound in (lower, upper, q.log_prob_bound(z, 1)):
        torch.testing.assert_close(bound, plain.log_prob(z), rtol=1e-9, atol=1e-9)


class TestMemo:
    """The bound of a draw belongs to that very draw, as long as nothing has changed."""

    def setup_method(self):
        torch.manual_seed(0)
        self.layers = affine_layers(2, 1, 2, "after")
        self.q = IndexedFlow(None, self.layers)
        self.z = self.q.rsample((1000,))
        self.bound = self.q.log_prob(self.z)

    def test_own_draw_keeps_its_bound(self):
        torch.testing.assert_close(self.q.log_prob(self.z), self.bound)

    def test_equal_values_get_an_estimate(self):
        estimate = self.q.log_prob(self.z.clone())
        assert not torch.equal(estimate, self.bound)
        assert estimate.mean() < self.bound.mean()

    def test_the_bound_of_a_sample_has_the_gradient_at_that_sample(self):
        """The score, with which a base that is not reparameterised is trained."""
        z = self.q.sample((50,))
        bound = self.q.log_prob(z)
        (found,) = torch.autograd.grad(bound.sum(), self.layers[0].mover.offset)
        logits = torch.zeros(2, requires_grad=True)
        places = dist.Normal(torch.zeros(2, 2), 1.0).to_event(1)
        base = dist.MixtureSameFamily(dist.Categorical(logits=logits), places)
        q = IndexedFlow(base, self.layers)
        assert not q.has_rsample
        assert found.abs().max() > 0
        z = q.sample((50,))
        noise = q._memo.noise
        (found,) = torch.autograd.grad(q.log_prob(z).sum(), logits, retain_graph=True)
        again = q.extended.log_prob(torch.cat([z, noise], -1)).sum()
        torch.testing.assert_close(found, torch.autograd.grad(again, logits)[0])

    @pytest.mark.parametrize("what", ["parameter", "value", "another draw", "dtype"])
    def test_forgotten_when_something_changed(self, what):
        with torch.no_grad():
            if what == "parameter":
                self.layers[0].mover.offset.add_(0.1)
            elif what == "value":
                self.z.add_(0.1)
            elif what == "dtype":
                self.layers.float()
                self.z, self.bound = self.z.float(), self.bound.float()
            else:
                self.q.rsample((1000,))
        assert (self.q.log_prob(self.z) - self.bound).abs().max() > 0.01

    def test_an_expanded_distribution_has_its_own(self):
        wide = self.q.expand((4,))
        assert wide.sample((3,)).shape == (3, 4, 2)
        assert wide.log_prob(torch.zeros(2)).shape == (4,)
        assert not torch.equal(wide.log_prob(self.z[:, None])[:, 0], self.bound)


def test_a_base_of_ones_own():
    """A normal base is the same as a standard one that an affine map goes before."""
    layers = affine_layers(2, 1, 2, "after")
    shift = ElementwiseAffine(2)
    with torch.no_grad():
        shift.loc.copy_(torch.tensor([1.0, -2.0]))
        shift.log_scale.copy_(torch.tensor([0.5, -0.5]))
    base = dist.Normal(shift.loc.detach(), shift.log_scale.detach().exp()).to_event(1)
    z = torch.randn(9, 2)
    values = []
    for q in (IndexedFlow(base, layers), IndexedFlow(None, [shift, *layers])):
        torch.manual_seed(0)
        values.append((q.log_prob_bound(z, 5), q.expand((9,)).sample().shape, q.rsample((3,)).shape))
    torch.testing.assert_close(values[0], values[1])


class TestContext:
    def setup_method(self):
        parts = [FLOWS["planar"](2, num_layers=1, context_dim=3), Planar(2)]
        self.layers = moved(
            torch.nn.ModuleList(IndexedLayer(part, 2, context_dim=3, order="after") for part in parts), 0.3
        )
        self.context = torch.randn(5, 3)

    @torch.no_grad()
    def test_each_row_is_the_flow_of_its_own_context(self):
        q = IndexedFlow(None, self.layers, context=self.context)
        assert q.batch_shape == (5,)
        assert q.rsample((7,)).shape == (7, 5, 2)
        y = torch.randn(5, 6)
        alone = IndexedFlow(None, self.layers, context=self.context[2])
        torch.testing.assert_close(q.extended.log_prob(y)[2], alone.extended.log_prob(y[2]))

    def test_the_indices_see_the_context(self):
        layer = self.layers[1]  # its own transform does not
        rows = IndexedCompose([layer]).condition(self.context)
        x = torch.randn(4).expand(5, 4)
        y, log_det = rows.forward_and_log_det(x)
        assert len(log_det.detach().unique()) == 5
        torch.testing.assert_close(rows.inverse_and_log_det(y)[0], x)

    def test_gradients_reach_the_context(self):
        context = self.context.requires_grad_()
        q = IndexedFlow(None, self.layers, context=context)
        q.rsample_and_log_prob((3,))[1].sum().backward()
        assert (context.grad != 0).all()

    def test_bad_contexts(self):
        with pytest.raises(ValueError, match="context: expected what the conditional layers depend on"):
            IndexedFlow(None, self.layers)
        with pytest.raises(ValueError, match=r"context: expected shape \(\*, 3\), got \(5, 2\)"):
            IndexedFlow(None, self.layers, context=torch.zeros(5, 2))
        with pytest.raises(ValueError, match="context: expected condition"):
            self.layers[1](torch.zeros(2), torch.zeros(2))


def test_a_changed_context_is_noticed():
    layers = moved(torch.nn.ModuleList(indexed_layers("planar", 2, num_layers=2, context_dim=3)))
    context = torch.randn(5, 3)
    q = IndexedFlow(None, layers, context=context)
    z = q.sample()
    memo = q._memo
    context.add_(1.0)
    assert memo.versions != q._versions(z)


def test_a_guide_that_transforms_its_draws_is_refused():
    """Its draws would be scored from below, and the ELBO of it would be no bound."""

    def model():
        pyro.sample("x", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))

    def guide():
        q = IndexedFlow(None, affine_layers(2, 1, 1, "after"))
        pyro.sample("x", dist.TransformedDistribution(q, [torch.distributions.transforms.ExpTransform()]))

    with pytest.raises(ValueError, match="site 'x': expected IndexedFlow untransformed"):
        fit(model, guide, num_steps=2, progress=False)


def test_chunks_with_a_graph_have_the_same_gradient(monkeypatch):
    layers = affine_layers(2, 1, 2, "after")
    q = IndexedFlow(None, layers)
    z = torch.randn(6, 2)
    values = []
    for limit in (2**16, 50):
        monkeypatch.setattr("pyro_flowvi.distributions.indexed_flow._MAX_ELEMENTS_WITH_GRAPH", limit)
        torch.manual_seed(0)
        bound = q.log_prob_bound(z, 30)
        values.append((bound, torch.autograd.grad(bound.sum(), list(layers.parameters()))))
    torch.testing.assert_close(values[0], values[1])


def test_empty_batches():
    for q in (IndexedFlow(None, indexed_layers("planar", 2)), FlowDistribution(None, Planar(2))):
        assert q.log_prob(torch.zeros(0, 2)).shape == (0,)
        assert q.rsample((0,)).shape == (0, 2)


def test_the_sum_over_a_guide_that_is_written_by_hand():
    """The bound is what Pyro's objective takes from the site; elsewhere the path gradient is refused."""
    layers = affine_layers(2, 1, 2, "after")

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide():
        pyro.module("flow", layers)
        pyro.sample("z", IndexedFlow(None, layers))

    elbo = Trace_ELBO(num_particles=3000, vectorize_particles=True, max_plate_nesting=0)
    torch.manual_seed(0)
    found = -elbo.loss(model, guide)
    with torch.no_grad():
        z, bound = IndexedFlow(None, layers).rsample_and_log_prob((50_000,))
        weights = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - bound
    assert found == pytest.approx(float(weights.mean()), abs=4 * float(weights.std()) / math.sqrt(3000))
    assert LogWeights(model, guide).vectorized
    with pytest.raises(ValueError, match="site 'z': expected a tractable density for path gradients"):
        SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceSTL_ELBO()).step()


def test_flags_copies_and_moves():
    q = IndexedFlow(None, affine_layers(2, 1, 2, "after"))
    assert q.lower_bound
    assert not FlowDistribution(None, Planar(2)).lower_bound
    assert q.has_rsample
    z = torch.randn(3, 2)
    q.rsample((3,))
    for twin in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        values = []
        for one in (q, twin):
            torch.manual_seed(0)
            values.append(one.log_prob(z))
        assert torch.equal(*values)
    assert q.to(torch.float32).sample((2,)).dtype == torch.float32
    assert q.log_prob_bound(z.to(torch.float32), 3).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IndexedFlow(None, Planar(2)), "parts: expected a sequence of layers"),
        (lambda: IndexedFlow("a", indexed_layers("planar", 2)), "base: expected a distribution"),
        (
            lambda: IndexedFlow(None, indexed_layers("planar", 2), context=torch.zeros(3)),
            "context: expected None",
        ),
        (lambda: IndexedLayer(Planar(2), dim=3), "dim: expected 2, as the transform has it, got 3"),
        (
            lambda: IndexedLayer(Conditional(Planar(2), 3), context_dim=2),
            "context_dim: expected 3, as the transform has it, got 2",
        ),
        (lambda: indexed_layers("planar", 2, index_hidden=3), "index_hidden: expected"),
        (lambda: IndexedFlow(None, []), "parts: expected at least one layer"),
        (lambda: IndexedFlow(None, [3]), "parts: expected an IndexedLayer or a Transform, got 3"),
        (
            lambda: IndexedFlow(dist.Normal(0.0, 1.0), indexed_layers("planar", 2)),
            "base: expected event_shape",
        ),
        (
            lambda: IndexedFlow(None, indexed_layers("planar", 2), num_index_samples=0),
            "num_index_samples: expected",
        ),
        (
            lambda: IndexedFlow(None, indexed_layers("planar", 2), num_extra=-1),
            "num_extra: expected an integer of at least 0",
        ),
        (
            lambda: IndexedFlow(None, indexed_layers("planar", 2)).log_prob_bound(torch.zeros(3), 5),
            "value: exp",
        ),
        (
            lambda: IndexedFlow(None, indexed_layers("planar", 2)).rsample_with_bound((), 0),
            "num_index_samples: exp",
        ),
        (lambda: IndexedLayer(torch.nn.Linear(2, 2)), "transform: expected a Transform"),
        (lambda: IndexedLayer(Planar(2), 0), "index_dim: expected a positive integer"),
        (lambda: IndexedLayer(Planar(2), order="both"), "order: expected one of"),
        (lambda: IndexedLayer(FLOWS["planar"](2, context_dim=3)), "context_dim: expected a length"),
        (lambda: IndexedLayer(dist.transforms.ELUTransform()), "dim: expected a positive integer, got None"),
        (
            lambda: IndexedCompose([Planar(2), IndexedLayer(Planar(3))]),
            "expected transforms of one dimension",
        ),
        (lambda: indexed_layers("glow", 2), "flow: expected one of"),
        (lambda: indexed_layers(Planar(2), 2), "flow: expected a key of FLOWS or a callable"),
        (lambda: indexed_layers(Planar, 2, hidden=(3,)), "hidden: expected None with a callable flow"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
