"""Fits on several processes where ranks fail, differ, die, and go on from a checkpoint."""

import importlib
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_flowvi import AutoPlanar, AutoRealNVP, FitDiverged, fit
from pyro_flowvi.infer import LostRank, _checkpoint
from tests.distributed_fits import elbo, equal, normals_of_rows, numbers, points, regression
from tests.ranks import on_ranks
from tests.rows import data, given, normals

fitting = importlib.import_module("pyro_flowvi.infer._fit")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


# -- what goes wrong --------------------------------------------------------------------------------


def bad_data(times):
    """A fit to numbers of which rank 1 gets none at step 20, so many times; what has become of it."""
    left = [times]

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0, validate_args=False), obs=y)

    def supply(i):
        step, rank = divmod(i, 2)
        bad = rank == 1 and step == 20 and left[0] > 0
        left[0] -= bad
        return torch.full((4,), torch.nan if bad else 1.0)

    guide = AutoNormal(model)
    try:
        result = fit(model, guide, batches=supply, num_steps=60, seed=0, compile=False)
    except FitDiverged as error:
        return str(error), numbers(guide)
    return result.num_restarts, len(result.losses), numbers(guide)


def no_answer(kind):
    """A fit in which rank 1 raises, hangs or dies at step 10."""
    guide = AutoPlanar(normals_of_rows, num_layers=2)

    def supply(i):
        if i == 2 * 10 + 1:
            if kind == "raises":
                raise KeyError("no such row")
            if kind == "hangs":
                time.sleep(12.0)
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(4)

    started = time.monotonic()
    try:
        fit(normals_of_rows, guide, batches=supply, num_steps=60, seed=0, compile=False)
    except (KeyError, LostRank) as error:
        torch.manual_seed(0)
        finite = all(param.isfinite().all() for param in guide.parameters())
        return type(error), str(error), time.monotonic() - started, bool(finite)


def differ(kind):
    rank = torch.distributed.get_rank()
    y, options = torch.ones(4), {"seed": 0, "num_steps": 5}
    model = normals_of_rows
    if kind == "seed" and rank == 1:
        options["seed"] = 1
    if kind == "shape" and rank == 1:
        y = torch.ones(5)
    if kind == "data" and rank == 1:
        y = torch.zeros(4)
    if kind == "checkpoint" and rank == 0:
        options["checkpoint"] = os.devnull + "/run.pt"
    if kind == "model" and rank == 1:

        def model(y):
            normals_of_rows(y)

    if kind == "latents":
        names = ("a", "b")

        def model(y):
            pyro.sample(names[rank], dist.Normal(0.0, 1.0))
            normals_of_rows(y)

    fit(model, AutoPlanar(model, num_layers=2), y, **options)


def too_few(size):
    fit(normals, AutoRealNVP(normals), data(7), model_kwargs={"size": size}, seed=0)


def one_batch():
    y, rows = data(40)[:10], torch.arange(10)
    model = given(40)
    fit(model, AutoRealNVP(model), batches=[(y, rows)], seed=0)


def refused_batch():
    """A fit in which rank 1 is once given more rows than a page has, after a pass that shows all."""
    y, model, shown = data(40), given(40), [0]

    def supply(i):
        step, rank = divmod(i, 2)
        shown[0] += rank == 1 and step == 6
        rows = torch.arange(40).split(5)[rank::2][step % 4]
        rows = torch.cat([rows, rows]) if rank == 1 and step == 6 and shown[0] == 2 else rows
        return y[rows], rows

    guide = AutoRealNVP(model)
    result = fit(model, guide, batches=supply, num_steps=20, seed=0)
    guide.gather_rows()
    return result.num_restarts, result.losses, numbers(guide)


def moved_apart():
    """A fit in which rank 1 changes a parameter of its own accord."""
    guide = AutoPlanar(normals_of_rows, num_layers=2)

    def supply(i):
        if i == 2 * 10 + 1:
            with torch.no_grad():
                next(guide.parameters()).add_(1e-12)
        return torch.ones(4)

    fit(normals_of_rows, guide, batches=supply, num_steps=60, seed=0, compile=False)


