"""CompiledSVI against Pyro's SVI, step by step: thirty combinations of model, guide, objective and optimizer.

A combination is built twice from one seed and trained for 200 steps, once by each.  Every loss, the final
parameters and the modules' buffers agree to 1e-8.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pyro_flowvi import AutoFlow, AutoPlanar, AutoRadial, CompiledSVI

BLOCKS, BLOCK_STEPS = 4, 50
TOLERANCE = 1e-8


@dataclass
class Setup:
    """One combination, fresh.

    :param args: what every step gets; None where ``batch`` makes ``(args, kwargs)`` for each step.
    :param reference: the stock SVI's optimizer, where it takes another kind of object.
    :param between: called with the optimizer after each block of steps.
    :param module: has buffers to be compared.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    loss: Any
    optim: Any
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    batch: Callable[[int], Any] | None = None
    reference: Any = None
    between: Callable[[Any], Any] | None = None
    module: nn.Module | None = None


BUILDERS: dict[str, Callable[[], Setup]] = {}
QUICK = []


def combination(name, ci=False):
    """Registers a function that builds a combination; the name tells model, guide, objective, optimizer."""

    def register(build):
        assert name not in BUILDERS
        BUILDERS[name] = build
        if ci:
            QUICK.append(name)
        return build

    return register


def together(num_particles, **options):
    return {"num_particles": num_particles, "vectorize_particles": True, "max_plate_nesting": 1, **options}


# The models and their data.

SCHOOLS = (
    torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64),
    torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64),
)


def schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("obs", dist.Normal(theta, sigma), obs=y)


def normals(*shape, seed=7):
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64)


def labelled(rows, seed=7):
    x = normals(rows, 3, seed=seed)
    return x, (x @ torch.tensor([1.0, -2.0, 0.5], dtype=x.dtype) + normals(rows, seed=seed + 1) > 0).to(x)


def logistic(x, y):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=(x * weights).sum(-1) + bias), obs=y)


GROUPED = (torch.arange(24) % 4, normals(24) + torch.arange(24) % 4)


def grouped(group, y):
    centre = pyro.sample("centre", dist.Normal(0.0, 3.0))
    spread = pyro.sample("spread", dist.HalfNormal(2.0))
    with pyro.plate("groups", 4):
        level = pyro.sample("level", dist.Normal(centre, spread))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(level[..., group], noise[..., group]), obs=y)


def local_levels(y):
    """Latents of its own for each row, of which a step sees some."""
    centre = pyro.sample("centre", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y), subsample_size=6) as index:
        level = pyro.sample("level", dist.Normal(centre, 1.0))
        pyro.sample("y", dist.Normal(level, 0.5), obs=y[index])


