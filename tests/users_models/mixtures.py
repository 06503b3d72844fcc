"""Mixtures of Pyro's tutorials and examples, whose discrete latents are summed out."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.autoname import scope
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex
from torch.nn.functional import pad

from pyro_flowvi import AutoFlowMixture

from .case import Case, Problem, summed

POINTS = (0.0, 1.0, 10.0, 11.0, 12.0)


@config_enumerate
def clusters(data):
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        which = pyro.sample("which", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[which], scale), obs=data)


def at_the_clusters(draws, site="locs"):
    """Two groups of points, whose means are told to about half a unit; labels are exchangeable."""
    locs = draws[site].sort(-1).values.median(0).values
    assert torch.allclose(locs, torch.tensor([0.5, 11.0]), atol=0.5)


def gmm():
    return Problem(clusters, (torch.tensor(POINTS),), at_the_clusters)


def scoped():
    @config_enumerate
    def model(data):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with scope(prefix="part"):
            loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        with pyro.plate("data", len(data)):
            which = pyro.sample("which", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(Vindex(loc)[..., which], 1.0), obs=data)

    return Problem(model, (torch.tensor(POINTS),), partial(at_the_clusters, site="part/loc"))


def three_coins():
    """Truth of the first: a Beta posterior, as it is seen."""

    @config_enumerate
    def model(a, c):
        p_a = pyro.sample("p_a", dist.Beta(1.0, 1.0))
        p_b = pyro.sample("p_b", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
        p_c = pyro.sample("p_c", dist.Beta(torch.ones(2), torch.ones(2)).to_event(1))
        with pyro.plate("data", len(a)):
            pyro.sample("a", dist.Bernoulli(p_a.expand(len(a))), obs=a)
            b = pyro.sample("b", dist.Bernoulli(Vindex(p_b)[a.long()]))
            pyro.sample("c", dist.Bernoulli(Vindex(p_c)[b.long()]), obs=c)

    a = torch.bernoulli(torch.full((100,), 0.4))
    b = torch.bernoulli(torch.where(a > 0, 0.9, 0.1))
    exact = dist.Beta(1 + a.sum(), 1 + 100 - a.sum())

    def check(draws):
        assert abs(draws["p_a"].mean() - exact.mean) < 0.3 * exact.variance.sqrt()

    return Problem(model, (a, torch.bernoulli(torch.where(b > 0, 0.8, 0.1))), check)


def topics(batch_size=None):
    """Two topics, each with half of the words; every document is of one of them."""
    docs, length, words = 12, 10, 8

    def model(data):
        with pyro.plate("topics", 2):
            weights = pyro.sample("topic_weights", dist.Gamma(0.5, 1.0))
            over_words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(words) / words))
        with pyro.plate("documents", docs, batch_size) as rows:
            own = pyro.sample("doc_topics", dist.Dirichlet(weights))
            with pyro.plate("words", length):
                topic = pyro.sample("word_topics", dist.Categorical(own), infer={"enumerate": "parallel"})
                pyro.sample("doc_words", dist.Categorical(over_words[topic]), obs=data[:, rows])

    first = torch.rand(docs) < 0.5
    data = torch.where(first, torch.randint(0, 4, (length, docs)), torch.randint(4, 8, (length, docs)))

    def check(draws):
        half = draws["topic_words"].mean(0)[:, :4].sum(-1).sort().values
        assert half[0] < 0.15
        assert half[1] > 0.85

    return Problem(model, (data,), None if batch_size else check)


def sticks():
    """A Dirichlet process by five broken sticks, on two groups."""

    @config_enumerate
    def model(data):
        alpha = pyro.sample("alpha", dist.Gamma(2.0, 1.0))
        with pyro.plate("sticks", 4):
            beta = pyro.sample("beta", dist.Beta(1.0, alpha))
        with pyro.plate("parts", 5):
            mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(2), 5 * torch.eye(2)))
        weights = pad(beta, (0, 1), value=1.0) * pad((1 - beta).cumprod(-1), (1, 0), value=1.0)
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("obs", dist.MultivariateNormal(mu[z], torch.eye(2)), obs=data)

    return Problem(model, (torch.cat([torch.randn(12, 2) - 3.0, torch.randn(12, 2) + 3.0]),))


CASES = [
    Case("gmm", "Gaussian mixture", gmm, loss=summed(1)),
    Case(
        "gmm_by_modes",
        "Gaussian mixture",
        gmm,
        partial(AutoFlowMixture, num_components=2, num_layers=2, hidden=(8,)),
        "`AutoFlowMixture`",
        loss=summed(1),
        slow=True,
        remark="both orders of the labels",
    ),
    Case("scoped", "`contrib/autoname`: names with a scope", scoped, loss=summed(1)),
    Case("three_coins", "`toy_mixture_model_discrete_enumeration`", three_coins, loss=summed(1)),
    Case("topics", "`lda`, all documents", topics, loss=summed(2)),
    Case(
        "topics_in_parts",
        "`lda`, documents in minibatches",
        partial(topics, 6),
        loss=summed(2),
        svi_steps=400,
        slow=True,
        remark="messages in tables, by the plate's indices",
    ),
    Case("sticks", "Dirichlet process mixture", sticks, loss=summed(1), slow=True),
]
