"""Time a step of SVI: eager Pyro, compiled Pyro (``CompiledSVI``) and NumPyro, interleaved in one run.

    python -m benchmarks.steps.svi_step [--rows REGEX | --quick] [--rounds 7] [--output FILE]

A row is ``model/guide/particles``; ``--help`` has more options.  All systems have the same float32 data,
vectorized particles, and Adam with rate 1e-2.  torch has one thread, and the process is pinned to one core,
since XLA, which is asked for one thread, may use more (``--core -1`` leaves it free).  NumPyro comes with the
extra ``bench``; without it its columns are empty.  Its guides have the same sizes, not the same program: IAF
is two flows of masked ReLU networks with two hidden layers as wide as the latent space on both sides,
started and permuted differently; there is no planar guide.  Its mixture is the marginal
``MixtureSameFamily``, since its ``TraceEnum_ELBO`` needs funsor: less work than Pyro's enumeration.

CPU milliseconds a step, of all threads of the process, from about 0.2 s of steps, at least 5, a round, in
which the systems take turns:

- *eager*: ``pyro.infer.SVI.step``, with validation as Pyro has it by default unless ``--no-validation``;
- *step* and *run*: those of ``CompiledSVI``; each loss becomes a Python number.  Both include the eager
  comparisons that CompiledSVI makes at the 10th, 100th, ... call, most of which fall into the warm-up;
- *update*: ``jax.jit(svi.update)`` in a loop that waits for the last loss only;
- *scan*: NumPyro's run.  ``svi.run`` compiles its ``lax.scan`` anew at every call, so that here the scan over
  ``svi.update``, of up to 1,000 steps, is jitted once, the data being arguments, and called again.

Figures are medians over rounds, ratios medians of the rounds' ratios with the sign test's interval: order
statistics at a level of at least 95 %, which takes 6 rounds; fewer give their range.

*Compile* is the seconds of the first two calls of ``step``, an eager one, after which the graph is built, and
a compiled one, by the clock; the first row also pays for what is set up once.  For the rows of ``--compile``
two fresh processes, on all cores, measure it, imports apart: *cold* with an empty Inductor cache, *warm* with
that of the first.  NumPyro's is the first jitted update.  *Break-even* is compile (cold if known) / (eager -
run).

*MiB*, for the rows of ``--memory``, on Linux: growth of the resident set to its peak within 200 steps, in a
fresh process that has warmed up, compiled, and returned what it freed; in brackets the peak, which also has
the libraries, the compiler, and what a compiled step holds for good.

Targets are marked + (met) or - (missed); a ratio meets one that its interval includes.  Eager / compiled, for
step and run: at least 20 on eight schools, 40 for its flow guides with 16 particles, and 1 on rows that are
bound by arithmetic (``Row.eager_target``).  Compiled / NumPyro, for step and run: at most 1 on every row.
Compile, planar x 8 with 16 particles: at most 10 s cold, 3 s warm.  Memory: growth not above eager's.
"""

import argparse
import ctypes
import gc
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions.transforms import iterated, planar
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, autoguide, config_enumerate
from scipy.stats import binom

from benchmarks.common.results import append, has, read, results_of
from benchmarks.common.step_models import MODELS, arrays
from pyro_flowvi import AutoPlanar, CompiledSVI
from pyro_flowvi.infer import CannotCompile

