"""``pyro-flowvi fit``: a model's file and its data to draws, a summary and a verdict."""

import argparse
import difflib
import inspect
import sys
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyro
import torch

from . import autoguide
from ._checks import check_positive, check_positive_int
from ._files import arguments_of, as_floats, load_data, load_model, single_values, stacked_columns
from ._program.param_store import apart_from_store
from .autoguide import AutoFlow
from .diagnostics import diagnose, to_arviz
from .flows import FLOWS
from .infer import fit

__all__ = ["FAILED", "GOOD", "INTERRUPTED", "MISUSED", "POOR", "Prepared", "add_options", "prepare", "run"]

GOOD, FAILED, MISUSED, POOR, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes."""
NAMED: Final = sorted(set(autoguide.__all__) - {"GUIDES", "AutoFlow"})
DTYPES: Final = {"float32": torch.float32, "float64": torch.float64}


class Prepared(NamedTuple):
    """What was read and checked before a fit begins: all that a user can get wrong on the command line."""

    model: Callable[..., Any]
    data: dict[str, Any]
    guide: Any


def number(text: str) -> int:
    """A positive integer from the command line."""
    return check_positive_int("", int(text) if text.isdecimal() else text)


def positive(text: str) -> float:
    """A positive number from the command line."""
    return check_positive("", float(text))


def seed(text: str) -> int:
    """An integer from 0 on, less than 2^32, as Pyro's seeds are."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise ValueError
    return int(text)


