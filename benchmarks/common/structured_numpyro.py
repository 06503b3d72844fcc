"""NUTS's draws of the models in ``structured_models.py`` whose locals cannot be integrated.

What the models call their sites has the same name here; where the centred form is bad for NUTS, a site is a
function of standard normal noise.  Import it only where NumPyro is installed; it turns float64 on.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import torch
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS

from benchmarks.common import structured_models
from benchmarks.common.posteriors_numpyro import arrays
from benchmarks.common.results import Row
from benchmarks.common.structured_problem import Problem

CHAINS, WARMUP, SAMPLES = 4, 1000, 5000


def standard_normal(name: str, *shape: int) -> Any:
    return numpyro.sample(name, dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))


def horseshoe(x: Any, y: Any) -> None:
    tau = numpyro.sample("tau", dist.HalfCauchy(0.1))
    b0 = numpyro.sample("b0", dist.Normal(0.0, 2.0))
    lam = numpyro.sample("lam", dist.HalfCauchy(1.0).expand([x.shape[-1]]).to_event(1))
    w = numpyro.deterministic("w", tau * lam * standard_normal("noise", x.shape[-1]))
    numpyro.sample("y", dist.Bernoulli(logits=b0 + x @ w).to_event(1), obs=y)


def volatility(y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    rho = 2.0 * numpyro.sample("phi", dist.Beta(20.0, 1.5)) - 1.0
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    noise = standard_normal("noise", len(y))

    def step(state: Any, shock: Any) -> Any:
        state = rho * state + s * shock
        return state, state

    first = s / jnp.sqrt(1.0 - rho**2) * noise[0]
    _, rest = jax.lax.scan(step, first, noise[1:])
    h = mu + jnp.concatenate([first[None], rest])
    numpyro.sample("y", dist.Normal(0.0, jnp.exp(h / 2.0)).to_event(1), obs=y)


def spatial(factor: Any, expected: Any, y: Any) -> None:
    b0 = numpyro.sample("b0", dist.Normal(0.0, 1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    rho = numpyro.sample("rho", dist.Beta(1.0, 1.0))
    phi = numpyro.deterministic("phi", factor @ standard_normal("spatial_noise", len(y)))
    own = standard_normal("noise", len(y))
    effect = numpyro.deterministic("effect", sigma * (jnp.sqrt(rho) * phi + jnp.sqrt(1.0 - rho) * own))
    numpyro.sample("y", dist.Poisson(expected * jnp.exp(b0 + effect)).to_event(1), obs=y)


PROGRAMS: dict[str, Callable[..., None]] = {
    "horseshoe": horseshoe,
    "IRT 2PL": partial(structured_models.irt, numpyro, dist),
    "volatility": volatility,
    "BYM2": spatial,
    "crossed factors": partial(structured_models.crossed, numpyro, dist),
}
ACCEPTANCE = {"horseshoe": 0.98, "volatility": 0.9, "BYM2": 0.95}


def compute(problem: Problem) -> Row:
    """The truth of a problem of :data:`PROGRAMS`, with the worst R-hat and effective sample size."""
    started = time.perf_counter()
    kernel = NUTS(PROGRAMS[problem.truth], target_accept_prob=ACCEPTANCE.get(problem.truth, 0.85))
    mcmc = MCMC(
        kernel,
        num_warmup=WARMUP,
        num_samples=SAMPLES,
        num_chains=CHAINS,
        chain_method="sequential",
        progress_bar=False,
    )
    mcmc.run(jax.random.PRNGKey(0), *arrays(problem.args))
    sites = {name: torch.from_numpy(np.array(values)) for name, values in mcmc.get_samples().items()}
    scalars, rhats, sizes = {}, [], []
    for name, values in problem.coordinates(sites).items():
        chains = values.reshape(CHAINS, -1).numpy()
        scalars[name] = [float(chains.mean()), float(chains.std())]
        rhats.append(float(split_gelman_rubin(chains)))
        sizes.append(float(effective_sample_size(chains)))
    return {
        "how": "NUTS",
        "scalars": scalars,
        "log_z": None,
        "rhat": max(rhats),
        "ess": min(sizes),
        "divergences": int(mcmc.get_extra_fields()["diverging"].sum()),
        "seconds": time.perf_counter() - started,
    }
