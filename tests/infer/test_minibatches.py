"""Fits to minibatches without latents under the plate: as right as from all data."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_flowvi import AutoRealNVP, fit
from pyro_flowvi.infer._training_loop import TrainingLoop

N, DIM = 3000, 4


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)


def regression():
    """Normal data with known noise: rows, and the posterior's mean and standard deviations."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, DIM, generator=generator)
    y = x @ torch.tensor([1.0, -0.5, 0.2, 0.0]) + 2.0 * torch.randn(N, generator=generator)
    precision = x.T @ x / 4.0 + torch.eye(DIM)
    covariance = torch.linalg.inv(precision)
    return x, y, covariance @ (x.T @ y / 4.0), covariance.diagonal().sqrt()


def by_plate(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
    with pyro.plate("rows", N, subsample_size=100) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ w, 2.0), obs=y[rows])


def by_batch(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(DIM), 1.0).to_event(1))
    with pyro.plate("rows", N, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(x @ w, 2.0), obs=y)


@pytest.mark.parametrize("form", ["plate", "loader"])
def test_the_posterior_of_all_rows(form):
    x, y, mean, sd = regression()
    model = by_plate if form == "plate" else by_batch
    guide = AutoRealNVP(model, num_layers=2)
    if form == "plate":
        result = fit(model, guide, x, y, seed=0, progress=False)
    else:
        loader = DataLoader(TensorDataset(x, y), 128, shuffle=True)
        result = fit(model, guide, batches=loader, seed=0, progress=False)
    assert result.converged
    assert len(result.losses) <= 300
    torch.manual_seed(0)
    w = guide.sample_posterior(10_000)["w"]
    assert float(((w.mean(0) - mean) / sd).abs().max()) < 0.06
    assert float((w.std(0) / sd).log().abs().max()) < 0.06


def test_goes_on_bit_for_bit(tmp_path):
    x, y, *_ = regression()
    x = x.pow(3)  # not at its end at once

    def model(x, y):
        w = pyro.sample("w", dist.StudentT(3.0, torch.zeros(DIM), 1.0).to_event(1))
        sd = pyro.sample("sd", dist.HalfCauchy(1.0))
        with pyro.plate("rows", N, subsample_size=40) as rows:
            pyro.sample("y", dist.StudentT(2.0, x[rows] @ w, sd), obs=y[rows])

    def run(path, stop=None):
        pyro.clear_param_store()
        guide = AutoRealNVP(model, num_layers=2, name="guide")
        calls = {"steps": 0}
        own = TrainingLoop._record

        def counted(self, *args):
            own(self, *args)
            calls["steps"] += 1
            if calls["steps"] == stop:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainingLoop, "_record", counted)
            patch.setattr("pyro_flowvi.infer._fit.CHECKPOINT_SECONDS", 0.0)
            return fit(model, guide, x, y, num_steps=60, seed=0, checkpoint=path, progress=False)

    whole = run(tmp_path / "whole")
    assert run(tmp_path / "parts", stop=37).stop_reason == "interrupted"
    resumed = run(tmp_path / "parts")
    assert resumed.losses.equal(whole.losses)
    assert all(resumed.best_state[name].equal(value) for name, value in whole.best_state.items())
