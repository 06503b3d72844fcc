"""Ten million rows on disk, 100,000 groups with a latent each, and the exact posterior beside the fit.

    python -m benchmarks.scale.ten_million [--groups 100000] [--data FILE]
        [--output benchmarks/results/scale.jsonl]
    torchrun --nproc-per-node 2 -m benchmarks.scale.ten_million

100 observations of each group, y ~ N(theta, 2), theta ~ N(mu, 1), mu ~ N(0, 10), in float32 in a file that is
mapped into memory; the model reads the rows of the groups that its plate draws.  Everything else is float64.
The guide is ``AutoRealNVP`` and ``fit`` is called at its defaults.

Seconds are those of ``fit``, by the clock and of this process.  *Rows a second* are the rows of the data set
by the clock's seconds; *rows of steps* are those that the training steps of all ranks read, steps x groups a
step x 100 x ranks, which leaves out the passes of the start and of the comparisons.  Memory is the peak of
each process's resident set, imports included, at the end of the fit.

The posterior is normal, and known from the groups' sums in float64.  Errors are those of the means of
``--draws`` draws, in standard deviations of the posterior; *by chance* is what as many exact draws would
have, which for the worst of 100,000 groups is not little.

With several processes rank 0 writes the data, which the others wait for, and the results.
"""

import argparse
import math
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_flowvi
from benchmarks.common.results import append, results_of

EACH = 100
"""Observations of a group."""
NOISE, SPREAD, WIDE = 2.0, 1.0, 10.0
"""Standard deviations of y given theta, of theta given mu, and of mu."""
TRUE_MU, DATA_SEED = 1.0, 20
PART = 1000
"""Groups that are written, summed and drawn at once."""
MEBIBYTES = 1536.0
"""What a process may take."""
PATIENCE = 600.0
"""Seconds for which the other ranks wait for the data."""


# -- the data, and what is known of their posterior ----------------------------------------------


def write(path: Path, groups: int) -> None:
    """The rows of all groups; the file is there when it is complete."""
    part = path.with_name(f"{path.name}.part")
    rows = np.memmap(part, np.float32, "w+", shape=(groups, EACH))
    for start in range(0, groups, PART):
        generator = np.random.default_rng([DATA_SEED, start])
        count = min(PART, groups - start)
        theta = TRUE_MU + SPREAD * generator.standard_normal((count, 1))
        rows[start : start + count] = theta + NOISE * generator.standard_normal((count, EACH))
    rows.flush()
    part.replace(path)


def mapped(path: Path, groups: int) -> Tensor:
    """The rows of the file, ``(groups, EACH)``, of which memory holds what has been read.

    :raises ValueError: if the file has another size.
    """
    expected = 4 * groups * EACH
    if path.stat().st_size != expected:
        raise ValueError(f"{path}: expected {expected} bytes, got {path.stat().st_size}")
    return torch.from_numpy(np.memmap(path, np.float32, "c", shape=(groups, EACH)))


@dataclass(frozen=True)
class Posterior:
    """Means and standard deviations, of the groups ``(G,)``."""

    mu_mean: float
    mu_sd: float
    theta_mean: Tensor
    theta_sd: float


def exact(y: Tensor) -> Posterior:
    """In closed form: mu given the groups' averages, and theta given mu, whose mean is linear in mu."""
    means = torch.cat([part.double().mean(-1) for part in y.split(PART)])
    own = SPREAD**2 + NOISE**2 / EACH
    variance = 1.0 / (1.0 / WIDE**2 + len(means) / own)
    mu = variance * float(means.sum()) / own
    precision = 1.0 / SPREAD**2 + EACH / NOISE**2
    pull = 1.0 / (SPREAD**2 * precision)
    return Posterior(
        mu_mean=mu,
        mu_sd=math.sqrt(variance),
        theta_mean=pull * mu + (1.0 - pull) * means,
        theta_sd=math.sqrt(1.0 / precision + pull**2 * variance),
    )


# -- the fit -------------------------------------------------------------------------------------


def model(y: Tensor, shown: int) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, WIDE))
    with pyro.plate("groups", len(y), subsample_size=shown) as rows:
        theta = pyro.sample("theta", dist.Normal(mu, SPREAD))
        mean = theta[..., None].expand(*theta.shape, y.shape[-1])
        pyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=y[rows].double())


