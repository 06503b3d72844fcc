"""Fits on several processes, against those on one and quadrature; all kinds of guides and models."""

import importlib
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_flowvi import AutoCIF, AutoFlowMixture, AutoPlanar, AutoRealNVP, diagnose, fit
from pyro_flowvi._ranks import Ranks
from pyro_flowvi.infer import _checkpoint, _one_run
from tests.distributed_fits import elbo, equal, normals_of_rows, numbers, points, regression
from tests.ranks import on_ranks
from tests.rows import data, given, grid_moments, normals

fitting = importlib.import_module("pyro_flowvi.infer._fit")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


class Lone(Ranks):
    """One process that draws the noise of its steps from a stream of its own, as each of several does."""

    def share_noise(self):
        seed, other = torch.randint(2**48, (2,)).tolist()
        torch.manual_seed(seed)
        self._noise = [torch.get_rng_state()]
        torch.manual_seed(other)


def with_common_noise(moves=True):
    """All ranks draw the same noise, and one alone; first batches of 15 and 30 rows start elsewhere."""
    if not moves:
        fitting.move = lambda *_: None
    Ranks._stream = lambda self, seed: seed
    found = _one_run.find_ranks
    _one_run.find_ranks = lambda *args: Lone() if (ranks := found(*args)).alone else ranks


def moments(guide, *sites):
    torch.manual_seed(1)
    drawn = guide.sample_posterior(4000, sites=sites)
    return {site: (value.mean(0), value.std(0)) for site, value in drawn.items()}


# -- against quadrature and a single process ---------------------------------------------------------


def fit_rows(num=40, size=8, **options):
    """A fit with a latent for each row, gathered in the end; what is known of it before and after."""
    y = data(num)
    guide = AutoRealNVP(normals)
    result = fit(normals, guide, y, model_kwargs={"size": size}, seed=0, **options)
    own = guide._rows.tables(guide).own
    shared = moments(guide, "mu", "tau")
    before = numbers(guide)
    refused = None
    try:
        with torch.no_grad():
            guide.sample_posterior(3)
    except RuntimeError as error:
        refused = str(error)
    guide.gather_rows()
    torch.manual_seed(2)
    z = guide.sample_posterior(4000)["z"].mean(0)
    return SimpleNamespace(
        result=(result.stop_reason, result.start, result.best_loss, result.losses),
        own=own,
        shared=shared,
        before=before,
        refused=refused,
        z=z,
        verdict=diagnose(normals, guide, y, model_kwargs={"size": size}).verdict,
    )


class TestRows:
    def test_two_ranks_find_what_quadrature_says(self, tmp_path):
        one, two = on_ranks(tmp_path / "ranks", 2, fit_rows)
        exact, _ = grid_moments(data(40))
        for name, (mean, sd) in exact.items():
            assert one.shared[name][0] == pytest.approx(mean, abs=0.1 * sd)
            assert one.shared[name][1] == pytest.approx(sd, rel=0.1)
        assert one.result[:3] == two.result[:3]
        assert torch.equal(one.result[3], two.result[3])
        assert torch.equal(torch.cat([one.own, two.own]), torch.arange(40))
        rows = {name for name in one.before if name.startswith("flow.rows.block")}
        assert rows
        assert all(len(one.before[name]) == len(two.before[name]) == 20 for name in rows)
        assert equal(*({k: v for k, v in r.before.items() if k not in rows} for r in (one, two)))
        assert "gather_rows" in one.refused
        assert torch.equal(one.z, two.z)
        shrunk = (4.0 * data(40) + one.shared["mu"][0] / 1.1) / (4.0 + 1.0 / 1.1)
        assert (one.z - shrunk).abs().max() < 0.1
        assert one.verdict == two.verdict == "good"


def fit_one(kind, options, common=True):
    """Losses, moments and parameters of a fit."""
    if common:
        with_common_noise(moves="loss" not in options)
    options = {"seed": 0, "progress": False, **options}
    size = options.pop("size", None)
    if kind == "batches":
        x, y = points()
        model, args, options["batches"] = (
            regression(),
            (),
            list(zip(x.split(size), y.split(size), strict=True)),
        )
    else:
        model, args = regression(size), points()
    guide = AutoRealNVP(model)
    result = fit(model, guide, *args, **options)
    return result.losses, moments(guide, "b"), numbers(guide), result.stop_reason


def close(one, two, tolerance=1e-10):
    """Whether two fits took the same steps to the same place."""
    losses = torch.allclose(one[0], two[0], rtol=tolerance, atol=0.0)
    return losses and all(
        torch.allclose(value, two[2][name], rtol=tolerance, atol=tolerance) for name, value in one[2].items()
    )


