"""Latents that no density touches: masked out where they are drawn, and seen by nothing else.

Padding, the rows of ``obs_mask`` that are observed, ``dist.mask``: the ELBO has no bound if such an element
is trained, since nothing sets a limit to its entropy.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Independent

from .._types import Site
from .packing import Latent, Packing

__all__ = ["check_left_out", "counted", "find_left_out", "uncounted"]

_STEPS = (0.0, 0.3, -0.7)
"""Distances from the start of the points where a gradient must be zero."""
_FAR = (3.0, -3.0)
"""How far elements are moved to see that nothing depends on them."""


def uncounted(site: Site) -> Tensor | None:
    """Which unconstrained numbers of a latent its own density leaves out; None if it counts all.

    Example::

        >>> site = {"fn": dist.Normal(torch.zeros(2), 1.0), "mask": torch.tensor([True, False])}
        >>> uncounted({**site, "value": torch.zeros(2)})
        tensor([False,  True])
    """
    touched = counted(site)
    if bool(touched.all()):
        return None
    bijection = Latent.of(site).unit_bijection
    outer = bijection.codomain.event_dim
    if outer:
        touched = touched.flatten(-outer).any(-1)
    free_shape = bijection.inverse_shape(site["value"].shape)
    ones = (1,) * bijection.domain.event_dim
    return ~touched.reshape(touched.shape + ones).expand(free_shape)


def counted(site: Site) -> Tensor:
    """Which elements of a latent's value its own density counts: those that no mask leaves out.

    Example::

        >>> site = {"fn": dist.Normal(torch.zeros(2), 1.0), "mask": torch.tensor([True, False])}
        >>> counted({**site, "value": torch.zeros(2)})
        tensor([ True, False])
    """
    fn, mask = site["fn"], site["mask"]
    found = _counted(fn)
    if mask is not None:
        mask = torch.as_tensor(mask).bool()
        found = found.to(mask.device) & mask.reshape(mask.shape + (1,) * fn.event_dim)
    return found.expand(site["value"].shape)


def _counted(fn: Any) -> Tensor:
    """Which elements of a value the masks within a distribution leave; of shape batch + event."""
    shape = fn.batch_shape + fn.event_shape
    if not isinstance(fn, dist.MaskedDistribution | ExpandedDistribution | Independent):
        return torch.ones(shape, dtype=torch.bool)
    inner = _counted(fn.base_dist).expand(shape)
    if isinstance(fn, dist.MaskedDistribution):
        mask = torch.as_tensor(fn._mask).bool()
        inner = inner.to(mask.device) & mask.reshape(mask.shape + (1,) * fn.event_dim)
    return inner


def _uncounted_of(sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """:func:`uncounted` of each site that leaves something out."""
    found = ((name, uncounted(site)) for name, site in sites.items())
    return {name: out for name, out in found if out is not None}


def find_left_out(
    sites: Mapping[str, Site], log_prob: Callable[[dict[str, Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Which unconstrained numbers no density touches, by site.

    Those that their own density leaves out, with a gradient of zero at several points, and that can all be
    moved at once without any change.  A latent that is masked where it is drawn and seen by the likelihood
    has a flat prior, and stays.

    :param sites: the latents of a trace.
    :param log_prob: the model's log density of values by site, without Jacobians.
    """
    candidates = _uncounted_of(sites)
    if not candidates:
        return {}
    packing = Packing(sites)
    start = packing.unconstrain({name: site["value"] for name, site in sites.items()})[0].detach()
    start = start.nan_to_num(0.0, 0.0, 0.0)
    none = torch.zeros((), dtype=torch.bool)
    out = torch.cat(
        [
            candidates.get(name, none).to(start.device).expand(latent.free_shape).reshape(-1)
            for name, latent in packing.latents.items()
        ]
    )
    direction = torch.cos(torch.arange(len(start))).to(start)
    for step in _STEPS:
        with suppress(ValueError, RuntimeError), torch.enable_grad():  # the model has no density there
            z = (start + step * direction).requires_grad_()
            total = log_prob(_constrain(packing, z))
            (gradient,) = torch.autograd.grad(total, z) if total.requires_grad else (torch.zeros_like(z),)
            out &= (gradient == 0.0) | gradient.isnan()
    with torch.no_grad():
        there = log_prob(_constrain(packing, start))
        for distance in _FAR:
            moved = torch.where(out, start + distance, start)
            if not log_prob(_constrain(packing, moved)).equal(there):
                return {}
    found = {}
    for name, part in packing.split(out).items():
        inner = packing.latents[name].unit_bijection.domain.event_dim
        if inner:  # a vector that is constrained as one is left out as one
            part = part.flatten(-inner).all(-1).reshape(part.shape[:-inner] + (1,) * inner).expand_as(part)
        if bool(part.any()):
            found[name] = part
    return found


def check_left_out(expected: Mapping[str, Tensor], now: Mapping[str, Tensor | None]) -> None:
    """Refuses data for which the model counts what was left out.

    :param expected: what was left out, by site.
    :param now: what may be left out now; None or no entry for nothing.
    :raises ValueError: naming the site and the elements.

    Example::

        >>> out = {"z": torch.tensor([False, True])}
        >>> check_left_out(out, out)
        >>> check_left_out(out, {})
        Traceback (most recent call last):
        ...
        ValueError: site 'z': expected the elements [(1,)] masked out, as at set-up, got them unmasked
    """
    for name, out in expected.items():
        still = now.get(name)
        touched = out if still is None else out & ~still.to(out.device)
        if bool(touched.any()):
            places = [tuple(place) for place in touched.nonzero().tolist()]
            shown = f"{places[:5]}"[:-1] + (", ...]" if len(places) > 5 else "]")
            raise ValueError(
                f"site {name!r}: expected the elements {shown} masked out, as at set-up, got them unmasked"
            )


def _constrain(packing: Packing, z: Tensor) -> dict[str, Tensor]:
    return {name: packing.latents[name].bijection(free) for name, free in packing.split(z).items()}