PACKAGES = [name for name in ("torch", "pyro", "jax", "numpyro") if importlib.util.find_spec(name)]
XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
LEARNING_RATE, SECONDS, MAX_SCAN, MEMORY_STEPS = 0.01, 0.2, 1000, 200
QUICK = r"^eight schools/(diagonal|planar x 8)/16$|^logistic 1,000 x 20/diagonal/1$"
COMPILE = r"^eight schools/(diagonal/1|planar x 8/16)$"
MEMORY = r"^logistic 100,000 x 50/.*/16$|^hierarchical/"
RATIOS = ("eager / step", "eager / run", "step / update", "run / scan")
COLUMNS = (
    *("model", "guide", "particles", "eager", "step", "run", "update", "scan", *RATIOS),
    *("compile", "cold", "warm", "NumPyro's", "break-even", "MiB eager", "MiB compiled"),
)
FIRST_CORE = 0 if hasattr(os, "sched_setaffinity") else -1
COMPILE_TARGETS = {"cold": 10.0, "warm": 3.0}
COMPILER = "torch._inductor.compile_fx"
Figures = dict[str, Any]
"""By column: milliseconds or seconds; ratios as median, low, high; memory as growth, peak."""
Call = Callable[[int], int]
"""Takes that many steps, or a few more: how many."""
FLOWS = ("IAF", "planar x 8", "Pyro planar x 8")


@dataclass(frozen=True)
class Row:
    model: str
    guide: str
    particles: int

    @property
    def name(self) -> str:
        return f"{self.model}/{self.guide}/{self.particles}"

    @property
    def is_sensible(self) -> bool:
        """At most 4 million terms; covariances and flows up to 100 latents; Pyro's planar layers once."""
        _, dim, num_observations = MODELS[self.model]
        small = self.particles * num_observations <= 4e6 and (self.guide == "diagonal" or dim <= 100)
        return small and (self.guide != FLOWS[-1] or self.model == "eight schools")

    @property
    def eager_target(self) -> float | None:
        """How often faster than eager a step is to be; from 100,000 terms on it is bound by arithmetic."""
        if self.model == "eight schools":
            return 40.0 if self.guide in FLOWS and self.particles == 16 else 20.0
        return 1.0 if self.particles * MODELS[self.model][2] >= 100_000 else None


GRID = itertools.product(MODELS, ("diagonal", "MVN", *FLOWS), (1, 16, 256))
ROWS = [row for row in itertools.starmap(Row, GRID) if row.is_sensible]


def pyro_svi(row: Row, compiled: bool) -> tuple[Any, list[torch.Tensor]]:
    """The SVI of a row and the arguments of its steps."""
    pyro.set_rng_seed(0)
    dim = MODELS[row.model][1]
    model = latent = partial(MODELS[row.model][0], pyro, pyro.distributions)
    if row.model == "mixture":
        model, latent = config_enumerate(model), poutine.block(model, hide=["z"])
    guide = {
        "diagonal": autoguide.AutoDiagonalNormal,
        "MVN": autoguide.AutoMultivariateNormal,
        "IAF": partial(autoguide.AutoIAFNormal, hidden_dim=[dim, dim], num_transforms=2),
        "planar x 8": partial(AutoPlanar, num_layers=8),
        "Pyro planar x 8": lambda m: autoguide.AutoNormalizingFlow(m, partial(iterated, 8, planar)),
    }[row.guide](latent)
    elbo = TraceEnum_ELBO if row.model == "mixture" else Trace_ELBO
    nesting = 2 if row.model == "hierarchical" else 1
    loss = elbo(num_particles=row.particles, vectorize_particles=True, max_plate_nesting=nesting)
    programs = model, guide, pyro.optim.Adam({"lr": LEARNING_RATE}), loss
    svi = CompiledSVI(*programs, compile=True) if compiled else SVI(*programs)
    return svi, [torch.from_numpy(values) for values in arrays(row.model)]


def pyro_calls(row: Row, compiled: bool, figures: Figures) -> dict[str, Call]:
    svi, args = pyro_svi(row, compiled)
    scope: dict[str, Any] = {"params": {}, "constraints": {}}  # its own: guides of a kind share their names

    def take(name: str, count: int) -> int:
        with pyro.get_param_store().scope(scope):
            if name == "run":
                losses = svi.run(count, *args, progress=False)
            else:
                losses = [svi.step(*args) for _ in range(count)]
            figures["last loss"][name] = float(losses[-1])
        return count

    calls = {name: partial(take, name) for name in (("step", "run") if compiled else ("eager",))}
    if compiled:
        figures["compile"] = 2 * seconds_a_step(calls["step"], 2, time.perf_counter)
    return calls


