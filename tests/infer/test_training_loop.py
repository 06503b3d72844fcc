"""The training loop of fit: rates, averages, plateaus, recovery, data in batches, checkpoints."""

import hashlib
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal, init_to_value

from pyro_flowvi import AutoPlanar, AutoRealNVP, FitDiverged, fit
from pyro_flowvi._program.log_weights import LogWeights
from pyro_flowvi.infer._run_state import SMALL_BATCH, Run, is_worse
from pyro_flowvi.infer._schedule import PATIENCE
from pyro_flowvi.objectives.annealed import TraceAnnealed_ELBO
from tests import zoo

ROOT = Path(__file__).parents[2]


def hierarchy():
    return zoo.make_zoo()["hierarchy"]


def regression(x, y, size=None):
    """A model with parameters of its own: the slope is learned, the intercept is latent."""
    slope = pyro.param("slope", torch.tensor(0.0))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", size or len(x), subsample_size=len(x) if size else None):
        pyro.sample("y", dist.Normal(intercept + slope * x, 1.0), obs=y)


def rows(num=400, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(num)
    return x, 3.0 + 2.0 * x + torch.randn(num)


class TestRun:
    def test_reasons_and_records(self):
        model, args = hierarchy()
        result = fit(model, AutoPlanar(model, 4), *args, num_steps=2000, seed=0, progress=False)
        assert result.stop_reason in ("converged", "completed")
        steps = len(result.losses)
        assert result.rates.shape == result.gradient_norms.shape == (steps,)
        assert bool((result.gradient_norms > 0).all())
        assert result.elbos[0][0] == 60  # a thirtieth, in tens
        assert all(a[0] < b[0] for a, b in zip(result.elbos, result.elbos[1:], strict=False))
        assert result.num_dropped == result.num_restarts == 0

    def test_a_plateau_lowers_the_rate_and_the_next_ends_the_run(self):
        """Where states are compared on validation data; elsewhere there are rounds."""

        def model(y):
            x = pyro.sample("x", dist.StudentT(4.0, 0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 10.0), obs=y)

        guide, y = AutoNormal(model), torch.tensor(0.0)
        options = {"num_steps": 20_000, "lr": 0.02, "num_particles": 8, "seed": 0, "progress": False}
        result = fit(model, guide, y, validation=y, **options)
        assert result.stop_reason == "converged"
        assert result.converged
        assert len(result.losses) < 20_000
        drops = (result.rates[1:] / result.rates[:-1]) < 0.5
        assert int(drops.sum()) == 1
        assert len(result.elbos) > PATIENCE

    def test_each_round_has_a_cosine_of_its_own(self):
        """The rate rises to its peak three times; a posterior out of reach takes all steps."""

        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(0.0, (2.0 * x).exp()))

        guide = AutoNormal(model)
        result = fit(model, guide, num_steps=1000, tolerance=1e-6, seed=0, progress=False)
        assert result.stop_reason in ("completed", "converged")
        low = result.rates < 0.05 * result.rates.max()
        starts = [i for i in range(1, len(low)) if low[i] and not low[i - 1]]
        assert len(starts) in (2, 3)  # it falls at the end of each round
        assert int(result.rates[:100].argmax()) <= 20

    def test_a_wide_tolerance_ends_a_run_sooner(self):
        model, args = hierarchy()
        steps = [
            len(fit(model, AutoNormal(model), *args, tolerance=t, seed=0, progress=False).losses)
            for t in (10.0, 1e-6)
        ]
        assert steps[0] < steps[1]
        with pytest.raises(ValueError, match="tolerance: expected"):
            fit(model, AutoNormal(model), *args, tolerance=0.0, progress=False)

    def test_a_given_rate_is_kept(self):
        model, args = hierarchy()
        result = fit(model, AutoPlanar(model, 2), *args, num_steps=900, lr=2e-3, seed=0, progress=False)
        assert float(result.rates.max()) == pytest.approx(2e-3, rel=0.05)

    def test_the_gaussian_stays_a_candidate(self):
        """A rate that ruins the flow: what is returned is no worse than the Gaussian it started from."""
        model, args = hierarchy()
        guide = AutoRealNVP(model, num_layers=2)
        start = fit(model, guide, *args, num_steps=1, seed=0, progress=False)
        bad = AutoRealNVP(model, num_layers=2)
        result = fit(model, bad, *args, num_steps=60, lr=1.0, seed=0, progress=False)
        assert result.best_loss < start.best_loss + 0.1

    def test_the_posterior_keeps_its_place_when_the_frame_is_left(self):
        """Far away and badly scaled, in float32."""

        def model():
            a = pyro.sample("a", dist.Normal(1e4, 100.0))
            pyro.sample("b", dist.Normal(a * 1e-3, 1e-3))

        guide = AutoRealNVP(model, num_layers=2)
        result = fit(model, guide, num_steps=200, seed=0, progress=False)
        draws = guide.sample_posterior(4000)
        assert draws["a"].mean().item() == pytest.approx(1e4, abs=10.0)
        assert draws["a"].std().item() == pytest.approx(100.0, rel=0.1)
        assert (draws["b"] - 1e-3 * draws["a"]).std().item() == pytest.approx(1e-3, rel=0.2)
        assert result.located
        assert guide.frame() is None

    def test_fitting_again_goes_on(self):
        model, args = hierarchy()
        guide = AutoRealNVP(model, num_layers=2)
        first = fit(model, guide, *args, num_steps=400, seed=0, progress=False)
        again = fit(model, guide, *args, num_steps=50, lr=1e-4, seed=1, progress=False)
        assert again.best_loss < first.best_loss + 0.1
        assert not again.located


