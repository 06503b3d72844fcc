"""What Pyro's users write around minibatches with latents of their own, and what is refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate, infer_discrete
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from pyro_flowvi import AutoCIF, AutoFlowMixture, AutoPlanar, AutoRealNVP, CompiledSVI, fit
from tests.rows import batches, data, given, normals

NUM, SIZE = 40, 8


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def svi(model, guide, loss=None):
    return SVI(model, guide, Adam({"lr": 0.01}), loss or Trace_ELBO())


def shown(program, *args, **kwargs):
    """The rows that a run shows."""
    return poutine.trace(program).get_trace(*args, **kwargs).nodes["n"]["value"].tolist()


class TestIndices:
    def test_an_index_is_used_and_not_overridden(self):
        model, rows = given(NUM), torch.tensor([3, 1, 4])
        guide = AutoRealNVP(model).materialize(data()[:SIZE], torch.arange(SIZE))
        assert shown(guide, data()[rows], rows) == [3, 1, 4]
        before = guide._flow.rows.block_centre.detach().clone()
        svi(model, guide).step(data()[rows], rows)
        moved = (guide._flow.rows.block_centre.detach() != before).flatten(1).any(1)
        assert moved.nonzero().flatten().tolist() == [1, 3, 4]

    def test_as_a_keyword_and_of_all_rows(self):
        def model(y, index=None):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            with pyro.plate("n", NUM, subsample=index) as rows:
                z = pyro.sample("z", dist.Normal(mu, 1.0))
                pyro.sample("y", dist.Normal(z, 0.5), obs=y[rows])

        y, rows = data(), torch.tensor([3, 1, 4])
        guide = AutoRealNVP(model).materialize(y, index=rows)
        for index in (rows, torch.arange(9), None):
            assert svi(model, guide).step(y, index=index) > 0.0
        assert shown(guide, y, index=rows) == [3, 1, 4]
        assert shown(guide, y) == list(range(NUM))

    def test_without_arguments_after_set_up(self):
        guide = AutoRealNVP(given(NUM))
        y = data()
        guide(y[:SIZE], torch.arange(SIZE))
        assert guide()["z"].shape == (SIZE,)
        own = AutoRealNVP(lambda: normals(y, size=SIZE))
        assert own()["z"].shape == own()["z"].shape == (SIZE,)

    def test_subsample_statement(self):
        """``pyro.subsample`` and parameters with an ``event_dim`` take the rows from the whole."""
        y = data()

        def model(select):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            with pyro.plate("n", NUM, subsample_size=SIZE) as rows:
                shift = pyro.param("shift", torch.linspace(0.0, 1.0, NUM), event_dim=0) if select else 0.0
                z = pyro.sample("z", dist.Normal(mu + shift, 1.0))
                pyro.sample(
                    "y", dist.Normal(z, 0.5), obs=pyro.subsample(y, event_dim=0) if select else y[rows]
                )

        guide = AutoRealNVP(model).materialize(True)
        assert svi(model, guide).step(True) > 0.0
        assert fit(model, guide, True, num_steps=5, progress=False).losses.isfinite().all()
        plain = AutoRealNVP(lambda: model(False)).materialize()
        assert plain.structure.why == guide.structure.why


class TestPlates:
    def test_create_plates(self):
        seen = []

        def create_plates(y, rows):
            seen.append(rows)
            return pyro.plate("n", NUM, subsample=rows)

        y, rows = data(), torch.tensor([3, 1, 4])
        guide = AutoRealNVP(given(NUM), create_plates=create_plates)
        svi(given(NUM), guide).step(y[rows], rows)
        assert seen
        assert shown(guide, y[rows], rows) == [3, 1, 4]

    def test_create_plates_without_latents_of_rows(self):
        """As AutoNormal's: the guide's plate says which rows the model shows."""

        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            with pyro.plate("n", NUM, subsample_size=3) as rows:
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

        def create_plates(y):
            return pyro.plate("n", NUM, subsample=torch.tensor([3, 1, 4]))

        for make in (AutoNormal, AutoPlanar, AutoRealNVP):
            assert svi(model, make(model, create_plates=create_plates)).step(data()) > 0.0
        with pytest.raises(ValueError, match="create_plates: expected a callable or None, got 3"):
            AutoPlanar(model, create_plates=3)

    def test_a_list_of_guides(self):
        """Rows and what they share by one guide, another site by another."""

        def model():
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
            normals(y + 0.0 * c, size=SIZE)
            pyro.sample("d", dist.Normal(c, 1.0), obs=torch.tensor(1.0))

        y = data()
        guide = AutoGuideList(model)
        guide.append(AutoRealNVP(poutine.block(model, hide=["c", "d"])))
        guide.append(AutoNormal(poutine.block(model, expose=["c"])))
        steps = svi(model, guide)
        assert all(steps.step() > 0.0 for _ in range(3))
        assert guide[0].sample_posterior(2)["z"].shape == (2, NUM)

    def test_other_pages_at_a_later_fit(self):
        guide = AutoRealNVP(normals).materialize(data(), size=SIZE)
        assert guide.materialize(data(), size=5)(data(), size=5)["z"].shape == (5,)
        assert guide.sample_posterior(2)["z"].shape == (2, NUM)


class TestPredictive:
    def test_with_the_guide(self):
        model, y = given(NUM), data()
        guide = AutoRealNVP(model).materialize(y[:SIZE], torch.arange(SIZE))
        for rows in (torch.arange(SIZE), torch.tensor([9, 2])):
            draws = Predictive(model, guide=guide, num_samples=3)(y[rows], rows)
            assert draws["z"].shape == (3, len(rows))

    def test_all_rows_after_minibatches(self):
        """All rows' draws, and the model run with all rows."""

        def model(size):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            with pyro.plate("n", NUM, subsample_size=size):
                z = pyro.sample("z", dist.Normal(mu, 1.0))
                return pyro.sample("y", dist.Normal(z, 0.5))

        conditioned = poutine.condition(model, data={"y": data()[:SIZE]})
        guide = AutoRealNVP(conditioned).materialize(SIZE)
        draws = guide.sample_posterior(50)
        predicted = Predictive(model, posterior_samples=draws)(NUM)
        assert predicted["y"].shape == (50, NUM)
        gap = predicted["y"] - draws["z"]
        assert gap.std().item() == pytest.approx(0.5, rel=0.1)


