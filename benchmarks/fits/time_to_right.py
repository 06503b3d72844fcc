"""Time from the call of ``fit`` to a right posterior, beside NumPyro's NUTS, which a user would take instead.

    python -m benchmarks.fits.time_to_right --data DIR [--models NAME ...] [--methods fit NUTS] [--repeats 5]
        [--output benchmarks/results/time_to_right.jsonl]
    python -m benchmarks.fits.time_to_right --report benchmarks/results/time_to_right.jsonl

``DIR`` is a clone of github.com/stan-dev/posteriordb.  The models:

- its eight posteriors of ``posteriors.py``, with its reference draws;
- *radon*, 85 counties and 919 houses, written with ``a[county]``, which does not broadcast over particles,
  and with ``a[..., county]``, which does; and a *loop* over 100 time steps, with one site for each.
  Independent draws of their exact posteriors come from ``hierarchies.py``.

The methods, both in float64:

- *fit*: ``AutoRealNVP`` and ``pyro_flowvi.fit`` at their defaults, with the seeds 0, 1 and 2 in turn;
- *NUTS*: NumPyro's at its defaults, 4 vectorised chains of 1,000 + 1,000 draws.

Each run has a process of its own, one thread and one core, and the methods take turns, model by model and
repeat by repeat.  Seconds are wall seconds with all tracing and compilation, with an empty cache of the
compiler, after the imports: from the guide's construction to the end of ``fit``, from the construction of
``MCMC`` to the last draw.  *Again* is a second fit in the same process, of the eight.  CPU seconds are in the
file: where wall seconds are more, the core was not quiet.

*Right* is defined in ``scoring.py``: every mean within 0.1 standard deviations of the reference, and every
ratio of standard deviations within 0.9 to 1.1, of 10,000 draws of the guide and of the 4,000 of NUTS.  The
ELBO is of fresh draws.

The file of results is added to, and what it has is not run again.  Figures of the report are medians over
repeats.  Targets are marked + (met) or - (missed).
"""

import argparse
import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

import pyro_flowvi
from benchmarks.common import hierarchies
from benchmarks.common.posteriors import RECIPES, load
from benchmarks.common.results import Clock, Row, attempt, chosen, collect, finite, read, results_of, settings
from benchmarks.common.scoring import Array, accuracy, is_right, scalars, train_ours, worst_ratio
from benchmarks.common.tables import markdown, median, number
from benchmarks.fits.posteriordb import SHORT

METHODS = ("fit", "NUTS")
HIERARCHIES: dict[str, Callable[[Path], hierarchies.Hierarchy]] = {
    "radon, a[county]": lambda folder: hierarchies.load_radon(folder, hierarchies.plain),
    "radon, a[..., county]": lambda folder: hierarchies.load_radon(folder, hierarchies.broadcasting),
    "loop of 100 steps": lambda folder: hierarchies.made_up_walk(),
}
MODELS = (*RECIPES, *HIERARCHIES)
PLAIN, BROADCASTING, LOOP = HIERARCHIES
SEEDS, NUM_DRAWS, NUM_EXACT = 3, 10_000, 40_000
CHAINS, WARMUP, SAMPLES = 4, 1000, 1000
FIRST_CORE = 0 if hasattr(os, "sched_setaffinity") else -1
XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


@dataclass(frozen=True)
class Problem:
    """A model for either method, and what its draws are compared with.

    :param for_numpyro: imports NumPyro, and gives its model and the arguments.
    :param parameters: the scalars that the reference has, of draws of the sites.
    :param elbo_draws: fewer where the model may run for one draw at a time.
    :param suffixes: of the entries of each fit in one process, the first of which is scored.
    """

    model: Callable[..., Any]
    args: tuple[torch.Tensor, ...]
    for_numpyro: Callable[[], tuple[Any, tuple[Any, ...]]]
    parameters: Callable[[dict[str, torch.Tensor]], dict[str, Array]]
    reference: dict[str, Array]
    elbo_draws: int
    suffixes: tuple[str, ...] = ("", "_again")


def problem(name: str, folder: Path) -> Problem:
    if name in RECIPES:
        posterior = load(folder, [name])[name]

        def for_numpyro() -> Any:
            from benchmarks.common import posteriors_numpyro

            return posteriors_numpyro.MODELS[name], posteriors_numpyro.arrays(posterior.args)

        recipe = posterior.model, posterior.args, for_numpyro
        return Problem(*recipe, posterior.parameters, posterior.reference, 4000)
    hierarchy = HIERARCHIES[name](folder)

    def shared_for_numpyro() -> Any:
        import numpyro

        from benchmarks.common import posteriors_numpyro

        model = partial(hierarchy.model, numpyro, numpyro.distributions)
        return model, posteriors_numpyro.arrays(hierarchy.args)

    model = partial(hierarchy.model, pyro, pyro.distributions)
    reference = hierarchy.exact(NUM_EXACT)
    return Problem(model, hierarchy.args, shared_for_numpyro, scalars, reference, 1000, suffixes=("",))


