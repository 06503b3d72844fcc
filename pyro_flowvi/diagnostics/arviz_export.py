"""to_arviz: a guide's draws as ArviZ data."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .._checks import check_positive_int
from .._program.call import as_keywords, check_programs
from .._program.log_weights import LogWeights
from .._program.sites import is_computed, observed_sites
from ..psis import psis
from ..psis import resample as resampled
from ._at_draws import stacked, traces_at
from ._weighted_draws import WeightedDraws, weighted_draws

__all__ = ["to_arviz"]

Array = NDArray[Any]
Group = dict[str, Array]


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 4000,
    resample: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """A guide's draws, what they predict and how likely they make the data, as ArviZ data of one chain.

    Groups: ``posterior`` (all latent sites, constrained, and those computed from them, as of
    ``pyro.deterministic``), ``posterior_predictive`` (the observed sites drawn anew), ``log_likelihood`` (of
    each observed value, nats), ``observed_data``, and ``sample_stats`` with ``log_p`` and ``log_q``, the
    unnormalised log density of model and guide at the draw in the unconstrained coordinates, and
    ``log_weight``, their difference, nats; of resampled draws with groups of latents that are independent
    given the others, the weight of these others alone.  What a model has not, such as pointwise likelihoods
    where discrete sites are summed out, is left out; ``log_p`` and ``log_q`` where the latents are no vector
    of fixed support.

    The draws are independent.  They are the guide's: unless :func:`diagnose` finds the guide good, pass
    ``resample=True`` for draws resampled by Pareto-smoothed weights.

    :param model: a Pyro model.
    :param guide: any fitted Pyro guide for it.
    :param args: the model's positional arguments.
    :param num_samples: number S of draws.
    :param resample: whether to resample the draws by their smoothed weights, with replacement.
    :param kwargs: the model's keyword arguments.
    :param model_kwargs: those whose names are options of this function.
    :param seed: sets Pyro's seed first.
    :return: an ``arviz.InferenceData`` (ArviZ before 1.0) or an ``xarray.DataTree`` (from 1.0), every group
        with the dimensions ``(chain, draw, ...)`` of sizes ``(1, S, ...)``, those of plates by their names.
        A ``/`` in names, as of Pyro's ``scope``, is a ``.``: in ArviZ and netCDF it begins a group.
    :raises ImportError: without ArviZ.
    :raises ValueError: if ``num_samples`` is no positive integer, if the guide draws no value of a site that
        the model needs, or with ``resample=True`` where a draw has no finite density.
    :raises TypeError: for a keyword that is neither an option nor an argument of the model.

    Example::

        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> guide = pyro_flowvi.AutoPlanar(model, num_layers=1)
        >>> data = to_arviz(model, guide, torch.tensor([0.5, 1.5]), num_samples=100)
        >>> data.posterior["mu"].shape, data.log_likelihood["y"].shape
        ((1, 100), (1, 100, 2))
    """
    try:
        import arviz
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ: install pyro-flowvi with the extra 'arviz'") from error
    check_positive_int("num_samples", num_samples)
    if not isinstance(resample, bool):
        raise ValueError(f"resample: expected True or False, got {resample!r}")
    check_programs(model, guide)
    kwargs = as_keywords(to_arviz, model, kwargs, model_kwargs)
    if seed is not None:
        pyro.set_rng_seed(seed)
    draws = weighted_draws(model, guide, args, kwargs, num_samples, in_passes=False, by_group=resample)
    if draws.grouped is not None and draws.density is not None:
        sites = draws.density.packing.constrain(draws.grouped.corrected)
        stats: Group = {"log_weight": draws.log_weights}
    elif draws.sites is None or draws.log_p is None:
        sites, stats = _sites_alone(draws, num_samples, resample)
    else:
        log_p = draws.log_p.detach().double().cpu().numpy()
        stats = {"log_p": log_p, "log_q": log_p - draws.log_weights, "log_weight": draws.log_weights}
        sites = draws.sites
    if resample:
        chosen = _resampled(draws.log_weights, num_samples)
        sites = {name: value[torch.from_numpy(chosen).to(value.device)] for name, value in sites.items()}
        stats = {name: value[chosen] for name, value in stats.items()}
    groups = {"sample_stats": stats, **_data_groups(draws.particles, sites)}
    dims = {
        _plain(name): [_plain(dim) for dim in found] for name, found in _dims(draws.particles, sites).items()
    }
    groups["posterior"] = {k: _numpy(value) for k, value in sites.items()} | groups.pop("computed", {})
    data: Any = {
        name: {_plain(key): value if name == "observed_data" else value[None] for key, value in group.items()}
        for name, group in groups.items()
        if group
    }
    # From 1.0 on ``hasattr`` says nothing: the module answers for any name.
    if int(arviz.__version__.partition(".")[0]) < 1:
        return arviz.from_dict(**data, dims=dims)
    return arviz.from_dict(data, dims=dims)


def _plain(name: str) -> str:
    return name.replace("/", ".")


@torch.no_grad()
def _dims(particles: LogWeights, sites: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The plates that each site's dimensions are, by name; of event dimensions the names that ArviZ gives."""
    with poutine.block(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = poutine.condition(particles.model, data={name: value[0] for name, value in sites.items()})
        trace: Any = poutine.trace(model).get_trace(*particles.args, **particles.kwargs)
    found: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not isinstance(site["value"], Tensor) or site_is_subsample(site):
            continue
        shape = site["value"].shape
        plates = {f.dim: f for f in site["cond_indep_stack"] if f.vectorized}
        batch = len(shape) - site["fn"].event_dim
        dims = [f"{name}_dim_{i}" for i in range(len(shape))]
        for i in range(batch):
            frame = plates.get(i - batch)
            same = frame is not None and shape[i] == frame.size == sizes.setdefault(frame.name, frame.size)
            if frame is not None and same:
                dims[i] = frame.name
        found[name] = dims
    return found


def _sites_alone(draws: WeightedDraws, size: int, resample: bool) -> tuple[dict[str, Tensor], Group]:
    """Draws apart from the weights that were had, where a site is not to be located."""
    if resample:
        raise ValueError(f"resample: expected False, since {draws.why}; got True")
    return draws.particles.draws(size), {}


def _resampled(log_weights: Array, size: int) -> NDArray[np.int64]:
    if not np.isfinite(log_weights).all():
        raise ValueError("resample: expected draws with finite densities, got some without; see diagnose")
    smoothed, _ = psis(log_weights)
    return resampled(smoothed, size, seed=int(torch.randint(2**31, ())))


def _numpy(value: Tensor) -> Array:
    return value.detach().cpu().numpy()


@torch.no_grad()
def _data_groups(particles: LogWeights, sites: Mapping[str, Tensor]) -> dict[str, Group]:
    """Log density of each observed value at each draw, new values at each draw, and the observed ones."""
    size = len(next(iter(sites.values())))
    with poutine.block(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = poutine.condition(particles.model, data={name: value[0] for name, value in sites.items()})
        one: Any = poutine.trace(first).get_trace(*particles.args, **particles.kwargs)
        fixed = {name: site for name, site in observed_sites(one).items() if name not in sites}
        if not fixed:
            return {}
        data = {name: site for name, site in fixed.items() if not is_computed(site)}
        computed = fixed.keys() - data.keys()
        shapes = {name: one.nodes[name]["fn"].event_dim for name in sites}
        groups: dict[str, Group] = {
            "observed_data": {name: _numpy(site["value"]) for name, site in data.items()}
        }
        # A value that depends on a site that is summed out, or is subsampled, has no density of its own.
        if not (particles.structure.sums_out or particles.structure.subsampled):
            traces = traces_at(particles, sites, particles.model, shapes)
            for trace in traces:
                trace.compute_log_prob()
            one.compute_log_prob()
            groups["log_likelihood"] = {
                name: stacked(traces, name, "log_prob", one.nodes[name]["log_prob"].shape, size)
                for name in data
            }
        try:
            traces = traces_at(particles, sites, poutine.uncondition(particles.model), shapes)
        except NotImplementedError:  # a site that can be scored, not sampled
            return groups
        groups["posterior_predictive"] = {
            name: stacked(traces, name, "value", site["value"].shape, size) for name, site in data.items()
        }
        groups["computed"] = {
            k: stacked(traces, k, "value", fixed[k].get("value").shape, size) for k in computed
        }
    return groups
