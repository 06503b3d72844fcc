"""fit: one call from a model and a guide to a trained guide."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim

from .._checks import check_positive_int
from .._compile.inductor import PARALLEL_FROM
from .._compile.optimizers import as_pyro_optim
from .._launch import Distributed
from .._program.call import as_keywords, check_batch
from .._program.devices import check_devices
from .._program.log_weights import LogWeights
from .._program.rows import check_rows_known
from .._ranks import Ranks
from .._types import CompileMode, Program
from ..autoguide._protocol import Taken, as_fit_guide
from ..objectives._choice import as_objective, objective_for
from ._arguments import check_arguments, settings_of
from ._batches import Supply, as_call_with
from ._checkpoint import Checkpoint, fingerprint
from ._fit_bar import Bar
from ._flow_steps import FlowWeights, has_scores
from ._guarded_optim import GuardedOptim
from ._memory import hold_freed_memory
from ._minibatches import all_data
from ._one_run import check_same_call, check_same_sites, quiet_but_first, ranks_of, share_start
from ._result import FitResult
from ._row_steps import CHECKS as ROW_CHECKS
from ._row_steps import COMPARISON_DRAWS as ROW_DRAWS
from ._row_steps import RowWeights, row_sweep, start_by_passes, steps_of
from ._run_state import Run
from ._saved_state import restore
from ._start import move, take_over
from ._steps_outside import recorded, steps_outside, trained_outside
from ._training_loop import CHECKS, ENOUGH_STEPS, TOLERANCE, TOLERANCE_EACH, TrainingLoop

__all__ = ["fit"]

NUM_STEPS = 3000
NUM_PARTICLES_APART = 4
"""Particles a step where the model cannot run them together, so that each costs a full step."""
COMPARISON_DRAWS_ON_DATA = 16
"""Draws on which states are compared on validation data, as a rule many rows with latents of their own."""
MANY_ELEMENTS = 5_000_000
"""Elements of draws and data together above which states are compared on fewer draws."""
CHECKPOINT_SECONDS = 30.0
REFIT_SHARE = 0.15
"""Of the steps of a fit, what one takes that starts near its end."""


def _objective(loss: Any, pair: LogWeights, num_particles: int) -> Any:
    """The user's objective, or the one for the pair."""
    if loss is None:
        path = pair.structure.path_gradients and has_scores(pair.guide, pair.args, pair.kwargs)
        return objective_for(pair, num_particles, path)
    if loss.max_plate_nesting == math.inf:  # Pyro guesses at the first step, which may be compiled
        with torch.random.fork_rng():
            loss._guess_max_plate_nesting(pair.model, pair.guide, pair.args, pair.kwargs)
    return loss


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


def _default_tolerance(pair: LogWeights) -> float:
    """Less for a few latents, of which each has a larger part of a given divergence."""
    size = sum(max(1, shape.numel()) for shape in pair.structure.latents.values())
    return min(TOLERANCE, TOLERANCE_EACH * max(1, size))


