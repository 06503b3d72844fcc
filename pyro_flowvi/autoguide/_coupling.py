"""What latents have to do with each other beside their priors: by the data that they share."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ._fixed import Fixed

__all__ = ["Coupling", "lower_of", "raw_of"]

MAX_MIXED = 128
"""Numbers of a block up to which their noise is mixed."""
MAX_LINKS = 40_000
"""Numbers of a matrix of links; larger blocks of one length are linked number by number."""


def lower_of(raw: Tensor) -> Tensor:
    """The lower triangular matrices with positive diagonals of any matrices."""
    return raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp())


def raw_of(lower: Tensor) -> Tensor:
    """The inverse of :func:`lower_of`."""
    return lower.tril(-1) + torch.diag_embed(lower.diagonal(dim1=-2, dim2=-1).log())


class Coupling(Fixed):
    """How the latents of one block depend on those of earlier blocks, and on each other, given their parents.

    Data that are seen through several latents at once, as the crossed factors of ``a[i] + b[j]``, make them
    dependent.  The slope of a message gets a linear term for each block before, and the noise of the block is
    mixed by a lower triangular matrix.

    :param size: of the block.
    :param earlier: the sizes of the blocks before, by their places.
    :param by_number: links numbers one by one only, those of one row, and mixes none.
    """

    fixed_mix: Tensor | None
    fixed_unit: Tensor

    def __init__(self, size: int, earlier: Mapping[int, int], by_number: bool = False) -> None:
        most = 0 if by_number else MAX_LINKS
        links = {j: n for j, n in earlier.items() if size * n <= most or size == n}
        self.names = ("mix", "unit", *(f"{what}_{j}" for j in links for what in ("link", "unit")))
        super().__init__()
        self._size, self._earlier = size, dict(earlier)
        self.mixes = not by_number and 1 < size <= MAX_MIXED
        self.links = tuple(links)
        """Places of the blocks before that this one is linked with."""
        self.active = True
        """Whether there is anything to do: all is zero until it is found or trained."""
        if self.mixes:
            self.mix = nn.Parameter(torch.zeros(size, size))
        for j, n in links.items():
            shape = (size, n) if size * n <= most else (size,)
            self.register_parameter(f"link_{j}", nn.Parameter(torch.zeros(shape)))

    # -- links ---------------------------------------------------------------------------------

    def _link(self, place: int) -> Tensor:
        own: Tensor = getattr(self, f"link_{place}")
        fixed: Tensor | None = getattr(self, f"fixed_link_{place}")
        if fixed is None:
            return own
        unit, other = self.fixed_unit, getattr(self, f"fixed_unit_{place}")
        scale: Tensor = unit.unsqueeze(-1) * other if own.dim() == 2 else unit * other
        return fixed + scale * own

    def is_dense(self, place: int) -> bool:
        """Whether each number is linked with all of an earlier block, and not with one."""
        own: Tensor = getattr(self, f"link_{place}")
        return own.dim() == 2

    def pull(self, offsets: Mapping[int, Tensor]) -> Tensor:
        """What is added to the slopes, of how far earlier blocks are from their centres, ``(P, n)`` each."""
        total = torch.zeros(())
        for place, offset in offsets.items():
            link = self._link(place)
            total = total.to(offset) + (offset @ link.mT if self.is_dense(place) else offset * link)
        return total

    # -- mixing --------------------------------------------------------------------------------

    def _matrix(self) -> Tensor:
        own = lower_of(self.mix)
        return own if self.fixed_mix is None else self.fixed_mix @ own

    def mixed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Noise ``(P, M)`` of independent numbers, mixed; the log-determinants of the numbers, ``(M,)``."""
        matrix = self._matrix()
        return x @ matrix.mT, matrix.diagonal().log()

    def unmixed(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`mixed`, and its log-determinants."""
        matrix = self._matrix()
        x = torch.linalg.solve_triangular(matrix.mT, e, upper=True, left=False)
        return x, -matrix.diagonal().log()

    def push(self, score: Tensor) -> Tensor:
        """The score of mixed noise, of that of the noise."""
        pushed: Tensor = torch.linalg.solve_triangular(self._matrix(), score, upper=False, left=False)
        return pushed

    # -- frames --------------------------------------------------------------------------------

    def as_fixed(self) -> dict[str, Tensor]:
        own = self.own_numbers()
        if self.mixes:
            own["mix"] = lower_of(own["mix"])
        own["unit"] = torch.ones(self._size)
        own |= {f"unit_{j}": torch.ones(n) for j, n in self._earlier.items() if j in self.links}
        like = next(self.parameters(), torch.zeros(()))
        return {name: value.to(like) for name, value in own.items()}

    @torch.no_grad()
    def leave(self) -> None:
        own = {f"link_{j}": self._link(j) for j in self.links}
        if self.mixes:
            own["mix"] = raw_of(self._matrix())
        self.set_fixed(own, own=True)
        self.active = True

    @torch.no_grad()
    def rest_if_idle(self) -> None:
        """Leaves out what does nothing, until :meth:`leave`."""
        parts = [self._link(j) for j in self.links]
        if self.mixes:
            parts.append(raw_of(self._matrix()))
        self.active = any(bool(part.any()) for part in parts)
