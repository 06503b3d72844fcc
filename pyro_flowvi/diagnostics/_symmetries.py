"""Missed modes that are mirror images of where a guide draws, under exact symmetries of the model's density.

Exchanged labels of a mixture, exchanged breakpoints, signs of factors: draws say which exchange brings a
missed region to the guide's, the density itself whether that is a symmetry.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from .._compile.log_density import ValueAndGrad
from .._program.packing import Packing
from ._chains import Whitening, guarded
from ._symmetry_moves import GAIN, NEAR, Clause, Elements, Move, Summary, families, proposed, slice_of

__all__ = ["Symmetry", "find_symmetry", "share_in_words"]

NUM_CHECKED: Final = 8
"""Draws of the guide, as many farther out, and states of the region, at which a symmetry must hold."""
FARTHER: Final = 3.0
"""Multiple of the spread of the draws: in their midst what is nearly a symmetry looks like one."""
LEAST_MASS: Final = 0.01
"""Share of the missed mass below which a region is left out."""
ROUNDS: Final = 3
"""Moves one after another: an exchange of labels, then of signs, say."""
MOST_IMAGES: Final = 120
TOLERANCE: Final = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Difference of two log densities, relative to their size, that rounding may make."""


@dataclass(frozen=True)
class Symmetry:
    """What makes missed modes of one that a guide has.

    :param under: the transformations, in words.
    :param images: modes that they make of one, itself included.
    :param explained: share of the missed mass in its images.
    :param exchanges: whether labels or sites change places.
    :param signs: whether signs change.
    """

    under: str
    images: int
    explained: float
    exchanges: bool
    signs: bool

    def missed(self, share: float) -> float:
        """The share of the mass that is missed: all images have the same, however chains weighed them.

        :param share: as they weighed it.
        """
        return 1.0 - (1.0 - share * (1.0 - self.explained)) / self.images


def find_symmetry(
    value_and_grad: ValueAndGrad,
    packing: Packing,
    draws: Tensor,
    regions: Sequence[Tensor],
    masses: Sequence[float],
) -> Symmetry | None:
    """The symmetries under which missed regions are images of where a guide draws; None without one.

    :param value_and_grad: unconstrained points ``(P, D)`` to log densities, and gradients that are not used.
    :param packing: what the points are made of.
    :param draws: draws of the guide, ``(S, D)``, of the model's dtype.
    :param regions: states of chains in each region, ``(n, D)``.
    :param masses: share of the posterior mass of each region.

    Example::

        >>> def model():
        ...     a = pyro.sample("a", dist.Normal(0.0, 3.0))
        ...     b = pyro.sample("b", dist.Normal(0.0, 3.0))
        ...     pyro.sample("y", dist.Normal(a * b, 1.0), obs=torch.tensor(-6.0))
        >>> from pyro_flowvi._program.log_density import UnconstrainedModel
        >>> density = UnconstrainedModel(model)
        >>> draws = torch.tensor([-2.0, 3.0]) + 0.1 * torch.randn(500, 2)
        >>> find_symmetry(density.value_and_grad, density.packing, draws, [draws.flip(-1)], [0.5]).under
        'swapping a and b'
    """
    elements = Elements(packing)
    search = _Search(value_and_grad, elements, draws)
    found: list[Move] = []
    images = [search.guide]
    explained = 0.0
    total = sum(masses)
    for states, mass in zip(regions, masses, strict=True):
        if not mass > LEAST_MASS * total:
            continue
        e = elements.of(states.to(draws))
        if any(Summary.of(e).distances(image).max() <= NEAR**2 for image in images[1:]):
            explained += mass
            continue
        steps = search.to_guide(e)
        if steps:
            explained += mass
            known = {move.key for move in found}
            found.extend(step for step in steps if step.key not in known)
            images = _images(search.generators(found), search.guide)
    if len(images) < 2:
        return None
    clauses = tuple(dict.fromkeys(clause for move in found for clause in move.clauses))
    return Symmetry(
        in_words(clauses, len(images) > 2),
        len(images),
        explained / total,
        any(clause[0] in ("swap", "axis") for clause in clauses),
        any(clause[0] in ("sign", "signs", "reflect") for clause in clauses),
    )


