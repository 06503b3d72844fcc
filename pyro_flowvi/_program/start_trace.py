"""A trace of the model at its starting point, checked for what continuous VI cannot serve.

Names of Pyro: a *site* is a ``pyro.sample`` statement; the *prototype* is a trace of the
model at a starting point.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to

from .._types import Site, Trace
from .data import check_data, naming_arrays
from .feasible import find_values, has_density, is_refusal, no_start
from .sites import _bounds, latent_sites
from .structure import is_subsampled

__all__ = ["LocalLatents", "SafeInit", "prototype"]


class LocalLatents(ValueError):
    """A latent stands under a subsampled plate."""


class SafeInit:
    """A Pyro ``init_loc_fn`` that also starts sites without a sampler, such as flat priors.

    :param init_loc_fn: any of ``pyro.infer.autoguide.initialization``, or a callable of a site.
    :param jitter: standard deviation of normal noise added in the unconstrained space.
    :raises ValueError: if ``init_loc_fn`` is not callable.

    Example::

        >>> site = {"name": "b", "fn": dist.ImproperUniform(dist.constraints.positive, (), ())}
        >>> SafeInit(init_to_median)(site)
        tensor(1.)
    """

    def __init__(self, init_loc_fn: Callable[[Site], Tensor], jitter: float = 0.0) -> None:
        if not callable(init_loc_fn):
            raise ValueError(
                "init_loc_fn: expected a function of pyro.infer.autoguide.initialization or a "
                f"callable of a site, got {init_loc_fn!r}"
            )
        self.init_loc_fn = init_loc_fn
        self.jitter = jitter
        self.values: dict[str, Tensor] = {}
        """Of the sites that a search has found a start for, since the function's own has no density."""

    def __call__(self, site: Site) -> Tensor:
        fn = site["fn"]
        if site["name"] in self.values:
            return self.values[site["name"]]
        if _support(site).is_discrete:
            drawn: Tensor = fn.sample()
            return drawn
        try:
            value = self.init_loc_fn(site)
        except NotImplementedError:
            bijection = biject_to(fn.support)
            value = bijection(torch.zeros(bijection.inverse_shape(fn.batch_shape + fn.event_shape)))
            value._pyro_custom_init = False  # as Pyro's own functions mark a generated value
        if self.jitter:
            bijection = biject_to(fn.support)
            free = bijection.inv(value)
            value = bijection(free + self.jitter * torch.randn_like(free))
        return value


def _support(site: Site) -> Any:
    try:
        return site["fn"].support
    except NotImplementedError as error:
        if error.args:
            raise
        name, kind = site["name"], type(site["fn"]).__name__
        raise ValueError(
            f"site {name!r}: expected a distribution that says what its support is, got {kind}, which does "
            f"not; hide the site, poutine.block(model, hide=[{name!r}]), and draw it in a guide of its own, "
            "both in an AutoGuideList"
        ) from None


def prototype(
    model: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    init_loc_fn: Callable[[Site], Tensor] = init_to_median,
    before_run: Callable[[], None] = lambda: None,
) -> Trace:
    """A trace of the model at its starting point, checked for what continuous VI cannot serve.

    :param model: a Pyro model.
    :param args: the model's positional arguments.
    :param kwargs: the model's keyword arguments.
    :param init_loc_fn: where each latent site starts; of a :class:`SafeInit` the ``values`` are set if it is
        a start without a density and a search finds another.
    :param before_run: called before each run of the model, to drop what a run may have cached.
    :raises ValueError: naming the site, for a model without continuous latent sites, a discrete site
        that is not enumerated, a distribution without a support, a local latent under a subsampled plate,
        a support that depends on another latent, data that are no tensors, or NaN in them.

    Example::

        >>> trace = prototype(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
        >>> trace.nodes["x"]["value"].shape
        torch.Size([])
    """
    kwargs = kwargs or {}
    init = init_loc_fn if isinstance(init_loc_fn, SafeInit) else SafeInit(init_loc_fn)

    def run(jitter: float = 0.0) -> Trace:
        before_run()
        started = InitMessenger(SafeInit(init, jitter) if jitter else init)(model)
        return prune_subsample_sites(poutine.trace(started).get_trace(*args, **kwargs))

    with poutine.block(), torch.no_grad():
        refused: ValueError | None = None
        try:
            with naming_arrays(model, args, kwargs):
                trace = run()
        except ValueError as error:  # of a parameter, say, that is out of its range at this start
            if not is_refusal(error):
                raise
            refused = error
            try:
                with pyro.validation_enabled(False):
                    trace = run()
            except (ValueError, RuntimeError):
                raise error from None
        latents = dict(latent_sites(trace))
        _check_latents(latents)
        check_data(trace, model, args, kwargs, before_run)
        _check_no_nan(trace)
        bounds = {name: list(_bounds(site["fn"].support)) for name, site in latents.items()}
        if any(bounds.values()):
            for jitter in (0.5, 0.05):
                try:
                    moved = dict(latent_sites(run(jitter)))
                except (ValueError, RuntimeError):  # the model does not run everywhere: try closer by
                    continue
                _check_static_supports(bounds, moved)
                break
        if not has_density(trace):
            init.values = find_values(model, args, kwargs, trace, before_run) or {}
            if refused and not init.values:
                raise ValueError(f"{refused}\n{no_start(trace)}") from refused
            trace = run() if init.values else trace
    return trace


