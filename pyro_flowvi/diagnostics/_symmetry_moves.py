"""Latents as elements that permutations and changes of sign move, and which of these moves data propose."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions.transforms import SigmoidTransform, StickBreakingTransform

from .._program.packing import Packing

__all__ = ["Clause", "Elements", "Family", "Move", "Summary", "families", "proposed", "slice_of"]

Array = NDArray[np.float64]
Places = NDArray[np.int64]
Clause = tuple[Any, ...]
"""A part of a move in words: its kind, then names and numbers."""
MOST_LABELS: Final = 20
MOST_ALIKE: Final = 8
"""Sites of one shape and support of which any two may have been exchanged."""
MOST_COMBINED: Final = 128
"""Choices of the parts that move together which are tried."""
GAIN: Final = 4.0
"""Least squared distance, in sd, by which a move brings a region nearer to a guide's draws."""
NEAR: Final = 3.0
"""Distance, in sd, up to which a latent is where the guide draws it."""


@dataclass(frozen=True)
class _Site:
    name: str
    places: Places
    axes: tuple[int, ...]
    """Those along which elements may be exchanged."""
    kind: tuple[str, ...]
    """Sites of one kind may be exchanged."""
    flip: Clause | None
    """What a change of sign is, if it makes sense."""
    simplex: bool


class Elements:
    """Latents as one vector ``e`` of E numbers, in which exchanging what a model exchanges is a permutation.

    These are the unconstrained numbers, but of a simplex the logarithms: stick-breaking has an order.
    """

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.sites: list[_Site] = []
        start = 0
        for name, latent in packing.latents.items():
            unit = latent.unit_bijection
            parts = list(getattr(unit, "parts", [unit]))
            simplex = isinstance(unit, StickBreakingTransform)
            shape = tuple(latent.shape if simplex else latent.free_shape)
            together = unit.codomain.event_dim
            places = start + np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
            axes = tuple(range(len(shape) if simplex else len(latent.shape) - together))
            flip: Clause | None = None
            if not parts:
                flip = ("sign", name)
            elif isinstance(parts[0], SigmoidTransform):
                flip = ("swap", name, f"1 - {name}") if len(parts) == 1 else ("reflect", name)
            kind = (str(shape), *(type(part).__name__ for part in parts))
            self.sites.append(_Site(name, places, axes, kind, flip, simplex))
            start += places.size
        self.size: int = start

    def of(self, z: Tensor) -> Tensor:
        """``(P, E)`` of points ``(P, D)``, float64."""
        rows = []
        for site, (name, free) in zip(self.sites, self.packing.split(z.double()).items(), strict=True):
            if site.simplex:
                value: Tensor = self.packing.latents[name].bijection(free)
                free = value.clamp_min(torch.finfo(value.dtype).tiny).log()
            rows.append(free.reshape(len(z), -1))
        return torch.cat(rows, -1)

    def back(self, e: Tensor) -> Tensor:
        """The inverse of :meth:`of`."""
        rows = []
        for site, part in zip(
            self.sites, e.split([site.places.size for site in self.sites], -1), strict=True
        ):
            if site.simplex:
                value = part.reshape(-1, *site.places.shape).softmax(-1)
                part = self.packing.latents[site.name].bijection.inv(value).reshape(len(e), -1)
            rows.append(part)
        return self.packing.keep(torch.cat(rows, -1))

    def log_measure(self, z: Tensor) -> Tensor:
        """log |dx/dz| of the simplexes, ``(P,)``: their values, not ``z``, keep volumes when exchanged."""
        total = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for site, (name, free) in zip(self.sites, self.packing.split(z.double()).items(), strict=True):
            if site.simplex:
                bijection = self.packing.latents[name].bijection
                total = total + bijection.log_abs_det_jacobian(free, bijection(free)).reshape(len(z), -1).sum(
                    -1
                )
        return total


@dataclass(frozen=True)
class Summary:
    """Where draws are, by element: mean and variance, ``(E,)``."""

    mean: Array
    variance: Array

    @classmethod
    def of(cls, e: Tensor) -> "Summary":
        values: Array = e.cpu().numpy()
        return cls(values.mean(0), values.var(0))

    def distances(self, other: "Summary") -> Array:
        """Squared, of each element, in sd."""
        both = np.maximum(self.variance + other.variance, 1e-24)
        squared: Array = (self.mean - other.mean) ** 2 / both
        return squared


