"""What a fit at its defaults does on hard targets, whether the verdict says so, and what it says of bad fits.

    python -m benchmarks.fits.hard_targets [--targets NAME ...] [--guides NAME ...] [--seeds 3] [--isolate]
        [--output hard.jsonl]
    python -m benchmarks.fits.hard_targets --report hard.jsonl

Every target is normalised and can be sampled, so that minus the ELBO is KL(q || p) itself, and means and
scales are compared with 100,000 exact draws:

- *student*: five independent Student-t of 2.5 degrees of freedom, whose fourth moment is infinite;
- *funnel*: Neal's, v ~ N(0, 3), the other coordinates N(0, exp(v / 2));
- *banana*: pairs x ~ N(0, 1), y ~ N(2 (x² - 1), 0.5);
- *scales*: a Gaussian around 3, in rotated axes, standard deviations from 1e-3 to 1 (condition number 1e6);
- *modes*: two unit Gaussians with equal weights, 6 standard deviations apart.

A fit is either a guide at the defaults of ``pyro_flowvi.fit`` or deliberately bad: 100 steps, a Gaussian on a
funnel, a Gaussian that starts at one of two modes, a banana under one and two planar layers.

Scale is measured between the 5 % and 95 % quantiles here: the standard deviations of draws from the
Student-t and the funnel are noise.  They are in the file, but a fit is called right by the quantiles, with
the bounds of ``scoring.py``.  The report counts verdicts that say good of a fit that is not right, and poor
of one that is.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

import pyro_flowvi
from benchmarks.common.results import Clock, Row, attempt, chosen, collect, finite, read, results_of
from benchmarks.common.scoring import OURS, accuracy, draw, is_right, judge, redraw, scalars, worst_ratio
from benchmarks.common.tables import markdown, number

DEFAULT_GUIDES = ("AutoPlanar", "AutoRealNVP", "AutoNeuralSpline")
NUM_EXACT, NUM_DRAWS = 100_000, 10_000
DEGREES, CURVATURE, THICKNESS = 2.5, 2.0, 0.5
Draws = dict[str, Tensor]


def student(dim: int) -> None:
    pyro.sample("x", dist.StudentT(DEGREES).expand([dim]).to_event(1))


def funnel(dim: int) -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(torch.zeros(dim - 1), (v / 2).exp().unsqueeze(-1)).to_event(1))


def banana(dim: int) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([dim // 2]).to_event(1))
    pyro.sample("y", dist.Normal(CURVATURE * (x.square() - 1.0), THICKNESS).to_event(1))


def scale_tril(dim: int) -> Tensor:
    """Of a covariance with standard deviations from 1e-3 to 1 along random axes."""
    axes, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((dim, dim)))
    covariance = (axes * np.logspace(-6, 0, dim)) @ axes.T
    return torch.as_tensor(np.linalg.cholesky(covariance), dtype=torch.get_default_dtype())


def scales(tril: Tensor) -> None:
    pyro.sample("x", dist.MultivariateNormal(3.0 * torch.ones(len(tril)), scale_tril=tril))


def modes(dim: int) -> None:
    locs = torch.zeros(2, dim)
    locs[:, 0] = torch.tensor([-3.0, 3.0])
    weights = dist.Categorical(torch.ones(2) / 2.0)
    pyro.sample("x", dist.MixtureSameFamily(weights, dist.Normal(locs, 1.0).to_event(1)))


@dataclass(frozen=True)
class Target:
    model: Callable[..., None]
    dim: int

    @property
    def args(self) -> tuple[Any, ...]:
        return (scale_tril(self.dim),) if self.model is scales else (self.dim,)

    def exact(self, num_draws: int) -> Draws:
        """Draws of the model itself, from a fixed seed."""
        pyro.set_rng_seed(0)
        with torch.no_grad(), pyro.plate("draws", num_draws, dim=-1):
            trace: Any = pyro.poutine.trace(self.model).get_trace(*self.args)
        return {name: trace.nodes[name]["value"] for name in ("x", "v", "y") if name in trace.nodes}


TARGETS = {
    "student, d = 5": Target(student, 5),
    "funnel, d = 10": Target(funnel, 10),
    "funnel, d = 100": Target(funnel, 100),
    "banana, d = 2": Target(banana, 2),
    "banana, d = 10": Target(banana, 10),
    "scales, d = 10": Target(scales, 10),
    "modes, d = 2": Target(modes, 2),
}
Maker = Callable[[Callable[..., None]], Any]


@dataclass(frozen=True)
class BadFit:
    target: str
    guide: Maker
    options: dict[str, Any]


GAUSSIAN: Maker = AutoMultivariateNormal
ONE_MODE: Maker = partial(
    AutoMultivariateNormal, init_loc_fn=init_to_value(values={"x": torch.tensor([3.0, 0.0])})
)
SHORT = {"num_steps": 100}
BAD = {
    "AutoPlanar, 100 steps": BadFit("funnel, d = 10", pyro_flowvi.AutoPlanar, SHORT),
    "AutoRealNVP, 100 steps": BadFit("banana, d = 10", pyro_flowvi.AutoRealNVP, SHORT),
    "Gaussian, 100 steps": BadFit("scales, d = 10", GAUSSIAN, SHORT),
    "Gaussian": BadFit("funnel, d = 10", GAUSSIAN, {}),
    "Gaussian at one mode": BadFit("modes, d = 2", ONE_MODE, {}),
    "1 planar layer": BadFit("banana, d = 2", partial(pyro_flowvi.AutoPlanar, num_layers=1), {}),
    "2 planar layers": BadFit("banana, d = 2", partial(pyro_flowvi.AutoPlanar, num_layers=2), {}),
}


def fit_one(key: Row) -> Row:
    """The result of one task: trains, draws, scores and judges."""
    target, seed = TARGETS[key["target"]], key["seed"]
    bad = BAD.get(key["fit"])
    make: Maker = bad.guide if bad is not None else getattr(pyro_flowvi, key["fit"])
    options = bad.options if bad is not None else {}
    clock = Clock()
    pyro.set_rng_seed(seed)
    guide = make(target.model)
    fitted = pyro_flowvi.fit(target.model, guide, *target.args, seed=seed, progress=False, **options)
    result: Row = clock.read() | {"result": repr(fitted)}
    torch.manual_seed(seed)
    exact = scalars(target.exact(NUM_EXACT))
    torch.manual_seed(seed)
    for prefix, drawn in (("", draw(guide, target.args, NUM_DRAWS)), ("psis_", redraw(guide, NUM_DRAWS))):
        if drawn is not None:
            result |= accuracy(scalars(drawn), exact, prefix)
    return finite(result | judge(target.model, guide, target.args, seed))


def say(row: Row) -> str:
    """One line on a result, for the progress of a run."""
    head = f"{row['target']}, {row['fit']}, seed {row['seed']}"
    return f"{head}: {' | '.join(outcome(row))}"


def outcome(row: Row) -> list[str]:
    if "error" in row:
        return [row["error"], *[""] * 7]
    kl = None if row["elbo"] is None else -row["elbo"]
    ratio, sd_ratio = worst_ratio(row, scale="width"), worst_ratio(row)
    return [
        f"{number(kl, 3)} ± {number(row['elbo_se'], 3)}",
        number(row["worst_mean"]),
        number(ratio),
        number(sd_ratio),
        "yes" if is_right(row, scale="width") else "no",
        row["verdict"],
        "; ".join(row["reasons"]),
        number(row["seconds"], 1),
    ]


def report(rows: list[Row]) -> None:
    """One line for each target and fit: the seed with the median KL; and how often the verdict is wrong."""
    head = ["target", "fit", "KL(q || p), nats", "worst mean, sd", "worst width ratio", "worst sd ratio"]
    head += ["right", "verdict", "reasons", "seconds"]
    lines = []
    for target, fit in dict.fromkeys((row["target"], row["fit"]) for row in rows):
        group = [row for row in rows if (row["target"], row["fit"]) == (target, fit)]
        group.sort(key=lambda row: math.inf if row.get("elbo") is None else -row["elbo"])
        name = f"{fit} (bad on purpose)" if fit in BAD else fit
        lines.append([target, name, *outcome(group[(len(group) - 1) // 2])])
    print(markdown(head, lines))
    judged = [(is_right(row, scale="width"), row["verdict"]) for row in rows if "verdict" in row]
    good = [right for right, verdict in judged if verdict == "good"]
    right = [verdict for right, verdict in judged if right]
    print(f"\n“Good” of fits that are not right: {good.count(False)} of {len(good)}; ", end="")
    print(f"right fits called poor: {right.count('poor')} of {len(right)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=[], help="names or their starts; default all")
    parser.add_argument(
        "--guides", nargs="+", default=[], help=f"default {', '.join(DEFAULT_GUIDES)} and the bad fits, “bad”"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--isolate", action="store_true", help="each fit in a process of its own")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for a fit of its own process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=results_of("hard_targets"))
    parser.add_argument("--report", type=Path, help="print a table of this file and fit nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report is not None:
        report(read(options.report))
        return
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(attempt(json.loads(options.one), fit_one)))
        return
    fits = chosen(options.guides or [*DEFAULT_GUIDES, "bad"], (*OURS, "bad"))
    keys: list[Row] = [
        {"target": target, "fit": fit, "seed": seed}
        for seed in range(options.seeds)
        for target in chosen(options.targets, tuple(TARGETS))
        for fit in [*fits, *BAD]
        if (fit in OURS and fit in fits) or (fit in BAD and "bad" in fits and BAD[fit].target == target)
    ]
    collect(keys, options.output, fit_one, say, apart=options.isolate, timeout=options.timeout)


if __name__ == "__main__":
    main()