class _Search:
    """Moves of elements that are symmetries of a density."""

    def __init__(self, value_and_grad: ValueAndGrad, elements: Elements, draws: Tensor) -> None:
        self.elements, self._like = elements, draws
        where = torch.zeros(draws.shape[-1], dtype=torch.float64, device=draws.device)
        self._density = guarded(value_and_grad, Whitening(where, torch.ones_like(where)), draws)
        e = elements.of(draws)
        self.guide = Summary.of(e)
        near, far = _some(e), _some(e)
        self._draws = torch.cat([near, e.mean(0) + FARTHER * (far - e.mean(0))])
        self._families = families(elements)

    def _log_p(self, e: Tensor) -> Tensor:
        """log densities of points ``(P, E)``, by a measure that no exchange changes."""
        z = self.elements.back(e).to(self._like)
        return self._density(z.double())[0] - self.elements.log_measure(z)

    def _same(self, moves: Sequence[Move], points: Tensor) -> list[bool]:
        """Which of the moves leave the density of all points as it is."""
        if not moves:
            return []
        values = self._log_p(torch.cat([points, *(move.of(points) for move in moves)]))
        before, after = values[: len(points)], values[len(points) :].reshape(len(moves), -1)
        allowed = TOLERANCE.get(self._like.dtype, 1e-3) * (1.0 + before.abs())
        equal = ((after - before).abs() <= allowed) | ~before.isfinite()
        same: list[bool] = (equal.all(-1) & before[0].isfinite()).tolist()
        return same

    def _holds(self, move: Move, points: Tensor) -> bool:
        return self._same([move], points)[0]

    def to_guide(self, states: Tensor) -> list[Move]:
        """The symmetries that one after another bring a region to where the guide draws; empty if none do."""
        start = region = Summary.of(states)
        points = torch.cat([self._draws, _some(states)])
        first, steps = start.distances(self.guide).max(), []
        for _ in range(ROUNDS):
            moves = proposed(self.elements, self._families, region, self.guide)
            likely = [move for move, ok in zip(moves, self._same(moves, self._draws[:1]), strict=True) if ok]
            step = next((move for move in likely if self._holds(move, points)), None)
            if step is None:
                break
            step = self._least(step, region, points)
            region = step.of_summary(region)
            steps.append(step)
            if region.distances(self.guide).max() <= NEAR**2:
                break
        last = region.distances(self.guide).max()
        return steps if last <= NEAR**2 and last <= 0.25 * first else []

    def _least(self, move: Move, region: Summary, points: Tensor) -> Move:
        """The move without those of its parts that are symmetries of their own and bring nothing nearer."""
        enough = float(move.of_summary(region).distances(self.guide).sum()) + GAIN
        for i in reversed(range(len(move.parts))):
            less = move.without(i)
            near = float(less.of_summary(region).distances(self.guide).sum()) <= enough
            move = less if near and less.parts and self._holds(less, points) else move
        return move

    def generators(self, found: Sequence[Move]) -> list[Move]:
        """Also those that move other labels of the same units."""
        related = [move for step in found for move in step.siblings()]
        return [*found, *(move for move in related if self._holds(move, self._draws))]


def _some(e: Tensor) -> Tensor:
    """A few of the rows."""
    return e[torch.randperm(len(e))[:NUM_CHECKED].to(e.device)]


def _images(generators: Sequence[Move], guide: Summary) -> list[Summary]:
    """Where the group takes the guide's draws, these first; at most :data:`MOST_IMAGES` places."""
    moved = np.zeros(len(guide.mean), dtype=bool)
    for move in generators:
        moved |= (move.source != np.arange(len(moved))) | (move.sign < 0.0)
    images, done = [guide], 0
    while done < len(images) < MOST_IMAGES:
        for move in generators:
            image = move.of_summary(images[done])
            means, variances = (
                np.stack([getattr(i, of)[moved] for i in images]) for of in ("mean", "variance")
            )
            apart = (image.mean[moved] - means) ** 2 > NEAR * (image.variance[moved] + variances)
            if apart.any(-1).all():
                images.append(image)
        done += 1
    return images[:MOST_IMAGES]


def share_in_words(share: float) -> str:
    """A simple fraction, or a percentage.

    Example::

        >>> share_in_words(0.5), share_in_words(1 / 3), share_in_words(0.07)
        ('half', 'a third', '7 %')
    """
    names = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 6: "a sixth", 8: "an eighth"}
    for parts, name in names.items():
        if abs(share * parts - 1.0) < 0.04:
            return name
    return f"{100.0 * share:.2g} %" if share >= 0.01 else "less than 1 %"


def in_words(clauses: Sequence[Clause], several: bool) -> str:
    """What moves do, by the names of sites.

    :param several: whether there are more of the kind: other labels, or signs of others.

    Example::

        >>> in_words([("swap", "a", "b"), ("sign", "w")], False)
        'swapping a and b and changing the sign of w'
    """
    lists: list[str] = []
    turned: list[str] = []
    axes: dict[str, dict[str, None]] = {}
    slices: dict[str, dict[str, None]] = {}
    verb = "swapping"
    longest = [set(rest) for kind, *rest in clauses if kind == "swap" and len(rest) > 2]
    for kind, *rest in clauses:
        if kind == "swap" and not any(set(rest) < names for names in longest):
            lists.append(_and(rest))
            verb = verb if len(rest) == 2 else "permuting"
        elif kind == "axis":
            place, count, moved = rest
            if count > 2 and len(moved) == 2 and not several:
                lists.append(_and(slice_of(place, label) for label in moved))
            else:
                axes.setdefault(_noun(place), {})[place[0]] = None
                verb = verb if count == 2 else "permuting"
        elif kind == "signs":
            place, count, which = rest
            if len(which) == count:
                turned.append(place[0])
            elif several:
                slices.setdefault(_noun(place), {})[place[0]] = None
            else:
                turned.extend(slice_of(place, label) for label in which)
        elif kind == "sign":
            turned.append(rest[0])
    lists.extend(f"the {noun} of {_and(sites)}" for noun, sites in axes.items())
    turned.extend(f"{noun} of {_and(sites)}" for noun, sites in slices.items())
    said = [f"{verb} {(' together with ' if longest else ', ').join(lists)}"] if lists else []
    if turned:
        one = len(turned) == 1 and not slices
        said.append(f"changing the sign{'' if one else 's'} of {_and(dict.fromkeys(turned))}")
    said.extend(f"reflecting {rest[0]} in its interval" for kind, *rest in clauses if kind == "reflect")
    return _and(said)


def _and(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _noun(place: Clause) -> str:
    """What an axis of a site has."""
    _, axis, ndim = place
    if ndim > 2:
        return "slices"
    return "elements" if ndim == 1 else ("rows", "columns")[axis]
