"""Hierarchical models as users write them, each with its data: what a guide that knows the program is for.

    problem = MODELS["three levels"]()
    guide = AutoRealNVP(problem.model)
    fit(problem.model, guide, *problem.args)
    errors(problem.coordinates(guide.sample_posterior(10_000)), truth(problem))  # of structured_truths.py

The *roots* of a model are the sites whose priors are fixed and that others depend on; they are compared in
the coordinates in which their posteriors are nearly normal: the logarithm of what is positive, the logit of a
fraction, the artanh of the one correlation in a Cholesky factor of 2 x 2.  Of the other sites, the *locals*,
ten elements each are compared as they are.

The data are drawn from fixed seeds; the radon's are posteriordb's, from the folder that the environment
variable PYRO_FLOWVI_POSTERIORDB names.  All is float64: set torch's default dtype.  ``irt`` and ``crossed``
are in the language that Pyro and NumPyro share, where ``p`` and ``dist`` are of either;
``structured_numpyro.py`` has the others that NUTS runs on.
"""

import math
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.common import hierarchies
from benchmarks.common.posteriors import column, decaying_sum, read_data
from benchmarks.common.structured_problem import F64, NUM_LOCALS, Data, Problem, Sites, some

# -- one level of groups -------------------------------------------------------------------------


def eight_schools() -> Problem:
    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("obs", dist.Normal(theta, sigma), obs=y)

    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=F64)
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=F64)
    return Problem("eight schools", model, (y, sigma), {"mu": "", "tau": "log"}, some("theta"))


def groups(size: int, likelihood: str) -> Problem:
    """One observation of each group: "normal" with known noise, "Poisson", or "binomial" of a few trials."""

    def model(y: Tensor, known: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfNormal(2.0))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            if likelihood == "normal":
                pyro.sample("y", dist.Normal(theta, known), obs=y)
            elif likelihood == "Poisson":
                pyro.sample("y", dist.Poisson(theta.exp()), obs=y)
            else:
                pyro.sample("y", dist.Binomial(known, logits=theta), obs=y)

    data = Data(1)
    theta = 1.0 + 0.7 * data.normal(size)
    noise, trials = data.uniform(size) * 1.5 + 0.5, data.integers(1, 9, size).double()
    if likelihood == "normal":
        y = theta + noise * data.normal(size)
    elif likelihood == "Poisson":
        y = torch.poisson(theta.exp(), generator=data.generator)
    else:
        y = torch.binomial(trials, torch.sigmoid(theta), generator=data.generator)
    args = y, noise if likelihood == "normal" else trials
    name = f"{size:,} {likelihood} groups"
    return Problem(name, model, args, {"mu": "", "tau": "log"}, some("theta"))


GROUP_SIZE = 8
SLOPES = {"m": "", "t": "log", "C": "artanh", "sig": "log"}


def slopes_data(num_groups: int) -> tuple[Tensor, Tensor]:
    data = Data(2)
    x = data.normal(num_groups, GROUP_SIZE)
    correlation = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=F64)
    factor = torch.linalg.cholesky(correlation) * torch.tensor([[0.8], [0.5]], dtype=F64)
    b = torch.tensor([1.0, -0.5], dtype=F64) + data.normal(num_groups, 2) @ factor.T
    return x, b[:, :1] + b[:, 1:] * x + data.normal(num_groups, GROUP_SIZE)