def _check_latents(latents: Mapping[str, Site]) -> None:
    for name, site in latents.items():
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"site {name!r}: expected a continuous latent or a discrete one that the model "
                f"enumerates, got {type(site['fn']).__name__}; mark it with "
                'infer={"enumerate": "parallel"} or wrap the model in config_enumerate and use '
                f"TraceEnum_ELBO, or hide it with poutine.block(model, hide=[{name!r}])"
            )
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized and is_subsampled(frame):
                raise ValueError(
                    f"site {name!r}: expected a vectorised plate, got a loop over the subsampled plate "
                    f"{frame.name!r}, which has other sites at each run; write `with pyro.plate(...)`"
                )
    for name, site in latents.items():
        for frame in site["cond_indep_stack"]:
            if is_subsampled(frame):
                raise LocalLatents(
                    f"site {name!r}: local latents under the subsampled plate {frame.name!r} "
                    f"({frame.size} of {frame.full_size}) are others at each step, which this guide does not "
                    "serve; use AutoRealNVP(model), or another guide of one flow, which keeps what it learns "
                    "of each row, or AutoGuideList with this guide for the other sites: "
                    "guide = AutoGuideList(model); "
                    f"guide.append(AutoCIF(poutine.block(model, hide=[{name!r}]))); "
                    f"guide.append(AutoRealNVP(poutine.block(model, expose=[{name!r}])))"
                )
    if not latents:
        raise ValueError("model: expected at least one continuous latent site, got none")


def _check_no_nan(trace: Trace) -> None:
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"]:
            continue
        value = site["value"]
        has_nan = isinstance(value, Tensor) and bool(value.isnan().any())
        cause: ValueError | None = None
        try:
            bad = has_nan and _log_prob_is_nan(site)
        except ValueError as error:  # Pyro's validation; without NaN its own message is the best
            bad, cause = has_nan, error
        if bad:
            raise ValueError(
                f"site {name!r}: expected observed data without NaN, got "
                f"{int(value.isnan().sum())} NaN in {value.numel()} values"
            ) from cause


def _log_prob_is_nan(site: Site) -> bool:
    log_prob = site["fn"].log_prob(site["value"])
    if isinstance(site["mask"], Tensor):
        log_prob = torch.where(site["mask"], log_prob, 0.0)
    return site["mask"] is not False and bool(log_prob.isnan().any())


def _check_static_supports(bounds: Mapping[str, list[Tensor]], moved: Mapping[str, Site]) -> None:
    for name, before in bounds.items():
        after = list(_bounds(moved[name]["fn"].support)) if name in moved else before
        same = len(before) == len(after) and all(map(torch.equal, before, after))
        if not same:
            raise ValueError(
                f"site {name!r}: expected a fixed support, got one that depends on another latent; "
                "sample it on a fixed support and rescale it in the model, for example "
                f"{name} = low + (high - low) * pyro.sample('{name}_unit', dist.Uniform(0, 1)), or "
                "a Dirichlet for parts of a whole"
            )
