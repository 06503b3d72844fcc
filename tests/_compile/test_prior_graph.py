"""Recorded priors against runs of the model, one point at a time."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.poutine.util import site_is_subsample
from torch import nn

from pyro_flowvi import AutoRealNVP
from pyro_flowvi._compile.errors import CannotCompile
from pyro_flowvi._compile.priors import record_priors
from pyro_flowvi._program.packing import Packing
from pyro_flowvi._program.priors import read_priors

NUM_POINTS = 7


def packing_of(model, *args):
    trace = poutine.trace(model).get_trace(*args)
    nodes = {name: trace.nodes[name] for name in trace.stochastic_nodes}
    return Packing(
        {
            name: site
            for name, site in nodes.items()
            if not site_is_subsample(site) and not site["fn"].support.is_discrete
        }
    )


def record(model, *args):
    packing = packing_of(model, *args)
    return packing, record_priors(model, args, {}, packing, 0.1 * torch.randn(packing.dim))


def check(model, *args, known=None, recorded=None):
    """All priors at once, and each of them alone, at points far from where they were recorded."""
    packing, graph = recorded or record(model, *args)
    points = 1.5 * torch.randn(NUM_POINTS, packing.dim)
    values = packing.split(points)
    expected = []
    for point in points:
        expected.append(read_priors(model, args, {}, packing, packing.split(point)))
    sites = list(graph.joint)
    assert set(sites) == (set(expected[0]) if known is None else known)
    for some in (sites, *([site] for site in sites), sites[::-1]):
        needed, run = graph.only(some)
        found = run(*(values[name] for name in needed))
        assert len(found) == len(some)
        for site, (loc, scale) in zip(some, found, strict=True):
            assert graph.joint[site] == expected[0][site].joint
            for part, name in ((loc, "loc"), (scale, "scale")):
                wanted = torch.stack([getattr(each[site], name) for each in expected])
                assert len(part) == (NUM_POINTS if needed else 1)
                torch.testing.assert_close(part.expand(wanted.shape), wanted)
    check_parents(model, args, packing, graph)
    return graph


def check_parents(model, args, packing, graph):
    """A prior moves with the latents that it is said to depend on, and with no others."""
    base = packing.split(0.3 * torch.randn(packing.dim))
    at_base = read_priors(model, args, {}, packing, base)
    for moved in packing.latents:
        there = {**base, moved: base[moved] + 0.7 * torch.rand_like(base[moved]) + 0.1}
        for site, prior in read_priors(model, args, {}, packing, there).items():
            if site in graph.joint:
                pairs = zip(prior[:2], at_base[site][:2], strict=True)
                same = all(torch.equal(there, here) for there, here in pairs)
                assert (moved not in graph.parents[site]) == same, (site, moved)


def schools(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def by_index(group, y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("groups", 3):
        a = pyro.sample("a", dist.Normal(mu[0], mu[1].exp()))
    with pyro.plate("rows", len(y)):
        b = pyro.sample("b", dist.Gamma(a[group].exp(), 2.0))
        pyro.sample("y", dist.Normal(b, 1.0), obs=y)


def loop(y):
    x, rate = 0.0, pyro.sample("rate", dist.LogNormal(0.0, 1.0))
    for t in range(len(y)):
        x = pyro.sample(f"x_{t}", dist.Normal(0.9 * x, rate))
        pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])


def buffer(y):
    """A loop that writes what it draws into one tensor, which the next priors are read from."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    path = torch.zeros(len(y) + 1)
    path[0] = scale
    for t in range(len(y)):
        path[t + 1] = pyro.sample(f"x_{t}", dist.Normal(path[: t + 1].sum(), 1.0))
        path += 0.5 * scale
    pyro.sample("y", dist.Normal(path[1:], 1.0).to_event(1), obs=y)


def nested(y):
    ta = pyro.sample("ta", dist.HalfNormal(1.0))
    with pyro.plate("schools", 3, dim=-1):
        a = pyro.sample("a", dist.Normal(0.0, ta))
        with pyro.plate("classes", 2, dim=-2):
            c = pyro.sample("c", dist.Laplace(a, ta))
            pyro.sample("y", dist.Normal(c, 1.0), obs=y)


