"""Hierarchical models fitted by a guide that knows the program, and by one that sees a flat vector.

    python -m benchmarks.fits.structured --truth [--models NAME ...]
    python -m benchmarks.fits.structured [--models NAME ...] [--methods structured flat] [--seeds 3]
        [--limit 600] [--output benchmarks/results/structured.jsonl]
    python -m benchmarks.fits.structured --report benchmarks/results/structured.jsonl

The models are those of ``common/structured_models.py``.  The radon's data are posteriordb's, from the clone
that the environment variable PYRO_FLOWVI_POSTERIORDB names; without it that model is left out.  ``--truth``
computes the posteriors that the fits are compared with, by quadrature or weighted draws
(``common/structured_truths.py``) or with NumPyro's NUTS (``common/structured_numpyro.py``), and adds them to
``benchmarks/results/structured_truth.json``; what is there is not computed again.

The methods are ``AutoRealNVP`` and ``pyro_flowvi.fit`` at their defaults, with ``structure="auto"`` and with
``structure=None``, in float64.  Each run has a process of its own, one thread and one core.  Seconds are from
the guide's construction to the end of ``fit``, with the compiler's cache empty; a run that has not ended, fit
and scores, after ``--limit`` seconds is stopped.

Scores are of 10,000 draws: the worst mean, in standard deviations of the truth, and the lowest and highest
ratio of standard deviations, over the roots in their coordinates and over ten elements of each local site.
The ELBO is of fresh draws.

Figures of the report are medians over seeds, of errors the worst.  Targets are marked + (met) or - (missed).
"""

import argparse
import importlib.util
import inspect
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyro_flowvi
from benchmarks.common import structured_truths
from benchmarks.common.results import Clock, Row, attempt, chosen, collect, read, results_of, settings
from benchmarks.common.scoring import worst_ratio
from benchmarks.common.structured_models import MODELS
from benchmarks.common.structured_truths import RESULTS, errors, read_truths
from benchmarks.common.tables import markdown, median, nats, number
from benchmarks.fits.time_to_right import FIRST_CORE

METHODS = {"structured": "auto", "flat": None}
NUM_DRAWS = 10_000
ELBO_DRAWS, MANY, FEW = 4000, {"eight schools": 100_000}, 1000
KNOWS_STRUCTURE = "structure" in inspect.signature(pyro_flowvi.AutoRealNVP).parameters
"""Without it, the guide is flat."""
LARGE = 400
"""Scalars from which on the ELBO is of FEW draws."""


@dataclass(frozen=True)
class Target:
    """What is asked of the structured guide on a model; None where nothing is.

    :param below: nats that the ELBO may be below log p(y).
    :param above_flat: nats by which it is at least above that of the flat guide.
    :param times_flat: seconds, in those of the flat guide.
    """

    mean: float | None = None
    sd: tuple[float, float] | None = None
    seconds: float | None = None
    steps: int | None = None
    elbo: float | None = None
    below: float | None = None
    above_flat: float | None = None
    times_flat: float | None = None


SLOPES = Target(0.1, (0.93, 1.07), 15.0, below=0.1)
GROUPS = Target(0.1, (0.95, 1.05), 15.0, below=1.0)
RIVAL = Target(above_flat=-0.1, times_flat=1.5)
TARGETS = dict.fromkeys(MODELS, RIVAL) | {
    "eight schools": Target(seconds=2.5, steps=300, elbo=-31.33),
    "100 normal groups": Target(0.06, (0.95, 1.05), 2.0),
    "1,000 normal groups": Target(0.06, (0.95, 1.05), 3.0),
    "10,000 normal groups": Target(0.06, (0.95, 1.05), 10.0),
    "2,000 Poisson groups": GROUPS,
    "2,000 binomial groups": GROUPS,
    "slopes in a plate": SLOPES,
    "slopes by row": SLOPES,
    "three levels": Target(0.1, (0.93, 1.07), 8.0, below=0.1),
    "horseshoe": Target(seconds=30.0, above_flat=3.0),
}


def guide_of(model: Callable[..., Any], method: str) -> Any:
    options: dict[str, Any] = {"structure": METHODS[method]} if KNOWS_STRUCTURE else {}
    return pyro_flowvi.AutoRealNVP(model, **options)


def run_one(key: Row) -> Row:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        return fit_one(key)