class TestModels:
    def test_a_parameter_of_the_model_is_trained_along(self):
        def model(y, rows):
            shift = pyro.param("shift", torch.tensor(0.0))
            with pyro.plate("n", NUM, subsample=rows):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z + shift, 0.5), obs=y)

        y = data()
        guide = AutoRealNVP(model)
        fit(model, guide, batches=batches(y, SIZE), num_steps=400, lr=0.05, seed=0, progress=False)
        assert pyro.param("shift").item() == pytest.approx(y.mean().item(), abs=0.1)

    @pytest.mark.parametrize("by_fit", [False, True])
    def test_a_discrete_latent_of_each_row(self, by_fit):
        y = torch.where(torch.arange(NUM) % 2 == 0, 3.0, -3.0) + 0.1 * data()

        @config_enumerate
        def model(size):
            with pyro.plate("n", NUM, subsample_size=size) as rows:
                z = pyro.sample("z", dist.Normal(0.0, 0.5))
                k = pyro.sample("k", dist.Bernoulli(0.5))
                pyro.sample("y", dist.Normal(6.0 * k - 3.0 + z, 0.5), obs=y[rows])

        guide = AutoRealNVP(model).materialize(SIZE)
        assert set(guide.sample_posterior()) == {"z"}
        if by_fit:
            fit(model, guide, SIZE, num_steps=30, seed=0, progress=False)
        else:
            steps = svi(model, guide, TraceEnum_ELBO(max_plate_nesting=1))
            assert all(steps.step(SIZE) > 0.0 for _ in range(30))
        whole = poutine.condition(model, data=guide.median())
        assigned = infer_discrete(whole, first_available_dim=-2)
        k = poutine.trace(assigned).get_trace(NUM).nodes["k"]["value"]
        assert torch.equal(k, (torch.arange(NUM) % 2 == 0).to(k))

    def test_integers_and_masks(self):
        y = data().exp().round().long()
        known = torch.arange(NUM) % 3 > 0

        def model(y, scale=1.0):
            mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
            with pyro.plate("n", NUM, subsample_size=SIZE) as rows:
                z = pyro.sample("z", dist.Normal(mu, scale))
                with poutine.mask(mask=known[rows]):
                    pyro.sample("y", dist.Poisson(z.exp()), obs=y[rows])

        guide = AutoRealNVP(model)
        result = fit(model, guide, y, scale=0.5, num_steps=100, seed=0, progress=False)
        assert result.start == "program"
        draws = guide.sample_posterior(4000)
        # A row without data has the prior given mu.
        gap = draws["z"][:, ~known] - draws["mu"].unsqueeze(-1)
        assert torch.allclose(gap.std(0), torch.tensor(0.5), rtol=0.08)

    def test_a_cell_that_is_run_twice(self):
        for _ in range(2):
            guide = AutoRealNVP(normals, name="guide")
            steps = svi(normals, guide)
            steps.step(data(), size=SIZE)
        assert guide.sample_posterior(2)["z"].shape == (2, NUM)

    def test_compiled_steps_are_stock_steps(self):
        model, y = given(NUM), data()
        known = batches(y, SIZE)
        losses, states = [], []
        for make in (SVI, CompiledSVI):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            guide = AutoRealNVP(model).materialize(*known[0])
            steps = make(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
            pyro.set_rng_seed(1)
            losses.append([steps.step(*batch) for batch in known])
            states.append({key: value.clone() for key, value in guide.state_dict().items()})
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
        assert all(torch.allclose(value, states[1][key], rtol=1e-8) for key, value in states[0].items())


class TestBatches:
    @pytest.mark.parametrize("kind", ["tuples", "dicts", "loader", "callable", "generator"])
    def test_of_every_kind(self, kind):
        """The last batch is shorter."""
        y = data()
        known = batches(y, 9)
        supply = {
            "tuples": lambda: known,
            "dicts": lambda: [{"y": part, "rows": rows} for part, rows in known],
            "loader": lambda: DataLoader(TensorDataset(y, torch.arange(NUM)), batch_size=9, shuffle=True),
            "callable": lambda: lambda step: known[step % 4],
            "generator": lambda: (known[step % 4] for step in range(1000)),
        }[kind]()
        guide = AutoRealNVP(given(NUM))
        result = fit(given(NUM), guide, batches=supply, num_steps=20, seed=0, progress=False)
        assert result.losses.isfinite().all()
        assert result.start == "program"
        seen = torch.cat([rows for _, rows in known[:4]])
        # Conjugate rows are where they are to be as soon as they are seen.
        draws = guide.sample_posterior(4000)
        mean = draws["mu"].mean() + (y - draws["mu"].mean()) * draws["tau"].mean() ** 2 / (
            draws["tau"].mean() ** 2 + 0.25
        )
        assert (draws["z"].mean(0) - mean)[seen].abs().max() < 0.15
        assert guide.log_prob(draws).isfinite().all()

    def test_scaled_batches_without_latents_of_rows(self):
        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            with pyro.plate("n", len(y)), poutine.scale(scale=NUM / len(y)):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        result = fit(model, AutoRealNVP(model), batches=data().split(9), num_steps=20, progress=False)
        assert result.losses.isfinite().all()


def crossed():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("a", 9, subsample_size=3, dim=-2), pyro.plate("b", 8, subsample_size=2, dim=-1):
        pyro.sample("z", dist.Normal(mu, 1.0))


def two_plates():
    for name in "ab":
        with pyro.plate(name, 9, subsample_size=3):
            pyro.sample(f"z_{name}", dist.Normal(0.0, 1.0))


def loop():
    for i in pyro.plate("n", 9, subsample_size=3):
        pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))


