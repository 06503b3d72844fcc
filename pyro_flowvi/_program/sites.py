"""The sites of a trace: which are latent, observed or enumerated, on what support.

A *site* is a ``pyro.sample`` statement.
"""

from collections.abc import Iterator
from typing import Any

from pyro.distributions import Delta, constraints
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, transform_to

from .._types import Site, Trace

__all__ = ["innermost", "is_computed", "is_enumerated", "latent_sites", "observed_sites"]


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


def is_enumerated(site: Site) -> bool:
    """Whether the model asks Pyro to sum this discrete site out."""
    return site["infer"].get("enumerate") in ("parallel", "sequential")


def latent_sites(trace: Trace) -> Iterator[tuple[str, Site]]:
    """Name and site of every latent that is inferred, in the model's order."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
            continue
        if not is_enumerated(site):
            yield name, site


def observed_sites(trace: Trace) -> dict[str, Site]:
    """Sites with data or computed, by name: observed, and neither a factor nor a subsample."""
    return {
        name: site
        for name, site in prune_subsample_sites(trace).nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and not site_is_subsample(site)
        and isinstance(site["value"], Tensor)
        and site["value"].numel()
    }


def is_computed(site: Site) -> bool:
    """Whether the value follows from other sites, as of ``pyro.deterministic``."""
    fn = site["fn"]
    while hasattr(fn, "base_dist") and not isinstance(fn, Delta):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def innermost(fn: Any) -> Any:
    """The distribution that others, which expand, mask or transform it, are made from."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