def fit_one(key: Row) -> Row:
    problem, seed = MODELS[key["model"]](), key["seed"]
    clock = Clock()
    guide = guide_of(problem.model, key["method"])
    fitted = pyro_flowvi.fit(problem.model, guide, *problem.args, seed=seed, progress=False)
    row = clock.read() | {"truth": problem.truth, "fit_seconds": fitted.wall_time, "fit": repr(fitted)}
    row |= {"stop_reason": fitted.stop_reason, "steps": len(fitted.losses)}
    if (structure := getattr(guide, "structure", None)) is not None:
        row["structure"] = str(structure)
    torch.manual_seed(seed)
    sites = guide.sample_posterior(NUM_DRAWS)
    truth = structured_truths.truth(problem)
    row |= errors(problem.of_roots(sites), truth)
    row |= {f"local_{name}": value for name, value in errors(problem.of_locals(sites), truth).items()}
    size = sum(values[0].numel() for values in sites.values())
    draws = MANY.get(key["model"], ELBO_DRAWS if size < LARGE else FEW)
    found = pyro_flowvi.diagnose(
        problem.model, guide, *problem.args, num_samples=draws, seed=seed, probes=False
    )
    return row | {"elbo": found.elbo, "elbo_se": found.elbo_se, "khat": found.khat}


def compute_truths(models: list[str]) -> None:
    # Of two forms of a model the later one, in whose sites NUTS draws; the cheap ones first.
    problems = {problem.truth: problem for problem in (MODELS[name]() for name in models)}
    for _, problem in sorted(problems.items(), key=lambda item: item[0] not in structured_truths.MARGINALS):
        if problem.truth in read_truths():
            continue
        if problem.truth in structured_truths.MARGINALS:
            found = structured_truths.compute(problem)
        elif importlib.util.find_spec("numpyro") is None:
            print(f"NumPyro is not installed: {problem.truth} is skipped (pip install numpyro)")
            continue
        else:
            from benchmarks.common import structured_numpyro

            found = structured_numpyro.compute(problem)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({**read_truths(), problem.truth: found}, indent=1) + "\n")
        print(f"{problem.truth}: {found['how']}, {number(found['seconds'])} s", flush=True)


def say(row: Row) -> str:
    head = f"{row['model']}, {row['method']}, seed {row['seed']}"
    if "error" in row:
        return f"{head}: {row['error']}"
    error = f"mean {number(row['worst_mean'], 3)} sd ratio {number(worst_ratio(row))}"
    return f"{head}: {number(row['seconds'])} s, {row['steps']} steps, ELBO {elbo_text([row])}, {error}"


# -- report --------------------------------------------------------------------------------------


def elbo_text(rows: list[Row]) -> str:
    elbos = [row["elbo"] for row in rows if row.get("elbo") is not None]
    if not elbos:
        return "–"
    error = max(row.get("elbo_se") or math.inf for row in rows)
    return f"{np.median(elbos):.3f} ± {number(error, 3)}"


def range_text(rows: list[Row], prefix: str) -> str:
    low = min(row[f"{prefix}sd_low"] for row in rows)
    return f"{number(low)} to {number(max(row[f'{prefix}sd_high'] for row in rows))}"


def worst(rows: list[Row], name: str) -> float:
    return max((math.inf if row.get(name) is None else row[name] for row in rows), default=math.nan)


def line(model: str, method: str, rows: list[Row], log_z: float | None) -> list[str]:
    done = [row for row in rows if "error" not in row]
    if not done:
        return [model, method, rows[0]["error"], *["–"] * 8]
    seconds = median([row.get("seconds") for row in rows])
    stops = sorted({row["stop_reason"] for row in done})
    return [
        model,
        method,
        number(seconds),
        number(median([row.get("cpu_seconds") for row in rows])),
        f"{median([row.get('steps') for row in rows]):.0f}, {' or '.join(stops)}",
        elbo_text(done),
        nats(log_z, 3),
        f"{number(worst(rows, 'worst_mean'), 3)} ({done[0]['worst_name']})",
        range_text(done, ""),
        number(worst(rows, "local_worst_mean"), 3),
        range_text(done, "local_"),
    ]


