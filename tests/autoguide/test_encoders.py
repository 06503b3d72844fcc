"""Networks that read rows, and the models that they serve."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.optim import Adam
from torch import nn

from pyro_flowvi import AutoPlanar, CompiledSVI, fit
from tests.autoguide.test_amortised import BATCH, REPEATS, SIZE, data, scaled, steps


class Convolutions(nn.Module):
    """Of images without channels."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))

    def forward(self, x):
        return self.layers(x[:, None])


def decoder(out=64, norm=False):
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(2, 8), *middle, nn.Softplus(), nn.Linear(8, out))


def image_model(layers, shape=(8, 8)):
    def model(x):
        pyro.module("decoder", layers)
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = layers(z).reshape(*z.shape[:-1], *shape)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(len(shape)), obs=x)

    return model


class TestNetworks:
    def test_of_the_user_with_a_decoder(self):
        """Both are trained, and the guide has no other copy of the network."""
        layers, body, x = decoder(), Convolutions(), torch.rand(12, 8, 8)
        before = [p.detach().clone() for module in (layers, body) for p in module.parameters()]
        model = image_model(layers)
        guide = AutoPlanar(model, amortize=body)
        steps(model, guide, x)
        after = [p for module in (layers, body) for p in module.parameters()]
        assert not any(torch.equal(p, q) for p, q in zip(before, after, strict=True))
        assert len({key for key in guide.state_dict() if key.endswith("layers.0.bias")}) == 1
        fit(model, guide, batches=[x, x[:5]], num_steps=10, progress=False)
        assert guide.sample_new_rows(7, x[:3])["z"].shape == (7, 3, 2)

    def test_a_linear_model_is_solved(self):
        """Factor analysis with fixed loadings: its evidence is that of a normal."""
        loadings = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.3, 0.3]])

        def model(x):
            with pyro.plate("d", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ loadings.T, 1.0).to_event(1), obs=x)

        truth = dist.MultivariateNormal(torch.zeros(3), loadings @ loadings.T + torch.eye(3))
        x = truth.sample((100,))
        guide = AutoPlanar(model, amortize="auto")
        fit(model, guide, batches=[x], num_steps=400, seed=0, progress=False)
        with torch.no_grad():
            bound = -Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1).loss(
                model, guide, x
            )
        # The posterior's correlation is beyond a normal of independent numbers.
        precision = loadings.T @ loadings + torch.eye(2)
        lost = 0.5 * float(precision.diagonal().log().sum() - precision.logdet())
        gap = (float(truth.log_prob(x).sum()) - bound) / len(x) - lost
        assert abs(gap) < 0.02

    def test_statistics_of_a_batch_norm(self):
        """They are those of the model's own runs, one for each step."""
        layers, x = decoder(3, norm=True), data()
        model = image_model(layers, (3,))
        guide = AutoPlanar(model, amortize="auto").materialize(x[:BATCH])
        steps(model, guide, x[:BATCH], num=1)
        before = int(layers[1].num_batches_tracked)
        steps(model, guide, x[:BATCH], num=4)
        assert int(layers[1].num_batches_tracked) - before == 4

    @pytest.mark.parametrize("body", [nn.Flatten(0), nn.Identity(), nn.LSTM(8, 3, batch_first=True)])
    def test_that_return_something_else(self, body):
        with pytest.raises(ValueError, match=r"amortize: expected a module .* to \(12, H\), got"):
            AutoPlanar(image_model(decoder()), amortize=body).materialize(torch.rand(12, 8, 8))

    @pytest.mark.parametrize("value", ["yes", 3, lambda x: x, True])
    def test_that_are_none(self, value):
        with pytest.raises(ValueError, match=r"amortize: expected None, 'auto' or an nn.Module"):
            AutoPlanar(scaled, amortize=value)


def regression(x, y):
    slope = pyro.sample("slope", dist.Normal(1.0, 0.1))
    with pyro.plate("d", len(y)):
        theta = pyro.sample("theta", dist.Normal(slope * x, 0.1))
        pyro.sample("y", dist.Normal(theta, 0.5), obs=y)


class TestPriorsOfData:
    """Priors of rows that depend on what comes with each batch."""

    def batches(self):
        near = torch.linspace(0.0, 1.0, BATCH)
        return [(shift + near, shift + near.flip(0)) for shift in (0.0, 30.0)]

    def test_each_batch_has_its_own(self):
        first, other = self.batches()
        guide = AutoPlanar(regression, amortize="auto").materialize(*first)
        fresh = AutoPlanar(regression, amortize="auto")
        fresh.load_state_dict(guide.state_dict())
        fresh.materialize(*other)
        for call in (lambda: guide(*other), lambda: (guide(*first), guide(*other))):
            call()
            found = []
            for each in (guide, fresh):
                torch.manual_seed(0)
                found.append(each.sample_posterior(3)["theta"])
            torch.testing.assert_close(*found)
        guide(*first)
        new = guide.sample_new_rows(500, *other)["theta"].mean(0)
        assert bool((new > 5.0).all())
        assert bool((guide.sample_posterior(500)["theta"].mean(0) < 5.0).all())

    @pytest.mark.parametrize("kind", [SVI, CompiledSVI])
    def test_steps(self, kind):
        """The loss of a batch is that of a guide that has seen no other."""
        pair = self.batches()
        guide = AutoPlanar(regression, amortize="auto").materialize(*pair[0])
        svi = kind(regression, guide, Adam({"lr": 0.0}), Trace_ELBO())
        losses = torch.tensor([[svi.step(*batch) for batch in pair] for _ in range(60)]).mean(0)
        for batch, loss in zip(pair, losses, strict=True):
            fresh = AutoPlanar(regression, amortize="auto")
            fresh.load_state_dict(guide.state_dict())
            fresh.materialize(*batch)
            expected = Trace_ELBO(num_particles=60).loss(regression, fresh, *batch)
            assert abs(float(loss) / expected - 1.0) < 0.4


