"""Latent sites as one packed vector of unconstrained numbers, and back."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pyro.distributions.util import sum_rightmost
from torch import Size, Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import ComposeTransform, ExpTransform, IndependentTransform

from .._shapes import broadcast_shapes, scalar_name
from .._types import Site

__all__ = ["Latent", "Packing", "check_samples"]


@dataclass(frozen=True)
class Latent:
    """One site: its distribution, and its shape before and after the map to unconstrained numbers.

    ``left_out`` tells which of these numbers no density touches; None if all are touched.
    """

    fn: Any
    shape: Size
    free_shape: Size
    left_out: Tensor | None = None

    @classmethod
    def of(cls, site: Site) -> "Latent":
        """What stands in the site of a trace."""
        value = site["value"]
        return cls(site["fn"], value.shape, biject_to(site["fn"].support).inv(value).shape)

    @property
    def bijection(self) -> Any:
        """From unconstrained numbers to the support."""
        return biject_to(self.fn.support)

    @property
    def unit_bijection(self) -> Any:
        """The same map, of as few numbers as are constrained together."""
        bijection = self.bijection
        while isinstance(bijection, IndependentTransform):
            bijection = bijection.base_transform
        return bijection

    def _log_det(self, free: Tensor, value: Tensor) -> Tensor:
        if self.left_out is None:
            return self.bijection.log_abs_det_jacobian(free, value)  # type: ignore[no-any-return]
        bijection = self.unit_bijection
        log_det: Tensor = bijection.log_abs_det_jacobian(free, value)
        inner = bijection.domain.event_dim
        out = self.left_out.flatten(-inner).any(-1) if inner else self.left_out
        return torch.where(out.to(log_det.device), 0.0, log_det)

    def constrain(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """The site's value and log |det J| of the bijection, per batch element of the site."""
        value = self.bijection(free)
        log_det = self._log_det(free, value)
        return value, sum_rightmost(log_det, log_det.dim() - value.dim() + self.fn.event_dim)

    def unconstrain(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The site's numbers, shape ``S + (n,)`` for values ``S + shape``, and log |dx/dz| of shape ``S``."""
        batch = value.shape[: value.dim() - len(self.shape)]
        free = self.bijection.inv(value)
        return _rows(free, batch), _rows(self._log_det(free, value), batch).sum(-1)


class Packing:
    """Where each latent site stands in one vector z of D unconstrained numbers.

    :param sites: site name -> the site of a trace, in the order of the vector.
    :param left_out: site name -> of its unconstrained numbers those that are no part of the vector.

    Example::

        >>> fn, value = dist.Normal(torch.zeros(3), 1.0), torch.ones(3)
        >>> packing = Packing({"x": {"fn": fn, "value": value}}, {"x": torch.tensor([False, True, False])})
        >>> packing.dim, packing.names(), packing.split(torch.tensor([5.0, 6.0]))["x"]
        (2, ['x[0]', 'x[2]'], tensor([5., 0., 6.]))
    """

    def __init__(self, sites: Mapping[str, Site], left_out: Mapping[str, Tensor] | None = None) -> None:
        self.left_out: dict[str, Tensor] = dict(left_out or {})
        """What is no part of the vector, by site; of shape ``free_shape``."""
        self.latents: dict[str, Latent] = {
            name: replace(Latent.of(site), left_out=self.left_out.get(name)) for name, site in sites.items()
        }
        """The sites in order."""
        self._inside = {name: site["value"] for name, site in sites.items()}
        self._kept: Tensor | None = None
        self._order: Tensor | None = None
        if self.left_out:
            out = torch.cat(
                [
                    self.left_out.get(name, torch.zeros(latent.free_shape, dtype=torch.bool))
                    .cpu()
                    .reshape(-1)
                    for name, latent in self.latents.items()
                ]
            )
            self._kept = (~out).nonzero().squeeze(-1)
            self._order = torch.cat([self._kept, out.nonzero().squeeze(-1)]).argsort()
        total = sum(latent.free_shape.numel() for latent in self.latents.values())
        self.dim: int = total if self._kept is None else len(self._kept)
        """The length D of the vector."""
        self.num_left_out: int = total - self.dim
        """How many unconstrained numbers are no part of it."""

    def only(self, sites: Iterable[str]) -> "Packing":
        """Of some of the sites, in this order."""
        kept = {name: {"fn": self.latents[name].fn, "value": self._inside[name]} for name in sites}
        return Packing(kept, {name: out for name, out in self.left_out.items() if name in kept})

    def names(self) -> list[str]:
        """A name for each number of the vector, such as ``theta[2]``."""
        names = []
        for site, latent in self.latents.items():
            for place in np.ndindex(tuple(latent.free_shape)):
                names.append(scalar_name(site, place))
        return names if self._kept is None else [names[i] for i in self._kept]

    def logarithms(self) -> Tensor:
        """Which numbers of the vector, ``(D,)``, are logarithms of the values, but for a shift and a sign.

        As of positive sites.
        """
        exponential = [
            torch.full((latent.free_shape.numel(),), _exponentiates(latent.bijection))
            for latent in self.latents.values()
        ]
        return self.keep(torch.cat([torch.zeros(0, dtype=torch.bool), *exponential]))

    def complete(self, z: Tensor, rest: Callable[[tuple[int, ...]], Tensor] | Tensor) -> Tensor:
        """All unconstrained numbers, site by site, ``(*batch, N)``, of ``z`` ``(*batch, D)``.

        :param rest: what is left out, ``(*batch, N - D)`` or without the batch, or how to make it.
        """
        if self._order is None:
            return z
        shape = (*z.shape[:-1], self.num_left_out)
        rest = rest if isinstance(rest, Tensor) else rest(shape)
        return torch.cat([z, rest.to(z).expand(shape)], -1).index_select(-1, self._order.to(z.device))

    def split(
        self, z: Tensor, rest: Callable[[tuple[int, ...]], Tensor] | Tensor = torch.zeros
    ) -> dict[str, Tensor]:
        """Unconstrained values by site, each ``batch + site shape``, of ``z`` ``(*batch, D)``.

        :param rest: as of :meth:`complete`.
        """
        sizes = [latent.free_shape.numel() for latent in self.latents.values()]
        parts = self.complete(z, rest).split(sizes, -1)
        return {
            name: part.reshape(z.shape[:-1] + latent.free_shape)
            for (name, latent), part in zip(self.latents.items(), parts, strict=True)
        }

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """The sites' values at ``z`` of shape ``(*batch, D)``, each ``batch + site shape``.

        What is left out is drawn, from a standard normal in the unconstrained space.
        """
        parts = self.split(z, torch.randn)
        return {name: self.latents[name].bijection(free) for name, free in parts.items()}

    def unconstrain(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`constrain`, and log |dx/dz|.

        :param values: name -> ``S + site shape``.
        :return: shapes ``S + (D,)`` and ``S``.
        """
        pairs = [latent.unconstrain(values[name]) for name, latent in self.latents.items()]
        return self.keep(torch.cat([free for free, _ in pairs], -1)), torch.stack(
            [det for _, det in pairs]
        ).sum(0)

    def keep(self, z: Tensor) -> Tensor:
        """The inverse of :meth:`complete`."""
        return z if self._kept is None else z.index_select(-1, self._kept.to(z.device))

    def pack(self, samples: Mapping[str, Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`unconstrain`, for values that may be wrong, or outside their supports.

        :param samples: site name -> ``S + site shape``.
        :param like: of the wanted dtype and device.
        :return: vectors ``S + (D,)``, log |dx/dz| of shape ``S``, and whether all are in their supports.
        :raises ValueError: if a site is missing, unknown, of another shape, or NaN.
        """
        check_samples(samples, {name: latent.shape for name, latent in self.latents.items()})
        return self.pack_checked(samples, like)

    def pack_checked(self, samples: Mapping[str, Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`pack`, of values that :func:`check_samples` has passed: no value is read by Python."""
        free_values, log_det = [], torch.zeros(()).to(like)
        inside = torch.ones((), dtype=torch.bool, device=like.device)
        for name, latent in self.latents.items():
            value, shape = samples[name], latent.shape
            batch = value.shape[: value.dim() - len(shape)]
            valid = _rows(latent.fn.support.check(value), batch).all(-1)
            # An invalid value would put NaN into the gradient of the valid ones.
            mask = valid.reshape(batch + (1,) * len(shape))
            free, part = latent.unconstrain(torch.where(mask, value, self._inside[name].to(value)))
            log_det = log_det + part
            inside = inside & valid
            free_values.append(free)
        batch = broadcast_shapes(*(free.shape[:-1] for free in free_values))
        parts = [free.expand(batch + free.shape[-1:]) for free in free_values]
        latent_vectors = self.keep(torch.cat(parts, -1))
        return latent_vectors.to(like), log_det, inside


def check_samples(samples: Mapping[str, Tensor], shapes: Mapping[str, Size]) -> None:
    """Refuses values that are not those of some sites.

    :param samples: site name -> ``S + site shape``.
    :param shapes: site name -> site shape.
    :raises ValueError: if a site is missing, unknown, of another shape, or NaN.
    """
    if set(samples) != set(shapes):
        raise ValueError(f"samples: expected the sites {sorted(shapes)}, got {sorted(samples)}")
    for name, shape in shapes.items():
        value = samples[name]
        batch = value.shape[: value.dim() - len(shape)]
        if value.shape != batch + shape or bool(value.isnan().any()):
            raise ValueError(
                f"samples[{name!r}]: expected shape (*, {', '.join(map(str, shape))}) without "
                f"NaN, got {tuple(value.shape)}"
            )


def _exponentiates(bijection: Any) -> bool:
    """Whether a map onto a support begins with the exponential function, elementwise."""
    while isinstance(bijection, IndependentTransform):
        bijection = bijection.base_transform
    if isinstance(bijection, ComposeTransform):
        return bool(bijection.parts) and _exponentiates(bijection.parts[0])
    return isinstance(bijection, ExpTransform)


def _rows(value: Tensor, batch: tuple[int, ...]) -> Tensor:
    """``value`` of shape ``batch + rest`` as ``batch + (n,)``, also where it has no elements."""
    return value.reshape(batch + (Size(value.shape[len(batch) :]).numel(),))
