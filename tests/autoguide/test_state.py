"""A guide's names, its life in the param store, copies and pickles, and its dtype and device."""

import copy
import gc
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_flowvi import AutoFlow, AutoPlanar
from tests import zoo
from tests.autoguide.test_contract import case, step


class TestNames:
    def test_two_guides_never_share_parameters(self):
        """Fact 5: in Pyro the second guide of a class is silently not trained."""
        model, args = case("far")
        first, second = AutoPlanar(model), AutoPlanar(model)
        assert first.name != second.name
        for guide in (first, second):
            step(model, guide, args, Trace_ELBO())

    def test_name_is_free_again_after_its_guide(self):
        model, _ = case("far")
        name = AutoPlanar(model).name
        gc.collect()
        assert AutoPlanar(model).name == name

    def test_a_new_guide_starts_afresh(self):
        """What an earlier guide of the same default name left in the store is not its start."""
        model, args = case("far")
        guide = AutoPlanar(model)
        name = guide.name
        for _ in range(5):
            step(model, guide, args, Trace_ELBO())
        trained = guide.affine.loc.detach().clone()
        del guide
        gc.collect()
        again = AutoPlanar(model)
        assert again.name == name
        again(*args)
        assert not torch.equal(again.affine.loc, trained)
        other_model, other_args = case("hierarchy")
        del again
        gc.collect()
        step(other_model, AutoPlanar(other_model), other_args, Trace_ELBO())

    def test_a_given_name_continues(self):
        model, args = case("far")
        guide = AutoPlanar(model, name="mine")
        step(model, guide, args, Trace_ELBO())
        trained = guide.affine.loc.detach().clone()
        del guide
        gc.collect()
        again = AutoPlanar(model, name="mine")
        again(*args)
        assert torch.equal(again.affine.loc, trained)

    def test_prefix_in_the_store(self):
        model, args = case("far")
        guide = AutoPlanar(model, name="mine")
        guide(*args)
        assert set(pyro.get_param_store()) == {
            f"mine.{name.removeprefix('flow.')}" for name, _ in guide.named_parameters()
        }


class TestStore:
    def trained(self, model, args):
        guide = AutoPlanar(model, name="guide")
        svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(5):
            svi.step(*args)
        return guide

    def test_restored_store_is_adopted_and_trains_on(self):
        """Fact 4: in Pyro a restored store gives random parameters, and then nothing moves."""
        model, args = case("hierarchy")
        guide = self.trained(model, args)
        state = {key: value.clone() for key, value in guide.state_dict().items()}
        file = io.BytesIO()
        torch.save(pyro.get_param_store().get_state(), file)
        del guide
        pyro.clear_param_store()
        file.seek(0)
        pyro.get_param_store().set_state(torch.load(file, weights_only=False))
        fresh = AutoPlanar(model, name="guide").materialize(*args)
        fresh.sample_posterior(3)
        for key, value in fresh.state_dict().items():
            assert torch.equal(value, state[key])
        SVI(model, fresh, Adam({"lr": 0.1}), Trace_ELBO()).step(*args)
        for key, value in fresh.state_dict().items():
            assert not torch.equal(value, state[key])
            assert pyro.get_param_store()._params[f"guide.{key.removeprefix('flow.')}"].equal(value)

    def test_later_load_state_dict_wins(self):
        model, args = case("hierarchy")
        guide = self.trained(model, args)
        other = AutoPlanar(model).materialize(*args).state_dict()
        store = pyro.get_param_store().get_state()
        del guide
        pyro.get_param_store().set_state(store)
        fresh = AutoPlanar(model, name="guide").materialize(*args)
        fresh.load_state_dict(other)
        fresh(*args)
        for key, value in fresh.state_dict().items():
            assert torch.equal(value, other[key])

    def test_store_of_another_shape_is_refused(self):
        model, args = case("hierarchy")
        guide = AutoPlanar(model, num_layers=3, name="guide").materialize(*args)
        guide(*args)
        del guide
        fresh = AutoPlanar(model, num_layers=4, name="guide").materialize(*args)
        with pytest.raises(ValueError, match=r"param store entry 'guide.parts.0.w': expected shape"):
            fresh(*args)

    def test_cleared_store_does_not_lose_the_guide(self):
        model, args = case("hierarchy")
        guide = self.trained(model, args)
        before = copy.deepcopy(guide.state_dict())
        pyro.clear_param_store()
        guide(*args)
        for key, value in guide.state_dict().items():
            assert torch.equal(value, before[key])