def numpyro_calls(row: Row, figures: Figures) -> dict[str, Call]:
    import jax
    import numpyro
    from jax.example_libraries.stax import Relu
    from numpyro.infer import SVI, Trace_ELBO, autoguide

    model, dim = partial(MODELS[row.model][0], numpyro, numpyro.distributions), MODELS[row.model][1]
    iaf = partial(autoguide.AutoIAFNormal, hidden_dims=[dim, dim], num_flows=2, nonlinearity=Relu)
    guides = {"diagonal": autoguide.AutoDiagonalNormal, "MVN": autoguide.AutoMultivariateNormal, "IAF": iaf}
    if row.guide not in guides:
        return {}
    svi = SVI(model, guides[row.guide](model), numpyro.optim.Adam(LEARNING_RATE), Trace_ELBO(row.particles))
    args = [jax.numpy.asarray(values) for values in arrays(row.model)]
    states = dict.fromkeys(("update", "scan"), svi.init(jax.random.PRNGKey(0), *args))

    def take(name: str, steps: Callable[..., Any], length: int, count: int) -> int:
        for _ in range(calls := math.ceil(count / length)):
            states[name], losses = steps(states[name], *args)
        figures["last loss"][name] = float(losses.reshape(-1)[-1])
        return calls * length

    updates = partial(take, "update", jax.jit(svi.update), 1)
    figures["NumPyro's"] = seconds_a_step(updates, 1, time.perf_counter)
    length = min(MAX_SCAN, steps_for(updates))

    @jax.jit
    def scan(state: Any, *args: Any) -> Any:
        return jax.lax.scan(lambda s, _: svi.update(s, *args), state, None, length=length)

    return {"update": updates, "scan": partial(take, "scan", scan, length)}


def seconds_a_step(call: Call, count: int, clock: Callable[[], float] = time.process_time) -> float:
    """CPU seconds of this process, of which other work on the machine takes none."""
    start, taken = clock(), call(count)
    return (clock() - start) / taken


def steps_for(call: Call) -> int:
    """Warms up; the number of steps that take about 0.2 s, at least 5."""
    count = call(5)
    while (seconds := seconds_a_step(call, count)) * count < SECONDS / 4:
        count *= 4
    return max(5, round(SECONDS / seconds))


