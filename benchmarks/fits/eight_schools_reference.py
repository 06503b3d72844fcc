"""Regenerate the stored reference posterior of the eight-schools model.

A long NUTS run on the *non-centred* form: on the centred one (a funnel) NUTS itself is
biased, since no step size suits both the neck and the mouth.  Draws are mapped back to
``mu``, ``tau`` and ``theta`` and written to ``pyro_flowvi/data/eight_schools_reference.npz``
with the moments of the whole run and a thinned subset for pictures::

    python -m benchmarks.fits.eight_schools_reference [--chains 4] [--draws 5000]

It takes about ten minutes on two cores.
"""

import argparse
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin

from pyro_flowvi.datasets import EIGHT_SCHOOLS

TARGET = Path(__file__).parents[2] / "pyro_flowvi" / "datasets" / "eight_schools_reference.npz"
NUM_STORED = 2000


def noncentred(y: torch.Tensor, sigma: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)


def run(num_chains: int, num_draws: int, num_warmup: int) -> torch.Tensor:
    """Draws of (mu, tau, theta_1 ... theta_8), shape (chains, draws, 10)."""
    y, sigma = (torch.tensor(EIGHT_SCHOOLS[key]) for key in ("y", "sigma"))
    chains = []
    for seed in range(num_chains):
        pyro.set_rng_seed(seed)
        kernel = NUTS(noncentred, target_accept_prob=0.95, jit_compile=True, ignore_jit_warnings=True)
        mcmc = MCMC(kernel, num_samples=num_draws, warmup_steps=num_warmup)
        mcmc.run(y, sigma)
        draws = mcmc.get_samples()
        mu, tau = draws["mu"][:, None], draws["tau"][:, None]
        chains.append(torch.cat([mu, tau, mu + tau * draws["eta"]], -1))
    return torch.stack(chains)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--draws", type=int, default=5000)
    parser.add_argument("--warmup", type=int, default=1000)
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    draws = run(options.chains, options.draws, options.warmup)
    rhat = split_gelman_rubin(draws, chain_dim=0, sample_dim=1)
    ess = effective_sample_size(draws, chain_dim=0, sample_dim=1)
    print(f"worst split R-hat {rhat.max():.4f}, least effective sample size {ess.min():.0f}")
    flat = draws.reshape(-1, draws.shape[-1])
    stride = max(1, len(flat) // NUM_STORED)
    np.savez_compressed(
        TARGET,
        names=np.array(["mu", "tau", *(f"theta[{i}]" for i in range(8))]),
        mean=flat.mean(0).numpy(),
        sd=flat.std(0).numpy(),
        ess=ess.numpy(),
        rhat=rhat.numpy(),
        draws=flat[::stride][:NUM_STORED].numpy().astype(np.float32),
    )
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
