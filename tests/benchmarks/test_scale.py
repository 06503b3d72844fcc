"""The benchmarks of scale: ten million rows with few groups, the exact posterior, the model of a cluster."""

import json
import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.scale import scaling, ten_million
from benchmarks.scale.scaling import Cost, Network
from pyro_flowvi import AutoRealNVP, fit


@pytest.fixture(autouse=True)
def _float64():
    """As the benchmarks have it, whatever the default type is."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.f32"
    ten_million.write(path, 30)
    return path


class TestTenMillion:
    def test_the_data_are_complete_and_the_same_again(self, data, tmp_path):
        y = ten_million.mapped(data, 30)
        assert y.shape == (30, ten_million.EACH)
        assert y.dtype == torch.float32
        assert (y != 0.0).all()
        ten_million.write(tmp_path / "again", 30)
        assert data.read_bytes() == (tmp_path / "again").read_bytes()
        with pytest.raises(ValueError, match="expected 12400 bytes, got 12000"):
            ten_million.mapped(data, 31)

    def test_the_posterior_is_that_of_the_joint_normal(self, data):
        """By the dense precision of mu and all theta."""
        y = ten_million.mapped(data, 30)
        found = ten_million.exact(y)
        each, noise = ten_million.EACH, ten_million.NOISE**-2
        precision = np.zeros((31, 31))
        precision[0, 0] = ten_million.WIDE**-2 + 30 * ten_million.SPREAD**-2
        precision[0, 1:] = precision[1:, 0] = -(ten_million.SPREAD**-2)
        precision[1:, 1:] = np.eye(30) * (ten_million.SPREAD**-2 + each * noise)
        covariance = np.linalg.inv(precision)
        mean = covariance @ np.concatenate([[0.0], noise * y.double().sum(-1).numpy()])
        assert found.mu_mean == pytest.approx(mean[0], rel=1e-10)
        assert found.mu_sd == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-10)
        np.testing.assert_allclose(found.theta_mean.numpy(), mean[1:], rtol=1e-10)
        np.testing.assert_allclose(np.sqrt(np.diag(covariance)[1:]), found.theta_sd, rtol=1e-10)

    def test_a_fit_of_few_groups(self, tmp_path, monkeypatch, capsys):
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        row = ten_million.run(tmp_path / "rows.f32", 30, 10, 4000, 0, num_steps=60)
        print(ten_million.say(row))
        assert "3,000 rows in 30 groups, 1 processes" in capsys.readouterr().out
        assert row["rows_of_steps"] == 60 * 10 * 100
        assert row["rows_a_second"] == pytest.approx(3000 / row["seconds"])
        assert len(row["mebibytes"]) == 1
        assert row["mebibytes"][0] > 50.0
        assert row["mu_mean"] < 0.1
        assert row["mu_sd_ratio"] == pytest.approx(1.0, abs=0.06)
        assert row["theta_worst_mean"] < 0.1
        assert 0.94 < row["theta_sd_low"] <= row["theta_sd_high"] < 1.06
        assert json.loads(json.dumps(row)) == row

    def test_other_ranks_wait_for_the_data(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ten_million, "PATIENCE", 0.3)
        with pytest.raises(TimeoutError, match="expected rank 0 to write the data"):
            ten_million.awaited(tmp_path / "rows.f32", 1, 30)
        first = ten_million.awaited(tmp_path / "rows.f32", 0, 30)
        assert torch.equal(first, ten_million.awaited(tmp_path / "rows.f32", 1, 30))


class TestCluster:
    def test_the_cost_goes_through_both_measurements(self):
        cost = Cost.between((1000.0, 0.006), (500.0, 0.004))
        assert cost.fixed == pytest.approx(0.002)
        assert cost.unit == pytest.approx(4e-6)
        noisy = Cost.between((500.0, 0.006), (1000.0, 0.005))  # more work in less time
        assert (noisy.fixed, noisy.unit) == (0.005, 0.0)
        steep = Cost.between((500.0, 0.001), (1000.0, 0.005))  # nothing fixed, by more than nothing
        assert steep.fixed == 0.0
        assert steep.unit == pytest.approx(0.005 / 1000.0)

    def test_a_ring_sends_nearly_twice_the_gradient(self):
        network = Network(0.0, 1e6)
        assert scaling.reduction_seconds(1000, 1, network) == 0.0
        for ranks in (2, 8, 64):
            share = 2.0 * (ranks - 1) / ranks
            assert scaling.reduction_seconds(1000, ranks, network) == pytest.approx(share * 8000 / 1e6)
        assert scaling.reduction_seconds(0, 4, Network(1e-3, 1e9)) == pytest.approx(6e-3)

    def test_steps(self):
        cost, network = Cost(1e-3, 1e-6), Network(1e-5, 1e9)
        alone = scaling.step_seconds(cost, 8000, 1000, 1, network)
        assert alone == pytest.approx(9e-3)
        strong = scaling.step_seconds(cost, 8000, 1000, 4, network)
        assert strong == pytest.approx(3e-3 + scaling.reduction_seconds(1000, 4, network))
        weak = scaling.step_seconds(cost, 4 * 8000, 1000, 4, network)
        assert weak - alone == pytest.approx(scaling.reduction_seconds(1000, 4, network))

    def test_the_report(self, tmp_path, capsys):
        setting = {"machine": "a machine", "versions": "of all"}
        rows = [
            {"benchmark": "scaling", "fit": "regression", "shape": shape, "repeat": i, **setting}
            | {"step": step * (1 + 0.1 * i), "bytes": 8000.0, "reducing": 0.001}
            for i in range(3)
            for shape, step in (("one", 0.01), ("one, half", 0.006), ("strong", 0.007), ("weak", 0.011))
        ]
        scaling.report([*rows, {"benchmark": "ten_million"}])
        out = capsys.readouterr().out
        assert "| regression | one | 1 x 8000 rows | 11.0 | 10.0 to 12.0 | 1.00 | 8,000 | – |" in out
        assert "| regression | strong | 2 x 4000 rows | 7.70 | 7.00 to 8.40 | 1.43 | 8,000 | 13 % |" in out
        assert "A model of a cluster" in out
        assert len([line for line in out.splitlines() if "Gbit/s" in line]) == 14
        assert "a machine; of all" in out


class TestCounted:
    def test_a_step_is_the_median_after_the_first_fifth(self):
        calls = [
            (1, 9.0, 5, 9.0),
            (10, 0.2, 100, 0.1),
            (10, 0.2, 100, 0.1),
            (5, 0.1, 50, 0.05),
            (10, 1.0, 100, 0.5),
        ]
        row = scaling.summary(calls)
        assert row["step"] == pytest.approx(0.02)
        assert row["mean_step"] == pytest.approx(1.5 / 35)
        assert row["bytes"] == 10.0
        assert row["reducing"] == pytest.approx(0.01)

    def test_times_the_steps_of_a_fit(self):
        ranks = SimpleNamespace(bytes_reduced=0, seconds_reducing=0.0)
        model, args, options = scaling.draws(4)
        with scaling.timed([ranks]) as calls:
            fit(
                model,
                AutoRealNVP(model),
                *args,
                num_steps=20,
                tolerance=scaling.NEVER,
                seed=0,
                progress=False,
                **options,
            )
        assert sum(count for count, *_ in calls) == 20
        assert all(seconds > 0.0 for _, seconds, *_ in calls)

    def test_keeps_what_a_fit_finds(self, monkeypatch):
        module, user = ModuleType("pyro_flowvi._launch"), ModuleType("pyro_flowvi.user")
        module.find_ranks = user.find_ranks = own = lambda *args: ("ranks", *args)
        monkeypatch.setitem(sys.modules, "pyro_flowvi._launch", module)
        monkeypatch.setitem(sys.modules, "pyro_flowvi.user", user)
        with scaling.counted() as found:
            assert user.find_ranks("auto") == ("ranks", "auto")
        assert found == [("ranks", "auto")]
        assert module.find_ranks is user.find_ranks is own

    def test_says_what_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyro_flowvi._launch", None)
        with pytest.raises(RuntimeError, match="fits can have several processes"), scaling.counted():
            pass
