"""Seconds of a training step on one process and on two, and what they say of a cluster.

    python -m benchmarks.scale.scaling [--repeats 5] [--output benchmarks/results/scale.jsonl]
    python -m benchmarks.scale.scaling --report benchmarks/results/scale.jsonl

Three fits: *regression*, a logistic regression, 200,000 x 50, whose plate draws its rows; *rows*, 2,000
groups of 100 observations with a latent each; *draws*, a hierarchy of 500 latents that sees all of its data,
where processes share the draws of a step.  Each runs on one process with the work of a step and with half of
it, and on two with half of it each (*strong scaling*: as much in all) and with all of it each (*weak*).
Every process has one thread.  The runs are interleaved; what is reported are medians.

The seconds of a step are the median over the training's calls, of some steps each, after the first fifth; the
start and the comparisons do not count.  Seconds in reductions include waiting for the slower process.

*The table of a cluster is a model, not a measurement*: a step takes what is fixed, what grows with the rows
of a rank, both from one process here, and a ring's reduction of the gradient over links of a latency and a
bandwidth that are assumed.  It leaves out ranks that differ in speed, and networks that others use.
"""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_flowvi
from benchmarks.common import minibatch_models
from benchmarks.common.results import Row, append, read, results_of
from benchmarks.common.tables import markdown, median, number
from benchmarks.scale import ten_million
from pyro_flowvi.infer._training_loop import TrainingLoop

SEED = 0
NEVER = 1e-12
"""A tolerance that ends no fit before its last step."""
MARK = "measured: "
"""What the line begins with that a worker prints."""
LIMIT = 900.0
"""Seconds for a run."""
SHAPES = {"one": (1, 1.0), "one, half": (1, 0.5), "strong": (2, 0.5), "weak": (2, 1.0)}
"""Processes, and the part of a step's work that each has."""
DOUBLE = 8
"""Bytes of a number."""


