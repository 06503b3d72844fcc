"""AutoFlowMixture with num_components="auto": how many components it has, from set-up to its files."""

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.optim import Adam

from pyro_flowvi import AutoFlowMixture, AutoRealNVP, fit, load_posterior
from tests import zoo
from tests.autoguide.test_flow_mixture import FAR, SMALL, log_density, square_root, two_modes

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*found no sample sites configured for enumeration"),
]

OPTIONS = {"num_steps": 60, "seed": 0, "progress": False}
NEAR_ZERO = torch.tensor([0.1, -0.1])
"""Data of which the square root has one mode."""


def auto(model, **options):
    return AutoFlowMixture(model, "auto", **SMALL, **options)


def share_of_positive(y):
    grid = torch.linspace(-8.0, 8.0, 20_001)
    density = log_density(grid, y).softmax(0)
    return float(density[grid > 0].sum())


def many(num):
    """Normals in a row, of masses 1, 2, ..., num."""
    locs, shares = 8.0 * torch.arange(float(num)), torch.arange(1.0, num + 1.0)

    def model():
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(shares), dist.Normal(locs, 1.0)))

    return model, shares / shares.sum()


class TestSetUp:
    def test_is_told_at_materialize(self):
        guide = auto(two_modes)
        assert guide.num_components == "auto"
        assert guide.materialize() is guide
        assert guide.num_components == 2
        torch.testing.assert_close(guide.weights, torch.tensor([0.8, 0.2]), atol=5e-3, rtol=0.0)
        assert guide.affine.loc.flatten().tolist() == pytest.approx([3.0, -3.0], abs=0.01)

    def test_first_call_of_stock_svi(self):
        """The parameters exist before the optimizer looks for them."""
        guide = auto(square_root)
        svi = SVI(square_root, guide, Adam({"lr": 1e-3}), TraceEnum_ELBO(max_plate_nesting=1))
        for _ in range(3):
            svi.step(FAR)
        assert guide.num_components == 2
        assert {name for name, _ in guide.named_parameters()} == {
            f"flow.{name.removeprefix(guide.name + '.')}" for name in pyro.get_param_store()
        }

    def test_search_is_no_part_of_the_users_noise(self):
        """That of the flows' networks alone, as with the same number given."""
        after = []
        for num in ("auto", 2):
            torch.manual_seed(0)
            AutoFlowMixture(two_modes, num, **SMALL).materialize()
            after.append(torch.rand(3))
        torch.testing.assert_close(*after)

    def test_new_data_need_a_new_search(self):
        guide = auto(square_root).materialize(FAR)
        assert guide.materialize(NEAR_ZERO).num_components == 2
        assert guide.find_modes(NEAR_ZERO).num_components == 1
        assert guide.find_modes(FAR).num_components == 2
        assert len(guide.weights) == 2

    @pytest.mark.filterwarnings("ignore:the model is run draw by draw")
    def test_model_that_is_run_draw_by_draw(self):
        def model():
            x = pyro.sample("x", dist.Normal(0.0, 2.0))
            pyro.factor("two", torch.logaddexp(-8.0 * (x - 3.0) ** 2, -8.0 * (x + 3.0) ** 2 + float(x * 0.0)))

        assert auto(model).materialize().num_components == 2

    def test_enumerated_latents(self):
        model, args = zoo.make_zoo()["enumerated"]
        assert auto(model).materialize(*args).num_components >= 1

    @pytest.mark.parametrize("options", [{"num_components": "automatic"}, {"num_components": 2.5}])
    def test_other_words(self, options):
        with pytest.raises(ValueError, match="num_components: expected a positive integer"):
            AutoFlowMixture(two_modes, **options)

    def test_without_places(self):
        with pytest.raises(ValueError, match="affine: expected an affine map"):
            AutoFlowMixture(two_modes, "auto", affine=None)


