"""``pyro-flowvi fit``: a model's file and its data to draws, a summary and a verdict."""

import argparse
import difflib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from . import autoguide
from ._checks import check_positive, check_positive_int
from ._command_words import fit_words, in_options
from ._data_files import load_data
from ._draws_file import check_output, check_writable, save_draws
from ._files import arguments_of, as_floats, load_model, single_values, stacked_columns
from ._program.param_store import apart_from_store
from .autoguide import AutoFlow
from .diagnostics import diagnose
from .flows import FLOWS
from .infer import fit

__all__ = [
    "FAILED",
    "GOOD",
    "INTERRUPTED",
    "MISUSED",
    "PIPE_CLOSED",
    "POOR",
    "TERMINATED",
    "Prepared",
    "add_options",
    "prepare",
    "run",
]

GOOD, FAILED, MISUSED, POOR = 0, 1, 2, 3
INTERRUPTED, PIPE_CLOSED, TERMINATED = 128 + 2, 128 + 13, 128 + 15
"""Exit codes; the last three are those of a shell for a program that such a signal ends."""
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
    many: dict[str, Any] = {"action": "append", "default": []}
    add = parser.add_argument_group("model and data").add_argument
    add("--model", required=True, metavar="PATH.py:NAME", help="your Pyro model, a function in a file")
    add("--data", metavar="FILE", help="its arguments: .json, .npz, or a table: .csv, .tsv, .parquet")
    what = "columns of the table that make one argument: a matrix; one column: a vector; may be repeated"
    add("--columns", metavar="NAME=COL,COL", help=what, **many)
    what = "a single value of the model's, read as JSON, else text; overrides that of --data; may be repeated"
    add("--arg", metavar="NAME=VALUE", help=what, **many)
    what = "an argument whose integers are measurements, not counts: makes it floating; may be repeated"
    add("--float", metavar="NAME", dest="floats", help=what, **many)
    what = "of plain numbers in the model and of floating data: float32 or float64; default: float32"
    dtype = checked(DTYPES.__getitem__, "float32 or float64")
    add("--dtype", type=dtype, default=torch.float32, metavar="NAME", help=what)

    add = parser.add_argument_group("fit").add_argument
    what = f"{', '.join(NAMED)}, or a flow: {', '.join(FLOWS)}; default: AutoRealNVP"
    add("--guide", default="AutoRealNVP", metavar="NAME", help=what)
    what = "an option of the guide, such as num_layers=4; may be repeated"
    add("--guide-arg", metavar="NAME=VALUE", help=what, **many)
    natural = checked(seed, "an integer from 0 to 4294967295")
    add("--seed", type=natural, default=0, metavar="N", help="of all that is random; default: 0")
    add("--num-steps", type=integer, metavar="N", help="gradient steps at most; default: the guide's own")
    add("--num-particles", type=integer, metavar="N", help="draws per step; default: the guide's own")
    add("--lr", type=real, metavar="RATE", help="the highest learning rate; default: the guide's own")
    what = "how near to the evidence the fit may end; default: by the number of latents"
    add("--tolerance", type=real, metavar="NATS", help=what)
    what = "where to save the run, every half minute; if it is there, the fit goes on from it"
    add("--checkpoint", metavar="FILE", help=what)

    add = parser.add_argument_group("results").add_argument
    what = "where to save draws: .npz, or .nc (netCDF, by ArviZ); or the posterior: .pt, for load_posterior"
    add("--output", metavar="FILE", help=what)
    what = "replace the file of --output; one whose fit goes on from its checkpoint is replaced anyway"
    add("--overwrite", action="store_true", help=what)
    add("--num-samples", type=integer, metavar="N", default=4000, help="draws to save; default: 4000")
    add("--resample", action="store_true", help="save draws resampled by importance weights")
    add("--no-diagnose", action="store_false", dest="diagnose", help="leave the verdict out")
    add("--fail-if-poor", action="store_true", help=f"exit with {POOR} if the verdict is poor")


def prepare(options: argparse.Namespace) -> Prepared:
    """Reads and checks everything that the options name.

    :raises ValueError: naming the option, what was expected and what came.
    """
    if options.fail_if_poor and not options.diagnose:
        raise ValueError("--fail-if-poor: expected a verdict, got --no-diagnose")
    goes_on = False
    if options.checkpoint is not None:
        check_writable("--checkpoint", options.checkpoint)
        goes_on = Path(options.checkpoint).exists()
    if options.output is not None:
        check_output(options.output, options.overwrite or goes_on, options.resample)
    for option in ("resample", "overwrite"):
        if getattr(options, option) and options.output is None:
            raise ValueError(f"--{option}: expected --output with it, got none")
    make = guide_named(options.guide)
    single, columns = single_values("--arg", options.arg), stacked_columns(options.columns)
    guide_args = single_values("--guide-arg", options.guide_arg)
    model = load_model(options.model)
    if columns and options.data is None:
        raise ValueError("--columns: expected --data with it, got none")
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
                progress=not options.quiet and sys.stderr.isatty(),  # no bars in logs
            )
        except KeyboardInterrupt:
            return interrupted(options, "before the first step", None)
        tell(options, fit_words(result, options.checkpoint))
        try:
            if options.output is not None:  # before the verdict, which may take longer than the patience
                save_draws(
                    options.output,
                    *prepared,
                    num_samples=options.num_samples,
                    resample=options.resample,
                    seed=options.seed,
                )
                tell(options, f"saved: {options.output}")
        finally:  # what the fit has found is worth the same where the draws could not be saved
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
    print(f"\n{in_options(str(diagnosis))}")
    return POOR if options.fail_if_poor and diagnosis.verdict == "poor" else GOOD


def interrupted(options: argparse.Namespace, when: str, output: str | None) -> int:
    """Says on stderr what Ctrl-C, or a request to end, has left."""
    kept = "nothing was saved" if output is None else f"{output} is saved"
    if options.checkpoint is None:
        more = "with --checkpoint FILE the same command can go on"
    elif Path(options.checkpoint).exists():
        more = f"the same command goes on from {options.checkpoint}"
    else:
        more = f"{options.checkpoint} is not written yet, which is every half minute"
    print(f"interrupted: {when}; {kept}; {more}", file=sys.stderr)
    return INTERRUPTED


def tell(options: argparse.Namespace, words: str) -> None:
    """What is not the result, on stderr."""
    if not options.quiet:
        print(words, file=sys.stderr, flush=True)
