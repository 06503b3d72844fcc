"""fit: one call from a model and a guide to a trained guide."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.optim import PyroOptim

from .._checks import check_positive, check_positive_int
from .._compile.inductor import PARALLEL_FROM
from .._program.log_weights import LogWeights
from .._program.scoring import Scoring
from .._types import Program
from ..autoguide import AutoFlow, AutoFlowMixture
from ..autoguide._affine import leave_frame
from ..flows import defaults_for
from ..init import Effort
from ..objectives._choice import objective_for
from ._batches import Supply, as_args
from ._checkpoint import Checkpoint, fingerprint, restore
from ._guarded_optim import GuardedOptim
from ._result import FitResult
from ._run_state import Run
from ._start import locate
from ._training_loop import TrainingLoop

__all__ = ["fit"]

NUM_STEPS = 3000
LEARNING_RATE = 1e-2
NUM_PARTICLES = 16
"""This rate and number are for guides that the table of defaults does not know."""
NUM_PARTICLES_APART = 4
"""Particles a step where the model cannot run them together, so that each costs a full step."""
LEAST_PARTICLES = 32
"""Draws a step of each component of a mixture, where all together are as many as another guide has."""
COMPARISON_DRAWS_ON_DATA = 16
"""Draws on which states are compared on validation data, as a rule many rows with latents of their own."""
MANY_ELEMENTS = 5_000_000
"""Elements of draws and data together above which states are compared on fewer draws."""
CHECKPOINT_SECONDS = 30.0
THOROUGH_FROM = 2000
"""Draws in a whole run from which a thorough search for the start is worth its own."""


def _defaults(guide: Any) -> tuple[float, int]:
    """Learning rate and number of particles of a flow of the registry, by the number of latents."""
    if not isinstance(guide, AutoFlow) or guide.flow_name is None:
        return LEARNING_RATE, NUM_PARTICLES
    choice = defaults_for(guide.latent_dim).flows[guide.flow_name]
    if isinstance(guide, AutoFlowMixture):  # every component has so many
        return choice.lr, max(LEAST_PARTICLES, choice.num_particles // guide.num_components)
    return choice.lr, choice.num_particles


def _has_scores(guide: Any, args: Any, kwargs: Any) -> bool:
    """Whether a guide of flows can carry scores forward: a foreign transform may have no inverse."""
    with torch.random.fork_rng(), poutine.block(), Scoring():
        try:
            poutine.trace(guide).get_trace(*args, **kwargs)
        except NotImplementedError:
            return False
    return True


@contextmanager
def _threads_for(elements: int) -> Iterator[None]:
    """One thread where no operation has work for two, which would mostly wait for one another."""
    before = torch.get_num_threads()
    if elements < PARALLEL_FROM:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_arguments(options: Mapping[str, Any]) -> None:
    loss, optim = options["loss"], options["optim"]
    if options["lr"] is not None:
        check_positive("lr", options["lr"])
    if options["num_particles"] is not None:
        check_positive_int("num_particles", options["num_particles"])
        if loss is not None:
            raise ValueError("num_particles: expected None with a loss, which has its own, got both")
    if loss is not None and not isinstance(loss, ELBO):
        raise ValueError(f"loss: expected a pyro.infer.ELBO, got {loss!r}")
    if optim is not None and not isinstance(optim, PyroOptim):
        raise ValueError(f"optim: expected a pyro.optim optimizer, got {optim!r}")
    if getattr(optim, "pt_scheduler_constructor", None) is torch.optim.lr_scheduler.ReduceLROnPlateau:
        raise ValueError("optim: expected a schedule by steps, got ReduceLROnPlateau, which needs a metric")
    for name in ("model", "guide"):
        if not callable(options[name]):
            raise ValueError(f"{name}: expected a callable, got {options[name]!r}")
    batches = options["batches"]
    if not (batches is None or callable(batches) or hasattr(batches, "__iter__")):
        raise ValueError(f"batches: expected an iterable or a callable of the step, got {batches!r}")
    if batches is not None and options["args"]:
        raise ValueError("batches: expected no further arguments of the model with batches, got both")
    if optim is not None and options["lr"] is not None:
        raise ValueError("lr: expected None with an optimizer, which has its own, got both")
    if options["compile"] not in (True, False, "auto"):
        raise ValueError(f"compile: expected True, False or 'auto', got {options['compile']!r}")


def fit(
    model: Program,
    guide: Program,
    *args: Any,
    num_steps: int | None = None,
    lr: float | None = None,
    num_particles: int | None = None,
    loss: ELBO | None = None,
    optim: PyroOptim | None = None,
    batches: Any = None,
    validation: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    seed: int | None = None,
    compile: bool | str = "auto",
    checkpoint: Any = None,
    progress: bool = True,
) -> FitResult:
    """Trains a guide, and the model's own parameters, by stochastic variational inference.

    A flow guide first moves to the best Gaussian that a search finds (L-BFGS from many points, Laplace and
    mean-field normals at the modes and on the way to them, refined by natural gradients), if that raises
    the ELBO, and its flow is trained in that Gaussian's frame; of :class:`AutoFlowMixture` each component
    moves to a mode, and is trained in a frame of its own.  Then Adam at the best of three learning
    rates, along a cosine.  The weights are averaged; on draws that are the same each time, the average is
    compared with the best so far, which is what remains.  When the ELBO stops to rise the rate falls; when
    it does so again, the run ends.  The Gaussian stays in the comparison to the end.

    Gradients above five times their running median are scaled down, steps above twenty times left out.  A
    loss that is not finite takes the run back to its last good state, with half the rate.

    :param model: a Pyro model.
    :param guide: any Pyro guide for it.
    :param args: the model's positional arguments.
    :param num_steps: gradient steps at most; 3000 by default.
    :param lr: the learning rate to start from; by default the best in a short race of that in
        :data:`pyro_flowvi.flows.DEFAULTS` for the flow and the number of latents (else 1e-2), a
        third and three times of it.
    :param num_particles: draws per step; by default of the same table, else 16, in one run of the model,
        or 4 where a batch of draws would not give the model the same log density as one by one.  Every
        component of a mixture has so many; by default all together that of the table, and each 32 at least.
    :param loss: a Pyro objective; by default ``TraceEnum_ELBO`` where model or guide enumerate a discrete
        site (:class:`TraceEnumSTL_ELBO` for :class:`AutoFlowMixture`), :class:`TraceSTL_ELBO` where all
        sites of the guide are reparameterised, else ``Trace_ELBO``.
    :param optim: a Pyro optimizer in place of Adam; a scheduler is stepped once a step.
    :param batches: the model's arguments step by step, in place of ``args``: an iterable, gone through again
        and again unless it is a generator, or a callable of the step, from 0.  Each is a tuple, or one
        argument.  A model that scales its likelihood to the whole data does so as in Pyro, with
        ``pyro.plate(..., subsample_size)`` or ``poutine.scale``.
    :param validation: arguments of the model, a tuple or one argument, on which states are compared in place
        of the training data: the best state is that with the best ELBO there, and a plateau ends the run.
    :param model_kwargs: the model's keyword arguments.
    :param seed: sets Pyro's seed first.
    :param compile: True compiles the step to machine code, False leaves it to eager Pyro, "auto" traces it
        from 300 steps on and compiles it where very many steps are to come.
    :param checkpoint: a path.  The run is written there every half minute and when it ends; if the
        file exists the run goes on from it, and ends bit for bit as without the interruption.
    :param progress: shows a progress bar.
    :return: losses, best state, reason to stop, wall time.  Ctrl-C ends the run early with the best state.
    :raises ValueError: if an argument is not of the described kind, the data has NaN, or the checkpoint is
        of another run or cut short.
    :raises CannotCompile: with ``compile=True``, where the step cannot be compiled.
    :raises FitDiverged: after five failures in a row; the last good state is restored, and kept in the
        checkpoint.

    Example::

        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1000.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).to_event(1), obs=y)
        >>> guide = pyro_flowvi.AutoPlanar(model, num_layers=2)
        >>> y = torch.tensor([99.0, 100.0, 101.0])
        >>> result = fit(model, guide, y, num_steps=50, seed=0, progress=False)
        >>> result.stop_reason, abs(guide.median()["mu"].item() - 100.0) < 0.5
        ('completed', True)
    """
    _check_arguments(locals())
    num_steps = NUM_STEPS if num_steps is None else check_positive_int("num_steps", num_steps)
    file = None if checkpoint is None else Checkpoint(checkpoint)
    started = time.perf_counter()
    if seed is not None:
        pyro.set_rng_seed(seed)
    kwargs = dict(model_kwargs or {})
    supply = Supply(batches, args)
    first = supply(0)
    if first is None:
        raise ValueError("batches: expected at least one batch, got none")
    if isinstance(guide, AutoFlow):
        guide.materialize(*first, **kwargs)
        guide._data = (first, kwargs) if batches is None else None
    particles = LogWeights(model, guide, first, kwargs)
    structure = particles.structure
    judge = particles if validation is None else LogWeights(model, guide, as_args(validation), kwargs)
    default_lr, default_particles = _defaults(guide)
    if not particles.vectorized:
        default_particles = NUM_PARTICLES_APART
    if loss is None:
        path = structure.path_gradients and _has_scores(guide, first, kwargs)
        objective = objective_for(particles, num_particles or default_particles, path)
    else:
        objective = loss
        if objective.max_plate_nesting == math.inf:  # Pyro guesses at the first step, which may be compiled
            with torch.random.fork_rng():
                objective._guess_max_plate_nesting(model, guide, first, kwargs)
    rate = default_lr if lr is None else float(lr)
    run = Run(
        model,
        guide,
        kwargs,
        objective,
        judge,
        GuardedOptim(PyroOptim(torch.optim.Adam, {"lr": rate}) if optim is None else optim, guide, model),
        ranked=validation is not None or (loss is None and batches is None and not structure.subsampled),
    )
    if validation is not None:
        run.comparison_draws, run.held_out = COMPARISON_DRAWS_ON_DATA, True
    elif judge.structure.largest * run.comparison_draws > MANY_ELEMENTS:
        run.comparison_draws = max(COMPARISON_DRAWS_ON_DATA, MANY_ELEMENTS // judge.structure.largest)
    may_settle = bool(structure.latents) and not (structure.model_params or particles.point_masses())
    driver = TrainingLoop(
        run, num_steps, rate if optim is None else None, compile, supply, batches is not None, may_settle
    )
    identity: dict[str, str] = {}
    saved = None
    if file is not None:
        settings: dict[str, Any] = {
            "num_steps": num_steps,
            "lr": lr,
            "num_particles": num_particles,
            "seed": seed,
        }
        settings |= {"objective": type(objective).__name__, "optim": type(optim).__name__}
        settings |= {
            "compile": compile,
            "guide": type(guide).__name__,
            "parameters": sorted(structure.params.items()),
        }
        options = getattr(optim, "pt_optim_args", None)  # a function's repr differs between processes
        if isinstance(guide, AutoFlow):  # settings that no parameter's shape tells
            settings["flow"] = repr(guide._flow), getattr(guide, "num_extra", None)
        settings["optim_args"] = options if isinstance(options, dict) else None
        identity = fingerprint(settings, (first, kwargs, validation))
        saved = file.read(identity)
    save = None if file is None else partial(file.write, driver, identity)
    try:
        with _threads_for(structure.largest * int(objective.num_particles)):
            if saved is not None:
                restore(driver, saved)
            else:
                if isinstance(guide, AutoFlow):
                    density = guide.density(*first, **kwargs)
                    thorough = density.batched and num_steps * objective.num_particles >= THOROUGH_FROM
                    effort = Effort.within(structure.largest) if thorough else Effort.small()
                    driver.start = locate(run, guide, density, effort)
                driver.prepare(race=lr is None and (batches is None or callable(batches)))
            stop_reason = driver.train(progress, save, CHECKPOINT_SECONDS)
    finally:
        if isinstance(guide, AutoFlow):
            leave_frame(guide.affine)
    done = driver.progress
    return FitResult(
        guide=guide,
        losses=torch.tensor(run.losses),
        best_loss=run.best_loss,
        best_state={name: param.detach().clone() for name, param in run.optim.params.items()},
        stop_reason=stop_reason,
        wall_time=time.perf_counter() - started,
        start=driver.start,
        converged=driver.converged,
        rates=torch.tensor(done.rates),
        gradient_norms=torch.tensor(done.norms),
        elbos=list(done.elbos),
        race=dict(done.race),
        num_dropped=done.num_dropped,
        num_skipped=done.num_skipped,
        num_restarts=done.num_restarts,
    )