def slopes_in_a_plate(num_groups: int = 500) -> Problem:
    """Varying intercepts and slopes, with the rows of a group as an event, in a form that broadcasts."""

    def model(x: Tensor, y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        t = pyro.sample("t", dist.HalfNormal(2.0 * torch.ones(2)).to_event(1))
        factor = pyro.sample("C", dist.LKJCholesky(2, 2.0))
        sig = pyro.sample("sig", dist.HalfNormal(2.0))
        with pyro.plate("groups", len(y)):
            ab = pyro.sample("ab", dist.MultivariateNormal(m, scale_tril=t[..., :, None] * factor))
            mean = ab[..., :1] + ab[..., 1:] * x
            pyro.sample("y", dist.Normal(mean, sig[..., None]).to_event(1), obs=y)

    return Problem("slopes", model, slopes_data(num_groups), SLOPES, some("ab"))


def slopes_by_row(num_groups: int = 500) -> Problem:
    """The same with an index: flat rows, each of which knows its group."""

    def model(group: Tensor, x: Tensor, y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        t = pyro.sample("t", dist.HalfNormal(2.0 * torch.ones(2)).to_event(1))
        factor = pyro.sample("C", dist.LKJCholesky(2, 2.0))
        sig = pyro.sample("sig", dist.HalfNormal(2.0))
        with pyro.plate("groups", num_groups):
            ab = pyro.sample("ab", dist.MultivariateNormal(m, scale_tril=torch.diag(t) @ factor))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(ab[group, 0] + ab[group, 1] * x, sig), obs=y)

    x, y = slopes_data(num_groups)
    group = torch.arange(num_groups).repeat_interleave(GROUP_SIZE)
    return Problem("slopes", model, (group, x.flatten(), y.flatten()), SLOPES, some("ab"))


def radon_slopes() -> Problem:
    folder = os.environ.get("PYRO_FLOWVI_POSTERIORDB")
    if folder is None:
        raise ValueError("expected PYRO_FLOWVI_POSTERIORDB to name a clone of posteriordb, got nothing")
    data = read_data(folder, "radon_mn")
    return radon_slopes_of(data["county_idx"].long() - 1, data["floor_measure"], data["log_radon"])


def radon_slopes_of(county: Tensor, floor: Tensor, y: Tensor) -> Problem:
    """Intercepts and slopes of the floor, for each county."""

    def model(county: Tensor, floor: Tensor, y: Tensor) -> None:
        mu_a = pyro.sample("mu_a", dist.Normal(0.0, 10.0))
        mu_b = pyro.sample("mu_b", dist.Normal(0.0, 10.0))
        tau_a = pyro.sample("tau_a", dist.HalfNormal(1.0))
        tau_b = pyro.sample("tau_b", dist.HalfNormal(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("counties", hierarchies.NUM_COUNTIES):
            a = pyro.sample("a", dist.Normal(mu_a, tau_a))
            b = pyro.sample("b", dist.Normal(mu_b, tau_b))
        with pyro.plate("houses", len(y)):
            pyro.sample("y", dist.Normal(a[county] + b[county] * floor, sigma), obs=y)

    args = county, floor.to(F64), y.to(F64)
    roots = {"mu_a": "", "mu_b": "", "tau_a": "log", "tau_b": "log", "sigma": "log"}
    return Problem("radon slopes", model, args, roots, some("a", "b"))


# -- nested and crossed --------------------------------------------------------------------------


def three_levels(schools: int = 30, classes: int = 10, pupils: int = 5) -> Problem:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ta = pyro.sample("ta", dist.HalfNormal(2.0))
        tb = pyro.sample("tb", dist.HalfNormal(2.0))
        sig = pyro.sample("sig", dist.HalfNormal(2.0))
        with pyro.plate("schools", schools, dim=-1):
            a = pyro.sample("a", dist.Normal(mu, ta))
            with pyro.plate("classes", classes, dim=-2):
                c = pyro.sample("c", dist.Normal(a, tb))
                with pyro.plate("pupils", pupils, dim=-3):
                    pyro.sample("y", dist.Normal(c, sig), obs=y)

    data = Data(3)
    a = 0.8 * data.normal(schools)
    c = a[:, None] + 0.5 * data.normal(schools, classes)
    y = (2.0 + c[..., None] + data.normal(schools, classes, pupils)).permute(2, 1, 0).contiguous()
    roots = {"mu": "", "ta": "log", "tb": "log", "sig": "log"}
    return Problem("three levels", model, (y,), roots, some("a", "c"))


def irt(p: Any, dist: Any, y: Any) -> None:
    persons, items = y.shape
    mb = p.sample("mb", dist.Normal(0.0, 2.0))
    sb = p.sample("sb", dist.HalfNormal(2.0))
    sa = p.sample("sa", dist.HalfNormal(1.0))
    with p.plate("items", items, dim=-1):
        b = p.sample("b", dist.Normal(mb, sb))
        a = p.sample("a", dist.LogNormal(0.0, sa))
    with p.plate("persons", persons, dim=-2):
        theta = p.sample("theta", dist.Normal(0.0, 1.0))
    with p.plate("answers_of_persons", persons, dim=-2), p.plate("answers_to_items", items, dim=-1):
        p.sample("y", dist.Bernoulli(logits=a * (theta - b)), obs=y)


def irt_2pl(persons: int = 300, items: int = 30) -> Problem:
    data = Data(4)
    theta, a, b = data.normal(persons), (0.3 * data.normal(items)).exp(), 0.5 + data.normal(items)
    y = data.coins(a * (theta[:, None] - b))
    roots = {"mb": "", "sb": "log", "sa": "log"}
    return Problem("IRT 2PL", partial(irt, pyro, dist), (y,), roots, some("a", "b", "theta"))


NUM_ROWS, NUM_COLUMNS = 40, 60


def crossed(p: Any, dist: Any, i: Any, j: Any, x: Any, y: Any) -> None:
    mu = p.sample("mu", dist.Normal(0.0, 2.0))
    beta = p.sample("beta", dist.Normal(0.0, 2.0))
    ta = p.sample("ta", dist.HalfNormal(1.0))
    tb = p.sample("tb", dist.HalfNormal(1.0))
    with p.plate("rows", NUM_ROWS):
        a = p.sample("a", dist.Normal(0.0, ta))
    with p.plate("columns", NUM_COLUMNS):
        b = p.sample("b", dist.Normal(0.0, tb))
    with p.plate("observations", len(y)):
        p.sample("y", dist.Bernoulli(logits=mu + beta * x + a[i] + b[j]), obs=y)


def crossed_factors(size: int = 2000) -> Problem:
    """A logistic regression with two random intercepts."""
    data = Data(8)
    a, b = 0.8 * data.normal(NUM_ROWS), 0.5 * data.normal(NUM_COLUMNS)
    i, j, x = data.integers(0, NUM_ROWS, size), data.integers(0, NUM_COLUMNS, size), data.normal(size)
    y = data.coins(-0.5 + 0.7 * x + a[i] + b[j])
    roots = {"mu": "", "beta": "", "ta": "log", "tb": "log"}
    return Problem("crossed factors", partial(crossed, pyro, dist), (i, j, x, y), roots, some("a", "b"))


# -- shrinkage, time and space -------------------------------------------------------------------


def horseshoe(size: int = 200, dim: int = 50) -> Problem:
    """A logistic regression on 50 columns, of which five matter."""

    def model(x: Tensor, y: Tensor) -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(0.1))
        b0 = pyro.sample("b0", dist.Normal(0.0, 2.0))
        with pyro.plate("columns", x.shape[-1]):
            lam = pyro.sample("lam", dist.HalfCauchy(1.0))
            w = pyro.sample("w", dist.Normal(0.0, tau * lam))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=b0 + w @ x.T), obs=y)

    data = Data(6)
    x, w = data.normal(size, dim), torch.zeros(dim, dtype=F64)
    w[:5] = torch.tensor([2.0, -2.0, 1.5, 1.0, -1.0], dtype=F64)
    y = data.coins(x @ w)
    return Problem(
        "horseshoe",
        model,
        (x, y),
        {"tau": "log", "b0": ""},
        lambda sites: {"w": sites["w"][:, :NUM_LOCALS], "log lam": sites["lam"][:, :NUM_LOCALS].log()},
    )