class TestFit:
    def test_masses_against_quadrature(self):
        guide = auto(square_root)
        result = fit(square_root, guide, FAR, **OPTIONS)
        share = share_of_positive(FAR)
        assert guide.num_components == 2
        assert result.modes.masses[0] == pytest.approx(share, rel=0.05)
        assert abs(float(result.modes.masses[0]) - share) < 5.0 * float(result.modes.se[0]) + 0.01
        assert guide.weights.max() == pytest.approx(share, rel=0.1)
        assert f"2 modes, masses {share:.2f}" in repr(result)
        assert "2 modes" in result._repr_html_()

    def test_one_mode_is_one_flow(self):
        guide = auto(square_root)
        result = fit(square_root, guide, NEAR_ZERO, **OPTIONS)
        assert guide.num_components == 1
        assert result.modes.masses.tolist() == [1.0]
        assert "\n  1 mode\n" in f"{result!r}\n"
        assert result.start != "modes"

    @pytest.mark.parametrize("num", [1, "auto"])
    def test_one_transform_of_pyros(self, num):
        """With a cache, which is full when the step makes its own copy."""
        guide = AutoFlowMixture(square_root, num, lambda dim: dist.transforms.Householder(dim, 1))
        result = fit(square_root, guide, NEAR_ZERO, **OPTIONS)
        assert guide.num_components == 1
        assert math.isfinite(result.best_loss)

    def test_many_modes(self):
        model, masses = many(5)
        guide = auto(model)
        result = fit(model, guide, **OPTIONS)
        assert guide.num_components == 5
        torch.testing.assert_close(result.modes.masses, masses.flip(0), rtol=0.1, atol=0.01)
        assert result.modes.components == ((0,), (1,), (2,), (3,), (4,))
        assert result.best_loss == pytest.approx(0.0, abs=0.02)

    def test_new_data_may_have_another_number(self):
        """Of the same guide: its parameters are new ones, in the param store too."""
        guide = auto(square_root)
        for data, num in ((FAR, 2), (NEAR_ZERO, 1), (FAR, 2)):
            fit(square_root, guide, data, **OPTIONS)
            assert guide.num_components == num == len(guide.weights)
            assert all(len(value) == num for value in pyro.get_param_store().values())
        assert guide.sample_posterior(100)["x"].abs().min() > 0.5

    def test_goes_on_with_the_number_of_an_earlier_guide(self):
        first = auto(square_root)
        fit(square_root, first, FAR, **OPTIONS)
        again = auto(square_root)
        result = fit(square_root, again, FAR + 0.1, init=first, **OPTIONS)
        assert (result.start, again.num_components) == ("previous", 2)
        result = fit(square_root, first, FAR, init=first, **OPTIONS)
        assert (result.start, first.num_components) == ("previous", 2)

    def test_is_the_fit_of_that_number(self):
        """Where the components start, the same steps are taken."""
        guides = auto(two_modes, name="a"), AutoFlowMixture(two_modes, 2, **SMALL, name="b")
        losses = [fit(two_modes, guide, **OPTIONS).losses for guide in guides]
        assert losses[0][0] == pytest.approx(float(losses[1][0]), abs=0.05)

    def test_goes_on_from_a_checkpoint(self, tmp_path):
        values = []
        for _ in range(2):
            pyro.clear_param_store()
            guide = auto(square_root, name="guide")
            fit(square_root, guide, FAR, **OPTIONS, checkpoint=tmp_path / "run")
            values.append(guide.log_prob({"x": FAR}))
            assert guide.num_components == 2
            del guide
        assert torch.equal(*values)
        with pytest.raises(ValueError, match="checkpoint"):
            fit(
                square_root,
                auto(square_root, name="guide"),
                NEAR_ZERO,
                **OPTIONS,
                checkpoint=tmp_path / "run",
            )

    def test_components_that_share_a_mode_are_one(self):
        """Of a number that is given: what is left over is at the modes again."""
        guide = AutoFlowMixture(two_modes, 5, **SMALL)
        modes = fit(two_modes, guide, **OPTIONS).modes
        assert sum(map(len, modes.components)) <= 5
        assert len(modes.masses) == 2
        assert modes.masses[0] == pytest.approx(0.8, abs=0.02)
        assert "2 modes" in repr(modes)
        assert "components" in repr(modes)

    def test_components_along_a_ring_are_one_mode(self):
        """Whose mass they share out among them."""

        def ring():
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
            pyro.factor("ring", -2.0 * (z.norm(dim=-1) - 4.0).square())

        guide = AutoFlowMixture(ring, 4, **SMALL)
        modes = fit(ring, guide, **{**OPTIONS, "num_steps": 200}).modes
        assert len(modes.masses) == 1
        assert repr(modes) == "1 mode, by 4 components"

    def test_other_guides_have_none(self):
        result = fit(two_modes, AutoRealNVP(two_modes, **SMALL), **OPTIONS)
        assert result.modes is None
        assert "mode" not in repr(result)


