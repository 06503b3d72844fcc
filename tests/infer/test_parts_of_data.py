"""Which batches of the data a rank takes: all of them, each by one rank."""

from itertools import chain, islice

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from pyro_flowvi._ranks import Ranks
from pyro_flowvi.infer._parts_of_data import fixed_part, in_turn

ROWS = torch.arange(40)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def rows_of(batches):
    return torch.cat([batch[0] if isinstance(batch, list) else batch for batch in batches])


SOURCES = {
    "a list": lambda rank, size: ROWS.split(5),
    "a loader": lambda rank, size: DataLoader(TensorDataset(ROWS), 5, shuffle=True),
    "a stream": lambda rank, size: DataLoader(Stream(), 5),
    "divided already": lambda rank, size: DataLoader(
        TensorDataset(ROWS), 5, sampler=DistributedSampler(TensorDataset(ROWS), size, rank)
    ),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("source", SOURCES)
def test_an_epoch_shows_each_row_once(source, size):
    for epochs in (1, 2):
        found = []
        for rank in range(size):
            torch.manual_seed(0)
            taken = in_turn(SOURCES[source](rank, size), Ranks(rank, size))
            found.append(rows_of(islice(taken, 8 * epochs // size)))
        assert torch.equal(torch.cat(found).sort().values, ROWS.repeat_interleave(epochs))


def test_three_ranks_go_on_from_epoch_to_epoch():
    found = [list(islice(in_turn(ROWS.split(5), Ranks(rank, 3)), 8)) for rank in range(3)]
    assert torch.equal(rows_of(chain(*found)).sort().values, ROWS.repeat_interleave(3))


def test_what_runs_once_ends_for_all_at_the_same_step():
    found = [list(in_turn(iter(ROWS.split(5)), Ranks(rank, 3))) for rank in range(3)]
    assert [len(batches) for batches in found] == [2, 2, 2]


def test_a_sampler_of_other_ranks():
    loader = DataLoader(TensorDataset(ROWS), 5, sampler=DistributedSampler(TensorDataset(ROWS), 2, 0))
    with pytest.raises(ValueError, match="a DistributedSampler of rank 1 of 2, got rank 0 of 2"):
        next(in_turn(loader, Ranks(1, 2)))


@pytest.mark.parametrize("batches", [ROWS.split(5), DataLoader(TensorDataset(ROWS), 5, shuffle=True)])
def test_rows_that_stay(batches):
    parts = [fixed_part(batches, Ranks(rank, 3)) for rank in range(3)]
    one, other = ([rows_of(part).sort().values for part in parts] for _ in "12")
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(torch.cat(one).sort().values, ROWS)


@pytest.mark.parametrize(
    "batches",
    [
        ROWS.split(20),
        iter(ROWS.split(5)),
        DataLoader(Stream(), 5),
        DataLoader(TensorDataset(ROWS), 5, sampler=RandomSampler(ROWS, replacement=True)),
        DataLoader(TensorDataset(ROWS), 5, sampler=RandomSampler(ROWS, num_samples=10)),
    ],
)
def test_rows_that_cannot(batches):
    assert fixed_part(batches, Ranks(0, 3)) is None