class TestGuards:
    def test_large_gradients_are_skipped_and_counted(self):
        """One draw in a thousand lands on a cliff."""

        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("cliff", -1e4 * torch.relu(x - 3.0))

        guide = AutoPlanar(model, 2)
        result = fit(model, guide, num_steps=900, num_particles=4, lr=1e-2, seed=0, progress=False)
        assert result.num_skipped > 0
        assert result.num_restarts == 0
        assert f"{result.num_skipped} step" in repr(result)

    @pytest.mark.filterwarnings("ignore")
    def test_particles_without_density_are_dropped_and_counted(self):
        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.factor("hole", torch.where(x > 2.5, torch.nan, 0.0))

        guide = AutoPlanar(model, 2)
        result = fit(model, guide, num_steps=600, num_particles=16, lr=2e-2, seed=0, progress=False)
        assert result.num_dropped > 0
        assert bool(result.losses.isfinite().all())
        assert "without a finite density" in repr(result)

    def test_draws_far_out_do_not_hide_a_fall(self):
        """A loss of five nats at each of the draws, with and without one draw far out."""
        torch.manual_seed(0)
        best = torch.randn(256)
        far = torch.zeros(256)
        far[0] = -1e28
        fallen = best - 5.0 - torch.rand(256)
        assert is_worse(fallen, best)
        assert is_worse(fallen + far, best)
        assert not is_worse(best + 5.0, fallen + far)
        noise = 0.1 * torch.randn(256)  # no fall beyond its noise
        assert not is_worse(best + noise - noise.mean(), best)
        assert not is_worse(best + noise - noise.mean() + 0.001, best)
        wrongly = [is_worse(best + torch.randn(256), best) for _ in range(400)]
        assert sum(wrongly) <= 0.05 * 400  # 2.3 % beyond two standard errors on one side

    def test_an_optimizer_of_ones_own_that_diverges_leaves_the_start(self):
        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
            sd = pyro.sample("sd", dist.HalfNormal(5.0))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(mu, sd), obs=y)

        optim = torch.optim.RMSprop
        guide, y = AutoRealNVP(model), torch.tensor([1.0, 2.0, 3.0])
        result = fit(model, guide, y, num_steps=10, optim=optim, compile=False, seed=0, progress=False)
        assert result.losses.max() > 1000.0
        assert result.best_loss < result.losses[0].item() + 0.5
        with torch.no_grad():
            loss = pyro.infer.Trace_ELBO(500, vectorize_particles=True, max_plate_nesting=1)
            assert loss.loss(model, guide, y) < result.losses[0].item() + 0.5

    def test_a_failure_restores_and_halves_the_rate(self):
        calls = {"steps": 0}

        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            calls["steps"] += 1
            pyro.factor("once", x.sum() * (math.nan if calls["steps"] == 900 else 0.0))

        guide = AutoNormal(model)
        with pyro.validation_enabled(False):
            result = fit(
                model, guide, num_steps=3000, lr=1e-2, compile=False, num_particles=1, seed=0, progress=False
            )
        assert result.num_restarts == 1
        at = int((result.rates[1:] / result.rates[:-1] < 0.6).nonzero()[0])
        assert result.rates[at + 1].item() == pytest.approx(result.rates[at].item() / 2, rel=0.05)

    def test_draws_that_the_model_refuses_count_as_without_density(self):
        def model():
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            if bool((x > 2.0).any()):
                raise ValueError("outside")

        pyro.set_rng_seed(0)
        guide = AutoNormal(model, init_loc_fn=init_to_value(values={"x": torch.tensor(0.0)}), init_scale=1.0)
        guide()
        judge = LogWeights(model, guide)
        assert judge.vectorized
        weights = Run(model, guide, None, judge, None, True).evaluate()
        # The guide is the prior: weights are one, but in the batches of which a draw was refused.
        batches = weights.reshape(-1, SMALL_BATCH)
        refused = batches.isneginf().all(-1)
        assert 0 < int(refused.sum()) < len(batches)
        assert torch.allclose(batches[~refused], torch.zeros(()), atol=1e-5)

    def test_five_failures_in_a_row_end_the_run_with_the_state_saved(self, tmp_path):
        data = torch.ones(3)

        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
            pyro.factor("late", torch.where(y.sum() > 5, torch.nan, 0.0) * mu)
            pyro.sample("y", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=y)

        def batches(step):
            return data if step < 40 else 2 * data

        guide, path = AutoPlanar(model, 2), tmp_path / "run"
        with pyro.validation_enabled(False), pytest.raises(FitDiverged, match=r"step 40.*'late'"):
            fit(model, guide, batches=batches, num_steps=90, seed=0, checkpoint=path, progress=False)
        assert path.exists()
        assert all(bool(p.isfinite().all()) for p in guide.parameters())


