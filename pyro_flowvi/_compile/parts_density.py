"""The log density of data in parts, by one graph that reads the part in place."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._program.data_in_parts import DataInParts
from .._program.log_density import REFUSALS
from .._ranks import ALONE, Ranks
from .log_density import TracedDensity, traced

__all__ = ["MinibatchDensity", "WholeDensity"]

WIDTHS = (1, 16, 64)
"""Points that a graph takes at once."""


def _graphs(parts: DataInParts, width: int) -> list[TracedDensity]:
    return [traced(density, width) for density in parts.densities]


class WholeDensity:
    """Log densities and gradients of points from all data, each part once.

    :param parts: the data, or this rank's.
    :param ranks: those that have the rest.
    """

    def __init__(self, parts: DataInParts, ranks: Ranks = ALONE) -> None:
        self.parts, self.ranks, self.density = parts, ranks, parts.densities[0]
        self.passes = 0
        """How many there were."""

    @torch.no_grad()
    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Of points of shape ``(P, D)``, shapes ``(P,)`` and ``(P, D)``."""
        self.passes += 1
        nothing = z.new_full(z.shape[:1], torch.nan, dtype=torch.float64), torch.full_like(z, torch.nan)
        value, gradient = self.ranks.sum_both(lambda: self._of_own_parts(z), nothing, REFUSALS)
        return value.to(z.dtype), gradient

    def _of_own_parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        graphs = _graphs(self.parts, next((width for width in WIDTHS if width >= len(z)), WIDTHS[-1]))
        # In double precision, so that many parts add no rounding of their own.
        value, gradient = torch.zeros_like(z[:, 0], dtype=torch.float64), torch.zeros_like(z)
        for part in self.parts.order():
            own, slope = graphs[self.parts.put(part)](z)
            share = self.parts.shares[part]
            value += share * own
            gradient += share * slope
        return value, gradient


class MinibatchDensity:
    r"""The same estimated from one part, another at each call, in shuffled epochs.

    .. math:: \hat f(z) = f_B(z) - f_B(c) + f(c) + (\nabla f(c) - \nabla f_B(c))^\top (z - c)

    with a point c at which the whole is known: in the posterior's units the slope of one part is off by the
    square root of their number, this only by what its curvature is off (the control variate of SVRG, Johnson
    and Zhang 2013).

    :param parts: the data.
    :param whole: the same, of which f(c) is known; of several ranks with that of the others, so that the
        mean of their estimates is one of the whole.
    :param center: the point c, shape ``(D,)``.
    :param width: points at each call.
    """

    holds = True

    def __init__(self, parts: DataInParts, whole: WholeDensity, center: Tensor, width: int) -> None:
        self.parts, self.width, self.density = parts, width, parts.densities[0]
        self._whole, self._center, self._known = whole, center, whole(center.unsqueeze(0))
        self.calls = 0
        """How many there were; the next part is a function of it."""
        self._order: list[int] | None = None
        self._at = 0, 0
        self._graphs = _graphs(parts, width + 1)

    def _next(self) -> int:
        epoch, place = divmod(self.calls, len(self.parts))
        if self._order is None or (epoch, self._whole.passes) != self._at:
            # A pass in between has the parts in their own order.
            self._order, self._at = self.parts.order(epoch), (epoch, self._whole.passes)
        self.calls += 1
        return self._order[place]

    def repeat(self) -> None:
        """Has the next call see the part of the last one again."""
        self.calls -= 1

    @torch.no_grad()
    def exactly(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``width`` points ``(P, D)``, from the next part."""
        part = self._next()
        points = torch.cat([z, self._center.to(z).unsqueeze(0)])
        value, gradient = self._graphs[self.parts.put(part)](points)
        factor = self._whole.ranks.size * len(self.parts) * self.parts.shares[part]
        lack = self._known[1] - factor * gradient[-1:]
        control = self._known[0] - factor * value[-1:] + ((z - self._center) * lack).sum(-1)
        return factor * value[:-1] + control, factor * gradient[:-1] + lack

    __call__ = exactly

    def state(self) -> dict[str, Any]:
        """Where the run is in the data, for a checkpoint."""
        return {"calls": self.calls, "center": self._center.clone()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        self.calls, self._center = state["calls"], state["center"].to(self._center)
        self._known = self._whole(self._center.unsqueeze(0))