def lagged(lag):
    def model():
        with pyro.plate("n", 20, subsample_size=8):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("w", dist.Normal(z.roll(lag, -1), 1.0))

    return model


def summed():
    with pyro.plate("n", 20, subsample_size=8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z.mean(-1), 1.0), obs=torch.tensor(1.0))


def drawn_inside():
    with pyro.plate("n", 20, subsample=torch.randperm(20)[:8]):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def made_outside():
    with OUTSIDE:
        pyro.sample("z", dist.Normal(0.0, 1.0))


OUTSIDE = pyro.plate("n", 20, subsample_size=8)


def discrete():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 20, subsample_size=8):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("z", dist.Normal(mu + k, 1.0))


class TestRefused:
    @pytest.mark.parametrize(
        ("model", "told"),
        [
            (crossed, r"site 'z': .*'a' and 'b', crossed.*subsample one of them"),
            (two_plates, r"sites 'z_a' and 'z_b': .*\['a', 'b'\]; subsample one of them"),
            (loop, r"site 'z_\d': expected a vectorised plate.*'n'.*with pyro.plate"),
            (lagged(1), r"plate 'n': expected rows that are independent.*whole groups"),
            (lagged(2), r"plate 'n': expected rows that are independent.*whole groups"),
            (lagged(4), r"plate 'n': expected rows that are independent.*whole groups"),
            (summed, r"plate 'n': expected rows that are independent.*whole groups"),
            (drawn_inside, r"plate 'n': .*from the model's arguments.*subsample_size=8"),
            (made_outside, r"site 'z': .*at each run of the model, got 'n', made outside.*subsample_size=8"),
            (discrete, r"site 'k': expected a continuous latent or a discrete one.*enumerate"),
        ],
    )
    def test_models(self, model, told):
        guide = AutoRealNVP(model)
        for _ in range(2):
            with pytest.raises(ValueError, match=told):
                guide.materialize()
        with pytest.raises(ValueError, match=told):
            fit(model, AutoRealNVP(model), progress=False)

    @pytest.mark.parametrize("make", [AutoCIF, AutoFlowMixture])
    def test_guides_that_keep_nothing_of_rows(self, make):
        with pytest.raises(ValueError, match=r"site 'z': .*'n' \(8 of 40\).*AutoRealNVP.*AutoGuideList"):
            make(normals).materialize(data(), size=SIZE)

    def test_other_rows_later(self):
        guide = AutoRealNVP(normals).materialize(data(), size=SIZE)
        with pytest.raises(ValueError, match=r"plate 'n': expected 40 rows.*got 30; build a guide"):
            guide.materialize(data(30), size=SIZE)
        with pytest.raises(ValueError, match=r"plate 'n': expected 40 rows.*got none"):
            guide.materialize(data(), size=NUM)

    def test_rows_that_nobody_knows(self):
        """Minibatches by a scale, with latents of rows: both ways out are named."""

        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
            with pyro.plate("n", len(y)), poutine.scale(scale=NUM / len(y)):
                z = pyro.sample("z", dist.Normal(mu, 1.0))
                pyro.sample("y", dist.Normal(z, 0.5), obs=y)

        with pytest.raises(ValueError, match=r"site 'z': .*scaled by 5.*subsample=index.*amortize"):
            fit(model, AutoRealNVP(model), batches=data().split(SIZE), num_steps=5, progress=False)

    def test_a_longer_batch(self):
        known = batches(data(), SIZE)
        known[1] = (data()[:11], torch.arange(11))
        with pytest.raises(ValueError, match=r"batches: expected as many rows.*got 11 after 8"):
            fit(given(NUM), AutoRealNVP(given(NUM)), batches=known, num_steps=5, progress=False)
