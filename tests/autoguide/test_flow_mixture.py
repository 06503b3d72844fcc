"""AutoFlowMixture: searches, fits, state; gradients are in test_mixture_gradients.py, the contract in
test_contract.py.
"""

import copy
import itertools
import math
import pickle
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, TraceEnum_ELBO
from pyro.optim import Adam

from pyro_flowvi import AutoFlowMixture, AutoRealNVP, compare, diagnose, fit, to_arviz
from pyro_flowvi._program.log_density import UnconstrainedModel
from pyro_flowvi._program.log_weights import LogWeights
from pyro_flowvi.autoguide._affine import enter_frame, leave_frame
from pyro_flowvi.infer._checkpoint import Checkpoint
from pyro_flowvi.init import find_modes
from pyro_flowvi.transforms import Planar
from tests import zoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*found no sample sites configured for enumeration"),
]

SMALL = {"num_layers": 2, "hidden": (5,)}


def two_modes(gap=6.0):
    parts = dist.Normal(torch.tensor([-gap / 2.0, gap / 2.0]), torch.tensor([1.0, 0.5]))
    pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.2, 0.8])), parts))


def square_root(y):
    """The posterior of a root of what is seen with noise: two modes of unlike width."""
    x = pyro.sample("x", dist.Normal(0.5, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x * x, 1.0), obs=y)


Y = torch.tensor([1.5, 2.5])


FAR = torch.tensor([3.5, 4.5])
"""Data with modes that have no mass between them."""


def log_density(x, y=Y):
    likelihood = dist.Normal((x * x).unsqueeze(-1), 1.0).log_prob(y).sum(-1)
    return dist.Normal(0.5, 2.0).log_prob(x) + likelihood


def masses(guide, num=20_000):
    draws = guide.sample_posterior(num)["x"]
    return float((draws > 0).to(torch.float64).mean())


