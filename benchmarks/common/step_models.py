"""Models of which steps are timed, in the language that Pyro and NumPyro share."""

from typing import Any

import numpy as np
import pyro
from pyro.ops.indexing import Vindex


def eight_schools(p: Any, dist: Any, y: Any, sigma: Any) -> None:
    """``p`` and ``dist`` are those of either, as in all models here."""
    mu = p.sample("mu", dist.Normal(0.0, 5.0))
    tau = p.sample("tau", dist.HalfCauchy(5.0))
    with p.plate("schools", len(y)):
        theta = p.sample("theta", dist.Normal(mu, tau))
        p.sample("obs", dist.Normal(theta, sigma), obs=y)


def logistic(p: Any, dist: Any, x: Any, y: Any) -> None:
    w = p.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
    w = w.squeeze(-2) if w.ndim > 1 else w  # Pyro's particles keep a dimension for the plate
    with p.plate("data", len(y)):
        p.sample("y", dist.Bernoulli(logits=w @ x.T), obs=y)


def hierarchical(p: Any, dist: Any, y: Any) -> None:
    mu = p.sample("mu", dist.Normal(0.0, 5.0))
    tau = p.sample("tau", dist.HalfNormal(2.0))
    sigma = p.sample("sigma", dist.HalfNormal(2.0))
    with p.plate("groups", y.shape[-1], dim=-1):
        theta = p.sample("theta", dist.Normal(mu, tau))
        with p.plate("members", y.shape[-2], dim=-2):
            p.sample("y", dist.Normal(theta, sigma), obs=y)


def mixture(p: Any, dist: Any, y: Any, concentration: Any) -> None:
    weights = p.sample("weights", dist.Dirichlet(concentration))
    locs = p.sample("locs", dist.Normal(0.0, 5.0).expand([3]).to_event(1))
    scale = p.sample("scale", dist.HalfNormal(2.0))
    with p.plate("data", len(y)):
        if p is pyro:
            z = p.sample("z", dist.Categorical(weights))
            p.sample("y", dist.Normal(Vindex(locs)[..., z], scale), obs=y)
        else:
            marginal = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, scale))
            p.sample("y", marginal, obs=y)


def arrays(model: str) -> list[np.ndarray]:
    """The arguments of a model."""
    rng = np.random.default_rng(0)
    if model == "eight schools":
        data = [[28, 8, -3, 7, -1, 1, 18, 12], [15, 10, 16, 11, 9, 11, 10, 18]]
    elif model == "hierarchical":
        data = [1.0 + rng.normal(size=1000) + 0.5 * rng.normal(size=(10, 1000))]
    elif model == "mixture":
        data = [rng.choice([-4.0, 0.0, 5.0], size=1000) + rng.normal(size=1000), np.ones(3)]
    else:
        x, w = rng.normal(size=(MODELS[model][2], MODELS[model][1])), rng.normal(size=MODELS[model][1])
        data = [x, rng.uniform(size=len(x)) < 1.0 / (1.0 + np.exp(-0.5 * x @ w))]
    return [np.asarray(values, dtype=np.float32) for values in data]


MODELS = {  # with the size of the unconstrained space and the number of observations
    "eight schools": (eight_schools, 10, 8),
    "logistic 1,000 x 20": (logistic, 20, 1000),
    "logistic 100,000 x 50": (logistic, 50, 100_000),
    "hierarchical": (hierarchical, 1003, 10_000),
    "mixture": (mixture, 6, 1000),
}