def constrained(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    scales = pyro.sample("scales", dist.Gamma(2.0, 2.0).expand([3]).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    loc = 3.0 * weights
    with pyro.plate("rows", len(y)):
        tril = scales.unsqueeze(-1) * factor
        pyro.sample("y", dist.MultivariateNormal(loc, scale_tril=tril), obs=y)


CLUSTERS = torch.cat([normals(12) - 2.0, normals(12, seed=8) + 3.0])


@config_enumerate
def mixture(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 5.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(locs[z], scale), obs=y)


def mixture_of_two(y):
    """As above, in a form that takes particles in a batch."""
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    low = pyro.sample("low", dist.Normal(-1.0, 2.0))
    gap = pyro.sample("gap", dist.LogNormal(0.5, 1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(low + gap * z, 1.0), obs=y)


CHAIN = torch.tensor([0.0, 0, 1, 1, 1, 0], dtype=torch.float64)


@config_enumerate
def hidden_chain(sequence):
    with pyro.plate("states", 3):
        moves = pyro.sample("moves", dist.Dirichlet(torch.tensor([2.0, 1.0, 1.0])))
        emits = pyro.sample("emits", dist.Beta(torch.tensor([1.0, 2.0, 3.0]), 2.0))
    x = 0
    for t in pyro.markov(range(len(sequence))):
        x = pyro.sample(f"x_{t}", dist.Categorical(moves[x]))
        pyro.sample(f"y_{t}", dist.Bernoulli(emits[x]), obs=sequence[t])


COUNTS = (normals(15), torch.tensor([1.0, 0, 2, 3, 1, 5, 2, 1, 0, 4, 2, 2, 6, 1, 3], dtype=torch.float64))


def counts(x, y):
    """A Poisson regression with discrete latents of three kinds."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    sources = pyro.sample("sources", dist.Poisson(3.0))
    busy = pyro.sample("busy", dist.Bernoulli(0.5))
    season = pyro.sample("season", dist.OneHotCategorical(torch.ones(3)))
    rate = (0.5 + 0.5 * sources) * (1.0 + busy) * (season * torch.tensor([0.5, 1.0, 1.5])).sum(-1)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson((slope * x).exp() * rate), obs=y)


def counts_guide(x, y):
    slope = pyro.param("slope_loc", torch.tensor(0.0))
    rate = pyro.param("rate", torch.tensor(3.0), constraint=constraints.positive)
    chance = pyro.param("chance", torch.tensor(0.4), constraint=constraints.unit_interval)
    seasons = pyro.param("seasons", torch.ones(3) / 3.0, constraint=constraints.simplex)
    pyro.sample("slope", dist.Normal(slope, 0.1))
    pyro.sample("sources", dist.Poisson(rate))
    pyro.sample("busy", dist.Bernoulli(chance))
    pyro.sample("season", dist.OneHotCategorical(seasons))


def coin(flips):
    fairness = pyro.sample("fairness", dist.Beta(10.0, 10.0))
    with pyro.plate("flips", len(flips)):
        pyro.sample("flip", dist.Bernoulli(fairness), obs=flips)


# The combinations.


@combination("schools-AutoNormal-Trace-Adam", ci=True)
def _():
    return Setup(schools, AutoNormal(schools), Trace_ELBO(), pyro.optim.Adam({"lr": 0.02}), SCHOOLS)


@combination("schools-AutoPlanar-Trace_16_together-ClippedAdam", ci=True)
def _():
    guide = AutoPlanar(schools, num_layers=4, name="guide")
    optim = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.995, "clip_norm": 5.0})
    return Setup(schools, guide, Trace_ELBO(**together(16)), optim, SCHOOLS)


@combination("schools-AutoRadial-Renyi_0.5_together-Adam")
def _():
    guide = AutoRadial(schools, num_layers=4, name="guide")
    loss = RenyiELBO(alpha=0.5, **together(8))
    return Setup(schools, guide, loss, pyro.optim.Adam({"lr": 0.01, "betas": (0.8, 0.99)}), SCHOOLS)


@combination("schools-AutoIAFNormal-Trace-OneCycleLR")
def _():
    """A schedule of the learning rate and of Adam's betas."""
    guide = AutoIAFNormal(schools, hidden_dim=[12], num_transforms=2)
    optim = pyro.optim.OneCycleLR(
        {"optimizer": torch.optim.AdamW, "optim_args": {"lr": 0.001}, "max_lr": 0.005, "total_steps": 10}
    )
    return Setup(schools, guide, Trace_ELBO(), optim, SCHOOLS, between=lambda optim: optim.step())


@combination("schools-AutoNormal-Trace-torch_class")
def _():
    return Setup(
        schools,
        AutoNormal(schools),
        Trace_ELBO(),
        torch.optim.Adam,
        SCHOOLS,
        reference=pyro.optim.Adam({}),
    )


@combination("logistic-AutoDiagonalNormal-Trace-ExponentialLR")
def _():
    """The schedule advances between blocks of steps."""
    optim = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.5}
    )
    guide = AutoDiagonalNormal(logistic)
    return Setup(logistic, guide, Trace_ELBO(), optim, labelled(30), between=lambda optim: optim.step())


@combination("logistic-AutoMultivariateNormal-Trace_3_looped-SGD_momentum")
def _():
    guide = AutoMultivariateNormal(logistic)
    optim = pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9})
    return Setup(logistic, guide, Trace_ELBO(num_particles=3), optim, labelled(30))


@combination("logistic-AutoLowRank-Renyi_0_looped-RMSprop")
def _():
    guide = AutoLowRankMultivariateNormal(logistic, rank=2)
    loss = RenyiELBO(alpha=0.0, num_particles=4)
    return Setup(logistic, guide, loss, pyro.optim.RMSprop({"lr": 0.01}), labelled(30))


@combination("logistic_batches-AutoNormal-MeanField-Adam_weight_decay", ci=True)
def _():
    """Minibatches as arguments, others at every step."""
    x, y = labelled(80)

    def batch(i):
        rows = torch.arange(20) + 20 * (i % 4)
        return (x[rows], y[rows]), {}

    optim = pyro.optim.Adam({"lr": 0.02, "weight_decay": 0.1})
    return Setup(logistic, AutoNormal(logistic), TraceMeanField_ELBO(), optim, batch=batch)