def check(
    model: str, target: Target, rows: list[Row], flat: list[Row], log_z: float | None
) -> list[list[str]]:
    """What is asked for, what was found, and whether that is enough."""

    def middle(rows: list[Row], name: str) -> float:
        return median([row.get(name) for row in rows]) if rows else math.nan

    seconds, steps = middle(rows, "seconds"), middle(rows, "steps")
    elbo, flat_elbo = (
        float(
            np.median([-math.inf if row.get("elbo") is None else row["elbo"] for row in some] or [-math.inf])
        )
        for some in (rows, flat)
    )
    lines = []

    def add(what: str, value: float, asked: float | None, at_most: bool) -> None:
        if asked is not None and not math.isnan(value):
            met = value <= asked if at_most else value >= asked
            bound = f"at {'most' if at_most else 'least'} {asked:g}"
            lines.append([model, what, number(value, 3), bound, "+" if met else "-"])

    add("worst mean of the roots, sd", worst(rows, "worst_mean"), target.mean, True)
    if target.sd is not None:
        low, high = target.sd
        lows = [0.0 if row.get("sd_low") is None else row["sd_low"] for row in rows]
        add("lowest sd ratio", min(lows), low, False)
        add("highest sd ratio", worst(rows, "sd_high"), high, True)
    add("seconds", seconds, target.seconds, True)
    add("steps", steps, target.steps, True)
    add("ELBO", elbo, target.elbo, False)
    if log_z is not None:
        add("log p(y) - ELBO", log_z - elbo, target.below, True)
    if flat:
        add("ELBO above the flat guide's", elbo - flat_elbo, target.above_flat, False)
        flat_seconds = middle(flat, "seconds")
        add("seconds / the flat guide's", seconds / flat_seconds, target.times_flat, True)
    return lines


def report(rows: list[Row]) -> None:
    """Where a method was run again on a model and seed, the latest counts."""
    latest = {(row["model"], row["method"], row["seed"]): row for row in rows}
    truths = read_truths()
    groups = {
        (model, method): [row for key, row in latest.items() if key[:2] == (model, method)]
        for model in MODELS
        for method in METHODS
    }
    names = {row["model"]: row["truth"] for row in latest.values() if "truth" in row}
    log_z = {model: truths.get(names.get(model, ""), {}).get("log_z") for model in MODELS}
    print(settings(rows))
    head = ["model", "guide", "seconds", "CPU s", "steps", "ELBO", "log p(y)", "worst mean, sd", "sd ratios"]
    head += ["locals' worst mean", "locals' sd ratios"]
    lines = [line(model, method, rows, log_z[model]) for (model, method), rows in groups.items() if rows]
    print(markdown(head, lines))
    checks = [
        text
        for model, target in TARGETS.items()
        if (rows := groups[model, "structured"])
        for text in check(model, target, rows, groups[model, "flat"], log_z[model])
    ]
    if checks:
        print("\n" + markdown(["model", "target", "found", "asked", ""], checks))
    failed = {(row["model"], row["method"], row["error"]) for row in latest.values() if "error" in row}
    print("".join(f"\n- {method} on {model}: {error}" for model, method, error in sorted(failed)))


def plan(models: list[str], methods: list[str], seeds: int) -> list[Row]:
    """The runs, in their order; the seeds come last, so that all models are seen early."""
    return [
        {"model": model, "method": method, "seed": seed}
        for seed in range(seeds)
        for model in models
        for method in methods
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[], help="names or their starts; default all")
    parser.add_argument("--methods", nargs="+", default=[], help="of structured and flat; default both")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method on each model")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a run")
    parser.add_argument("--core", type=int, default=FIRST_CORE, help="core to run on; -1 for any")
    parser.add_argument("--output", type=Path, default=results_of("structured"))
    parser.add_argument("--truth", action="store_true", help="compute the posteriors, and fit nothing")
    parser.add_argument("--report", type=Path, help="print tables of this file and run nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report is not None:
        report(read(options.report))
        return
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    if options.core >= 0:
        os.sched_setaffinity(0, {options.core})
    if options.one:
        print(json.dumps(attempt(json.loads(options.one), run_one)))
        return
    models = chosen(options.models, tuple(MODELS))
    if "radon slopes" in models and "PYRO_FLOWVI_POSTERIORDB" not in os.environ:
        print("PYRO_FLOWVI_POSTERIORDB names no clone of posteriordb: radon slopes is skipped")
        models.remove("radon slopes")
    if options.truth:
        compute_truths(models)
        return
    methods = chosen(options.methods, tuple(METHODS))
    if not KNOWS_STRUCTURE and "structured" in methods:
        print("AutoRealNVP takes no structure: the structured guide is skipped")
        methods.remove("structured")
    keys = plan(models, methods, options.seeds)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    collect(keys, options.output, run_one, say, apart=True, timeout=options.limit)


if __name__ == "__main__":
    main()