@dataclass(frozen=True, eq=False)
class _Unit:
    """Elements that move together: those of each of K labels, ``(K, m)``."""

    labels: Places
    clause: Clause
    flips: bool
    sites: frozenset[str] = frozenset()
    """Those that move as wholes."""


@dataclass(frozen=True)
class Family:
    """Units of the same number of labels, and some that change their sign beside an exchange."""

    units: tuple[_Unit, ...]
    beside: tuple[_Unit, ...] = ()


@dataclass(frozen=True, eq=False)
class Move:
    """e -> ``sign * e[source]``, and what it does in words.

    :param parts: the units that move, and whether their signs may.
    :param labels: where each label goes, and its sign.
    """

    source: Places
    sign: Array
    clauses: tuple[Clause, ...] = ()
    parts: tuple[tuple[_Unit, bool], ...] = ()
    labels: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    @property
    def key(self) -> bytes:
        """Of equal moves the same."""
        return self.source.tobytes() + self.sign.tobytes()

    def of(self, e: Tensor) -> Tensor:
        """Of points ``(P, E)``."""
        return e[:, torch.from_numpy(self.source).to(e.device)] * torch.from_numpy(self.sign).to(e)

    def of_summary(self, summary: Summary) -> Summary:
        """Where moved draws are."""
        return Summary(self.sign * summary.mean[self.source], summary.variance[self.source])

    def then(self, other: "Move") -> "Move":
        """This move, and ``other`` after it."""
        return Move(
            self.source[other.source],
            other.sign * self.sign[other.source],
            tuple(dict.fromkeys(self.clauses + other.clauses)),
        )

    def without(self, i: int) -> "Move":
        """The same without its part ``i``."""
        return _move(len(self.source), self.parts[:i] + self.parts[i + 1 :], *self.labels)

    def siblings(self) -> Iterator["Move"]:
        """The same units, moved by any exchange of neighbouring labels and any change of one sign."""
        (target, signs), size = self.labels, len(self.source)
        count = len(target)
        if target != tuple(range(count)):
            for i in range(count - 1):
                swapped = list(range(count))
                swapped[i], swapped[i + 1] = i + 1, i
                yield _move(size, self.parts, tuple(swapped), (1,) * count)
        if min(signs, default=1) < 0 and count > 1:
            signed = tuple(part for part in self.parts if part[1])
            for i in range(count):
                one = tuple(-1 if i == j else 1 for j in range(count))
                yield _move(size, signed, tuple(range(count)), one)


def _identity(size: int) -> Move:
    """The move of ``size`` elements that moves none."""
    return Move(np.arange(size), np.ones(size))


def _move(
    size: int, parts: tuple[tuple[_Unit, bool], ...], target: tuple[int, ...], signs: tuple[int, ...]
) -> Move:
    result, clauses = _identity(size), []
    moved = tuple(i for i, j in enumerate(target) if i != j)
    for unit, signed in parts:
        step = _identity(size)
        if len(unit.labels) == 1:  # beside an exchange
            step.sign[unit.labels[0]] = -1.0
            clauses.append(unit.clause)
        else:
            for i, j in enumerate(target):
                step.source[unit.labels[j]] = unit.labels[i]
                step.sign[unit.labels[j]] = signs[i] if signed else 1.0
            if moved:
                clauses.append((*unit.clause, moved) if unit.clause[0] == "axis" else unit.clause)
            if signed and unit.clause[0] == "axis":
                which = tuple(sorted(target[i] for i, s in enumerate(signs) if s < 0))
                clauses.append(("signs", *unit.clause[1:], which))
            elif signed:
                clauses.extend(("sign", unit.clause[1 + target[i]]) for i, s in enumerate(signs) if s < 0)
        result = result.then(step)
    return Move(result.source, result.sign, tuple(clauses), parts, (target, signs))


