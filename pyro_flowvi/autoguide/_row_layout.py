"""Which numbers of a page of rows belong to which row."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._program.packing import Packing
from .._program.rows import RowPlate

__all__ = ["Order", "RowLayout"]


class Order:
    """Numbers of a page by their rows, ``(B, W)`` of W numbers each.

    :param row_of: the row of each number, of every row equally many.
    """

    def __init__(self, row_of: Tensor) -> None:
        self.num = int(row_of.max()) + 1
        self._order = row_of.argsort(stable=True)
        self._back = self._order.argsort()
        self._in_order = bool((self._order == torch.arange(len(row_of), device=row_of.device)).all())

    def by_row(self, value: Tensor, dim: int) -> Tensor:
        """A page's tensor with the rows in front, ``(B, ..., W, ...)``."""
        ordered = value if self._in_order else value.index_select(dim, self._order.to(value.device))
        rows: Tensor = ordered.unflatten(dim, (self.num, -1)).movedim(dim, 0)
        return rows

    def as_page(self, value: Tensor, dim: int) -> Tensor:
        """The inverse of :meth:`by_row`."""
        flat = value.movedim(0, dim).flatten(dim, dim + 1)
        return flat if self._in_order else flat.index_select(dim, self._back.to(flat.device))


class RowLayout:
    """Where the rows of a plate are in the packed latents of a page, and what each counts.

    :param packing: the latents of a page of B rows.
    :param plate: the plate.
    :param weights: ``(B,)``, by reference.
    """

    def __init__(self, packing: Packing, plate: RowPlate, sites: Sequence[str], weights: Tensor) -> None:
        self.sites, self.weights, self.num = tuple(sites), weights, len(weights)
        """The sites under the plate."""
        self.places: dict[str, Any] = {}
        """Where the tables' parts stand in the page's map, once they were looked for."""
        self.row_of: dict[str, Tensor] = {}
        """The row of each number of those sites, in their free shapes."""
        for site in sites:
            latent = packing.latents[site]
            axis = len(latent.shape) - latent.fn.event_dim + plate.dim
            shape = [1] * len(latent.free_shape)
            shape[axis] = latent.free_shape[axis]
            self.row_of[site] = (
                torch.arange(shape[axis], device="cpu").reshape(shape).expand(latent.free_shape)
            )

    def row_of_numbers(self, sites: Sequence[str]) -> Tensor:
        """The row of each number of some sites, one after another."""
        return torch.cat([self.row_of[site].flatten() for site in sites])

    def weights_of(self, sites: Sequence[str], count: int) -> Tensor:
        """The weight of each number of some sites, or of each joint latent of one, ``count`` of them."""
        row_of = self.row_of_numbers(sites)
        return self.weights[row_of[:: len(row_of) // count]]

    def noise_weights(self, packing: Packing) -> Tensor:
        """The weight of each number of the packed vector; one for what belongs to no row."""
        parts = [
            self.weights[self.row_of[site].flatten()]
            if site in self.row_of
            else self.weights.new_ones(latent.free_shape.numel())
            for site, latent in packing.latents.items()
        ]
        return torch.cat(parts)
