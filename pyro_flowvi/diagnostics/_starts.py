"""Where chains start that are to find what a guide misses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .._program.batching import in_parts
from ._chains import ValueAndGrad, run_chains
from ._spaces import Space

__all__ = ["Starts", "far_starts", "wide_starts"]

ANNEALED: Final = 0.35
"""Share of the gradients in which the far chains come to the temperature of the posterior."""
HOTTEST: Final = 20.0
"""Temperature at which far chains start."""
COLDEST: Final = 0.1
"""Temperature at which a third of them starts: to fall into narrow regions of high density."""
SCALES: Final = (2.0, 3.0, 4.5, 7.0, 11.0, 18.0, 30.0)
"""Multiples of the guide's spread at which far chains start."""
SHRUNK_SCALES: Final = (0.1, 0.3, 0.6, 1.0)
"""Multiples at which cold chains start."""
CANDIDATES: Final = 4
"""Points drawn for each far start, of which the likelier ones are taken."""
WIDTH: Final = 128
"""Points that are scored at once."""


@dataclass(frozen=True)
class Starts:
    """Points ``(P, D)`` and the temperatures at which chains leave them, ``(P,)``."""

    points: Tensor
    first: Tensor

    @classmethod
    def joined(cls, parts: Sequence["Starts"]) -> "Starts":
        """All of them, one part after another."""
        return cls(torch.cat([part.points for part in parts]), torch.cat([part.first for part in parts]))

    @classmethod
    def tempered(cls, points: Tensor) -> "Starts":
        """Those that leave at the temperature of the posterior."""
        return cls(points, torch.ones(len(points)).to(points))

    def temperature(self, used: float) -> Tensor:
        """Of each chain, once a share of its gradients is used."""
        return self.first ** max(0.0, 1.0 - used / ANNEALED)


def wide_starts(space: Space, count: int) -> Starts:
    """Points far around the guide's draws, near the origin of the model's space, and near the mean."""
    draws, dim, total = space.draws, space.draws.shape[-1], CANDIDATES * count
    group = torch.arange(total) // CANDIDATES
    turn = group // 3
    cold = torch.arange(count) % 3 == 2
    scale = torch.where(
        cold[group],
        torch.tensor(SHRUNK_SCALES)[turn % len(SHRUNK_SCALES)],
        torch.tensor(SCALES)[turn % len(SCALES)],
    )
    points = scale.to(draws).unsqueeze(-1) * draws[torch.randint(len(draws), (total,))]
    box = space.coordinates(4.0 * torch.rand(total, dim).to(draws) - 2.0)
    from_box = (group % 3 == 1) & (turn % 2 == 1)
    points = torch.where(from_box.unsqueeze(-1).to(draws.device), box, points)
    # Of each few candidates the likeliest: the others of a sharp likelihood are beyond what a float holds.
    log_p = in_parts(space.density, points, WIDTH)[0].reshape(count, CANDIDATES)
    chosen = points.reshape(count, CANDIDATES, dim)[torch.arange(count), log_p.argmax(-1)]
    finite = log_p.amax(-1).isfinite().unsqueeze(-1)
    first = torch.where(cold.to(draws.device), COLDEST, HOTTEST).to(draws)
    return Starts(torch.where(finite, chosen, draws[torch.randint(len(draws), (count,))]), first)


def far_starts(space: Space, latents: Space, count: int, warmup: int, evaluations: int) -> Starts:
    """Points wide around in the noise, and as many to which chains in the model's own space have come.

    Such a chain may be stuck there, as in the neck of a funnel, which it leaves as soon as it runs over the
    noise; or it has found a mode, where it stays.

    :param space: the noise of a guide's map.
    :param latents: the model's space.
    """
    own = wide_starts(latents, count)
    alone = torch.ones(count, dtype=torch.long).to(own.points.device)
    chains = run_chains(latents.density, own.points, alone, own.temperature, warmup, evaluations)
    found = space.coordinates(latents.latents(chains.states[-1]))
    kept = _defined(space.density, found)
    return Starts.joined([wide_starts(space, count), Starts.tempered(found[kept])])


def _defined(density: ValueAndGrad, points: Tensor) -> Tensor:
    """Where a density is finite."""
    return in_parts(density, points.nan_to_num(torch.inf), WIDTH)[0].isfinite()
