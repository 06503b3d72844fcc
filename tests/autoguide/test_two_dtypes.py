"""float32 priors with float64 data, and the reverse: what one dtype gives, whatever is summed out."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_flowvi import AutoCIF, AutoFlowMixture, AutoPlanar, CompiledSVI, diagnose, fit
from pyro_flowvi.infer import TraceEnumSTL_ELBO

SINGLE, DOUBLE = torch.float32, torch.float64
GUIDES = {
    "planar": AutoPlanar,
    "cif": lambda model: AutoCIF(model, num_layers=2, hidden=(4,), index_hidden=(4,), num_extra=1),
    "parallel": lambda model: AutoFlowMixture(model, 2, "planar", 2, enumerate="parallel"),
    "sequential": lambda model: AutoFlowMixture(model, 2, "planar", 2, enumerate="sequential"),
}
MIXTURES = ["parallel", "sequential"]
pytestmark = pytest.mark.filterwarnings("ignore:.*found no sample sites configured for enumeration")


def zeros(dtype, *shape):
    return torch.zeros(shape, dtype=dtype)


class Programs:
    """Latents of one dtype, data of another."""

    def __init__(self, prior, data):
        self.prior, self.data = prior, data
        self.y = torch.linspace(-1.0, 3.0, 6, dtype=data)

    def vector(self, y):
        x = pyro.sample("x", dist.Normal(zeros(self.prior, 2), 1.0).to_event(1))
        with pyro.plate("rows", 6):
            pyro.sample("y", dist.Normal(x[..., 0] + x[..., 1], 1.0), obs=y)

    def scalar(self, y):
        x = pyro.sample("x", dist.Normal(zeros(self.prior), 3.0))
        pyro.sample("y", dist.Normal(x**2, 0.5), obs=y[0])

    def local(self, y):
        mu = pyro.sample("mu", dist.Normal(zeros(self.prior), 1.0))
        with pyro.plate("rows", 6):
            z = pyro.sample("z", dist.Normal(mu, torch.ones((), dtype=self.prior)))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def positive(self, y):
        scale = pyro.sample("scale", dist.HalfNormal(zeros(self.prior) + 1.0))
        share = pyro.sample("share", dist.Dirichlet(zeros(self.prior, 3) + 1.0))
        with pyro.plate("rows", 6):
            pyro.sample("y", dist.Normal(share[..., 0], scale), obs=y)

    def two_priors(self, y):
        x = pyro.sample("x", dist.Normal(zeros(self.prior), 1.0))
        scale = pyro.sample("scale", dist.LogNormal(zeros(self.data), 1.0))
        with pyro.plate("rows", 6):
            pyro.sample("y", dist.Normal(x, scale), obs=y)

    def discrete(self, y):
        weight = pyro.sample("weight", dist.Beta(zeros(self.prior) + 1.0, 2.0))
        loc = pyro.sample("loc", dist.Normal(zeros(self.prior), 1.0))
        with pyro.plate("rows", 6):
            k = pyro.sample("k", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(torch.where(k == 0.0, loc, -loc), 1.0), obs=y)


LONG = pytest.mark.long
KINDS = [kind if kind in ("planar", "parallel") else pytest.param(kind, marks=LONG) for kind in GUIDES]
NAMES = ["vector", "scalar", "local", "positive", "two_priors", "discrete"]


def objectives(kind, name):
    losses = [TraceEnum_ELBO(max_plate_nesting=1), TraceEnumSTL_ELBO(max_plate_nesting=1)]
    if kind != "sequential":
        losses.append(TraceEnum_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1))
    if name != "discrete":
        losses += [Trace_ELBO(), RenyiELBO(num_particles=2)]
        losses += [] if kind in MIXTURES else [infer.TraceGraph_ELBO()]
    return losses


@pytest.fixture(params=[(SINGLE, DOUBLE), (DOUBLE, SINGLE)], ids=["float64 data", "float32 data"])
def programs(request):
    return Programs(*request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_objective(programs, kind, name):
    model = getattr(programs, name)
    for loss in objectives(kind, name):
        guide = GUIDES[kind](model).materialize(programs.y)
        before = {key: value.clone() for key, value in guide.named_parameters()}
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss)
        assert math.isfinite(svi.step(programs.y))
        for key, value in guide.named_parameters():
            assert value.isfinite().all()
            assert value.dtype == before[key].dtype
        assert any(not torch.equal(value, before[key]) for key, value in guide.named_parameters())


@pytest.mark.parametrize("name", ["scalar", "vector", "local"])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_dtype_of_pyros(programs, kind, name):
    model = getattr(programs, name)
    normal = AutoNormal(model)
    theirs = {site: value.dtype for site, value in normal(programs.y).items()}
    guide = GUIDES[kind](model).materialize(programs.y)
    assert {site: value.dtype for site, value in guide(programs.y).items()} == theirs
    assert {site: value.dtype for site, value in guide.sample_posterior(2).items()} == theirs
    draws = Predictive(model, guide=guide, num_samples=3)(programs.y)
    assert {site: draws[site].dtype for site in theirs} == theirs


@pytest.mark.parametrize("name", ["scalar", "local", "discrete"])
@pytest.mark.parametrize("kind", ["planar", *MIXTURES])
def test_loss_and_gradient_are_those_of_one_dtype(kind, name):
    """Of the same guide with everything in float64, at the same draws."""
    mixed, double = Programs(SINGLE, DOUBLE), Programs(DOUBLE, DOUBLE)
    guides = [GUIDES[kind](getattr(each, name)).materialize(each.y) for each in (mixed, double)]
    guides[1].load_state_dict(guides[0].state_dict())
    noise = torch.randn(100, dtype=SINGLE)
    found = []
    for guide, programs in zip(guides, (mixed, double), strict=True):

        def normal(*size, **options):
            shape = torch.Size(size[0] if isinstance(size[0], tuple) else size)
            return noise[: shape.numel()].reshape(shape).to(options.get("dtype") or SINGLE)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", normal)
            loss = TraceEnum_ELBO(max_plate_nesting=1)
            value = loss.loss_and_grads(getattr(programs, name), guide, programs.y)
        found.append((value, [param.grad.double() for param in guide.parameters() if param.grad is not None]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["scalar", pytest.param("discrete", marks=LONG)])
@pytest.mark.parametrize("kind", [pytest.param("planar", marks=LONG), "parallel"])
def test_fit_and_what_follows(programs, kind, name):
    model = getattr(programs, name)
    guide = GUIDES[kind](model)
    fit(model, guide, programs.y, num_steps=8, progress=False)
    assert math.isfinite(diagnose(model, guide, programs.y, num_samples=100, probes=False).elbo)
    draws = guide.sample_posterior(5, resample=True)
    assert guide.log_prob(draws).isfinite().all()


def test_network_in_the_lower_dtype():
    """Latents stay in the dtype of the network where the model runs in that alone."""
    network = nn.Linear(1, 6).to(SINGLE)

    def model(y):
        x = pyro.sample("x", dist.Normal(zeros(SINGLE, 1), 1.0).to_event(1))
        with pyro.plate("rows", 6):
            loc = network(x)
            pyro.sample("y", dist.Normal(loc.squeeze(-2) if loc.dim() > 1 else loc, 1.0), obs=y)

    y = Programs(SINGLE, DOUBLE).y
    for make, loss in (
        (AutoPlanar, TraceEnum_ELBO(max_plate_nesting=1)),
        (AutoPlanar, Trace_ELBO()),
        (GUIDES["parallel"], Trace_ELBO()),
    ):
        guide = make(model)
        assert math.isfinite(SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss).step(y))


@LONG
@pytest.mark.parametrize("name", ["scalar", "discrete"])
def test_compiled(name):
    programs = Programs(SINGLE, DOUBLE)
    model = getattr(programs, name)
    guide = GUIDES["parallel"](model)
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss, compile=True)
    for _ in range(3):
        assert math.isfinite(svi.step(programs.y))
    assert svi.compiled


def test_a_copy_knows_the_dtype():
    programs = Programs(SINGLE, DOUBLE)
    guide = GUIDES["parallel"](programs.local).materialize(programs.y)
    twin = copy.deepcopy(guide)
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    assert math.isfinite(loss.loss(programs.local, twin, programs.y))
    trace = poutine.trace(twin).get_trace(programs.y)
    assert trace.nodes["mu"]["value"].dtype == SINGLE
