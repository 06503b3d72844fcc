"""Latent sites as one packed vector of unconstrained numbers, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from torch import Size, Tensor
from torch.distributions import biject_to

from .._types import Site

__all__ = ["Latent", "Packing"]


@dataclass(frozen=True)
class Latent:
    """One site: its distribution, and its shape before and after the map to unconstrained numbers."""

    fn: Any
    shape: Size
    free_shape: Size

    @classmethod
    def of(cls, site: Site) -> "Latent":
        """What stands in the site of a trace."""
        value = site["value"]
        return cls(site["fn"], value.shape, biject_to(site["fn"].support).inv(value).shape)

    @property
    def bijection(self) -> Any:
        """From unconstrained numbers to the support."""
        return biject_to(self.fn.support)

    def constrain(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """The site's value and log |det J| of the bijection, per batch element of the site."""
        value = self.bijection(free)
        log_det = self.bijection.log_abs_det_jacobian(free, value)
        return value, sum_rightmost(log_det, log_det.dim() - value.dim() + self.fn.event_dim)

    def unconstrain(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The site's numbers, shape ``S + (n,)`` for values ``S + shape``, and log |dx/dz| of shape ``S``."""
        batch = value.shape[: value.dim() - len(self.shape)]
        free = self.bijection.inv(value)
        log_det = self.bijection.log_abs_det_jacobian(free, value)
        return _rows(free, batch), _rows(log_det, batch).sum(-1)


class Packing:
    """Where each latent site stands in one vector z of D unconstrained numbers.

    :param sites: site name -> the site of a trace, in the order of the vector.
    """

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.latents: dict[str, Latent] = {name: Latent.of(site) for name, site in sites.items()}
        """The sites in order."""
        self._inside = {name: site["value"] for name, site in sites.items()}

    def split(self, z: Tensor) -> dict[str, Tensor]:
        """Unconstrained values by site, each ``batch + site shape``, of ``z`` ``(*batch, D)``."""
        sizes = [latent.free_shape.numel() for latent in self.latents.values()]
        return {
            name: part.reshape(z.shape[:-1] + latent.free_shape)
            for (name, latent), part in zip(self.latents.items(), z.split(sizes, -1), strict=True)
        }

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """The sites' values at ``z`` of shape ``(*batch, D)``, each ``batch + site shape``."""
        return {name: self.latents[name].bijection(free) for name, free in self.split(z).items()}

    def unconstrain(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`constrain`, and log |dx/dz|.

        :param values: name -> ``S + site shape``.
        :return: shapes ``S + (D,)`` and ``S``.
        """
        pairs = [latent.unconstrain(values[name]) for name, latent in self.latents.items()]
        return torch.cat([free for free, _ in pairs], -1), torch.stack([det for _, det in pairs]).sum(0)

    def pack(self, samples: Mapping[str, Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`unconstrain`, for values that may be wrong, or outside their supports.

        :param samples: site name -> ``S + site shape``.
        :param like: of the wanted dtype and device.
        :return: vectors ``S + (D,)``, log |dx/dz| of shape ``S``, and whether all are in their supports.
        :raises ValueError: if a site is missing, unknown, of another shape, or NaN.
        """
        if set(samples) != set(self.latents):
            raise ValueError(f"samples: expected the sites {sorted(self.latents)}, got {sorted(samples)}")
        free_values, log_det = [], torch.zeros(()).to(like)
        inside = torch.ones((), dtype=torch.bool, device=like.device)
        for name, latent in self.latents.items():
            value, shape = samples[name], latent.shape
            batch = value.shape[: value.dim() - len(shape)]
            if value.shape != batch + shape or bool(value.isnan().any()):
                raise ValueError(
                    f"samples[{name!r}]: expected shape (*, {', '.join(map(str, shape))}) without "
                    f"NaN, got {tuple(value.shape)}"
                )
            valid = _rows(latent.fn.support.check(value), batch).all(-1)
            # An invalid value would put NaN into the gradient of the valid ones.
            mask = valid.reshape(batch + (1,) * len(shape))
            free, part = latent.unconstrain(torch.where(mask, value, self._inside[name].to(value)))
            log_det = log_det + part
            inside = inside & valid
            free_values.append(free)
        batch = torch.broadcast_shapes(*(free.shape[:-1] for free in free_values))
        latent_vectors = torch.cat([free.expand(batch + free.shape[-1:]) for free in free_values], -1)
        return latent_vectors.to(like), log_det, inside


def _rows(value: Tensor, batch: tuple[int, ...]) -> Tensor:
    """``value`` of shape ``batch + rest`` as ``batch + (n,)``, also where it has no elements."""
    return value.reshape(batch + (Size(value.shape[len(batch) :]).numel(),))
