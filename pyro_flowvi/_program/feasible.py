"""A start of finite density, where the model's own has none: the support may end where the data end."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Independent
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.utils import _pytree as pytree

from .._types import Program, Site, Trace
from .packing import Packing
from .sites import is_enumerated, latent_sites

__all__ = ["find_values", "has_density", "is_refusal", "no_start"]

PRIOR_DRAWS = 64
SCALES = tuple(2.0**k for k in range(-3, 8))
"""Standard deviations of steps from the start, in unconstrained units."""
DRAWS_OF_SCALE = 4
BEYOND_DATA = (0.01, 0.1, 1.0)
"""Distances beyond the data's range, as fractions of it."""
MAX_SITES = 10
"""Sites that are put beyond the data one by one."""
CHANGES = 3000
"""Changes of a candidate, one after another, each kept unless more elements are without a density then."""
PATIENCE = 300
"""Changes without progress after which there are no more."""
FINALISTS, NEIGHBOURS, NEAR = 8, 8, 0.1
"""Candidates that are compared by how many of so many draws around them, of this spread, have a density."""
REFUSED = 10**9
"""Stands for the elements without a density where the model refuses a value outright."""


def is_refusal(error: Exception) -> bool:
    """Whether Pyro's validation refused a value or a parameter, and not its shape."""
    return "within the support" in str(error) or "to satisfy the constraint" in str(error)


def has_density(trace: Trace) -> bool:
    """Whether a run of the model has a finite log density."""
    return not any(bad for bad, _ in _site_densities(trace).values())


def no_start(trace: Trace) -> str:
    """What to tell of a model for which no start was found, as at that of a run."""
    sites = [name for name, (bad, _) in _site_densities(trace).items() if bad]
    return f"no start with a finite log density at {sites} was found; give one by init_loc_fn"


def _site_densities(trace: Trace) -> dict[str, tuple[int, float]]:
    """Of each site how many elements have no finite log density, and the sum of the others'."""
    found = {}
    trace = prune_subsample_sites(trace)
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, site in trace.nodes.items():
            if site["type"] == "sample":
                try:
                    log_prob = _elementwise(site)
                except (ValueError, RuntimeError):  # a value outside the support
                    found[name] = REFUSED, 0.0
                    continue
                good = log_prob.isfinite()
                found[name] = int((~good).sum()), float(log_prob[good].sum())
    return found


def _elementwise(site: Site) -> Tensor:
    """A site's log density; where it is not finite, of the elements that it is summed from."""
    fn, mask = site["fn"], site["mask"]
    log_prob: Tensor = scale_and_mask(torch.as_tensor(fn.log_prob(site["value"])), mask=mask)
    if bool(log_prob.isfinite().all()) or mask is not None:
        return log_prob
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return torch.as_tensor(fn.log_prob(site["value"]))


@dataclass(frozen=True)
class _Candidate:
    z: Tensor
    bad: int
    log_density: float


