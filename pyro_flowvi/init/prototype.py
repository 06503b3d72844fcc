"""The model seen from its unconstrained latent space: checks, log density, modes.

Knows no guide.  Names of Pyro: a *site* is a ``pyro.sample`` statement; the *prototype* is a trace of the
model at a starting point.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.optimize
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.util import sum_rightmost
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Size, Tensor
from torch.distributions import biject_to, transform_to

__all__ = ["SafeInit", "UnconstrainedModel", "find_modes", "prototype"]

Site = Any  # a message of Pyro, whose own type admits none of its keys
Trace = Any


def _mixture_bijection(constraint: Any) -> Any:
    # The support of a mixture is that of its components.  Where that has bounds with one entry per
    # component, no bijection of the mixture's own shape exists.
    for value in _bounds(constraint.base_constraint):
        if value.dim() > 0 and value.numel() > 1:
            raise NotImplementedError("a mixture whose components have different supports")
    return biject_to(constraint.base_constraint)


# torch and Pyro leave a latent MixtureSameFamily without a bijection.  These registries are torch's
# extension point; nothing that was registered is replaced.
for _registry in (biject_to, transform_to):
    if constraints.MixtureSameFamilyConstraint not in _registry._registry:
        _registry.register(constraints.MixtureSameFamilyConstraint, _mixture_bijection)


def _bounds(constraint: Any) -> Iterator[Tensor]:
    """All tensors that a constraint depends on, nested constraints included."""
    for value in vars(constraint).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, constraints.Constraint):
            yield from _bounds(value)
        elif isinstance(value, list | tuple):
            for item in value:
                if isinstance(item, constraints.Constraint):
                    yield from _bounds(item)


class SafeInit:
    """A Pyro ``init_loc_fn`` that also starts sites without a sampler, such as flat priors.

    :param init_loc_fn: any of ``pyro.infer.autoguide.initialization``, or a callable of a site.
    :param jitter: standard deviation of normal noise added in the unconstrained space.
    :raises ValueError: if ``init_loc_fn`` is not callable.

    Example::

        >>> site = {"name": "b", "fn": dist.ImproperUniform(constraints.positive, (), ())}
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

    def __call__(self, site: Site) -> Tensor:
        fn = site["fn"]
        if fn.support.is_discrete:
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


def is_enumerated(site: Site) -> bool:
    """Whether the model asks Pyro to sum this discrete site out."""
    return bool(site["infer"].get("enumerate"))


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
    :param init_loc_fn: where each latent site starts.
    :param before_run: called before each run of the model, to drop what a run may have cached.
    :raises ValueError: naming the site, for a model without continuous latent sites, a discrete site
        that is not enumerated, a local latent under a subsampled plate, a support that depends on
        another latent, or NaN in the data.

    Example::

        >>> trace = prototype(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)))
        >>> trace.nodes["x"]["value"].shape
        torch.Size([])
    """
    kwargs = kwargs or {}

    def run(jitter: float = 0.0) -> Trace:
        before_run()
        started = InitMessenger(SafeInit(init_loc_fn, jitter))(model)
        return prune_subsample_sites(poutine.trace(started).get_trace(*args, **kwargs))

    with poutine.block(), torch.no_grad():
        trace = run()
        latents = dict(latent_sites(trace))
        _check_latents(latents)
        _check_data(trace)
        bounds = {name: list(_bounds(site["fn"].support)) for name, site in latents.items()}
        if any(bounds.values()):
            for jitter in (0.5, 0.05):
                try:
                    moved = dict(latent_sites(run(jitter)))
                except (ValueError, RuntimeError):  # the model does not run everywhere: try closer by
                    continue
                _check_static_supports(bounds, moved)
                break
    return trace


def latent_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Name and site of every latent that is inferred, in the model's order."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
            continue
        if not is_enumerated(site):
            yield name, site


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
            if frame.vectorized and frame.full_size is not None and frame.size != frame.full_size:
                raise ValueError(
                    f"site {name!r}: local latents under the subsampled plate {frame.name!r} "
                    f"({frame.size} of {frame.full_size}) have no fixed dimension, which a flow over "
                    "all latents needs; use AutoGuideList with a flow for the global sites and "
                    f"AutoNormal for the local ones: guide = AutoGuideList(model); "
                    f"guide.append(AutoPlanar(poutine.block(model, hide=[{name!r}]))); "
                    f"guide.append(AutoNormal(poutine.block(model, expose=[{name!r}])))"
                )
    if not latents:
        raise ValueError("model: expected at least one continuous latent site, got none")


def _check_data(trace: Trace) -> None:
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


@dataclass(frozen=True)
class _Latent:
    """Where one site stands in the packed unconstrained vector."""

    fn: Any
    shape: Size
    free_shape: Size
    stack: tuple[Any, ...]

    @property
    def bijection(self) -> Any:
        return biject_to(self.fn.support)

    def constrain(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """The site's value and log |det J| of the bijection, per batch element of the site."""
        value = self.bijection(free)
        log_det = self.bijection.log_abs_det_jacobian(free, value)
        return value, sum_rightmost(log_det, log_det.dim() - value.dim() + self.fn.event_dim)


