"""Posteriors from minibatches: local latents by index and by an encoder, a VAE, a regression without locals.

    python -m benchmarks.fits.minibatches --truth [--models NAME ...]
    python -m benchmarks.fits.minibatches [--models NAME ...] [--methods NAME ...] [--seeds 3] [--curve]
        [--limit 600] [--data DIR] [--output benchmarks/results/minibatches.jsonl]
    python -m benchmarks.fits.minibatches --report benchmarks/results/minibatches.jsonl [--figure FILE]

The models are those of ``common/minibatch_models.py``, in float64, and the VAE of ``common/digits_vae.py``,
in float32, on scikit-learn's digits and on the images of MNIST in ``DIR``.  ``--truth`` computes the
posteriors that the fits are compared with (``common/minibatch_truths.py``); what is there is not computed
again.

The methods:

- *ours*: ``AutoRealNVP`` and ``pyro_flowvi.fit`` at their defaults, with ``amortize="auto"`` where the rows
  of a step are arguments; of the VAE with its encoder, at the step budget and rate of the peer;
- *full*: the same guide with all data in each step;
- *list*: ``AutoGuideList`` of ``AutoRealNVP`` for the roots and ``AutoNormal`` for the locals, and *normal*:
  Pyro's ``AutoNormal``, both by Pyro's SVI, Adam and 3,000 steps on the same rows;
- *by hand*: of the VAE the guide of Pyro's tutorial, by Pyro's SVI.

Each run has a process of its own, one thread and one core.  Seconds are from the guide's construction to the
end of training, with the compiler's cache empty.  Memory is the peak of the resident set less what it was
after the imports.  Scores are of 10,000 draws of the roots: the worst mean, in standard deviations of the
truth, and the lowest and highest ratio of standard deviations.  The ELBO is over all rows, each once.

``--curve`` fits with budgets of steps from 1 on: with ``--figure`` the errors are drawn against the passes
over the data that the steps make.  The start's own passes do not count there; its seconds do.
"""

import argparse
import inspect
import json
import math
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import Tensor
from torch.distributions import biject_to
from torch.utils.data import DataLoader, TensorDataset

import pyro_flowvi
from benchmarks.common import digits_vae, minibatch_truths
from benchmarks.common.minibatch_models import PLATE, TASKS, Task, counts
from benchmarks.common.minibatch_report import ARGUMENTS, METHODS, MODELS, VAES, draw, report
from benchmarks.common.minibatch_truths import NEW_GROUPS, NEW_SEED, read_truths
from benchmarks.common.results import Clock, Row, attempt, chosen, collect, read, results_of
from benchmarks.common.scoring import worst_ratio
from benchmarks.common.structured_truths import errors
from benchmarks.common.tables import number
from benchmarks.fits.time_to_right import FIRST_CORE

BUDGETS = (1, 30, 100, 300, 1000, 3000)
NUM_DRAWS, ELBO_DRAWS, NEW_DRAWS = 10_000, 200, 4000
RATE, FINAL_RATE, PARTICLES = 1e-2, 1e-3, 4
VAE_STEPS = 3000
MEBI = 2**20


# -- memory --------------------------------------------------------------------------------------


def memory(entry: str) -> float:
    """MiB of this process, where Linux tells: "VmRSS" now, "VmHWM" at most so far."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith(entry)), math.nan)


AFTER_IMPORTS = memory("VmRSS")

# -- guides --------------------------------------------------------------------------------------


def ours(model: Callable[..., Any], **options: Any) -> Any:
    return pyro_flowvi.AutoRealNVP(model, **options)


def stock(method: str, task: Task) -> Any:
    """A guide by Pyro's recipe for minibatches."""
    model = task.problem.model
    if method == "normal":
        return AutoNormal(model)
    guide = AutoGuideList(model)
    guide.append(pyro_flowvi.AutoRealNVP(poutine.block(model, hide=list(task.locals))))
    if task.locals:
        guide.append(AutoNormal(poutine.block(model, expose=list(task.locals))))
    return guide


def train_stock(model: Any, guide: Any, args: Any, batches: Any, steps: int, rate: float = RATE) -> None:
    """Pyro's eager SVI, with a rate that falls exponentially."""
    decay = (FINAL_RATE / RATE) ** (1.0 / steps)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": rate, "lrd": decay}), stock_elbo(PARTICLES))
    for _, batch in zip(range(steps), again_and_again(args, batches), strict=False):
        svi.step(*batch)


def stock_elbo(particles: int) -> Trace_ELBO:
    return Trace_ELBO(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)


def again_and_again(args: Any, batches: Any) -> Any:
    while True:
        yield from [args] if batches is None else batches


