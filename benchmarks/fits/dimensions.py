"""What a guide costs and how near it comes, by family and dimension: the table behind the defaults.

Two targets whose density is normalised, so that the gap of the ELBO is the divergence KL(q | p) itself:

- *correlated*: a Gaussian whose neighbouring coordinates are correlated by 0.9;
- *funnel*: Neal's, v ~ N(0, 3), the other coordinates N(0, exp(v / 2)).

Every cell runs in a process of its own, at the defaults of the guide and of ``fit`` (Pyro's guides: those of
``fit`` alone), and reports the time of an eager and of a compiled step, the peak of resident memory during
eager training above that before it, and the divergence after ``--steps`` steps over 4,000 draws::

    python -m benchmarks.fits.dimensions [--dims 2 10 100 1000] [--guides realnvp nice ...] [--steps 3000]
        [--threads 1] [--output FILE]
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from benchmarks.common.results import Clock, append, has, read, results_of
from pyro_flowvi import FLOWS, AutoFlow, CompiledSVI, diagnose, fit
from pyro_flowvi.transforms import Permute

RHO = 0.9
AFFINE = "affine alone"
PYROS = {"Pyro normal": AutoNormal, "Pyro multivariate": AutoMultivariateNormal}
PARTICLES = 16
TIMED_STEPS = 30


def correlated(dim: int) -> None:
    z = pyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (dim,)))
    innovation = (z[..., 1:] - RHO * z[..., :-1]) / math.sqrt(1 - RHO**2)
    norm = 0.5 * dim * math.log(2 * math.pi) + 0.5 * (dim - 1) * math.log(1 - RHO**2)
    squares = z[..., :1].square().sum(-1) + innovation.square().sum(-1)
    pyro.factor("density", -0.5 * squares - norm)


def funnel(dim: int) -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(dim - 1), (v / 2).exp().unsqueeze(-1)).to_event(1))


TARGETS: dict[str, Callable[[int], None]] = {"correlated": correlated, "funnel": funnel}


def make_guide(name: str, model: Callable[..., Any], dim: int) -> Any:
    if name in PYROS:
        # Pyro's guides cannot start on a flat prior without a value for the site.
        start = pyro.infer.autoguide.init_to_value(values={"z": torch.zeros(dim)})
        return PYROS[name](model, init_loc_fn=start) if model is correlated else PYROS[name](model)
    if name == AFFINE:
        return AutoFlow(model, lambda dim: Permute(range(dim)))
    return AutoFlow(model, name)


def resident_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step_ms(svi: Any, dim: int, num_steps: int) -> float:
    svi.step(dim)
    start = time.perf_counter()
    for _ in range(num_steps):
        svi.step(dim)
    return 1e3 * (time.perf_counter() - start) / num_steps


def cell(name: str, target: str, dim: int, num_steps: int, compile: bool) -> dict[str, Any]:
    """One cell of the table; the process is its own."""
    model = TARGETS[target]
    pyro.set_rng_seed(0)
    result: dict[str, Any] = {"guide": name, "target": target, "dim": dim}
    loss = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=0)
    optim = pyro.optim.Adam({"lr": 1e-4})
    guide = make_guide(name, model, dim)
    before = resident_mib()
    svi = pyro.infer.SVI(model, guide, optim, loss)
    result["eager_ms"] = step_ms(svi, dim, TIMED_STEPS)
    result["peak_mib"] = resident_mib() - before
    result["parameters"] = sum(param.numel() for param in guide.parameters())
    if compile:
        compiled = CompiledSVI(model, guide, optim, loss, compile=True)
        start = time.perf_counter()
        compiled.step(dim)
        compiled.step(dim)
        result["compile_s"] = time.perf_counter() - start
        compiled.run(TIMED_STEPS, dim, progress=False)
        start = time.perf_counter()
        compiled.run(10 * TIMED_STEPS, dim, progress=False)
        result["compiled_ms"] = 1e2 * (time.perf_counter() - start) / TIMED_STEPS
    pyro.clear_param_store()
    guide = make_guide(name, model, dim)
    clock = Clock()
    losses = fit(model, guide, dim, num_steps=num_steps, seed=0, compile=compile, progress=False).losses
    result |= clock.read()
    result["finite"] = bool(losses.isfinite().all())
    diagnosis = diagnose(model, guide, dim, num_samples=4000)
    result |= {"kl": -diagnosis.elbo, "kl_se": diagnosis.elbo_se, "khat": diagnosis.khat}
    return result


def markdown(rows: list[dict[str, Any]]) -> str:
    """The cells as a Markdown table, one line for each guide and dimension."""
    head = "| d | guide | parameters | eager, ms | compiled, ms | compile, s | peak, MiB |"
    lines = [head + " KL correlated | KL funnel |", "|" + "---|" * 9]
    cells = {(row["dim"], row["guide"], row["target"]): row for row in rows}
    for dim, guide in dict.fromkeys((row["dim"], row["guide"]) for row in rows):
        both = [cells.get((dim, guide, target), {}) for target in TARGETS]
        first = both[0] or both[1]
        kls = [f"{row['kl']:.3g} ± {row['kl_se']:.1g}" if "kl" in row else "failed" for row in both]
        compiled = (
            f"{first['compiled_ms']:.3g} | {first['compile_s']:.0f}" if "compiled_ms" in first else " | "
        )
        costs = f"{first['parameters']:,} | {first['eager_ms']:.3g} | {compiled} | {first['peak_mib']:.0f}"
        lines.append(f"| {dim} | {guide} | {costs} | {' | '.join(kls)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 10, 100, 1000])
    parser.add_argument(
        "--guides", nargs="+", default=[*PYROS, AFFINE, *FLOWS], choices=[*PYROS, AFFINE, *FLOWS]
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--output", type=Path, default=results_of("dimensions"))
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        warnings.simplefilter("ignore")
        torch.set_num_threads(options.threads)
        name, target, dim = options.cell
        print(json.dumps(cell(name, target, int(dim), options.steps, not options.eager)))
        return
    rows = []
    for dim in options.dims:
        for guide in options.guides:
            for target in options.targets:
                key = {"guide": guide, "target": target, "dim": dim, "steps": options.steps}
                key |= {"compiled": not options.eager}
                if has(read(options.output), key):
                    continue
                command = [sys.executable, "-m", __spec__.name, "--cell", guide, target, str(dim)]
                command += ["--steps", str(options.steps), "--threads", str(options.threads)]
                command += ["--eager"] * options.eager
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(f"{guide}, {target}, d = {dim}: {done.stderr.strip().splitlines()[-1]}", flush=True)
                    continue
                rows.append(append(options.output, key | json.loads(done.stdout.splitlines()[-1])))
                print(rows[-1], flush=True)
    print("\n" + markdown(rows))


if __name__ == "__main__":
    main()