def run_fit(problem: Problem, seed: int) -> Row:
    """The first fit of this process, which is scored, and a second one of a small model."""
    result: Row = {}
    first: dict[str, torch.Tensor] = {}
    for suffix in problem.suffixes:
        pyro.clear_param_store()
        clock = Clock()
        guide, fitted = train_ours("AutoRealNVP", problem.model, problem.args, seed)
        result |= clock.read(suffix)
        torch.manual_seed(seed)
        drawn = guide.sample_posterior(NUM_DRAWS)
        if suffix:
            result["same_again"] = all(torch.equal(first[name], drawn[name]) for name in first)
            continue
        first = drawn
        result |= {"fit": repr(fitted)} | accuracy(problem.parameters(drawn), problem.reference)
        found = pyro_flowvi.diagnose(
            problem.model, guide, *problem.args, num_samples=problem.elbo_draws, seed=seed, probes=False
        )
        result |= {"elbo": found.elbo, "elbo_se": found.elbo_se, "khat": found.khat}
    return result


def run_nuts(problem: Problem, seed: int) -> Row:
    model, args = problem.for_numpyro()
    import jax
    from numpyro.infer import MCMC, NUTS

    key = jax.random.PRNGKey(seed)
    clock = Clock()
    mcmc = MCMC(
        NUTS(model),
        num_warmup=WARMUP,
        num_samples=SAMPLES,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key, *args)
    samples = jax.block_until_ready(mcmc.get_samples())
    result = clock.read()
    drawn = {name: torch.from_numpy(np.array(values)) for name, values in samples.items()}
    result["divergences"] = int(mcmc.get_extra_fields()["diverging"].sum())
    return result | accuracy(problem.parameters(drawn), problem.reference)


def run_one(folder: Path, key: Row) -> Row:
    method = run_fit if key["method"] == "fit" else run_nuts
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        return finite(method(problem(key["model"], folder), key["seed"]))


def say(row: Row) -> str:
    head = f"{row['model']}, {row['method']}, seed {row['seed']}"
    if "error" in row:
        return f"{head}: {row['error']}"
    again = f", again {number(row['seconds_again'])}" if "seconds_again" in row else ""
    error = f"mean {number(row['worst_mean'], 3)} sd ratio {number(worst_ratio(row))}"
    return f"{head}: {number(row['seconds'])} s{again}, {error}{' right' if is_right(row) else ''}"


# -- report --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The runs of one method on one model."""

    rows: list[Row]

    def seconds(self, suffix: str = "") -> float:
        """The median; a run that failed counts as infinite, and NaN are those of runs that are not made."""
        missing = math.inf if any("error" in row for row in self.rows) else math.nan
        return middle([row.get(f"seconds{suffix}", missing) for row in self.rows])

    @property
    def spread(self) -> str:
        if not (seconds := [row["seconds"] for row in self.rows if "seconds" in row]):
            return "fails" if self.rows else "–"
        text = number(self.seconds())
        few = len(seconds) < 2
        return text if few else f"{text} ({number(min(seconds))} to {number(max(seconds))})"

    @property
    def right(self) -> str:
        return f"{sum(map(is_right, self.rows))}/{len(self.rows)}" if self.rows else "–"

    @property
    def repeats_itself(self) -> bool:
        """Whether a second fit, and all runs with one seed, gave the same."""
        if not all(row.get("same_again", True) for row in self.rows):
            return False
        found = {(row["seed"], row.get("elbo"), row.get("worst_mean")) for row in self.rows}
        return len(found) == len({seed for seed, *_ in found})


def middle(values: list[float]) -> float:
    """The median; NaN without any."""
    return median(values) if values else math.nan


def line(name: str, fits: Group, nuts: Group) -> list[str]:
    """One of the table."""
    elbos = [row["elbo"] for row in fits.rows if row.get("elbo") is not None]
    elbo = f"{np.median(elbos):.2f} ({np.ptp(elbos):.2f})" if elbos else "–"
    worst = max((row.get("worst_mean") or math.inf for row in fits.rows), default=math.nan)
    ratios = [worst_ratio(row) for row in fits.rows]
    ratio = max(ratios, key=lambda value: abs(math.log(max(value, 1e-300))), default=math.nan)
    figures = [fits.spread, number(fits.seconds("_again")), nuts.spread]
    figures += [number(fits.seconds() / nuts.seconds()), fits.right, nuts.right]
    return [SHORT.get(name, name), *figures, number(worst), number(ratio), elbo]