class TestCopies:
    """Fact 7: in Pyro, deepcopy after a call raises, and pickling takes the original's model away."""

    @pytest.mark.parametrize("used", [False, True])
    def test_deepcopy_keeps_the_model_and_the_original(self, used):
        model, args = case("hierarchy")
        guide = AutoPlanar(model).materialize(*args)
        if used:
            step(model, guide, args, Trace_ELBO())
        twin = copy.deepcopy(guide)
        assert twin.model is guide.model
        assert twin.name != guide.name
        for key, value in guide.state_dict().items():
            assert torch.equal(twin.state_dict()[key], value)
        state = copy.deepcopy(guide.state_dict())
        step(model, twin, args, Trace_ELBO())
        for key, value in guide.state_dict().items():
            assert torch.equal(state[key], value)
        step(model, guide, args, Trace_ELBO())

    def test_pickle_with_a_model_that_can_be_pickled(self):
        model, args = case("hierarchy")
        guide = AutoPlanar(model)
        step(model, guide, args, Trace_ELBO())
        twin = pickle.loads(pickle.dumps(guide))
        step(model, guide, args, Trace_ELBO())
        step(model, twin, args, Trace_ELBO())

    def test_pickle_with_a_model_that_cannot(self):
        _, args = case("hierarchy")
        guide = AutoPlanar(lambda y: zoo.hierarchy(y)).materialize(*args)
        twin = pickle.loads(pickle.dumps(guide))
        assert guide.model is not None
        values = guide.sample_posterior(3)
        torch.testing.assert_close(twin.log_prob(values), guide.log_prob(values))
        fresh = pickle.loads(pickle.dumps(AutoPlanar(lambda y: zoo.hierarchy(y))))
        with pytest.raises(RuntimeError, match="lost its model"):
            fresh.materialize(*args)

    def test_torch_save(self):
        model, args = case("hierarchy")
        guide = AutoPlanar(model).materialize(*args)
        guide(*args)
        file = io.BytesIO()
        torch.save(guide, file)
        file.seek(0)
        values = guide.sample_posterior(3)
        loaded = torch.load(file, weights_only=False)
        torch.testing.assert_close(loaded.log_prob(values), guide.log_prob(values))


class TestPlacement:
    @pytest.mark.parametrize("before", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype(self, dtype, before):
        model, args = case("hierarchy")
        guide = AutoPlanar(model)
        if before:
            guide.to(dtype).materialize(*args)
        else:
            guide.materialize(*args).to(dtype)
        assert {param.dtype for param in guide.parameters()} == {dtype}
        assert guide.sample_posterior(2)["mu"].dtype == dtype
        assert guide.get_posterior().rsample((2,)).dtype == dtype
        args = tuple(arg.to(dtype) for arg in args)
        step(model, guide, args, Trace_ELBO())

    def test_half_precision_is_refused(self):
        model, args = case("hierarchy")
        with pytest.raises(ValueError, match=r"dtype: expected torch.float32 or torch.float64"):
            AutoPlanar(model).materialize(*args).half()

    def test_default_dtype_is_honoured(self):
        torch.set_default_dtype(torch.float32)
        model, args = case("hierarchy")
        guide = AutoPlanar(model).materialize(*args)
        assert {param.dtype for param in guide.parameters()} == {torch.float32}

    def test_model_dtype_is_honoured(self):
        torch.set_default_dtype(torch.float32)

        def model():
            pyro.sample("x", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))

        assert AutoPlanar(model).materialize().sample_posterior(2)["x"].dtype == torch.float64

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    @pytest.mark.parametrize("before", [False, True])
    def test_cuda(self, before):
        model, args = case("hierarchy")
        cuda = tuple(arg.cuda() for arg in args)
        guide = AutoPlanar(model)
        if before:
            guide.to("cuda").materialize(*cuda)
        else:
            guide.materialize(*args).to("cuda")
        assert guide.sample_posterior(2)["mu"].is_cuda
        step(model, guide, cuda, Trace_ELBO())


@pytest.mark.parametrize("build", ["planar", "spline", "affine_coupling", "affine_autoregressive"])
def test_deepcopy_with_pyros_cached_transforms(build):
    model, args = case("hierarchy")
    guide = AutoFlow(model, lambda dim: getattr(dist.transforms, build)(dim))
    guide(*args)
    twin = copy.deepcopy(guide)
    twin(*args)
    guide(*args)


def test_foreign_state_is_refused():
    model, args = case("hierarchy")
    with pytest.raises(RuntimeError, match="Missing key"):
        AutoPlanar(model).load_state_dict({"loc": torch.zeros(5)})
    longer = AutoPlanar(model, num_layers=3).materialize(*args).state_dict()
    guide = AutoPlanar(model, num_layers=2)
    guide.load_state_dict(longer)  # nothing to compare with yet
    with pytest.raises(RuntimeError, match="size mismatch"):
        guide.materialize(*args)
    guide.materialize(*args)  # and the guide is not spoilt


def test_lost_model_after_a_move():
    _, args = case("hierarchy")
    guide = AutoPlanar(lambda y: zoo.hierarchy(y)).materialize(*args)
    twin = pickle.loads(pickle.dumps(guide)).to(torch.float32)
    with pytest.raises(RuntimeError, match="lost its model"):
        twin.materialize(*args)