class TestFailures:
    @pytest.mark.long
    def test_parameters_that_come_apart(self, tmp_path):
        for found in on_ranks(tmp_path / "ranks", 2, moved_apart):
            assert isinstance(found, RuntimeError)
            assert "expected the same numbers on all ranks, got others on rank 1" in str(found)
            assert "AutoPlanar" in str(found)

    @pytest.mark.long
    def test_numbers_that_are_none_on_one_rank_take_all_back(self, tmp_path):
        one, two = on_ranks(tmp_path / "ranks", 2, bad_data, 1)
        assert one[:2] == two[:2] == (1, 60)
        assert equal(one[2], two[2])

    @pytest.mark.long
    def test_a_batch_that_one_rank_refuses_takes_all_back(self, tmp_path):
        one, two = on_ranks(tmp_path / "ranks", 2, refused_batch)
        assert one[0] == two[0] == 1
        assert len(one[1]) == 20
        assert torch.equal(one[1], two[1])
        assert equal(one[2], two[2])

    @pytest.mark.long
    def test_too_many_are_an_error_on_all(self, tmp_path):
        one, two = on_ranks(tmp_path / "ranks", 2, bad_data, 1000)
        assert "step 20" in one[0]
        assert "'y'" in one[0]
        assert one[0] == two[0]
        assert equal(one[1], two[1])

    @pytest.mark.long
    @pytest.mark.parametrize("kind", ["raises", "hangs", "dies"])
    def test_a_rank_that_is_gone_stops_the_others(self, tmp_path, kind):
        patience = timedelta(seconds=4)
        one, two = on_ranks(tmp_path / "ranks", 2, no_answer, kind, patience=patience)
        assert one[0] is LostRank
        assert one[1].startswith("rank 0: another rank has died, failed or does not answer")
        assert one[2] < 60.0
        assert one[3]
        assert two is None if kind != "raises" else two[0] is KeyError

    @pytest.mark.long
    @pytest.mark.parametrize(
        ("kind", "told"),
        [
            ("seed", "seed: expected the same on all ranks, got '0' on rank 0 and '1' on rank 1"),
            ("shape", "args: forms of data: expected the same on all ranks, got 'torch.float64 (4,)'"),
            ("data", "args: contents of data"),
            ("checkpoint", "whether checkpoint is given: expected the same on all ranks, got True on rank 0"),
            ("model", "model: expected the same on all ranks, got 'normals_of_rows'"),
            ("latents", "model: latents: expected the same on all ranks"),
        ],
    )
    def test_ranks_that_differ(self, tmp_path, kind, told):
        for found in on_ranks(tmp_path / "ranks", 2, differ, kind):
            assert isinstance(found, ValueError)
            assert told in str(found)

    @pytest.mark.long
    def test_too_few_rows(self, tmp_path):
        for found in on_ranks(tmp_path / "rows", 2, too_few, 5):
            assert isinstance(found, ValueError)
            assert "plate 'n': expected at least 5 rows" in str(found)
        for found in on_ranks(tmp_path / "batches", 2, one_batch):
            assert isinstance(found, ValueError)
            assert "batches: expected a list of at least as many batches as there are ranks" in str(found)


# -- killed and resumed ------------------------------------------------------------------------------


def fit_saved(kind, file, victims=(), moment=None):
    """A fit that writes at each check; at a moment of the third time some ranks are killed."""
    fitting.CHECKPOINT_SECONDS = 0.0
    rank, saved, count = torch.distributed.get_rank(), _checkpoint.Checkpoint._save, [0]

    def save(self, path, state):
        count[0] += path.name.endswith(f"rank{rank}")
        own = path == self.path
        struck = rank in victims and count[0] == 3
        if struck and moment == ("before the shared file" if own else "before its part"):
            os.kill(os.getpid(), signal.SIGKILL)
        saved(self, path, state)
        if struck and moment == ("after the shared file" if own else "after its part"):
            os.kill(os.getpid(), signal.SIGKILL)

    _checkpoint.Checkpoint._save = save
    options = {"num_steps": 25, "lr": 0.01, "checkpoint": file, "seed": 0}
    if kind == "rows":
        guide = AutoRealNVP(normals)
        result = fit(normals, guide, data(40), model_kwargs={"size": 8}, **options)
    elif kind == "batches":
        model = regression()
        guide = AutoRealNVP(model)
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*points()), batch_size=10, shuffle=True
        )
        result = fit(model, guide, batches=loader, loss=elbo(), **options)
    else:
        model = regression(20)
        guide = AutoRealNVP(model)
        result = fit(model, guide, *points(), **options)
    return result.losses, numbers(guide), result.gradient_norms


