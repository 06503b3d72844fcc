"""Which processes train together, and what they tell each other."""

import os

import pytest
import torch
import torch.distributed
from torch.testing._internal.distributed import fake_pg

from pyro_flowvi._launch import find_ranks
from pyro_flowvi._ranks import ALONE, LostRank, Ranks
from tests.ranks import on_ranks

CPU = torch.device("cpu")


class TestFind:
    def test_none(self):
        assert find_ranks("auto", CPU) is ALONE
        assert find_ranks(False, CPU) is ALONE
        with pytest.raises(
            ValueError, match="distributed: expected a process group or the environment of torchrun"
        ):
            find_ranks(True, CPU)
        with pytest.raises(ValueError, match="distributed: expected True, False or 'auto', got 'yes'"):
            find_ranks("yes", CPU)

    def test_a_launch_of_one(self, monkeypatch):
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        assert find_ranks("auto", CPU) is ALONE
        assert not torch.distributed.is_initialized()

    @pytest.mark.parametrize(
        ("backend", "told"),
        [
            ("fake", "distributed: expected a process group of gloo or nccl, got 'fake'"),
            ("nccl", "expected a process group that serves cpu, got 'nccl' on a machine without GPUs"),
        ],
    )
    def test_a_group_that_cannot_serve(self, monkeypatch, backend, told):
        store = fake_pg.FakeStore()
        torch.distributed.init_process_group("fake", rank=0, world_size=2, store=store)
        try:
            monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backend)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            with pytest.raises(ValueError, match=told):
                find_ranks("auto", CPU)
        finally:
            torch.distributed.destroy_process_group()


def told():
    """Everything that ranks tell each other, on each."""
    ranks = find_ranks(True, CPU)
    rank = ranks.rank
    grad = torch.arange(3.0) + rank
    found = {
        "sum": ranks.sum(torch.tensor([1.0, rank])),
        "average": ranks.average(grad, 1e9 + rank, rank),
        "shares": ranks.average(grad, 1.0 + rank, 0, 1.0 + 2.0 * rank),
        "same": ranks.same(f"rank {rank}"),
        "all": ranks.all(rank),
        "every": (ranks.every(True), ranks.every(rank == 0)),
        "join": ranks.join(torch.full((rank + 1, 2), float(rank)), [r + 1 for r in range(ranks.size)]),
        "part": ranks.part(10),
    }
    ranks.tell(rank == 1)
    before = ranks.heard(False)
    ranks.average(grad, 0.0)
    found["heard"] = before, ranks.heard(False), ranks.heard(False)
    led = torch.full((2, 2), float(rank)).T
    ranks.lead(led)
    found["lead"] = led
    torch.manual_seed(rank)
    ranks.share_noise()
    shared = torch.rand(1)
    with ranks.own_noise():
        own = torch.rand(1)
    with ranks.parted_noise():
        parted = torch.rand(1)
    found["noise"] = torch.cat([shared, own, parted, torch.rand(1)])
    ranks.check_equal({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bool)})
    for name, one in (("a", torch.ones(3)), ("b", torch.tensor([1.0, 1.0 + rank * 2**-23]))):
        try:
            ranks.check_equal({name: one})
        except RuntimeError as error:
            found["check"] = str(error)
    return found


def test_what_ranks_tell_each_other(tmp_path):
    one, two, three = on_ranks(tmp_path / "ranks", 3, told, double=False)
    for found in (one, two, three):
        assert torch.equal(found["sum"], torch.tensor([3.0, 3.0]))
        mean, loss, dropped = found["average"]
        assert torch.equal(mean, torch.arange(3.0) + 1.0)
        assert (loss, dropped) == (pytest.approx(1e9 + 1.0, abs=1e-3), 3)
        mean, loss, _ = found["shares"]
        assert torch.allclose(mean.double(), torch.arange(3.0).double() + 13.0 / 9.0)
        assert loss == pytest.approx((1.0 + 6.0 + 15.0) / 9.0)
        assert found["same"] == "rank 0"
        assert found["all"] == [0, 1, 2]
        assert found["every"] == (True, False)
        assert torch.equal(torch.cat(found["join"])[:, 0], torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 2.0]))
        assert found["heard"] == (False, True, False)
        assert torch.equal(found["lead"], torch.zeros(2, 2))
        assert found["check"].startswith(
            "parameter 'b': expected the same numbers on all ranks, got others on rank 1"
        )
    noise = torch.stack([found["noise"] for found in (one, two, three)])
    assert torch.equal(noise[0, [0, 3]], noise[1, [0, 3]])
    assert len(noise[:, 1].unique()) == len(noise[:, 2].unique()) == 3
    assert [i for found in (one, two, three) for i in found["part"]] == list(range(10))


def deserted():
    """What is left where the other rank is gone."""
    ranks = find_ranks("auto", CPU)
    if ranks.rank == 1:
        os._exit(0)
    ranks.sum(torch.ones(1))


def test_a_rank_that_is_gone(tmp_path):
    left, _ = on_ranks(tmp_path / "ranks", 2, deserted)
    assert isinstance(left, LostRank)
    assert left.rank == 0


def test_a_rank_alone_raises():
    with pytest.raises(ValueError, match="no"):
        ALONE.attempt(lambda: int("no"), None, [ValueError])
    assert Ranks(0, 2).attempt(lambda: int("no"), None, [ValueError]) is None