def _new_run(
    pair: LogWeights,
    judge: LogWeights | FlowWeights,
    objective: Any,
    optim: PyroOptim,
    ranked: bool,
    held_out: bool,
    numbers: int,
    ranks: Ranks,
) -> Run:
    guarded = GuardedOptim(optim, pair.guide, pair.model)
    run = Run(pair.model, pair.guide, objective, judge, guarded, ranked, ranks=ranks)
    if held_out:
        run.comparison_draws, run.held_out = COMPARISON_DRAWS_ON_DATA, True
    elif numbers * run.comparison_draws > MANY_ELEMENTS:
        run.comparison_draws = max(COMPARISON_DRAWS_ON_DATA, MANY_ELEMENTS // numbers)
    return run


def _result(loop: TrainingLoop, stop_reason: str, wall_time: float, modes: Any) -> FitResult:
    run, done = loop.run, loop.progress
    return FitResult(
        guide=run.guide,
        losses=torch.tensor(run.losses),
        best_loss=run.best_loss,
        best_state={name: param.detach().clone() for name, param in run.optim.params.items()},
        stop_reason=stop_reason,
        wall_time=wall_time,
        start=loop.start,
        converged=loop.converged,
        rates=torch.tensor(done.rates),
        gradient_norms=torch.tensor(done.norms),
        elbos=list(done.elbos),
        num_dropped=done.num_dropped,
        num_skipped=done.num_skipped,
        num_restarts=done.num_restarts,
        modes=modes,
    )


def fit(
    model: Program,
    guide: Program,
    *args: Any,
    num_steps: int | None = None,
    lr: float | None = None,
    num_particles: int | None = None,
    tolerance: float | None = None,
    loss: ELBO | type[ELBO] | None = None,
    optim: PyroOptim | torch.optim.Optimizer | type[torch.optim.Optimizer] | None = None,
    batches: Any = None,
    validation: Any = None,
    model_kwargs: Mapping[str, Any] | None = None,
    seed: int | None = None,
    compile: CompileMode = "auto",
    init: Any = None,
    checkpoint: Any = None,
    distributed: Distributed = "auto",
    progress: bool = True,
    **kwargs: Any,
) -> FitResult:
    """Trains a guide, and the model's own parameters, by stochastic variational inference.

    A flow guide first moves to the best Gaussian that a search finds (L-BFGS from many points, Laplace and
    mean-field normals at the modes and on the way to them, refined by natural gradients), if that raises
    the ELBO, and its flow is trained in that Gaussian's frame; of :class:`AutoFlowMixture` each component
    moves to a mode, and is trained in a frame of its own.  Then Adam, in rounds of a tenth, three tenths and
    six tenths of the steps, in each of which the learning rate rises and falls along a cosine, and each of
    which begins at the best state.  The weights are averaged; on draws that are the same each time, the
    average is compared with the best so far, which is what remains.  The run ends after a round at whose end
    the ELBO is within ``tolerance`` of the evidence, as far as its draws tell, or in which it hardly rose.
    The Gaussian stays in the comparison to the end.

    Latents under a subsampled plate start by full passes over its rows; steps show pages of rows in shuffled
    epochs, or those of ``batches``, and what is compared are ELBOs of all rows.

    The model is recorded once as a graph of tensor operations; where it cannot run for many draws at once
    (``a[group]``, loops, matrices without batch dimensions), the graph of one draw is vectorised by
    ``torch.vmap``.  What that refuses is run draw by draw, with a :class:`CompileWarning` that names the
    line.

    Minibatches without latents under their plate are read in whole for the start and for all comparisons, a
    part at a time: the rows of one ``pyro.plate(..., subsample_size=)``, or the batches of an iterable with a
    length and the same rows at every pass, of up to 512 MiB.  Steps see shuffled parts, of the batches'
    size or of about 2,000 rows, less what a part's gradient is off by at the start (SVRG).  So it is for a
    guide of flows, without ``loss``, ``optim``, ``validation`` or parameters of the model; else steps are
    those of SVI.

    Where the model has no density at ``init_loc_fn``'s start, as where its support ends with the data, a
    search finds another (so it does for stock ``SVI``).  Draws beyond such an edge are left out of the
    training; :func:`pyro_flowvi.diagnose` counts them, and resampling corrects for them.

    Gradients above five times their running median are scaled down, steps above twenty times left out.  A
    loss that is not finite takes the run back to its last good state, with half the rate.

    :param model: a Pyro model.
    :param guide: any Pyro guide for it.
    :param args: the model's positional arguments.
    :param num_steps: gradient steps at most; 3000 by default, of hierarchies 1500, in pages of rows 500.
    :param lr: the highest learning rate; by default that in :data:`pyro_flowvi.flows.DEFAULTS` for the flow
        and the number of latents, else 1e-2.
    :param num_particles: draws per step; by default of the same table, else 16, in one run of the model,
        or 4 where the model has to run draw by draw.  Every
        component of a mixture has so many; by default all together that of the table, and each 32 at least.
    :param tolerance: how far below the evidence, nats, the ELBO may be for the run to end: half the variance
        of the log weights, or the logarithm of their mean less the mean of the logarithms if that is more,
        on 2,048 draws; by default 0.03, or 0.004 for each latent if that is less.  Nor may the weights move a
        mean by more than 0.05 standard deviations, or a standard deviation by more than 5 %.
    :param loss: a Pyro objective; by default ``TraceEnum_ELBO`` where model or guide enumerate a discrete
        site (:class:`TraceEnumSTL_ELBO` for :class:`AutoFlowMixture`), :class:`TraceSTL_ELBO` where all
        sites of the guide are reparameterised, else ``Trace_ELBO``.
    :param optim: an optimizer of Pyro or torch, or a class of torch's, in place of Adam; a scheduler is
        stepped once a step.
    :param batches: the model's arguments step by step, in place of ``args``: an iterable, gone through again
        and again unless it is a generator, or a callable of the step, from 0.  Each is a tuple of arguments,
        a dict of keyword arguments, ``(args, kwargs)``, or one argument.  A model that scales its likelihood
        to the whole data does so as in Pyro, with ``pyro.plate(..., subsample_size)`` or ``poutine.scale``.
    :param validation: arguments of the model, as one of ``batches``, on which states are compared in place of
        the training data: the best state is that with the best ELBO there, and a plateau ends the run.
    :param kwargs: the model's keyword arguments, of every step.
    :param model_kwargs: those whose names are options of this function.
    :param seed: sets Pyro's seed first.
    :param compile: True compiles the step to machine code, False leaves it to eager Pyro, "auto" traces it
        and compiles it where very many steps are to come.
    :param init: a guide that was fitted before, to other data or another version of the model (new rows,
        other hyperparameters, a fold left out), or what its fit has returned.  The guide takes over its flow
        if that has the same form, else its moments, by site and by position, and climbs by natural-gradient
        steps of the affine map.  Where the ELBO is then within ``tolerance`` of the evidence, no other step
        is taken; near it, up to 15 % of the steps; far from it the usual search competes with the place.
        A mode that the earlier guide does not have is not looked for.  With ``guide`` itself the fit goes on.
    :param checkpoint: a path.  The run is written there every half minute and when it ends; if the
        file exists the run goes on from it, and ends bit for bit as without the interruption.
    :param distributed: whether other processes train with this one: "auto" looks for a process group of
        ``torch.distributed``, or the environment of ``torchrun``, for which it makes one (gloo on CPUs, nccl
        on GPUs); True demands one, False trains alone.  All call ``fit`` with the same arguments.  Each takes
        its own part of ``batches`` or of a subsampled plate's rows, or without minibatches its own draws, and
        steps take the mean of their gradients.  Messages of rows stay on the process that has the rows, until
        ``guide.gather_rows()`` is called on all.  Rank 0 alone shows progress and warnings.  A checkpoint has
        a file beside it for each process, and may be gone on from with another number of them.
    :param progress: shows a progress bar, which tells of the search before the steps as well.
    :return: losses, best state, reason to stop, wall time.  Ctrl-C ends the run early with the best state;
        of several ranks it ends the process.
    :raises ValueError: if an argument is not of the described kind, model and guide are swapped, Pyro's
        validation refuses the shape of a site (a forgotten plate or ``to_event``), the data are no tensors,
        have NaN, or lie on another device than the guide, improper priors leave the posterior flat along a
        direction, ``init`` has seen no data or has none of the latents, the checkpoint is of another run or
        cut short, or the ranks differ in arguments, seeds, data, or versions.
    :raises TypeError: for a keyword that is neither an option nor an argument of the model.
    :raises CannotCompile: with ``compile=True``, where the step cannot be compiled.
    :raises LostRank: if another process has died, failed, or does not answer; the best state is restored.
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

    A fourth row has come::

        >>> y = torch.tensor([99.0, 100.0, 101.0, 104.0])
        >>> again = pyro_flowvi.AutoPlanar(model, num_layers=2)
        >>> result = fit(model, again, y, init=guide, progress=False)
        >>> result.start, abs(again.median()["mu"].item() - 101.0) < 0.1
        ('previous', True)
    """
    kwargs = as_keywords(fit, model, kwargs, model_kwargs)
    loss, optim = as_objective(loss), None if optim is None else as_pyro_optim(optim)
    options = dict(locals())
    check_arguments(options)
    ranks = ranks_of(options)
    num_steps = NUM_STEPS if num_steps is None else check_positive_int("num_steps", num_steps)
    file = None if checkpoint is None else Checkpoint(checkpoint, ranks)
    started = time.perf_counter()
    hold_freed_memory()
    if seed is not None:
        pyro.set_rng_seed(seed)
    supply, changing = Supply(batches, args, kwargs, ranks), batches is not None
    first, held_out = supply.first(), None if validation is None else as_call_with(kwargs, validation)
    for name, call in (("batches", first), ("validation", held_out)):
        check_batch(name, model, {} if call is None else call[1])
    check_devices(model, guide, *first)
    check_same_call(ranks, options, first)
    if changing:
        first = ranks.same(first)
    with Bar(type(guide).__name__, num_steps, progress and ranks.leads) as bar, quiet_but_first(ranks):
        answers = as_fit_guide(model, guide)
        answers.set_up(*first, all_data=not changing)
        if not ranks.alone:
            answers.gather_rows()
            if answers.rows_by_batch:
                supply.keep_rows()
                first = ranks.same(supply.first())
        if changing and not answers.amortised:
            check_rows_known(model, guide, first)
        needed = answers.can_move() or answers.pushforward(model) is not None
        density = answers.density_of(model, *first) if needed else None
        taken = Taken() if init is None else take_over(init, answers, density, all_data=not changing)
        near, short = taken.near, taken.near and taken.whole
        # A part of the data is no reason to leave the place that was taken over.
        searches = density is not None and (init is None or not (near or changing or density.subsampled))
        if density is not None and searches:
            answers.choose(density, num_steps, ranks)
        default = answers.fit_options()
        if options["num_steps"] is None and not changing:
            num_steps = round((REFIT_SHARE if short else 1.0) * (default.num_steps or num_steps))
            bar.expect(num_steps)
        nesting = getattr(loss, "max_plate_nesting", math.inf)
        pair = judge = LogWeights(model, guide, *first, nesting)
        check_same_sites(ranks, pair)
        if held_out is not None:
            judge = LogWeights(model, guide, *held_out, nesting)
        graph = recorded({**options, "num_steps": num_steps}, pair, answers, density)
        data = all_data(options, pair, answers, density, supply, ranks)
        if data is not None:
            density, supply, changing = data.density, Supply(None, *first), False
        together = pair.vectorized or graph is not None or data is not None
        sweep = row_sweep(options, pair, answers, supply, num_particles or default.num_particles, ranks)
        if sweep is not None:
            together = True
            if options["num_steps"] is None:
                num_steps = round((REFIT_SHARE if short else 1.0) * steps_of(sweep))
                bar.expect(num_steps)
        particles = num_particles or (default.num_particles if together else NUM_PARTICLES_APART)
        objective = _objective(loss, pair, particles)
        rate = default.lr if lr is None else float(lr)
        own_data = data is not None or (loss is None and not changing and not pair.structure.subsampled)
        # Rows that a pass does not show would have no say in which state is the best.
        ranked = validation is not None or (own_data if sweep is None else sweep.whole)
        adam = PyroOptim(torch.optim.Adam, {"lr": rate}) if optim is None else optim
        known = graph if data is None else data.whole
        weights: Any = judge if known is None else FlowWeights(pair, answers, known)
        if sweep is not None:
            weights = RowWeights(pair, sweep, particles)
        numbers = judge.structure.largest if data is None else data.numbers
        run = _new_run(pair, weights, objective, adam, ranked, held_out is not None, numbers, ranks)
        may_settle = bool(pair.structure.latents) and not (pair.structure.model_params or pair.point_masses())
        own_rate = rate if optim is None else None
        nats = tolerance or default.tolerance or _default_tolerance(pair)
        if sweep is not None:
            run.comparison_draws = ROW_DRAWS if sweep.num_latents <= MANY_ELEMENTS // 20 else ROW_DRAWS // 2
        loop = TrainingLoop(run, num_steps, own_rate, compile, supply, changing, may_settle, bar, nats, short)
        if sweep is not None:
            loop.every = max(1, num_steps // (ROW_CHECKS if num_steps < ENOUGH_STEPS else CHECKS))
        saved = save = None
        if file is not None:
            settings = settings_of({**options, "num_steps": num_steps, "objective": objective}, pair, answers)
            identity = fingerprint(settings, (first, validation))
            saved, save = (
                file.read(identity, None if sweep is None else sweep.own, batches is not None),
                partial(file.write, loop, identity),
            )
        try:
            with _threads_for(pair.structure.largest * particles):
                if sweep is not None:
                    sweep.keep_own()
                if saved is None:
                    if sweep is None:
                        move(loop, answers, density if searches or near else None, near)
                        loop.start = loop.start or start_by_passes(pair, answers, supply, particles, ranks)
                    else:
                        loop.bar.tell(f"passes over {sweep.size} rows")
                        loop.start = sweep.guide.start_rows(sweep, particles)
                else:
                    answers.set_frame(saved["part"]["frame"])
                share_start(ranks, answers, guide, sweep)
                loop.start = ranks.same(loop.start)
                arrived = (
                    near
                    and saved is None
                    and loop.is_there(trained_outside(graph or data, sweep, answers, model))
                )
                if save is not None or not arrived:
                    loop.prepare(steps_outside(graph, data, sweep, answers, run, particles))
                ranks.share_noise()
                if saved is not None:
                    restore(loop, saved)
                stop_reason = loop.train(save, CHECKPOINT_SECONDS)
                answers.remember(run.best_weights)
        finally:
            loop.stepper.leave()
            answers.leave_frame()
        whole = density is not None and not (changing or density.subsampled)
        modes = answers.masses(density if whole else None)
        return _result(loop, stop_reason, time.perf_counter() - started, modes)
