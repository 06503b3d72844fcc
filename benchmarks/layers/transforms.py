"""Time every family of layers against the same layer in Pyro, zuko, normflows and nflows.

Two tasks, float32, on one batch shared by all:

- *train*: forward, log-determinant and the gradient of ``sum(y**2) + sum(log_det)`` with respect to the
  input and to all parameters;
- *inverse*: inverse and its log-determinant, without gradients.

Each is timed *eager* and *compiled*: ``torch.compile`` of the whole flow, in one graph where that works (a
star marks where it does not), the time to compile left out: it is stated at the end, and short where torch
finds the code in its cache.  Before it is timed a variant has to give finite log-determinants of the right
shape, an inverse that inverts, and compiled the numbers that it gives eager ("wrong result" where it does
not: torch 2.13 compiles the gradient of some peers' splines wrongly, by float64).

The variants of a row, both modes, take turns in every round, so that a disturbance of the machine meets all
of them; milliseconds are those of the CPU, of which other work takes none.  The tables have medians over
rounds and ratios ours / fastest peer, with an interval over rounds::

    python -m benchmarks.layers.transforms [--flows planar radial] [--mode eager] [--rounds 30]
        [--output FILE]

The peers come with ``pip install "pyro-flowvi[bench]"``; one that is not installed is left out.  How their
layers differ from ours is said in ``peers.py``.
"""

import argparse
import contextlib
import gc
import logging
import signal
import statistics
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.results import append, has, read, results_of
from benchmarks.layers.peers import FLOWS, INSTALLED, NETWORK_FLOWS, OURS, PEERS, Variant, build

Call = Callable[[], tuple[Tensor, ...]]
Ratio = tuple[str, float, float, float]
"""Name of the peer, and ours / that peer: median, 2.5 and 97.5 % quantiles."""

EAGER = "eager"
COMPILED = "compiled"
MIN_ROUNDS = 7
TOO_LONG = "compiles too long"


@dataclass
class Row:
    """Milliseconds a call by library, or why there are none."""

    flow: str
    num_layers: int
    task: str
    rounds: int = 0
    eager: dict[str, float | str] = field(default_factory=dict)
    compiled: dict[str, float | str] = field(default_factory=dict)
    broken_graph: list[str] = field(default_factory=list)
    compile_seconds: dict[str, float] = field(default_factory=dict)
    eager_ratio: Ratio | None = None
    compiled_to_eager: Ratio | None = None
    compiled_ratio: Ratio | None = None


def task_calls(
    variant: Variant, task: str, batch: Tensor
) -> tuple[Callable[..., Any], Callable[[Any], Call]]:
    """The function to compile, and what makes of it, compiled or not, the call to time."""
    if task == "inverse":
        inverse = variant.inverse
        assert inverse is not None

        def plain(function: Any) -> Call:
            def call() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    # A fresh object, without a copy: Pyro answers from its cache for one that it has seen.
                    result: tuple[Tensor, ...] = function(batch.detach())
                    return result

            return call

        return lambda y: inverse(y), plain

    params = list(variant.module.parameters())

    def objective(x: Tensor) -> Tensor:
        y, log_det = variant.forward(x)
        return y.square().sum() + log_det.sum()

    def with_gradient(function: Any) -> Call:
        def call() -> tuple[Tensor, ...]:
            x = batch.detach().requires_grad_()
            return torch.autograd.grad(function(x), [x, *params])

        return call

    return objective, with_gradient


