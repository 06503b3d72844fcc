"""The options of :func:`pyro_flowvi.fit`: what they may be, and what of them a checkpoint holds a run to."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer import ELBO

from .._checks import check_positive, check_positive_int
from .._program.call import check_programs
from .._program.log_weights import LogWeights
from ..autoguide._protocol import FitGuide

__all__ = ["check_arguments", "settings_of"]


def check_arguments(options: Mapping[str, Any]) -> None:
    """Refuses options that are not of the described kind.

    :raises ValueError: naming the option.
    """
    check_programs(options["model"], options["guide"])
    loss, optim = options["loss"], options["optim"]
    if options["lr"] is not None:
        check_positive("lr", options["lr"])
    if options["tolerance"] is not None:
        check_positive("tolerance", options["tolerance"])
    if options["num_particles"] is not None:
        check_positive_int("num_particles", options["num_particles"])
        if loss is not None:
            raise ValueError("num_particles: expected None with a loss, which has its own, got both")
    if loss is not None and not isinstance(loss, ELBO):
        raise ValueError(f"loss: expected a pyro.infer.ELBO, got {loss!r}")
    if getattr(optim, "pt_scheduler_constructor", None) is torch.optim.lr_scheduler.ReduceLROnPlateau:
        raise ValueError("optim: expected a schedule by steps, got ReduceLROnPlateau, which needs a metric")
    batches = options["batches"]
    if not (batches is None or callable(batches) or hasattr(batches, "__iter__")):
        raise ValueError(f"batches: expected an iterable or a callable of the step, got {batches!r}")
    if batches is not None and options["args"]:
        raise ValueError("batches: expected no further arguments of the model with batches, got both")
    if optim is not None and options["lr"] is not None:
        raise ValueError("lr: expected None with an optimizer, which has its own, got both")
    if options["compile"] not in (True, False, "auto"):
        raise ValueError(f"compile: expected True, False or 'auto', got {options['compile']!r}")


def settings_of(options: Mapping[str, Any], pair: LogWeights, answers: FitGuide) -> dict[str, Any]:
    """What of a call of ``fit`` a run can go on only with."""
    optim_args = getattr(options["optim"], "pt_optim_args", None)
    return {
        **{
            name: options[name]
            for name in ("num_steps", "lr", "num_particles", "tolerance", "seed", "compile")
        },
        "objective": type(options["objective"]).__name__,
        "optim": type(options["optim"]).__name__,
        # A function's text differs between processes.
        "optim_args": optim_args if isinstance(optim_args, dict) else None,
        "guide": type(pair.guide).__name__,
        "parameters": sorted(pair.structure.params.items()),
        "init": options["init"] is not None,
        **answers.fit_options().settings,
    }
