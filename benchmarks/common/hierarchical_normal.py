"""Programs of hierarchical models with normal or Student-t data, and their data.

Of :data:`hierarchical_models.KINDS`, which says what ``p``, ``dist``, ``xp`` and ``at`` are.
"""

import os
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import hierarchies
from benchmarks.common.posteriors import read_data
from benchmarks.common.structured_problem import F64, Data


def eight_schools(p: Any, dist: Any, xp: Any, at: Any, y: Any, sigma: Any) -> None:
    mu = p.sample("mu", dist.Normal(0.0, 5.0))
    tau = p.sample("tau", dist.HalfCauchy(5.0))
    with p.plate("schools", len(y)):
        theta = p.sample("theta", dist.Normal(mu, tau))
        p.sample("obs", dist.Normal(theta, sigma), obs=y)


def radon_intercepts(p: Any, dist: Any, xp: Any, at: Any, county: Any, floor: Any, y: Any) -> None:
    hierarchies.radon(p, dist, lambda a, county: a[*at, county], county, floor, y)


def radon_slopes(p: Any, dist: Any, xp: Any, at: Any, county: Any, floor: Any, y: Any) -> None:
    m = p.sample("m", dist.Normal(xp.zeros(2), 10.0).to_event(1))
    t = p.sample("t", dist.HalfNormal(xp.ones(2)).to_event(1))
    factor = p.sample("C", dist.LKJCholesky(2, 2.0))
    sigma = p.sample("sigma", dist.HalfNormal(1.0))
    with p.plate("counties", hierarchies.NUM_COUNTIES):
        ab = p.sample("ab", dist.MultivariateNormal(m, scale_tril=t[..., :, None] * factor))
    with p.plate("houses", len(y)):
        p.sample("y", dist.Normal(ab[*at, county, 0] + ab[*at, county, 1] * floor, sigma), obs=y)


def radon_data() -> tuple[Tensor, ...]:
    folder = os.environ.get("PYRO_FLOWVI_POSTERIORDB")
    if folder is None:
        raise ValueError("expected PYRO_FLOWVI_POSTERIORDB to name a clone of posteriordb, got nothing")
    data = read_data(folder, "radon_mn")
    return data["county_idx"].long() - 1, data["floor_measure"].to(F64), data["log_radon"].to(F64)


RATS = 30


def growth_curves(p: Any, dist: Any, xp: Any, at: Any, rat: Any, days: Any, y: Any) -> None:
    m = p.sample("m", dist.Normal(xp.asarray([250.0, 5.0]), xp.asarray([50.0, 5.0])).to_event(1))
    t = p.sample("t", dist.HalfNormal(xp.asarray([30.0, 3.0])).to_event(1))
    factor = p.sample("C", dist.LKJCholesky(2, 1.0))
    sigma = p.sample("sigma", dist.HalfNormal(20.0))
    with p.plate("rats", RATS):
        ab = p.sample("ab", dist.MultivariateNormal(m, scale_tril=t[..., :, None] * factor))
    with p.plate("weighings", len(y)):
        p.sample("y", dist.Normal(ab[*at, rat, 0] + ab[*at, rat, 1] * days, sigma), obs=y)


def growth_data() -> tuple[Tensor, ...]:
    data, days = Data(11), torch.tensor([-14.0, -7.0, 0.0, 7.0, 14.0], dtype=F64)
    z = data.normal(RATS, 2)
    a, b = 242.0 + 14.0 * z[:, :1], 6.2 + 0.5 * (0.6 * z[:, :1] + 0.8 * z[:, 1:])
    y = a + b * days + 6.0 * data.normal(RATS, 5)
    return torch.arange(RATS).repeat_interleave(5), days.repeat(RATS), y.flatten()


SCHOOLS, CLASSES, PUPILS = 12, 48, 240


