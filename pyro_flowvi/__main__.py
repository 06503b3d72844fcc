"""Normalizing-flow guides for Pyro from the command line: fit a model of yours, or see a demonstration."""

import argparse
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import __version__, _fit_command
from ._command_words import in_options
from ._data_files import load_data
from ._draws_file import check_writable
from ._files import arguments_of, load_model, place_in
from ._fit_command import FAILED, GOOD, INTERRUPTED, MISUSED, PIPE_CLOSED, TERMINATED
from .datasets import eight_schools_reference
from .demo import NUM_STEPS, eight_schools, picture, run_demo, table

__all__ = ["main"]

EXAMPLES = """\
examples:
  pyro-flowvi demo
  pyro-flowvi fit --model schools.py:model --data schools.csv --output draws.npz
  pyro-flowvi fit --help
"""
CODES = f"""\
exit codes:
  0  the fit has ended
  1  it failed
  2  an option or a file is not what was expected
  3  the verdict is poor (with --fail-if-poor)
  {INTERRUPTED}  Ctrl-C; {TERMINATED}: a request to end (SIGTERM)
  {PIPE_CLOSED}  what reads the output has ended
"""


class _Parser(argparse.ArgumentParser):
    """One whose errors are those of this package, in one line."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    about = "Normalizing-flow guides for Pyro: fit a model of yours, or see a demonstration."
    parser = _Parser(prog="pyro-flowvi", description=about, epilog=f"{EXAMPLES}\n{CODES}")
    parser.add_argument("--version", action="version", version=f"pyro-flowvi {__version__}")
    shared = _Parser(add_help=False)
    shared.add_argument("--quiet", action="store_true", help="no progress on stderr")
    shared.add_argument("--traceback", action="store_true", help="where an error came from, in full")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    what = "fit a model, save draws, print a summary and a verdict"
    fit = commands.add_parser("fit", help=what, description=what, parents=[shared], epilog=CODES)
    _fit_command.add_options(fit)
    fit.set_defaults(prepare=_fit_command.prepare, run=_fit_command.run)

    what = "fit a model with four guides, print a table, save a figure"
    demo = commands.add_parser("demo", help=what, description=what, parents=[shared], epilog=CODES)
    what = "your own Pyro model; default: eight schools"
    demo.add_argument("--model", metavar="PATH.py:NAME", help=what)
    demo.add_argument("--data", metavar="FILE", help="its arguments, as of fit")
    steps = _fit_command.checked(_fit_command.number, "a positive integer")
    what = f"gradient steps for each guide; default: {NUM_STEPS}"
    demo.add_argument("--steps", type=steps, default=NUM_STEPS, metavar="N", help=what)
    seed = _fit_command.checked(_fit_command.seed, "an integer from 0 to 4294967295")
    demo.add_argument("--seed", type=seed, default=0, metavar="N", help="default: 0")
    what = "where to save the figure, which replaces one that is there; default: demo.png"
    demo.add_argument("--figure", default="demo.png", metavar="FILE", help=what)
    demo.set_defaults(prepare=_prepare_demo, run=_run_demo, dtype=torch.get_default_dtype())
    return parser


def _prepare_demo(options: argparse.Namespace) -> tuple[Any, Any]:
    if options.data is not None and options.model is None:
        raise ValueError("--data: expected --model with it, got none")
    _check_figure(options.figure)
    if options.model is None:
        return eight_schools, None
    model = load_model(options.model)
    return model, arguments_of(model, {} if options.data is None else load_data(options.data, model), {})


def _check_figure(path: str) -> None:
    check_writable("--figure", path)
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:  # there will be no figure, and the demo says so
        return
    endings = [f".{name}" for name in FigureCanvasBase.get_supported_filetypes()]
    if Path(path).suffix.lower() not in endings:
        raise ValueError(f"--figure: expected a file that ends in {', '.join(endings)}, got {path!r}")


def _run_demo(options: argparse.Namespace, prepared: tuple[Any, Any]) -> int:
    model, data = prepared
    torch.set_num_threads(1)  # operations on a few numbers gain nothing from more
    rows = run_demo(model, data, num_steps=options.steps, seed=options.seed, progress=not options.quiet)
    print(f"\n{table(rows)}")
    for row in rows:
        print(f"\n{row.name}\n{row.diagnosis}", flush=True)
    try:
        axes = picture(rows, eight_schools_reference() if model is eight_schools else None)
    except ImportError as error:
        print(f"\nNo figure: {error}", file=sys.stderr)
        return GOOD
    axes[0].figure.savefig(options.figure, dpi=150)
    print(f"\nFigure: {Path(options.figure).resolve()}")
    return GOOD


def _one_line(error: BaseException, model: str | None) -> str:
    """An error's words without Pyro's table of shapes, with its kind where it is not ours, and its line."""
    words = in_options(" ".join(str(error).partition("Trace Shapes:")[0].split()))
    own = isinstance(error, ValueError) or type(error).__module__.startswith("pyro_flowvi.")
    kind = "" if own and words else f"{type(error).__name__}{': ' if words else ''}"
    where = "" if model is None else place_in(model.rpartition(":")[0], error)
    # torch speaks of Long where a distribution or a matrix product wants floating numbers.
    hint = "; data are integers where floating numbers are needed: see --float" if "Long" in words else ""
    return f"{kind}{words}{where}{hint}"


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _run(argv: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(argv)
    except SystemExit as done:  # --help and --version
        return int(done.code or GOOD)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISUSED
    before = torch.get_default_dtype()
    torch.set_default_dtype(options.dtype)
    code = MISUSED
    try:
        prepared = options.prepare(options)
        code = FAILED
        return int(options.run(options, prepared))
    except BrokenPipeError:
        raise
    except (Exception, SystemExit) as error:  # a model that calls sys.exit() has not been fitted
        if options.traceback:
            traceback.print_exc()
        # What was misused names its option; what failed may come from a line of the model's file.
        misused = code == MISUSED
        print(f"error: {_one_line(error, None if misused else options.model)}", file=sys.stderr)
        return code
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _requests_to_end() -> Iterator[list[int]]:
    """SIGTERM, by which schedulers and containers end a process, as Ctrl-C; those that came."""
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield came
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _give_up_pipes() -> None:
    """Has Python's end write what is left to nowhere, rather than raise once more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``pyro-flowvi``, which is ``python -m pyro_flowvi`` as well.

    Results go to stdout; progress, warnings and errors, of one line each, to stderr.

    :param argv: the arguments; those of the process if None.
    :return: the exit status: 0 for a fit, 1 if it failed, 2 for bad usage, 3 for a poor verdict with
        ``--fail-if-poor``, 130 after Ctrl-C, 143 after SIGTERM, 141 if what reads the output has ended.

    Example::

        >>> main(["--version"])
        pyro-flowvi 0.1.0
        0
        >>> main(["demo", "--model", "nowhere.py:model"])
        2
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     lines = ["import pyro", "from pyro.distributions import Normal", "def model(y):"]
        ...     lines += ["    mu = pyro.sample('mu', Normal(0.0, 10.0))"]
        ...     lines += ["    with pyro.plate('rows', len(y)):"]
        ...     lines += ["        pyro.sample('y', Normal(mu, 1.0), obs=y)"]
        ...     size = Path(folder, "mine.py").write_text("\\n".join(lines))
        ...     size = Path(folder, "data.csv").write_text("y\\n1.5\\n2.5\\n3.5\\n")
        ...     spec, data = f"{folder}/mine.py:model", f"{folder}/data.csv"
        ...     main(["fit", "--model", spec, "--data", data, "--quiet"])  # doctest: +ELLIPSIS
              mean ...
        mu    2.4...
        <BLANKLINE>
        good: ELBO ...
        0
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # ± is not in every encoding
    with warnings.catch_warnings(), _requests_to_end() as requests:
        warnings.showwarning = _warn
        try:
            code = _run(argv)
            sys.stdout.flush()
        except BrokenPipeError:  # such as head
            _give_up_pipes()
            return PIPE_CLOSED
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = INTERRUPTED
        return TERMINATED if requests and code == INTERRUPTED else code


if __name__ == "__main__":
    sys.exit(main())
