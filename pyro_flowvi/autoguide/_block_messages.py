"""Messages for single numbers of the latents, and how they move with the roots."""

import math

import torch
from torch import Tensor, nn

from ._fixed import Fixed

__all__ = ["BlockMessages"]

STEP = 4.0
"""Units by which a message's parameters are scaled in a frame: they settle sooner than a flow's."""
MOST_LOG_WEIGHT = 8.0
"""Bound of what the roots add to the logarithm of a weight."""


class BlockMessages(Fixed):
    r"""Factors :math:`\exp(g (z - a) - r (z - a)^2 / 2)` of numbers z, in blocks one after another.

    Both g and log r may move linearly with the roots.
    """

    names = (
        "centre",
        "slope",
        "log_weight",
        "slope_by_root",
        "log_weight_by_root",
        "root_loc",
        "log_root_width",
        "unit",
    )
    trained = "slope", "log_weight"
    """Of these what is trained in a frame."""
    centre: nn.Parameter
    slope: nn.Parameter
    log_weight: nn.Parameter
    fixed_centre: Tensor | None
    fixed_slope: Tensor
    fixed_log_weight: Tensor
    fixed_unit: Tensor

    def _add_messages(self, sizes: list[int], num_roots: int, scale: float) -> None:
        """Makes the parameters.

        :param sizes: of the blocks.
        :param num_roots: how many roots the messages move with, 0 for none.
        :param scale: standard deviation that a message alone has at first.
        """
        self._sizes, self.follows_roots = list(sizes), num_roots > 0
        size = sum(sizes)
        if size:
            self.centre = nn.Parameter(torch.zeros(size))
            self.slope = nn.Parameter(torch.zeros(size))
            self.log_weight = nn.Parameter(torch.full((size,), -2.0 * math.log(scale)))
        if size and self.follows_roots:
            self.slope_by_root = nn.Parameter(torch.zeros(num_roots, size))
            self.log_weight_by_root = nn.Parameter(torch.zeros(num_roots, size))
        if self.follows_roots:
            self.root_loc = nn.Parameter(torch.zeros(num_roots))
            self.log_root_width = nn.Parameter(torch.zeros(num_roots))

    def moved(self, roots: Tensor) -> Tensor:
        """How far roots ``(P, R)`` are from where the messages are exact, up to a bound."""
        offset = roots - self.fixed_or("root_loc")
        # Linear to within a thousandth over half of the width, and bounded by it.
        ratio = (offset * (-self.fixed_or("log_root_width")).exp()).square()
        bounded: Tensor = offset * (1.0 + ratio.square().square()) ** -0.125
        return bounded

    def _at_centre(self) -> tuple[Tensor, Tensor]:
        """Slopes and log weights where the roots have not moved."""
        if self.fixed_centre is None:
            return self.slope, self.log_weight
        return (
            self.fixed_slope + STEP * self.fixed_unit * self.slope,
            self.fixed_log_weight + STEP * self.log_weight,
        )

    def messages(self, moved: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Centre, slope and log weight of each block, for roots that have :meth:`moved`."""
        if not self._sizes:
            return []
        slope, log_weight = self._at_centre()
        if moved is not None:
            slope = slope + moved @ self.fixed_or("slope_by_root")
            added = moved @ self.fixed_or("log_weight_by_root")
            log_weight = log_weight + added.clamp(-MOST_LOG_WEIGHT, MOST_LOG_WEIGHT)
        centres, slopes, log_weights = (
            part.split(self._sizes, -1) for part in (self.fixed_or("centre"), slope, log_weight)
        )
        return list(zip(centres, slopes, log_weights, strict=True))

    def message_params(self) -> list[nn.Parameter]:
        """What :meth:`messages` and :meth:`moved` are made of."""
        return [param for param in self._parameters.values() if param is not None]

    def as_fixed(self) -> dict[str, Tensor]:
        own = self.own_numbers()
        if self._sizes:
            own["unit"] = (0.5 * own["log_weight"]).exp()
        return own

    def leave(self) -> None:
        if self.in_frame:
            own = {name: self.fixed_or(name) for name in self.names}
            if self.fixed_centre is not None:
                own["slope"], own["log_weight"] = self._at_centre()
            self.set_fixed(own, own=True)