class UnconstrainedModel:
    """A model as a density over one packed vector of unconstrained latents.

    :param model: a Pyro model.
    :param args: the model's positional arguments.
    :param kwargs: the model's keyword arguments.
    :param init_loc_fn: where each latent site starts.
    :raises ValueError: as :func:`prototype`.

    Example::

        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        >>> density = UnconstrainedModel(model)
        >>> density.dim, round(density.log_density(torch.zeros(1)).item(), 4)
        (1, -0.9189)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        init_loc_fn: Callable[[Site], Tensor] = init_to_median,
    ) -> None:
        self._model, self._args, self._kwargs = model, args, dict(kwargs or {})
        trace = prototype(model, args, kwargs, init_loc_fn)
        self._latents: dict[str, _Latent] = {}
        start = []
        for name, site in latent_sites(trace):
            free = biject_to(site["fn"].support).inv(site["value"])
            self._latents[name] = _Latent(
                site["fn"], site["value"].shape, free.shape, site["cond_indep_stack"]
            )
            start.append(free.reshape(-1))
        self.start: Tensor = torch.cat(start).nan_to_num(0.0, 0.0, 0.0)
        """The starting point, shape ``(D,)``."""
        self.dim: int = len(self.start)
        """The number D of unconstrained coordinates."""
        # Trace_ELBO with a Delta guide is the log density; TraceEnum_ELBO also sums discrete sites out.
        frames = [f for site in trace.nodes.values() for f in site.get("cond_indep_stack", ())]
        self._elbo = TraceEnum_ELBO(
            strict_enumeration_warning=False,
            max_plate_nesting=max((-frame.dim for frame in frames if frame.vectorized), default=0),
        )

    def _split(self, z: Tensor) -> Iterator[tuple[str, _Latent, Tensor]]:
        sizes = [latent.free_shape.numel() for latent in self._latents.values()]
        for (name, latent), part in zip(self._latents.items(), z.split(sizes, -1), strict=True):
            yield name, latent, part.reshape(z.shape[:-1] + latent.free_shape)

    def log_density(self, z: Tensor) -> Tensor:
        """log p(data, x(z)) + log |det dx/dz| at ``z`` of shape ``(D,)``; a scalar with gradient."""
        # The ELBO of a point mass that carries the Jacobian is the log density.

        def point_mass(*args: Any, **kwargs: Any) -> None:
            plates = {
                frame.name: pyro.plate(frame.name, frame.size, dim=frame.dim)
                for latent in self._latents.values()
                for frame in latent.stack
            }
            for name, latent, free in self._split(z):
                value, log_det = latent.constrain(free)
                with ExitStack() as stack:
                    for frame in latent.stack:
                        stack.enter_context(plates[frame.name])
                    pyro.sample(name, dist.Delta(value, -log_det, event_dim=latent.fn.event_dim))

        # Pyro refuses to differentiate a loss that needs no gradient.
        z = z if z.requires_grad else z.detach().requires_grad_()
        with poutine.block(), torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered NaN")
            loss = self._elbo.differentiable_loss(self._model, point_mass, *self._args, **self._kwargs)
        return -torch.as_tensor(loss, dtype=z.dtype, device=z.device)


def find_modes(
    density: UnconstrainedModel,
    starts: Iterable[Tensor],
    *,
    max_evaluations: int = 200,
) -> list[Tensor]:
    """Local modes of the log density by L-BFGS, one run from each start.

    Where the density is unbounded (a centred funnel) a run ends at its last point; whether an end is
    a good place for a guide is for the caller to measure.

    :param density: the model.
    :param starts: points of shape ``(D,)``.
    :param max_evaluations: the number of gradient evaluations shared by all runs.
    :return: the ends of the runs with finite log density, best first.

    Example::

        >>> def model():
        ...     pyro.sample("x", dist.Normal(100.0, 1.0))
        >>> density = UnconstrainedModel(model)
        >>> find_modes(density, [torch.zeros(1)])[0].round()
        tensor([100.])
    """
    starts = list(starts)
    ends: list[tuple[float, Tensor]] = []
    for start in starts:

        def objective(x: NDArray[np.float64], like: Tensor = start) -> tuple[float, Any]:
            z = torch.as_tensor(x, dtype=like.dtype, device=like.device).requires_grad_()
            try:
                with torch.enable_grad():
                    value = -density.log_density(z)
                    (gradient,) = torch.autograd.grad(value, z)
            except (ValueError, RuntimeError):  # outside what the model can evaluate
                return _WALL, np.zeros_like(x)
            if not (value.isfinite() and gradient.isfinite().all()):
                return _WALL, np.zeros_like(x)
            return float(value.detach()), gradient.double().cpu().numpy()

        found = scipy.optimize.minimize(
            objective,
            start.detach().double().cpu().numpy(),
            jac=True,
            method="L-BFGS-B",
            options={"maxfun": max(1, max_evaluations // len(starts)), "maxcor": 10},
        )
        if found.fun < _WALL:
            ends.append((float(found.fun), torch.as_tensor(found.x).to(start)))
    return [end for _, end in sorted(ends, key=lambda pair: pair[0])]


_WALL = 1e30
"""The value of a point where the log density is not finite: L-BFGS steps back from it."""
