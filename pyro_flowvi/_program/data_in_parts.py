"""All data of a model that sees some of its rows at a time, a part after another.

Where no latent stands under a subsampled plate, the log density is a mean over parts, each of which counts as
if its rows stood for all: as in a step of SVI, but every row has its turn, and the same at every pass.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils import _pytree as pytree

from .._ranks import Ranks
from .._types import Program, Trace
from .log_density import UnconstrainedModel
from .rows import RowPlate, noting_plates, showing
from .structure import is_subsampled, sample_sites

__all__ = ["BatchParts", "DataInParts", "RowParts", "in_batches", "in_rows", "row_plate"]

MOST_BYTES = 2**29
"""What the batches of an epoch may take in memory."""
MOST_SHAPES = 3
"""Shapes of batches, each of which has a density of its own."""
_TENSOR = object()


def _generator(epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(epoch)


class DataInParts:
    """Parts of the data, of which one at a time is in place.

    :param densities: one for each shape that parts have; they read the tensors of the part that is in place.
    :param shares: of each part in the whole; as far as :meth:`divide` is still to come, in any unit.
    """

    def __init__(self, densities: list[UnconstrainedModel], shares: Sequence[float]) -> None:
        self.densities, self.shares = densities, shares

    def divide(self, ranks: Ranks) -> None:
        """Makes the shares those in the data of all ranks."""
        total = float(ranks.sum(torch.tensor(sum(self.shares), dtype=torch.float64, device="cpu")))
        self.shares = [share / total for share in self.shares]

    def __len__(self) -> int:
        return len(self.shares)

    def put(self, part: int) -> int:
        """Puts a part in place; the number of its density."""
        raise NotImplementedError

    def order(self, epoch: int | None = None) -> list[int]:
        """The parts in the order of an epoch, the same for the same number; None for their own order.

        Until the next call they are those of this epoch.
        """
        if epoch is None:
            return list(range(len(self)))
        found: list[int] = torch.randperm(len(self), generator=_generator(epoch), device="cpu").tolist()
        return found


class RowParts(DataInParts):
    """The rows of a plate, so many at a time, in an order that is another in each epoch.

    :param density: of the model as it is.
    :param plate: which rows it sees.
    :param size: rows of a part; of the last one some may count nothing.
    :param own: of the plate's rows those that there are parts of.
    """

    def __init__(
        self, density: UnconstrainedModel, model: Program, plate: RowPlate, size: int, own: range
    ) -> None:
        number = -(-len(own) // size)
        self._own, self._each = own, number * plate.size / len(own)
        self._rows = torch.arange(own.start, own.start + size, device=density.start.device)
        self._weights = density.start.new_full((size,), self._each)
        self._shuffled, self._left = (
            torch.arange(own.start, own.stop, device="cpu"),
            len(own) - (number - 1) * size,
        )
        shown = showing(model, plate, self._rows, self._weights)
        seen = density.at(shown, changing=[self._rows, self._weights])
        super().__init__([seen], [1.0 / self._each] * number)

    def put(self, part: int) -> int:
        size, last = len(self._rows), part == len(self) - 1
        rows = self._shuffled[part * size : (part + 1) * size]
        self._weights.fill_(self._each)
        self._rows[: len(rows)] = rows
        if last and self._left < size:  # a row again that does not count
            self._rows[self._left :] = rows[0]
            self._weights[self._left :] = 0.0
        return 0

    def order(self, epoch: int | None = None) -> list[int]:
        rows = torch.arange(self._own.start, self._own.stop, device="cpu")
        if epoch is not None:
            rows = rows[torch.randperm(len(rows), generator=_generator(epoch), device="cpu")]
        self._shuffled = rows
        return super().order(epoch)


class BatchParts(DataInParts):
    """The batches of an epoch, which are kept.

    :param densities: for each shape the density, and the tensors that it reads.
    :param batches: of each the number of its density, and its tensors.
    """

    def __init__(
        self,
        densities: list[tuple[UnconstrainedModel, list[Tensor]]],
        batches: list[tuple[int, list[Tensor]]],
        shares: Sequence[float],
    ) -> None:
        super().__init__([density for density, _ in densities], shares)
        self._places, self._batches = [tensors for _, tensors in densities], batches

    def put(self, part: int) -> int:
        which, tensors = self._batches[part]
        for place, tensor in zip(self._places[which], tensors, strict=True):
            place.copy_(tensor)
        return which


class _Crowded(LookupError):
    """There are several subsampled plates, or a loop, or latents under one."""


def _run(model: Program, args: Any, kwargs: Mapping[str, Any]) -> tuple[Trace, RowPlate | None]:
    """A run of the model, and its one subsampled plate, if there is one."""
    with poutine.block(), noting_plates() as told, torch.no_grad(), torch.random.fork_rng():
        trace: Trace = poutine.trace(model).get_trace(*args, **kwargs)
    found = {}
    for site in sample_sites(trace).values():
        for frame in site["cond_indep_stack"]:
            if is_subsampled(frame):
                if not site["is_observed"] or not frame.vectorized:
                    raise _Crowded(frame.name)
                found[frame.name] = frame
    if len(found) > 1:
        raise _Crowded(", ".join(found))
    for frame in found.values():
        given = told.get(frame.name, False)
        return trace, RowPlate(frame.name, frame.full_size, frame.size, frame.dim, given)
    return trace, None


def row_plate(model: Program, args: Any, kwargs: Mapping[str, Any]) -> RowPlate | None:
    """The plate whose rows the model draws itself; None without one, or with more than that."""
    try:
        _, plate = _run(model, args, kwargs)
    except _Crowded:
        return None
    return None if plate is None or plate.given else plate


def in_rows(
    density: UnconstrainedModel, model: Program, plate: RowPlate, size: int, own: range
) -> RowParts | None:
    """The data of a model that draws its rows itself; None where these are not all that there is to it.

    :param plate: of the rows.
    :param size: rows of a part, about; as many as the model draws where it can see no others.
    :param own: the rows.
    """
    number = -(-len(own) // max(size, plate.shown))
    for count in dict.fromkeys((-(-len(own) // number), plate.shown)):
        if count > len(own):
            continue
        parts = RowParts(density, model, plate, count, own)
        if _runs(parts):
            return parts
    return None


def _runs(parts: DataInParts) -> bool:
    try:
        for part in (len(parts) - 1, 0):
            own = parts.densities[parts.put(part)]
            if not bool(own.value_and_grad(own.start.unsqueeze(0))[0].isfinite()):
                return False
    except Exception:  # whatever a model raises that knows how many rows it sees
        return False
    return True


@dataclass(frozen=True)
class _Batch:
    """The arguments of a step, taken apart into tensors and what is around them."""

    tensors: list[Tensor]
    rest: list[Any]
    """What else is in it, and marks where the tensors are."""
    spec: Any

    @classmethod
    def of(cls, call: Any) -> "_Batch":
        leaves, spec = pytree.tree_flatten(call)
        rest = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls([leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)], rest, spec)

    @property
    def kind(self) -> str:
        """What batches share that one graph can take."""
        return repr((self.spec, self.rest, [(t.shape, t.dtype, t.device) for t in self.tensors]))

    def call(self, tensors: list[Tensor]) -> Any:
        """The arguments with other tensors."""
        left = iter(tensors)
        return pytree.tree_unflatten(
            [next(left) if part is _TENSOR else part for part in self.rest], self.spec
        )


def _kept(batches: Iterable[Any], as_call: Callable[[Any], Any]) -> list[_Batch] | None:
    """The batches of an epoch; None if they are too many, or another epoch has others."""
    found, size = list[_Batch](), 0
    for batch in batches:
        found.append(_Batch.of(as_call(batch)))
        size += sum(tensor.nbytes for tensor in found[-1].tensors)
        if size > MOST_BYTES:
            return None
    if not found or isinstance(batches, list | tuple):
        return found or None
    again = (_Batch.of(as_call(batch)) for batch in batches)
    return found if _moments(found) == _moments(again) else None


def _moments(batches: Iterable[_Batch]) -> dict[int, list[str]]:
    """What an epoch has of each tensor, in whatever order, to some digits, since sums depend on it."""
    totals = dict[int, Tensor]()
    for batch in batches:
        for i, tensor in enumerate(batch.tensors):
            values = tensor.double()
            own = torch.stack([values.abs().sum(), values.square().sum(), (1.0 + values.abs()).log().sum()])
            totals[i] = totals[i] + own if i in totals else own
    return {i: [f"{value:.8e}" for value in total.tolist()] for i, total in totals.items()}


def in_batches(
    density: UnconstrainedModel, model: Program, batches: Any, as_call: Callable[[Any], Any]
) -> BatchParts | None:
    """The data of a model that is given its rows as arguments; None where they have no end or no order.

    :param batches: an iterable with a length, of which each pass has the same rows.
    :param as_call: from a batch the arguments of the model.
    """
    if not hasattr(batches, "__len__") or (kept := _kept(batches, as_call)) is None:
        return None
    places = dict[str, tuple[int, float]]()
    densities, parts, shares = list[tuple[UnconstrainedModel, list[Tensor]]](), [], []
    for batch in kept:
        if batch.kind not in places:
            if len(places) == MOST_SHAPES:
                return None
            tensors = [tensor.clone() for tensor in batch.tensors]
            made = _of_batch(density, model, tensors, *batch.call(tensors))
            if made is None:
                return None
            places[batch.kind] = len(densities), made[1]
            densities.append((made[0], tensors))
        which, scale = places[batch.kind]
        parts.append((which, batch.tensors))
        # A row counts as much in one batch as in another.
        shares.append(1.0 / scale)
    found = BatchParts(densities, parts, shares)
    return found if _runs(found) else None


def _of_batch(
    density: UnconstrainedModel, model: Program, tensors: list[Tensor], args: Any, kwargs: Any
) -> tuple[UnconstrainedModel, float] | None:
    """The density at arguments that hold a batch, and the scale of what is observed."""
    try:
        trace, plate = _run(model, args, kwargs)
    except _Crowded:
        return None
    observed = [site["scale"] for site in sample_sites(trace).values() if site["is_observed"]]
    scale = max((float(torch.as_tensor(value).double().mean()) for value in observed), default=1.0)
    if plate is None or plate.given:
        return density.at(model, args, kwargs, tensors), scale
    # The plate stands for a scale alone: which rows it draws must not matter.
    weights = density.start.new_full((plate.shown,), plate.size / plate.shown)
    rows = torch.arange(plate.shown, device=density.start.device)
    values = []
    for at in (rows, rows + plate.size - plate.shown):
        own = density.at(showing(model, plate, at, weights), args, kwargs, tensors)
        try:
            values.append(own.value_and_grad(own.start.unsqueeze(0))[0])
        except Exception:  # whatever a model raises at rows that it has not
            return None
    return (own, scale) if torch.equal(*values) else None
