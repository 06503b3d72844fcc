"""The models of ``posteriors.py`` for NumPyro, and the training of two of its guides.

Sites have the same names and supports, so that draws are scored by the same maps; a test compares the log
densities.  Import it only where NumPyro is installed; it turns float64 on.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import torch
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO, autoguide

from benchmarks.common.scoring import FINAL_RATE, LEARNING_RATE, PARTICLES
from pyro_flowvi.psis import psis

numpyro.enable_x64()

CHUNK, CHUNKS = 500, 8
"""Draws for the ELBO: so many times so many."""

GUIDES: dict[str, Callable[[Any], Any]] = {
    "numpyro.AutoBNAFNormal": autoguide.AutoBNAFNormal,
    "numpyro.AutoIAFNormal": autoguide.AutoIAFNormal,
}


def flat(name: str, support: Any, *event_shape: int) -> Any:
    return numpyro.sample(name, dist.ImproperUniform(support, (), event_shape))


def normal_vector(name: str, size: int, scale: float) -> Any:
    return numpyro.sample(name, dist.Normal(0.0, scale).expand([size]).to_event(1))


def eight_schools_centered(y: Any, sigma: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    theta = numpyro.sample("theta", dist.Normal(mu, tau).expand([len(y)]).to_event(1))
    numpyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)


def eight_schools_noncentered(y: Any, sigma: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    theta_trans = normal_vector("theta_trans", len(y), 1.0)
    numpyro.sample("y", dist.Normal(mu + tau * theta_trans, sigma).to_event(1), obs=y)


def garch11(y: Any, sigma1: Any) -> None:
    mu = flat("mu", constraints.real)
    alpha0 = flat("alpha0", constraints.positive)
    parts = numpyro.sample("parts", dist.Dirichlet(jnp.ones(3)))
    news = alpha0 + parts[0] * (y[:-1] - mu) ** 2
    variance, power, lag = jnp.concatenate([sigma1[None] ** 2, news]), parts[1], 1
    while lag < len(y):
        variance = variance + power * jnp.pad(variance[:-lag], (lag, 0))
        power, lag = power * power, 2 * lag
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variance)).to_event(1), obs=y)


def ark(lags: Any, y: Any) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = normal_vector("beta", lags.shape[-1], 10.0)
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma).to_event(1), obs=y)


def low_dim_gauss_mix(y: Any) -> None:
    mu = flat("mu", constraints.ordered_vector, 2)
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(jnp.stack([theta, 1.0 - theta]))
    mixture = dist.MixtureSameFamily(weights, dist.Normal(mu, sigma))
    numpyro.sample("y", mixture.expand([len(y)]).to_event(1), obs=y)


def gp_pois_regr(x: Any, k: Any) -> None:
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    f_tilde = normal_vector("f_tilde", len(x), 1.0)
    kernel = alpha**2 * jnp.exp(-0.5 * ((x[:, None] - x) / rho) ** 2)
    f = jnp.linalg.cholesky(kernel + 1e-10 * jnp.eye(len(x))) @ f_tilde
    numpyro.sample("k", dist.Poisson(jnp.exp(f)).to_event(1), obs=k)


def kidscore_momhsiq(x: Any, y: Any) -> None:
    beta = flat("beta", constraints.real_vector, x.shape[-1])
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(x @ beta, sigma).to_event(1), obs=y)


def blr(x: Any, y: Any) -> None:
    beta = normal_vector("beta", x.shape[-1], 10.0)
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    numpyro.sample("y", dist.Normal(x @ beta, sigma).to_event(1), obs=y)


MODELS = {
    "eight_schools-eight_schools_centered": eight_schools_centered,
    "eight_schools-eight_schools_noncentered": eight_schools_noncentered,
    "garch-garch11": garch11,
    "arK-arK": ark,
    "low_dim_gauss_mix-low_dim_gauss_mix": low_dim_gauss_mix,
    "gp_pois_regr-gp_pois_regr": gp_pois_regr,
    "kidiq-kidscore_momhsiq": kidscore_momhsiq,
    "sblri-blr": blr,
}


def arrays(args: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    """A model's arguments; counts as integers, since NumPyro's Poisson has integers as its support."""
    return tuple(jnp.asarray(arg.numpy()) for arg in args)


def train(guide_name: str, posterior: str, args: tuple[torch.Tensor, ...], steps: int, seed: int) -> Any:
    """The fitted guide as a function from a number of draws to sites, and one that judges it.

    One compiled scan over the steps; the guide is at its defaults, start included.
    """
    model, data = MODELS[posterior], arrays(args)
    guide = GUIDES[guide_name](model)
    decay = FINAL_RATE / LEARNING_RATE

    def rate(step: Any) -> Any:
        return LEARNING_RATE * decay ** (step / steps)

    svi = SVI(model, guide, numpyro.optim.ClippedAdam(rate), Trace_ELBO(PARTICLES))
    params = svi.run(jax.random.PRNGKey(seed), steps, *data, progress_bar=False).params
    return partial(_draw, guide, params), partial(_judge, model, guide, params, data)


def _draw(guide: Any, params: Any, num_draws: int) -> dict[str, torch.Tensor]:
    drawn = guide.sample_posterior(jax.random.PRNGKey(1), params, sample_shape=(num_draws,))
    return {name: torch.from_numpy(np.array(value)) for name, value in drawn.items()}


def _judge(model: Any, guide: Any, params: Any, data: tuple[Any, ...]) -> dict[str, Any]:
    """ELBO and k-hat of fresh draws; there is no verdict for guides of NumPyro."""

    @jax.jit
    def log_weights(key: Any) -> Any:
        keys = jax.random.split(key, CHUNK)
        return jax.vmap(lambda k: -Trace_ELBO().loss(k, params, model, guide, *data))(keys)

    keys = jax.random.split(jax.random.PRNGKey(2), CHUNKS)
    weights = np.concatenate([np.asarray(log_weights(key)) for key in keys])
    if not np.isfinite(weights).all():
        return {"elbo": -math.inf, "elbo_se": math.nan, "khat": math.inf, "verdict": None, "reasons": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        khat = psis(weights)[1]
    error = float(weights.std() / math.sqrt(len(weights)))
    return {
        "elbo": float(weights.mean()),
        "elbo_se": error,
        "khat": khat,
        "verdict": None,
        "reasons": [],
    }