@torch.no_grad()
def errors(guide: Any, truth: Posterior, draws: int) -> dict[str, float]:
    """Of mu, and the worst of all groups' theta, with what exact draws would have."""
    mu = guide.sample_posterior(draws, sites=["mu"])["mu"]
    off, ratios = [], []
    for start in range(0, len(truth.theta_mean), PART // 2):
        means = truth.theta_mean[start : start + PART // 2]
        rows = range(start, start + len(means))
        theta = guide.sample_posterior(draws, sites=["theta"], rows=rows)["theta"]
        off.append((theta.mean(0) - means) / truth.theta_sd)
        ratios.append(theta.std(0) / truth.theta_sd)
    each, ratio = torch.cat(off), torch.cat(ratios)
    # The largest of 2 G standard normals is about sqrt(2 log 2G).
    farthest = math.sqrt(2.0 * math.log(2 * len(each)))
    return {
        "mu_mean": abs(float(mu.mean()) - truth.mu_mean) / truth.mu_sd,
        "mu_sd_ratio": float(mu.std()) / truth.mu_sd,
        "theta_worst_mean": float(each.abs().max()),
        "theta_rms_mean": float(each.square().mean().sqrt()),
        "theta_sd_low": float(ratio.min()),
        "theta_sd_high": float(ratio.max()),
        "mean_by_chance": 1.0 / math.sqrt(draws),
        "worst_mean_by_chance": farthest / math.sqrt(draws),
        "worst_sd_by_chance": farthest / math.sqrt(2.0 * draws),
    }


def peak() -> float:
    """MiB of this process, at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def peaks() -> list[float]:
    """The same of all ranks."""
    ranks = torch.distributed
    if not (ranks.is_available() and ranks.is_initialized()):
        return [peak()]
    found: list[Any] = [None] * ranks.get_world_size()
    ranks.all_gather_object(found, peak())
    return found


def awaited(path: Path, rank: int, groups: int) -> Tensor:
    """The data, which rank 0 writes where they are not there yet.

    :raises TimeoutError: if nobody writes them.
    """
    if rank == 0 and not path.exists():
        write(path, groups)
    until = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"{path}: expected rank 0 to write the data within {PATIENCE:.0f} s")
        time.sleep(0.2)
    return mapped(path, groups)


def run(path: Path, groups: int, shown: int, draws: int, seed: int, **options: Any) -> dict[str, Any]:
    """One fit and its errors; on all ranks where there are several."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    y = awaited(path, rank, groups)
    pyro.clear_param_store()
    guide = pyro_flowvi.AutoRealNVP(model)
    started, spent = time.perf_counter(), os.times()
    fitted = pyro_flowvi.fit(model, guide, y, shown, seed=seed, progress=False, **options)
    seconds = time.perf_counter() - started
    user, system = (float(now - then) for now, then in zip(os.times()[:2], spent[:2], strict=True))
    mebibytes = peaks()
    print(f"rank {rank}: {fitted}, {peak():.0f} MiB", file=sys.stderr)
    if hasattr(guide, "gather_rows"):
        guide.gather_rows()
    row = {
        "benchmark": "ten_million",
        "groups": groups,
        "rows": groups * EACH,
        "groups_a_step": shown,
        "processes": world,
        "seed": seed,
        "steps": len(fitted.losses),
        "fit": repr(fitted),
        "seconds": seconds,
        "user_seconds": user,
        "system_seconds": system,
        "rows_a_second": groups * EACH / seconds,
        "rows_of_steps": len(fitted.losses) * shown * EACH * world,
        "mebibytes": mebibytes,
        "within_memory": max(mebibytes) <= MEBIBYTES,
    }
    if rank == 0:
        torch.manual_seed(seed)
        row |= {"draws": draws} | errors(guide, exact(y), draws)
    return row


def say(row: dict[str, Any]) -> str:
    memory = ", ".join(f"{value:.0f}" for value in row["mebibytes"])
    return "\n".join(
        [
            f"{row['rows']:,} rows in {row['groups']:,} groups, {row['processes']} processes: {row['fit']}",
            f"{row['seconds']:.1f} s, of the process {row['user_seconds']:.1f} and of the system for it "
            f"{row['system_seconds']:.1f}; {row['rows_a_second']:,.0f} rows of the data a second; the steps "
            f"read {row['rows_of_steps']:,}",
            f"peak of each process: {memory} MiB, {'within' if row['within_memory'] else 'beyond'} "
            f"{MEBIBYTES:.0f}",
            f"mu: mean off by {row['mu_mean']:.3f} sd (by chance {row['mean_by_chance']:.3f}), sd ratio "
            f"{row['mu_sd_ratio']:.3f}",
            f"theta: worst mean off by {row['theta_worst_mean']:.3f} sd (by chance "
            f"{row['worst_mean_by_chance']:.3f}), rms {row['theta_rms_mean']:.4f} (by chance "
            f"{row['mean_by_chance']:.4f}), sd ratios {row['theta_sd_low']:.3f} to "
            f"{row['theta_sd_high']:.3f} (by chance 1 ± {row['worst_sd_by_chance']:.3f})",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=100_000)
    parser.add_argument("--shown", type=int, default=200, help="groups that the plate draws a step")
    parser.add_argument("--draws", type=int, default=2000, help="by which the fit is scored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="file of the rows, written if it is not there")
    parser.add_argument("--output", type=Path, default=results_of("scale"))
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    path = options.data or Path(tempfile.gettempdir()) / f"ten_million_{options.groups}_{DATA_SEED}.f32"
    row = run(path, options.groups, options.shown, options.draws, options.seed)
    if os.environ.get("RANK", "0") != "0":
        return
    print(say(row))
    append(options.output, row)


if __name__ == "__main__":
    main()