def fit_ragged(size):
    """Losses of a fit to batches of which the first on rank 1 is the short one."""
    with_common_noise(moves=False)
    x, y = points()
    cuts = [20, 10, 30, 20, 20, 20] if size == 1 else [30, 50, 40]
    found = list(zip(x.split(cuts), y.split(cuts), strict=True))
    model = regression()
    guide = AutoRealNVP(model)
    result = fit(
        model, guide, batches=found, loss=elbo(), compile=False, num_steps=6, lr=0.01, seed=0, progress=False
    )
    return result.losses, None, numbers(guide)


class TestAgainstOneProcess:
    """Two ranks with batches of 15 rows and one with batches of 30, on the same noise."""

    def compared(self, folder, ranks, size, joined, options):
        """What several ranks have found, all the same, and what one has."""
        several = on_ranks(folder / "several", ranks, fit_one, "batches", {**options, "size": size})
        (alone,) = on_ranks(folder / "alone", 1, fit_one, "batches", {**options, "size": joined})
        assert all(close(several[0], other, 0.0) for other in several)
        return several[0], alone

    @pytest.mark.long
    @pytest.mark.parametrize("compile", [False, "auto", True])
    def test_steps_of_pyro(self, tmp_path, compile):
        options = {"loss": elbo(), "compile": compile, "num_steps": 40, "lr": 0.01}
        assert close(*self.compared(tmp_path, 2, 15, 30, options))

    @pytest.mark.long
    @pytest.mark.parametrize("ranks", [2, 3])
    def test_steps_of_a_flow(self, tmp_path, ranks):
        assert close(*self.compared(tmp_path, ranks, 10, 10 * ranks, {"num_steps": 40}))

    @pytest.mark.long
    def test_a_shorter_last_batch_counts_less(self, tmp_path):
        """Batches of 16, the last of which has 8 rows: with that before it, as one of 24."""
        options = {"loss": elbo(), "compile": False, "num_steps": 4, "lr": 0.01}
        assert close(*self.compared(tmp_path, 2, 16, [32, 32, 32, 24], options))

    @pytest.mark.long
    def test_a_shorter_first_batch_counts_less(self, tmp_path):
        one, two = on_ranks(tmp_path / "several", 2, fit_ragged, 1)
        (alone,) = on_ranks(tmp_path / "alone", 1, fit_ragged, 2)
        assert close(one, two, 0.0)
        assert close(one, alone)

    @pytest.mark.long
    @pytest.mark.parametrize(("kind", "size"), [("all data", None), ("a plate", 20), ("batches", 20)])
    def test_to_the_end(self, tmp_path, kind, size):
        """On noise of their own the ranks end where one process does, as close to the posterior."""
        found = on_ranks(tmp_path / "several", 2, fit_one, kind, {"size": size}, False)
        (alone,) = on_ranks(tmp_path / "alone", 1, fit_one, kind, {"size": size}, False)
        assert close(*found, 0.0)
        (mean, sd), (other, spread) = found[0][1]["b"], alone[1]["b"]
        assert ((mean - other).abs() < 0.1 * spread).all()
        assert ((sd / spread - 1.0).abs() < 0.1).all()


# -- rows -------------------------------------------------------------------------------------------


