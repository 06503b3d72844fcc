"""Hierarchies of Pyro's examples: schools, baseball, recaptured animals."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from pyro_flowvi import AutoNeuralSpline

from .case import Case, Problem, summed

HITS = [18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7]
"""Of 45 at bats each: Efron and Morris, 1975."""


def schools():
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model(sigma, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(25.0))
        with pyro.plate("schools", len(sigma)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    # Truth: mu in closed form given tau, which is summed over a grid.
    tau = torch.linspace(1e-3, 150.0, 6000)
    var = sigma.square() + tau.square().unsqueeze(-1)
    precision = (1 / var).sum(-1) + 0.01
    mean = (y / var).sum(-1) / precision
    log_p = dist.Normal(0.0, var.sqrt()).log_prob(y).sum(-1) + 0.5 * mean.square() * precision
    log_p += -0.5 * precision.log() + dist.HalfCauchy(25.0).log_prob(tau)
    mu = log_p.softmax(0) @ mean

    def check(draws):
        assert abs(draws["mu"].mean() - mu) < 0.8  # a fifth of its standard deviation

    return Problem(model, (sigma, y), check)


def records():
    return torch.full((18,), 45.0), torch.tensor(HITS).to(torch.get_default_dtype())


def pooled():
    """Truth: a Beta posterior."""

    def model(at_bats, hits=None):
        phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
        with pyro.plate("players", len(at_bats)):
            pyro.sample("hits", dist.Binomial(at_bats, phi), obs=hits)

    exact = dist.Beta(1.0 + sum(HITS), 1.0 + 18 * 45 - sum(HITS))

    def check(draws):
        assert abs(draws["phi"].mean() - exact.mean) < 0.1 * exact.variance.sqrt()
        assert abs(draws["phi"].std() / exact.variance.sqrt() - 1) < 0.1

    return Problem(model, records(), check)


def apart():
    """Truth: a Beta posterior for each player."""

    def model(at_bats, hits=None):
        with pyro.plate("players", len(at_bats)):
            phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
            pyro.sample("hits", dist.Binomial(at_bats, phi), obs=hits)

    at_bats, hits = records()
    exact = dist.Beta(1.0 + hits, 1.0 + at_bats - hits)

    def check(draws):
        assert ((draws["phi"].mean(0) - exact.mean).abs() < 0.2 * exact.variance.sqrt()).all()

    return Problem(model, (at_bats, hits), check)


def by_pareto():
    def model(at_bats, hits=None):
        m = pyro.sample("m", dist.Uniform(0.0, 1.0))
        kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
        with pyro.plate("players", len(at_bats)):
            phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
            pyro.sample("hits", dist.Binomial(at_bats, phi), obs=hits)

    def check(draws):
        assert abs(draws["m"].mean() - sum(HITS) / (18 * 45)) < 0.02

    return Problem(model, records(), check)


def by_logits():
    def model(at_bats, hits=None):
        loc = pyro.sample("loc", dist.Normal(-1.0, 1.0))
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("players", len(at_bats)):
            alpha = pyro.sample("alpha", dist.Normal(loc, scale))
            pyro.sample("hits", dist.Binomial(at_bats, logits=alpha), obs=hits)

    return Problem(model, records())


def animals(num=30, periods=4, survival=0.7, recapture=0.8):
    """Who was seen when; each is marked when it is first seen."""
    alive, marked, seen = torch.ones(num), torch.zeros(num).bool(), []
    for _ in range(periods):
        alive = torch.where(marked, alive * (torch.rand(num) < survival), alive)
        now = torch.where(marked, alive * (torch.rand(num) < recapture), (torch.rand(num) < 0.5).to(alive))
        marked = marked | now.bool()
        seen.append(now)
    return torch.stack(seen, -1)


def likelihood(history, phi, rho):
    """Of a grid of both probabilities, by the two states of each animal."""
    total = torch.zeros_like(phi)
    for row in history:
        alive, dead, marked = torch.ones_like(phi), torch.zeros_like(phi), False
        for y in row:
            if marked:
                alive, dead = (
                    alive * phi * (rho if y else 1 - rho),
                    (0 if y else 1) * (dead + alive * (1 - phi)),
                )
            marked = marked or bool(y)
        total = total + (alive + dead).log()
    return total


def recapture():
    """Truth: quadrature over both probabilities."""

    def model(history):
        num, periods = history.shape
        phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
        rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
        with pyro.plate("animals", num, dim=-1):
            z, marked = torch.ones(num), torch.zeros(num).bool()
            for t in pyro.markov(range(periods)):
                with poutine.mask(mask=marked):
                    stays = marked.to(phi) * phi * z + (1 - marked.to(phi))
                    z = pyro.sample(f"z_{t}", dist.Bernoulli(stays), infer={"enumerate": "parallel"})
                    pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=history[:, t])
                marked = marked | history[:, t].bool()

    history = animals()
    axis = torch.linspace(0.005, 0.995, 100)
    phi, rho = torch.meshgrid(axis, axis, indexing="ij")
    share = likelihood(history, phi, rho).flatten().softmax(0)

    def check(draws):
        assert abs(draws["phi"].mean() - share @ phi.flatten()) < 0.01
        assert abs(draws["rho"].mean() - share @ rho.flatten()) < 0.01

    return Problem(model, (history,), check)


def recapture_by_time():
    """A survival probability for each period, as a random effect."""

    def model(history):
        num, periods = history.shape
        mean = pyro.sample("phi_mean", dist.Uniform(0.0, 1.0))
        sigma = pyro.sample("phi_sigma", dist.Uniform(0.0, 10.0))
        rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
        z, marked = torch.ones(num), torch.zeros(num).bool()
        plate = pyro.plate("animals", num, dim=-1)
        for t in pyro.markov(range(periods)):
            logit = pyro.sample(f"phi_{t}", dist.Normal(mean.logit(), sigma)) if t else torch.zeros(())
            with plate, poutine.mask(mask=marked):
                stays = marked.to(rho) * logit.sigmoid() * z + (1 - marked.to(rho))
                z = pyro.sample(f"z_{t}", dist.Bernoulli(stays), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=history[:, t])
            marked = marked | history[:, t].bool()

    return Problem(model, (animals(),))


CASES = [
    Case("schools", "`eight_schools`, not centred", schools),
    Case(
        "pooled",
        "`baseball`, one probability",
        pooled,
        partial(AutoNeuralSpline, num_layers=2, hidden=(8,)),
        "`AutoNeuralSpline`",
    ),
    Case("apart", "`baseball`, a probability for each", apart),
    Case("by_pareto", "`baseball`, Beta of Uniform and Pareto", by_pareto),
    Case("by_logits", "`baseball`, logits", by_logits),
    Case("recapture", "`capture_recapture/cjs`, model 1", recapture, loss=summed(1)),
    Case(
        "recapture_by_time",
        "`capture_recapture/cjs`, model 3",
        recapture_by_time,
        loss=summed(1),
        slow=True,
    ),
]