# -- what is fitted ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A model and how it is fitted.

    :param make: from the work of a process in a step, model, arguments and options of ``fit``.
    :param work: of a step of one process: rows of data, groups or draws.
    :param steps: of the fit.
    :param unit: of the work.
    """

    make: Callable[[int], tuple[Any, tuple[Any, ...], dict[str, Any]]]
    work: int
    steps: int
    unit: str


def regression(each: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    # Of a plate without latents fit chooses the length of parts itself: 2,000 rows, a step mostly fixed.
    minibatches = importlib.import_module("pyro_flowvi.infer._minibatches")
    minibatches.ROWS = each
    problem = minibatch_models.logistic(200_000, 50, each).problem
    return problem.model, problem.args, {}


def groups(each: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(SEED)
    theta = 1.0 + torch.randn(2000, 1, generator=generator)
    y = theta + 2.0 * torch.randn(2000, ten_million.EACH, generator=generator)
    return ten_million.model, (y, each), {}


def hierarchy(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


def draws(each: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    y = 1.0 + 1.2 * torch.randn(498, generator=torch.Generator().manual_seed(SEED))
    return hierarchy, (y,), {"num_particles": each}


FITS = {
    "regression": Fit(regression, 8000, 200, "rows"),
    "rows": Fit(groups, 200, 200, "groups"),
    "draws": Fit(draws, 64, 400, "draws"),
}


# -- a run ---------------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[list[Any]]:
    """Keeps what knows the processes of each fit, and what they have sent.

    :raises RuntimeError: if the package's fits have one process only.
    """
    try:
        module = importlib.import_module("pyro_flowvi._launch")
    except ModuleNotFoundError as error:
        raise RuntimeError("expected a pyro_flowvi whose fits can have several processes") from error
    own, found = module.find_ranks, []

    def keeping(*args: Any, **kwargs: Any) -> Any:
        found.append(own(*args, **kwargs))
        return found[-1]

    users = [
        used
        for name, used in list(sys.modules.items())
        if name.startswith("pyro_flowvi") and getattr(used, "find_ranks", None) is own
    ]
    for used in users:
        used.find_ranks = keeping
    try:
        yield found
    finally:
        for used in users:
            used.find_ranks = own


@contextmanager
def timed(ranks: list[Any]) -> Iterator[list[tuple[int, float, float, float]]]:
    """Of each call of a training: steps, seconds, bytes and seconds in reductions.

    :param ranks: as :func:`counted` gives them; the last are those of the fit.
    """
    own, calls = TrainingLoop._steps, []

    def timing(loop: TrainingLoop, *args: Any) -> Any:
        found = ranks[-1]
        sent, reducing, started = found.bytes_reduced, found.seconds_reducing, time.perf_counter()
        taken = own(loop, *args)
        seconds = time.perf_counter() - started
        calls.append((len(taken), seconds, found.bytes_reduced - sent, found.seconds_reducing - reducing))
        return taken

    TrainingLoop._steps = timing
    try:
        yield calls
    finally:
        TrainingLoop._steps = own


def measure(name: str, each: int) -> Row:
    """Seconds, bytes and seconds in reductions of a step, on this process."""
    fit = FITS[name]
    model, args, options = fit.make(each)
    pyro.clear_param_store()
    started = time.perf_counter()
    with counted() as ranks, timed(ranks) as calls:
        guide = pyro_flowvi.AutoRealNVP(model)
        options |= {"num_steps": fit.steps, "tolerance": NEVER, "seed": SEED, "progress": False}
        fitted = pyro_flowvi.fit(model, guide, *args, **options)
    if len(fitted.losses) != fit.steps:
        raise RuntimeError(f"{name}: expected {fit.steps} steps, got {len(fitted.losses)}")
    return summary(calls) | {"fit_seconds": time.perf_counter() - started}


def summary(calls: list[tuple[int, float, float, float]]) -> Row:
    """Of a step: median and mean seconds, bytes, and seconds in reductions by their share in all."""
    kept = calls[len(calls) // 5 :]
    taken, seconds, sent, reducing = (sum(column) for column in zip(*kept, strict=True))
    step = median([spent / count for count, spent, *_ in kept])
    share = reducing / seconds
    return {"step": step, "mean_step": seconds / taken, "bytes": sent / taken, "reducing": share * step}


def worker(name: str, each: int) -> None:
    """A process of a run."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    row = measure(name, each)
    if os.environ.get("RANK", "0") == "0":
        print(MARK + json.dumps(row), flush=True)


def launch(name: str, shape: str) -> Row:
    """A run in processes of its own.

    :raises RuntimeError: if it fails.
    """
    processes, part = SHAPES[shape]
    each = round(part * FITS[name].work)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(processes), "-m", "benchmarks.scale.scaling", "--worker", name, str(each)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"{name}, {shape}: {done.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix(MARK)) | {"processes": processes, "each": each}


