"""Programs of hierarchical models of counts, of yes and no, and of times, and their data.

Of :data:`hierarchical_models.KINDS`, which says what ``p``, ``dist``, ``xp`` and ``at`` are.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.common.hierarchical_normal import GROUPS
from benchmarks.common.structured_problem import F64, Data

SITES = 30


def poisson_rates(p: Any, dist: Any, xp: Any, at: Any, site: Any, exposure: Any, y: Any) -> None:
    mu = p.sample("mu", dist.Normal(0.0, 2.0))
    tau = p.sample("tau", dist.HalfNormal(1.0))
    with p.plate("sites", SITES):
        rate = p.sample("rate", dist.LogNormal(mu, tau))
    with p.plate("visits", len(y)):
        p.sample("y", dist.Poisson(exposure * rate[*at, site]), obs=y)


def poisson_data() -> tuple[Tensor, ...]:
    data, size = Data(21), 90
    site, exposure = data.integers(0, SITES, size), 0.5 + 2.0 * data.uniform(size)
    rate = (0.3 + 0.8 * data.normal(SITES)).exp()
    return site, exposure, torch.poisson(exposure * rate[site], generator=data.generator)


def negative_binomial(p: Any, dist: Any, xp: Any, at: Any, site: Any, x: Any, y: Any) -> None:
    mu = p.sample("mu", dist.Normal(0.0, 2.0))
    beta = p.sample("beta", dist.Normal(0.0, 1.0))
    tau = p.sample("tau", dist.HalfNormal(1.0))
    phi = p.sample("phi", dist.Gamma(2.0, 0.5))
    with p.plate("sites", SITES):
        a = p.sample("a", dist.Normal(mu, tau))
    with p.plate("visits", len(y)):
        log_mean = a[*at, site] + beta * x
        p.sample("y", dist.NegativeBinomial(phi, logits=log_mean - xp.log(phi)), obs=y)


def negative_binomial_data() -> tuple[Tensor, ...]:
    data, size = Data(22), 200
    site, x = data.integers(0, SITES, size), data.normal(size)
    mean = (1.0 + 0.6 * data.normal(SITES)[site] + 0.3 * x).exp()
    # A Gamma(2) of mean 1.
    gamma = -0.5 * (data.uniform(size) * data.uniform(size)).log()
    return site, x, torch.poisson(mean * gamma, generator=data.generator)


def baseball(p: Any, dist: Any, xp: Any, at: Any, trials: Any, hits: Any) -> None:
    """Eighteen players' first 45 times at bat (Efron and Morris, 1975)."""
    m = p.sample("m", dist.Uniform(0.0, 1.0))
    kappa = p.sample("log_kappa", dist.Exponential(1.5))
    kappa = xp.exp(kappa)
    with p.plate("players", len(hits)):
        share = p.sample("share", dist.Beta(m * kappa, (1.0 - m) * kappa))
        p.sample("hits", dist.Binomial(trials, probs=share), obs=hits)


def baseball_data() -> tuple[Tensor, ...]:
    hits = [18.0, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7]
    return torch.full((len(hits),), 45.0, dtype=F64), torch.tensor(hits, dtype=F64)


HOSPITALS = 20


def hospitals(p: Any, dist: Any, xp: Any, at: Any, hospital: Any, x: Any, n: Any, y: Any) -> None:
    mu = p.sample("mu", dist.Normal(0.0, 2.0))
    beta = p.sample("beta", dist.Normal(0.0, 1.0))
    tau = p.sample("tau", dist.HalfCauchy(1.0))
    with p.plate("hospitals", HOSPITALS):
        a = p.sample("a", dist.Normal(mu, tau))
    with p.plate("rows", len(y)):
        p.sample("y", dist.Binomial(n, logits=a[*at, hospital] + beta * x), obs=y)


def hospitals_data() -> tuple[Tensor, ...]:
    data = Data(23)
    hospital = torch.arange(HOSPITALS).repeat(3)
    x, n = data.normal(3 * HOSPITALS), data.integers(5, 30, 3 * HOSPITALS).double()
    logits = -1.5 + 0.5 * data.normal(HOSPITALS)[hospital] + 0.3 * x
    return hospital, x, n, torch.binomial(n, torch.sigmoid(logits), generator=data.generator)