class TestSearch:
    """Modes and weights against densities of which both are known."""

    @staticmethod
    def density(program, *args):
        return UnconstrainedModel(program, args)

    def test_modes_and_weights(self):
        density = self.density(two_modes)
        found = find_modes(density.value_and_grad, density.start, 2, prior=density.prior_draws(8))
        assert found.found == 2
        torch.testing.assert_close(found.gaussian.loc, torch.tensor([[3.0], [-3.0]]), atol=1e-3, rtol=0.0)
        torch.testing.assert_close(
            found.gaussian.scale.flatten(), torch.tensor([0.5, 1.0]), atol=5e-3, rtol=0.0
        )
        torch.testing.assert_close(found.weights, torch.tensor([0.8, 0.2]), atol=5e-3, rtol=0.0)

    def test_only_the_heaviest(self):
        locs, shares = torch.tensor([-8.0, 0.0, 8.0]), torch.tensor([0.2, 0.5, 0.3])

        def model():
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(shares), dist.Normal(locs, 1.0)))

        density = self.density(model)
        found = find_modes(density.value_and_grad, density.start, 2, prior=density.prior_draws(8))
        assert found.gaussian.loc.flatten().tolist() == pytest.approx([0.0, 8.0], abs=1e-3)
        torch.testing.assert_close(found.weights, torch.tensor([0.625, 0.375]), atol=5e-3, rtol=0.0)

    def test_spares_double_the_modes(self):
        density = self.density(two_modes)
        found = find_modes(density.value_and_grad, density.start, 5)
        assert found.found == 2
        right = found.weights[found.gaussian.loc[:, 0] > 0].sum()
        assert right == pytest.approx(0.8, abs=0.02)
        assert found.weights[2:].sum() < 0.2
        assert len({round(float(scale), 3) for scale in found.gaussian.scale}) == 5

    def test_without_modes_it_is_the_best_gaussian(self):
        density = self.density(lambda: pyro.sample("x", dist.Normal(40.0, 5.0)))
        found = find_modes(density.value_and_grad, density.start, 2)
        assert found.found == 1
        torch.testing.assert_close(found.gaussian.loc, torch.full((2, 1), 40.0), atol=1e-2, rtol=0.0)

    def test_many_dimensions(self):
        def model():
            pyro.sample("x", dist.Normal(torch.full((201,), 3.0), 2.0).to_event(1))

        density = self.density(model)
        found = find_modes(density.value_and_grad, density.start, 2)
        assert found.gaussian.scale.shape == (2, 201)
        guide = AutoFlowMixture(model, 2, "planar", 1).materialize().find_modes()
        assert guide.sample_posterior(50)["x"].mean() == pytest.approx(3.0, abs=0.1)

    @pytest.mark.parametrize("affine", ["lower", "elementwise", "low_rank"])
    def test_for_stock_svi(self, affine):
        guide = AutoFlowMixture(two_modes, 2, **SMALL, affine=affine)
        assert guide.find_modes() is guide
        assert masses(guide) == pytest.approx(0.8, abs=0.01)
        loss = TraceEnum_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
        svi = SVI(two_modes, guide, Adam({"lr": 1e-3}), loss)
        for _ in range(50):
            svi.step()
        assert masses(guide) == pytest.approx(0.8, abs=0.05)
        assert abs(loss.loss(two_modes, guide)) < 0.2

    def test_places(self):
        guide = AutoFlowMixture(zoo.hierarchy, 2, "planar", 2).materialize(torch.zeros(4))
        loc, factor = torch.randn(2, 5), torch.randn(2, 5, 5)
        scale = torch.linalg.cholesky(factor @ factor.mT + torch.eye(5))
        guide.place(loc, scale, torch.tensor([0.3, 0.7]))
        q = guide.get_posterior()
        z = q.rsample_components((20_000,))
        torch.testing.assert_close(z.mean(0), loc, atol=0.15, rtol=0.0)
        for k in range(2):
            expected = scale[k] @ scale[k].mT
            torch.testing.assert_close(z[:, k].T.cov(), expected, atol=0.1 * float(expected.max()), rtol=0.0)
        torch.testing.assert_close(guide.weights, torch.tensor([0.3, 0.7]))

    @pytest.mark.parametrize("affine", ["lower", "elementwise"])
    def test_frames_change_nothing(self, affine):
        guide = AutoFlowMixture(zoo.hierarchy, 3, **SMALL, affine=affine).materialize(torch.zeros(4))
        with torch.no_grad():
            for param in guide.parameters():
                param.add_(0.3 * torch.randn_like(param))
        z = torch.randn(20, 5)
        before = guide.get_posterior().log_prob(z)
        names = [name for name, _ in guide.named_parameters()]
        assert enter_frame(guide.affine)
        torch.testing.assert_close(guide.get_posterior().log_prob(z), before)
        assert not guide.affine.loc.any()
        leave_frame(guide.affine)
        torch.testing.assert_close(guide.get_posterior().log_prob(z), before)
        assert [name for name, _ in guide.named_parameters()] == names