def checked(kind: Callable[[str], Any], what: str) -> Callable[[str], Any]:
    """A type of argparse, with an error that says what was expected and what came."""

    def convert(text: str) -> Any:
        try:
            return kind(text)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}") from None

    return convert


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``fit``."""
    integer = checked(number, "a positive integer")
    real = checked(positive, "a positive number")
    add = parser.add_argument
    add("--model", required=True, metavar="PATH.py:NAME", help="your Pyro model")
    add("--data", metavar="FILE", help="its arguments: .json, .npz, or a table: .csv, .tsv, .parquet")
    add(
        "--columns",
        action="append",
        default=[],
        metavar="NAME=COL,COL",
        help="columns of the table that make one argument: a matrix; one column: a vector",
    )
    add(
        "--arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a single value of the model's, read as JSON, else text; overrides that of --data",
    )
    add(
        "--float",
        action="append",
        default=[],
        metavar="NAME",
        dest="floats",
        help="an argument whose integers are measurements, not counts: makes it floating",
    )
    add("--guide", default="AutoRealNVP", metavar="NAME", help=f"{', '.join(NAMED)}, or a key of FLOWS")
    add(
        "--guide-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the guide, such as num_components=3",
    )
    add("--seed", type=checked(seed, "an integer from 0 to 4294967295"), default=0, help="by default 0")
    add("--num-steps", type=integer, metavar="N", help="gradient steps at most")
    add("--num-particles", type=integer, metavar="N", help="draws per step")
    add("--lr", type=real, help="the highest learning rate")
    add("--tolerance", type=real, metavar="NATS", help="how near to the evidence the fit may end")
    add(
        "--dtype",
        type=checked(DTYPES.__getitem__, "float32 or float64"),
        default=torch.float32,
        metavar="NAME",
        help="float32 (default) or float64",
    )
    add("--checkpoint", metavar="FILE", help="written every half minute; if it is there, the fit goes on")
    add("--output", metavar="FILE", help="where to save draws: .npz, or .nc (ArviZ's netCDF)")
    add("--num-samples", type=integer, metavar="N", default=4000, help="how many; by default 4000")
    add("--resample", action="store_true", help="save draws resampled by importance weights")
    add("--no-diagnose", action="store_false", dest="diagnose", help="leave the verdict out")
    add("--fail-if-poor", action="store_true", help=f"exit with {POOR} if the verdict is poor")


def prepare(options: argparse.Namespace) -> Prepared:
    """Reads and checks everything that the options name.

    :raises ValueError: naming the option, what was expected and what came.
    """
    if options.fail_if_poor and not options.diagnose:
        raise ValueError("--fail-if-poor: expected a verdict, got --no-diagnose")
    for option, path in (("--output", options.output), ("--checkpoint", options.checkpoint)):
        if path is not None and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise ValueError(f"{option}: expected a file in a folder that exists, got {path!r}")
    if options.output is not None:
        check_output(options.output)
    elif options.resample:
        raise ValueError("--resample: expected --output with it, which it changes")
    make = guide_named(options.guide)
    single, columns = single_values("--arg", options.arg), stacked_columns(options.columns)
    guide_args = single_values("--guide-arg", options.guide_arg)
    model = load_model(options.model)
    if columns and options.data is None:
        raise ValueError("--columns: expected --data with it")
    data = {} if options.data is None else load_data(options.data, model, columns)
    data = as_floats(arguments_of(model, data, single), options.floats)
    takes = sorted(set(inspect.signature(make).parameters) - {"model", "name"})
    if unknown := sorted(set(guide_args) - set(takes)):
        raise ValueError(f"--guide-arg: expected some of {', '.join(takes)}, got {unknown[0]!r}")
    try:
        guide = make(model, **guide_args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--guide-arg: {error}") from error
    return Prepared(model, data, guide)


def check_output(path: str) -> None:
    """Whether draws can be saved there: before the fit, not after it.

    :raises ValueError: for another ending, or where ArviZ is not installed.
    """
    ending = Path(path).suffix.lower()
    if ending not in (".npz", ".nc"):
        raise ValueError(f"--output: expected a file that ends in .npz or .nc, got {path!r}")
    if ending == ".nc":
        try:
            import arviz  # noqa: F401
        except ImportError as error:
            install = "pip install 'pyro-flowvi[arviz]'"
            raise ValueError(f"--output: expected ArviZ for {path!r} ({install}), got {error}") from error


def guide_named(name: str) -> Callable[..., Any]:
    """What makes a guide of a model, by the name of its class or by the key of its flow.

    :raises ValueError: for another name, with the nearest.
    """
    if name in NAMED:
        found: Callable[..., Any] = getattr(autoguide, name)
        return found
    if name in FLOWS:
        return partial(AutoFlow, flow=name)
    near = difflib.get_close_matches(name, [*NAMED, *FLOWS], 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    known = f"one of {', '.join(NAMED)}, or of the flows {', '.join(FLOWS)}"
    raise ValueError(f"--guide: expected {known}, got {name!r}{hint}")


def run(options: argparse.Namespace, prepared: Prepared) -> int:
    """Fits, saves the draws, prints the summary and the verdict; the exit code."""
    model, data, guide = prepared
    with apart_from_store():  # leaves the caller's parameters alone
        try:
            result = fit(
                model,
                guide,
                num_steps=options.num_steps,
                num_particles=options.num_particles,
                lr=options.lr,
                tolerance=options.tolerance,
                checkpoint=options.checkpoint,
                seed=options.seed,
                model_kwargs=data,
                progress=not options.quiet,
            )
        except KeyboardInterrupt:
            return interrupted(options, "before the first step", None)
        tell(options, str(result))
        if options.output is not None:
            save_draws(options, prepared)  # before the verdict, which may take longer than the patience
        print(guide.summary(), flush=True)
        if result.stop_reason == "interrupted":
            return interrupted(options, "this is the best state so far", options.output)
        if not options.diagnose:
            return GOOD
        tell(options, "judging the fit")
        try:
            diagnosis = diagnose(model, guide, seed=options.seed, fit_result=result, model_kwargs=data)
        except KeyboardInterrupt:
            return interrupted(options, "before the verdict", options.output)
    print(f"\n{diagnosis}")
    return POOR if options.fail_if_poor and diagnosis.verdict == "poor" else GOOD


def interrupted(options: argparse.Namespace, when: str, output: str | None) -> int:
    """Says on stderr what Ctrl-C has left."""
    kept = "no draws were saved" if output is None else f"draws are in {output}"
    there = options.checkpoint is not None and Path(options.checkpoint).exists()
    more = f"; the same command goes on from {options.checkpoint}" if there else ""
    print(f"interrupted: {when}; {kept}{more}", file=sys.stderr)
    return INTERRUPTED


def tell(options: argparse.Namespace, words: str) -> None:
    """What is not the result, on stderr."""
    if not options.quiet:
        print(words, file=sys.stderr, flush=True)


@torch.no_grad()
def save_draws(options: argparse.Namespace, prepared: Prepared) -> None:
    """Draws of the guide in the file of ``--output``."""
    model, data, guide = prepared
    if Path(options.output).suffix.lower() == ".nc":
        to_arviz(
            model,
            guide,
            num_samples=options.num_samples,
            resample=options.resample,
            seed=options.seed,
            model_kwargs=data,
        ).to_netcdf(options.output)
    else:
        pyro.set_rng_seed(options.seed)  # the same draws from a checkpoint that had ended
        draws = guide.sample_posterior(options.num_samples, resample=options.resample)
        write_arrays(options.output, {name: value.cpu().numpy() for name, value in draws.items()})
    tell(options, f"draws: {options.output}")


def write_arrays(path: str, arrays: Mapping[str, Any]) -> None:
    """An .npz of arrays with any names, also those of arguments of numpy's ``savez``."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
