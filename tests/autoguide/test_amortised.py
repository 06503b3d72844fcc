"""Guides whose rows a network reads off their data."""

import copy
import gc
import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceMeanField_ELBO,
)
from pyro.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from pyro_flowvi import AutoPlanar, AutoRealNVP, CompiledSVI, fit

SIZE, BATCH, REPEATS, NOISE = 40, 10, 3, 0.5


def data(size=SIZE, seed=3):
    generator = torch.Generator().manual_seed(seed)
    theta = 1.0 + torch.randn(size, 1, generator=generator)
    return theta + NOISE * torch.randn(size, REPEATS, generator=generator)


def groups(plate, y, obs=None):
    """Normal groups with a common mean: all conditionals are normal, and linear in the data."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with plate as rows:
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        y = y if obs is None else obs(rows)
        loc = theta[..., None].expand(*theta.shape, REPEATS)
        pyro.sample("y", dist.Normal(loc, NOISE).to_event(1), obs=y)


def scaled(y):
    with poutine.scale(scale=1.0):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("d", len(y)), poutine.scale(scale=SIZE / len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        loc = theta[..., None].expand(*theta.shape, REPEATS)
        pyro.sample("y", dist.Normal(loc, NOISE).to_event(1), obs=y)


def sized(y):
    groups(pyro.plate("d", SIZE, subsample_size=len(y)), y)


def whole(y):
    groups(pyro.plate("d", len(y)), y)


def given(y, rows):
    groups(pyro.plate("d", SIZE, subsample=rows), y)


def given_of_all(y, rows):
    groups(pyro.plate("d", SIZE, subsample=rows), y, lambda rows: y[rows])


def drawn(y):
    groups(pyro.plate("d", SIZE, subsample_size=BATCH), y, lambda rows: y[rows])


ROWS = torch.arange(BATCH)
FORMS = {
    "scaled": (scaled, lambda y: (y[:BATCH],)),
    "sized": (sized, lambda y: (y[:BATCH],)),
    "whole": (whole, lambda y: (y,)),
    "given": (given, lambda y: (y[:BATCH], ROWS)),
    "given of all": (given_of_all, lambda y: (y, ROWS)),
    "drawn": (drawn, lambda y: (y,)),
}
ALONE = ("scaled", "sized", "whole")
forms = pytest.mark.parametrize("form", FORMS)


def case(form):
    model, args = FORMS[form]
    return model, args(data())


def steps(model, guide, *args, num=3, elbo=None, rate=0.01):
    svi = SVI(model, guide, Adam({"lr": rate}), elbo or Trace_ELBO())
    return [svi.step(*args) for _ in range(num)]


def conditional(y, mu):
    """Mean and standard deviation of theta given mu."""
    precision = 1.0 + y.shape[-1] / NOISE**2
    return (mu + y.sum(-1) / NOISE**2) / precision, precision**-0.5


def posterior_of_mu(y):
    variance = 1.0 + NOISE**2 / y.shape[-1]
    precision = 1 / 25 + len(y) / variance
    return float(y.mean(-1).sum() / variance / precision), precision**-0.5


class TestDensities:
    @pytest.mark.parametrize("form", ["scaled", "sized"])
    def test_a_batch_counts_as_all_rows(self, form):
        """log q of a batch is that of the mean and, N / B times, those of its rows."""
        model, args = case(form)
        guide = AutoPlanar(model, amortize="auto").materialize(*args)
        steps(model, guide, *args)
        trace = poutine.trace(guide).get_trace(*args)
        draws = {name: trace.nodes[name]["value"].detach() for name in ("mu", "theta")}
        total = guide.log_prob(draws)
        latent = draws["mu"].reshape(1)
        roots = guide.get_posterior().log_prob(latent)
        expected = roots + SIZE / BATCH * (total - roots)
        torch.testing.assert_close(trace.log_prob_sum(), expected)

    @pytest.mark.parametrize("form", ["scaled", "sized"])
    def test_bounds_of_batches_are_those_of_all_data(self, form):
        """The same draws of the mean and of each row, so that the mean over batches is exact."""
        model, y = FORMS[form][0], data()
        guide = AutoPlanar(model, amortize="auto").materialize(y[:BATCH])
        steps(model, guide, y[:BATCH])
        draws = guide.sample_new_rows(1, y)
        mu, theta = draws["mu"][0], draws["theta"][0]

        def bound(rows):
            y_rows = y[rows]
            guide(y_rows)
            log_q = guide.log_prob({"mu": mu[None], "theta": theta[None, rows]})[0]
            roots = guide.get_posterior().log_prob(mu.reshape(1))
            values = poutine.condition(model, {"mu": mu, "theta": theta[rows]})
            log_p = poutine.trace(values).get_trace(y_rows).log_prob_sum()
            return log_p - roots - SIZE / len(rows) * (log_q - roots)

        parts = torch.stack([bound(rows) for rows in torch.arange(SIZE).split(BATCH)])
        torch.testing.assert_close(parts.mean(), bound(torch.arange(SIZE)))

    @forms
    def test_draws_have_their_density(self, form):
        model, args = case(form)
        guide = AutoPlanar(model, amortize="auto").materialize(*args)
        steps(model, guide, *args)
        if form == "given":
            return
        draws = guide.sample_posterior(200)
        size = BATCH if form in ("scaled", "sized") else SIZE
        assert draws["theta"].shape == (200, size)
        assert guide.log_prob(draws).shape == (200,)
        median = guide.median()
        torch.testing.assert_close(median["theta"], draws["theta"].median(0).values, atol=0.4, rtol=0.0)


class TestTraining:
    @pytest.mark.parametrize(
        "form", [pytest.param(form, marks=pytest.mark.long) for form in FORMS if form != "given"]
    )
    def test_moments(self, form):
        """Of the mean and of the rows; corrections by index, where there are some, take part."""
        model, args = case(form)
        y = data()
        guide = AutoRealNVP(model, amortize="auto")
        batches = None
        if form in ("scaled", "sized"):
            batches = DataLoader(TensorDataset(y), BATCH, shuffle=True)
        if form == "given of all":
            batches = ((y, torch.randperm(SIZE)[:BATCH]) for _ in range(10_000))
        args = args if batches is None else ()
        fit(model, guide, *args, batches=batches, num_steps=2000, seed=0, progress=False)
        loc, sd = posterior_of_mu(y)
        mu = guide.sample_posterior(4000, sites=["mu"])["mu"]
        assert abs(float(mu.mean()) - loc) < 0.4 * sd
        assert 0.7 < float(mu.std()) / sd < 1.4
        own = {} if form in ALONE else guide.sample_posterior(4000, rows=range(4))
        theta = (own or guide.sample_new_rows(4000, y[:4]))["theta"]
        mean, each = conditional(y[:4], mu.mean())
        spread = (each**2 + (float(mu.std()) * each**2) ** 2) ** 0.5
        assert bool(((theta.mean(0) - mean).abs() < 0.3 * spread).all())
        assert bool(((theta.std(0) / spread).log().abs() < 0.2).all())
        tables = [name for name, _ in guide.named_parameters() if "rows.block" in name]
        assert bool(tables) == (form not in ALONE)

    @forms
    def test_gradients_reach_the_encoder(self, form):
        model, args = case(form)
        guide = AutoPlanar(model, amortize="auto").materialize(*args)
        Trace_ELBO().differentiable_loss(model, guide, *args).backward()
        names = [name for name, p in guide.named_parameters() if p.grad is not None and bool(p.grad.any())]
        assert any("encoder.head" in name for name in names)
        assert any("rows.block_slope" in name for name in names) == (form not in ALONE)
        if form == "given of all":  # the rows that are not shown have none
            grad = guide._flow.rows.table("block_slope").grad
            assert bool((grad[:BATCH] != 0).all())
            assert not bool(grad[BATCH:].any())

    @pytest.mark.parametrize("form", ["scaled", "sized"])
    def test_batches_of_any_length(self, form):
        model, y = FORMS[form][0], data()
        guide = AutoPlanar(model, amortize="auto").materialize(y[:BATCH])
        for size in (BATCH, 4, 1, 17, SIZE, BATCH):
            assert math.isfinite(*steps(model, guide, y[:size], num=1))
            assert guide.sample_posterior(2)["theta"].shape == (2, size)
        loader = DataLoader(TensorDataset(y), 16)  # 16, 16 and 8
        fit(model, guide, batches=loader, num_steps=12, progress=False)

    @pytest.mark.long
    def test_short_batches_have_the_noise_of_long_ones(self):
        """The flow of the rows' noise is that of all batches, of however few rows."""

        def model(y):
            with pyro.plate("d", len(y)):
                theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
                pyro.sample("y", dist.Poisson(theta.exp()), obs=y)

        y = torch.poisson(torch.ones(50))
        guide = AutoPlanar(model, amortize="auto").materialize(y)
        steps(model, guide, y, num=50)
        torch.manual_seed(0)
        alone = guide.sample_new_rows(4000, y[:2])["theta"].quantile(torch.tensor([0.1, 0.5, 0.9]), 0)
        among = guide.sample_new_rows(4000, y)["theta"][:, :2].quantile(torch.tensor([0.1, 0.5, 0.9]), 0)
        torch.testing.assert_close(alone, among, atol=0.15, rtol=0.0)

    @forms
    def test_objectives(self, form):
        model, args = case(form)
        guide = AutoPlanar(model, amortize="auto").materialize(*args)
        together = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
        for elbo in (together, TraceMeanField_ELBO(num_particles=2), RenyiELBO(num_particles=2)):
            assert all(math.isfinite(loss) for loss in steps(model, guide, *args, elbo=elbo))
        svi = CompiledSVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
        assert all(math.isfinite(svi.step(*args)) for _ in range(3))