@combination("grouped-AutoGuideList-Trace-Adam_per_parameter")
def _():
    guide = AutoGuideList(grouped)
    guide.append(AutoMultivariateNormal(poutine.block(grouped, expose=["centre", "spread"])))
    guide.append(AutoNormal(poutine.block(grouped, hide=["centre", "spread"])))
    optim = pyro.optim.Adam(lambda name: {"lr": 0.02 if "scale" in name else 0.05})
    return Setup(grouped, guide, Trace_ELBO(), optim, GROUPED)


@combination("grouped-AutoStructured-Trace-AdagradRMSProp")
def _():
    guide = AutoStructured(
        grouped,
        conditionals={"centre": "normal", "spread": "normal", "level": "mvn", "noise": "normal"},
        dependencies={"level": {"centre": "linear"}},
    )
    return Setup(grouped, guide, Trace_ELBO(), pyro.optim.AdagradRMSProp({"eta": 0.1}), GROUPED)


@combination("rows_by_index-handwritten-Trace-clip_norm", ci=True)
def _():
    """The plate's rows are an argument; one of two parameters has a constraint; gradients are clipped."""
    y = normals(40) + 2.0

    def model(index):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y), subsample=index):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[index])

    def guide(index):
        loc = pyro.param("loc_loc", torch.tensor(0.0))
        scale = pyro.param("loc_scale", torch.tensor(0.5), constraint=constraints.interval(0.01, 2.0))
        pyro.sample("loc", dist.Normal(loc, scale))

    optim = pyro.optim.Adam({"lr": 0.02}, {"clip_norm": 10.0})
    return Setup(model, guide, Trace_ELBO(), optim, batch=lambda i: ((torch.arange(8) * 5 + i % 5,), {}))


@combination("subsampled_locals-AutoNormal-MeanField-Adam")
def _():
    guide = AutoNormal(local_levels, create_plates=lambda y: pyro.plate("rows", len(y), subsample_size=6))
    optim = pyro.optim.Adam({"lr": 0.02})
    return Setup(local_levels, guide, TraceMeanField_ELBO(), optim, (normals(24) + 1.0,))


@combination("constrained-AutoDiagonalNormal-Trace_2_looped-ClippedAdam")
def _():
    guide = AutoDiagonalNormal(constrained, init_scale=0.05)
    optim = pyro.optim.ClippedAdam({"lr": 0.01, "weight_decay": 0.01})
    return Setup(constrained, guide, Trace_ELBO(num_particles=2), optim, (normals(20, 3) + 1.0,))


@combination("constrained-AutoFlow_affine_autoregressive-Trace-Adam")
def _():
    guide = AutoFlow(constrained, lambda dim: T.affine_autoregressive(dim, hidden_dims=[16]), name="guide")
    return Setup(constrained, guide, Trace_ELBO(), pyro.optim.Adam({"lr": 0.005}), (normals(20, 3) + 1.0,))


@combination("logistic-AutoFlow_neural_autoregressive-Trace_4_together-AdamW")
def _():
    guide = AutoFlow(logistic, lambda dim: T.neural_autoregressive(dim, hidden_dims=[8]), name="guide")
    optim = pyro.optim.AdamW({"lr": 0.002, "weight_decay": 0.1})
    return Setup(logistic, guide, Trace_ELBO(**together(4)), optim, labelled(30))


@combination("mixture-AutoDelta-TraceEnum-ClippedAdam", ci=True)
def _():
    guide = AutoDelta(poutine.block(mixture, hide=["z"]))
    optim = pyro.optim.ClippedAdam({"lr": 0.02, "clip_norm": 1.0})
    return Setup(mixture, guide, TraceEnum_ELBO(max_plate_nesting=1), optim, (CLUSTERS,))


@combination("mixture-AutoPlanar-TraceEnum_4_together-Adam")
def _():
    guide = AutoPlanar(mixture_of_two, num_layers=2, name="guide")
    return Setup(
        mixture_of_two, guide, TraceEnum_ELBO(**together(4)), pyro.optim.Adam({"lr": 0.01}), (CLUSTERS,)
    )


@combination("mixture-AutoLowRank-differentiable_loss-Adam")
def _():
    """The documented way to make a loss function of one's own out of Pyro's objectives."""
    guide = AutoLowRankMultivariateNormal(poutine.block(mixture, hide=["z"]))
    elbo = TraceEnum_ELBO(max_plate_nesting=1)

    def loss(model, guide, y):
        return elbo.differentiable_loss(model, guide, y) / len(y)

    return Setup(mixture, guide, loss, pyro.optim.Adam({"lr": 0.02}), (CLUSTERS,))