def check(variant: Variant, task: str, batch: Tensor) -> None:
    """Raises unless the variant does what it is timed for."""
    with torch.no_grad():
        y, log_det = variant.forward(batch.clone())
        results = [(y, log_det)]
        if task == "inverse":
            assert variant.inverse is not None
            back, log_det_back = variant.inverse(y.clone())
            results.append((back, log_det_back))
            # The median: a spline in float32 may miss a few values by more.
            error = torch.maximum((back - batch).abs().median(), (log_det + log_det_back).abs().median())
            if not error < 1e-2:
                raise ValueError("wrong inverse")
    for value, part in results:
        if value.shape != batch.shape or part.shape != batch.shape[:1]:
            raise ValueError("wrong shape")
        if not (value.isfinite().all() and part.isfinite().all()):
            raise ValueError("not finite")


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises TimeoutError where the block takes longer; on systems without alarms it may."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    fired = False

    def stop(*_: object) -> None:
        nonlocal fired
        fired = True
        raise TimeoutError(TOO_LONG)

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    except Exception as error:
        if fired:  # the compiler makes errors of its own from what stops it
            raise TimeoutError(TOO_LONG) from error
        raise
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def compiled_call(
    function: Any, make: Callable[[Any], Call], expected: tuple[Tensor, ...], limit: int
) -> tuple[Call, bool]:
    """The compiled call, after its first runs, and whether it is one graph."""
    fullgraph = True
    while True:
        # A code object of its own: torch keeps graphs by code object, and those of the other variants would
        # be tried first at every call.
        code = function.__code__.replace()
        own = types.FunctionType(code, function.__globals__, closure=function.__closure__)
        call = make(torch.compile(own, fullgraph=fullgraph, dynamic=False))
        try:
            with at_most(limit):
                result = call()
                call()
            break
        except Exception as error:
            if not fullgraph or isinstance(error, TimeoutError):
                raise
            fullgraph = False
    # A rotation leaves the objective alone: the gradient of its parameters is zero, and what is there noise.
    noise = 1e-3 * max(float(right.norm()) for right in expected)
    for value, right in zip(result, expected, strict=True):
        if not (value - right).norm() <= 1e-2 * right.norm() + noise:
            raise ValueError("wrong result")
    return call, fullgraph


def reason(error: Exception) -> str:
    """A few words for a cell of the table."""
    known = isinstance(error, ValueError | TimeoutError) and len(str(error)) < 30
    return str(error) if known else f"fails: {type(error).__name__}"


def prepare(row: Row, options: argparse.Namespace) -> dict[tuple[str, str], Call]:
    """The calls of a row by (library, mode); what cannot be timed is noted in the row."""
    torch.compiler.reset()
    calls = {}
    torch.manual_seed(0)
    batch = torch.randn(options.batch, options.dim)
    for library in (OURS, *INSTALLED):
        variant = build(library, row.flow, options.dim, row.num_layers, row.task)
        if variant is None or (row.task == "inverse" and variant.inverse is None):
            continue
        with torch.no_grad():
            for param in variant.module.parameters():
                param.add_(0.1 * torch.randn_like(param))  # ours start as the identity: leave it
        try:
            check(variant, row.task, batch)
            function, make = task_calls(variant, row.task, batch)
            eager = make(function)
            expected = eager()
        except Exception as error:  # the peer's, whatever it is, belongs in the table
            row.eager[library] = row.compiled[library] = reason(error)
            continue
        if options.mode != COMPILED or library != OURS:
            calls[library, EAGER] = eager  # of the peers always: the compiled ratio needs them
        if options.mode == EAGER:
            continue
        start = time.perf_counter()
        try:
            call, whole = compiled_call(function, make, expected, options.compile_limit)
        except Exception as error:
            row.compiled[library] = reason(error)
            continue
        row.compile_seconds[library] = round(time.perf_counter() - start, 1)
        calls[library, COMPILED] = call
        if not whole:
            row.broken_graph.append(library)
    return calls


def interleaved_ms(
    calls: dict[tuple[str, str], Call], options: argparse.Namespace
) -> dict[tuple[str, str], list[float]]:
    """Milliseconds a call, one number a round for each variant; the order rotates."""
    loops = {}
    for name, call in calls.items():
        call()
        start = time.process_time()
        call()
        loops[name] = max(1, min(64, round(1e-3 * options.slice / (time.process_time() - start))))
    times: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    names = list(calls)
    rounds, began = options.rounds, time.perf_counter()
    step = -1  # the first round warms up
    while step < rounds:
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            call, loop = calls[name], loops[name]
            start = time.process_time()
            for _ in range(loop):
                call()
            elapsed = time.process_time() - start
            if step >= 0:
                times[name].append(1e3 * elapsed / loop)
        if step < 0:
            fitting = int(options.row_seconds / (time.perf_counter() - began))
            rounds = min(rounds, max(MIN_ROUNDS, fitting))
        step += 1
    return times


def ratio(times: dict[tuple[str, str], list[float]], mode: str, peer_mode: str) -> Ratio | None:
    """Ours / fastest peer, round by round."""
    medians = {
        name: statistics.median(times[name, peer_mode]) for name in PEERS if (name, peer_mode) in times
    }
    if not medians or (OURS, mode) not in times:
        return None
    fastest = min(medians, key=lambda name: medians[name])
    ratios = torch.tensor(times[OURS, mode]) / torch.tensor(times[fastest, peer_mode])
    middle, low, high = ratios.quantile(torch.tensor([0.5, 0.025, 0.975])).tolist()
    return fastest, middle, low, high