WALK = {"drift": "", "tau": "log", "sigma": "log"}


def walk_in_a_loop(num_steps: int = 500) -> Problem:
    """A random walk with drift, seen through noise, with one site for each step."""
    walk = hierarchies.made_up_walk(num_steps)
    model = partial(walk.model, pyro, dist)
    return Problem("walk", model, (walk.y,), WALK, partial(stacked, "x", num_steps))


def stacked(name: str, size: int, sites: Sites) -> dict[str, Tensor]:
    return {name: torch.stack([sites[f"{name}_{t}"] for t in range(size)], -1)}


def walk_at_once(num_steps: int = 500) -> Problem:
    """The same by its steps, in one site."""

    def model(y: Tensor) -> None:
        drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        x_0 = pyro.sample("x_0", dist.Normal(0.0, 5.0))
        pyro.sample("y_0", dist.Normal(x_0, sigma), obs=y[0])
        with pyro.plate("times", len(y) - 1):
            steps = pyro.sample("steps", dist.Normal(drift, tau))
            pyro.sample("y", dist.Normal(x_0 + steps.cumsum(-1), sigma), obs=y[1:])

    def x(sites: Sites) -> dict[str, Tensor]:
        first = column(sites["x_0"])
        return {"x": torch.cat([first, first + sites["steps"].cumsum(-1)], -1)}

    return Problem("walk", model, (hierarchies.made_up_walk(num_steps).y,), WALK, x)


VOLATILITY = {"mu": "", "phi": "logit", "s": "log"}


@cache
def returns(num_steps: int = 500) -> Tensor:
    data, phi, s, mu = Data(5), 0.95, 0.25, -1.0
    h = [mu + s / math.sqrt(1.0 - phi**2) * data.normal()]
    noise = data.normal(num_steps)
    for t in range(1, num_steps):
        h.append(mu + phi * (h[-1] - mu) + s * noise[t])
    return (torch.stack(h) / 2.0).exp() * data.normal(num_steps)


