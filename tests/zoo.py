"""Models that a guide must serve, each as (model, args)."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints


def far(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1000.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def tiny_scale(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 2e-3), obs=y)


def huge_scale(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1e5))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 2e3), obs=y)


def log_normal(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


def dirichlet(counts):
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("counts", dist.Multinomial(int(counts.sum()), p), obs=counts)


def lkj(y):
    tril = pyro.sample("tril", dist.LKJCholesky(3, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([3]).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample(
            "y", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale.unsqueeze(-1) * tril), obs=y
        )


def ordered(y):
    cuts = pyro.sample("cuts", dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.transforms.OrderedTransform()))  # fmt: skip
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.OrderedLogistic(torch.zeros(()), cuts), obs=y)


def flat(y):
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    sd = pyro.sample("sd", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, sd), obs=y)


def latent_mixture(y):
    parts = dist.Normal(torch.tensor([-2.0, 2.0]), torch.tensor([0.5, 1.0]))
    x = pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def one_dim():
    pyro.sample("x", dist.Gamma(3.0, 2.0))


def hierarchy(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


def nested_plates(y):
    with pyro.plate("outer", 2, dim=-2):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("inner", 3, dim=-1):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)


def subsampled_globals(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y), subsample_size=4) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def enumerated(y):
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(loc[..., 0] * (1 - z) + loc[..., 1] * z, 0.5), obs=y)


def missing(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y.nan_to_num(), obs_mask=~y.isnan())


def not_for_batches(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(mu[0] + mu[1], 1.0).expand(y.shape).to_event(1), obs=y)


def make_zoo():
    """Name -> (model, args); built after the tests' default dtype is set."""
    torch.manual_seed(1)
    return {
        "far": (far, (torch.tensor([99.0, 100.0, 101.5, 99.5]),)),
        "tiny_scale": (tiny_scale, (torch.tensor([0.501, 0.499, 0.5, 0.502]),)),
        "huge_scale": (huge_scale, (torch.tensor([1e3, -3e3, 2e3, 500.0]),)),
        "log_normal": (log_normal, (2 * torch.randn(10),)),
        "dirichlet": (dirichlet, (torch.tensor([3.0, 5.0, 12.0]),)),
        "lkj": (lkj, (torch.randn(20, 3),)),
        "ordered": (ordered, (torch.tensor([0.0, 0, 1, 1, 1, 2, 2, 2, 2]),)),
        "flat": (flat, (3 + 2 * torch.randn(12),)),
        "latent_mixture": (latent_mixture, (torch.tensor(1.5),)),
        "one_dim": (one_dim, ()),
        "hierarchy": (hierarchy, (torch.tensor([1.0, 2.0, 0.5, 1.5]),)),
        "nested_plates": (nested_plates, (torch.randn(2, 3),)),
        "subsampled_globals": (subsampled_globals, (1 + torch.randn(12),)),
        "enumerated": (enumerated, (torch.tensor([-1.5, -1.0, 0.8, 1.2, 1.5]),)),
        "not_for_batches": (not_for_batches, (torch.tensor([1.0, 2.0, 0.5]),)),
        "missing": (missing, (torch.tensor([1.0, float("nan"), 2.0, float("nan")]),)),
    }


NAMES = list(make_zoo())