def families(elements: Elements) -> dict[int, Family]:
    """What may move together, by the number of labels: axes of one length, sites of one kind."""
    units: dict[int, list[_Unit]] = {}
    sites = [site for site in elements.sites if site.places.size]
    wholes = [
        _Unit(site.places.reshape(1, -1), site.flip, True, frozenset([site.name]))
        for site in sites
        if site.flip is not None
    ]
    for site in sites:
        for axis in site.axes:
            count = site.places.shape[axis]
            if 2 <= count <= MOST_LABELS:
                labels = np.moveaxis(site.places, axis, 0).reshape(count, -1)
                clause = ("axis", (site.name, axis, site.places.ndim), count)
                units.setdefault(count, []).append(_Unit(labels, clause, site.flip is not None))
    kinds: dict[tuple[str, ...], list[_Site]] = {}
    named: dict[tuple[str, ...], list[_Site]] = {}
    for site in sites:
        kinds.setdefault(site.kind, []).append(site)
        stem = re.fullmatch(r"(.*?)_?(\d+|(?<![A-Za-z0-9])[A-Za-z])", site.name)
        named.setdefault((stem[1] if stem else site.name, *site.kind), []).append(site)
    for alike in kinds.values():
        if len(alike) <= MOST_ALIKE:
            for pair in itertools.combinations(alike, 2):
                units.setdefault(2, []).append(_of_sites(pair))
    for several in named.values():
        if 3 <= len(several) <= MOST_LABELS:
            units.setdefault(len(several), []).append(_of_sites(several))
    found = {
        count: Family(tuple(sorted(members, key=lambda unit: int(unit.labels.min()))))
        for count, members in units.items()
    }
    if 2 in found:
        in_units = {
            place for unit in found[2].units for place in unit.labels.flat if unit.clause[0] == "axis"
        }
        beside = tuple(unit for unit in wholes if in_units.isdisjoint(unit.labels.flat))
        found[2] = Family(found[2].units, beside)
    return {1: Family((), tuple(wholes)), **found}


def _of_sites(sites: Any) -> _Unit:
    names = tuple(site.name for site in sites)
    labels = np.stack([site.places.reshape(-1) for site in sites])
    return _Unit(labels, ("swap", *names), sites[0].flip is not None, frozenset(names))


def _assignment(unit: _Unit, region: Summary, guide: Summary, signed: bool) -> Any:
    """Where each label of a region is among the guide's draws, and with which sign; None if nowhere else."""
    from scipy.optimize import linear_sum_assignment

    i, j = unit.labels[:, None], unit.labels[None]
    scale = np.maximum(region.variance[i] + guide.variance[j], 1e-24)
    same = ((region.mean[i] - guide.mean[j]) ** 2 / scale).sum(-1)
    other = ((region.mean[i] + guide.mean[j]) ** 2 / scale).sum(-1) if signed else same
    cost = np.minimum(same, other + 1e-6)
    rows, target = linear_sum_assignment(cost - 1e-6 * np.eye(len(cost)))
    if np.trace(same) - cost[rows, target].sum() < GAIN:
        return None
    signs = np.where(other[rows, target] + 1e-6 < same[rows, target], -1, 1)
    return tuple(map(int, target)), tuple(map(int, signs))


def _with_pairs(found: dict[int, Family], region: Summary, guide: Summary) -> dict[int, Family]:
    """Also two labels of a longer axis, where the region has just these exchanged."""
    pairs = []
    for count, family in found.items():
        for unit in family.units if count > 2 else ():
            chosen = _assignment(unit, region, guide, False)
            moved = [i for i, j in enumerate(chosen[0]) if i != j] if chosen else []
            if len(moved) == 2 and unit.clause[0] == "axis":
                clause = ("swap", *(slice_of(unit.clause[1], i) for i in moved))
                pairs.append(_Unit(unit.labels[moved], clause, unit.flips))
    if not pairs:
        return found
    others = found.get(2, Family((), found[1].beside))
    return {**found, 2: Family((*others.units, *pairs), others.beside)}


def slice_of(place: Clause, label: int) -> str:
    """One label of a site's axis, as an index in Python.

    :param place: the site's name, the axis, and how many there are.
    """
    name, axis, ndim = place
    return f"{name}[{','.join(str(label) if i == axis else ':' for i in range(ndim))}]"