def three_levels(p: Any, dist: Any, xp: Any, at: Any, school: Any, room: Any, x: Any, y: Any) -> None:
    """``school`` is that of each class, ``room`` the class of each pupil."""
    mu = p.sample("mu", dist.Normal(0.0, 5.0))
    beta = p.sample("beta", dist.Normal(0.0, 1.0))
    ts = p.sample("ts", dist.HalfNormal(2.0))
    tc = p.sample("tc", dist.HalfNormal(2.0))
    sigma = p.sample("sigma", dist.HalfNormal(2.0))
    with p.plate("schools", SCHOOLS):
        s = p.sample("s", dist.Normal(mu, ts))
    with p.plate("classes", CLASSES):
        c = p.sample("c", dist.Normal(s[*at, school], tc))
    with p.plate("pupils", PUPILS):
        p.sample("y", dist.Normal(c[*at, room] + beta * x, sigma), obs=y)


def three_levels_data() -> tuple[Tensor, ...]:
    data = Data(12)
    school = torch.arange(SCHOOLS).repeat_interleave(CLASSES // SCHOOLS)
    room, x = data.integers(0, CLASSES, PUPILS), data.normal(PUPILS)
    c = 1.0 + 1.2 * data.normal(SCHOOLS)[school] + 0.8 * data.normal(CLASSES)
    return school, room, x, c[room] + 0.4 * x + data.normal(PUPILS)


RATERS, ESSAYS = 12, 30


def raters(p: Any, dist: Any, xp: Any, at: Any, rater: Any, essay: Any, y: Any) -> None:
    """Two crossed factors."""
    mu = p.sample("mu", dist.Normal(5.0, 5.0))
    tr = p.sample("tr", dist.HalfNormal(2.0))
    te = p.sample("te", dist.HalfNormal(2.0))
    sigma = p.sample("sigma", dist.HalfNormal(2.0))
    with p.plate("raters", RATERS):
        r = p.sample("r", dist.Normal(0.0, tr))
    with p.plate("essays", ESSAYS):
        e = p.sample("e", dist.Normal(mu, te))
    with p.plate("marks", len(y)):
        p.sample("y", dist.Normal(e[*at, essay] + r[*at, rater], sigma), obs=y)


def raters_data() -> tuple[Tensor, ...]:
    data, size = Data(13), 200
    rater, essay = data.integers(0, RATERS, size), data.integers(0, ESSAYS, size)
    y = 6.0 + 0.5 * data.normal(RATERS)[rater] + data.normal(ESSAYS)[essay] + 0.8 * data.normal(size)
    return rater, essay, y


STUDIES = 20


def meta_analysis(p: Any, dist: Any, xp: Any, at: Any, x: Any, study: Any, se: Any, y: Any) -> None:
    """A regression of the studies' effects, of which there are one to three estimates each."""
    alpha = p.sample("alpha", dist.Normal(0.0, 1.0))
    beta = p.sample("beta", dist.Normal(0.0, 1.0))
    tau = p.sample("tau", dist.HalfCauchy(0.5))
    with p.plate("studies", STUDIES):
        theta = p.sample("theta", dist.Normal(alpha + beta * x, tau))
    with p.plate("estimates", len(y)):
        p.sample("y", dist.Normal(theta[*at, study], se), obs=y)


def meta_data() -> tuple[Tensor, ...]:
    data = Data(14)
    x, counts = data.normal(STUDIES), data.integers(1, 4, STUDIES)
    study = torch.arange(STUDIES).repeat_interleave(counts)
    se = 0.1 + 0.3 * data.uniform(len(study))
    theta = 0.3 - 0.2 * x + 0.2 * data.normal(STUDIES)
    return x, study, se, theta[study] + se * data.normal(len(study))


GROUPS, EACH = 25, 8


def student_groups(p: Any, dist: Any, xp: Any, at: Any, group: Any, y: Any) -> None:
    mu = p.sample("mu", dist.Normal(0.0, 5.0))
    tau = p.sample("tau", dist.HalfNormal(2.0))
    sigma = p.sample("sigma", dist.HalfNormal(2.0))
    nu = p.sample("nu", dist.Gamma(2.0, 0.1))
    with p.plate("groups", GROUPS):
        a = p.sample("a", dist.Normal(mu, tau))
    with p.plate("rows", len(y)):
        p.sample("y", dist.StudentT(nu, a[*at, group], sigma), obs=y)


def student_data() -> tuple[Tensor, ...]:
    data = Data(15)
    noise = data.normal(EACH, GROUPS * EACH)
    t = noise[0] / (noise[1:5].square().mean(0)).sqrt()
    group = torch.arange(GROUPS).repeat_interleave(EACH)
    return group, 1.0 + 0.6 * data.normal(GROUPS)[group] + t


def unequal_spreads(p: Any, dist: Any, xp: Any, at: Any, group: Any, y: Any) -> None:
    """Means and standard deviations of groups."""
    mu = p.sample("mu", dist.Normal(0.0, 5.0))
    tau = p.sample("tau", dist.HalfNormal(2.0))
    ms = p.sample("ms", dist.Normal(0.0, 1.0))
    ts = p.sample("ts", dist.HalfNormal(1.0))
    with p.plate("groups", GROUPS):
        a = p.sample("a", dist.Normal(mu, tau))
        s = p.sample("s", dist.LogNormal(ms, ts))
    with p.plate("rows", len(y)):
        p.sample("y", dist.Normal(a[*at, group], s[*at, group]), obs=y)


def spreads_data() -> tuple[Tensor, ...]:
    data, group = Data(16), torch.arange(GROUPS).repeat_interleave(EACH)
    a, s = 2.0 + data.normal(GROUPS), (-0.3 + 0.5 * data.normal(GROUPS)).exp()
    return group, a[group] + s[group] * data.normal(len(group))


UNITS, TIMES = 15, 16


def autoregressions(p: Any, dist: Any, xp: Any, at: Any, unit: Any, lag: Any, y: Any) -> None:
    mc = p.sample("mc", dist.Normal(0.0, 2.0))
    tc = p.sample("tc", dist.HalfNormal(1.0))
    mr = p.sample("mr", dist.Normal(0.0, 1.0))
    tr = p.sample("tr", dist.HalfNormal(0.5))
    sigma = p.sample("sigma", dist.HalfNormal(1.0))
    with p.plate("units", UNITS):
        c = p.sample("c", dist.Normal(mc, tc))
        r = p.sample("r", dist.Normal(mr, tr))
    with p.plate("rows", len(y)):
        p.sample("y", dist.Normal(c[*at, unit] + r[*at, unit] * lag, sigma), obs=y)


def autoregressions_data() -> tuple[Tensor, ...]:
    data = Data(17)
    c, r, noise = 0.5 + 0.4 * data.normal(UNITS), 0.4 + 0.2 * data.normal(UNITS), data.normal(TIMES, UNITS)
    y = [c / (1.0 - r)]
    for step in noise:
        y.append(c + r * y[-1] + 0.7 * step)
    series = torch.stack(y, -1)
    unit = torch.arange(UNITS).repeat_interleave(TIMES)
    return unit, series[:, :-1].flatten(), series[:, 1:].flatten()


def local_level(p: Any, dist: Any, xp: Any, at: Any, y: Any) -> None:
    hierarchies.walk(p, dist, y)


def horseshoe(p: Any, dist: Any, xp: Any, at: Any, x: Any, y: Any) -> None:
    tau = p.sample("tau", dist.HalfCauchy(0.2))
    sigma = p.sample("sigma", dist.HalfNormal(1.0))
    with p.plate("columns", x.shape[-1]):
        lam = p.sample("lam", dist.HalfCauchy(1.0))
        w = p.sample("w", dist.Normal(0.0, tau * lam))
    mean = w @ x.T if at else x @ w
    with p.plate("rows", len(y)):
        p.sample("y", dist.Normal(mean, sigma), obs=y)


def horseshoe_data() -> tuple[Tensor, ...]:
    data, w = Data(18), torch.zeros(20, dtype=F64)
    w[:4] = torch.tensor([1.5, -1.0, 0.7, 0.4], dtype=F64)
    x = data.normal(80, 20)
    return x, x @ w + data.normal(80)