@dataclass
class _Search:
    """Runs of the model at values of its latents."""

    model: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    trace: Trace
    before_run: Callable[[], None]
    packing: Packing = field(init=False)
    start: Tensor = field(init=False)

    def __post_init__(self) -> None:
        sites = dict(latent_sites(self.trace))
        self.packing = Packing(sites)
        start = self.packing.unconstrain({name: site["value"] for name, site in sites.items()})[0]
        self.start = start.nan_to_num(0.0, 0.0, 0.0)

    def at(self, z: Tensor) -> _Candidate:
        self.before_run()
        program = poutine.condition(self.model, data=self.packing.constrain(z))
        try:
            with pyro.validation_enabled(False):
                trace = poutine.trace(program).get_trace(*self.args, **self.kwargs)
        except (ValueError, RuntimeError):
            return _Candidate(z, REFUSED, 0.0)
        sites = _site_densities(trace).values()
        return _Candidate(z, sum(bad for bad, _ in sites), sum(total for _, total in sites))

    def proposals(self) -> Iterator[Tensor]:
        """Places far apart: of the prior, at the ends of the data, at growing distances from the start."""
        yield from self._of_data()
        for _ in range(PRIOR_DRAWS):
            self.before_run()
            try:
                trace: Trace = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
                values = {name: trace.nodes[name]["value"] for name in self.packing.latents}
                yield self.packing.unconstrain(values)[0].to(self.start)
            except (ValueError, RuntimeError, NotImplementedError):
                break
        for scale in SCALES:
            for _ in range(DRAWS_OF_SCALE):
                yield self.start + scale * torch.randn_like(self.start)

    def _of_data(self) -> Iterator[Tensor]:
        latents = self.packing.latents
        for data in self._data():
            low, high = data.min(), data.max()
            span = high - low if bool(high > low) else high.abs().clamp(min=1.0)
            places = [data.mean(), *(end for f in BEYOND_DATA for end in (high + f * span, low - f * span))]
            beside = [data, *(data + f * span for f in BEYOND_DATA), *(data - f * span for f in BEYOND_DATA)]
            for point in (*places, *beside):
                same = {k: v for k, v in latents.items() if point.dim() == 0 or point.shape == v.shape}
                full = {k: point.expand(v.shape) for k, v in same.items()}
                fits = {k: v for k, v in full.items() if bool(latents[k].fn.support.check(v).all())}
                for names in (list(fits), *([k] for k in list(fits)[:MAX_SITES] if len(fits) > 1)):
                    values = self.packing.constrain(self.start) | {k: fits[k] for k in names}
                    yield self.packing.unconstrain(values)[0].to(self.start)

    def _data(self) -> Iterator[Tensor]:
        """Tensors that the model observes or is given, without values that are not finite."""
        nodes = [site for site in self.trace.nodes.values() if site["type"] == "sample"]
        observed = [site["value"] for site in nodes if site["is_observed"]]
        given = pytree.tree_leaves((self.args, dict(self.kwargs)))
        kept: list[Tensor] = []
        for value in (*observed, *given):
            real = isinstance(value, Tensor) and not value.is_complex() and bool(value.isfinite().all())
            if real and value.numel() and not any(value is other for other in kept):
                kept.append(value)
                yield value.detach().to(self.start)

    def improve(self, best: _Candidate) -> _Candidate:
        """Changes some coordinates at a time, as long as fewer and fewer elements are without a density."""
        since, dim = 0, len(self.start)
        for _ in range(CHANGES):
            if best.bad == 0 or since == PATIENCE:
                break
            chosen = torch.rand(dim) < 1.0 / dim
            chosen[torch.randint(dim, ())] = True
            scale = SCALES[int(torch.randint(len(SCALES), ()))]
            step = torch.where(chosen, scale * torch.randn(dim), 0.0).to(self.start)
            changed = self.at(best.z + step)
            since = 0 if changed.bad < best.bad else since + 1
            best = changed if changed.bad <= best.bad else best
        return best

    def safest(self, found: list[_Candidate]) -> _Candidate:
        """The candidate around which most draws have a density; of equals the one of the highest density."""

        def rank(candidate: _Candidate) -> tuple[int, float]:
            near = (candidate.z + NEAR * torch.randn_like(candidate.z) for _ in range(NEIGHBOURS))
            return sum(self.at(z).bad == 0 for z in near), candidate.log_density

        return max(found, key=rank)


@torch.no_grad()
def find_values(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    trace: Trace,
    before_run: Callable[[], None] = lambda: None,
) -> dict[str, Tensor] | None:
    """Values of the latents at which the model has a density, if the search finds any.

    Of the prior, at the ends of the data and far from the start; where none will do, the candidate with the
    fewest elements without a density is changed step by step.

    :param trace: a run of the model at a start without a density.
    :param before_run: called before each run of the model, to drop what a run may have cached.

    Example::

        >>> def model(y):
        ...     width = pyro.sample("width", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("y", dist.Uniform(0.0, width), obs=y)
        >>> with pyro.validation_enabled(False):
        ...     trace = pyro.poutine.trace(model).get_trace(torch.tensor(100.0))
        >>> find_values(model, (torch.tensor(100.0),), {}, trace)["width"] > 100.0
        tensor(True)
    """
    if any(site["type"] == "sample" and is_enumerated(site) for site in trace.nodes.values()):
        return None  # a density of one value of what is summed out says little
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        search = _Search(model, args, kwargs, trace, before_run)
        candidates = [search.at(z) for z in (search.start, *search.proposals())]
        feasible = sorted((c for c in candidates if not c.bad), key=lambda c: c.log_density, reverse=True)
        if not feasible:
            best = search.improve(min(candidates, key=lambda c: c.bad))
            feasible = [] if best.bad else [best]
        if not feasible:
            return None
        return search.packing.constrain(search.safest(feasible[:FINALISTS]).z)