class TestFit:
    def test_two_modes_and_one_flow(self):
        """Six standard deviations apart: one flow finds one of them."""
        guide, flow = AutoFlowMixture(two_modes, 2, **SMALL), AutoRealNVP(two_modes, **SMALL)
        result = fit(two_modes, guide, num_steps=150, seed=0, progress=False)
        assert result.start == "modes"
        assert masses(guide) == pytest.approx(0.8, abs=0.02)
        assert result.best_loss == pytest.approx(0.0, abs=0.02)
        assert diagnose(two_modes, guide, num_samples=1000, seed=0).khat < 0.7
        alone = fit(two_modes, flow, num_steps=150, seed=0, progress=False)
        assert masses(flow) in (0.0, 1.0)
        assert alone.best_loss > 0.2

    def test_square_root_against_quadrature(self):
        guide = AutoFlowMixture(square_root, 2, "neural_spline", 2)
        fit(square_root, guide, FAR, num_steps=150, seed=0, progress=False)
        grid = torch.linspace(-8.0, 8.0, 20_001)
        density = log_density(grid, FAR).softmax(0)
        assert masses(guide) == pytest.approx(float(density[grid > 0].sum()), abs=0.02)
        diagnosis = diagnose(square_root, guide, FAR, num_samples=2000, seed=0)
        evidence = float(log_density(grid, FAR).logsumexp(0)) + math.log(16.0 / 20_000)
        assert diagnosis.elbo == pytest.approx(evidence, abs=0.05)
        assert diagnosis.ess > 1800.0

    def test_model_that_does_not_run_in_batches(self):
        model, args = zoo.make_zoo()["not_for_batches"]
        guide = AutoFlowMixture(model, 2, "planar", 1)
        result = fit(model, guide, *args, num_steps=5, num_particles=2, seed=0, progress=False)
        assert math.isfinite(result.best_loss)
        assert diagnose(model, guide, *args, num_samples=100, seed=0).ess > 1.0

    def test_model_that_enumerates(self):
        model, args = zoo.make_zoo()["enumerated"]
        guide = AutoFlowMixture(model, 2, "planar", 1)
        fit(model, guide, *args, num_steps=30, seed=0, progress=False)
        weights = LogWeights(model, guide, args).log_weights(500)
        assert weights.std() < 2.0

    def test_around_a_fit(self):
        guide, other = AutoFlowMixture(square_root, 2, **SMALL), AutoRealNVP(square_root, **SMALL)
        for each in (guide, other):
            fit(square_root, each, Y, num_steps=30, seed=0, progress=False)
        text = str(compare(square_root, {"mixture": guide, "flow": other}, Y, num_samples=200, seed=0))
        assert "mixture" in text
        pytest.importorskip("arviz")
        assert "log_likelihood" in to_arviz(square_root, guide, Y, num_samples=20)
        draws = Predictive(square_root, guide=guide, num_samples=30, parallel=False)(Y)
        assert draws["x"].numel() == 30
        assert guide.sample_posterior(50, resample=True)["x"].shape == (50,)

    @pytest.mark.parametrize("num", [2, "auto"])
    def test_goes_on_from_a_checkpoint(self, tmp_path, monkeypatch, num):
        """Bit for bit, from the third time that it is written: within the components' frames."""

        class Stop(Exception):
            pass

        write, written = Checkpoint.write, itertools.count(1)

        def stopping(self, loop, identity):
            write(self, loop, identity)
            if self.path.name == "stopped" and next(written) == 3:
                raise Stop

        monkeypatch.setattr(sys.modules["pyro_flowvi.infer._fit"], "CHECKPOINT_SECONDS", 0.0)
        monkeypatch.setattr(Checkpoint, "write", stopping)
        states = {}
        for name in ("whole", "stopped", "stopped"):
            pyro.clear_param_store()
            guide = AutoFlowMixture(square_root, num, **SMALL, name="guide")
            path = tmp_path / name
            options = {"num_steps": 60, "lr": 1e-2, "seed": 0, "progress": False, "checkpoint": path}
            try:
                fit(square_root, guide, Y, **options)
                states[name] = copy.deepcopy(guide.state_dict())
            except Stop:
                assert name == "stopped"
            del guide
        for name, value in states["whole"].items():
            assert torch.equal(value, states["stopped"][name])