class TestData:
    def test_minibatches_and_parameters_of_the_model(self):
        x, y = rows()

        def batches(step):
            index = torch.randperm(400, generator=torch.Generator().manual_seed(step))[:50]
            return x[index], y[index], 400

        pyro.clear_param_store()
        guide = AutoPlanar(regression, 2)
        result = fit(regression, guide, batches=batches, num_steps=1500, lr=2e-2, seed=0, progress=False)
        assert pyro.param("slope").item() == pytest.approx(2.0, abs=0.2)
        draws = guide.sample_posterior(2000)["intercept"]
        assert draws.mean().item() == pytest.approx(3.0, abs=0.2)
        assert draws.std().item() == pytest.approx(1 / 20, rel=0.3)
        assert result.stop_reason == "completed"
        assert "slope" in result.best_state
        with pytest.raises(RuntimeError, match="all data"):
            guide.sample_posterior(10, resample=True)

    def test_an_iterable_is_gone_through_again_and_a_generator_once(self):
        x, y = rows(100)
        parts = list(zip(x.split(50), y.split(50), strict=True))
        pyro.clear_param_store()
        options = {"num_steps": 30, "lr": 1e-2, "progress": False}
        again = fit(regression, AutoPlanar(regression, 2), batches=parts, **options)
        assert (len(again.losses), again.stop_reason) == (30, "completed")
        once = fit(regression, AutoPlanar(regression, 2), batches=iter(parts), **options)
        assert (len(once.losses), once.stop_reason) == (2, "no more batches")

    def test_validation_data_choose_the_state_and_end_the_run(self):
        """Forty parameters for forty rows: on other rows the best state is an early one."""
        torch.manual_seed(0)
        x, truth = torch.randn(80, 40), torch.randn(40) * 0.3
        y = x @ truth + torch.randn(80)

        def model(x, y):
            weights = pyro.param("weights", torch.zeros(40))
            noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x @ weights, noise.unsqueeze(-1)).to_event(1), obs=y)

        pyro.clear_param_store()
        guide = AutoNormal(model)
        result = fit(
            model,
            guide,
            x[:40],
            y[:40],
            validation=(x[40:], y[40:]),
            num_steps=3000,
            lr=1e-2,
            seed=0,
            progress=False,
        )
        assert result.stop_reason == "converged"
        best = max(result.elbos, key=lambda entry: entry[1])
        assert best[0] < len(result.losses)
        assert -result.best_loss == pytest.approx(best[1], abs=2.0)