class TestModels:
    def test_an_annealed_scale(self):
        """What the model scales its latents by is read at each call."""
        scale = [1.0]

        def model(y):
            with pyro.plate("d", len(y)), poutine.scale(scale=scale[0]):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

        y = torch.randn(5)
        scale[0] = 0.1
        guide = AutoPlanar(model, amortize="auto").materialize(y)
        for value in (0.1, 0.5, 1.0):
            scale[0] = value
            assert float(poutine.trace(guide).get_trace(y).nodes["z"]["scale"]) == pytest.approx(value)

    def test_several_sites(self):
        """Counts, flags and masked numbers, by keywords."""

        def model(*, batch):
            y, count, flag = batch["y"], batch["count"], batch["flag"]
            with pyro.plate("d", len(y)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                s = pyro.sample("s", dist.Gamma(2.0, 2.0))
                seen = ~y.isnan()
                pyro.sample("y", dist.Normal(z, 1.0).mask(seen), obs=y.nan_to_num())
                pyro.sample("count", dist.Poisson(s), obs=count)
                pyro.sample("flag", dist.Bernoulli(logits=z), obs=flag)

        y = data()[:, 0].clone()
        y[:3] = math.nan
        batch = {"y": y, "count": torch.arange(SIZE) % 5, "flag": torch.ones(SIZE)}
        guide = AutoPlanar(model, amortize="auto").materialize(batch=batch)
        svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
        assert all(math.isfinite(svi.step(batch=batch)) for _ in range(3))
        half = {name: value[:20] for name, value in batch.items()}
        fit(model, guide, batches=[{"batch": half}, {"batch": batch}], num_steps=6, progress=False)
        assert guide.sample_new_rows(2, batch=half)["s"].shape == (2, 20)

    def test_what_is_computed_from_latents_is_not_read(self):
        """Their values in a run of the model are draws from the prior, and no data."""

        class Sites(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer, self.seen = nn.Linear(1, 4), []

            def forward(self, *values):
                self.seen.append(values)
                return self.layer(values[0].unsqueeze(-1))

        def model(y):
            with pyro.plate("rows", len(y)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.deterministic("double", 2.0 * z)
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

        y, body = torch.randn(BATCH), Sites()
        guide = AutoPlanar(model, amortize=body).materialize(y)
        guide(y)
        guide.sample_new_rows(2, y)
        assert all(len(values) == 1 and torch.equal(values[0], y) for values in body.seen)

    def test_discrete_latents_of_rows_are_enumerated(self):
        """The evidence of a mixture of two normals, by the encoder within a tenth of a nat a row."""

        @config_enumerate
        def model(y):
            with pyro.plate("d", len(y)):
                k = pyro.sample("k", dist.Bernoulli(0.3))
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z + 2.0 * k, 1.0), obs=y)

        y = torch.linspace(-2.0, 4.0, 20)
        guide = AutoPlanar(model, amortize="auto").materialize(y)
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        steps(model, guide, y, num=300, elbo=elbo)
        fit(model, guide, batches=[y, y[:7]], num_steps=10, progress=False)
        with torch.no_grad():
            bound = -sum(elbo.loss(model, guide, y) for _ in range(100)) / 100
        parts = [dist.Normal(2.0 * k, 2**0.5).log_prob(y) + math.log(p) for k, p in ((0, 0.7), (1, 0.3))]
        truth = float(torch.logaddexp(*parts).sum())
        assert truth - 0.1 * len(y) < bound < truth + 0.02 * len(y)

    @pytest.mark.parametrize("kind", ["nested", "joint"])
    def test_more_of_a_row(self, kind):
        def nested(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            with pyro.plate("d", len(y), dim=-2), poutine.scale(scale=SIZE / len(y)):
                a = pyro.sample("a", dist.Normal(mu, 1.0))
                with pyro.plate("r", REPEATS, dim=-1):
                    b = pyro.sample("b", dist.Normal(a, 1.0))
                    pyro.sample("y", dist.Normal(b, 0.5), obs=y)

        def joint(y):
            mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 5.0).to_event(1))
            with pyro.plate("d", len(y)), poutine.scale(scale=SIZE / len(y)):
                a = pyro.sample("a", dist.MultivariateNormal(mu, scale_tril=torch.eye(2)))
                loc = a[..., :1] + torch.arange(REPEATS) * a[..., 1:]
                pyro.sample("y", dist.Normal(loc, 0.5).to_event(1), obs=y)

        model, y = {"nested": nested, "joint": joint}[kind], data()
        guide = AutoPlanar(model, amortize="auto").materialize(y[:BATCH])
        for size in (BATCH, 7):
            assert math.isfinite(*steps(model, guide, y[:size], num=1))
            draws = guide.sample_posterior(2)
            assert draws["a"].shape == ((2, size, 1) if kind == "nested" else (2, size, 2))
            assert bool(guide.log_prob(draws).isfinite().all())
        assert guide.sample_new_rows(2, y[:4])["a"].shape[:2] == (2, 4)

    def test_predictive(self):
        y = data()
        guide = AutoPlanar(scaled, amortize="auto").materialize(y[:BATCH])
        for parallel in (False, True):
            found = Predictive(scaled, guide=guide, num_samples=4, parallel=parallel)(y[:6])
            assert found["theta"].shape == (4, 6)