def crossed(y):
    s = pyro.sample("s", dist.Uniform(0.1, 3.0))
    with pyro.plate("rows", 3, dim=-2):
        a = pyro.sample("a", dist.StudentT(4.0, 0.0, s))
    with pyro.plate("columns", 2, dim=-1):
        b = pyro.sample("b", dist.Logistic(s, 1.0))
    with pyro.plate("rows_again", 3, dim=-2), pyro.plate("columns_again", 2, dim=-1):
        c = pyro.sample("c", dist.Normal(a + b, s))
        pyro.sample("y", dist.Normal(c, 1.0), obs=y)


def slopes(y):
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    t = pyro.sample("t", dist.HalfNormal(torch.full((2,), 2.0)).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
    with pyro.plate("groups", len(y)):
        ab = pyro.sample("ab", dist.MultivariateNormal(m, scale_tril=t.unsqueeze(-1) * factor))
        pyro.sample("y", dist.Normal(ab.sum(-1), 1.0), obs=y)


def other_priors():
    r = pyro.sample("r", dist.Exponential(2.0))
    with pyro.plate("rows", 2):
        g = pyro.sample("g", dist.InverseGamma(1.0 + r, r))
        e = pyro.sample("e", dist.Exponential(g))
        p = pyro.sample("p", dist.Beta(1.0 + e, g))
        pyro.sample("h", dist.HalfNormal(p))
        pyro.sample("u", dist.Gumbel(p, g))
        steps = [dist.transforms.AffineTransform(p, g), dist.transforms.ExpTransform()]
        pyro.sample("l", dist.TransformedDistribution(dist.Normal(e, 1.0), steps))


def all_for_batches():
    """A model whose own shapes have room for particles, which do not come."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 3, dim=-1):
        a = pyro.sample("a", dist.Normal(mu.unsqueeze(-1)[..., 0], 1.0))
        pyro.sample("b", dist.Normal(a * mu, (a - mu).square() + 0.1))


CASES = {
    "schools": lambda: (schools, torch.randn(4)),
    "by_index": lambda: (by_index, torch.tensor([0, 2, 2, 1, 0]), torch.randn(5)),
    "loop": lambda: (loop, torch.randn(5)),
    "buffer": lambda: (buffer, torch.randn(4)),
    "nested": lambda: (nested, torch.randn(2, 3)),
    "crossed": lambda: (crossed, torch.randn(3, 2)),
    "slopes": lambda: (slopes, torch.randn(3)),
    "other_priors": lambda: (other_priors,),
    "all_for_batches": lambda: (all_for_batches,),
}


@pytest.mark.parametrize("name", CASES)
def test_priors_at_many_points(name):
    check(*CASES[name]())


def test_parents_in_a_buffer():
    _, graph = record(buffer, torch.randn(3))
    assert graph.parents["x_0"] == {"scale"}
    assert graph.parents["x_2"] == {"scale", "x_0", "x_1"}


def test_parents_by_name():
    _, graph = record(slopes, torch.randn(3))
    assert graph.parents == {
        "m": frozenset(),
        "t": frozenset(),
        "ab": frozenset({"m", "t", "factor"}),
    }
    assert graph.joint == {"m": False, "t": False, "ab": True}


class Net(PyroModule):
    """Priors with parameters of three kinds, and a latent of the module itself."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 2)
        self.spread = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)
        self.z = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self):
        w = pyro.param("w", torch.tensor(2.0))
        loc, log_scale = self.net(self.z.reshape(1))
        pyro.sample("x", dist.Normal(loc * w, log_scale.exp()))
        pyro.sample("y", dist.LogNormal(loc, self.spread))