def measure(row: Row, options: argparse.Namespace) -> Row:
    calls = prepare(row, options)
    gc.collect()
    if not calls:
        return row
    times = interleaved_ms(calls, options)
    row.rounds = len(next(iter(times.values())))
    for (library, mode), values in times.items():
        (row.eager if mode == EAGER else row.compiled)[library] = statistics.median(values)
    row.eager_ratio = ratio(times, EAGER, EAGER)
    row.compiled_to_eager = ratio(times, COMPILED, EAGER)
    row.compiled_ratio = ratio(times, COMPILED, COMPILED)
    return row


def _cell(row: Row, mode: str, library: str) -> str:
    if library != OURS and library not in INSTALLED:
        return "not installed"
    value = (row.eager if mode == EAGER else row.compiled).get(library, "none")
    if isinstance(value, str):
        return value
    return f"{value:.3f}" + ("*" if mode == COMPILED and library in row.broken_graph else "")


def _verdict(value: Ratio | None) -> str:
    return "no peer" if value is None else "{1:.2f} ({2:.2f} to {3:.2f}), {0}".format(*value)


def markdown(rows: list[Row], mode: str) -> str:
    """The rows as a Markdown table, milliseconds a call."""
    columns = (OURS, *PEERS)
    verdicts = ["ours / fastest peer"] if mode == EAGER else ["ours / fastest peer, eager", "both compiled"]
    lines = [f"| flow, {mode} | K | task | " + " | ".join([*columns, *verdicts]) + " |"]
    lines.append("|" + "---|" * (len(columns) + len(verdicts) + 3))
    for row in rows:
        ratios = [row.eager_ratio] if mode == EAGER else [row.compiled_to_eager, row.compiled_ratio]
        cells = [_cell(row, mode, name) for name in columns] + [_verdict(value) for value in ratios]
        lines.append(f"| {row.flow} | {row.num_layers} | {row.task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _report(rows: list[Row], mode: str) -> None:
    """The tables, and what the compilation took."""
    for one in (EAGER, COMPILED):
        if mode in (one, "both"):
            print("\n" + markdown(rows, one))
    if mode != EAGER:
        print("\nSeconds to compile, median over rows (largest):", end="")
        for library in (OURS, *INSTALLED):
            seconds = [row.compile_seconds[library] for row in rows if library in row.compile_seconds]
            if seconds:
                print(f" {library} {statistics.median(seconds):.1f} ({max(seconds):.1f});", end="")
        print("\n*: torch.compile breaks it into several graphs.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS), metavar="FLOW")
    parser.add_argument("--tasks", nargs="+", choices=("train", "inverse"), default=["train", "inverse"])
    parser.add_argument("--mode", choices=(EAGER, COMPILED, "both"), default="both")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--layers", type=int, nargs="+", help="default: 1 and 8, with networks 1 and 4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30, help="at least 15 for a usable interval")
    parser.add_argument("--slice", type=float, default=20.0, help="milliseconds of a variant in a round")
    parser.add_argument(
        "--row-seconds", type=float, default=60.0, help="fewer rounds where a row takes longer"
    )
    parser.add_argument("--compile-limit", type=int, default=300, help="seconds, of one variant")
    parser.add_argument("--output", type=Path, default=results_of("transforms"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_default_dtype(torch.float32)
    logging.getLogger("torch").setLevel(logging.ERROR)  # what fails to compile is in the table
    for kind in (UserWarning, FutureWarning):  # of torch, about what nflows and its own compiler call
        warnings.filterwarnings("ignore", category=kind)
    setting = {"batch": options.batch, "dim": options.dim, "threads": options.threads, "mode": options.mode}
    print(f"CPU milliseconds a call, medians of up to {options.rounds} rounds, float32: {setting}.")
    done, rows = read(options.output), []
    for flow in options.flows:
        for num_layers in options.layers or ([1, 4] if flow in NETWORK_FLOWS else [1, 8]):
            for task in options.tasks:
                key = {"flow": flow, "num_layers": num_layers, "task": task} | setting
                if has(done, key):
                    continue
                rows.append(measure(Row(flow, num_layers, task), options))
                append(options.output, asdict(rows[-1]) | setting)
    _report(rows, options.mode)


if __name__ == "__main__":
    main()
