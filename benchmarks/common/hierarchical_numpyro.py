"""NUTS's posteriors of the kinds in ``hierarchical_models.py``, which are what their fits are compared with.

Two are known exactly (``hierarchies.py``): of these, independent draws.  The programs are Pyro's; only the
parametrisation is NUTS's own (``LocScaleReparam``).  Import it only where NumPyro is installed; it turns
float64 on.
"""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import torch
from arviz_stats.base import array_stats
from numpyro.handlers import reparam
from numpyro.infer import MCMC, NUTS
from numpyro.infer.reparam import LocScaleReparam, Reparam

from benchmarks.common.hierarchical_models import Kind
from benchmarks.common.posteriors_numpyro import arrays
from benchmarks.common.results import Row

CHAINS, WARMUP, SAMPLES = 4, 2000, 2000
NUM_EXACT = 40_000


def program(kind: Kind) -> Any:
    """The kind's model, before it is given the parametrisation that NUTS has."""
    return partial(kind.program, numpyro, dist, jnp, ())


class MultivariateNoise(Reparam):
    """What ``LocScaleReparam(0.0)`` is for normal sites, for multivariate normal ones."""

    def __call__(self, name: str, fn: Any, obs: Any) -> Any:
        prior, shape, _ = self._unwrap(fn)
        noise = numpyro.sample(
            f"{name}_noise", dist.Normal(0.0, 1.0).expand((*shape, *prior.event_shape)).to_event(1)
        )
        return None, prior.loc + (prior.scale_tril @ noise[..., None])[..., 0]


def compute(kind: Kind) -> Row:
    """By scalar the mean, the standard deviation and their Monte Carlo errors; the worst R-hat and ESS.

    R-hat is the rank-normalised one, and the effective sample size that of the bulk (Vehtari et al., 2021).
    """
    started = time.perf_counter()
    problem = kind.problem("broadcasting")
    sites, divergences = independent(kind) if kind.exact is not None else by_nuts(kind, problem.args)
    scalars, rhats, sizes = {}, [], []
    for name, values in problem.coordinates(sites).items():
        chains = values.reshape(CHAINS, -1).numpy()
        errors = (array_stats.mcse(chains, method=method) for method in ("mean", "sd"))
        scalars[name] = [round(float(value), 6) for value in (chains.mean(), chains.std(), *errors)]
        rhats.append(float(array_stats.rhat(chains, method="rank")))
        sizes.append(float(array_stats.ess(chains, method="bulk")))
    return {
        "how": "NUTS" if kind.exact is None else "independent draws",
        "scalars": scalars,
        "rhat": round(max(rhats), 5),
        "ess": round(min(sizes), 1),
        "divergences": divergences,
        "seconds": round(time.perf_counter() - started, 1),
    }


def by_nuts(kind: Kind, args: tuple[torch.Tensor, ...]) -> tuple[dict[str, torch.Tensor], int]:
    """Draws of the sites, chain after chain, and the number of divergences."""
    noise = MultivariateNoise() if "C" in kind.roots else LocScaleReparam(0.0)
    model = reparam(program(kind), config=dict.fromkeys(kind.noncentred, noise))
    mcmc = MCMC(
        NUTS(model, target_accept_prob=kind.acceptance, dense_mass=kind.dense),
        num_warmup=WARMUP,
        num_samples=SAMPLES,
        num_chains=CHAINS,
        chain_method="sequential",
        progress_bar=False,
    )
    mcmc.run(jax.random.PRNGKey(0), *arrays(args))
    sites = {name: torch.from_numpy(np.array(values)) for name, values in mcmc.get_samples().items()}
    return sites, int(mcmc.get_extra_fields()["diverging"].sum())


def independent(kind: Kind) -> tuple[dict[str, torch.Tensor], int]:
    assert kind.exact is not None
    drawn = {name: torch.from_numpy(values) for name, values in kind.exact().exact(NUM_EXACT).items()}
    vectors = {name.partition("[")[0] for name in drawn if "[" in name}
    sites = {name: values for name, values in drawn.items() if "[" not in name}
    for site in vectors:
        parts = [values for name, values in drawn.items() if name.startswith(f"{site}[")]
        sites[site] = torch.stack(parts, -1)
    # Draws come grid point after grid point, which chains would show.
    order = torch.from_numpy(np.random.default_rng(0).permutation(NUM_EXACT))
    return {name: values[order] for name, values in sites.items()}, 0
