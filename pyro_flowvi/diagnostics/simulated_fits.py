"""sbc: are fits right on average over the data that the model itself makes?"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro.infer.util import is_validation_enabled
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor, nn

from .._bar import tqdm
from .._checks import check_positive_int
from .._compile.log_density import log_densities
from .._program.call import as_keywords, check_programs, options_of
from .._program.param_store import apart_from_store
from .._program.simulation import GenerativeModel, Simulated
from .._types import Program
from ..infer import fit
from ..psis import psis
from ..psis import resample as resampled
from ._weighted_draws import weighted_draws
from .calibration import LOG_DENSITY, Calibration
from .diagnosis import diagnose

__all__ = ["sbc"]

Ranks = dict[str, NDArray[np.int64]]
NOT_OURS: Final = frozenset(
    {"seed", "progress", "model_kwargs", "batches", "validation", "checkpoint", "init"}
)
"""Options of :func:`fit` that make no sense for many fits, or are set here."""
HOPELESS: Final = 10
"""Fits that fail, and none that does not, after which the run ends."""
DRAWS_A_RANK: Final = 4
"""Draws of which one remains where they are resampled."""


@dataclass(frozen=True)
class _Task:
    """What every replication needs, in any process."""

    source: GenerativeModel
    make_guide: Callable[[Program], Program]
    fit_kwargs: dict[str, Any]
    num_samples: int
    sites: tuple[str, ...] | None
    resample: bool
    verdicts: bool
    dtype: torch.dtype
    device: torch.device
    validation: bool


@dataclass(frozen=True)
class _Replication:
    """What one came to; ``error`` says why there is nothing else."""

    ranks: Ranks
    constant: dict[str, NDArray[np.bool_]]
    verdict: str
    notes: frozenset[str]
    error: str = ""


def sbc(
    model: Program,
    make_guide: Callable[[Program], Program],
    *args: Any,
    num: int = 100,
    num_samples: int = 1000,
    sites: Sequence[str] | None = None,
    observed: Sequence[str] = (),
    resample: bool = False,
    verdicts: bool = False,
    fit_kwargs: Mapping[str, Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    seed: int | None = None,
    num_processes: int = 1,
    progress: bool = True,
    **kwargs: Any,
) -> Calibration:
    """Simulation-based calibration: fits a guide to many data sets of which the latents are known.

    Each time latents and data are drawn from the model, a new guide is fitted to the data, and the latents
    are ranked among the guide's draws.  Were every guide the posterior, all ranks would be equally likely.
    Ranks that pile up at both ends tell of guides that are too narrow, those in the middle of guides that are
    too wide, those at one end of a bias.  The rank of the joint log density sees what no latent shows by
    itself, such as a guide that ignores the data or correlations.

    The data are what the model observes, and only their shapes matter: ``y`` in ``sbc(model, AutoRealNVP,
    x, y)`` stands for data of this length.  Data that are drawn stand in the place of an argument that is
    observed as it is; where the model reads it elsewhere too, the arguments stay, and only what it observes
    is new.  What is not observed (covariates, groups, masks) stays.

    This tests the guides, and the fit, on average over the prior: not the model, and not one data set.
    Priors that make data of no practical kind test the fit on these.

    :param model: a Pyro model, whose priors are proper.
    :param make_guide: makes a new guide of a model, such as ``AutoRealNVP``, or
        ``lambda model: AutoIAF(model, num_layers=2)``.
    :param args: the model's positional arguments.
    :param num: number N of data sets.
    :param num_samples: draws of each guide, among which latents are ranked.
    :param sites: latents to rank; by default all that the guides draw.
    :param observed: sites that are data although this call does not observe them (``obs=None``).
    :param resample: whether to rank among draws that are resampled by their importance weights, one of four;
        as should be used of fits that are "usable".
    :param verdicts: whether to :func:`diagnose` each fit, so that ``among("good")`` can be looked at.
    :param fit_kwargs: options of :func:`fit`.
    :param kwargs: the model's keyword arguments.
    :param model_kwargs: those whose names are options of this function.
    :param seed: of the data sets and fits, with which they are the same in any number of processes; by
        default drawn from Pyro's generator.  The state of the generators is left as it was.
    :param num_processes: fits at a time, each in a process of its own with one thread (needs joblib).
    :param progress: shows a progress bar.
    :return: ranks, their p values, a verdict.  Ctrl-C ends the run early with those that there are.
    :raises ValueError: if an argument is not of the described kind, or the model has no joint distribution to
        draw from: it has ``pyro.factor``, scaled densities, improper priors, parameters, subsampled plates.
    :raises TypeError: for a keyword that is neither an option nor an argument of the model.
    :raises RuntimeError: if every fit failed, or the first ten, with what the first one raised.
    :raises ImportError: with several processes, without joblib.

    References: Talts, Betancourt, Simpson, Vehtari and Gelman, *Validating Bayesian Inference Algorithms with
    Simulation-Based Calibration*, 2018; Säilynoja, Bürkner and Vehtari, *Graphical Test for Discrete
    Uniformity*, 2022 (the test and the band); Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman and
    Vehtari, *Simulation-Based Calibration Checking for Bayesian Computation: The Choice of Test Quantities
    Shapes Sensitivity*, 2023 (why the log density is ranked).

    Example::

        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> normal = pyro.infer.autoguide.AutoNormal
        >>> options = {"num_steps": 60, "lr": 0.1}
        >>> found = sbc(model, normal, torch.zeros(3), num=4, fit_kwargs=options, seed=0, progress=False)
        >>> found.verdict, found.ranks["mu"].shape
        ('undecided', (4,))
    """
    check_positive_int("num", num)
    check_positive_int("num_samples", num_samples)
    check_positive_int("num_processes", num_processes)
    kwargs = as_keywords(sbc, model, kwargs, model_kwargs)
    options = _checked_options(fit_kwargs)
    for name, value in (("sites", sites), ("observed", observed)):
        if isinstance(value, str):
            raise ValueError(f"{name}: expected a list of names, got {value!r}")
    if isinstance(make_guide, nn.Module) or not callable(make_guide):
        raise ValueError(
            f"make_guide: expected a callable of a model, such as the class AutoRealNVP, got {make_guide!r}"
        )
    root = np.random.SeedSequence(int(torch.randint(2**31, (), device="cpu")) if seed is None else seed)
    first, *seeds = (int(child.generate_state(1)[0]) for child in root.spawn(num + 1))
    with _left_as_it_is():
        pyro.set_rng_seed(first)
        source = GenerativeModel(model, args, kwargs, observed)
        check_programs(model, make_guide(source.draw().model))
    unknown = sorted(set(sites or ()) - set(source.latents))
    if unknown:
        raise ValueError(f"sites: expected latents of the model, {sorted(source.latents)}, got {unknown}")
    task = _Task(
        source,
        make_guide,
        options,
        num_samples,
        None if sites is None else tuple(sites),
        resample,
        verdicts,
        torch.get_default_dtype(),
        torch.get_default_device(),
        is_validation_enabled(),
    )
    done: dict[int, _Replication] = {}
    with tqdm(total=num, disable=not progress, desc="sbc") as bar:
        try:
            for i, replication in _replications(task, seeds, num_processes):
                done[i] = replication
                bar.update()
                if len(done) == HOPELESS and all(found.error for found in done.values()):
                    break
        except KeyboardInterrupt:
            if not any(not found.error for found in done.values()):
                raise
    return _collected([(i, done[i]) for i in sorted(done)], num_samples, num, verdicts)


def _checked_options(fit_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    if not (fit_kwargs is None or isinstance(fit_kwargs, Mapping)):
        raise ValueError(f"fit_kwargs: expected a mapping of options of fit, got {fit_kwargs!r}")
    known = options_of(fit) - NOT_OURS
    unknown = sorted(set(fit_kwargs or {}) - known)
    if unknown:
        raise ValueError(f"fit_kwargs: expected options of fit, {sorted(known)}, got {unknown}")
    return dict(fit_kwargs or {})


@contextmanager
def _left_as_it_is() -> Iterator[None]:
    """Leaves the user's random numbers and param store alone, whatever is fitted within it."""
    state = get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        with apart_from_store():
            yield
    finally:
        set_rng_state(state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _replications(task: _Task, seeds: list[int], num_processes: int) -> Iterator[tuple[int, _Replication]]:
    """Numbers and results in the order in which they come."""
    if num_processes == 1:
        for i, seed in enumerate(seeds):
            yield i, _replicate(task, seed)
        return
    try:
        from joblib import Parallel, delayed
    except ImportError as error:
        raise ImportError(
            "sbc in several processes needs joblib: install pyro-flowvi with the extra 'parallel'"
        ) from error
    workers = Parallel(n_jobs=num_processes, return_as="generator_unordered")
    yield from workers(delayed(_numbered)(i, task, seed) for i, seed in enumerate(seeds))


def _numbered(i: int, task: _Task, seed: int) -> tuple[int, _Replication]:
    return i, _replicate(task, seed)


@contextmanager
def _settings(task: _Task, seed: int) -> Iterator[None]:
    """What a process of its own has to be told.  One thread: no number depends on how many there are."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(task.dtype)
    if task.device != torch.get_default_device():
        torch.set_default_device(task.device)
    try:
        with pyro.validation_enabled(task.validation), _left_as_it_is():
            pyro.set_rng_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def _replicate(task: _Task, seed: int) -> _Replication:
    """Draws, fits and ranks once."""
    with _settings(task, seed), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = _ranked(task)
        except Exception as error:  # of a model at data of its prior, after many fits that went well
            lines = str(error).strip().splitlines() or [""]
            return _Replication({}, {}, "", frozenset(), f"{type(error).__name__}: {lines[0]}")
        notes = frozenset(f"{each.category.__name__}: {str(each.message).splitlines()[0]}" for each in caught)
    return _Replication(*found, notes)


def _ranked(task: _Task) -> tuple[Ranks, dict[str, NDArray[np.bool_]], str]:
    drawn = task.source.draw()
    for name, value in drawn.data.items():
        if not bool(torch.isfinite(value).all()):
            raise RuntimeError(f"site {name!r}: expected finite data of the prior, got some that are not")
    guide = task.make_guide(drawn.model)
    options = {"progress": False, "distributed": False, **task.fit_kwargs}
    result = fit(drawn.model, guide, *drawn.args, model_kwargs=drawn.kwargs, **options)
    if result.stop_reason == "interrupted":
        raise KeyboardInterrupt
    values, density = _drawn(task, guide, drawn)
    ranks: Ranks = {}
    constant: dict[str, NDArray[np.bool_]] = {}
    for name, truth in drawn.latents.items():
        if name in values and (task.sites is None or name in task.sites):
            ranks[name], constant[name] = _ranks(name, values[name], truth, drawn.counted[name])
    if density is not None:
        found = _ranks(LOG_DENSITY, *density, torch.isfinite(density[1]))
        ranks[LOG_DENSITY], constant[LOG_DENSITY] = found
    verdict = ""
    if task.verdicts:
        verdict = diagnose(
            drawn.model, guide, *drawn.args, model_kwargs=drawn.kwargs, fit_result=result
        ).verdict
    return ranks, constant, verdict


@torch.no_grad()
def _drawn(
    task: _Task, guide: Program, drawn: Simulated
) -> tuple[Mapping[str, Tensor], tuple[Tensor, Tensor] | None]:
    """Draws of the guide by site, and their joint log densities with that of what made the data.

    None where these have no common coordinates.
    """
    num = task.num_samples * (DRAWS_A_RANK if task.resample else 1)
    draws = weighted_draws(drawn.model, guide, drawn.args, drawn.kwargs, num)
    density = draws.density
    if draws.sites is None or draws.log_p is None or density is None:
        if task.resample:
            raise RuntimeError(f"resample: expected draws with weights, got none, since {draws.why}")
        return draws.particles.draws(num), None
    sites, log_p = draws.sites, draws.log_p
    if task.resample:
        finite = np.flatnonzero(np.isfinite(draws.log_weights))
        smoothed, _ = psis(draws.log_weights[finite])
        kept = torch.from_numpy(
            finite[resampled(smoothed, task.num_samples, int(torch.randint(2**31, (), device="cpu")))]
        ).to(log_p.device)
        sites, log_p = {name: value[kept] for name, value in sites.items()}, log_p[kept]
    if not set(density.packing.latents) <= set(drawn.latents):
        return sites, None
    z, _ = density.packing.unconstrain({name: drawn.latents[name] for name in density.packing.latents})
    return sites, (log_p, log_densities(density, z.unsqueeze(0))[0])


@torch.no_grad()
def _ranks(
    name: str, draws: Tensor, truth: Tensor, counted: Tensor
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ranks among the draws, ties broken at random, and where there is nothing but ties."""
    if bool((torch.isnan(draws) & counted).any()):
        raise RuntimeError(f"site {name!r}: expected draws of the guide, got NaN")
    ties = (draws == truth).sum(0)
    chance = torch.rand(ties.shape, device=ties.device)
    found = (draws < truth).sum(0) + torch.minimum((chance * (ties + 1)).long(), ties)
    return torch.where(counted, found, -1).cpu().numpy(), (ties == len(draws)).cpu().numpy()


def _collected(
    done: list[tuple[int, _Replication]], num_samples: int, num: int, verdicts: bool
) -> Calibration:
    failures = tuple((i, found.error) for i, found in done if found.error)
    ranked = [found for _, found in done if not found.error]
    if not ranked:
        raise RuntimeError(f"all {len(failures)} fits failed, the first with {failures[0][1]}")
    names = [name for name in ranked[0].ranks if all(name in found.ranks for found in ranked)]
    ranks = {}
    for name in names:
        constant = np.all([found.constant[name] for found in ranked], axis=0)
        ranks[name] = np.where(constant, -1, np.stack([found.ranks[name] for found in ranked]))
    notes = Counter(note for found in ranked for note in found.notes)
    told = tuple(found.verdict for found in ranked) if verdicts else None
    return Calibration(ranks, num_samples, num, told, failures, dict(notes))