def alternating(*size, **kwargs):
    """Draws that are the same for every latent, so that it does not matter which page a row is on."""
    shape = size[0] if size and isinstance(size[0], tuple | list) else kwargs.get("size") or size
    signs = torch.tensor([1.0, -1.0]).repeat(shape[0] // 2 + 1)[: shape[0]]
    return (0.7 * signs).reshape(-1, *[1] * (len(shape) - 1)).expand(tuple(shape)).clone()


def fit_given(size, file, num_steps, stops_at=None):
    """Losses and gradient norms of a fit to batches with their index, which may break off and go on."""
    fitting.CHECKPOINT_SECONDS = 0.0
    with_common_noise()
    torch.randn = alternating
    y, model = data(40), given(40)
    guide = AutoRealNVP(model)
    if stops_at is not None:
        steps, written = [0], _checkpoint.Checkpoint.write

        def write(self, *args):
            written(self, *args)
            steps[0] += 1
            if steps[0] == stops_at:
                raise KeyboardInterrupt

        _checkpoint.Checkpoint.write = write
    found = list(zip(y.split(size), torch.arange(40).split(size), strict=True))
    options = {"num_steps": num_steps, "lr": 0.01, "checkpoint": file, "seed": 0, "progress": False}
    result = fit(model, guide, batches=found, **options)
    own = guide._rows.tables(guide).own
    guide.gather_rows()
    return result.losses, result.gradient_norms, own, result.stop_reason


class TestRowsAgainstOneProcess:
    @pytest.mark.long
    @pytest.mark.parametrize("ranks", [2, 4])
    def test_a_run_goes_on_with_another_number_of_ranks(self, tmp_path, ranks):
        """The rows are dealt anew, and the next steps are those of one process, which has all of them."""
        file = tmp_path / "run.pt"
        (begun,) = on_ranks(tmp_path / "begun", 1, fit_given, 20, file, 12, 5)
        assert begun[3] == "interrupted"
        assert len(begun[0]) == 5
        copy = tmp_path / "copy.pt"
        copy.write_bytes(file.read_bytes())
        (alone,) = on_ranks(tmp_path / "alone", 1, fit_given, 20, file, 12)
        several = on_ranks(tmp_path / "several", ranks, fit_given, 20 // ranks, copy, 12)
        assert len(alone[0]) == 12
        assert torch.equal(alone[0][:5], begun[0])
        for rank, found in enumerate(several):
            assert torch.allclose(found[0], alone[0], rtol=1e-10, atol=0.0)
            assert torch.allclose(found[1], alone[1], rtol=1e-9, atol=0.0)
            dealt = torch.arange(40).split(20 // ranks)[rank::ranks]
            assert torch.equal(found[2], torch.cat(dealt))
        (back,) = on_ranks(tmp_path / "back", 1, fit_given, 20, copy, 12)
        assert torch.equal(back[0], several[0][0])


# -- all kinds of guides and models ------------------------------------------------------------------


def schools(y, group):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(2.0))
    with pyro.plate("groups", 6):
        a = pyro.sample("a", dist.Normal(mu, tau))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(a[..., group], 1.0), obs=y)


def two_modes(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu.abs(), 0.5), obs=y)


def with_parameter(y):
    sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, sd), obs=y)


def fit_any(kind):
    """What a short fit of some kind ends with."""
    torch.manual_seed(torch.distributed.get_rank())  # whatever the ranks did before
    y, group = data(30), torch.arange(30) % 6
    options = {"num_steps": 60, "seed": 0}
    if kind == "hierarchy":
        model, guide, args = schools, AutoRealNVP(schools), (y, group)
    elif kind == "hierarchy, compiled":
        model, guide, args = schools, AutoRealNVP(schools), (y, group)
        options |= {"loss": elbo(), "compile": True}
    elif kind == "mixture":
        model, guide, args = two_modes, AutoFlowMixture(two_modes, num_components=2), (y,)
    elif kind == "continuously indexed":
        model, guide, args = two_modes, AutoCIF(two_modes), (y,)
    elif kind == "a model's parameter":
        model, guide, args = with_parameter, AutoPlanar(with_parameter), (y,)
    elif kind == "a scheduler":
        model, guide, args = normals_of_rows, AutoNormal(normals_of_rows), (y,)
        options["optim"] = pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "gamma": 0.99}
        )
    elif kind == "validation":
        model, guide, args = normals_of_rows, AutoPlanar(normals_of_rows), ()
        options |= {"batches": list(y.split(10)), "validation": y[:7]}
    elif kind == "networks that read rows":
        model, args = given(30), ()
        guide = AutoRealNVP(model, amortize="auto")
        options["batches"] = list(zip(y.split(5), torch.arange(30).split(5), strict=True))
    elif kind == "an earlier guide":
        model, args = normals_of_rows, (y,)
        first, guide = AutoPlanar(model), AutoPlanar(model)
        fit(model, first, y[:20], **options)
        options["init"] = first
    else:
        assert kind == "rows of an earlier guide"
        model, args, guide = normals, (y,), AutoRealNVP(normals)
        options |= {"model_kwargs": {"size": 6}}
        fit(model, guide, y, **options)
        options["init"] = guide
    result = fit(model, guide, *args, **options)
    guide = guide.gather_rows() if hasattr(guide, "gather_rows") else guide
    params = {**numbers(guide), **{k: v.detach() for k, v in pyro.get_param_store().named_parameters()}}
    return result.stop_reason, result.start, result.losses, params


class TestKinds:
    @pytest.mark.long
    @pytest.mark.parametrize(
        "kind",
        [
            "hierarchy",
            "hierarchy, compiled",
            "mixture",
            "continuously indexed",
            "a model's parameter",
            "a scheduler",
            "validation",
            "networks that read rows",
            "an earlier guide",
            "rows of an earlier guide",
        ],
    )
    def test_ranks_end_with_the_same(self, tmp_path, kind):
        one, two = on_ranks(tmp_path / "ranks", 2, fit_any, kind)
        assert one[:2] == two[:2]
        assert torch.equal(one[2], two[2])
        assert equal(one[3], two[3])
        assert all(value.isfinite().all() for value in one[3].values())
