"""Models whose latents have priors that depend on others, each as (model, args)."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine


def schools(y, noise):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, noise), obs=y)


def slopes(x, y):
    """Intercept and slope of each group, with a correlation."""
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    t = pyro.sample("t", dist.HalfNormal(torch.full((2,), 2.0)).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
    with pyro.plate("groups", x.shape[-1], dim=-1):
        ab = pyro.sample("ab", dist.MultivariateNormal(m, scale_tril=t.unsqueeze(-1) * factor))
        mean = ab[..., :1] + ab[..., 1:] * x.T
        pyro.sample("y", dist.Normal(mean, 0.7).to_event(1), obs=y.T)


def three_levels(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    ta = pyro.sample("ta", dist.HalfNormal(2.0))
    tb = pyro.sample("tb", dist.HalfNormal(2.0))
    with pyro.plate("schools", y.shape[-1], dim=-1):
        a = pyro.sample("a", dist.Normal(mu, ta))
        with pyro.plate("classes", y.shape[-2], dim=-2):
            c = pyro.sample("c", dist.Normal(a, tb))
            with pyro.plate("pupils", y.shape[-3], dim=-3):
                pyro.sample("y", dist.Normal(c, 1.0), obs=y)


def crossed(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    ta = pyro.sample("ta", dist.HalfNormal(1.0))
    tb = pyro.sample("tb", dist.LogNormal(0.0, 0.5))
    rows, columns = pyro.plate("rows", y.shape[0], dim=-2), pyro.plate("columns", y.shape[1], dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(mu, ta))
    with columns:
        b = pyro.sample("b", dist.Laplace(0.0, tb))
    with rows, columns:
        pyro.sample("y", dist.Poisson((a + b).clamp(max=8.0).exp()), obs=y)


def loop(y):
    rho = pyro.sample("rho", dist.Uniform(-1.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    x = pyro.sample("x_0", dist.Normal(0.0, 1.0))
    pyro.sample("y_0", dist.Normal(x, 0.5), obs=y[0])
    for t in range(1, len(y)):
        x = pyro.sample(f"x_{t}", dist.Normal(rho * x, s))
        pyro.sample(f"y_{t}", dist.Normal(x, 0.5), obs=y[t])


def counties(county, y):
    """Effects of counties, picked by an index."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.Exponential(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("counties", 9):
        a = pyro.sample("a", dist.Normal(mu, tau))
    with pyro.plate("houses", len(y)):
        pyro.sample("y", dist.Normal(a[..., county], sigma), obs=y)


def padded(y, mask):
    """Sequences of several lengths, padded to one: a scale for each element, and its mean."""
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(y), dim=-2), pyro.plate("time", y.shape[1], dim=-1), poutine.mask(mask=mask):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        z = pyro.sample("z", dist.Normal(0.0, s))
        pyro.sample("y", dist.Normal(z, scale), obs=y)


def padded_vectors(y, mask):
    t = pyro.sample("t", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(y), dim=-1), poutine.mask(mask=mask):
        scale = t[..., None, None] * torch.tensor([[1.0, 0.0], [0.5, 2.0]])
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=scale))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)


def scale_without_prior(y):
    """The scale of the groups is a parameter of the model."""
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, scale))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def topics(y):
    """Weights that are no roots, since they are too many, and have no known prior."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((len(y),), 2.0)))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(weights.log(), tau.unsqueeze(-1)))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def rates(y):
    """Scales by priors that are no normals, of a shape that depends on a parent and may be huge."""
    k = pyro.sample("k", dist.LogNormal(3.0, 2.0))
    b = pyro.sample("b", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(y)):
        rate = pyro.sample("rate", dist.Gamma(k, b))
        share = pyro.sample("share", dist.Beta(1.0 + rate, k))
        pyro.sample("y", dist.Normal(share, 0.3), obs=y)


def make_hierarchies():
    """Name -> (model, args); built after the tests' default dtype is set."""
    generator = torch.Generator("cpu").manual_seed(3)

    def normals(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(torch.get_default_dtype())

    mask = torch.arange(4) < torch.tensor([[2], [4], [1]])
    rows = torch.tensor([True, False, True, True, False])
    return {
        "schools": (schools, (5.0 + 4.0 * normals(6), 1.0 + normals(6).square())),
        "slopes": (slopes, (normals(5, 4), 1.0 + normals(5, 4))),
        "three_levels": (three_levels, (2.0 + normals(3, 2, 4),)),
        "crossed": (crossed, (torch.poisson(normals(3, 4).exp(), generator=generator),)),
        "loop": (loop, (normals(9).cumsum(0),)),
        "counties": (counties, (torch.arange(25) ** 2 % 9, normals(25) + 1.0)),
        "padded": (padded, (normals(3, 4), mask)),
        "padded_vectors": (padded_vectors, (normals(5), rows)),
        "topics": (topics, (normals(70) - 3.0,)),
        "rates": (rates, (normals(4).sigmoid(),)),
    }


NAMES = list(make_hierarchies())
SWEEP = [
    name
    if name in ("schools", "slopes", "loop", "padded", "topics")
    else pytest.param(name, marks=pytest.mark.long)
    for name in NAMES
]
"""All of them for a test, of which every change runs some."""