def missing_answers(p: Any, dist: Any, xp: Any, at: Any, group: Any, x: Any, y: Any, answered: Any) -> None:
    """A logistic regression with varying intercepts, in which a fifth of the answers are masked."""
    mu = p.sample("mu", dist.Normal(0.0, 2.0))
    beta = p.sample("beta", dist.Normal(0.0, 2.0))
    tau = p.sample("tau", dist.HalfNormal(2.0))
    with p.plate("groups", GROUPS):
        a = p.sample("a", dist.Normal(mu, tau))
    with p.plate("rows", len(y)):
        p.sample("y", dist.Bernoulli(logits=a[*at, group] + beta * x).mask(answered), obs=y)


def missing_data() -> tuple[Tensor, ...]:
    data, size = Data(24), 300
    group, x = data.integers(0, GROUPS, size), data.normal(size)
    y = data.coins(0.4 + data.normal(GROUPS)[group] - 0.8 * x)
    answered = data.uniform(size) > 0.2
    return group, x, y * answered, answered


PERSONS, ITEMS = 40, 8


def irt(p: Any, dist: Any, xp: Any, at: Any, person: Any, item: Any, y: Any) -> None:
    """Two parameters for each item."""
    mb = p.sample("mb", dist.Normal(0.0, 2.0))
    sb = p.sample("sb", dist.HalfNormal(2.0))
    with p.plate("items", ITEMS):
        b = p.sample("b", dist.Normal(mb, sb))
        a = p.sample("a", dist.LogNormal(0.0, 0.5))
    with p.plate("persons", PERSONS):
        theta = p.sample("theta", dist.Normal(0.0, 1.0))
    with p.plate("answers", len(y)):
        logits = a[*at, item] * (theta[*at, person] - b[*at, item])
        p.sample("y", dist.Bernoulli(logits=logits), obs=y)


def irt_data() -> tuple[Tensor, ...]:
    data = Data(25)
    person = torch.arange(PERSONS).repeat_interleave(ITEMS)
    item = torch.arange(ITEMS).repeat(PERSONS)
    theta, a, b = data.normal(PERSONS), (0.3 * data.normal(ITEMS)).exp(), data.normal(ITEMS)
    return person, item, data.coins(a[item] * (theta[person] - b[item]))


LEVELS_OF_POLL = {"state": 20, "age": 5, "school": 4}


def poll(p: Any, dist: Any, xp: Any, at: Any, index: Any, x: Any, y: Any) -> None:
    """A logistic regression with three factors, as those that are followed by poststratification."""
    logits = p.sample("mu", dist.Normal(0.0, 1.5)) + p.sample("beta", dist.Normal(0.0, 1.0)) * x
    for i, (name, size) in enumerate(LEVELS_OF_POLL.items()):
        scale = p.sample(f"t_{name}", dist.HalfNormal(1.0))
        with p.plate(name, size):
            effect = p.sample(f"a_{name}", dist.Normal(0.0, scale))
        logits = logits + effect[*at, index[i]]
    with p.plate("answers", len(y)):
        p.sample("y", dist.Bernoulli(logits=logits), obs=y)


def poll_data() -> tuple[Tensor, ...]:
    data, size, index = Data(26), 300, []
    x, logits = data.normal(size), 0.2
    for levels, scale in zip(LEVELS_OF_POLL.values(), (0.7, 0.4, 0.3), strict=True):
        index.append(data.integers(0, levels, size))
        logits = logits + scale * data.normal(levels)[index[-1]]
    return torch.stack(index), x, data.coins(logits + 0.5 * x)


CENTRES = 20


def frailty(p: Any, dist: Any, xp: Any, at: Any, centre: Any, x: Any, y: Any) -> None:
    """Times to an event, whose hazards have a gamma factor for each centre."""
    b0 = p.sample("b0", dist.Normal(0.0, 2.0))
    b1 = p.sample("b1", dist.Normal(0.0, 1.0))
    k = p.sample("k", dist.Gamma(2.0, 0.5))
    with p.plate("centres", CENTRES):
        u = p.sample("u", dist.Gamma(k, k))
    with p.plate("patients", len(y)):
        p.sample("y", dist.Exponential(u[*at, centre] * xp.exp(b0 + b1 * x)), obs=y)


def frailty_data() -> tuple[Tensor, ...]:
    data, size = Data(27), 160
    centre, x = data.integers(0, CENTRES, size), data.normal(size)
    # A Gamma(2) of mean 1, as the hazards' factor.
    u = -0.5 * (data.uniform(CENTRES) * data.uniform(CENTRES)).log()
    return centre, x, -data.uniform(size).log() / (u[centre] * (-0.5 + 0.4 * x).exp())
