"""Models and data of fits on several processes, and what is compared of them."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO

N = 120


def regression(size=None):
    def model(x, y):
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("n", N, subsample_size=size or len(y)) as rows:
            shown = rows if size else slice(None)
            pyro.sample("y", dist.Bernoulli(logits=(x[shown] * b).sum(-1)), obs=y[shown])

    return model


def points():
    x = torch.linspace(-2.0, 2.0, 2 * N).reshape(2, N).T.sin() + torch.linspace(0.0, 1.0, N)[:, None]
    return x, (x[:, 0] - x[:, 1] + 2.0 * torch.linspace(0.0, 400.0, N).cos() > 0.0).to(x)


def normals_of_rows(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def numbers(guide):
    """All parameters, as they are."""
    return {name: param.detach().clone() for name, param in guide.named_parameters()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def elbo():
    return Trace_ELBO(num_particles=3, vectorize_particles=True)
