"""What the package says to callers from Python, as what to do on the command line."""

import re
from typing import Final

from .infer import FitResult

__all__ = ["fit_words", "in_options"]

OPTIONS: Final = ("checkpoint", "lr", "num_particles", "num_samples", "num_steps", "resample", "tolerance")
WORDS: Final = (
    (r"use resampled draws: .*to_arviz\(\.\.\., resample=True\)", "use resampled draws: --resample"),
    (r"a larger num_steps", "a larger --num-steps"),
    (r"(\w+)\(\.\.\., tails=True\)", r"--guide \1 --guide-arg tails=true"),
    (r"give (\w+) more layers", r"give \1 more layers (--guide-arg num_layers=N)"),
    (r"give (\w+) more components", r"give \1 more components (--guide-arg num_components=N)"),
    (r"\btake (Auto\w+)", r"take --guide \1"),
    (
        r"give a start by init_loc_fn, a smaller init_scale,",
        "give a smaller init_scale (--guide-arg init_scale=0.01)",
    ),
    (r"give one by init_loc_fn", "give one by init_loc_fn, from Python"),
    (r"take float64, by torch\.set_default_dtype.* of that dtype", "take --dtype float64"),
    (r"write obs=torch\.as_tensor\(\.\.\.\)", "give it numbers"),
    (rf"^({'|'.join(OPTIONS)})(?=:)", lambda found: f"--{found[1].replace('_', '-')}"),
)


def in_options(text: str) -> str:
    """Advice and errors with options in the place of keywords.

    Example::

        >>> in_options("try: train longer, with a larger num_steps")
        'try: train longer, with a larger --num-steps'
    """
    for said, here in WORDS:
        text = re.sub(said, here, text)
    return text


def fit_words(result: FitResult, checkpoint: str | None) -> str:
    """A fit's result in a line, and in another what to do where its steps did not suffice.

    :param checkpoint: of the run, which goes on with no other number of steps.

    Example::

        >>> import torch
        >>> print(fit_words(FitResult(None, torch.tensor([2.0, 1.0]), 1.0, {}, "completed", 0.5), None))
        completed: 2 steps in 0.5 s, loss 2.00 -> 1.00
          not converged, the ELBO may still rise: take a larger --num-steps
    """
    line = str(result).partition("\n")[0].removeprefix("FitResult(").removesuffix(")")
    if result.converged or result.stop_reason == "interrupted":
        return line
    other = f", and another file than {checkpoint}" if checkpoint else ""
    return f"{line}\n  not converged, the ELBO may still rise: take a larger --num-steps{other}"
