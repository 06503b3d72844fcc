"""Pyro models of scvi-tools with a guide of ours in the place of theirs, where scvi-tools is installed."""

import warnings

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO

from pyro_flowvi import AutoRealNVP, fit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own dependencies
    scvi = pytest.importorskip("scvi", exc_type=ImportError)

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]
STEPS = 150


def counts():
    """Of 30 cells and 10 genes: each cell expresses half of them."""
    kind = torch.rand(30) < 0.5
    rates = torch.tensor([[4.0] * 5 + [0.3] * 5, [0.3] * 5 + [4.0] * 5])
    return torch.poisson(rates[kind.long()])


def topics():
    from scvi.module import AmortizedLDAPyroModule

    module = AmortizedLDAPyroModule(n_input=10, n_topics=2, n_hidden=16)
    module.model.n_obs = module.guide.n_obs = 30  # as its training plan does
    x = counts()
    return module, (x, x.sum(1))


def decipher():
    from scvi.external.decipher._module import DecipherPyroModule

    module = DecipherPyroModule(dim_genes=10, dim_v=2, dim_z=3, layers_v_to_z=(8,))
    return module, (counts(),)


def start(build):
    torch.set_default_dtype(torch.float32)  # in which scvi-tools makes its priors
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    module, args = build()
    return module, args, AutoRealNVP(module.model, num_layers=4, hidden=(16,))


def train(module, guide, args):
    svi = SVI(module.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    return torch.tensor([svi.step(*args) for _ in range(STEPS)])


@torch.no_grad()
def elbo(module, guide, args):
    return -torch.tensor([Trace_ELBO().loss(module.model, guide, *args) for _ in range(50)]).mean()


@pytest.mark.parametrize("build", [topics, decipher])
def test_ways(build):
    """The topic model does better than with its own guide; Decipher's ELBO rises.

    Decipher's own encoder is ahead of a flow over all cells after so few steps.
    """
    module, args, guide = start(build)
    guide(*args)
    bar = elbo(module, guide, args)
    losses = train(module, guide, args)
    assert losses.isfinite().all()
    assert elbo(module, guide, args) > bar
    if build is topics:
        module, args, _ = start(build)
        train(module, module.guide, args)
        bar = elbo(module, module.guide, args)
    module, args, guide = start(build)
    fit(
        module.model,
        guide,
        *args,
        num_steps=STEPS if build is topics else 60,
        lr=0.02,
        seed=0,
        progress=False,
    )
    assert elbo(module, guide, args) > bar
    drawn = Predictive(module.model, guide=guide, num_samples=3)(*args)
    assert all(len(value) == 3 for value in drawn.values())


def test_topics_are_found():
    module, args, guide = start(topics)
    fit(module.model, guide, *args, num_steps=STEPS, seed=0, progress=False)
    shares = guide.sample_posterior(200)["log_topic_feature_dist"].softmax(-1)
    half = shares[..., :5].sum(-1).mean(0).sort().values
    assert half[0] < 0.2
    assert half[1] > 0.8


def test_cells_in_minibatches():
    """A network reads the cells of a batch, whose plate has the size of all of them."""
    module, (x, library), _ = start(topics)
    guide = AutoRealNVP(module.model, num_layers=4, hidden=(16,), amortize="auto")
    batches = [(x[i : i + 10], library[i : i + 10]) for i in (0, 10, 20)]
    result = fit(module.model, guide, batches=batches, num_steps=STEPS, seed=0, progress=False)
    assert result.losses[-10:].mean() < result.losses[:10].mean()
    assert guide(*batches[0])["log_cell_topic_dist"].shape == (10, 2)