def volatility_in_a_loop(num_steps: int = 500) -> Problem:
    """Stochastic volatility with one site for each day; the autocorrelation is 2 phi - 1."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        rho = 2.0 * pyro.sample("phi", dist.Beta(20.0, 1.5)) - 1.0
        s = pyro.sample("s", dist.HalfNormal(1.0))
        h = pyro.sample("h_0", dist.Normal(mu, s / (1.0 - rho**2).sqrt()))
        pyro.sample("y_0", dist.Normal(0.0, (h / 2.0).exp()), obs=y[0])
        for t in range(1, len(y)):
            h = pyro.sample(f"h_{t}", dist.Normal(mu + rho * (h - mu), s))
            pyro.sample(f"y_{t}", dist.Normal(0.0, (h / 2.0).exp()), obs=y[t])

    args = (returns(num_steps),)
    return Problem("volatility", model, args, VOLATILITY, partial(stacked, "h", num_steps))


def log_variance(mu: Tensor, rho: Tensor, s: Tensor, noise: Tensor) -> Tensor:
    """The autoregression of ``noise``, ``(*, T)``, which starts in its stationary state."""
    first = noise[..., :1] * column(1.0 / (1.0 - rho**2).sqrt())
    return column(mu) + column(s) * decaying_sum(torch.cat([first, noise[..., 1:]], -1), rho)


def volatility_at_once(num_steps: int = 500) -> Problem:
    """The same by its standard normal shocks, in one site."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        rho = 2.0 * pyro.sample("phi", dist.Beta(20.0, 1.5)) - 1.0
        s = pyro.sample("s", dist.HalfNormal(1.0))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))
        h = log_variance(mu, rho, s, noise)
        pyro.sample("y", dist.Normal(0.0, (h / 2.0).exp()).to_event(1), obs=y)

    def h(sites: Sites) -> dict[str, Tensor]:
        return {"h": log_variance(sites["mu"], 2.0 * sites["phi"] - 1.0, sites["s"], sites["noise"])}

    return Problem("volatility", model, (returns(num_steps),), VOLATILITY, h)


def neighbours(side: int) -> Tensor:
    """The factor of the covariance of an intrinsic autoregression on a square, of geometric mean variance 1.

    Its level is all but fixed to 0, as by a soft constraint on the sum.
    """
    line = torch.diag(torch.ones(side - 1, dtype=F64), 1)
    line, eye = line + line.T, torch.eye(side, dtype=F64)
    adjacent = torch.kron(line, eye) + torch.kron(eye, line)
    covariance = torch.linalg.pinv(torch.diag(adjacent.sum(-1)) - adjacent, hermitian=True)
    covariance = covariance / covariance.diagonal().log().mean().exp()
    factor: Tensor = torch.linalg.cholesky(covariance + 1e-4 * torch.eye(side**2, dtype=F64))
    return factor


def spatial(side: int = 10) -> Problem:
    """Counts in areas on a square, with a spatial part and one of each area's own (Riebler et al., 2016)."""

    def model(factor: Tensor, expected: Tensor, y: Tensor) -> None:
        b0 = pyro.sample("b0", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        rho = pyro.sample("rho", dist.Beta(1.0, 1.0))
        phi = pyro.sample("phi", dist.MultivariateNormal(torch.zeros(len(y)), scale_tril=factor))
        with pyro.plate("areas", len(y)):
            effect = pyro.sample("effect", dist.Normal(sigma * rho.sqrt() * phi, sigma * (1 - rho).sqrt()))
            pyro.sample("y", dist.Poisson(expected * (b0 + effect).exp()), obs=y)

    data, factor, size = Data(7), neighbours(side), side**2
    expected = 5.0 + 20.0 * data.uniform(size)
    effect = 0.5 * (math.sqrt(0.7) * factor @ data.normal(size) + math.sqrt(0.3) * data.normal(size))
    y = torch.poisson(expected * (0.2 + effect).exp(), generator=data.generator)
    roots = {"b0": "", "sigma": "log", "rho": "logit"}
    return Problem("BYM2", model, (factor, expected, y), roots, some("effect", "phi"))


MODELS: dict[str, Callable[[], Problem]] = {
    "eight schools": eight_schools,
    "100 normal groups": partial(groups, 100, "normal"),
    "1,000 normal groups": partial(groups, 1000, "normal"),
    "10,000 normal groups": partial(groups, 10_000, "normal"),
    "2,000 Poisson groups": partial(groups, 2000, "Poisson"),
    "2,000 binomial groups": partial(groups, 2000, "binomial"),
    "slopes in a plate": slopes_in_a_plate,
    "slopes by row": slopes_by_row,
    "three levels": three_levels,
    "horseshoe": horseshoe,
    "IRT 2PL": irt_2pl,
    "radon slopes": radon_slopes,
    "walk in a loop": walk_in_a_loop,
    "walk at once": walk_at_once,
    "volatility in a loop": volatility_in_a_loop,
    "volatility at once": volatility_at_once,
    "BYM2": spatial,
    "crossed factors": crossed_factors,
}
