"""Guides with rows in copies, files and the param store."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_flowvi import AutoRealNVP, fit
from tests.rows import data, given, normals

NUM, SIZE = 40, 8


def svi(model, guide):
    return SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO())


def trained(**options):
    y = data()
    guide = AutoRealNVP(normals, **options).materialize(y, size=SIZE)
    steps = svi(normals, guide)
    for _ in range(5):
        steps.step(y, size=SIZE)
    return guide


def drawn(guide, **options):
    torch.manual_seed(3)
    return guide.sample_posterior(4, **options)


def same(one, other):
    return all(torch.equal(value, other[site]) for site, value in one.items())


def test_a_state_dict():
    guide = trained()
    fresh = AutoRealNVP(normals)
    fresh.load_state_dict(guide.state_dict())
    fresh.materialize(data(), size=SIZE)
    assert same(drawn(guide), drawn(fresh))


def test_a_state_of_other_rows_is_refused():
    guide = trained()
    fresh = AutoRealNVP(normals).materialize(data(NUM + 2), size=SIZE)
    with pytest.raises(RuntimeError, match="block_slope"):
        fresh.load_state_dict(guide.state_dict())


def test_a_copy_goes_its_own_way():
    guide = trained()
    other = copy.deepcopy(guide)
    before = drawn(guide)
    assert same(before, drawn(other))
    steps = svi(normals, other)
    steps.step(data(), size=SIZE)
    assert same(before, drawn(guide))
    assert not same(before, drawn(other))


@pytest.mark.parametrize("keeps", [True, False], ids=["with its model", "without"])
def test_a_pickle(keeps):
    guide = trained()
    if not keeps:
        guide._model = guide._raw_model = (lambda: None,)  # has no pickle
    loaded = pickle.loads(pickle.dumps(guide))
    assert (loaded._raw_model[0] is None) is not keeps
    one, other = drawn(guide), drawn(loaded)
    assert same(one, other)
    assert torch.equal(guide.log_prob(one), loaded.log_prob(one))
    assert same(drawn(guide, rows=[7, 0], sites=["z"]), drawn(loaded, rows=[7, 0], sites=["z"]))


def test_priors_of_a_pickle_read_the_rows_that_are_drawn():
    """A prior that depends on each row's covariate."""
    guide = AutoRealNVP(shifted)
    fit(shifted, guide, torch.arange(12.0), num_steps=5, seed=0, progress=False)
    loaded = pickle.loads(pickle.dumps(guide))
    for each in (guide, loaded):
        torch.manual_seed(0)
        some = each.sample_posterior(400, rows=[11, 1], sites=["z"])["z"]
        assert (some.mean(0) - torch.tensor([11.0, 1.0])).abs().max() < 0.5


def shifted(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 0.1))
    with pyro.plate("n", len(x), subsample_size=4) as rows:
        z = pyro.sample("z", dist.Normal(x[rows] + mu, 0.1))
        pyro.sample("y", dist.Normal(z, 1.0), obs=x[rows])


def test_the_param_store(tmp_path):
    pyro.clear_param_store()
    guide = trained(name="kept")
    before = drawn(guide)
    pyro.get_param_store().save(tmp_path / "store")
    del guide
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    fresh = AutoRealNVP(normals, name="kept").materialize(data(), size=SIZE)
    assert same(before, drawn(fresh))


def test_another_dtype():
    guide = trained()
    before = drawn(guide)
    guide.double()
    after = drawn(guide)
    assert after["z"].dtype == torch.float64
    assert after["z"].shape == before["z"].shape
    assert guide.log_prob(after).isfinite().all()


def test_batches_after_a_state():
    y = data()
    guide = AutoRealNVP(given(NUM)).materialize(y[:SIZE], torch.arange(SIZE))
    fresh = AutoRealNVP(given(NUM))
    fresh.load_state_dict(guide.state_dict())
    assert fresh(y[3:5], torch.tensor([3, 4]))["z"].shape == (2,)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.linalg.LinAlgError])
def test_a_start_that_fails_leaves_the_guide_as_it_was(error, monkeypatch):
    def fail(*_):
        raise error

    guide = trained()
    before = drawn(guide)
    monkeypatch.setattr("pyro_flowvi.autoguide._row_start._Paged.renew", fail)
    monkeypatch.setattr("pyro_flowvi.autoguide._row_start.place_messages", fail)
    options = {"size": SIZE, "num_steps": 1, "lr": 1e-9, "progress": False}
    if error is KeyboardInterrupt:
        with pytest.raises(error):
            fit(normals, guide, data(), **options)
        assert same(before, drawn(guide))
    else:
        assert fit(normals, guide, data(), **options).start is None
        assert all(torch.allclose(value, before[site], atol=1e-5) for site, value in drawn(guide).items())
