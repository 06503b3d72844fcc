"""Which batches of the data a rank takes."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler, Subset
from torch.utils.data.distributed import DistributedSampler

from .._ranks import Ranks

__all__ = ["fixed_part", "in_turn"]


class _Turns(Sampler[list[int]]):
    """Of the batches of a sampler every so many, counted on from epoch to epoch.

    :param batches: the sampler of the batches of all ranks.
    """

    def __init__(self, batches: Any, ranks: Ranks) -> None:
        self._batches, self._ranks, self._count = batches, ranks, 0

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            self._count += 1
            if (self._count - 1) % self._ranks.size == self._ranks.rank:
                yield batch


def _rounds(batches: Any, most_empty: int = 1) -> Iterator[Any]:
    """Batches again and again, until so many rounds in a row are empty; of what runs once, once."""
    epoch = misses = 0
    while misses < most_empty:
        if isinstance(sampler := getattr(batches, "sampler", None), DistributedSampler):
            sampler.set_epoch(epoch)
        source = iter(batches)
        misses += 1
        for batch in source:
            misses = 0
            yield batch
        if source is batches:
            return
        epoch += 1


def in_turn(batches: Any, ranks: Ranks) -> Iterator[Any]:
    """The batches that a rank takes, epoch after epoch: each of all batches is taken by one rank.

    A DataLoader reads those of its rank alone; one that divides the data itself, by a ``DistributedSampler``,
    is taken as it is.  The last batches of what runs once are left out where not every rank has one.

    :raises ValueError: if a ``DistributedSampler`` divides the data among other ranks.
    """
    if ranks.alone or _divided(batches, ranks):
        yield from _rounds(batches)
    elif _has_rows(batches) and batches.batch_sampler is not None:
        yield from _rounds(_with(batches, batch_sampler=_Turns(batches.batch_sampler, ranks)), ranks.size)
    else:
        source = _rounds(batches)
        while len(step := list(islice(source, ranks.size))) == ranks.size:
            yield step[ranks.rank]


def fixed_part(batches: Any, ranks: Ranks) -> Any:
    """The batches of the rows that a rank has in every epoch; None where they cannot be told."""
    if ranks.alone:
        return batches
    if isinstance(batches, list | tuple):
        return batches[ranks.rank :: ranks.size] if len(batches) >= ranks.size else None
    plain = _has_rows(batches) and type(batches.sampler) in (RandomSampler, SequentialSampler)
    plain = plain and len(batches.sampler) == len(batches.dataset)
    plain = plain and not getattr(batches.sampler, "replacement", False)
    if not plain or batches.batch_size is None or len(batches.dataset) < ranks.size:
        return None
    rows = range(ranks.rank, len(batches.dataset), ranks.size)
    return _with(
        batches,
        dataset=Subset(batches.dataset, rows),
        batch_size=min(batches.batch_size, len(batches.dataset) // ranks.size),
        shuffle=isinstance(batches.sampler, RandomSampler),
        drop_last=batches.drop_last,
    )


def _has_rows(batches: Any) -> bool:
    """Whether batches are those of a loader that names the rows of each."""
    return isinstance(batches, DataLoader) and not isinstance(batches.dataset, IterableDataset)


def _divided(batches: Any, ranks: Ranks) -> bool:
    """Whether batches are those of one rank already."""
    sampler = getattr(batches, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return False
    if sampler.num_replicas != ranks.size or sampler.rank != ranks.rank:
        raise ValueError(
            f"batches: expected a DistributedSampler of rank {ranks.rank} of {ranks.size}, got rank "
            f"{sampler.rank} of {sampler.num_replicas}"
        )
    return True


def _with(loader: Any, **changes: Any) -> Any:
    """A DataLoader like another one."""
    kept = (
        *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn"),
        *("multiprocessing_context", "generator", "prefetch_factor", "persistent_workers"),
    )
    return DataLoader(
        **{"dataset": loader.dataset, **{name: getattr(loader, name) for name in kept}, **changes}
    )