# -- a cluster -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a step of one process takes.

    :param fixed: seconds whatever there is to do.
    :param unit: seconds for each row, or group, or draw.
    """

    fixed: float
    unit: float

    @classmethod
    def between(cls, one: tuple[float, float], other: tuple[float, float]) -> "Cost":
        """Through two measurements of work and seconds; noise makes neither part negative."""
        (few, fast), (many, slow) = sorted((one, other))
        unit = max(0.0, (slow - fast) / (many - few))
        return cls(max(0.0, slow - unit * many), min(unit, slow / many))


@dataclass(frozen=True)
class Network:
    """Links between ranks.

    :param latency: seconds of a message.
    :param bandwidth: bytes a second.
    """

    latency: float
    bandwidth: float


NETWORKS = {"1 Gbit/s": Network(5e-5, 1.25e8), "10 Gbit/s": Network(3e-5, 1.25e9)}
RANKS = (1, 2, 4, 8, 16, 32, 64)


def reduction_seconds(parameters: float, ranks: int, network: Network, itemsize: int = DOUBLE) -> float:
    """Of a ring: each rank sends 2 (W - 1) messages of a W-th of the gradient."""
    messages = 2 * (ranks - 1)
    return messages * (network.latency + parameters * itemsize / ranks / network.bandwidth)


def step_seconds(cost: Cost, work: float, parameters: float, ranks: int, network: Network) -> float:
    """Seconds of a step by the model.

    :param work: rows, groups or draws of a step, of all ranks together.
    :param parameters: numbers that are averaged.
    """
    return cost.fixed + cost.unit * work / ranks + reduction_seconds(parameters, ranks, network)


# -- report --------------------------------------------------------------------------------------


def medians(rows: list[Row], name: str) -> dict[str, Row]:
    """By shape, of the runs of one fit."""
    found: dict[str, Row] = {}
    for shape in SHAPES:
        own = [row for row in rows if (row["fit"], row["shape"]) == (name, shape)]
        if own:
            found[shape] = {key: median([row[key] for row in own]) for key in ("step", "bytes", "reducing")}
            steps = [row["step"] for row in own]
            found[shape] |= {"runs": len(own), "low": min(steps), "high": max(steps)}
    return found


def measured(rows: list[Row], name: str) -> list[list[str]]:
    found = medians(rows, name)
    lines = []
    for shape, (processes, part) in SHAPES.items():
        if shape not in found:
            continue
        row, fit = found[shape], FITS[name]
        one = found.get("one", {}).get("step", math.nan)
        # Work in all by seconds, as a multiple of one process's.
        gain = processes * part * one / row["step"]
        lines.append(
            [
                name,
                shape,
                f"{processes} x {round(part * fit.work)} {fit.unit}",
                number(1e3 * row["step"]),
                f"{number(1e3 * row['low'])} to {number(1e3 * row['high'])}",
                number(gain),
                f"{row['bytes']:,.0f}",
                f"{100.0 * row['reducing'] / row['step']:.0f} %" if processes > 1 else "–",
            ]
        )
    return lines


def cluster(rows: list[Row], name: str) -> list[list[str]]:
    """The model's table of one fit."""
    found, work = medians(rows, name), FITS[name].work
    if not {"one", "one, half", "weak"} <= found.keys():
        return []
    cost = Cost.between((work, found["one"]["step"]), (work / 2, found["one, half"]["step"]))
    parameters = found["weak"]["bytes"] / DOUBLE
    lines = []
    for label, network in NETWORKS.items():
        alone = step_seconds(cost, work, parameters, 1, network)
        for ranks in RANKS:
            strong = step_seconds(cost, work, parameters, ranks, network)
            weak = step_seconds(cost, work * ranks, parameters, ranks, network)
            lines.append(
                [
                    name,
                    label,
                    str(ranks),
                    number(1e3 * strong),
                    number(alone / strong),
                    number(1e3 * weak),
                    f"{100.0 * alone / weak:.0f} %",
                ]
            )
    return lines


def report(rows: list[Row]) -> None:
    own = [row for row in rows if row.get("benchmark") == "scaling"]
    head = ["fit", "shape", "work", "ms a step", "range", "work a second / one's", "bytes a step", "reducing"]
    print(markdown(head, [line for name in FITS for line in measured(own, name)]))
    print("\nA model of a cluster, from these figures and assumed networks:\n")
    head = ["fit", "network", "ranks", "strong: ms", "speed-up", "weak: ms", "efficiency"]
    print(markdown(head, [line for name in FITS for line in cluster(own, name)]))
    print("".join(f"\n{told}" for told in sorted({f"{row['machine']}; {row['versions']}" for row in own})))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fits", nargs="+", default=list(FITS), choices=list(FITS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=results_of("scale"))
    parser.add_argument("--report", type=Path, help="print tables of this file and run nothing")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.report is not None:
        report(read(options.report))
        return
    if options.worker:
        worker(options.worker[0], int(options.worker[1]))
        return
    rows = []
    for repeat in range(options.repeats):
        for name in options.fits:
            for shape in SHAPES:
                row = {"benchmark": "scaling", "fit": name, "shape": shape, "repeat": repeat}
                rows.append(row := append(options.output, row | launch(name, shape)))
                print(f"{name}, {shape}, {repeat}: {1e3 * row['step']:.2f} ms", flush=True)
    report(rows)


if __name__ == "__main__":
    main()