@torch.no_grad()
def draw_roots(guide: Any, task: Task) -> dict[str, Tensor]:
    """Draws of the roots; the locals of a million groups would not fit into memory."""
    roots = list(task.problem.roots)
    if isinstance(guide, AutoGuideList):
        return {name: value for name, value in guide[0].sample_posterior(NUM_DRAWS).items() if name in roots}
    if isinstance(guide, AutoNormal):
        found = {}
        for name in roots:
            loc, scale = guide._get_loc_and_scale(name)
            free = loc + scale * torch.randn(NUM_DRAWS, *loc.shape)
            found[name] = biject_to(guide.prototype_trace.nodes[name]["fn"].support)(free)
        return found
    some = "sites" in inspect.signature(guide.sample_posterior).parameters
    drawn: dict[str, Tensor] = guide.sample_posterior(NUM_DRAWS, **({"sites": roots} if some else {}))
    return {name: drawn[name] for name in roots}


# -- bounds --------------------------------------------------------------------------------------


def elbo(task: Task, guide: Any, draws: int = ELBO_DRAWS) -> float:
    """The ELBO of all data, from each row once, with the same draws of the roots for all parts."""
    model, total = task.problem.model, 0.0
    for rows in task.rows():
        if len(rows) < task.batch:
            raise ValueError(f"expected parts of {task.batch} rows, got one of {len(rows)}")
        torch.manual_seed(0)
        if task.problem.truth == ARGUMENTS:
            programs, args = (model, guide), tuple(data[rows] for data in task.problem.args)
        elif task.batches(0) is not None:
            programs, args = (model, guide), (*task.problem.args, rows)
        else:
            programs = tuple(poutine.condition(program, {PLATE: rows}) for program in (model, guide))
            args = task.problem.args
        with pyro.validation_enabled(False):  # it takes a plate whose rows are given for data
            total -= stock_elbo(draws).loss(*programs, *args)
    return total / math.ceil(task.size / task.batch)


@torch.no_grad()
def new_rows(guide: Any) -> dict[str, Tensor]:
    """Draws of the locals of rows that the guide has not seen, as its encoder has them."""
    y = counts(NEW_GROUPS, NEW_SEED)
    theta = guide.sample_new_rows(NEW_DRAWS, y, sites=["theta"])["theta"]
    return {f"new theta[{i}]": column for i, column in enumerate(theta.unbind(-1), 1)}


# -- runs ----------------------------------------------------------------------------------------


def run_one(key: Row, folder: Path | None) -> Row:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        found = vae_bound(key, folder) if key["model"] in VAES else posterior(key)
        return found


def posterior(key: Row) -> Row:
    task, method, seed = TASKS[key["model"]](), key["method"], key["seed"]
    problem = task.full if method == "full" else task.problem
    args, batches = problem.args, None if method == "full" else task.batches(seed)
    args = args if batches is None else ()
    pyro.set_rng_seed(seed)
    clock, row = Clock(), {"truth": problem.truth}
    if method in ("ours", "full"):
        amortize = {"amortize": "auto"} if problem.truth == ARGUMENTS and method == "ours" else {}
        guide = ours(problem.model, **amortize)
        budget = {} if key["steps"] is None else {"num_steps": key["steps"]}
        fitted = pyro_flowvi.fit(
            problem.model, guide, *args, batches=batches, seed=seed, progress=False, **budget
        )
        row |= {"fit": repr(fitted), "taken": len(fitted.losses), "stop_reason": fitted.stop_reason}
    else:
        guide = stock(method, task)
        row["taken"] = key["steps"] or task.steps
        train_stock(problem.model, guide, args, batches, row["taken"])
    row |= clock.read() | {"mebibytes": memory("VmHWM") - AFTER_IMPORTS}
    row["passes"] = row["taken"] if method == "full" else task.passes(row["taken"])
    torch.manual_seed(seed)
    truth = read_truths().get(problem.truth)
    if truth is not None:
        row |= errors(problem.of_roots(draw_roots(guide, task)), truth)
    if key["steps"] is None and method in ("ours", "full") and task.locals and task.size <= 100_000:
        row["elbo"] = elbo(task, guide) if method == "ours" else full_elbo(task, guide)
    if problem.truth == ARGUMENTS and method == "ours" and truth is not None:
        row |= {f"new_{name}": value for name, value in errors(new_rows(guide), truth).items()}
    return row


