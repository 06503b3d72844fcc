"""fit: one call from a model and a guide to a trained guide."""

import math
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from tqdm import tqdm

from .._checks import check_positive, check_positive_int
from ..autoguide import AutoFlow
from ..init import find_modes
from ..transforms import defaults_for
from .cause import CannotCompile
from .compiled import CompiledSVI
from .particles import Particles
from .state import GuardedOptim, NotFinite, Run

__all__ = ["FitDiverged", "FitResult", "fit"]

NUM_STEPS = 3000
LEARNING_RATE = 1e-2
FINAL_RATE = 1e-2
"""The learning rate ends at this fraction of its start."""
NUM_PARTICLES = 16
"""This rate and number are for guides that the table of defaults does not know."""
NUM_PARTICLES_APART = 4
"""Particles a step where the model cannot run them together, so that each costs a full step."""
MAX_MODE_EVALUATIONS = 200
SCALE_FACTORS = (1e-4, 1e-3, 1e-2, 0.1, 10.0, 100.0, 1e3, 1e4)
"""Multiples of the initial scale that are tried at the best mode."""
CHECKS = 50
"""How often in a run the state is compared with the best and kept."""

Program = Callable[..., Any]
_LINALG_ERROR: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


class FitDiverged(RuntimeError):
    """Training met a loss or gradient that is not finite; the guide holds its last good state.

    :param step: the step at which it happened, from 0.
    :param site: the sample site that is the first with a value, log density or gradient that is not
        finite; None if it could not be found.
    :param losses: the losses up to that step.

    Example::

        >>> str(FitDiverged(12, "tau", torch.zeros(12)))
        "step 12: the loss is not finite, first at site 'tau'; the last good state is restored"
    """

    def __init__(self, step: int, site: str | None, losses: Tensor) -> None:
        self.step, self.site, self.losses = step, site, losses
        where = f"first at site {site!r}" if site else "at no single site"
        super().__init__(f"step {step}: the loss is not finite, {where}; the last good state is restored")


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` returns.  The guide holds ``best_state`` already.

    :param guide: the trained guide.
    :param losses: the loss (negative ELBO, nats) of every step, shape ``(steps,)``.
    :param best_loss: the loss of the best state, over a few hundred fresh draws.
    :param best_state: name -> value of every trained parameter, the model's included, unconstrained.
    :param stop_reason: "completed" or "interrupted".
    :param wall_time: seconds.
    :param located: whether the guide was moved to a mode before training.

    Example::

        >>> result = FitResult(None, torch.tensor([2.0, 1.0]), 1.0, {}, "completed", 0.5)
        >>> result
        FitResult(completed: 2 steps in 0.5 s, loss 2.00 -> 1.00)
    """

    guide: Any = field(repr=False)
    losses: Tensor
    best_loss: float
    best_state: dict[str, Tensor]
    stop_reason: str
    wall_time: float
    located: bool = False

    def __repr__(self) -> str:
        first = float(self.losses[0]) if len(self.losses) else math.nan
        located = ", started at a mode" if self.located else ""
        return (
            f"FitResult({self.stop_reason}: {len(self.losses)} steps in {self.wall_time:.1f} s, "
            f"loss {first:.2f} -> {self.best_loss:.2f}{located})"
        )


def _cosine(lr: float, step: int, num_steps: int) -> float:
    """The learning rate of a step: from ``lr`` to ``FINAL_RATE * lr``."""
    return lr * (FINAL_RATE + (1.0 - FINAL_RATE) * 0.5 * (1.0 + math.cos(math.pi * step / num_steps)))


def _defaults(guide: Any) -> tuple[float, int]:
    """Learning rate and number of particles of a flow of the registry, by the number of latents."""
    if not isinstance(guide, AutoFlow) or guide.flow_name is None:
        return LEARNING_RATE, NUM_PARTICLES
    choice = defaults_for(guide.latent_dim).flows[guide.flow_name]
    return choice.lr, choice.num_particles


def _locate(run: Run, guide: Any) -> bool:
    """Moves the guide to a mode, and to the best of a few scales there; whether that raised the ELBO."""
    affine = guide.affine if isinstance(guide, AutoFlow) else None
    if affine is None or not (affine.loc.requires_grad and affine.log_scale.requires_grad):
        return False
    density = guide.density(*run.args, **run.kwargs)
    loc, log_scale = affine.loc, affine.log_scale
    best_elbo, best = run.evaluate().mean(), (loc.detach().clone(), log_scale.detach().clone())
    first = best
    starts = [best[0], *best[0].new_empty(2, density.dim).uniform_(-2, 2)]
    with torch.no_grad():
        modes = find_modes(density, starts, max_evaluations=MAX_MODE_EVALUATIONS)
        for mode, factor in [*((mode, 1.0) for mode in modes), *((None, f) for f in SCALE_FACTORS)]:
            # All modes at the scale of the start, then all scales at the best of them.
            loc.copy_(best[0] if mode is None else mode)
            log_scale.copy_(first[1] + math.log(factor))
            elbo = run.evaluate().mean()
            if elbo > best_elbo:
                best_elbo, best = elbo, (loc.clone(), log_scale.clone())
        loc.copy_(best[0])
        log_scale.copy_(best[1])
    return not torch.equal(best[0], first[0])


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

    A flow guide is first moved to a mode of the posterior and to the best of a few scales there, if that
    raises the ELBO.  Then Adam with a cosine-decaying rate; the latest state remains, or an
    earlier one whose ELBO, on common random numbers, is better beyond its noise (always the latest with a
    loss of your own, or where the model subsamples its data).

    :param model: a Pyro model.
    :param guide: any Pyro guide for it.
    :param args: the model's positional arguments.
    :param num_steps: gradient steps; 3000 by default.
    :param lr: the learning rate to start from; by default that of
        :data:`pyro_flowvi.transforms.DEFAULTS` for the flow and the number of latents, else 1e-2.
    :param num_particles: draws per step; by default of the same table, else 16, in one run of the model,
        or 4 where a batch of draws would not give the model the same log density as one by one.
    :param loss: a Pyro objective; by default ``TraceEnum_ELBO`` where the model enumerates a discrete
        site and ``Trace_ELBO`` elsewhere.
    :param optim: a Pyro optimizer in place of Adam; a scheduler is stepped once a step.
    :param batches: not supported yet.
    :param validation: not supported yet.
    :param model_kwargs: the model's keyword arguments.
    :param seed: sets Pyro's seed first.
    :param compile: as in :class:`CompiledSVI`.
    :param checkpoint: not supported yet.
    :param progress: shows a progress bar.
    :return: losses, best state, reason to stop, wall time.  Ctrl-C ends the run early with the best state.
    :raises ValueError: if an argument is not of the described kind, or the data has NaN.
    :raises CannotCompile: with ``compile=True``, where the step cannot be compiled.
    :raises FitDiverged: at a loss or gradient that is not finite; the last good state is restored.

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
    num_steps = NUM_STEPS if num_steps is None else check_positive_int("num_steps", num_steps)
    if lr is not None:
        check_positive("lr", lr)
    if num_particles is not None:
        check_positive_int("num_particles", num_particles)
        if loss is not None:
            raise ValueError("num_particles: expected None with a loss, which has its own, got both")
    if loss is not None and not isinstance(loss, ELBO):
        raise ValueError(f"loss: expected a pyro.infer.ELBO, got {loss!r}")
    if optim is not None and not isinstance(optim, PyroOptim):
        raise ValueError(f"optim: expected a pyro.optim optimizer, got {optim!r}")
    if getattr(optim, "pt_scheduler_constructor", None) is torch.optim.lr_scheduler.ReduceLROnPlateau:
        raise ValueError("optim: expected a schedule by steps, got ReduceLROnPlateau, which needs a metric")
    for name, value in (("model", model), ("guide", guide)):
        if not callable(value):
            raise ValueError(f"{name}: expected a callable, got {value!r}")
    for name, value in (("batches", batches), ("validation", validation), ("checkpoint", checkpoint)):
        if value is not None:
            raise NotImplementedError(f"{name}: not supported yet, expected None")
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile: expected True, False or 'auto', got {compile!r}")

    started = time.perf_counter()
    if seed is not None:
        pyro.set_rng_seed(seed)
    kwargs = dict(model_kwargs or {})
    if isinstance(guide, AutoFlow):
        guide.materialize(*args, **kwargs)
    particles = Particles(model, guide, args, kwargs)
    default_lr, default_particles = _defaults(guide)
    lr = default_lr if lr is None else float(lr)
    default = default_particles if particles.vectorized else NUM_PARTICLES_APART
    run = Run(
        model,
        guide,
        args,
        kwargs,
        particles.elbo(num_particles or default) if loss is None else loss,
        particles,
        GuardedOptim(PyroOptim(torch.optim.Adam, {"lr": lr}) if optim is None else optim, guide, model),
        ranked=loss is None and not particles.subsampled,
    )
    located = _locate(run, guide)
    stop_reason = _train(run, num_steps, lr if optim is None else None, compile, progress)
    return FitResult(
        guide=guide,
        losses=torch.tensor(run.losses),
        best_loss=run.best_loss,
        best_state=run.best,
        stop_reason=stop_reason,
        wall_time=time.perf_counter() - started,
        located=located,
    )


def _train(run: Run, num_steps: int, lr: float | None, compile: bool | str, progress: bool) -> str:
    """Takes the steps and leaves the best state in place; the reason to stop."""
    svi = CompiledSVI(run.model, run.guide, run.optim, run.loss, compile=compile)
    svi._guarded = True
    every = max(1, num_steps // CHECKS)
    stop_reason = "completed"
    with tqdm(total=num_steps, disable=not progress, desc=type(run.guide).__name__) as bar:
        try:
            for step in range(num_steps):
                _step(run, svi, step, num_steps - step)
                run.optim.advance(None if lr is None else _cosine(lr, step + 1, num_steps))
                bar.update()
                if (step + 1) % every == 0 or step == num_steps - 1:
                    run.keep_unless_worse()
                    bar.set_postfix_str(f"ELBO {-run.best_loss:.2f}", refresh=False)
        except KeyboardInterrupt:
            stop_reason = "interrupted"
            if not run.best:
                run.keep_unless_worse()
    run.restore()
    return stop_reason


def _step(run: Run, svi: CompiledSVI, step: int, left: int) -> None:
    random_state = torch.get_rng_state()
    cause: Exception | None = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered NaN")  # it is an error here
            value = svi._take(run.args, run.kwargs, left)
    except NotFinite:
        value = math.nan
    except CannotCompile:
        raise
    except (ValueError, _LINALG_ERROR) as error:
        if step == 0:
            raise  # most likely the model's own mistake: its message is the best
        value, cause = math.nan, error
    if math.isfinite(value):
        run.losses.append(value)
        return
    torch.set_rng_state(random_state)
    named = re.search(r"at site '([^']+)'", str(cause))  # Pyro's validation names it
    site = named.group(1) if named else run.find_bad_site()
    for param in run.optim.params.values():
        param.grad = None
    run.restore()
    raise FitDiverged(step, site, torch.tensor(run.losses)) from cause