SCRIPT = """
import hashlib, importlib, sys
import pyro, pyro.distributions as dist, torch
import pyro_flowvi
from pyro_flowvi.infer._checkpoint import Checkpoint

torch.set_num_threads(1)
importlib.import_module("pyro_flowvi.infer._fit").CHECKPOINT_SECONDS = 0.0
write = Checkpoint.write

def told(self, loop, identity):
    write(self, loop, identity)
    print(loop.progress.step, flush=True)

Checkpoint.write = told

def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("rows", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)

sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
guide = pyro_flowvi.AutoRealNVP(model, num_layers=2)
result = pyro_flowvi.fit(
    model, guide, y, num_steps=1000, num_particles=8, seed=1, progress=False, checkpoint=sys.argv[1]
)
state = b"".join(value.numpy().tobytes() for _, value in sorted(result.best_state.items()))
print("end", hashlib.sha256(state + result.losses.numpy().tobytes()).hexdigest())
"""


class TestCheckpoint:
    @pytest.fixture
    def run(self, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)

        def start(path):
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            return subprocess.Popen(
                [sys.executable, "-W", "ignore", str(script), str(path)],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )

        return start

    @pytest.mark.long
    def test_killed_and_resumed_it_ends_bit_for_bit_as_without(self, run, tmp_path):
        whole = run(tmp_path / "whole").communicate()[0].splitlines()
        steps = [int(line) for line in whole if not line.startswith("end")]
        assert len(steps) > 30
        path = tmp_path / "killed"
        for after in (5, 17, 28):  # writes, of which the one after is under way when the signal comes
            process = run(path)
            while (line := process.stdout.readline()) and int(line) < steps[after]:
                pass
            partial = path.with_name("killed.partial")
            deadline = time.monotonic() + 10
            while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
                pass
            process.send_signal(signal.SIGKILL)
            process.communicate()
        end = run(path).communicate()[0].splitlines()
        assert int(end[0]) > steps[17]
        assert end[-1] == whole[-1]
        assert end[-1].startswith("end")

    @pytest.mark.parametrize(("num_steps", "mode"), [(30, "eager"), (320, "interpreted")])
    def test_an_objective_with_state_goes_on_where_it_was(self, num_steps, mode, tmp_path, monkeypatch):
        model, args = hierarchy()
        checkpoint = importlib.import_module("pyro_flowvi.infer._checkpoint").Checkpoint
        write, half = checkpoint.write, tmp_path / "half"

        def keep_half(self, loop, identity):
            write(self, loop, identity)
            if loop.progress.step >= num_steps // 2 and not half.exists():
                half.write_bytes(self.path.read_bytes())

        monkeypatch.setattr(checkpoint, "write", keep_half)
        monkeypatch.setattr(importlib.import_module("pyro_flowvi.infer._fit"), "CHECKPOINT_SECONDS", 0.0)

        def run(path):
            pyro.clear_param_store()
            elbo = TraceAnnealed_ELBO(
                lambda step: min(1.0, 0.1 + step / num_steps), num_particles=4, vectorize_particles=True
            )
            guide = AutoPlanar(model, 2)
            result = fit(
                model, guide, *args, loss=elbo, num_steps=num_steps, seed=0, checkpoint=path, progress=False
            )
            return result.losses, result.best_state, elbo.state_dict()

        (losses, state, after), (again, state_again, after_again) = run(tmp_path / "whole"), run(half)
        assert torch.load(half, weights_only=True)["mode"] == mode
        assert torch.equal(again, losses)
        assert after["steps"] == num_steps
        for one, other in ((state, state_again), (after, after_again)):
            assert all(torch.equal(value, other[name]) for name, value in one.items())

    def test_a_finished_run_is_not_run_again(self, tmp_path):
        model, args = hierarchy()
        path, guide = tmp_path / "run", AutoPlanar(model, 2)
        first = fit(model, guide, *args, num_steps=40, seed=0, checkpoint=path, progress=False)
        other = AutoPlanar(model, 2, name="other")
        with pytest.raises(ValueError, match="differs in"):
            fit(model, other, *args, num_steps=40, seed=0, checkpoint=path, progress=False)
        del other
        again = fit(model, guide, *args, num_steps=40, seed=0, checkpoint=path, progress=False)
        assert torch.equal(again.losses, first.losses)
        assert again.stop_reason == first.stop_reason
        for name, value in first.best_state.items():
            assert torch.equal(again.best_state[name], value)

    def test_files_that_are_no_checkpoint_of_this_run(self, tmp_path):
        model, args = hierarchy()
        path, guide = tmp_path / "run", AutoPlanar(model, 2)
        options = {"num_steps": 40, "seed": 0, "checkpoint": path, "progress": False}
        fit(model, guide, *args, **options)
        whole = path.read_bytes()
        with pytest.raises(ValueError, match="differs in num_steps"):
            fit(model, guide, *args, **{**options, "num_steps": 41})
        with pytest.raises(ValueError, match="differs in data"):
            fit(model, guide, *(2 * arg for arg in args), **options)
        for content in (whole[: len(whole) // 2], whole[:1], b"", b"something else", whole[:-100]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="which is another kind of file or cut short"):
                fit(model, guide, *args, **options)
        torch.save({"weights": torch.ones(2)}, path)
        with pytest.raises(ValueError, match="expected a file that fit has written"):
            fit(model, guide, *args, **options)
        path.unlink()
        fit(model, guide, *args, **options)

    def test_the_file_is_never_half_written(self, tmp_path, monkeypatch):
        """A write that fails in the middle leaves the last whole file."""
        model, args = hierarchy()
        path, guide = tmp_path / "run", AutoPlanar(model, 2)
        fit(model, guide, *args, num_steps=40, seed=0, checkpoint=path, progress=False)
        before = path.read_bytes()

        def broken(state, file):
            file.write(b"half")
            raise OSError("no space left")

        checkpoint = importlib.import_module("pyro_flowvi.infer._checkpoint")
        monkeypatch.setattr(checkpoint.torch, "save", broken)
        found = checkpoint.Checkpoint(path)
        loop = type("TrainingLoop", (), {})()
        monkeypatch.setattr(checkpoint, "state_of_run", lambda loop: {})
        monkeypatch.setattr(checkpoint, "part_of", lambda loop: {})
        with pytest.raises(OSError, match="no space"):
            found.write(loop, {})
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(before).digest()