@pytest.mark.parametrize("moved", ["none", "in place", "trained"])
def test_parameters_are_read_live(moved):
    model = Net()
    recorded = record(model)
    if moved == "in place":
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.3)
            pyro.param("w").unconstrained().add_(1.0)
    elif moved == "trained":
        optimizer = torch.optim.SGD([*model.parameters(), pyro.param("w").unconstrained()], lr=0.1)
        (sum(p.square().sum() for p in model.parameters()) + pyro.param("w").square()).backward()
        optimizer.step()
    check(model, recorded=recorded)


def test_gradients_of_latents():
    model = Net()
    needed, run = record(model)[1].only(["x"])
    assert needed == ["z"]
    z = torch.randn(3).requires_grad_()
    ((loc, scale),) = run(z)
    (found,) = torch.autograd.grad((loc.square() + scale).sum(), z)
    slope, log_slope = model.net.weight.detach().squeeze(-1)
    loc, log_scale = model.net(z.detach().unsqueeze(-1)).unbind(-1)
    torch.testing.assert_close(found, 8.0 * loc.detach() * slope + log_scale.detach().exp() * log_slope)


def test_after_a_discrete_latent_priors_are_unknown():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("b", dist.Normal(a, 1.0))
        c = pyro.sample("c", dist.Normal(k, 1.0))
        pyro.sample("d", dist.Normal(c, 1.0))

    _, graph = record(model)
    assert set(graph.joint) == {"a", "b", "d"}
    assert graph.parents["d"] == {"c"}


def test_random_numbers_of_the_program_make_a_prior_unknown():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a + torch.randn(()), 1.0))

    _, graph = record(model)
    assert set(graph.joint) == {"a"}


@pytest.mark.parametrize("how", ["if", "item", "size"])
def test_control_flow_by_a_latent_is_refused(how):
    def model():
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        if how == "if":
            scale = 1.0 if tau > 1 else 2.0
        elif how == "item":
            scale = float(tau)
        else:
            scale = torch.ones(int(tau) + 1).sum()
        pyro.sample("x", dist.Normal(0.0, scale))

    with pytest.raises(CannotCompile):
        record(model)


def test_recording_leaves_the_random_state():
    torch.manual_seed(3)
    expected = torch.rand(4)
    packing = packing_of(schools, torch.zeros(3))
    torch.manual_seed(3)
    record_priors(schools, (torch.zeros(3),), {}, packing, torch.zeros(packing.dim))
    assert torch.equal(torch.rand(4), expected)


def test_recording_leaves_no_param_behind_that_the_model_did_not_make():
    packing = packing_of(schools, torch.zeros(3))
    record_priors(schools, (torch.zeros(3),), {}, packing, torch.zeros(packing.dim))
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize("name", ["schools", "by_index", "buffer", "slopes"])
def test_pickle_and_deepcopy(name):
    model, *args = CASES[name]()
    packing, graph = record(model, *args)
    twin = pickle.loads(pickle.dumps(graph))
    assert twin.parents == graph.parents
    values = packing.split(torch.randn(3, packing.dim))
    for other in (twin, copy.deepcopy(graph), pickle.loads(pickle.dumps(twin))):
        sites = list(graph.joint)
        (needed, run), (again, other_run) = graph.only(sites), other.only(sites)
        assert needed == again
        pairs = zip(run(*(values[n] for n in needed)), other_run(*(values[n] for n in again)), strict=True)
        assert all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))
    check(model, *args, recorded=(packing, twin))


def test_no_known_prior():
    def model():
        pyro.sample("x", dist.Dirichlet(torch.ones(3)))

    _, graph = record(model)
    assert not graph.joint
    assert graph.parents == {}
    assert graph.only([])[0] == []


def test_a_batch_norm_in_training_is_no_known_prior():
    """Each run would count in its statistics, and its rows depend on each other."""
    network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))

    def model(y):
        with pyro.plate("rows", len(y)):
            v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(network(v), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    y = torch.randn(5, 2)
    _, graph = record(model, y)
    assert list(graph.joint) == ["v"]
    guide = AutoRealNVP(model, num_layers=2, hidden=(4,))
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    assert all(torch.tensor(svi.step(y)).isfinite() for _ in range(3))
    network.eval()
    _, graph = record(model, y)
    assert graph.parents["z"] == {"v"}
