"""Latent sites as one packed vector of unconstrained numbers, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from torch import Size, Tensor
from torch.distributions import biject_to

__all__ = ["pack"]


@dataclass(frozen=True)
class _Latent:
    """Where one site stands in the packed unconstrained vector."""

    fn: Any
    shape: Size
    free_shape: Size

    @property
    def bijection(self) -> Any:
        return biject_to(self.fn.support)

    def constrain(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """The site's value and log |det J| of the bijection, per batch element of the site."""
        value = self.bijection(free)
        log_det = self.bijection.log_abs_det_jacobian(free, value)
        return value, sum_rightmost(log_det, log_det.dim() - value.dim() + self.fn.event_dim)


def pack(
    samples: Mapping[str, Tensor], sites: Mapping[str, Any], like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of all latent sites as unconstrained vectors.

    :param samples: site name -> ``S + site shape``.
    :param sites: site name -> the site of a trace, in the order of the vector.
    :param like: of the wanted dtype and device.
    :return: vectors ``S + (D,)``, log |dx/dz| of shape ``S``, and whether all values are in their supports.
    :raises ValueError: if a site is missing, unknown, of another shape, or NaN.
    """
    if set(samples) != set(sites):
        raise ValueError(f"samples: expected the sites {sorted(sites)}, got {sorted(samples)}")
    free_values, log_det = [], torch.zeros(()).to(like)
    inside = torch.ones((), dtype=torch.bool, device=like.device)
    for name, site in sites.items():
        value, shape = samples[name], site["value"].shape
        batch = value.shape[: value.dim() - len(shape)]
        if value.shape != batch + shape or bool(value.isnan().any()):
            raise ValueError(
                f"samples[{name!r}]: expected shape (*, {', '.join(map(str, shape))}) without "
                f"NaN, got {tuple(value.shape)}"
            )
        support = site["fn"].support
        valid = _rows(support.check(value), batch).all(-1)
        # An invalid value would put NaN into the gradient of the valid ones.
        mask = valid.reshape(batch + (1,) * len(shape))
        value = torch.where(mask, value, site["value"].to(value))
        bijection = biject_to(support)
        free = bijection.inv(value)
        log_det = log_det + _rows(bijection.log_abs_det_jacobian(free, value), batch).sum(-1)
        inside = inside & valid
        free_values.append(_rows(free, batch))
    batch = torch.broadcast_shapes(*(free.shape[:-1] for free in free_values))
    latent = torch.cat([free.expand(batch + free.shape[-1:]) for free in free_values], -1)
    return latent.to(like), log_det, inside


def _rows(value: Tensor, batch: tuple[int, ...]) -> Tensor:
    """``value`` of shape ``batch + rest`` as ``batch + (n,)``, also where it has no elements."""
    return value.reshape(batch + (Size(value.shape[len(batch) :]).numel(),))