def full_elbo(task: Task, guide: Any) -> float:
    torch.manual_seed(0)
    return -stock_elbo(ELBO_DRAWS // 4).loss(task.full.model, guide, *task.full.args)


def vae_bound(key: Row, folder: Path | None) -> Row:
    """The bound of test images, in nats each."""
    torch.set_default_dtype(torch.float32)
    name, seed, steps = VAES[key["model"]], key["seed"], key["steps"] or VAE_STEPS
    train, test = digits_vae.images(name, folder)
    pyro.set_rng_seed(seed)
    vae = digits_vae.VAE(train.shape[-1], *digits_vae.SIZES[name])
    generator = torch.Generator().manual_seed(seed)
    batches = DataLoader(
        TensorDataset(train), digits_vae.BATCH, shuffle=True, generator=generator, drop_last=True
    )
    clock = Clock()
    if key["method"] == "by hand":
        guide: Any = vae.guide
        svi = SVI(vae.model, guide, pyro.optim.Adam({"lr": digits_vae.RATE}), Trace_ELBO())
        for _, batch in zip(range(steps), again_and_again((), batches), strict=False):
            svi.step(*batch)
    else:
        guide = ours(vae.model, amortize=vae.encoder)
        # Constant, as the peer's.
        optim = pyro.optim.Adam({"lr": digits_vae.RATE})
        pyro_flowvi.fit(
            vae.model,
            guide,
            batches=batches,
            num_steps=steps,
            optim=optim,
            num_particles=1,
            seed=seed,
            progress=False,
        )
    row = clock.read() | {"taken": steps, "mebibytes": memory("VmHWM") - AFTER_IMPORTS}
    torch.manual_seed(seed)
    with torch.no_grad():
        bounds = [-stock_elbo(1).loss(vae.model, guide, test) / len(test) for _ in range(50)]
    bound = torch.tensor(bounds)
    return row | {"bound": float(bound.mean()), "bound_se": float(bound.std()) / math.sqrt(len(bounds))}


def compute_truths(models: list[str]) -> None:
    for name in models:
        problem = TASKS[name]().problem if name in TASKS else None
        if problem is None or problem.truth in read_truths():
            continue
        found = minibatch_truths.compute(problem)
        path = minibatch_truths.RESULTS
        path.write_text(json.dumps({**minibatch_truths.own_truths(), problem.truth: found}, indent=1) + "\n")
        print(f"{problem.truth}: {found['how']}, {number(found['seconds'])} s", flush=True)


def say(row: Row) -> str:
    head = f"{row['model']}, {row['method']}, seed {row['seed']}" + (
        "" if row["steps"] is None else f", {row['steps']} steps"
    )
    if "error" in row:
        return f"{head}: {row['error']}"
    told = f"{number(row['seconds'])} s, {number(row['mebibytes'], 0)} MiB"
    if "bound" in row:
        return f"{head}: {told}, bound {row['bound']:.3f}"
    return f"{head}: {told}, mean {number(row.get('worst_mean'), 3)} sd ratio {number(worst_ratio(row))}"


def plan(models: list[str], methods: list[str], seeds: int, curve: bool) -> list[Row]:
    """The runs, in their order: the seeds come last, so that all models are seen early."""
    return [
        {"model": model, "method": method, "seed": seed, "steps": steps}
        for seed in range(seeds)
        for model in models
        for method in methods
        for steps in (BUDGETS if curve else (None,))
        if applies(model, method, curve)
    ]


def applies(model: str, method: str, curve: bool) -> bool:
    """Whether a method is one for a model: a full batch has no passes, and a million rows are no batch."""
    if model in VAES:
        return method in ("ours", "by hand") and not curve
    if model == ARGUMENTS:
        return method in ("ours", "full") and not (curve and method == "full")
    if method == "full":
        return model in ("20,000 slopes",) and not curve
    return method != "by hand"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[], help="names or their starts; default all")
    parser.add_argument("--methods", nargs="+", default=[], help="names or their starts; default all")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method on each model")
    parser.add_argument("--curve", action="store_true", help="fit with growing budgets of steps")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a run")
    parser.add_argument("--core", type=int, default=FIRST_CORE, help="core to run on; -1 for any")
    parser.add_argument("--data", type=Path, help="folder with MNIST's test images")
    parser.add_argument("--output", type=Path, default=results_of("minibatches"))
    parser.add_argument("--truth", action="store_true", help="compute the posteriors, and fit nothing")
    parser.add_argument("--report", type=Path, help="print tables of this file and run nothing")
    parser.add_argument("--figure", type=Path, help="with --report: draw the curves")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report is not None:
        report(read(options.report))
        if options.figure is not None:
            draw(read(options.report), options.figure)
        return
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    if options.core >= 0:
        os.sched_setaffinity(0, {options.core})
    run = partial(run_one, folder=options.data)
    if options.one:
        print(json.dumps(attempt(json.loads(options.one), run)))
        return
    models = chosen(options.models, MODELS)
    if "VAE on MNIST" in models and options.data is None:
        print("--data names no folder: the VAE on MNIST is skipped")
        models.remove("VAE on MNIST")
    if options.truth:
        compute_truths(models)
        return
    keys = plan(models, chosen(options.methods, METHODS), options.seeds, options.curve)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    collect(keys, options.output, run, say, apart=True, timeout=options.limit)


if __name__ == "__main__":
    main()