class TestResume:
    @pytest.mark.long
    @pytest.mark.parametrize(
        ("kind", "victims", "moment"),
        [
            ("rows", (1,), "before its part"),
            ("rows", (0,), "before the shared file"),
            ("rows", (0,), "after the shared file"),
            ("rows", (0, 1), "after its part"),
            ("batches", (1,), "after its part"),
            ("a plate", (0,), "before the shared file"),
        ],
    )
    def test_of_ranks_that_were_killed(self, tmp_path, kind, victims, moment):
        file, stranger = tmp_path / "run.pt", tmp_path / "run.pt.b.3.rank0"
        stranger.touch()  # of another run
        whole = on_ranks(tmp_path / "whole", 2, fit_saved, kind, tmp_path / "whole.pt")
        killed = on_ranks(
            tmp_path / "killed", 2, fit_saved, kind, file, victims, moment, patience=timedelta(seconds=10)
        )
        assert [found is None for found in killed] == [rank in victims for rank in range(2)]
        assert all(found is None or isinstance(found, LostRank) for found in killed)
        resumed = on_ranks(tmp_path / "resumed", 2, fit_saved, kind, file)
        for one, other in zip(whole, resumed, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[2], other[2])
            assert equal(one[1], other[1])
        stranger.unlink()
        left = sorted(path.name.rsplit(".", 1)[-1] for path in tmp_path.glob("run.pt*"))
        assert left == ["pt", "rank0", "rank1"]

    @pytest.mark.long
    def test_a_part_that_is_gone(self, tmp_path):
        file = tmp_path / "run.pt"
        on_ranks(tmp_path / "whole", 2, fit_saved, "rows", file)
        next(tmp_path.glob("run.pt.*rank1")).unlink()
        for found in on_ranks(tmp_path / "again", 2, fit_saved, "rows", file):
            assert isinstance(found, ValueError)
            assert "rank1" in str(found)
            assert "missing" in str(found)


SCRIPT = """
import os, signal, sys
import torch
import pyro_flowvi.infer._fit
from pyro_flowvi import AutoRealNVP, fit
from tests.rows import data, normals

sys.modules["pyro_flowvi.infer._fit"].CHECKPOINT_SECONDS = 0.0
folder, dies = sys.argv[1:]
torch.set_num_threads(1)

def model(y, size):
    normals(y, size=size)

def watched(self, *args, write=pyro_flowvi.infer._checkpoint.Checkpoint.write):
    write(self, *args)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if dies == "dies" and first and self._generation == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

pyro_flowvi.infer._checkpoint.Checkpoint.write = watched
guide = AutoRealNVP(model)
file = f"{folder}/{dies}.pt"
result = fit(model, guide, data(24), 6, num_steps=20, lr=0.01, seed=0, checkpoint=file, compile="auto")
print(result)
guide.gather_rows()
if os.environ["RANK"] == "0":
    torch.save((result.losses, guide.state_dict()), f"{folder}/{dies}.found")
"""


@pytest.mark.long
def test_torchrun_restarts_from_the_checkpoint(tmp_path):
    """The same as without the interruption, to the last bit."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    for dies in ("lives", "dies"):
        command = [*launch, "--max-restarts", "1", str(script), str(tmp_path), dies]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"{dies}.found") for dies in ("lives", "dies"))
    assert torch.equal(one[0], two[0])
    assert equal(one[1], two[1])
