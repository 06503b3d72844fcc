"""Steps on pages of rows: gradients by hand, which rows move, and fits against quadrature."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_flowvi import AutoRealNVP, fit
from pyro_flowvi.infer._row_steps import RowStep
from tests.rows import MODELS, batches, data, given, grid_moments, normals, table

NUM, SIZE, WIDTH = 40, 8, 16


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def started(y, size=SIZE):
    """A guide at its start, and a step of it."""
    guide = AutoRealNVP(normals).materialize(y, size=size)
    sweep = guide.sweep(lambda _: [((y,), {"size": size})])
    assert guide.start_rows(sweep, WIDTH) == "program"
    limits = torch.full((2,), torch.inf, dtype=torch.float64)
    return guide, RowStep(sweep, WIDTH, limits)


def numbers(step):
    return {key: step._tables.table(key).detach().clone() for key in step._keys}


class TestGradients:
    @pytest.mark.parametrize("alike", [True, False])
    def test_of_the_weighted_bound(self, alike):
        """The path gradient of the ELBO with a weight for each row, the densities written out."""
        y = data()
        _, step = started(y)
        rows = torch.tensor([5, 3, 30, 11, 2, 39, 0, 7])
        weights = torch.full((SIZE,), 5.0) if alike else torch.linspace(0.5, 9.0, SIZE)
        torch.manual_seed(4)
        step._values += 0.1 * torch.randn_like(step._values)
        step._tables.load = lambda *_: None  # keeps the page's own numbers, which have moved too
        step._turn(rows, None, weights)
        step._page = None
        x = torch.randn(WIDTH, 2 + SIZE)
        found = step._run(x)[0]
        flow, still = step._transform, copy.deepcopy(step._transform)
        still[-1].rows.weights = step._view.page.weights
        z = flow(x)
        mu, log_tau, rest = z[:, 0], z[:, 1], z[:, 2:]
        tau = log_tau.exp().unsqueeze(-1)
        each = dist.Normal(mu.unsqueeze(-1), tau).log_prob(rest) + dist.Normal(rest, 0.5).log_prob(y[rows])
        log_p = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfNormal(2.0).log_prob(tau[:, 0]) + log_tau
        log_p = log_p + (weights * each).sum(-1)
        back, log_det = still.inverse_and_log_det(z)
        normal = dist.Normal(0.0, 1.0).log_prob(back)
        log_q = normal[:, :2].sum(-1) + (weights * normal[:, 2:]).sum(-1) + log_det
        grads = torch.autograd.grad((log_q - log_p).mean(), step.params, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(step.params, grads, strict=True)]
        expected = torch.cat([g.flatten() for g in flat])
        assert torch.allclose(found, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
        assert step._loss == pytest.approx((log_q - log_p).mean().item(), rel=1e-10)

    @pytest.mark.parametrize(("num", "size"), [(40, 8), (23, 5), (7, 6)])
    def test_what_pages_lack_is_nothing_in_all(self, num, size):
        _, step = started(data(num), size)
        assert len(step._pages) == -(-num // size)
        assert step._control.sum(0).abs().max() < 1e-9 * step._control.abs().max()
        counted = torch.zeros(num).index_add(
            0,
            torch.cat([rows for rows, _ in step._pages]),
            torch.cat([weights for _, weights in step._pages]),
        )
        assert torch.allclose(counted, torch.full((num,), float(len(step._pages))))


class TestRowsThatMove:
    def test_those_of_the_page_alone(self):
        _, step = started(data())
        for count in range(1, 4):
            before, drawn = numbers(step), step._drawn.clone()
            step.turn((), {})
            step(1e-2)
            rows = step._shown.sort()[0]
            for key, value in numbers(step).items():
                moved = (value != before[key]).flatten(1).any(1).nonzero().flatten()
                assert set(moved.tolist()) <= set(rows.tolist())
            assert torch.equal((step._drawn - drawn).nonzero().flatten(), rows)
            assert step._drawn.sum() == count * SIZE

    def test_an_epoch_shows_all_rows(self):
        _, step = started(data(23), 5)
        for _ in range(5):
            step.turn((), {})
            step(1e-3)
        assert step._drawn.min() == 1
        assert step._drawn.sum() == 25

    def test_adam_of_a_row_knows_its_own_steps(self):
        """The first step of a row is nearly as long as the rate, whenever it comes, if its slope is large."""
        _, step = started(data())
        step._tables.table("block_log_weight").data += 0.3
        before = numbers(step)
        for _ in range(5):
            step.turn((), {})
            step(1e-2)
        change = (numbers(step)["block_log_weight"] - before["block_log_weight"]).abs()
        assert ((change <= 1e-2) & (change > 0.7e-2)).all()

    def test_a_row_that_is_right_stays(self):
        """With normal priors and data the start is exact, and what is left are rounding errors."""
        _, step = started(data())
        before = numbers(step)
        for _ in range(5):
            step.turn((), {})
            step(1e-2)
        for key, value in numbers(step).items():
            assert (value - before[key]).abs().max() < 1e-5


class TestBitForBit:
    def run(self, path=None, num_steps=40, **options):
        pyro.clear_param_store()
        guide = AutoRealNVP(normals)
        result = fit(
            normals, guide, data(), size=SIZE, num_steps=num_steps, seed=1, progress=False, **options
        )
        return result, guide.state_dict()

    def test_a_seed(self):
        (one, state), (other, again) = self.run(), self.run()
        assert torch.equal(one.losses, other.losses)
        assert all(torch.equal(value, again[key]) for key, value in state.items())

    @pytest.mark.parametrize("own", ["drawn", "batches", "loader"])
    def test_a_run_that_is_interrupted(self, own, tmp_path, monkeypatch):
        y = data()
        model, call, more = given(NUM), (), {}
        if own == "drawn":
            model, call, more = normals, (y,), {"size": SIZE}
        elif own == "batches":
            more = {"batches": batches(y, 9)}
        else:
            loaded = torch.utils.data.TensorDataset(y, torch.arange(NUM))
            more = {"batches": torch.utils.data.DataLoader(loaded, batch_size=9, shuffle=True)}

        def run(**options):
            pyro.clear_param_store()
            guide = AutoRealNVP(model)
            result = fit(model, guide, *call, num_steps=60, seed=1, progress=False, **more, **options)
            return result, guide.state_dict()

        whole, state = run()
        path, taken = tmp_path / "run.pt", RowStep.__call__
        monkeypatch.setattr("pyro_flowvi.infer._fit.CHECKPOINT_SECONDS", 0.0)

        def stopping(step, lr):
            stopping.count += 1
            if stopping.count > 37:
                raise KeyboardInterrupt
            return taken(step, lr)

        stopping.count = 0
        monkeypatch.setattr(RowStep, "__call__", stopping)
        assert run(checkpoint=path)[0].stop_reason == "interrupted"
        monkeypatch.setattr(RowStep, "__call__", taken)
        resumed, again = run(checkpoint=path)
        assert len(resumed.losses) == 60
        assert torch.equal(resumed.losses, whole.losses)
        assert all(torch.equal(value, again[key]) for key, value in state.items())


def errors(guide, moments):
    """Of means in standard deviations, and ratios of standard deviations."""
    draws = guide.sample_posterior(20_000, sites=list(moments))
    for site, (mean, sd) in moments.items():
        yield float(draws[site].mean() - mean) / sd, float(draws[site].std()) / sd


@pytest.mark.long
class TestAgainstTruth:
    @pytest.mark.parametrize("how", ["drawn", "batches", "callable", "float32"])
    def test_normals(self, how):
        y = data(1000)
        moments, log_z = grid_moments(y)
        if how == "float32":
            torch.set_default_dtype(torch.float32)
            y = y.float()
        known = batches(y, 110)
        if how in ("drawn", "float32"):
            model, call, more = normals, (y,), {"size": 100}
        else:
            model, call = given(1000), ()
            more = {"batches": known if how != "callable" else lambda step: known[step % len(known)]}
        guide = AutoRealNVP(model)
        result = fit(model, guide, *call, **more, seed=0, progress=False)
        for error, ratio in errors(guide, moments):
            assert abs(error) < 0.1
            assert 0.93 < ratio < 1.07
        if how != "callable":
            assert result.best_loss == pytest.approx(-log_z, abs=0.1)

    def test_slopes_against_all_rows(self):
        model, y = MODELS["slopes"][0], table(300, 5)
        draws = []
        for size in (50, 300):
            pyro.clear_param_store()
            guide = AutoRealNVP(model)
            fit(model, guide, y, size, seed=0, progress=False)
            draws.append(guide.sample_posterior(10_000))
        some, whole = draws
        for site in ("m", "sd"):
            sd = whole[site].std(0)
            assert ((some[site].mean(0) - whole[site].mean(0)) / sd).abs().max() < 0.15
            assert ((some[site].std(0) / sd) - 1.0).abs().max() < 0.08
        sd = whole["b"].std(0)
        assert ((some["b"].mean(0) - whole["b"].mean(0)) / sd).abs().mean() < 0.05
        assert ((some["b"].std(0) / sd) - 1.0).abs().mean() < 0.05

    @pytest.mark.parametrize("name", [name for name in MODELS if name not in ("normals", "slopes")])
    def test_the_bound_is_that_of_all_rows(self, name):
        """ELBOs of the trained guides, on all rows, and globals' means, of all rows by weights."""
        model, make = MODELS[name]
        y, found, draws = make(), [], []
        for size in (SIZE, len(y)):
            pyro.clear_param_store()
            guide = AutoRealNVP(model, structure="program" if size == len(y) else "auto")
            fit(model, guide, y, size, seed=0, progress=False)
            drawn = guide.sample_posterior(1000)
            whole = [
                pyro.poutine.trace(pyro.poutine.condition(model, data={s: v[i] for s, v in drawn.items()}))
                .get_trace(y, len(y))
                .log_prob_sum()
                for i in range(1000)
            ]
            weights = torch.stack(whole) - guide.log_prob(drawn).detach()
            found.append(weights.mean().item())
            draws.append(drawn)
            shares = weights.softmax(0)
        assert found[0] > found[1] - 0.3
        for site in draws[0]:
            if draws[0][site].shape[1:].numel() <= 4:
                mean = torch.tensordot(shares, draws[1][site], 1)
                sd = torch.tensordot(shares, (draws[1][site] - mean).square(), 1).sqrt()
                assert ((draws[0][site].mean(0) - mean) / sd).abs().max() < 0.25