@combination("mixture-guide_enumerated-TraceEnum-Adam")
def _():
    """Every row has a probability of its own, summed over in the guide."""

    @config_enumerate
    def guide(y):
        low = pyro.param("low_loc", torch.tensor(-1.0))
        gap = pyro.param("gap_median", torch.tensor(2.0), constraint=constraints.positive)
        weight = pyro.param("weight_value", torch.tensor(0.4), constraint=constraints.unit_interval)
        share = pyro.param("share", torch.full((len(y),), 0.5), constraint=constraints.unit_interval)
        pyro.sample("weight", dist.Delta(weight))
        pyro.sample("low", dist.Normal(low, 0.1))
        pyro.sample("gap", dist.LogNormal(gap.log(), 0.1))
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Bernoulli(share))

    optim = pyro.optim.Adam({"lr": 0.02})
    return Setup(mixture_of_two, guide, TraceEnum_ELBO(max_plate_nesting=1), optim, (CLUSTERS,))


@combination("chain-AutoNormal-TraceEnum-Adam")
def _():
    guide = AutoNormal(poutine.block(hidden_chain, expose=["moves", "emits"]))
    optim = pyro.optim.Adam({"lr": 0.02})
    return Setup(hidden_chain, guide, TraceEnum_ELBO(max_plate_nesting=1), optim, (CHAIN,))


@combination("vae-amortised-MeanField-Adam")
def _():
    """Networks with batch normalisation and dropout, through pyro.module; other images at every step."""
    images = normals(40, 6)
    encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Linear(8, 4))
    decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 6))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("images", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return Setup(
        model,
        guide,
        TraceMeanField_ELBO(),
        pyro.optim.Adam({"lr": 1e-3}),
        batch=lambda i: ((images[10 * (i % 4) :][:10],), {}),
        module=nn.ModuleList([encoder, decoder]),
    )


@combination("counts-score_function-Trace_2_looped-Adam", ci=True)
def _():
    optim = pyro.optim.Adam({"lr": 0.01})
    return Setup(counts, counts_guide, Trace_ELBO(num_particles=2), optim, COUNTS)


@combination("counts-score_function-Renyi_0.3_looped-AdamW")
def _():
    loss = RenyiELBO(alpha=0.3, num_particles=3)
    optim = pyro.optim.AdamW({"lr": 0.01, "weight_decay": 0.1})
    return Setup(counts, counts_guide, loss, optim, COUNTS)


@combination("coin-Beta-Trace-Adam")
def _():
    """The first guide of Pyro's tutorials: reparameterised through a rejection sampler."""

    def guide(flips):
        alpha = pyro.param("alpha", torch.tensor(15.0), constraint=constraints.positive)
        beta = pyro.param("beta", torch.tensor(15.0), constraint=constraints.positive)
        pyro.sample("fairness", dist.Beta(alpha, beta))

    flips = torch.tensor([1.0] * 6 + [0.0] * 4)
    return Setup(coin, guide, Trace_ELBO(), pyro.optim.Adam({"lr": 0.005, "betas": (0.90, 0.999)}), (flips,))


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 5.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("rows", len(x)):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


@combination("PyroModule-AutoDiagonalNormal-Trace-Adam")
def _():
    x, y = labelled(30)
    model = Regression()
    return Setup(model, AutoDiagonalNormal(model), Trace_ELBO(), pyro.optim.Adam({"lr": 0.03}), (x, y))


class RegressionGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, 3))
        self.scale = PyroParam(torch.full((1, 3), 0.1), constraint=constraints.positive)
        self.bias = PyroParam(torch.zeros(1))
        self.sigma_rate = PyroParam(torch.tensor(1.0), constraint=constraints.positive)
        self.weight = PyroSample(lambda self: dist.Normal(self.loc, self.scale).to_event(2))

    def forward(self, x, y=None):
        pyro.sample("linear.weight", dist.Normal(self.loc, self.scale).to_event(2))
        pyro.sample("linear.bias", dist.Delta(self.bias, event_dim=1))
        pyro.sample("sigma", dist.LogNormal(-self.sigma_rate, 0.1))


@combination("PyroModule-PyroModule-Trace-torch_instance")
def _():
    guide = RegressionGuide()
    return Setup(
        Regression(),
        guide,
        Trace_ELBO(),
        torch.optim.Adam(guide.parameters(), lr=0.02),
        labelled(30),
        reference=pyro.optim.Adam({"lr": 0.02}),
    )