def state_of(guide):
    return {key: value.clone() for key, value in guide.state_dict().items()}


def draws_of(guide, form="scaled"):
    sites = ["mu"] if form == "given" else None
    torch.manual_seed(0)
    return guide.sample_posterior(3, sites=sites)


class TestState:
    @forms
    def test_state_dict_and_copies(self, form):
        model, args = case(form)
        guide = AutoPlanar(model, amortize="auto").materialize(*args)
        steps(model, guide, *args)
        fresh = AutoPlanar(model, amortize="auto")
        fresh.load_state_dict(guide.state_dict())
        fresh.materialize(*args)
        file = io.BytesIO()
        torch.save(guide, file)
        file.seek(0)
        pickled = torch.load(file, weights_only=False)
        copied = copy.deepcopy(guide)
        if form not in ALONE:  # the data of all rows are none of a copy's
            copied(*args)
            pickled(*args)
        for other in (fresh, copied, pickled):
            assert all(torch.equal(value, other.state_dict()[key]) for key, value in state_of(guide).items())
            own, others = draws_of(guide, form), draws_of(other, form)
            assert all(torch.equal(value, others[site]) for site, value in own.items())

    def test_a_restored_store(self):
        """It is adopted by a guide that has begun with other data."""
        y = data()
        guide = AutoPlanar(scaled, amortize="auto", name="guide").materialize(y[:BATCH])
        steps(scaled, guide, y[:BATCH])
        state, store = state_of(guide), pyro.get_param_store().get_state()
        del guide
        gc.collect()
        pyro.clear_param_store()
        pyro.get_param_store().set_state(store)
        fresh = AutoPlanar(scaled, amortize="auto", name="guide").materialize(5.0 + 2.0 * y[10:20])
        fresh.sample_posterior(1)
        assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())

    def test_a_checkpoint(self, tmp_path):
        y, file = data(), tmp_path / "run"
        batches = [y[:BATCH], y[10:20], y[20:27]]
        found = []
        for _ in range(2):  # the second goes on from the end of the first
            pyro.clear_param_store()
            guide = AutoPlanar(scaled, amortize="auto", name="guide")
            fit(scaled, guide, batches=batches, num_steps=30, seed=0, checkpoint=file, progress=False)
            found.append(guide.sample_new_rows(1, y)["theta"].shape)
            found.append(state_of(guide))
        assert all(torch.equal(value, found[3][key]) for key, value in found[1].items())

    @pytest.mark.parametrize(("first", "later"), [("float64", "float32"), ("float32", "float64")])
    def test_dtypes(self, first, later):
        y = data().to(getattr(torch, first))
        guide = AutoPlanar(scaled, amortize="auto").materialize(y[:BATCH])
        guide.to(getattr(torch, later))
        assert math.isfinite(*steps(scaled, guide, y[:BATCH].to(getattr(torch, later)), num=1))


class TestRefusals:
    def test_rows_that_nobody_knows(self):
        with pytest.raises(ValueError, match=r"subsample=rows.*amortize='auto'"):
            AutoPlanar(sized).materialize(data()[:BATCH])

    def test_rows_whose_data_are_elsewhere(self):
        """Draws of other rows than the batch's would be of its data."""
        y = data()
        guide = AutoPlanar(given, amortize="auto").materialize(y[:BATCH], ROWS)
        for rows in (ROWS, torch.arange(15, 32)):
            guide(y[rows], rows)
            assert guide.sample_posterior(2, rows=rows)["theta"].shape == (2, len(rows))
            with pytest.raises(RuntimeError, match=r"rows.*those of the last batch"):
                guide.sample_posterior(2)

    def test_models_without_rows(self):
        def without_data():
            with pyro.plate("d", 5):
                pyro.sample("z", dist.Normal(0.0, 1.0))

        with pytest.raises(ValueError, match="amortize: expected a model with a plate"):
            AutoPlanar(without_data, amortize="auto").materialize()