def targets(groups: dict[tuple[str, str], Group]) -> list[list[str]]:
    """What is asked for, what was found, and whether that is enough; only of what was run."""
    eight = [groups["fit", name] for name in RECIPES if groups["fit", name].rows]
    ratios = [
        groups["fit", name].seconds() / groups["NUTS", name].seconds()
        for name in RECIPES
        if groups["fit", name].rows and groups["NUTS", name].rows
    ]
    seconds = {name: groups["fit", name].seconds() for name in HIERARCHIES}
    again = [group.seconds() / group.seconds("_again") for group in eight]
    wrong = [not is_right(row) for group in eight for row in group.rows]
    found = [
        ("seconds, median of the eight", middle([g.seconds() for g in eight]), 2.0),
        ("seconds, most of the eight", max((g.seconds() for g in eight), default=math.nan), 12.0),
        ("ratio to NUTS, median", middle(ratios), 0.25),
        ("ratio to NUTS, highest", max(ratios, default=math.nan), 0.65),
        ("runs on the eight that are not right", sum(wrong) if wrong else math.nan, 0),
        ("first fit of a process / second, median of the eight", middle(again), 1.1),
        ("radon with a[county], seconds", seconds[PLAIN], 20.0),
        ("radon with a[county] / a[..., county]", seconds[PLAIN] / seconds[BROADCASTING], 1.5),
        ("loop of 100 steps, seconds", seconds[LOOP], 60.0),
    ]
    return [
        [what, number(value) if bound else str(value), f"at most {bound:g}", "+" if value <= bound else "-"]
        for what, value, bound in found
        if not math.isnan(value)
    ]


def report(rows: list[Row]) -> None:
    groups = {
        (method, name): Group([row for row in rows if (row["method"], row["model"]) == (method, name)])
        for method in METHODS
        for name in MODELS
    }
    print(settings(rows))
    head = ["model", "fit, s", "again, s", "NUTS, s", "fit / NUTS", "right", "right, NUTS"]
    head += ["worst mean, sd", "worst sd ratio", "ELBO (range), nats"]
    known = [name for name in MODELS if groups["fit", name].rows or groups["NUTS", name].rows]
    print(markdown(head, [line(name, groups["fit", name], groups["NUTS", name]) for name in known]))
    print("\n" + markdown(["target", "found", "asked", ""], targets(groups)))
    for name in known:
        if not groups["fit", name].repeats_itself:
            print(f"\n- fits of {name} with one seed differ")
    errors = {(row["method"], row["model"], row["error"]) for row in rows if "error" in row}
    print("".join(f"\n- {method} on {name}: {error}" for method, name, error in sorted(errors)))


def plan(models: list[str], methods: list[str], repeats: int) -> list[Row]:
    """The runs, in their order.  NUTS of NumPyro sees no difference between the two forms of radon."""
    return [
        {"model": model, "method": method, "repeat": repeat, "seed": repeat % SEEDS}
        for repeat in range(repeats)
        for model in models
        for method in methods
        if (model, method) != (PLAIN, "NUTS")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a clone of posteriordb")
    parser.add_argument("--models", nargs="+", default=[], help="names or their starts; default all")
    parser.add_argument("--methods", nargs="+", default=[], help="of fit and NUTS; default both")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each method on each model")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for a run")
    parser.add_argument("--core", type=int, default=FIRST_CORE, help="core to run on; -1 for any")
    parser.add_argument("--output", type=Path, default=results_of("time_to_right"))
    parser.add_argument("--report", type=Path, help="print tables of this file and run nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report is not None:
        report(read(options.report))
        return
    if options.data is None:
        parser.error("expected --data, a clone of github.com/stan-dev/posteriordb, or --report")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    if options.core >= 0:
        os.sched_setaffinity(0, {options.core})
    # Before JAX is imported.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
    if options.one:
        print(json.dumps(attempt(json.loads(options.one), partial(run_one, options.data))))
        return
    methods = chosen(options.methods, METHODS)
    if importlib.util.find_spec("numpyro") is None and "NUTS" in methods:
        print("NumPyro is not installed: NUTS is skipped (pip install numpyro)")
        methods.remove("NUTS")
    keys = plan(chosen(options.models, MODELS), methods, options.repeats)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    collect(keys, options.output, partial(run_one, options.data), say, apart=True, timeout=options.timeout)


if __name__ == "__main__":
    main()