class TestState:
    """A state brings its own number of components."""

    @pytest.fixture
    def trained(self):
        guide = auto(square_root)
        fit(square_root, guide, FAR, **OPTIONS)
        return guide

    def test_fresh_guide(self, trained):
        state = copy.deepcopy(trained.state_dict())
        fresh = auto(square_root)
        fresh.load_state_dict(state)
        fresh.materialize(NEAR_ZERO)
        assert fresh.num_components == 2
        torch.testing.assert_close(fresh.log_prob({"x": FAR}), trained.log_prob({"x": FAR}))

    @pytest.mark.parametrize("data", [NEAR_ZERO, FAR])
    def test_guide_that_has_a_number(self, trained, data):
        other = auto(square_root).materialize(data)
        other.load_state_dict(trained.state_dict())
        assert other.num_components == 2
        torch.testing.assert_close(other.log_prob({"x": FAR}), trained.log_prob({"x": FAR}))
        svi = SVI(square_root, other, Adam({"lr": 1e-3}), TraceEnum_ELBO(max_plate_nesting=1))
        assert math.isfinite(svi.step(FAR))

    def test_given_number_is_held(self, trained):
        three = AutoFlowMixture(square_root, 3, **SMALL).materialize(FAR)
        with pytest.raises(RuntimeError, match="size mismatch for flow"):
            three.load_state_dict(trained.state_dict())

    @pytest.mark.parametrize("data", [FAR, NEAR_ZERO])
    def test_restored_store(self, data):
        guide = auto(square_root, name="guide")
        fit(square_root, guide, data, **OPTIONS)
        expected, num = guide.log_prob({"x": FAR}), guide.num_components
        store = copy.deepcopy(pyro.get_param_store().get_state())
        del guide
        pyro.clear_param_store()
        pyro.get_param_store().set_state(store)
        fresh = auto(square_root, name="guide").materialize(FAR)
        assert fresh.num_components == num
        if num == 2:
            torch.testing.assert_close(fresh.log_prob({"x": FAR}), expected)

    def test_copies(self, trained):
        values = trained.sample_posterior(5)
        for twin in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))):
            assert twin.num_components == 2
            torch.testing.assert_close(twin.log_prob(values), trained.log_prob(values))
        unseen = pickle.loads(pickle.dumps(auto(square_root)))
        assert unseen.num_components == "auto"
        assert unseen.materialize(FAR).num_components == 2

    def test_export(self, trained):
        file = io.BytesIO()
        trained.export(file)
        file.seek(0)
        values = {"x": FAR}
        torch.testing.assert_close(load_posterior(file).log_prob(values), trained.log_prob(values))

    def test_dtype(self):
        torch.set_default_dtype(torch.float32)
        guide = auto(square_root)
        fit(square_root, guide, FAR.float(), **OPTIONS)
        assert guide.num_components == 2
        assert {param.dtype for param in guide.parameters()} == {torch.float32}
