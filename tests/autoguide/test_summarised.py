"""Tables of posteriors, and how guides print."""

import copy
import functools
import pickle
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_flowvi import AutoCIF, AutoFlow, AutoFlowMixture, AutoPlanar, AutoRealNVP, fit
from pyro_flowvi.autoguide import GUIDES, _summarised
from pyro_flowvi.autoguide._summary_table import SummaryTable, rounded
from tests import rows, zoo
from tests.autoguide import test_amortised as amortised

COLUMNS = ["mean", "sd", "5%", "50%", "95%", "ess"]
Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])


def schools(y):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 10.0), obs=y)


def one_mean(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def matrix():
    pyro.sample("a", dist.Normal(torch.zeros(3, 4), 1.0).to_event(2))
    pyro.sample("b", dist.Dirichlet(torch.ones(3)).expand([2]).to_event(1))
    pyro.sample("none", dist.Normal(torch.zeros(0), 1.0).to_event(1))


class TestSummary:
    def test_against_the_posterior(self):
        y = torch.tensor([1.0, 2.0, 0.5])
        guide = AutoPlanar(one_mean, 2)
        fit(one_mean, guide, y, seed=0, progress=False)
        table = guide.summary()
        sd = (3 + 1 / 9) ** -0.5
        mean = float(y.sum()) * sd**2
        assert list(table.columns) == COLUMNS
        assert list(table.index) == ["mu"]
        found = table.to_numpy()[0]
        assert found[:5] == pytest.approx([mean, sd, mean - 1.645 * sd, mean, mean + 1.645 * sd], abs=0.06)
        assert 3900 < found[5] <= 4100
        assert table.attrs["num_samples"] == 4000
        assert 3900 < table.attrs["ess"] <= 4000
        assert table.attrs["khat"] < 0.5

    def test_weights_correct_a_guide_that_is_off(self):
        y = torch.tensor([1.0, 2.0, 0.5])
        guide = AutoRealNVP(one_mean, structure=None).materialize(y)
        sd = (3 + 1 / 9) ** -0.5
        mean = float(y.sum()) * sd**2
        guide.place_at(torch.tensor([mean + 0.5 * sd]), torch.tensor([[1.5 * sd]]))
        raw, corrected = guide.summary().to_numpy()[0], guide.summary(resample=True).to_numpy()[0]
        assert raw[0] == pytest.approx(mean + 0.5 * sd, abs=0.05)
        assert corrected[:5] == pytest.approx(
            [mean, sd, mean - 1.645 * sd, mean, mean + 1.645 * sd], abs=0.05
        )
        assert raw[5] == corrected[5]

    def test_effective_size_is_that_of_the_mean(self):
        """Means by weights of independent pools vary as much as the column says."""
        y = torch.tensor([1.0, 2.0, 0.5])
        guide = AutoRealNVP(one_mean, structure=None).materialize(y)
        sd = (3 + 1 / 9) ** -0.5
        guide.place_at(torch.tensor([float(y.sum()) * sd**2 + 0.7 * sd]), torch.tensor([[1.3 * sd]]))
        told = guide.summary(1000).to_numpy()[0, 5]
        density = guide.density(y)
        means = []
        for _ in range(300):
            z, log_q = guide.draw_latent(1000)
            w = torch.softmax(density.log_density(z) - log_q, 0)
            means.append(float((w * z[:, 0]).sum()))
        assert sd**2 / np.var(means) == pytest.approx(told, rel=0.25)

    @pytest.mark.parametrize("name", ["hierarchical", "flat"])
    def test_groups(self, name):
        guide = AutoRealNVP(schools, structure="auto" if name == "hierarchical" else None)
        fit(schools, guide, Y, num_steps=200, seed=0, progress=False)
        table = guide.summary(2000)
        assert list(table.index) == ["mu", "tau", *(f"theta[{i}]" for i in range(8))]
        drawn = guide.sample_posterior(4000)
        assert table["mean"]["theta[0]"] == pytest.approx(float(drawn["theta"][:, 0].mean()), abs=0.6)
        assert table["sd"]["mu"] == pytest.approx(float(drawn["mu"].std()), abs=0.4)
        assert (table["ess"] > 100).all()
        corrected, resampled = guide.summary(resample=True), guide.sample_posterior(4000, resample=True)
        assert corrected["50%"]["tau"] == pytest.approx(float(resampled["tau"].median()), abs=0.4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("make", [*GUIDES.values(), AutoCIF, AutoFlowMixture])
    def test_every_guide(self, make, dtype):
        guide = make(zoo.dirichlet)
        with pytest.raises(RuntimeError, match="materialize"):
            guide.summary()
        guide.to(dtype).materialize(torch.tensor([3.0, 4.0, 5.0]))
        table = guide.summary(500, digits=None)
        assert list(table.index) == ["p[0]", "p[1]", "p[2]"]
        assert table["mean"].sum() == pytest.approx(1.0, abs=1e-5)
        assert np.isfinite(table.to_numpy()).all()
        assert all(str(kind) == "float64" for kind in table.dtypes)

    def test_shapes_names_and_sites(self):
        guide = AutoPlanar(matrix, 2).materialize()
        table = guide.summary(200)
        assert list(table.index) == [f"a[{i},{j}]" for i in range(3) for j in range(4)] + [
            f"b[{i},{j}]" for i in range(2) for j in range(3)
        ]
        only = guide.summary(200, sites="b", prob=0.5)
        assert list(only.index) == list(table.index)[12:]
        assert list(only.columns) == ["mean", "sd", "25%", "50%", "75%", "ess"]
        assert (only["mean"] == table["mean"][12:]).all()
        assert len(guide.summary(200, sites=["none"])) == 0
        assert list(guide.summary(200, sites=[]).columns) == COLUMNS

    def test_same_at_every_call_and_no_part_of_the_stream(self):
        guide = AutoRealNVP(schools).materialize(Y)
        state = torch.get_rng_state()
        first, second = guide.summary(300), guide.summary(300)
        assert torch.equal(torch.get_rng_state(), state)
        assert first.equals(second)

    @pytest.mark.parametrize("structure", ["auto", None])
    def test_pages_change_nothing(self, structure, monkeypatch):
        guide = AutoPlanar(schools, 2, structure=structure).materialize(Y)
        whole = guide.summary(300, digits=None)
        monkeypatch.setattr(_summarised, "PAGE_NUMBERS", 900)
        paged = guide.summary(300, digits=None)
        assert list(paged.index) == list(whole.index)
        assert paged.to_numpy() == pytest.approx(whole.to_numpy(), rel=1e-9)

    def test_few_draws_of_many_latents(self, monkeypatch):
        monkeypatch.setattr(_summarised, "PAGE_NUMBERS", 5000)
        assert AutoPlanar(matrix, 2).materialize().summary().attrs["num_samples"] == 400
        monkeypatch.setattr(_summarised, "MOST_WEIGHED", 3)
        guide = AutoPlanar(schools, 2).materialize(Y)
        assert np.isnan(guide.summary(200).to_numpy()[:, 5]).all()
        with pytest.raises(RuntimeError, match="10 latents are too many"):
            guide.summary(200, resample=True)

    def test_left_out_latents(self):
        mask = torch.tensor([True, False, True])

        def model():
            with pyro.plate("n", 3), pyro.poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(1.0, 0.1))

        table = AutoPlanar(model, 2).materialize().summary(1000)
        assert list(table.index) == ["x[0]", "x[1]", "x[2]"]
        assert table["sd"]["x[1]"] == pytest.approx(1.0, abs=0.1)

    def test_bad_arguments(self):
        guide = AutoPlanar(one_mean, 2).materialize(torch.zeros(2))
        for options, match in (
            ({"prob": 1.0}, "prob: expected a number between 0 and 1, got 1.0"),
            ({"prob": True}, "prob"),
            ({"num_samples": 1}, "num_samples: expected at least 2"),
            ({"num_samples": 0}, "num_samples"),
            ({"sites": ["nu"]}, r"sites: expected some of \['mu'\], got \['nu'\]"),
            ({"rows": [0]}, "rows: expected None"),
            ({"digits": 0}, "digits: expected a positive integer"),
            ({"digits": 1.5}, "digits: expected a positive integer"),
        ):
            with pytest.raises(ValueError, match=match):
                guide.summary(**options)


class TestDigits:
    def test_scalars_of_different_scales_stay_readable(self):
        def model():
            pyro.sample("small", dist.Normal(0.012345, 1.5e-4))
            pyro.sample("one", dist.Normal(1.0, 0.5))
            pyro.sample("large", dist.Normal(12345.0, 678.0))

        guide = AutoRealNVP(model, structure=None).materialize()
        guide.place_at(torch.tensor([0.012345, 1.0, 12345.0]), torch.diag(torch.tensor([1.5e-4, 0.5, 678.0])))
        exact, table = guide.summary(500, digits=None), guide.summary(500)
        for name, places in (("small", 5), ("one", 2), ("large", 2)):
            for column in COLUMNS[:-1]:
                assert table[column][name] == pytest.approx(exact[column][name], abs=0.51 * 10.0**-places)
                assert table[column][name] == round(table[column][name], places)
        assert guide.summary(500, digits=1)["sd"]["small"] in (1e-4, 2e-4)
        assert all(len(line.split()[1]) <= len("12345.00000") for line in str(table).splitlines())

    def test_numbers_by_hand(self):
        rows = [[1.23456, 0.0], [np.nan, np.nan], [1e300, 1e-300], [-0.98765, 0.0996], [5e8, 2e7 + 0.126]]
        expected = [[1.23, 0.0], [np.nan, np.nan], [1e300, 1e-300], [-0.988, 0.1], [5e8, 2e7 + 0.13]]
        np.testing.assert_array_equal(rounded(np.array(rows), 2), expected)
        assert str(rounded(np.array([[-0.001, 2.0]]), 2)[0, 0]) == "0.0"


class TestWithoutWeights:
    def test_where_nothing_is_scored(self):
        guide = AutoPlanar(one_mean, 2).materialize(torch.zeros(2))
        table = guide.summary(200, ess=False)
        assert np.isnan(table["ess"]["mu"])
        assert np.isnan(table.attrs["khat"])

    def test_few_draws(self):
        guide = AutoPlanar(one_mean, 2).materialize(torch.zeros(2))
        assert np.isnan(guide.summary(50)["ess"]["mu"])
        with pytest.raises(RuntimeError, match="fewer than 100 of 50 draws"):
            guide.summary(50, resample=True)

    def test_after_minibatches(self):
        def model(y):
            mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
            with pyro.plate("rows", 40, subsample_size=len(y)):
                pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        data = DataLoader(TensorDataset(torch.ones(40)), batch_size=10)
        guide = AutoPlanar(model, 2)
        fit(model, guide, batches=data, num_steps=20, seed=0, progress=False)
        table = guide.summary()
        assert np.isnan(table["ess"]["mu"])
        assert table["mean"]["mu"] == pytest.approx(1.0, abs=0.3)
        with pytest.raises(RuntimeError, match="with all data to resample"):
            guide.summary(resample=True)

    def test_of_copies(self):
        guide = AutoPlanar(one_mean, 2).materialize(torch.ones(3))
        whole = guide.summary()
        assert copy.deepcopy(guide).summary().equals(whole)
        table = pickle.loads(pickle.dumps(guide)).summary()
        assert np.isnan(table["ess"]["mu"])
        assert table["mean"]["mu"] == whole["mean"]["mu"]


class TestRows:
    def test_all_and_some(self, monkeypatch):
        y = rows.data()
        model = functools.partial(rows.normals, size=10)
        guide = AutoRealNVP(model).materialize(y)
        table = guide.summary(500)
        assert list(table.index) == ["mu", "tau", *(f"z[{i}]" for i in range(40))]
        assert np.isnan(table["ess"]).all()
        assert np.isfinite(table["mean"]).all()
        some = guide.summary(2000, sites=["z"], rows=[31, 7])
        assert list(some.index) == ["z[31]", "z[7]"]
        assert some["mean"]["z[31]"] == pytest.approx(table["mean"]["z[31]"], abs=0.05)
        monkeypatch.setattr(_summarised, "PAGE_NUMBERS", 500 * 15)
        paged = guide.summary(500)
        assert list(paged.index) == list(table.index)
        assert np.allclose(paged["mean"], table["mean"], atol=0.05)
        assert paged["mean"]["mu"] == table["mean"]["mu"]
        with pytest.raises(RuntimeError, match="part of its data"):
            guide.summary(resample=True)
        with pytest.raises(ValueError, match="rows"):
            guide.summary(rows=[40])

    @pytest.mark.parametrize("name", [name for name in amortised.FORMS if name != "given"])
    def test_amortised(self, name):
        model, arguments = amortised.FORMS[name]
        guide = AutoPlanar(model, 2, amortize="auto").materialize(*arguments(amortised.data()))
        table, drawn = guide.summary(200), guide.sample_posterior(200)
        assert len(table) == 1 + drawn["theta"].shape[-1]
        assert np.isfinite(table["mean"]).all()


class TestWithoutPandas:
    def test_same_text_numbers_and_columns(self, monkeypatch):
        guide = AutoRealNVP(schools).materialize(Y)

        def made():
            return guide.summary(300), guide.summary(300, digits=None), guide.summary(300).round(1)

        tables = [made()]
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "pandas", None)
            tables.append(made())
        assert type(tables[1][0]).__name__ == "SummaryTable"
        for frame, own in zip(*tables, strict=True):
            assert str(own) == str(frame)
            assert own.columns == list(frame.columns)
            assert own.index == list(frame.index)
            assert own.shape == frame.shape
            assert own.attrs == frame.attrs
            assert own["mean"]["theta[3]"] == frame["mean"]["theta[3]"]
            assert np.array_equal(own.to_numpy(), frame.to_numpy())
            assert ">theta[3]</td>" in own._repr_html_()

    @pytest.mark.parametrize("size", [0, 1, 60, 61, 2000])
    @pytest.mark.parametrize("scale", [1e-9, 1.0, 3e7])
    def test_text_of_many_rows(self, size, scale):
        pandas = pytest.importorskip("pandas")
        numbers = scale * np.random.default_rng(0).standard_normal((3, size))
        numbers[2] = np.nan
        columns = dict(zip(["mean", "sd", "ess"], numbers, strict=True))
        index = [f"x[{i}]" for i in range(size)]
        own = SummaryTable(index, columns)
        if size:
            assert str(own) == str(pandas.DataFrame(columns, index=index))
        else:
            assert "mean, sd, ess" in str(own)
        assert own._repr_html_().count("<tr>") == 1 + (size if size <= 60 else 11)

    def test_import_of_pandas_waits_for_a_call(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pandas", None)
        assert "mu" in repr(AutoPlanar(one_mean, 2).materialize(torch.ones(2)).summary(100))


class TestRepr:
    def test_before_and_after_set_up(self):
        guide = AutoRealNVP(one_mean)
        assert (
            repr(guide) == "AutoRealNVP(model: one_mean, flow: realnvp, not set up: it has seen no data yet)"
        )
        guide.materialize(torch.zeros(2))
        count = sum(param.numel() for param in guide.parameters())
        assert repr(guide) == (
            f"AutoRealNVP(model: one_mean, latents: 1 in 1 site, mu, flow: realnvp, parameters: {count:,})"
        )

    def test_several_lines_with_a_structure(self):
        assert repr(AutoRealNVP(schools).materialize(Y)).splitlines()[1:3] == [
            "  model: schools",
            "  latents: 10 in 3 sites, mu, tau, theta (8)",
        ]
        lines = repr(AutoRealNVP(schools).materialize(Y)).splitlines()
        assert lines[-2:] == ["  structure: message map, the priors of latents depend on others", ")"]

    def test_shortened(self):
        def many():
            for i in range(20):
                pyro.sample(f"x{i}", dist.Normal(0.0, 1.0))

        assert "20 in 20 sites, x0, x1, x2, x3, ..., x19" in repr(AutoPlanar(many, 1).materialize())

    def test_rows(self):
        guide = AutoRealNVP(functools.partial(rows.normals, size=10)).materialize(rows.data())
        lines = repr(guide).splitlines()
        assert lines[1:3] == ["  model: normals", "  latents: 42 in 3 sites, mu, tau, z (40)"]
        assert "10 of 40 rows at a time" in lines[-2]

    def test_mixture_and_callables(self):
        assert "flow: realnvp, 3 components" in repr(AutoFlowMixture(one_mean, 3))
        assert "flow: Planar" in repr(AutoFlow(one_mean, pyro.distributions.transforms.Planar))
        assert "model: Linear" in repr(AutoPlanar(torch.nn.Linear(1, 1)))

    def test_in_a_tree_of_modules(self):
        guide = AutoPlanar(one_mean, 2).materialize(torch.zeros(2))
        tree = torch.nn.ModuleDict({"guide": guide})
        assert "AutoPlanar(model: one_mean" in repr(tree)

    def test_of_a_guide_that_lost_its_model(self):
        guide = pickle.loads(pickle.dumps(AutoPlanar(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), 2)))
        assert repr(guide).startswith("AutoPlanar(model: lost")