class TestState:
    """What test_state.py asks of one flow, of stacked ones."""

    @staticmethod
    def trained(name=None):
        guide = AutoFlowMixture(square_root, 2, **SMALL, name=name)
        svi = SVI(square_root, guide, Adam({"lr": 0.05}), TraceEnum_ELBO(max_plate_nesting=1))
        for _ in range(3):
            svi.step(Y)
        return guide

    def test_restored_store_is_adopted(self):
        guide = self.trained("guide")
        state = {key: value.clone() for key, value in guide.state_dict().items()}
        store = copy.deepcopy(pyro.get_param_store().get_state())
        del guide
        pyro.clear_param_store()
        pyro.get_param_store().set_state(store)
        fresh = AutoFlowMixture(square_root, 2, **SMALL, name="guide").materialize(Y)
        fresh.sample_posterior(3)
        assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())

    def test_copies(self):
        guide = self.trained()
        values = guide.sample_posterior(5)
        for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
            torch.testing.assert_close(twin.log_prob(values), guide.log_prob(values))
            svi = SVI(square_root, twin, Adam({"lr": 0.05}), TraceEnum_ELBO(max_plate_nesting=1))
            svi.step(Y)
            assert not torch.equal(twin.log_prob(values), guide.log_prob(values))

    def test_dtype(self):
        torch.set_default_dtype(torch.float32)
        guide = self.trained()
        assert guide.sample_posterior(2)["x"].dtype == torch.float32
        fit(square_root, guide, Y.float(), num_steps=5, seed=0, progress=False)
        assert {param.dtype for param in guide.parameters()} == {torch.float32}
        guide.to(torch.float64)
        assert guide.log_prob({"x": Y.double()}).dtype == torch.float64

    def test_one_component_is_the_flow(self):
        torch.manual_seed(0)
        guide = AutoFlowMixture(square_root, 1, **SMALL).materialize(Y)
        torch.manual_seed(0)
        flow = AutoRealNVP(square_root, **SMALL).materialize(Y)
        draws = flow.sample_posterior(7)
        torch.testing.assert_close(guide.log_prob(draws), flow.log_prob(draws))
        result = fit(square_root, guide, Y, num_steps=20, seed=0, progress=False)
        assert len(result.losses) == 20

    def test_quantiles_are_those_of_the_mixture(self):
        guide = AutoFlowMixture(two_modes, 2, **SMALL).find_modes()
        truth = dist.Normal(torch.tensor([-3.0, 3.0]), torch.tensor([1.0, 0.5]))
        found = guide.quantiles([0.05, 0.1, 0.5, 0.9])["x"]
        levels = (truth.cdf(found.unsqueeze(-1)) * torch.tensor([0.2, 0.8])).sum(-1)
        torch.testing.assert_close(levels, torch.tensor([0.05, 0.1, 0.5, 0.9]), atol=5e-3, rtol=0.0)
        assert torch.equal(guide.median()["x"], found[2])

    def test_starts_apart(self):
        guide = AutoFlowMixture(zoo.hierarchy, 3, **SMALL, init_spread=2.0).materialize(torch.zeros(4))
        torch.testing.assert_close(guide.affine.loc[0], guide._init_loc())
        assert 0.5 < guide.affine.loc[1:].std() < 4.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_components": 0}, "num_components: expected a positive integer"),
        ({"num_components": 2.0}, "num_components: expected a positive integer"),
        ({"flow": "glow"}, "flow: expected one of"),
        ({"flow": 3}, "flow: expected a key of FLOWS or a callable"),
        ({"flow": Planar, "hidden": (3,)}, "hidden: expected None with a callable flow"),
        ({"flow": Planar, "num_layers": 3}, "num_layers: expected None with a callable flow"),
        ({"num_layers": 0}, "num_layers: expected a positive integer"),
        ({"enumerate": "both"}, "enumerate: expected one of"),
        ({"init_spread": -1.0}, "init_spread: expected a positive number"),
        ({"affine": "upper"}, "affine: expected 'auto', None or"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        AutoFlowMixture(zoo.one_dim, **options)


def test_bad_places():
    guide = AutoFlowMixture(two_modes, 2, **SMALL).materialize()
    ones = torch.ones(2, 1)
    for arguments, message in (
        ((ones[0], ones, ones[:, 0]), "loc: expected shape"),
        ((ones, ones[0], ones[:, 0]), "scale: expected shape"),
        ((ones, ones, ones), "weights: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            guide.place(*arguments)
    free = AutoFlowMixture(two_modes, 2, **SMALL, affine=None).materialize()
    with pytest.raises(ValueError, match="affine: expected an affine map"):
        free.find_modes()


def test_no_exact_inverse():
    with pytest.raises(ValueError, match="transforms: expected modules that are transforms"):
        AutoFlowMixture(two_modes, 2, lambda dim: dist.transforms.AffineTransform(0.0, 1.0)).materialize()


def test_nothing_to_infer():
    with pytest.raises(ValueError, match="expected at least one continuous latent"):
        AutoFlowMixture(lambda: None).materialize()
