"""``python -m pyro_flowvi demo``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .datasets import eight_schools_reference
from .demo import NUM_STEPS, eight_schools, load_data, load_model, picture, run_demo, table

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pyro_flowvi", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="fit a model with four guides, print a table, save a figure")
    demo.add_argument("--model", metavar="PATH.py:NAME", help="your own Pyro model (with --data)")
    demo.add_argument("--data", metavar="FILE.json", help="its keyword arguments as a JSON object")
    demo.add_argument("--steps", type=int, default=NUM_STEPS, help="gradient steps for each guide")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--figure", type=Path, default=Path("demo.png"), help="where to save the figure")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    Example::

        >>> main(["demo", "--model", "nowhere.py:model"])
        2
    """
    options = _parser().parse_args(argv)
    try:
        if options.data is not None and options.model is None:
            raise ValueError("--data: expected --model with it")
        model = eight_schools if options.model is None else load_model(options.model)
        data = None if options.data is None else load_data(options.data)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # operations on a few numbers gain nothing from more
    rows = run_demo(model, data, num_steps=options.steps, seed=options.seed)
    print(f"\n{table(rows)}")
    for row in rows:
        print(f"\n{row.name}\n{row.diagnosis}")
    try:
        axes = picture(rows, eight_schools_reference() if model is eight_schools else None)
    except ImportError as error:
        print(f"\nNo figure: {error}", file=sys.stderr)
        return 0
    axes[0].figure.savefig(options.figure, dpi=150)
    print(f"\nFigure: {options.figure.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