@combination("network-handwritten-Trace-Adam_clip_value")
def _():
    """Weights of a network without a prior, through pyro.module; gradients bounded entry by entry."""
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def model(x, y):
        pyro.module("net", net)
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), noise), obs=y)

    def guide(x, y):
        loc = pyro.param("noise_loc", torch.tensor(0.0))
        scale = pyro.param("noise_scale", torch.tensor(0.1), constraint=constraints.softplus_positive)
        pyro.sample("noise", dist.LogNormal(loc, scale))

    optim = pyro.optim.Adam({"lr": 0.01}, {"clip_value": 0.5})
    return Setup(model, guide, Trace_ELBO(), optim, labelled(30))


@combination("nested_arguments-AutoNormal-own_loss-AdamW_per_parameter")
def _():
    """Tensors in dicts and tuples, numbers and flags by keyword, a loss of the user's own."""

    def model(data, prior=(0.0, 1.0), *, options, offset):
        loc = pyro.sample("loc", dist.Normal(*prior))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0)) if options["learn_scale"] else 1.0
        y, weights = data["y"]
        with pyro.plate("rows", len(y)), poutine.scale(scale=weights):
            pyro.sample("y", dist.Normal(loc + offset, scale), obs=y)

    def loss(model, guide, *args, **kwargs):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        return 0.5 * guide_trace.log_prob_sum() - model_trace.log_prob_sum()

    optim = pyro.optim.AdamW(lambda name: {"lr": 0.02, "weight_decay": 0.1 if "locs" in name else 0.0})
    return Setup(
        model,
        AutoNormal(model),
        loss,
        optim,
        ({"y": (normals(10), torch.linspace(0.5, 1.5, 10))}, (1.0, 2.0)),
        {"options": {"learn_scale": True}, "offset": torch.tensor(0.25)},
    )


@combination("masked_and_scaled-AutoDiagonalNormal-Renyi_2_together-Adam")
def _():
    y = normals(12)

    def model(y, seen):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        scale = pyro.sample("scale", dist.HalfNormal(2.0))
        with pyro.plate("rows", len(y)), poutine.scale(scale=1.5), poutine.mask(mask=seen):
            pyro.sample("y", dist.StudentT(4.0, loc, scale), obs=y)

    guide = AutoDiagonalNormal(model)
    loss = RenyiELBO(alpha=2.0, **together(5))
    return Setup(model, guide, loss, pyro.optim.Adam({"lr": 0.02}), (y, y > -1.0))


# The comparison.


def build(name):
    gc.collect()  # the guide before it gives its name back
    pyro.clear_param_store()
    pyro.set_rng_seed(20)
    return BUILDERS[name]()


def train(svi, setup, run=None):
    """Blocks of steps, of which ``run`` takes every other one where the arguments stay the same."""
    losses = []
    for block in range(BLOCKS):
        if run is not None and setup.batch is None and block % 2 == 0:
            losses += run(BLOCK_STEPS, *setup.args, progress=False, **setup.kwargs).tolist()
        else:
            for i in range(BLOCK_STEPS):
                args, kwargs = setup.batch(i) if setup.batch else (setup.args, setup.kwargs)
                losses.append(svi.step(*args, **kwargs))
        if setup.between is not None:
            setup.between(svi.optim)
    values = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    buffers = dict(setup.module.named_buffers()) if setup.module is not None else {}
    return losses, values | buffers, torch.rand(())


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in BUILDERS]
)
def test_equals_eager(name):
    if torch.get_default_dtype() != torch.float64:
        pytest.skip("compares to 1e-8")
    setup = build(name)
    svi = SVI(setup.model, setup.guide, setup.reference or setup.optim, setup.loss)
    expected_losses, expected_values, expected_draw = train(svi, setup)

    del setup, svi
    setup = build(name)
    svi = CompiledSVI(setup.model, setup.guide, setup.optim, setup.loss, compile=True)
    losses, values, draw = train(svi, setup, svi.run)

    assert svi.compiled
    assert svi.cause is None
    for step, (loss, expected) in enumerate(zip(losses, expected_losses, strict=True)):
        assert abs(loss - expected) <= TOLERANCE * (1.0 + abs(expected)), f"loss of step {step}"
    assert values.keys() == expected_values.keys()
    for key, expected in expected_values.items():
        assert torch.allclose(values[key].to(expected), expected, rtol=TOLERANCE, atol=TOLERANCE), key
    assert draw == expected_draw  # both have drawn as many random numbers