def measure(row: Row, rounds: int, figures: Figures) -> None:
    """Fills in what is timed in this process."""
    calls = pyro_calls(row, False, figures)
    try:
        calls |= pyro_calls(row, True, figures)
    except CannotCompile as cause:
        figures["note"] = f"; cannot compile: {cause}"
    if "numpyro" in PACKAGES:
        calls |= numpyro_calls(row, figures)
    counts = {name: steps_for(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(1e3 * seconds_a_step(calls[name], counts[name]))
    figures |= {name: float(np.median(values)) for name, values in times.items()}
    skip = max(0, int(binom.ppf(0.025, rounds, 0.5)) - 1)
    for column in RATIOS:
        above, below = column.split(" / ")
        if above in times and below in times:
            ranked = sorted(a / b for a, b in zip(times[above], times[below], strict=True))
            figures[column] = float(np.median(ranked)), ranked[skip], ranked[-1 - skip]
    if (gain := figures["eager"] - figures.get("run", math.inf)) > 0:
        figures["break-even"] = round(1e3 * figures.get("cold", figures["compile"]) / gain)
    wrong = [name for name, loss in figures["last loss"].items() if not math.isfinite(loss)]
    figures["note"] += f"; last loss not finite: {', '.join(wrong)}" if wrong else ""


def work(kind: str, row: Row) -> float | tuple[float, float]:
    """What a process of its own measures: seconds for "compile", MiB for "eager" and "compiled"."""
    if kind != "eager":
        importlib.import_module(COMPILER)  # not to be timed
    call, *_ = pyro_calls(row, kind != "eager", figures := {"last loss": {}}).values()
    if kind == "compile":
        return figures["compile"]

    def peak() -> float:
        return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024

    call(10)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    call(MEMORY_STEPS)
    return peak() - before, peak()


def measure_apart(row: Row, options: argparse.Namespace) -> Figures:
    """What fresh processes measure."""
    figures: Figures = asdict(row) | {"note": "", "last loss": {}}
    with tempfile.TemporaryDirectory() as cache:

        def ask(kind: str) -> Any:
            command = [
                sys.executable,
                "-m",
                __spec__.name,
                "--work",
                kind,
                "--rows",
                f"^{re.escape(row.name)}$",
            ]
            env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
            return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)

        if re.search(options.compile, row.name):
            figures |= {column: ask("compile") for column in ("cold", "warm")}
        if re.search(options.memory, row.name):
            figures |= {f"MiB {kind}": ask(kind) for kind in ("eager", "compiled")}
    return figures


def cell(row: Row, figures: Figures, column: str) -> str:
    if column not in figures:
        return ""
    value, met = figures[column], None
    if column in RATIOS:
        text = "{:.3g} ({:.3g} to {:.3g})".format(*value)
        met = value[1] <= 1.0 if "eager" not in column else row.eager_target and value[2] >= row.eager_target
    elif column.startswith("MiB"):
        text = "{:.1f} ({:.0f})".format(*value)
        met = value[0] <= figures["MiB eager"][0] if column == "MiB compiled" else None
    else:
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        if column in COMPILE_TARGETS and (row.guide, row.particles) == ("planar x 8", 16):
            met = value <= COMPILE_TARGETS[column]
    return text if met is None else f"{text} {'+' if met else '-'}"


def setting(options: argparse.Namespace) -> str:
    versions = ", ".join(f"{name} {importlib.import_module(name).__version__}" for name in PACKAGES)
    pinned = f"pinned to core {options.core}" if options.core >= 0 else "not pinned"
    eager = f"eager {'without' if options.no_validation else 'with'} validation"
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    cpu = re.findall(r"model name\s*: (.*)", info)[:1]
    about = ("float32", f"1 thread {pinned}", f"{options.rounds} rounds", eager, versions, *cpu)
    return f"{', '.join(about)}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="regular expression: only rows whose name it matches")
    parser.add_argument("--quick", action="store_true", help="three small rows")
    parser.add_argument("--rounds", type=int, default=7, help="at least 6 for a usable interval")
    parser.add_argument("--compile", default=COMPILE, help="rows that fresh processes compile")
    parser.add_argument("--memory", default=MEMORY, help="rows whose memory fresh processes measure")
    parser.add_argument("--core", type=int, default=FIRST_CORE, help="core to run on; -1 for any")
    parser.add_argument("--no-validation", action="store_true", help="eager Pyro without validation")
    parser.add_argument("--output", type=Path, default=results_of("svi_step"))
    parser.add_argument("--work", choices=("compile", "eager", "compiled"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(not options.no_validation)
    rows = [row for row in ROWS if re.search(QUICK if options.quick else options.rows, row.name)]
    if options.work:
        return print(json.dumps(work(options.work, rows[0])))
    how = {"rounds": options.rounds, "validation": not options.no_validation}
    done = read(options.output)
    rows = [row for row in rows if not has(done, asdict(row) | how)]
    results = [(row, measure_apart(row, options)) for row in rows]  # before this process is pinned
    if options.core >= 0:
        os.sched_setaffinity(0, {options.core})
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}"  # before jax is imported
    importlib.import_module(COMPILER)  # not to be timed
    print(f"CPU milliseconds a step: {setting(options)}.\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for row, figures in results:
            measure(row, options.rounds, figures)
            append(options.output, figures | how)
            print(f"| {' | '.join(cell(row, figures, column) for column in COLUMNS)} |", flush=True)
    print("".join(f"\n{row.name}{figures['note']}" for row, figures in results if figures["note"]))


if __name__ == "__main__":
    main()
