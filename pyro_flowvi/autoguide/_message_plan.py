"""What a message map draws together, in which order, and where the numbers stand."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._compile.priors import PriorGraph
from .._program.packing import Packing
from .._program.structure import LatentStructure

__all__ = ["MessagePlan", "Piece", "PlacedPrior", "Prior", "joined", "levels_of", "taken"]

MOST_APART = 12
"""Sites up to which each is a block of its own, and blocks are coupled."""

Prior = tuple[Tensor, Tensor]
"""Location and scale for each of P points, of a joint prior the lower factor of its covariance."""


class Piece(NamedTuple):
    """Sites that are drawn together, after those that their priors depend on."""

    sites: tuple[str, ...]
    place: int | None
    """Of the block of messages that they have; None with joint messages."""
    needed: Sequence[str] = ()
    """The latents that their priors depend on."""
    priors: Callable[..., list[Prior]] = list
    """Of the values of these."""

    def priors_given(self, values: Mapping[str, Tensor], like: Tensor) -> list[Prior]:
        """The sites' priors, in the dtype of ``like``; none for sites without a known one."""
        found = self.priors(*(values[site] for site in self.needed))
        return [(loc.to(like), scale.to(like)) for loc, scale in found]


class PlacedPrior(NamedTuple):
    """A site's prior at P points of the packed latents."""

    loc: Tensor
    scale: Tensor
    """Lower factors if the prior is joint."""
    places: Tensor
    """Where the site's numbers are; -1 for what is left out."""
    joint: bool

    def put(self, numbers: Tensor, rows: Tensor) -> None:
        """Writes numbers of the site, ``(P, *)`` or of one row for all, into ``rows``, ``(P, D)``."""
        flat = self.places.flatten()
        kept = flat >= 0
        rows[:, flat[kept]] = numbers.reshape(len(numbers), -1)[:, kept].expand(len(rows), -1).to(rows)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Numbers side by side, ``(P, M)``, of parts ``(P, *)``."""
    flat = [part.reshape(len(part), math.prod(part.shape[1:])) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, -1)


def taken(z: Tensor, places: Tensor, otherwise: float = 0.0) -> Tensor:
    """The numbers of a vector at places, in the shape of these; ``otherwise`` at -1."""
    places = places.to(z.device)
    return torch.where(places >= 0, z[places.clamp(min=0)], otherwise)


def levels_of(structure: LatentStructure) -> list[list[str]]:
    """Message sites with a prior, each after those that its prior depends on."""
    depth: dict[str, int] = {}
    for site, parents in structure.messages.items():  # in the program's order
        depth[site] = 1 + max((depth[parent] for parent in parents if parent in depth), default=-1)
    levels: list[list[str]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    for site, level in depth.items():
        levels[level].append(site)
    return levels


class MessagePlan:
    """The pieces of a message map in the order in which they are drawn, and the blocks of their messages.

    Sites of one level that have a message for each number are a block together, or each by itself where the
    sites are few; a site with a joint prior has messages of its own.  Sites without a known prior are the
    first block.

    :param packing: the latents.
    :param structure: which of them are roots, and which have messages.
    :param priors: their priors.
    """

    def __init__(self, packing: Packing, structure: LatentStructure, priors: PriorGraph) -> None:
        self.packing, self.structure, self.priors = packing, structure, priors
        self._numel = {name: latent.free_shape.numel() for name, latent in packing.latents.items()}
        levels = levels_of(structure)
        self._apart = sum(map(len, levels)) <= MOST_APART
        self.blocks: list[tuple[str, ...]] = [structure.free] if structure.free else []
        """Sites with a message for each number."""
        self.joint_sites: list[str] = []
        """Sites with joint messages."""
        self.pieces = [Piece(structure.free, 0)] if structure.free else []
        for level in levels:
            alone = tuple(site for site in level if not priors.joint[site])
            for block in [(site,) for site in alone] if self._apart else [alone] if alone else []:
                self.pieces.append(Piece(block, len(self.blocks), *priors.only(block)))
                self.blocks.append(block)
            for site in level:
                if priors.joint[site]:
                    self.pieces.append(Piece((site,), None, *priors.only([site])))
                    self.joint_sites.append(site)
        self.block_sizes = [self.count(block) for block in self.blocks]
        drawn = [site for piece in self.pieces for site in piece.sites]
        self._with_prior = [site for site in drawn if site in structure.messages]
        self._all_needed, self._all_priors = priors.only(self._with_prior)

    def __reduce__(self) -> tuple[Any, ...]:
        return MessagePlan, (
            self.packing,
            self.structure,
            self.priors,
        )  # the priors' functions have no pickle

    def renewed(self, priors: PriorGraph) -> "MessagePlan":
        """The plan with priors that were recorded again, if they depend on the same latents."""
        if priors.joint != self.priors.joint or priors.parents != self.priors.parents:
            return self
        return MessagePlan(self.packing, self.structure, priors)

    # -- sizes ---------------------------------------------------------------------------------

    def count(self, sites: Sequence[str]) -> int:
        """How many numbers sites have."""
        return sum(self._numel[site] for site in sites)

    @property
    def num_messages(self) -> int:
        """How many latents are drawn by messages."""
        return sum(self.block_sizes) + self.count(self.joint_sites)

    def joint_shape(self, site: str) -> tuple[int, int]:
        """How many latents with a joint prior a site has, and of how many numbers each."""
        *rows, width = self.packing.latents[site].free_shape
        return math.prod(rows), width

    @property
    def coupled(self) -> list[int]:
        """The blocks that may be coupled with each other: not those with numbers that are left out."""
        left_out = self.packing.left_out.keys()
        return [i for i, block in enumerate(self.blocks) if self._apart and left_out.isdisjoint(block)]

    @property
    def num_couplings(self) -> int:
        """How many blocks have a place for a coupling, the first ones of all."""
        return len(self.blocks) if self._apart else 0

    # -- numbers by site and by piece ----------------------------------------------------------

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Packed latents by site."""
        return self.packing.split(rows)

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`split`."""
        return self.packing.keep(joined([values[site] for site in self.packing.latents]))

    def gather(self, values: Mapping[str, Tensor], piece: Piece) -> Tensor:
        """A piece's numbers side by side, ``(P, M)``, of a joint one ``(P, N, K)``."""
        block = joined([values[site] for site in piece.sites])
        return (
            block if piece.place is not None else block.reshape(len(block), *self.joint_shape(piece.sites[0]))
        )

    def scatter(self, block: Tensor, piece: Piece) -> dict[str, Tensor]:
        """The inverse of :meth:`gather`."""
        latents = self.packing.latents
        parts = joined([block]).split([self._numel[site] for site in piece.sites], -1)
        return {
            site: part.reshape(len(block), *latents[site].free_shape)
            for site, part in zip(piece.sites, parts, strict=True)
        }

    def spread(self, log_det: Tensor, piece: Piece) -> dict[str, Tensor]:
        """Log-determinants of a piece by site, for each number or joint latent, ``(P, *)``."""
        if piece.place is not None:
            return self.scatter(log_det, piece)
        (site,) = piece.sites
        return {site: log_det.reshape(len(log_det), *self.packing.latents[site].free_shape[:-1])}

    def counted(self, log_det: Tensor, piece: Piece) -> Tensor:
        """Log-determinants of a piece without those of numbers that are no part of the vector."""
        out = self.packing.left_out
        if not any(site in out for site in piece.sites):
            return log_det
        dropped = [
            out[site].flatten().to(log_det.device)
            if site in out
            else log_det.new_zeros(self._numel[site], dtype=torch.bool)
            for site in piece.sites
        ]
        mask = torch.cat(dropped)
        if piece.place is None:
            mask = mask.reshape(self.joint_shape(piece.sites[0])).all(-1)
        return torch.where(mask, 0.0, log_det)

    # -- where things stand --------------------------------------------------------------------

    def places(self) -> dict[str, Tensor]:
        """Where the numbers of each site are in the packed vector, on the CPU; -1 for what is left out."""
        numbers = torch.arange(1.0, self.packing.dim + 1.0, dtype=torch.float64, device="cpu")
        return {site: where.long() - 1 for site, where in self.split(numbers).items()}

    def places_of(self, sites: Sequence[str]) -> Tensor:
        """The same of some sites, one after another."""
        places = self.places()
        none = torch.zeros(0, dtype=torch.long, device="cpu")
        return torch.cat([none, *(places[site].flatten() for site in sites)])

    def root_places(self) -> Tensor:
        """The same of the roots."""
        return self.places_of(self.structure.roots)

    def block_places(self) -> Tensor:
        """The same of the numbers that have a message each, in the order of these."""
        return self.places_of([site for block in self.blocks for site in block])

    def joint_places(self) -> list[Tensor]:
        """The same of the sites with joint messages, ``(N, K)`` each."""
        places = self.places()
        return [places[site].reshape(self.joint_shape(site)) for site in self.joint_sites]

    # -- priors --------------------------------------------------------------------------------

    def priors_given(self, values: Mapping[str, Tensor]) -> dict[str, Prior]:
        """The known priors of the sites with messages, of the values of all latents."""
        found = self._all_priors(*(values[site] for site in self._all_needed))
        return dict(zip(self._with_prior, found, strict=True))

    def priors_at(self, z: Tensor) -> list[PlacedPrior]:
        """The same at points ``(P, D)``."""
        places = self.places()
        return [
            PlacedPrior(*prior, places[site], self.priors.joint[site])
            for site, prior in self.priors_given(self.split(z)).items()
        ]

    def root_scales(self, z: Tensor) -> Tensor:
        """Standard deviations of the roots' priors, ``(D,)``; infinite where none is known."""
        scales, places = torch.full_like(z, math.inf), self.places()
        roots = [site for site in self.structure.roots if site in self.priors.joint]
        needed, priors = self.priors.only(roots)
        values = self.split(z.unsqueeze(0))
        for site, (_, scale) in zip(roots, priors(*(values[name] for name in needed)), strict=True):
            spread = scale.norm(dim=-1) if self.priors.joint[site] else scale
            scales[places[site]] = spread[0].to(z)
        return scales
