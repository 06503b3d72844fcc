"""Models with latents under a subsampled plate, and what is known of their posteriors."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine


def normals(y, rows=None, size=None, num=None):
    """A Normal latent for each row.  Rows are drawn, ``size`` of them, or given with their data."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("n", num or len(y), subsample_size=size, subsample=rows) as shown:
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y if rows is not None and len(y) == len(rows) else y[shown])


def data(num=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 1.0 + 1.2 * torch.randn(num, generator=generator, dtype=torch.float64).to(
        torch.get_default_dtype()
    )


def batches(y, size, seed=0):
    """Data and index of an epoch's batches, the last one shorter where it does not come out even."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return [(y[rows], rows) for rows in order.split(size)]


def given(num):
    """The model whose batches come with their index."""

    def model(y, rows):
        normals(y, rows, num=num)

    return model


def grid_moments(y):
    """Means and standard deviations of mu and tau, and log Z, by quadrature over both."""
    mu = torch.linspace(float(y.mean()) - 1.5, float(y.mean()) + 1.5, 801, dtype=torch.float64)
    tau = torch.linspace(0.2, 3.2, 801, dtype=torch.float64)
    sd = (tau.square() + 0.25).sqrt()
    n, mean, square = len(y), y.double().mean(), y.double().var(correction=0)
    log_p = (
        dist.Normal(0.0, 5.0).log_prob(mu)[:, None]
        + dist.HalfNormal(2.0).log_prob(tau)
        - n * (sd.log() + 0.5 * torch.log(torch.tensor(2.0 * torch.pi, dtype=torch.float64)))
        - 0.5 * n * (square + (mean - mu[:, None]).square()) / sd.square()
    )
    top = log_p.max()
    weight = (log_p - top).exp()
    total = weight.sum()
    log_z = float(top + (total * (mu[1] - mu[0]) * (tau[1] - tau[0])).log())
    moments = {}
    for name, at, marginal in (("mu", mu, weight.sum(1)), ("tau", tau, weight.sum(0))):
        first = (marginal * at).sum() / total
        moments[name] = float(first), float(((marginal * (at - first).square()).sum() / total).sqrt())
    return moments, log_z


def slopes(y, size):
    """Intercept and slope of each row, with a correlation."""
    x = torch.linspace(-1.0, 1.0, y.shape[-1])
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(torch.ones(2)).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
    with pyro.plate("n", len(y), subsample_size=size) as rows:
        b = pyro.sample("b", dist.MultivariateNormal(m, scale_tril=sd.unsqueeze(-1) * factor))
        pyro.sample("y", dist.Normal(b[..., :1] + b[..., 1:] * x, 1.0).to_event(1), obs=y[rows])


def counts(y, size):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 2.0)), pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("n", len(y), subsample_size=size) as rows:
        z = pyro.sample("z", dist.Normal(mu, tau))
        pyro.sample("y", dist.Poisson(z.exp()), obs=y[rows])


def two_sites(y, size):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("n", len(y), subsample_size=size) as rows:
        z = pyro.sample("z", dist.Normal(mu, tau))
        w = pyro.sample("w", dist.Normal(0.5 * z, 1.0))
        pyro.sample("y", dist.Normal(z + w, 0.5), obs=y[rows])


def positive(y, size):
    a = pyro.sample("a", dist.Gamma(2.0, 2.0))
    with pyro.plate("n", len(y), subsample_size=size) as rows:
        z = pyro.sample("z", dist.LogNormal(a, 0.5))
        g = pyro.sample("g", dist.Gamma(1.0 + a, 1.0))
        pyro.sample("y", dist.Normal(z - g, 0.5), obs=y[rows])


def nested(y, size, dim=-2):
    """Rows of the outer plate, each with all columns of the inner one."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("n", len(y), subsample_size=size, dim=dim) as rows:
        z = pyro.sample("z", dist.Normal(mu, tau))
        with pyro.plate("k", y.shape[1], dim=-3 - dim):
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("y", dist.Normal(w, 0.5), obs=y[rows] if dim == -2 else y[rows].mT)


def inner_rows(y, size):
    """Full columns outside, each with a scale of its own, and rows inside."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("k", y.shape[1], dim=-2):
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("n", len(y), subsample_size=size, dim=-1) as rows:
            w = pyro.sample("w", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(w, 0.5), obs=y[rows].mT)


def vectors(y, size):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(y.shape[1]), 5.0).to_event(1))
    with pyro.plate("n", len(y), subsample_size=size) as rows:
        w = pyro.sample("w", dist.Normal(mu, 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w, 0.5).to_event(1), obs=y[rows])


def by_group(y, size):
    """Does not broadcast over particles."""
    group = torch.arange(len(y)) % 3
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("n", len(y), subsample_size=size) as rows:
        z = pyro.sample("z", dist.Normal(mu[group[rows]], tau))
        mean = torch.zeros(len(rows))
        mean[:] = z
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y[rows])


def alone(y, size):
    """No latents outside of the plate."""
    with pyro.plate("n", len(y), subsample_size=size) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[rows])


X = torch.randn(40, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def many_roots(y, size):
    x = X.to(y)
    b = pyro.sample("b", dist.Normal(torch.zeros(50), 1.0).to_event(1))
    with pyro.plate("n", len(y), subsample_size=size) as rows:
        z = pyro.sample("z", dist.Normal((x[rows] @ b.unsqueeze(-1)).squeeze(-1), 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[rows])


def grouped(y, size):
    """Rows whose columns are masked at random."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("n", len(y), subsample_size=size, dim=-2) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        with pyro.plate("k", y.shape[1], dim=-1), poutine.mask(mask=y[rows] > 0.0):
            pyro.sample("y", dist.Normal(z, 0.5), obs=y[rows])


def table(num=40, columns=3):
    generator = torch.Generator().manual_seed(2)
    whole = torch.randn(num, 1, generator=generator) + torch.randn(num, columns, generator=generator)
    return whole.to(torch.get_default_dtype()) + 0.5


MODELS = {
    "normals": (lambda y, size: normals(y, None, size), data),
    "counts": (counts, lambda: data().exp().round().clamp(max=20.0)),
    "slopes": (slopes, table),
    "two sites": (two_sites, data),
    "positive": (positive, data),
    "nested": (nested, table),
    "nested inwards": (lambda y, size: nested(y, size, -1), table),
    "inner rows": (inner_rows, table),
    "vectors": (vectors, table),
    "by group": (by_group, data),
    "alone": (alone, data),
    "many roots": (many_roots, data),
    "masked": (grouped, table),
}