def proposed(elements: Elements, found: dict[int, Family], region: Summary, guide: Summary) -> list[Move]:
    """Moves that would bring a region to where the guide draws, the nearest first."""
    before = region.distances(guide)
    moves: dict[bytes, tuple[float, Move]] = {}
    # Of the same move, that of more labels: it tells of those that it leaves.
    for count, family in sorted(_with_pairs(found, region, guide).items(), key=lambda item: -item[0]):
        wanted: dict[Any, None] = {((0,), (-1,)): None} if count == 1 else {}
        for unit in family.units:
            for signed in (False, True) if unit.flips else (False,):
                if (labels := _assignment(unit, region, guide, signed)) is not None:
                    wanted[labels] = None
        for target, signs in wanted:
            for parts in _choices(elements.size, family, target, signs, region, guide):
                move = _move(elements.size, parts, target, signs)
                after = float(move.of_summary(region).distances(guide).sum())
                if after < float(before.sum()) - GAIN:
                    moves.setdefault(move.key, (after, move))
    enough = min((after for after, _ in moves.values()), default=0.0) + GAIN
    alike = [pair for pair in moves.values() if pair[0] <= enough]
    alike.sort(key=lambda pair: len(pair[1].clauses))
    half = MOST_COMBINED // 2  # those that move least, and those that move most
    chosen = alike if len(alike) <= 2 * half else alike[:half] + alike[-half:]
    farther = sorted((pair for pair in moves.values() if pair[0] > enough), key=lambda pair: pair[0])
    return [move for _, move in (*chosen, *farther[: MOST_COMBINED - len(chosen)])]


def _choices(
    size: int,
    family: Family,
    target: tuple[int, ...],
    signs: tuple[int, ...],
    region: Summary,
    guide: Summary,
) -> Iterator[tuple[tuple[_Unit, bool], ...]]:
    """Which units move, and which of those with signs: what the region leaves open in all ways."""
    exchange, turn = target != tuple(range(len(target))), min(signs) < 0
    options: list[list[tuple[_Unit, bool] | None]] = []
    units = family.units + family.beside
    movers = np.zeros(size, dtype=int)
    for unit in units:
        movers[unit.labels.reshape(-1)] += 1
    for unit in units:
        alone = len(unit.labels) == 1
        ways: list[tuple[_Unit, bool] | None] = [None]
        if alone or exchange:
            ways.append((unit, False))
        if turn and not alone and unit.flips:
            ways.append((unit, True))
        left = []
        for way in ways:
            move = _move(size, (way,), target, signs) if way else _identity(size)
            left.append(move.of_summary(region).distances(guide)[unit.labels.reshape(-1)])
        worst = [float(np.sqrt(d.max())) if d.size else 0.0 for d in left]
        # Others may move the same elements: then its own move need not bring these near.
        shared = bool((movers[unit.labels] > 1).all())
        near = [w <= max(NEAR, 2.0 * min(worst)) for w in worst]
        allowed = [
            i for i in range(len(ways)) if near[i] or (shared and (i == 0 or unit.clause[0] == "axis"))
        ]
        # What moves as the others do comes first, unless the region says no.
        allowed.sort(key=lambda i: (float(left[i].sum()) > float(left[0].sum()) + GAIN, -i))
        options.append([ways[i] for i in allowed])
    for chosen in _combinations(options):
        parts = tuple(way for way in chosen if way is not None)
        names = [name for unit, _ in parts for name in unit.sites]
        if parts and len(names) == len(set(names)):
            yield parts


def _combinations(options: list[list[Any]]) -> Iterator[tuple[Any, ...]]:
    """One of the options of each: the first ones, none, nearly these; all ways where these are not many."""
    most = [ways[0] for ways in options]
    least = [None if None in ways else ways[0] for ways in options]
    for base in (most, least):
        yield tuple(base)
        for i, ways in enumerate(options):
            for way in ways:
                yield (*base[:i], way, *base[i + 1 :])
    yield from itertools.islice(itertools.product(*options), 4 * MOST_COMBINED)
